"""How much memory loading takes: python tests/peak.py make FOLDER GIB, then python tests/peak.py HOW FOLDER.

`make` writes a checkpoint of random codes in the released format, of about so many GiB. HOW is released (all as codes),
layers (two of them as BF16), memory (all as codes in 1 GiB, and a forward) or convert (to FP8, beside the folder).
Each prints JSON: bytes that were resident at most beyond what was there before, what the model holds, and its largest
tensor.
"""

import json
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor

from dsv4 import ModelConfig, Transformer, load
from dsv4.checkpoint.convert import convert
from dsv4.checkpoint.names import file_names, scale_name
from dsv4.checkpoint.save import CODE_DTYPES, config_of, released_dtype
from dsv4.checkpoint.stream import size_of, tensors_of
from dsv4.checkpoint.writing import Entry, as_json, shards_of, write_folder
from dsv4.model.packed import released_code
from dsv4.ops.weights import BLOCKS

HOLD = 1 << 30  # the budget of `memory`
_SEED = torch.Generator().manual_seed(0)
_NOISE = torch.randint(0, 0x70, (1 << 22,), generator=_SEED, dtype=torch.uint8)  # no NaN among them as e4m3


def config(layers: int) -> ModelConfig:
    return ModelConfig.preset(
        "flash", hidden_size=2048, moe_intermediate_size=1024, n_routed_experts=64, num_hidden_layers=layers,
        compress_ratios=(0, *(4, 128) * (layers // 2), 4)[:layers] + (0,), num_attention_heads=16, o_groups=4,
        o_lora_rank=512, q_lora_rank=512, index_n_heads=16, num_hash_layers=1, vocab_size=32768,
    )  # fmt: skip


def noise(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Entry:
    def pieces():
        left = torch.Size(shape).numel()
        while left:
            count = min(left, len(_NOISE))
            if dtype.itemsize == 1:
                part = _NOISE[:count].view(dtype)
                part = (torch.full_like(_NOISE[:count], 118)).view(dtype) if name.endswith(".scale") else part
            else:
                part = ((_NOISE[:count].float() - 56) * 1e-3 + ("norm" in name)).to(dtype)
            yield part
            left -= count

    return Entry(name, dtype, shape, pieces)


def make(folder: Path, gib: float) -> None:
    layers = max(2, round(gib * 2**30 / 232e6))
    c = config(layers)
    with torch.device("meta"):
        like = Transformer(c, "bfloat16").state_dict()
    entries = []
    for name, tensor in like.items():
        code = released_code(name)
        for file_name, place in file_names(name, tuple(tensor.shape), "published"):
            shape = tuple(tensor.shape[len(place) :])
            if code:
                packed = (shape[0], shape[1] // 2) if code == "fp4" else shape
                scales = tuple(-(-n // b) for n, b in zip(shape, BLOCKS[code], strict=True))
                entries.append(noise(file_name, packed, CODE_DTYPES[code]))
                entries.append(noise(scale_name(file_name), scales, torch.float8_e8m0fnu))
            elif name.endswith("tid2eid"):
                table = torch.arange(shape[1]).expand(shape).contiguous()
                entries.append(Entry(file_name, torch.int64, shape, lambda table=table: [table]))
            else:
                kept = released_dtype(file_name, torch.zeros(1, dtype=tensor.dtype))
                entries.append(noise(file_name, shape, kept))
    write_folder(
        folder,
        [*shards_of(entries, 2**50)],
        {"config.json": as_json(config_of(c, "published", torch.bfloat16, {"fp4"}))},
    )


def resident() -> int:
    """Bytes of this process at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def sizes(model: Transformer) -> dict[str, int]:
    there = [t for t in tensors_of(model).values() if not t.is_meta]
    return {"model": sum(map(_bytes, there)), "largest": max(map(_bytes, there))}


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def main(how: str, folder: Path, *rest: str) -> None:
    if how == "make":
        make(folder, float(rest[0]))
        return
    torch.set_num_threads(1)
    base, held = resident(), {}
    if how == "convert":
        target = folder.with_name(f"{folder.name}-fp8")
        for row in convert(folder, target, weights="fp8"):
            assert row.same, row
        held = {"model": 0, "largest": 0}
    elif how == "memory":
        model = load(folder, "bfloat16", weights="released", memory=HOLD)
        with torch.no_grad():
            assert model(torch.arange(8)).isfinite().all()
        held = {"model": HOLD, "largest": max(size_of(b) for b in model.layers), "reads": model.stream.reads}
    else:
        some = {"layers": range(1, 3)} if how == "layers" else {"weights": "released"}
        held = sizes(load(folder, "bfloat16", **some))
    weights = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    print(json.dumps({"how": how, "file": weights, "peak": resident() - base, **held}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
