"""`dsv4 generate`: continue prompts, printing the text as it comes."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from dsv4.cli import common
from dsv4.engine import Completion, Engine, SamplingParams
from dsv4.errors import UserError
from dsv4.files import read_lines


def generate(
    model_folder: common.ModelFolder = None,
    prompt: Annotated[
        str | None, Argument(help="The text to continue; - reads it from stdin; none: begin a document.")
    ] = None,
    prompts: Annotated[list[str] | None, Option("--prompt", help="One more prompt; repeatable.")] = None,
    prompt_file: Annotated[Path | None, Option(help="A text file with a prompt on each line.")] = None,
    max_tokens: common.MaxTokens = 128,
    temperature: common.Temperature = 1.0,
    top_k: common.TopK = 0,
    top_p: common.TopP = 1.0,
    min_p: common.MinP = 0.0,
    seed: common.Seed = None,
    stop: common.Stop = None,
    logprobs: Annotated[
        int | None, Option(help="With --json: log-probabilities of each token and of so many of the likeliest.")
    ] = None,
    device: common.Device = "auto",
    dtype: common.Dtype = "float32",
    cache: common.Cache = "",
    weights: common.Weights = "plain",
    numbers: common.Numbers = "plain",
    memory: common.WeightMemory = "",
    speculative: common.Speculative = 0,
    threads: common.Threads = 0,
    from_hub: common.FromHub = "",
    as_json: Annotated[bool, Option("--json", help="Print one JSON object when all is done.")] = False,
) -> None:
    """Continue one prompt or many.

    The prompts run together, however their lengths differ, and are printed in order, each with its continuation.
    Speed, the size of the memory and how many drafts were accepted go to stderr.

    Example: dsv4 generate runs/demo "It was a dark" --max-tokens 200 --temperature 0.8 --seed 1
    Several lines: dsv4 generate runs/demo - < chapter.txt
    Of the hub: dsv4 generate --from-hub owner/model@revision "It was a dark"
    """
    if from_hub and prompt is None:  # there is no folder, so the first word is the prompt
        model_folder, prompt = None, model_folder
    params = SamplingParams(temperature, top_k, top_p, min_p, seed, max_tokens, stop or [], logprobs)
    if logprobs is not None and not as_json:
        raise UserError("--logprobs has its place in the JSON object: add --json")
    texts = [] if prompt is None else [_from_stdin() if prompt == "-" else prompt]
    texts += (prompts or []) + (_lines(prompt_file) if prompt_file else [])
    texts = texts or [""]
    held = {"weights": weights, "numbers": numbers, "memory": memory or None}
    engine = common.open_engine(model_folder, from_hub, device, dtype, cache, threads, speculative=speculative, **held)
    started = time.perf_counter()
    try:
        done = engine.generate(texts, params) if as_json else _print_all(engine, texts, params)
    except KeyboardInterrupt:
        typer.echo("\nstopped; what was read is not kept: `dsv4 chat` goes on where a text was interrupted", err=True)
        raise typer.Exit(1) from None
    seconds = time.perf_counter() - started
    new, held = sum(len(c.ids) for c in done), sum(c.memory_bytes for c in done)
    if as_json:
        rows = [_row(text, c, speculative > 0) for text, c in zip(texts, done, strict=True)]
        speed = {"seconds": round(seconds, 4), "tokens_per_second": round(new / seconds, 2)}
        totals = {"new_tokens": new, "memory_bytes": held, **speed}
        typer.echo(
            json.dumps(
                {"model": from_hub or str(Path(model_folder or "")), "completions": rows, **totals}, ensure_ascii=False
            )
        )
    known = sum(len(c.prompt_ids) for c in done)
    typer.echo(
        f"{new} new tokens after {known} of prompt in {seconds:.2f} s: {new / seconds:.1f} tokens/s; "
        f"the memory held {held:,} bytes",
        err=True,
    )
    if speculative:
        typer.echo(common.acceptance(done), err=True)
    if any(c.finish_reason == "error" for c in done):
        typer.echo("the model's numbers are not finite: try --dtype float32, or check the weights", err=True)
        raise typer.Exit(1)


def _print_all(engine: Engine, texts: list[str], params: SamplingParams) -> list[Completion]:
    """All run together; each is printed as it comes, once those before it are complete."""
    done = []
    for text, number in [(text, engine.add(text, params)) for text in texts]:
        typer.echo(("\n" if done else "") + text, nl=False)
        for event in engine.follow(number):
            typer.echo(event.text, nl=False)
            sys.stdout.flush()
            if event.completion:
                done.append(event.completion)
        typer.echo()
    return done


def _row(text: str, c: Completion, speculated: bool) -> dict[str, object]:
    return {
        "prompt": text,
        "text": c.text,
        "finish_reason": c.finish_reason,
        "prompt_tokens": len(c.prompt_ids),
        "ids": c.ids,
        "memory_bytes": c.memory_bytes,
        **({"drafted": c.drafted, "accepted": c.accepted} if speculated else {}),
        **({"logprobs": [asdict(x) for x in c.logprobs]} if c.logprobs else {}),
    }


def _from_stdin() -> str:
    """All of stdin as one prompt, its last line end dropped."""
    return "\n".join(line for _, line in read_lines(sys.stdin.buffer, "stdin"))


def _lines(path: Path) -> list[str]:
    lines = [line for _, line in read_lines(path) if line.strip()]
    if not lines:
        raise UserError(f"{path} holds no prompt: write one on each line")
    return lines
