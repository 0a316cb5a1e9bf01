"""`dsv4 chat`: a model continues what you type, over one memory that can be taken back turn by turn."""

import sys
from collections.abc import Iterator
from contextlib import closing

import typer

from dsv4.cli import common
from dsv4.engine import Completion, SamplingParams, Session
from dsv4.errors import UserError
from dsv4.files import read_lines

HELLO = """The model continues your text; it was not taught to follow instructions or to answer.
An empty line lets it go on. /undo takes back a turn, /reset everything, /quit leaves; Ctrl-C stops a reply."""


def chat(
    model_folder: common.ModelFolder = None,
    max_tokens: common.MaxTokens = 128,
    temperature: common.Temperature = 1.0,
    top_k: common.TopK = 0,
    top_p: common.TopP = 1.0,
    min_p: common.MinP = 0.0,
    seed: common.Seed = None,
    stop: common.Stop = None,
    device: common.Device = "auto",
    dtype: common.Dtype = "float32",
    cache: common.Cache = "",
    speculative: common.Speculative = 0,
    threads: common.Threads = 0,
    from_hub: common.FromHub = "",
) -> None:
    """Write a text together with a model, turn by turn.

    Example: dsv4 chat runs/demo --temperature 0.8 --max-tokens 60
    """
    params = SamplingParams(temperature, top_k, top_p, min_p, seed, max_tokens, stop or [])
    options = {"max_batch": 1, "speculative": speculative}
    engine = common.open_engine(model_folder, from_hub, device, dtype, cache, threads, **options)
    session, done = Session(engine), list[Completion]()
    typer.echo(HELLO)
    piped = None if sys.stdin.isatty() else read_lines(sys.stdin.buffer, "stdin")
    while (line := _read(piped)) != "/quit":
        if line is None:
            typer.echo("(/quit leaves)")
        elif line == "/reset":
            session.reset()
        elif line == "/undo":
            typer.echo("(taken back)" if session.undo() else "(there is nothing to take back)")
        elif line.startswith("/"):
            typer.echo(f"(there is no {line.split()[0]}: use /undo, /reset or /quit)")
        else:
            done += _reply(session, line, params)
    if speculative:
        typer.echo(f"({common.acceptance(done)})")


def _read(piped: Iterator[tuple[int, str]] | None) -> str | None:
    """A line; /quit at the end of the input, None on Ctrl-C, which may have come just after a reply's end.

    Lines of a terminal are edited by it; those of a file or a pipe are UTF-8 and end as in every file of lines.
    """
    try:
        if piped is None:
            return input("you> ")
        typer.echo("you> ", nl=False)
        sys.stdout.flush()
        line = next(piped, None)
        if line is None:
            raise EOFError
        return line[1]
    except EOFError:
        typer.echo()
        return "/quit"
    except KeyboardInterrupt:
        typer.echo()
        return None


def _reply(session: Session, line: str, params: SamplingParams) -> list[Completion]:
    """Stream a reply; its completion, if it came to its end.

    A later line starts on a new line of the text; an empty one adds nothing.
    """
    done: list[Completion] = []
    text = "\n" + line if line and len(session.ids) > 1 else line
    try:
        with closing(session.generate(text, params)) as events:
            for event in events:
                typer.echo(event.text, nl=False)
                sys.stdout.flush()
                done += [] if event.completion is None else [event.completion]
        typer.echo()
    except KeyboardInterrupt:
        read = len(session.ids) - session.unread
        all_read = session.unread <= 1  # of a token that was drawn nothing is computed before the next one
        typer.echo(" (stopped)" if all_read else _stopped_reading(read, len(session.ids)))
    except UserError as error:
        typer.echo(f"({error})")
    return done


def _stopped_reading(read: int, of: int) -> str:
    return f"(stopped after reading {read:,} of {of:,} tokens; an empty line reads on from there, /undo takes it back)"
