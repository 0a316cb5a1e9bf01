"""What is in a checkpoint folder: the answer of `dsv4 inspect`, from headers and JSON alone.

Whatever is wrong becomes a finding, so that one look says all of it; torch is not needed.
"""

import gc
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsv4 import files
from dsv4.checkpoint.diagnose import Finding, compare, grouped
from dsv4.checkpoint.expected import Want, wanted
from dsv4.checkpoint.folder import resolve_checkpoint
from dsv4.checkpoint.headers import BITS, TensorInfo, read_header
from dsv4.checkpoint.identify import identify
from dsv4.checkpoint.names import file_names, known_names, layout_of
from dsv4.checkpoint.shards import CONFIG, INDEX, read_index, unlisted_files
from dsv4.config import AnyConfig, LlamaConfig, ModelConfig, read_any
from dsv4.errors import UserError

# The parts of a model by a piece of a tensor's name; the first that fits.
_PARTS = (
    (re.compile(r"^mtp\."), "MTP block"),
    (re.compile(r"\.engram\."), "Engram"),
    (re.compile(r"shared_expert"), "shared experts"),
    (re.compile(r"\.experts\."), "routed experts"),
    (re.compile(r"\.gate\."), "router"),
    (re.compile(r"\.indexer\."), "indexer"),
    (re.compile(r"\.compressor\."), "compressor"),
    (re.compile(r"(^|\.)hc_|_hc\."), "hyper-connections"),
    (re.compile(r"\.(self_)?attn\."), "attention"),
    (re.compile(r"norm"), "norms"),
    (re.compile(r"\.(ffn|mlp)\."), "MLP"),
    (re.compile(r"^embed"), "embedding"),
    (re.compile(r"^(lm_)?head\."), "head"),
)
_SCALE = re.compile(r"\.(scale|weight_scale_inv|weight_scale|scales)$")
_BUFFER = re.compile(r"\.gate\.(tid2eid|bias|e_score_correction_bias)$")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass
class Sum:
    """Of a dtype or a part: tensors, bytes, and parameters (scales and the router's buffers are none)."""

    tensors: int = 0
    bytes: int = 0
    parameters: int = 0


@dataclass
class Report:
    """All that `dsv4 inspect` says. places: the tensors by published names, header and file; not in the JSON."""

    path: str
    checkpoint: str
    what: str = ""
    reads: str = ""
    differs: tuple[str, ...] = ()
    layout: str = ""
    model_type: str | None = None
    files: dict[str, int] = field(default_factory=dict)
    layers: dict[str, int] = field(default_factory=dict)
    hash_layers: int = 0
    dtypes: dict[str, Sum] = field(default_factory=dict)
    parts: dict[str, Sum] = field(default_factory=dict)
    tensors: int = 0
    bytes: int = 0
    parameters: int = 0
    active: int | None = None
    findings: list[Finding] = field(default_factory=list)
    config: AnyConfig | None = None
    places: dict[str, tuple[TensorInfo, Path]] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Nothing is wrong that a reader would notice."""
        return all(finding.harmless for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        out = {key: value for key, value in vars(self).items() if key not in ("config", "places")}
        for key in ("dtypes", "parts"):
            out[key] = {name: asdict(value) for name, value in out[key].items()}
        return {**out, "whole": self.whole, "findings": [asdict(finding) for finding in self.findings]}


def inspect(path: str | Path) -> Report:
    """Look at a checkpoint folder, a run folder (its latest checkpoint) or a single .safetensors file.

    UserError if there is nothing to look at; all else that is wrong is in the findings.
    """
    collecting = gc.isenabled()
    gc.disable()  # 150,000 headers are many objects and no cycles: looking for some takes longer than all else
    try:
        return _inspect(Path(path))
    finally:
        if collecting:
            gc.enable()


def _inspect(path: Path) -> Report:
    with files.explained(path, "read"):
        alone = path.is_file()
    if alone:
        report = Report(str(path), str(path))
        _read_file(report, path.parent, path.name, {})
        config = data = None
    else:
        folder = resolve_checkpoint(path, needs_config=not any(path.glob("*.safetensors*")) if path.is_dir() else True)
        report = Report(str(path), str(folder))
        data, config = _read_configuration(folder, report)
        _read_files(folder, report)
    report.config = config
    report.model_type = (data or {}).get("model_type") if isinstance((data or {}).get("model_type"), str) else None
    _name(report)
    want = _wanted(config, report)
    if want:
        _judge(report, want)
    alike = Counter((_whose(name), info.dtype, info.shape) for name, (info, _) in report.places.items())
    _add_up(report, alike)
    fp8_experts = any(
        dtype == "F8_E4M3" and ".ffn.experts." in name and name.startswith("layers.") for name, dtype, _ in alike
    )
    identity = identify(data, config, report.places, fp8_experts)
    report.what, report.reads, report.differs = identity.what, identity.reads, identity.differs
    if not report.whole:
        report.reads = "not as it is: see the findings" if identity.reads == "it loads" else identity.reads
    return report


def _read_configuration(folder: Path, report: Report) -> tuple[dict[str, Any] | None, AnyConfig | None]:
    try:
        with files.explained(folder, "read"):
            if not (folder / CONFIG).exists():
                report.findings.append(Finding("config", "there is no config.json: what should be there is not known"))
                return None, None
        data = files.read_json(folder / CONFIG, "the configuration", "fetch it again")
    except UserError as error:
        report.findings.append(Finding("config", str(error)))
        return None, None
    try:
        files.check_digests(folder, lambda name: name in (CONFIG, INDEX))
        return data, read_any(data)
    except UserError as error:
        report.findings.append(Finding("config", f"config.json: {error}"))
        return data, None


def _read_files(folder: Path, report: Report) -> None:
    """The headers of all weight files into `places`; what cannot be read, is not there or there twice into findings."""
    index: dict[str, str] = {}
    with files.explained(folder, "read"):
        listed = (folder / INDEX).exists()
        names = unlisted_files(folder)
        if listed:
            try:
                index = read_index(folder)
                names = sorted(set(index.values()))
            except UserError as error:
                report.findings.append(Finding("index", str(error)))
    if not names:
        with files.explained(folder, "read"):
            pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
        if pickles:
            says = (
                f"there is no .safetensors file, but {pickles[0]}: a pickle, which could run code and is never opened"
            )
        else:
            says = "there is no .safetensors file"
        report.findings.append(Finding("file", says))
    if not listed and len({name.partition("-of-")[2] for name in names} - {""}) == 1:
        report.findings.append(_shards_without_index(names))
    for name in names:
        _read_file(report, folder, name, index)
    lost = [tensor for tensor, file in index.items() if file in report.files and tensor not in report.places]
    report.findings += grouped(("index", tensor, "is in no file, but the index lists it") for tensor in lost)
    report.findings = [finding for finding in report.findings if finding.says]


def _shards_without_index(names: list[str]) -> Finding:
    """Shards that say how many there are, without an index: judged by their number."""
    total = names[0].partition("-of-")[2].partition(".")[0]
    if not total.isdecimal() or len(total) > 9 or len(names) == int(total):
        return Finding("note", "", harmless=True)
    return Finding("file", f"{len(names)} of {int(total)} shards are there, and no index")


def _read_file(report: Report, folder: Path, name: str, index: dict[str, str]) -> None:
    file = folder / name
    try:
        with files.explained(file, "read"):
            if not file.is_file() and not file.exists():
                count = sum(place == name for place in index.values())
                says = f"{name} is not there: the index lists {count:,} tensors in it; fetch it"
                report.findings.append(Finding("file", says))
                return
        header = read_header(file)
    except UserError as error:
        report.findings.append(Finding("file", str(error)))
        return
    report.files[name] = header.size
    if not header.aligned:
        says = f"{name} has tensors at odd places: it is read, but cannot be used where it is mapped"
        report.findings.append(Finding("note", says, harmless=True))
    twice = sorted(report.places.keys() & header.tensors.keys())
    rows = [
        ("repeated", tensor, f"is in {report.places[tensor][1].name} and in {name}: remove one") for tensor in twice
    ]
    report.findings += grouped(rows)
    report.places.update((tensor, (info, file)) for tensor, info in header.tensors.items())
    if index:
        strange = [tensor for tensor in header.tensors if index.get(tensor) != name]
        report.findings += grouped(
            ("note", tensor, f"is in {name}, where the index does not say so") for tensor in strange
        )


def _name(report: Report) -> None:
    """Bring `places` to published names, as far as a reader would; says which layout it was."""
    try:
        known = known_names(report.places)
    except UserError as error:
        report.findings.append(Finding("repeated", str(error)))
        return
    report.layout = layout_of(known) if known else ""
    if report.layout == "published" and any(given.startswith("model.") for given in known.values()):
        report.findings.append(Finding("note", "its names have 'model.' before them: read all the same", harmless=True))
    report.places = {name: report.places[given] for name, given in known.items()}


def _wanted(config: AnyConfig | None, report: Report) -> dict[str, Want]:
    """What the configuration asks for, by published names."""
    if config is None or not report.places:
        return {}
    if not isinstance(config, ModelConfig):
        if report.layout == "transformers":
            return {}  # the published names of controls are not dsv4's
        return wanted(config)
    want = wanted(config)
    if report.layout == "transformers" and config.num_draft_blocks:
        report.findings.append(Finding("note", "transformers' layout holds no MTP block or drafter", harmless=True))
        want = {name: wish for name, wish in want.items() if not name.startswith("mtp.")}
    return want


def _judge(report: Report, want: dict[str, Want]) -> None:
    """Compare; a tensor that is named as transformers does takes its published name for it, and in `places`."""
    config = report.config
    assert config is not None
    if report.layout == "transformers":
        theirs = {next(file_names(name, w.shape, "transformers"))[0]: name for name, w in want.items()}
        report.places = {theirs.get(name, name): place for name, place in report.places.items()}
    found = {name: info for name, (info, _) in report.places.items()}
    report.findings += compare(config, want, found)


def _whose(name: str) -> str:
    """A name for the tensors of all experts of a layer together, as most of 150,000 are theirs; else the name."""
    layer, found, tensor = name.partition(".experts.")
    return f"{layer}.experts.{tensor.rpartition('.')[2]}" if found else name


def _add_up(report: Report, alike: Mapping[tuple[str, str, tuple[int, ...]], int]) -> None:
    """Tensors, bytes and parameters by dtype and by part; the layers by kind; what one token uses.

    alike: how many tensors there are of a name (`_whose`), dtype and shape.
    """
    config = report.config
    experts = biases = 0  # the router's biases are no parameters, but a token reads them
    for (name, dtype, shape), times in alike.items():
        plain = name.removeprefix("model.")
        part = next((part for piece, part in _PARTS if piece.search(plain)), "other")
        if part == "MTP block" and isinstance(config, ModelConfig) and config.dspark_stages:
            part = "DSpark drafter"
        elements = times * math.prod(shape)
        parameters = 0 if _SCALE.search(name) or _BUFFER.search(name) else elements
        if dtype in ("I8", "U8") and name.endswith(".weight"):
            parameters *= 2  # packed FP4
        for sums in (report.dtypes.setdefault(dtype, Sum()), report.parts.setdefault(part, Sum())):
            sums.tensors += times
            sums.bytes += elements * BITS[dtype] // 8
            sums.parameters += parameters
        if part not in ("MTP block", "DSpark drafter"):
            report.parameters += parameters
            experts += parameters if part == "routed experts" else 0
            biases += elements if name.endswith((".gate.bias", ".e_score_correction_bias")) else 0
    report.tensors = len(report.places)
    report.bytes = sum(sums.bytes for sums in report.dtypes.values())
    if config is None:
        return
    if isinstance(config, ModelConfig):
        report.layers = {kind.name: count for kind, count in config.trunk_kinds.items()}
        report.hash_layers = min(config.num_hash_layers, config.num_hidden_layers)
    else:
        report.layers = {report.model_type or "": config.num_hidden_layers}
    table = report.parts.get("embedding", Sum()).parameters
    report.active = report.parameters - table + biases
    if not isinstance(config, LlamaConfig):
        report.active += experts * config.num_experts_per_tok // config.n_routed_experts - experts
