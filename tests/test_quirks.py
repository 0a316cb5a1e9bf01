"""Where ports of V4 go wrong: the model against conform/plain.py, and against the same with each known mistake put in.

Failures caught here: the mistakes named in plain.FLIPS. Each has a test that fails when the model makes it, because
the model equals the plain form to 1e-5 and differs from the flipped one by more than 1e-3.
"""

import inspect
from functools import cache

import pytest
import torch
from differences import differ
from torch import Tensor

from dsv4.conform.plain import FLIPS, HASH_FLIPS, MTP_FLIPS, TOP_FLIPS, PlainV4
from dsv4.conform.plain_attention import PlainAttention
from dsv4.measure.subjects import small_model, stream, tokens
from dsv4.model import Segment, Transformer
from dsv4.model.segments import plan

RIGHT, WRONG = 1e-5, 1e-3
RATIO = {"window": 0, "csa": 4, "hca": 128}
LENGTH = 270  # two HCA entries, 67 CSA entries, and beyond the window
HASH, SCORE = 0, 1  # of the two layers of a model the first routes by token id, the second by score


@cache
def subject(kind: str) -> tuple[Transformer, Tensor, Tensor]:
    """A model of two layers of one kind whose clamps act, random streams [T, N, M], ids."""
    model = small_model((RATIO[kind],) * 2, swiglu_limit=0.5, seed=3)
    streams = torch.randn(LENGTH, 4, model.config.hidden_size, generator=torch.Generator().manual_seed(5))
    return model, streams, tokens(model, LENGTH)


@cache
def of_the_model(kind: str, layer: int) -> Tensor:
    model, streams, ids = subject(kind)
    run = plan(model.config, [Segment(LENGTH)], torch.device("cpu"))
    with torch.no_grad():
        return model.layers[layer](streams, ids, run, [None])[0]


def plainly(kind: str, layer: int, flip: str | None = None) -> Tensor:
    model, streams, ids = subject(kind)
    return PlainV4(model.config, model.state_dict(), flip).block(f"layers.{layer}.", layer, streams.double(), ids)


@pytest.mark.parametrize("layer", [HASH, SCORE])
@pytest.mark.parametrize("kind", RATIO)
def test_a_layer_is_the_plain_layer(kind, layer):
    assert differ(plainly(kind, layer), of_the_model(kind, layer)) < RIGHT


@pytest.mark.parametrize(("flip", "kind"), [(flip, kind) for flip, kinds in FLIPS.items() for kind in kinds])
def test_a_layer_is_not(flip, kind):
    assert differ(plainly(kind, SCORE, flip), of_the_model(kind, SCORE)) > WRONG


@pytest.mark.parametrize("flip", HASH_FLIPS)
def test_a_hash_layer_is_not(flip):
    assert differ(plainly("window", HASH, flip), of_the_model("window", HASH)) > WRONG


def test_every_flip_does_something():
    """A misspelt name would flip nothing and could not be told from a mistake that makes no difference."""
    text = inspect.getsource(PlainV4) + inspect.getsource(PlainAttention)
    for flip in (*FLIPS, *HASH_FLIPS, *TOP_FLIPS, *MTP_FLIPS):
        assert f'"{flip}"' in text, flip


# --- while streaming ---------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize(("kind", "flips"), [
    ("csa", ("overlap lost", "overlap halves swapped", "entries rotated at the pool index", "window one wider",
             "entries visible a token late", "entries visible a token early", "output not rotated back")),
    ("hca", ("entries rotated at the pool index", "entries visible a token late", "entries visible a token early")),
    ("window", ("window one wider", "window without the token itself", "output not rotated back")),
])  # fmt: skip
def test_a_stream_is_the_plain_model(kind, flips, chunk):
    """What a whole sequence has right can be lost between two calls: token by token and in chunks of 7."""
    model = small_model((RATIO[kind],), swiglu_limit=0.5, seed=3)
    ids = tokens(model, LENGTH)
    got = stream(model, ids, chunk)
    assert differ(PlainV4(model.config, model.state_dict()).logits(ids), got) < RIGHT
    for flip in flips if chunk == 1 else flips[:1]:
        assert differ(PlainV4(model.config, model.state_dict(), flip).logits(ids), got) > WRONG, flip


# --- whole model and MTP -----------------------------------------------------------------------------


@cache
def whole_subject() -> tuple[Transformer, Tensor]:
    model = small_model((0, 4, 128), mtp=1, swiglu_limit=0.5, seed=3)
    return model, tokens(model, 140)


def test_the_whole_model_is_the_plain_model():
    model, ids = whole_subject()
    with torch.no_grad():
        got = model(ids)
    assert differ(PlainV4(model.config, model.state_dict()).logits(ids), got) < RIGHT
    for flip in TOP_FLIPS:
        assert differ(PlainV4(model.config, model.state_dict(), flip).logits(ids), got) > WRONG, flip


def test_mtp_is_the_plain_mtp():
    model, ids = whole_subject()
    with torch.no_grad():
        hidden, rows, _ = model.predict_next(model.trunk(ids, [Segment(len(ids))]), ids)
        got = model.logits(hidden)
    assert rows.tolist() == list(range(len(ids) - 1))
    assert differ(PlainV4(model.config, model.state_dict()).mtp_logits(ids), got) < RIGHT
    for flip in MTP_FLIPS:
        assert differ(PlainV4(model.config, model.state_dict(), flip).mtp_logits(ids), got) > WRONG, flip
