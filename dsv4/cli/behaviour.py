"""`dsv4 behaviour`: does a model or server refuse, leak, obey whom it should not? How: dsv4/probe/behaviour."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from dsv4 import files
from dsv4.cli import common
from dsv4.errors import UserError

LINE_SECONDS = 15.0


def behaviour(
    model_folder: common.ModelFolder = None,
    from_hub: common.FromHub = "",
    endpoint: Annotated[str, Option(metavar="URL", help="A server with the OpenAI interface, up to /v1.")] = "",
    model: Annotated[str, Option(metavar="NAME", help="Of --endpoint: what it knows the model by.")] = "",
    key_from: Annotated[
        str, Option(metavar="VARIABLE", help="Of the environment: it holds the key of --endpoint.")
    ] = "DSV4_ENDPOINT_KEY",
    judge_model: Annotated[
        str, Option(metavar="NAME", help="A model of --endpoint that judges beside the rules.")
    ] = "",
    data: Annotated[
        str, Option(metavar="NAME,...", help="Data sets; fixture: harmless, nothing is fetched.")
    ] = "fixture",
    context: Annotated[
        str, Option(metavar="N,...", help="Tokens of other text before the request, such as 0,2k,32k,128k.")
    ] = "0",
    attempts: Annotated[int, Option(help="Replies to each attack; more than one needs a --temperature.")] = 1,
    temperature: common.Temperature = 0.0,
    max_tokens: common.MaxTokens = 256,
    seed: Annotated[int, Option(min=0, help="Of everything that is drawn.")] = 0,
    limit: Annotated[int | None, Option(help="Cases of each data set at most.")] = None,
    pin: Annotated[
        list[str] | None, Option(metavar="NAME=SHA256", help="The checksum of a data set; repeatable.")
    ] = None,
    demand_pins: Annotated[bool, Option(help="Use no data set without a --pin.")] = False,
    file: Annotated[list[str] | None, Option(metavar="NAME=PATH", help="A copy of a data set; repeatable.")] = None,
    capability: Annotated[str, Option(metavar="TASK,...", help="Also run these of lm-eval, such as mmlu,ruler.")] = "",
    out: Annotated[Path, Option(help="Where answers are kept; a run that was stopped goes on there.")] = Path(
        "behaviour"
    ),
    device: common.Device = "auto",
    dtype: common.Dtype = "float32",
    cache: common.Cache = "",
    threads: common.Threads = 0,
    judge_on: Annotated[
        Path | None, Option(help="Only measure the rule judge, on a CSV file of labelled answers.")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """How often a model refuses, is talked out of it, tells what it should keep, obeys a text it only reads.

    Example: dsv4 behaviour runs/demo --context 0,2k
    A server: dsv4 behaviour --endpoint https://host/v1 --model NAME --data fixture,xstest,tensortrust-hijacking
    """
    from dsv4.probe.behaviour import labelled
    from dsv4.probe.behaviour.inprocess import InProcess
    from dsv4.probe.behaviour.records import lines, records
    from dsv4.probe.behaviour.run import behaviour as run
    from dsv4.probe.behaviour.runners import Plan
    from dsv4.probe.behaviour.server import Server
    from dsv4.probe.runner import RECORDS

    if judge_on is not None:
        print(json.dumps(labelled.measured(labelled.read_rows(judge_on))))
        return
    plan = Plan(tuple(_tokens(part) for part in context.split(",")), attempts, max_tokens, temperature, seed)
    beside: Callable[[], dict[str, dict[str, float]]] | None = None
    options: dict[str, Any] = {
        "pins": _pairs(pin, "--pin"),
        "local": {k: Path(v) for k, v in _pairs(file, "--file").items()},
    }
    if endpoint:
        if model_folder or from_hub:
            raise UserError("give a model's folder or --endpoint, and not both")
        if capability:
            raise UserError(
                "--capability runs on a model in process: point lm-eval's local-chat-completions at --endpoint"
            )
        asked = Server(endpoint, model, key_from=key_from)
    else:
        engine = common.open_engine(model_folder, from_hub, device, dtype, cache, threads)
        asked = InProcess(engine, from_hub or str(model_folder))
        if asked.form == "plain":
            typer.echo("the tokenizer has no chat format: conversations are said as plain transcripts", err=True)
        if capability:

            def measure_capability() -> dict[str, dict[str, float]]:
                try:
                    from dsv4.probe.behaviour.harness import capability as measure
                except ImportError:
                    raise UserError("lm-eval is not installed: pip install 'dsv4[eval]'") from None
                return measure(engine, capability.split(","), limit)

            beside = measure_capability

    if judge_model and not endpoint:
        raise UserError("--judge-model is a model of --endpoint: give both")
    judge = Server(endpoint, judge_model, key_from=key_from) if judge_model else None
    try:
        report = run(
            asked, out, data=data.split(","), plan=plan, judge=judge, demand_pins=demand_pins, limit=limit,
            capability=beside, show=_shown(), **options,
        )  # fmt: skip
    except KeyboardInterrupt:
        typer.echo(f"\nstopped; what was answered is kept in {out}: the same command goes on", err=True)
        raise typer.Exit(1) from None
    finally:
        if isinstance(asked, InProcess):
            asked.close()
    made = [json.dumps(record.to_json()) + "\n" for record in records(report, asked, seed)]
    files.write_text(out / RECORDS, "".join(made))
    if as_json:
        print(json.dumps(asdict(report)))
    else:
        print("\n".join(lines(report.rates)))
        for name, reason in report.skipped:
            print(f"{name}: not measured: {reason}")
        for name, sha256 in report.seen.items():
            print(f"{name}: nothing vouched for this file; its sha256 {sha256} is recorded")
        for task, figures in report.capability.items():
            print(f"capability {task}: " + ", ".join(f"{k} {v:.3f}" for k, v in figures.items()))
        if report.no_capability:
            print(report.no_capability)
    if report.skipped or any(rate.value is None for rate in report.rates):
        raise typer.Exit(1)


def _tokens(text: str) -> int:
    number, k = text.strip().lower().removesuffix("k"), text.strip().lower().endswith("k")
    if not number.isdigit():
        raise UserError(f"--context {text!r} is no number of tokens: give such as 0,2k,32k")
    return int(number) * (1024 if k else 1)


def _pairs(given: list[str] | None, option: str) -> dict[str, str]:
    for text in given or []:
        if not all(text.partition("=")):
            raise UserError(f"{option} {text!r} has no NAME=VALUE: give such as advbench=...")
    return {text.partition("=")[0]: text.partition("=")[2] for text in given or []}


def _shown() -> Callable[[str, int, int], None]:
    """What is called with (what, questions done, in all): a plain line now and then."""
    last = time.monotonic()

    def show(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LINE_SECONDS or (done == total and now - last >= 1):
            last = now
            print(f"{what}: {done}/{total} questions", file=sys.stderr, flush=True)

    return show
