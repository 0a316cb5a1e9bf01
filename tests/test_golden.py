"""Failures caught here: a refactoring that changes what a run comes to. The numbers, where they come from, and why the
tolerances are what they are: golden/run/README.md.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

_SPEC = importlib.util.spec_from_file_location("golden_run", Path(__file__).parent / "golden" / "run" / "make.py")
assert _SPEC and _SPEC.loader
golden = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(golden)

# figure -> (allowed on the processor family that the numbers were born on, allowed elsewhere)
ALLOWED = {
    "first loss": (1e-6, 1e-6), "loss": (1e-5, 1e-3), "mtp_loss": (1e-5, 1e-3), "balance": (1e-5, 1e-3),
    "heldout_bpb": (1e-5, 1e-3), "load_max": (1e-6, 5e-2), "grad_norm": (1e-4, 1e-2), "gradient_norms": (3e-4, 1e-3),
    "logits, float32, largest": (2e-5, 2e-5), "logits, bfloat16, mean": (5e-4, 5e-3),
    "logits, packed, mean": (5e-4, 5e-2),
}  # fmt: skip

Numbers = tuple[dict[str, Any], dict[str, Tensor]]


@pytest.fixture(scope="module")
def kept() -> Numbers:
    return golden.kept()


@pytest.fixture(scope="module")
def now() -> Numbers:
    return golden.everything()


def test_a_run_and_its_memories_are_what_they_were(now: Numbers, kept: Numbers) -> None:
    elsewhere = golden.machine()["cpu"] != kept[0]["birth"]["cpu"]
    found = golden.differences(now, kept)
    wrong = {name: found[name] for name, allowed in ALLOWED.items() if not found[name] <= allowed[elsewhere]}
    assert not wrong, f"{wrong}; all: {found}"


def test_the_golden_model_has_everything(now: Numbers, kept: Numbers) -> None:
    c = golden.config()
    assert [kind.name for kind in c.trunk_kinds] == ["window", "csa", "hca"]
    assert c.num_nextn_predict_layers == 1 and c.num_hash_layers >= 1
    steps = kept[0]["steps"]
    assert len(steps) == golden.STEPS and steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    assert steps[-1]["mtp_loss"] > 0 and "heldout_bpb" in steps[-1]
    names = set(kept[0]["gradient_norms"])
    assert {"layers.N.attn.compressor.ape", "mtp.N.e_proj.weight", "layers.N.hc_attn_fn", "embed.weight"} <= names
    for format in golden.FORMATS:
        assert kept[1][format].shape == (golden.PROMPT + golden.DECODED, c.vocab_size)
    for narrow in ("bfloat16", "packed"):  # so that a memory that is not narrow would show
        assert (kept[1][narrow] - kept[1]["float32"]).abs().mean() > 3 * ALLOWED[f"logits, {narrow}, mean"][0]


@pytest.mark.parametrize("name", ["layers.2.attn.attn_sink", "layers.1.attn.compressor.norm.weight", "norm.weight"])
def test_a_small_change_of_the_model_is_noticed(kept: Numbers, name: str) -> None:
    model = golden.seeded()
    with torch.no_grad():
        dict(model.named_parameters())[name].mul_(1.001)
    found = golden.differences((kept[0], golden.logits(model)), kept)
    assert found["logits, float32, largest"] > ALLOWED["logits, float32, largest"][1]
