"""The command line: `dsv4 VERB`, also `python -m dsv4 VERB`. One thin file per verb.

Exit codes: 0 fine, 1 failed or stopped, 2 wrong use (one sentence on stderr says what to change).
"""

import io
import logging
import os
import sys
import time
from collections.abc import Iterable
from importlib import import_module
from typing import Annotated, NoReturn

import typer

from dsv4 import __version__
from dsv4.errors import UserError
from dsv4.files import reason_of

ALONE = 5.0  # seconds after which one of several processes says what went wrong, if it is still there

# The verbs and what the overview says of each; a verb's own help is its docstring.
VERBS = {
    "demo": "Train a small DeepSeek-V4 in five to ten minutes on two cores.",
    "train": "Train a model.",
    "report": "Draw the record of a run as a page with plots.",
    "generate": "Continue one prompt or many.",
    "chat": "Write a text together with a model, turn by turn.",
    "convert": "Write a checkpoint in another layout or format.",
    "inspect": "Look into a checkpoint.",
    "cost": "Count what a million tokens cost.",
    "bench": "Measure: is it right, and how fast?",
    "conform": "Judge a port of V4: is it right, and if not, which mistake is it?",
    "probe": "Measure how a model bends and breaks.",
    "behaviour": "Ask a model or a server: does it refuse, leak, obey whom it should not?",
    "doctor": "Check the installation.",
}


def application(verbs: Iterable[str] = VERBS, *, overview: bool = False) -> typer.Typer:
    """The command line with these verbs; only their modules are imported, so that none waits for the others' needs.

    overview: none is imported, and none can be run: enough to list them, and at once.
    """
    app = typer.Typer(
        name="dsv4",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(options)
    for verb in verbs:
        found = _nothing if overview else getattr(import_module(f"dsv4.cli.{verb}"), verb)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=verb, short_help=VERBS[verb])
        else:
            app.command(verb, short_help=VERBS[verb])(found)
    return app


def _nothing() -> None:
    """What stands for a verb in the overview."""


def _version(asked: bool) -> None:
    if asked:
        print(f"dsv4 {__version__}")
        raise typer.Exit


def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The whole DeepSeek-V4 system: train it, run it, look inside."""


def main() -> None:
    """Run the command line; a user's mistake becomes one sentence and exit code 2, a machine's refusal code 1."""
    try:
        _main()
    except SystemExit as left:
        if "WORLD_SIZE" in os.environ:  # gloo's threads abort at times when the interpreter takes its usual way out
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(left.code if isinstance(left.code, int) else int(left.code is not None))
        raise


def _main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console whose encoding lacks a character gets a ? for it
            stream.reconfigure(errors="replace")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.raiseExceptions = False  # a log line that nobody reads is no error
    asked = [word for word in sys.argv[1:] if word in VERBS][:1]
    try:
        application(asked or VERBS, overview=not asked)()
    except UserError as error:
        _fail(str(error), error.exit_code)
    except FloatingPointError as error:
        _fail(str(error), 1)
    except BrokenPipeError:  # the reader of a pipe has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(1) from None
    except OSError as error:  # the last net: where the path is known, a better sentence has been made of it
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{reason_of(error)}: mend that and try again", 1)


def _fail(sentence: str, code: int) -> NoReturn:
    if os.environ.get("RANK", "0") != "0":
        time.sleep(ALONE)  # the first process mostly says the same, and torchrun then ends this one
    print(f"dsv4: {sentence}", file=sys.stderr)
    raise SystemExit(code) from None
