"""Failures caught here: a model that executes other products than are counted, a memory that allocates other bytes, a
product that the measuring program does not see or credits to the wrong component.
"""

import pytest
import torch

from dsv4 import ModelConfig, Transformer, cost
from dsv4.bench import cost as bench
from dsv4.config import LlamaConfig
from dsv4.cost import kv_bytes
from dsv4.measure.executed import Executed, run_one_token
from dsv4.measure.slices import build
from dsv4.train.loss import training_loss

LLAMA = LlamaConfig(
    vocab_size=512, hidden_size=96, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=16,
    intermediate_size=80, max_position_embeddings=65536,
)  # fmt: skip
SMALL_V4 = bench.SMALL["small V4"]
assert isinstance(SMALL_V4, ModelConfig)
OTHERS = {f"small V4, {residual} residual": SMALL_V4.with_(residual=residual) for residual in ("plain", "hc")}
RATES = dict(compress_rate_csa=8, compress_rate_hca=32, compress_ratios=(0, 0, 8, 32, 8, 32, 0), index_topk=32)
OTHERS["small V4, ratios 8 and 32"] = SMALL_V4.with_(**RATES)
for _name, _rank in (("dense", 0), ("anchors", 0), ("lowrank", 16)):
    OTHERS[f"small V4, {_name} attention"] = SMALL_V4.with_(attention=_name, attention_rank=_rank)
MODELS = {**bench.SMALL, "small Llama": LLAMA, **OTHERS}


@pytest.mark.parametrize("name", MODELS)
def test_executed_is_counted_for_every_component(name: str) -> None:
    """At five contexts. Beyond the rule runs the head's collapse of the streams, 0.3% of hyper-connections, alone."""
    pairs, sizes = bench.measure_model(
        name, MODELS[name], bench.SMALL_CONTEXTS, whole=True, dtype=torch.float32, progress=lambda line: None
    )
    assert {p.context for p in pairs} == set(bench.SMALL_CONTEXTS)
    for pair in pairs:
        assert abs(pair.off) <= (0.003 if pair.component == "hyper-connections" else 0), pair
    assert len(sizes) == len(bench.SMALL_CONTEXTS) * (2 if name == "small Llama" else 3)
    for size in sizes:
        assert size.counted == size.allocated, size


@pytest.mark.parametrize("context", [1, 40, 300, 1021])
def test_nothing_is_scored_where_nothing_has_to_be_chosen(context: int) -> None:
    """While every entry is read the indexer only keeps its keys, so that less is executed than is counted."""
    config = bench.SMALL["small V4"]
    assert isinstance(config, ModelConfig)
    model = build(config, torch.float32)
    counts, _ = run_one_token(model, config, context, "packed")
    scored = sum(n for (_, component, _), n in counts.items() if component == "indexer scores")
    counted = cost.flops_by_component(config, context).get("indexer scores", 0)
    assert scored == (counted if context // 4 > config.index_topk else 0)


def test_a_slice_stands_for_its_layers() -> None:
    """Layers of one kind at real width, times their number, are the whole model: FLOPs and bytes."""
    for name, config in MODELS.items():
        whole, held = (
            bench.measure_model(name, config, [1021], whole=w, dtype=torch.float32, progress=lambda line: None)
            for w in (True, False)
        )
        assert whole[0] == held[0] and whole[1] == held[1]


def test_extrapolation_gives_the_counted_ratios() -> None:
    """From what is counted at the fitted contexts: costs are straight lines there, up to a million."""
    pairs, sizes = [], []
    for name, config in bench.REAL.items():
        for context in bench.FITTED:
            work = cost.decode(config, context)
            pairs += [bench.Pair(name, context, w.component, w.kind, w.flops, w.flops) for w in work]
            for format, known in bench.FORMATS.items():
                size = sum(kv_bytes.held(config, context, known).values())
                sizes.append(bench.Size(name, format, context, size, size))
    found = bench.ratios(pairs, sizes, bench.FITTED)
    assert {r.model for r in found} == {"pro", "flash"} and len(found) == 10
    for ratio in found:
        assert ratio.extrapolated == pytest.approx(ratio.counted, abs=1e-3) and ratio.direct is None


def test_training_executes_three_times_the_forward_products() -> None:
    """One token through window layers, so that no block is wider than it must be; the core's scores run once more."""
    config = ModelConfig.preset("tiny", num_nextn_predict_layers=0, compress_ratios=(0,) * 5)
    model = Transformer(config)
    with Executed(model, config) as executed:
        ids, target = torch.tensor([3]), torch.tensor([5])
        training_loss(model, ids, target, [1], mtp_weight=0.0, balance_weight=0.0).total.backward()
    work = cost.train(config, 1)
    core = sum(w.flops for w in work if w.kind == "core") // 3
    assert sum(executed.counts.values()) == pytest.approx(cost.weighted(work) + core / 2, rel=0.01)
