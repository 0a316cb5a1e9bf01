"""`python -m dsv4 VERB`. One verb has to run on a machine that has torch and nothing else, so it does without typer."""

import sys
from importlib.util import find_spec

if sys.argv[1:3] == ["bench", "gpu-check"] and find_spec("typer") is None:
    from dsv4.bench.gpu_check import main as gpu_check

    sys.exit(gpu_check(sys.argv[3:]))

from dsv4.cli import main

main()
