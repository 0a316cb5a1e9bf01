"""Trains one small V4 with each of three residuals and asks how far each carries a small change of its input.

`python experiments/0003-residuals/run.py [--out FOLDER] [--steps 120] [--seeds 3]`: mHC, a plain residual and
unconstrained hyper-connections, with the same block weights at the start, the same batches and the same course of
rates. Every trained model is asked by what gain.certificate, gain.jacobian and gain.pgd use (dsv4/probe), with the same
held-out texts. A program that was stopped goes on where it was. Writes FOLDER/figures.json and prints the table of
README.md.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dsv4 import Transformer, controls, data
from dsv4.config import ModelConfig
from dsv4.files import write_json
from dsv4.probe import stats
from dsv4.probe.embedding import LARGEST, Asked, flip_radii
from dsv4.probe.jacobian import blocks_of, embeddings_to_hidden, gain, without_parameters
from dsv4.probe.mixing import certificate, mixers_of
from dsv4.probe.subject import Settings, Subject
from dsv4.train.recipes import resolve
from dsv4.train.runconfig import RunConfig
from dsv4.train.trainer import Trainer

RESIDUALS = ("mhc", "plain", "hc")
TEXTS, TOKENS = 4, 64  # whose gain is measured
ATTACKED = 6  # texts of 32 tokens that a gradient attack changes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/residuals"))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for seed in range(given.seeds):
        for residual in RESIDUALS:
            found[f"{residual}-{seed}"] = one(recipe(residual, seed, given.steps), given.out / f"{residual}-{seed}")
    write_json(given.out / "figures.json", {"steps": given.steps, "runs": found})
    print(report(found))


def recipe(residual: str, seed: int, steps: int) -> RunConfig:
    """`phases` of the project's recipes, deeper and narrower, on single bytes. index_topk is all entries of a text: no
    indexer chooses, and so no jump of a choice lies between the residuals."""
    config = resolve(
        "phases", None,
        [f"seed={seed}", f"model.residual={residual}", "model.num_hidden_layers=6", "model.hidden_size=64",
         "model.compress_ratios=[0,4,128,4,128,4]", "model.num_nextn_predict_layers=0", "model.index_topk=64",
         "data.seq_len=256", "data.tokens_per_step=1024", f"schedule.steps={steps}", "schedule.warmup=10",
         "indexer.train=false", "indexer.dense=0", "indexer.warmup=0",
         "save.every=50", "save.keep=1", f"save.eval_every={steps}", "save.eval_tokens=16384"],
    )  # fmt: skip
    return config


def one(config: RunConfig, folder: Path) -> dict[str, Any]:
    """One run to its end, and what its model answers: what is done already is not done again."""
    if (folder / "figures.json").exists():
        return json.loads((folder / "figures.json").read_text())
    run = Trainer(config, folder / "run", resume="auto")
    if run.progress.step == 0:
        begin_as_mhc(run, config)
    if not run.run():
        raise SystemExit("stopped: the same command goes on from here")
    subject = Subject(run.model, run.tokenizer, name=folder.name, text=heldout())
    last = json.loads(run.folder.log.read_text().splitlines()[-1])
    figures = {
        "heldout_bpb": last["heldout_bpb"], "seconds": run.progress.seconds,
        "parameters": run.model.num_parameters(), **answers(subject),
    }  # fmt: skip
    write_json(folder / "figures.json", figures)
    print(folder.name, f"{figures['heldout_bpb']:.3f} bpb, rho", figures["rho"], file=sys.stderr, flush=True)
    return figures


def answers(subject: Subject) -> dict[str, Any]:
    """Of a trained model: rho and sigma of every text from the embeddings to the head, rho of every block on the first
    text, the radii at which a gradient attack changes the next token, and the composites of the streams' mixing."""
    model, settings = subject.model, Settings()
    assert isinstance(model, Transformer)
    texts = list(subject.windows(TEXTS, TOKENS, settings, salt=2))
    with without_parameters(model):
        whole = [gain(*embeddings_to_hidden(model, ids), settings.generator(100 + i), directions=1, tolerance=1e-2)
                 for i, ids in enumerate(texts)]  # fmt: skip
        blocks = [gain(f, x, settings.generator(200 + i), directions=1, tolerance=1e-2)
                  for i, (f, x) in enumerate(blocks_of(model, texts[0]))]  # fmt: skip
        ids = torch.stack(list(subject.windows(ATTACKED, 32, settings, salt=11)))
        radii, _ = flip_radii(Asked(model, ids), settings, steps=8, halvings=5)
    figures: dict[str, Any] = {
        "rho": [g.relative for g in whole], "sigma": [g.sigma for g in whole],
        "error_of_sigma": max(g.residual for g in [*whole, *blocks]), "rho_of_blocks": [g.relative for g in blocks],
        "sigma_of_blocks": [g.sigma for g in blocks], "flip_radii": radii.clamp(max=LARGEST).tolist(),
    }  # fmt: skip
    if model.config.num_streams > 1:
        found = certificate(mixers_of(model, subject.ids(1000, settings, salt=1)))
        figures |= {"forward": found.forward, "backward": found.backward, "spectral": found.spectral}
        figures["certificate_holds"] = found.holds
    return figures


@torch.no_grad()
def begin_as_mhc(run: Trainer, config: RunConfig) -> None:
    """Give every weight that two residuals share the number that it has with mHC. Only where mixing starts is its own:
    by what it is made of, it would not start near the identity with another's."""
    assert isinstance(config.model, ModelConfig)
    torch.manual_seed(config.seed)
    first = dict(controls.build(run.config.model.with_(residual="mhc")).named_parameters())  # type: ignore[union-attr]
    for name, p in run.model.named_parameters():
        if not name.endswith(("hc_attn_base", "hc_ffn_base")):
            p.copy_(first[name])


def heldout() -> str:
    """English that no model here was trained on."""
    return "\n\n".join(islice(data.documents("heldout"), 200))[:200_000]


# --- the table -------------------------------------------------------------------------------------------------------


def report(found: dict[str, dict[str, Any]]) -> str:
    """The figures of README.md, as text."""
    runs = {r: [run for name, run in found.items() if name.startswith(f"{r}-")] for r in RESIDUALS}
    lines = [f"{'':28}" + "".join(f"{name:>12}" for name in RESIDUALS)]

    def row(what: str, of: Callable[[dict[str, Any]], float], form: str = "12.3f") -> None:
        for seed in range(len(runs["mhc"])):
            lines.append(f"{f'{what}, seed {seed}':28}" + "".join(f"{of(runs[r][seed]):{form}}" for r in RESIDUALS))

    row("held-out bpb", lambda run: run["heldout_bpb"])
    row("sigma", lambda run: math.exp(logs(run["sigma"]).mean()), "12.1f")
    row("rho", lambda run: math.exp(logs(run["rho"]).mean()))
    row("rho, loudest block", lambda run: max(run["rho_of_blocks"]))
    row("eps50", lambda run: float(torch.tensor(run["flip_radii"]).median()), "12.4f")
    for what in ("forward", "backward", "spectral"):
        row(f"{what} gain", lambda run, what=what: run.get(what, 1.0), "12.4f")
    lines.append("")
    for a, b in (("mhc", "plain"), ("mhc", "hc"), ("hc", "plain")):
        ratio = torch.stack([logs(x["rho"]) - logs(y["rho"]) for x, y in zip(runs[a], runs[b], strict=True)])
        middle, over = math.exp(ratio.mean()), {"seeds and texts": stats.crossed(ratio)}
        if len(ratio) > 1:
            over["seeds alone"] = stats.student(ratio.mean(dim=1))
        spread = "; ".join(f"over {k} {math.exp(low):.3f} to {math.exp(high):.3f}" for k, (low, high) in over.items())
        lines.append(f"R = rho({a}) / rho({b}) = {middle:.3f}; 95%: {spread}")
    return "\n".join(lines)


def logs(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).log()


if __name__ == "__main__":
    main()
