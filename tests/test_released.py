"""Failures caught here: a released checkpoint of another make than ours that does not load, or loads as another
function; a tensor that is read twice, or not at all; codes that are no numbers and pass; a conversion that changes
numbers and does not say so; a model in parts that computes something else, or holds more than it was allowed.

The checkpoint is made by tests/published_writer.py from transformers' model, without a line of dsv4.
"""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import published_writer
import pytest
import torch
from differences import differ
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV4ForCausalLM
from typer.testing import CliRunner

from dsv4 import load, save
from dsv4.checkpoint.convert import Converted, convert, digest_of, widened
from dsv4.checkpoint.inspect import inspect
from dsv4.checkpoint.load import open_checkpoint
from dsv4.checkpoint.names import scale_name
from dsv4.checkpoint.stored import Stored
from dsv4.checkpoint.stream import as_bytes, size_of
from dsv4.cli import application
from dsv4.errors import UserError
from dsv4.measure.subjects import small_config, small_model, tokens
from dsv4.model import Segment, Transformer
from dsv4.model.packed import pack_weights, packed_of
from dsv4.ops.weights import PackedMatrix, pack_matrix, unpack_matrix

LOGITS = 5e-5  # two orders of summation in fp32, as in test_peers.py; measured 1.8e-5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DeepseekV4ForCausalLM]:
    folder = tmp_path_factory.mktemp("released")
    return folder, published_writer.write(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DeepseekV4ForCausalLM]:
    """With FP8 experts."""
    folder = tmp_path_factory.mktemp("base")
    return folder, published_writer.write(folder, experts="fp8")


@pytest.fixture(scope="module")
def folder(made) -> Path:
    return made[0]


@pytest.fixture(scope="module")
def model(folder) -> Transformer:
    return load(folder, weights="released")


def ids(count: int = 150) -> Tensor:
    return torch.randint(0, 300, (count,), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: Transformer, count: int = 150) -> Tensor:
    return model(ids(count))


@torch.no_grad()
def theirs(model: DeepseekV4ForCausalLM, count: int = 150) -> Tensor:
    return model(ids(count)[None], use_cache=False).logits[0]


def quietly_loaded(folder: Path) -> DeepseekV4ForCausalLM:
    """By transformers, which has codes as BF16 on a CPU, exactly; all products in FP32."""
    peer, found = DeepseekV4ForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(found.values()), found
    return peer.float().eval()


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, as it lies there."""
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def same_bytes(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(raw(a[n]), raw(b[n])) for n in a
    )


def raw(t: Tensor) -> Tensor:
    return t.contiguous().view(-1).view(torch.uint8)


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", ["fp4", "fp8"])
def test_logits_are_those_of_transformers(made, base, experts):
    """FP4 experts as released, FP8 ones as in the base models; packed, and as numbers."""
    folder, peer = made if experts == "fp4" else base
    want = theirs(peer, 300)
    assert want.std() > 0.5
    for weights in ("released", "plain"):
        model = load(folder, weights=weights)
        assert differ(want, logits(model, 300)) < LOGITS, weights
        codes = Counter(m.code for name, m in packed_of(model).items() if ".experts." in name)
        assert codes == ({experts: 10} if weights == "released" else {})


def test_transformers_loads_what_the_independent_script_wrote(made):
    """So that the script is not merely our own reading of the format."""
    folder, peer = made
    assert differ(theirs(peer), theirs(quietly_loaded(folder))) < 1e-6


@pytest.mark.parametrize("weights", ["released", "plain"])
def test_every_tensor_is_read_once(folder, monkeypatch, weights):
    """By the ranges of bytes: together they are the tensors, each once. A hash table and numbers for BF16 among
    them."""
    read: list[tuple[str, int, int]] = []
    inner = Stored.read

    def counted(self: Stored, first: int = 0, count: int | None = None, into: Tensor | None = None) -> Tensor:
        read.append((self.name, first, self.numel - first if count is None else count))
        return inner(self, first, count, into)

    monkeypatch.setattr(Stored, "read", counted)
    load(folder, weights=weights)
    tensors = all_tensors(folder)
    at = dict.fromkeys(tensors, 0)
    for name, first, count in sorted(read):
        assert first == at[name], f"{name}: read twice, or not in order"
        at[name] += count
    assert at == {name: t.numel() for name, t in tensors.items()}


def test_a_tensor_too_many_or_too_few_is_refused(folder, tmp_path):
    tensors = all_tensors(folder)
    for change, words in (
        (lambda t: t.pop("layers.1.attn.wo_a.scale"), "layers.1.attn.wo_a.weight is F8_E4M3, codes"),
        (lambda t: t.pop("layers.1.ffn.experts.3.w2.weight"), "layers.1.ffn.experts.3.w2.scale|lacks tensor"),
        (lambda t: t.update({"norm.scale": torch.ones(2, 2)}), "1 tensors too many, such as norm.scale"),
        (lambda t: t.update({"layers.0.attn.wq_a.scale": torch.ones(3, 3)}), "the scales of layers.0.attn.wq_a.weight"),
        (lambda t: t.update({"norm.weight": torch.zeros(256, dtype=torch.bool)}), "norm.weight is BOOL"),
    ):
        spoilt = dict(tensors)
        change(spoilt)
        refused(folder, tmp_path, spoilt, words)


def refused(folder: Path, where: Path, tensors: dict[str, Tensor], words: str) -> None:
    save_file(tensors, where / "model.safetensors")
    (where / "config.json").write_bytes((folder / "config.json").read_bytes())
    for weights in ("released", "plain"):
        with pytest.raises(UserError, match=words) as caught:
            load(where, weights=weights)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layers.2.attn.wq_b.weight", 0x7F), ("layers.2.attn.wq_b.weight", 0xFF), ("layers.2.attn.wq_b.scale", 0xFF),
        ("mtp.0.ffn.experts.1.w3.scale", 0xFF),
    ],
)  # fmt: skip
def test_codes_that_are_no_numbers_are_refused(folder, tmp_path, name, value):
    """An FP8 code or a scale that is NaN: the kernels would read it as 480, or the whole block would be NaN."""
    tensors = all_tensors(folder)
    tensors[name].view(torch.uint8)[-1, -1] = value
    refused(folder, tmp_path, tensors, f"tensor {name} holds .* no (positive )?number")


def test_scales_in_fp32(folder, tmp_path):
    """As some writers have them: powers of two stay scales, others can be had as numbers alone; zero is none."""
    tensors = all_tensors(folder)
    name = "layers.0.attn.wkv.scale"
    tensors[name.replace("scale", "weight_scale_inv")] = tensors.pop(name).float()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert torch.equal(logits(load(tmp_path, weights="released"), 20), logits(load(folder, weights="released"), 20))
    tensors[name.replace("scale", "weight_scale_inv")][0, 0] *= 1.5
    save_file(tensors, tmp_path / "model.safetensors")
    load(tmp_path)
    with pytest.raises(UserError, match="not powers of two"):
        load(tmp_path, weights="released")
    tensors[name.replace("scale", "weight_scale_inv")][0, 0] = 0.0
    refused(folder, tmp_path, tensors, "no positive number")


@pytest.mark.slow
@pytest.mark.parametrize(("how", "gib"), [("released", 1.0), ("layers", 1.0), ("memory", 1.5), ("convert", 0.5)])
def test_peak_memory(tmp_path, how, gib):
    """Resident memory of a process of its own: within 10% of the model's and one tensor's; of a stream's, its budget.
    The same at 4 GiB: `python tests/peak.py make FOLDER 4`, then `python tests/peak.py released FOLDER` (1.5% above the
    model).
    """
    program = [sys.executable, str(Path(__file__).with_name("peak.py"))]
    subprocess.run([*program, "make", str(tmp_path / "big"), str(gib)], check=True)
    said = json.loads(subprocess.run([*program, how, str(tmp_path / "big")], check=True, capture_output=True).stdout)
    bound = said["model"] + said["largest"] if how != "convert" else 300e6
    assert said["peak"] < 1.1 * bound, said


# --- saving ----------------------------------------------------------------------------------------------------------


def test_a_packed_model_is_saved_as_it_was_released(folder, model, tmp_path):
    """The same tensors, bit for bit, in shards of another size; transformers loads them."""
    save(model, tmp_path, max_shard_bytes=500_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    assert same_bytes(all_tensors(folder), all_tensors(tmp_path))
    assert torch.equal(logits(load(tmp_path, weights="released")), logits(model))
    said = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    given = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert all(said[key] == given[key] for key in ("quantization_config", "expert_dtype"))
    assert differ(theirs(quietly_loaded(tmp_path)), logits(model)) < LOGITS


def test_numbers_that_bf16_does_not_hold_are_kept(model, folder, tmp_path):
    """A norm that was trained in FP32 stays what it is when the model is saved beside codes."""
    other = load(folder, weights="released")
    with torch.no_grad():
        other.norm.weight[3] = 1.0 + 2**-20
    save(other, tmp_path)
    assert torch.equal(load(tmp_path, weights="released").norm.weight, other.norm.weight)
    with pytest.raises(UserError, match="written as they are, not in bfloat16"):
        save(other, tmp_path, dtype="bfloat16")


def test_a_model_that_was_packed_here(tmp_path):
    """Made, trained or rounded here, saved, loaded: the same bits."""
    config = small_config((0, 4, 128), mtp=1)
    torch.manual_seed(0)
    model = Transformer(config)
    pack_weights(model)
    save(model, tmp_path)
    again = load(tmp_path, weights="released")
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())


# --- converting ------------------------------------------------------------------------------------------------------


def converted(source: Path, target: Path, *args: str, **kwargs) -> list[Converted]:
    return convert(source, target, *args, **kwargs)


SLOW = pytest.mark.slow
WAYS = [
    [("transformers", "released")],
    [("published", "fp8"), ("training", "float32")],
    pytest.param([("published", "bfloat16")], marks=SLOW),
    pytest.param([("published", "fp8"), ("transformers", "bfloat16"), ("transformers", "fp4")], marks=SLOW),
]


@pytest.mark.parametrize("way", WAYS)
def test_there_and_back_bit_for_bit(folder, tmp_path, way):
    """By any way and back to the released formats: every byte, the codes and scales that are rounded anew included.

    The independent writer's scales are at times larger than they need be, which re-rounding does not repeat; so the
    folder is first put in the form that ours has (the numbers do not change: the checksums say so)."""
    first = tmp_path / "first"
    rows = converted(folder, tmp_path / "numbers", "published", "bfloat16")
    rows += converted(tmp_path / "numbers", first, "published", "fp4")
    assert all(row.same for row in rows)
    there = first
    for i, step in enumerate(way):
        rows = converted(there, tmp_path / str(i), *step, max_shard_bytes=700_000)
        assert all(row.same for row in rows)
        there = tmp_path / str(i)
    rows = converted(there, tmp_path / "back", "published", "fp4")
    assert all(row.same and row.digest_before.startswith(("bf16:", "fp32:", "int64:")) for row in rows)
    want = all_tensors(first)
    if any(layout == "transformers" for layout, _ in way):  # which has no MTP block
        want = {name: t for name, t in want.items() if not name.startswith("mtp.")}
    assert same_bytes(want, all_tensors(tmp_path / "back"))
    assert len(rows) == len(want) - sum(name.endswith(".scale") for name in want)


def test_copying_keeps_every_byte(folder, tmp_path):
    converted(folder, tmp_path)
    assert same_bytes(all_tensors(folder), all_tensors(tmp_path))


@pytest.mark.parametrize("weights", ["released", pytest.param("fp8", marks=SLOW), pytest.param("bfloat16", marks=SLOW)])
def test_transformers_loads_every_layout(folder, model, tmp_path, weights):
    for layout in ("published", "transformers"):
        converted(folder, tmp_path / layout, layout, weights)
        assert differ(theirs(quietly_loaded(tmp_path / layout)), logits(model)) < LOGITS, layout
        assert differ(logits(load(tmp_path / layout, weights="released")), logits(model)) < LOGITS, layout


def test_rounding_is_said(base, tmp_path):
    """FP8 experts do not fit FP4: their checksums differ, all others' do not; config.json says what they are now."""
    rows = converted(base[0], tmp_path / "out", "published", "fp4")
    assert {row.same for row in rows if ".experts." in row.name} == {False}
    assert {row.same for row in rows if ".experts." not in row.name} == {True}
    said = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert said["expert_dtype"] == "fp4"
    row = next(row for row in rows if ".experts." in row.name)
    assert (row.before, row.after) == ("fp8", "fp4")


def test_the_checksum_is_of_the_numbers(folder, model):
    _, sources, _, _ = open_checkpoint(folder)
    matrix = model.layers[0].attn.wo_b.weight
    numbers = matrix.unpack(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    assert digest_of(sources["layers.0.attn.wo_b.weight"]) == "bf16:" + hashlib.sha256(numbers).hexdigest()
    table = model.layers[0].ffn.gate.tid2eid.numpy().tobytes()
    assert digest_of(sources["layers.0.ffn.gate.tid2eid"]) == "int64:" + hashlib.sha256(table).hexdigest()


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_fp4_as_fp8_is_exact_or_refused(data):
    """Any codes, scales that span any number of powers of two: the same numbers, or None exactly where the spec says
    that e4m3 cannot hold them: a number other than 0 that is below its smallest, 2^-9, at the block's scale."""
    rows, columns = data.draw(st.sampled_from([(128, 128), (130, 192), (5, 32), (256, 256)]))
    span = data.draw(st.integers(0, 18))
    low = data.draw(st.integers(0, 251 - span))  # beyond, 6 times the scale is no FP32
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    codes = torch.randint(0, 256, (rows, columns // 2), generator=seed, dtype=torch.uint8)
    scales = torch.randint(low, low + span + 1, (rows, columns // 32), generator=seed, dtype=torch.uint8)
    wide = widened(codes, scales)
    numbers = unpack_matrix("fp4", codes, scales)
    if wide is not None:
        assert torch.equal(wide.unpack(), numbers) and torch.equal(wide.unpack().signbit(), numbers.signbit())
    if span <= 14:
        assert wide is not None
    if span > 16 and rows >= 128:
        assert wide is None


def test_fp4_that_fp8_does_not_hold_names_the_tensor(folder, tmp_path):
    """Scales of 2^-60 beside 2^-8 in a block; nothing is written."""
    tensors = all_tensors(folder)
    tensors["layers.3.ffn.experts.2.w1.scale"].view(torch.uint8)[0, 0] = 67
    source = tmp_path / "source"
    source.mkdir()
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError, match="layers.3.ffn.experts.2.w1.weight cannot be FP8 without changing numbers"):
        converted(source, tmp_path / "out", "published", "fp8")
    assert not (tmp_path / "out").exists()
    assert all(row.same for row in converted(source, tmp_path / "out", "published", "bfloat16"))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("gguf",), "layout 'gguf' is unknown"), (("published", "int4"), "weights 'int4' are unknown"),
        (("training", "fp8"), "holds float32 numbers, not fp8"),
    ],
)  # fmt: skip
def test_wrong_use(folder, tmp_path, args, words):
    with pytest.raises(UserError, match=words):
        converted(folder, tmp_path / "out", *args)
    with pytest.raises(UserError, match="is the source itself"):
        converted(folder, folder)


def test_what_lies_beside_the_weights_comes_along(folder, tmp_path):
    source = tmp_path / "source"
    converted(folder, source)
    (source / "tokenizer.json").write_text('{"a": "ä"}', encoding="utf-8")
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 7]}', encoding="utf-8")
    (source / "optimizer.safetensors").write_bytes(b"not a weight")
    converted(source, tmp_path / "out")
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        "tokenizer.json", "generation_config.json", "config.json", "model.safetensors",
    }  # fmt: skip
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert load(tmp_path / "out").stop_ids == (1, 7)


# --- parts of a model ------------------------------------------------------------------------------------------------


def test_some_layers(folder, model):
    """Those are there, bit for bit, with what lies outside of layers; the others say so when they are called."""
    part = load(folder, weights="released", layers=range(1, 3))
    for name, tensor in model.state_dict().items():
        mine = part.state_dict()[name]
        there = not name.startswith(("layers.0.", "layers.3.", "mtp."))
        assert mine.is_meta != there and (not there or torch.equal(mine, tensor)), name
    with pytest.raises(UserError, match="layer 0 of .* was not loaded"):
        logits(part, 5)
    with pytest.raises(UserError, match="only some of its layers were loaded"):
        save(part, folder / "never")
    with pytest.raises(UserError, match="layer 9 does not exist"):
        load(folder, layers=[9])
    assert not any(t.is_meta for t in load(folder, layers=[4]).mtp.state_dict().values()), "the MTP block is layer 4"


def bytes_there(model: Transformer) -> int:
    """Of all tensors that have their bytes."""
    return sum(t.untyped_storage().nbytes() for t in model.state_dict().values())


@pytest.mark.parametrize("weights", ["released", "plain"])
def test_a_budget_holds_and_changes_no_bit(folder, weights):
    """With room for two blocks: the same logits, whole, in chunks and with the MTP block, and never more bytes than the
    budget; blocks that stay from pass to pass are not read again."""
    whole = load(folder, weights=weights)
    blocks = [size_of(block) for block in (*whole.layers, *whole.mtp)]
    outside = size_of(whole) - sum(blocks)
    budget = outside + 2 * max(blocks)
    streamed = load(folder, weights=weights, memory=budget)
    assert bytes_there(streamed) == outside
    seen: list[int] = []
    for layer in streamed.layers:
        layer.register_forward_hook(lambda *_: seen.append(bytes_there(streamed)))
    assert torch.equal(logits(streamed), logits(whole))
    memories = [m.new_cache()[0] for m in (streamed, whole)]
    with torch.no_grad():
        for part in ids(53).split([50, *[1] * 3]):
            assert torch.equal(*(m(part, memory) for m, memory in zip((streamed, whole), memories, strict=True)))
        targets = [m(ids(20), targets=ids(20)) for m in (streamed, whole)]
    assert torch.equal(targets[0].mtp_nll, targets[1].mtp_nll)
    assert max(seen) <= budget
    passes = 6
    assert streamed.stream.reads < passes * len(streamed.layers), "some of them stay"
    with pytest.raises(UserError, match="read from disk as they run"):
        save(streamed, folder / "never")


def test_a_budget_for_all_reads_each_block_once(folder):
    streamed = load(folder, memory="1GiB")
    for _ in range(3):
        logits(streamed, 5)
    assert streamed.stream.reads == len(streamed.layers)


def test_a_budget_that_is_too_small_says_what_is_needed(folder):
    with pytest.raises(UserError, match="give at least") as caught:
        load(folder, memory="1MB")
    least = int(str(caught.value).rsplit(" ", 1)[1])
    load(folder, memory=least)
    with pytest.raises(UserError):
        load(folder, memory=least - 1)


@pytest.mark.parametrize(("text", "count"), [("16GiB", 16 * 2**30), ("1.5 MB", 1_500_000), (12, 12), ("2k", 2000)])
def test_numbers_of_bytes(text, count):
    assert as_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1.2.3G", "3 apples", "5i"])
def test_what_is_no_number_of_bytes(text):
    with pytest.raises(UserError, match="is not a number of bytes"):
        as_bytes(text)


def test_a_file_that_shrinks_while_it_is_streamed(folder, tmp_path):
    converted(folder, tmp_path)
    streamed = load(tmp_path, memory="1GiB")
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)
    with pytest.raises(UserError, match="has become shorter"):
        logits(streamed, 5)


def test_stacked_experts_that_share_a_scale_are_refused_packed(tmp_path):
    """FP8 experts of 64 rows: two of them would have one scale in a stack; as numbers they load."""
    model = Transformer(small_config((0, 4, 128), mtp=1))
    inner = model.config.moe_intermediate_size
    assert inner % 128
    save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [n for n in tensors if ".experts." in n]:
        matrix = pack_matrix(tensors[name].float(), "fp8")
        assert isinstance(matrix, PackedMatrix)
        tensors[name] = matrix.codes.view(torch.float8_e4m3fn)
        tensors[scale_name(name)] = matrix.scales.view(torch.float8_e8m0fnu)
    save_file(tensors, tmp_path / "model.safetensors")
    load(tmp_path)
    with pytest.raises(UserError, match="no multiple of 128, so they cannot be kept as one packed"):
        load(tmp_path, weights="released")


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command(folder, tmp_path, capsys):
    """A line for every tensor, JSON for machines, the sum on stderr."""
    verb = application(["convert"])
    out = tmp_path / "out"
    runner = CliRunner()
    done = runner.invoke(verb, ["convert", str(folder), str(out), "--weights", "fp8", "--shard", "2MB"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    line = next(line for line in lines if line.startswith("layers.1.ffn.experts.0.w1.weight "))
    assert re.fullmatch(r"\S+  fp4 -> fp8  bf16:[0-9a-f]{64}", line)
    assert "tensors are those of" in done.stderr and "rounded" not in done.stderr
    assert len(list(out.glob("*.safetensors"))) > 1
    done = runner.invoke(verb, ["convert", str(out), str(tmp_path / "b"), "--weights", "bfloat16", "--json"])
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(lines) and all(row["same"] for row in rows)
    assert runner.invoke(verb, ["convert", str(out), str(tmp_path / "c"), "--weights", "int3"]).exit_code != 0


@torch.inference_mode()
def test_a_drafter_in_the_released_formats(tmp_path: Path) -> None:
    """Saved packed, it is whole, loads packed, unpacked and within a budget (its stages stay), and drafts the same."""
    wide = {"hidden_size": 128, "moe_intermediate_size": 128, "q_lora_rank": 128, "o_lora_rank": 128}
    model = small_model((0, 4, 128, 4), dspark=3, **wide)
    pack_weights(model)
    assert "mtp.0.main_proj.weight" in packed_of(model)
    save(model, tmp_path)
    report = inspect(tmp_path)
    assert report.whole and not report.findings and "DSpark drafter of 3 stages" in report.what
    ids = tokens(model, 60)

    def drafted(m: Any) -> list[Tensor]:
        memory = m.new_cache(mtp=True)[0]
        trunk = m.trunk(ids, [Segment(60, memory)])
        return [m.logits(trunk.hidden), m.draft_block(ids[:1], [memory], 5).logits]

    want = drafted(model)
    streamed = load(tmp_path, weights="released", memory="2.1MB")
    for other in (load(tmp_path, weights="released"), load(tmp_path), streamed):
        for a, b in zip(drafted(other), want, strict=True):
            assert (a - b).abs().max() < 1e-5
    assert streamed.stream.reads >= 4 and all(block.attn.wkv.weight.codes.numel() for block in _blocks(streamed))


def _blocks(model: Any) -> list[Any]:
    """Those of the drafter."""
    return [stage.block for stage in model.mtp]
