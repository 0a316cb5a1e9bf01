"""`dsv4 conform`: is a port right, and if not, which mistake is it? What is asked and compared: dsv4/conform."""

import importlib.util
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from dsv4.cli import common
from dsv4.errors import UserError


def conform(
    adapter: Annotated[
        str, Option(help="ours, transformers, a server's URL up to /v1, file.py:Class, or answers in a .safetensors.")
    ] = "ours",
    dtype: common.Dtype = "float32",
    cache: Annotated[str, Option(help="Of ours: the memory's format, such as packed; default: dtype.")] = "",
    ops: Annotated[str, Option(help="Of ours: the backend, such as reference; default: the fastest.")] = "",
    write: Annotated[Path | None, Option(help="Write the kit as files into this folder, and judge nobody.")] = None,
    checkpoint: Annotated[
        Path | None, Option(help="Instead of the kit: this checkpoint, layer by layer, beside transformers.")
    ] = None,
    tokens: Annotated[int, Option(min=1, help="With --checkpoint: how many random tokens are read.")] = 300,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Is a port of DeepSeek-V4 right? A verdict on every part, and the name of the mistake where there is a known one.

    Example: dsv4 conform --adapter transformers
    """
    numbers = common.resolve_dtype(dtype)
    if write is not None and checkpoint is not None:
        raise UserError("--write and --checkpoint are two things: give one of them")
    if checkpoint is not None:
        from dsv4.conform.checkpoint import compare, lines

        rows = compare(checkpoint, tokens, numbers)
        passed = all(row.passed for row in rows)
        print(
            json.dumps({"passed": passed, "rows": [asdict(row) for row in rows]}) if as_json else "\n".join(lines(rows))
        )
        raise typer.Exit(0 if passed else 1)

    from dsv4.checkpoint import save
    from dsv4.conform.folder import write as write_kit
    from dsv4.conform.vectors import Kit, kit_model

    kit = Kit()
    if write is not None:
        manifest = write_kit(kit, write)
        told = {"folder": str(write), "cases": len(manifest["cases"]), "sha256": manifest["sha256"]}
        print(json.dumps(told) if as_json else f"{told['cases']} cases in {write}: manifest.json says what they are")
        return

    from dsv4.conform.diagnose import judge

    port = find(adapter, numbers, cache, ops)
    with tempfile.TemporaryDirectory() as folder:
        save(kit_model(), folder)
        port.load(Path(folder))
        verdicts = judge(port, kit, _note)
    failed = any(v.state in ("departs", "error") for v in verdicts)
    if as_json:
        print(json.dumps({"port": port.name, "passed": not failed, "components": [v.to_json() for v in verdicts]}))
    else:
        print(port.name)
        print("\n".join(f"  {v.component:20s} {v.line}" for v in verdicts))
    raise typer.Exit(1 if failed else 0)


def _note(component: str) -> None:
    if sys.stderr.isatty():
        print(f"asking: {component}", file=sys.stderr, flush=True)


def find(adapter: str, dtype: Any, cache: str, ops: str) -> Any:
    """The adapter that a text names."""
    if adapter != "ours" and (cache or ops):
        raise UserError("--cache and --ops are for --adapter ours: leave them out")
    if adapter == "ours":
        from dsv4.conform.adapters.ours import Ours
        from dsv4.ops import BACKENDS

        if ops and ops not in BACKENDS:
            raise UserError(f"--ops {ops!r} is unknown: use one of {', '.join(BACKENDS)}")
        return Ours(dtype, common.resolve_cache(cache), ops or None)
    if adapter == "transformers":
        from dsv4.conform.adapters.transformers import Transformers

        return Transformers(dtype)
    if adapter.startswith(("http://", "https://")):
        from dsv4.conform.adapters.server import Server

        return Server(adapter, dtype)
    if adapter.endswith(".safetensors"):
        from dsv4.conform.adapters.answers import Answers

        return Answers(Path(adapter), dtype)
    path, _, name = adapter.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise UserError(
            f"--adapter {adapter!r} is none: use ours, transformers, a URL, file.py:Class or answers in a .safetensors"
        )
    return _from_file(Path(path), name)


def _from_file(path: Path, name: str) -> Any:
    """An instance of a class of somebody's file; the file's own errors are its own, with their traceback."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise UserError(f"{path} has no class {name!r}: give file.py:Class")
    return getattr(module, name)()
