"""`dsv4 demo`: train a small V4 on real English, watch the loss fall, and continue a prompt through the memory."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv4.checkpoint import write_atomically
from dsv4.cli.common import open_model
from dsv4.cli.train import run_training
from dsv4.cost import flops_per_token, parameters
from dsv4.engine import Engine, SamplingParams
from dsv4.model import Transformer
from dsv4.train.data import Batches, Packed, heldout_batches
from dsv4.train.log import plot_loss, read_log
from dsv4.train.ngram import ngram_bits_per_byte
from dsv4.train.recipes import RunConfig, merge, resolve
from dsv4.train.state import latest

PROMPT = "The people of the United States"


def demo(
    out: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/demo"),
    steps: Annotated[int | None, typer.Option(help="Fewer or more steps than the recipe's.")] = None,
    prompt: Annotated[str, typer.Option(help="What the trained model continues.")] = PROMPT,
    tokens: Annotated[int, typer.Option(help="How many tokens it adds.")] = 100,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Train a small DeepSeek-V4 in about five minutes on two cores; a second call goes on where the first one stopped.

    Example: dsv4 demo --out runs/demo
    """
    run = resolve("demo")
    if steps is not None:
        s = run.schedule
        run = merge(run, {"schedule": {"steps": steps, "warmup": min(s.warmup, steps // 10)}})
    if not as_json:
        _introduce(run)
    if not run_training(run, out, resume="auto", device=device):
        print(f"stopped; `dsv4 demo --out {out}` goes on from here", file=sys.stderr)
        raise typer.Exit(1)
    summary = summarise(run, out)
    plot_loss(out, {name: summary[f"heldout_bpb_{name}"] for name in ("bigram", "unigram")})
    summary |= _sample(out, prompt, tokens, device)
    text = json.dumps(summary, indent=1)
    write_atomically(out / "summary.json", lambda path: path.write_text(text, encoding="utf-8"))
    print(json.dumps(summary)) if as_json else _show(summary, out)


def summarise(run: RunConfig, out: Path) -> dict[str, Any]:
    """The run's figures, and those of counting models that learned from exactly the same batches."""
    records = read_log(out / "log.jsonl")
    train, heldout = (Packed.open(out / "data", split) for split in ("train", "heldout"))
    data = run.data
    batches = Batches(train, data.tokens_per_step // data.micro_batches, seed=run.seed, seq_len=data.seq_len)
    seen = (batches.batch(i) for i in range(run.schedule.steps * data.micro_batches))
    held = heldout_batches(heldout, data.tokens_per_step // data.micro_batches, data.seq_len, run.save.eval_tokens)
    counted = ngram_bits_per_byte(seen, held, run.model.vocab_size)
    size = parameters(run.model)
    return {
        "steps": run.schedule.steps,
        "tokens": records[-1]["tokens"],
        "loss_first": records[0]["loss"],
        "loss_last": records[-1]["loss"],
        "heldout_bpb": records[-1]["heldout_bpb"],
        **{f"heldout_bpb_{name}": value for name, value in counted.items()},
        "parameters": size["total"],
        "active_parameters": size["active"],
        "flops_per_token": flops_per_token(run.model, data.seq_len),
    }


def _sample(out: Path, prompt: str, tokens: int, device: str) -> dict[str, Any]:
    """Generate from the checkpoint that was just written, through the compressed memory."""
    checkpoint = latest(out)
    assert checkpoint is not None
    model, tokenizer = open_model(checkpoint, device)
    engine = Engine(model, tokenizer)
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=0, max_tokens=tokens)
    completion = engine.generate([prompt], params)[0]
    return {
        "prompt": prompt,
        "continuation": completion.text,
        "sample_tokens": len(completion.prompt_ids) + len(completion.ids),
        "sample_cache_bytes": completion.memory_bytes,
        **_memory_of(model),
    }


def _memory_of(model: Transformer, tokens: int = 4096) -> dict[str, float]:
    """Bytes that memories really allocate: what each token adds on average, and what is there from the start."""
    short, long = (model.new_cache(capacity=n, max_rewind=0).bytes() for n in (128, 128 + tokens))
    per_token = (long - short) / tokens
    return {"cache_bytes_per_token": per_token, "cache_bytes_fixed": short - 128 * per_token}


def _introduce(run: RunConfig) -> None:
    kinds = [run.model.layer_kind(i) for i in range(run.model.num_hidden_layers)]
    print(
        f"A DeepSeek-V4 of {parameters(run.model)['total'] / 1e6:.1f}M parameters, layers {' '.join(kinds)}, "
        f"trained with Muon on {run.schedule.steps * run.data.tokens_per_step:,} tokens of public-domain English."
    )


def _show(s: dict[str, Any], out: Path) -> None:
    print(f"""
parameters           {s["parameters"]:,}, of which active per token {s["active_parameters"]:,}
FLOPs per token      {s["flops_per_token"]:,} (forward, at the training length)
training loss        {s["loss_first"]:.3f} -> {s["loss_last"]:.3f} nats per token over {s["tokens"]:,} tokens
held-out text        {s["heldout_bpb"]:.3f} bits per byte
  bigram, same text  {s["heldout_bpb_bigram"]:.3f}
  unigram            {s["heldout_bpb_unigram"]:.3f}
cache                {s["cache_bytes_per_token"]:,.0f} bytes per token, {s["cache_bytes_fixed"]:,.0f} that do not grow
                     ({s["sample_cache_bytes"]:,} held for the {s["sample_tokens"]} tokens below)

{s["prompt"]}|{s["continuation"]}

In {out}: config.yaml, log.jsonl, loss.png, summary.json, checkpoints/. Go on with
  dsv4 generate {out} "My fellow citizens" --temperature 0.8""")
