"""Failures caught here: a safetensors file that is read although it is not whole or says something in two ways, that
costs memory or waits for ever, or that is refused although it is right; a sentence that does not say what a file is.
"""

import json
import os
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from dsv4.checkpoint import load
from dsv4.checkpoint.headers import BITS, LARGEST_HEADER, read_header
from dsv4.checkpoint.shards import INDEX, read_index
from dsv4.errors import UserError
from dsv4.files import LARGEST_JSON, read_json


def write(path: Path, header: dict | str | bytes, data: bytes = b"") -> Path:
    raw = json.dumps(header).encode() if isinstance(header, dict) else header
    raw = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), begin: int = 0, end: int = 8) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def refused(path: Path, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        read_header(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000 and str(path) in str(caught.value)


TORCH = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8, "I64": torch.int64, "BOOL": torch.bool, "F16": torch.float16, "F64": torch.float64,
}  # fmt: skip


NAMES = st.text("abc.é-ß文 ", min_size=1, max_size=8)
SAID = st.tuples(st.sampled_from(sorted(TORCH)), st.lists(st.integers(0, 4), max_size=4))


@given(st.dictionaries(NAMES, SAID, min_size=1, max_size=6))
def test_what_safetensors_writes_is_read_as_it_is(tmp_path_factory, tensors) -> None:
    path = tmp_path_factory.mktemp("h") / "x.safetensors"
    made = {name: torch.zeros(shape, dtype=torch.uint8).to(TORCH[kind]) for name, (kind, shape) in tensors.items()}
    save_file(made, path, metadata={"format": "pt"})
    header = read_header(path)
    assert {n: (i.dtype, list(i.shape)) for n, i in header.tensors.items()} == {
        n: (k, s) for n, (k, s) in tensors.items()
    }
    assert header.metadata == {"format": "pt"} and header.size == path.stat().st_size and header.aligned
    assert sum(i.num_bytes for i in header.tensors.values()) == sum(t.nbytes for t in made.values())


def test_where_a_tensor_lies(tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"a": entry(begin=4, end=12), "b": entry("U8", (4,), 0, 4)}, b"wxyz" + bytes(8))
    found = read_header(path)
    a, b = found.tensors["a"], found.tensors["b"]
    assert path.read_bytes()[b.begin : b.end] == b"wxyz" and a.begin == b.end and a.end == found.size


def test_odd_places_are_noticed_and_read(tmp_path: Path) -> None:
    assert not read_header(
        write(tmp_path / "x", {"a": entry("U8", (1,), 0, 1), "b": entry(begin=1, end=9)}, bytes(9))
    ).aligned


def test_every_dtype_has_its_size(tmp_path: Path) -> None:
    for dtype, bits in BITS.items():
        header = read_header(write(tmp_path / "x", {"a": entry(dtype, (8,), 0, bits)}, bytes(bits)))
        assert header.tensors["a"].num_bytes == bits
    refused(write(tmp_path / "x", {"a": entry("F4", (3,), 0, 1)}, bytes(1)), "ends within a byte")


@pytest.mark.parametrize(("header", "data", "says"), [
    ({"a": entry()}, 7, "is truncated: its tensors end at byte"), ({"a": entry()}, 9, "bytes that belong to no tensor"),
    ({"a": entry(), "b": entry(begin=4, end=12)}, 12, "'b' overlaps"), ({"a": entry(), "b": entry()}, 8, "overlaps"),
    ({"a": entry(), "b": entry(begin=9, end=17)}, 17, "'b' leaves a gap"),
    ({"a": entry(begin=1, end=9)}, 9, "leaves a gap"),
    ({"a": entry(begin=8, end=0)}, 8, "has 8 bytes, not those from 8 to 0"),
    ({"a": entry(begin=-8, end=0)}, 0, "not those"),
    ({"a": entry(shape=(3,))}, 8, "has 12 bytes"), ({"a": entry(shape=(2**62, 4))}, 8, "the shape"),
    ({"a": entry(shape=(2**40, 2**40, 2**40))}, 8, "bytes, not those from 0 to 8"),
    ({"a": entry(shape=(0, 2**63), end=0)}, 0, "shape"),
    ({"a": entry(shape=(-1, -2))}, 8, "shape"), ({"a": entry(shape=(True, 2))}, 8, "shape"),
    ({"a": entry(shape=(2.0,))}, 8, "shape"),
    ({"a": entry(shape=(1,) * 17 + (2,))}, 8, "shape"), ({"a": entry("F31")}, 8, "unknown dtype 'F31'"),
    ({"a": {**entry(), "dtype": None}}, 8, "unknown dtype None"), ({"a": {**entry(), "x": 1}}, 8, "not just dtype"),
    ({"a": {"dtype": "F32", "shape": [2]}}, 8, "not just dtype"), ({"a": []}, 0, "not just dtype"),
    ({"a": {**entry(), "data_offsets": [0, 8.0]}}, 8, "offsets"),
    ({"a": {**entry(), "data_offsets": [0]}}, 8, "offsets"),
    ({"a": {**entry(), "data_offsets": [False, 8]}}, 8, "offsets"), ({"a\n": entry()}, 8, "cannot be printed"),
    ({"a" * 1001: entry()}, 8, "too long"), ('{"a": 1, "a": 2}', 0, "'a' is there twice"),
    ('{"\\ud800": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', 0, "cannot be printed"),
    ({"__metadata__": {"a": 1}}, 0, "not an object of strings"), ({"__metadata__": []}, 0, "not an object of strings"),
    ("{}x", 0, "not valid JSON"), (" {}", 0, "does not begin with"), ("[]", 0, "does not begin with"),
    (b"{\xff}", 0, "not UTF-8"),
    ('{"a":' * 5000, 0, "not valid JSON"), ('{"a":[' + "9" * 5000 + "]}", 0, "not valid JSON"),
    ("{", 0, "header has 1 bytes"),
])  # fmt: skip
def test_what_is_not_whole_or_says_two_things(tmp_path: Path, header, data: int, says: str) -> None:
    refused(write(tmp_path / "x.safetensors", header, bytes(data)), says)


ONE = '"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'


@pytest.mark.parametrize("header", [
    f"{{{ONE}, {ONE}}}",
    f'{{{ONE}, {ONE.replace("a", chr(92) + "u0061", 1)}}}',
    f'{{{ONE.replace("}", ", ")}"shape": [2]}}}}',
    f'{{{ONE}, "a": {{"dtype": 5, "shape": []}}}}',
    f'{{"__metadata__": {{"a": "x", "a": "y"}}, {ONE}}}',
    f'{{"__metadata__": {{"b": "x"}}, "__metadata__": {{}}, {ONE}}}',
    f'{{"__metadata__": null, "__metadata__": {{"a": "x", "b": "y"}}, {ONE}}}',
])  # fmt: skip
def test_no_name_is_there_twice(tmp_path: Path, header: str) -> None:
    """Of a tensor, also in another spelling, of what is said of one, or of metadata."""
    refused(write(tmp_path / "x.safetensors", header, bytes(8)), "is there twice")


def test_names_and_metadata_may_hold_quotes(tmp_path: Path) -> None:
    header = {"__metadata__": {'"': '"a"'}, 'a"b': entry()}
    assert set(read_header(write(tmp_path / "x.safetensors", header, bytes(8))).tensors) == {'a"b'}


@pytest.mark.parametrize(("content", "says"), [
    (b"", "ends after 0 bytes"), (b"\0" * 7, "ends after 7 bytes"), (b"\0" * 8, "header has 0 bytes"),
    ((100).to_bytes(8, "little") + b"{}", "longer than the file"), (b"\xff" * 8 + b"{}", "at most"),
    ((LARGEST_HEADER + 1).to_bytes(8, "little") + b"{}", "at most 33,554,432 are read"),
    (b"PK\x03\x04" + bytes(99), "pickle or a zip .* never opened.*: get the model's .safetensors files"),
    *((pickle_start + bytes(60), "pickle") for pickle_start in (b"\x80\x02", b"\x80\x04\x95", b"\x80\x05")),
    (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS's note .*git lfs pull"),
    (b"GGUF" + bytes(40), "GGUF"),
    (b"  <!DOCTYPE html><html>", "a web page"), (b"<html>" * 9, "a web page"),
])  # fmt: skip
def test_what_is_something_else_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    refused(path, says)


def test_a_header_that_begins_like_a_pickle_is_none(tmp_path: Path) -> None:
    """Its length is 0x0280: the first two bytes of a pickle."""
    raw = json.dumps({"a": entry()}).encode().ljust(0x280)
    assert read_header(write(tmp_path / "x", raw, bytes(8))).tensors["a"].shape == (2,)


def test_what_is_no_plain_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "zero", "folder"):
        refused(tmp_path / name, "no regular file")
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "loop", "symbolic links")
    refused(tmp_path / "none", "No such file")
    refused(tmp_path / ("x" * 300), "too long")
    write(tmp_path / "real", {"a": entry()}, bytes(8))
    (tmp_path / "link").symlink_to("real")
    assert read_header(tmp_path / "link").tensors, "the hub's cache is made of links"


def test_sparse_giants_are_refused_unread(tmp_path: Path) -> None:
    for name in ("config.json", "x.safetensors"):
        with (tmp_path / name).open("wb") as file:
            file.write((1 << 33).to_bytes(8, "little") + b"{")
            file.truncate(1 << 40)
    refused(tmp_path / "x.safetensors", "would have 8,589,934,592 bytes")
    with pytest.raises(UserError, match=f"at most {LARGEST_JSON:,} are read"):
        read_json(tmp_path / "config.json", "the configuration", "fetch it")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match="no regular file"):
        read_json(tmp_path / "pipe.json", "the configuration", "fetch it")


def test_a_header_is_in_memory_once(tmp_path: Path) -> None:
    """Empty lists take 22 times the bytes of their text; what was parsed twice was there twice."""
    body = b'{"a":[' + b"[]," * 500_000 + b"0]}"
    (tmp_path / "bomb.safetensors").write_bytes(len(body).to_bytes(8, "little") + body)
    tracemalloc.start()
    with pytest.raises(UserError):
        read_header(tmp_path / "bomb.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 28 * len(body)


def test_a_name_that_json_has_twice(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"a": {"b": 1, "b": 2}}')
    with pytest.raises(UserError, match="'b' is there twice"):
        read_json(tmp_path / "c.json", "it", "mend it")


@pytest.mark.parametrize("name", [
    "../x.safetensors", "/x.safetensors", "a/../../x.safetensors", "a\\x.safetensors", "x.bin", "", ".",
    "x.safetensors\0",
    "x\n.safetensors", "\ud800.safetensors", "x" * 2000 + ".safetensors", ".safetensors",
])  # fmt: skip
def test_an_index_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="which is no .safetensors file in there") as caught:
        read_index(tmp_path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_load_looks_at_headers_first(tmp_path: Path) -> None:
    """What safetensors itself would read: the later of two tensors of one name."""
    from dsv4.checkpoint import save
    from dsv4.measure.subjects import small_model

    save(small_model((0,)), tmp_path)
    weights = tmp_path / "model.safetensors"
    raw = weights.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + length].rstrip()
    twin = b', "norm.weight":' + json.dumps(json.loads(text)["norm.weight"]).encode() + b"}"
    write(weights, text[:-1] + twin, raw[8 + length :])
    with pytest.raises(UserError, match="'norm.weight' is there twice"):
        load(tmp_path)
