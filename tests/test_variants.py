"""The attentions that V4's is compared with: every token's row (dense), the window and the best-scored tokens
(anchors), the window and what low-rank rows are rebuilt to (lowrank).

Failures caught here: rows that are not those that a plain float64 derivation reads, a cut or a neighbour in the batch
that changes a number, a memory that does not go back exactly, a score or a matrix that does not learn, a variant that
does not train, decode or save.
"""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from differences import differ

from dsv4 import ModelConfig, Transformer, load, ops, save
from dsv4.conform.plain import PlainV4
from dsv4.engine import Engine, SamplingParams
from dsv4.errors import UserError
from dsv4.measure.subjects import KINDS, randomise, small_model, stream, tokens
from dsv4.settings import merge
from dsv4.train.recipes import RECIPES
from dsv4.train.trainer import Trainer

EXACT = 1e-5
VARIANTS = {"dense": 0, "anchors": 0, "lowrank": 8}
FORMATS = ["float32", "bfloat16", "packed"]


def build(attention: str, **changes) -> Transformer:
    """Layers of the window alone beside those of the variant; rows leave the window early."""
    changes = {"sliding_window": 16, "attention_rank": VARIANTS[attention], **changes}
    return small_model(KINDS["whole"], attention=attention, **changes).eval()


@pytest.mark.parametrize("attention", VARIANTS)
@pytest.mark.parametrize("window", [16, 128])
def test_it_reads_what_the_plain_derivation_reads(attention: str, window: int) -> None:
    model = build(attention, sliding_window=window)
    ids = tokens(model, 200)
    with torch.no_grad():
        got = model(ids)
    assert differ(PlainV4(model.config, model.state_dict()).logits(ids), got) < EXACT
    assert differ(
        PlainV4(model.config.with_(attention="dense", attention_rank=0), model.state_dict()).logits(ids), got
    ) > (-1 if attention == "dense" else 1e-2)


@pytest.mark.parametrize("attention", VARIANTS)
def test_gradients_are_those_of_the_plain_derivation(attention: str) -> None:
    """Of every parameter, relative to its largest; two documents, so that none reads the other's rows."""
    model = build(attention)
    ids, lengths = tokens(model, 130), [50, 80]
    model(ids, segments=lengths, targets=ids.roll(-1)).nll.backward()
    weights = {n: p.detach().double().requires_grad_() for n, p in model.state_dict(keep_vars=True).items()
               if p.is_floating_point()}  # fmt: skip
    plain = PlainV4(model.config, {**model.state_dict(), **weights})
    logits = torch.cat([plain.logits(part) for part in ids.split(lengths)])
    torch.nn.functional.cross_entropy(logits, ids.roll(-1), reduction="sum").backward()
    for name, p in model.named_parameters():
        want = weights[name].grad
        assert p.grad is not None and want is not None, name
        assert differ(want, p.grad) < 2e-4 * want.abs().max().item(), name
    new = [n for n, _ in model.named_parameters() if "anchor_score" in n or "far_" in n]
    assert len(new) == {"dense": 0, "anchors": 2, "lowrank": 4}[attention]


@pytest.mark.parametrize("attention", VARIANTS)
def test_whole_is_every_chunking_and_every_residue(attention: str) -> None:
    """Chunk 1 ends at every residue mod 128, on both sides of two edges of pages."""
    model = build(attention)
    ids = tokens(model, 300)
    with torch.no_grad():
        want = model(ids)
    for chunk in (1, 3, 127, 128, 129, 300):
        assert differ(want, stream(model, ids, chunk)) < EXACT, chunk
    with torch.no_grad(), ops.using("reference"):
        assert differ(want, model(ids)) < EXACT
        assert differ(want, stream(model, ids, 129)) < EXACT
    for format in FORMATS[1:]:
        one = stream(model, ids, 300, model.new_cache(format=format))
        assert 0 < (want - one).abs().mean() < 0.15 * want.std(), format
        assert (one - stream(model, ids, 7, model.new_cache(format=format))).abs().mean() < 5e-3, format


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("attention", VARIANTS)
def test_many_sequences_in_one_call_are_each_alone(attention: str, format: str) -> None:
    """Prompts beside decoding, some far beyond what one block of queries would read as one."""
    model = build(attention)
    memories = model.new_cache(batch=12, format=format)
    for i, memory in enumerate(memories):
        model(tokens(model, 1 + 61 * i, seed=i), segments=[(1 + 61 * i, memory)], rows="last")
    alone, lengths = [m.fork() for m in memories], [1] * 9 + [130, 5, 1]
    ids = tokens(model, sum(lengths), seed=99)
    with torch.no_grad():
        got = model(ids, segments=list(zip(lengths, memories, strict=True)))
        want = [model(part, m) for part, m in zip(ids.split(lengths), alone, strict=True)]
    assert differ(torch.cat(want), got) < (EXACT if format == "float32" else 5e-5)


@pytest.mark.parametrize("attention", VARIANTS)
def test_forks_rewinds_and_snapshots_are_exact(attention: str) -> None:
    model = build(attention)
    ids = tokens(model, 300)
    for at in (1, 15, 16, 17, 127, 128, 129, 250):
        memory = model.new_cache(max_rewind=40)[0]
        model(ids[:at], memory)
        fork, saved = memory.fork(), memory.snapshot()
        with torch.no_grad():
            want = model(ids[at : at + 30], memory)
            memory.rewind(30)
            assert torch.equal(model(ids[at : at + 30], memory), want)
            assert torch.equal(model(ids[at : at + 30], fork), want)
            fresh = model.new_cache(max_rewind=40)[0]
            fresh.restore(saved)
            assert torch.equal(model(ids[at : at + 30], fresh), want)


@pytest.mark.parametrize("attention", VARIANTS)
def test_it_trains_and_decodes(attention: str, tmp_path: Path) -> None:
    """Fifty steps, from the settings: model.attention=..."""
    model = ModelConfig.preset(
        "tiny", vocab_size=258, num_hidden_layers=3, compress_ratios=(0, 4, 128, 0), hidden_size=32, sliding_window=16
    )
    (tmp_path / "a.txt").write_text("the cat sat on the mat and the dog ran. " * 300)
    config = merge(
        replace(RECIPES["tiny"](), model=model),
        {
            "model": {"attention": attention, "attention_rank": VARIANTS[attention]},
            "data": {"path": str(tmp_path / "a.txt"), "tokenizer": "bytes", "seq_len": 200, "tokens_per_step": 256},
            "schedule": {"steps": 50, "warmup": 5},
            "save": {"every": 50, "eval_every": 50, "eval_tokens": 256},
        },
    )
    run = Trainer(config, tmp_path / "run")
    before, first = {n: p.detach().clone() for n, p in run.model.named_parameters()}, run.evaluate()
    records: list[dict] = []
    assert run.run(records.append)
    assert all(not torch.equal(before[n], p) for n, p in run.model.named_parameters()), "every parameter learns"
    assert records[-1]["heldout_bpb"] < 0.7 * first
    engine = Engine.open(tmp_path / "run")
    assert engine.model.config.attention == attention  # type: ignore[union-attr]
    done = engine.generate(["the cat sat on the mat"], SamplingParams(temperature=0, max_tokens=12))[0]
    with torch.no_grad():
        ids = torch.tensor([*done.prompt_ids, *done.ids])
        assert engine.model(ids)[len(done.prompt_ids) - 1 : -1].argmax(dim=1).tolist() == done.ids


@pytest.mark.parametrize("attention", VARIANTS)
def test_a_checkpoint_says_which_it_is(attention: str, tmp_path: Path) -> None:
    model = randomise(Transformer(build(attention).config, torch.bfloat16))
    save(model, tmp_path)
    again = load(tmp_path, "bfloat16")
    assert again.config == model.config and again.config.to_json()["attention"] == attention  # type: ignore[union-attr]
    ids = tokens(model, 60)
    assert torch.equal(again(ids), model(ids))
    if attention == "anchors":
        assert again.layers[1].attn.anchor_score.weight.dtype == torch.float32
    with pytest.raises(UserError):
        load(tmp_path, config=model.config.with_(attention="compressed", attention_rank=0))


def test_the_number_of_anchors_is_the_root_rounded_up() -> None:
    from dsv4.model.segments import Segment, plan
    from dsv4.model.variants import anchors

    config = build("anchors").config.with_(max_position_embeddings=1 << 21)
    run = plan(config, [Segment(70000)], torch.device("cpu"))
    assert anchors(run).tolist() == [math.isqrt(n - 1) + 1 for n in range(1, 70001)]
