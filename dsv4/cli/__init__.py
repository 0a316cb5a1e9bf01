"""The command line: `dsv4 VERB`, also `python -m dsv4 VERB`. One thin file per verb.

Exit codes: 0 fine, 1 failed or stopped, 2 wrong use (one sentence on stderr says what to change).
"""

import logging
import sys

import typer

from dsv4.cli.chat import chat
from dsv4.cli.cost import cost
from dsv4.cli.demo import demo
from dsv4.cli.doctor import doctor
from dsv4.cli.generate import generate
from dsv4.cli.train import train
from dsv4.errors import UserError

app = typer.Typer(
    name="dsv4",
    help="The whole DeepSeek-V4 system: train it, run it, look inside.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (demo, train, generate, chat, cost, doctor):
    app.command()(verb)


def main() -> None:
    """Run the command line; a user's mistake becomes one sentence and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        app()
    except UserError as error:
        print(f"dsv4: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except FloatingPointError as error:
        print(f"dsv4: {error}", file=sys.stderr)
        raise SystemExit(1) from None
