"""The program that runs in a peer's own Python; outside.py starts it, and nothing of ours imports it.

It needs the standard library and the peer: `python peerside.py NAME_peer.py ask` says as one JSON line whether the peer
is there (`missing`, or `version` and the `environment` to be started in) for as many threads as its stdin says; with
`run` it reads a job, one JSON object, from its stdin and answers in JSON lines. What the peer prints goes to stderr.

NAME_peer.py has `missing()` (a sentence, or ""), `version()`, `environment(threads)`, and a class `Peer`:
    Peer(job)             job: folder (config.json, model.safetensors), dtype, threads, chunk, and the longest context
    best(ids, count)      the likeliest tokens after `ids`: their ids, and the natural logarithms of their probabilities
    measure(ids, steps)   seconds of reading `ids`, seconds of each of `steps` tokens after them
"""

import importlib.util
import json
import os
import re
import resource
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def main() -> None:
    path, what = sys.argv[1:]
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(**found: Any) -> None:
        print(json.dumps(found), file=channel, flush=True)

    peer = module(Path(path))
    if what == "ask":
        lacks, threads = peer.missing(), int(sys.stdin.read())
        known = {} if lacks else {"version": peer.version(), "environment": peer.environment(threads)}
        return tell(missing=lacks, **known)
    job = json.load(sys.stdin)
    running = peer.Peer(job)
    for length in job["checks"]:
        tokens, logprobs = running.best(job["check_ids"][:length], job["best"])
        tell(length=length, tokens=tokens, logprobs=logprobs)
    for repeat in range(job["repeats"]):
        for context in job["contexts"]:
            prefill, steps = running.measure(job["ids"][:context], job["steps"])
            tell(repeat=repeat, context=context, prefill_seconds=prefill, step_seconds=steps, peak_rss=peak_rss())


def peak_rss() -> int:
    """The most bytes of this program that were in memory. The usual count begins with those of whoever started it."""
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def module(path: Path) -> ModuleType:
    """The peer's file by its path: the files beside it are no top-level modules."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


if __name__ == "__main__":
    main()
