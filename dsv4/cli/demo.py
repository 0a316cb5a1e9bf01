"""`dsv4 demo`: train a small V4 on real English, watch the loss fall, and continue a prompt through the memory."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv4.cli.common import resolve_device
from dsv4.cli.hints import command
from dsv4.cli.train import run_training
from dsv4.config import ModelConfig
from dsv4.cost import flops_per_token, parameters
from dsv4.engine import Engine, SamplingParams
from dsv4.files import write_json
from dsv4.model import LanguageModel
from dsv4.train.batches import heldout_batches
from dsv4.train.log import plot_loss, read_log
from dsv4.train.ngram import ngram_bits_per_byte
from dsv4.train.recipes import resolve
from dsv4.train.runconfig import RunConfig
from dsv4.train.trainer import Trainer

PROMPT = "The people of the United States"


def demo(
    out: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/demo"),
    steps: Annotated[int | None, typer.Option(help="Fewer or more steps than the recipe's.")] = None,
    prompt: Annotated[str, typer.Option(help="What the trained model continues.")] = PROMPT,
    tokens: Annotated[int, typer.Option(help="How many tokens it adds.")] = 100,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Train a small DeepSeek-V4 in five to ten minutes on two cores; a second call goes on where the first one stopped.

    Example: dsv4 demo --out runs/demo
    """
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=0, max_tokens=tokens)  # judged before any work
    run = resolve("demo")
    if steps is not None:
        run = resolve("demo", None, _in_steps(run, steps))
    if not as_json:
        _introduce(run)
    trainer = run_training(run, out, resume="auto", device=device)
    if not trainer.finished:
        again = ["demo", "--out", out, *(["--steps", str(steps)] if steps is not None else [])]
        print(f"stopped; go on with: {command(*again)}", file=sys.stderr)
        raise typer.Exit(1)
    summary = summarise(trainer)
    plot_loss(out, {name: summary[f"heldout_bpb_{name}"] for name in ("bigram", "unigram")})
    summary |= _sample(out, prompt, params, device)
    write_json(out / "summary.json", summary)
    print(json.dumps(summary)) if as_json else _show(summary, out)


def _in_steps(run: RunConfig, steps: int) -> list[str]:
    """The settings of the same course in another number of steps."""
    indexer, whole = run.indexer, run.schedule.steps
    return [
        f"schedule.steps={steps}", f"schedule.warmup={min(run.schedule.warmup, steps // 10)}",
        f"indexer.dense={indexer.dense * steps // whole}", f"indexer.warmup={indexer.warmup * steps // whole}",
    ]  # fmt: skip


def summarise(trainer: Trainer) -> dict[str, Any]:
    """The finished run's figures, and those of counting models that learned from exactly the same batches."""
    run = trainer.config
    updates = [r for r in read_log(trainer.folder.log) if "loss" in r]
    evaluated = [r["heldout_bpb"] for r in updates if r["step"] == run.schedule.steps and "heldout_bpb" in r]
    seen = (trainer.batches.batch(i) for i in range(run.schedule.steps))
    held = heldout_batches(trainer.heldout, run.data.tokens_per_step, run.data.seq_len, run.save.eval_tokens)
    counted = ngram_bits_per_byte(seen, held, run.model.vocab_size)
    size = parameters(run.model)
    return {
        "steps": run.schedule.steps,
        "tokens": trainer.progress.tokens,
        "loss_first": updates[0]["loss"] if updates else None,  # a log may have been deleted
        "loss_last": updates[-1]["loss"] if updates else None,
        "heldout_bpb": evaluated[-1] if evaluated else trainer.evaluate(),
        **{f"heldout_bpb_{name}": value for name, value in counted.items()},
        "parameters": size["total"],
        "active_parameters": size["active"],
        "flops_per_token": flops_per_token(run.model, run.data.seq_len),
        "index_recall": next((r["index_recall"] for r in reversed(updates) if r.get("index_recall")), None),
    }


def _sample(out: Path, prompt: str, params: SamplingParams, device: str) -> dict[str, Any]:
    """Generate from the checkpoint that was just written, through the compressed memory."""
    engine = Engine.open(out, device=resolve_device(device), speculative=1)
    completion = engine.generate([prompt], params)[0]
    return {
        "prompt": prompt,
        "continuation": completion.text,
        "drafted": completion.drafted,
        "accepted": completion.accepted,
        "sample_tokens": len(completion.prompt_ids) + len(completion.ids),
        "sample_cache_bytes": completion.memory_bytes,
        **_memory_of(engine.model),
    }


def _memory_of(model: LanguageModel, tokens: int = 4096) -> dict[str, float]:
    """Bytes that memories really allocate: what each token adds on average, and what is there from the start."""
    short, long = (model.new_cache(capacity=n, max_rewind=0)[0].bytes() for n in (128, 128 + tokens))
    per_token = (long - short) / tokens
    return {"cache_bytes_per_token": per_token, "cache_bytes_fixed": short - 128 * per_token}


def _introduce(run: RunConfig) -> None:
    assert isinstance(run.model, ModelConfig)
    kinds = [run.model.layer_kind(i).name for i in range(run.model.num_hidden_layers)]
    print(
        f"A DeepSeek-V4 of {parameters(run.model)['total'] / 1e6:.1f}M parameters, layers {' '.join(kinds)}, "
        f"trained with Muon on {run.schedule.steps * run.data.tokens_per_step:,} tokens of public-domain English."
    )


def _percent(by_layer: dict[str, float] | None) -> str:
    return "an unknown share" if not by_layer else f"{sum(by_layer.values()) / len(by_layer):.0%}"


def _show(s: dict[str, Any], out: Path) -> None:
    first, last = ("unknown" if x is None else f"{x:.3f}" for x in (s["loss_first"], s["loss_last"]))
    print(f"""
parameters           {s["parameters"]:,}, of which active per token {s["active_parameters"]:,}
FLOPs per token      {s["flops_per_token"]:,} (forward, at the training length)
training loss        {first} -> {last} nats per token over {s["tokens"]:,} tokens
held-out text        {s["heldout_bpb"]:.3f} bits per byte
  bigram, same text  {s["heldout_bpb_bigram"]:.3f}
  unigram            {s["heldout_bpb_unigram"]:.3f}
cache                {s["cache_bytes_per_token"]:,.0f} bytes per token, {s["cache_bytes_fixed"]:,.0f} that do not grow
                     ({s["sample_cache_bytes"]:,} held for the {s["sample_tokens"]} tokens below)
indexer              {_percent(s["index_recall"])} of the entries that attention wants are among those it chooses
MTP block            {s["accepted"]} of the {s["drafted"]} tokens that it drafted below were accepted

{s["prompt"]}|{s["continuation"]}

In {out}: config.yaml, log.jsonl, loss.png, summary.json, checkpoints/. Go on with
  {command("generate", out, "My fellow citizens", "--temperature", "0.8")}""")
