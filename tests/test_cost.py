"""Failures caught here: a count that is not the model's, or that misses a component."""

import pytest
import torch

from dsv4 import ModelConfig, Transformer
from dsv4.config import PRESETS
from dsv4.cost import flops_by_component, flops_per_token, parameters
from dsv4.cost.flops import attended


@pytest.mark.parametrize("name", PRESETS)
def test_counted_parameters_are_those_of_the_model(name: str) -> None:
    config = ModelConfig.preset(name)
    with torch.device("meta"):
        model = Transformer(config)
    counted = parameters(config)
    assert counted["total"] == model.num_parameters()
    assert counted["total"] + counted["mtp"] == model.num_parameters(mtp=True)


def test_published_counts() -> None:
    """Total and activated parameters of the released models: 284B / 13B and 1.6T / 49B."""
    flash, pro = parameters(ModelConfig.preset("flash")), parameters(ModelConfig.preset("pro"))
    assert (flash["total"], pro["total"]) == (284_332_230_231, 1_572_997_179_491)
    assert round(flash["active"] / 1e9) == 13 and round(pro["active"] / 1e9) == 49


def test_rows_that_a_query_reads() -> None:
    flash = ModelConfig.preset("flash")
    for ratio, entries in ((0, 0), (4, 512), (128, 8192)):
        assert attended(flash, ratio, 1 << 20) == 128 + entries
    assert attended(flash, 4, 7) == 7 + 1


def test_flops_are_the_matrix_products_that_run() -> None:
    """Torch's own counter over the products of one forward pass at a context where attention is a small part."""
    from torch.utils.flop_counter import FlopCounterMode

    from dsv4 import ops

    config = ModelConfig.preset("tiny", index_topk=8192)
    model, tokens = Transformer(config), 16
    with torch.no_grad(), FlopCounterMode(display=False) as counter, ops.using("reference"):
        model(torch.randint(0, 512, (tokens,)))
    counted = flops_by_component(config, tokens)
    weights = sum(v for k, v in counted.items() if k not in ("core attention", "indexer scores", "hyper-connections"))
    weights += config.num_hidden_layers * 2 * 2 * 24 * 4 * 96 + 2 * 4 * 4 * 96  # hyper-connection maps
    # not products of weights: attention scores and mixing, and the streams' mixing
    extra = counter.get_total_flops() - tokens * weights
    assert 0 <= extra < 0.25 * tokens * weights
    assert flops_per_token(config, tokens) == sum(counted.values())


def test_flops_grow_with_the_context() -> None:
    flash = ModelConfig.preset("flash")
    costs = [flops_per_token(flash, 1 << n) for n in range(21)]
    assert costs == sorted(costs)
