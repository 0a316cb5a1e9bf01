"""How a new model starts. The paper gives no initialisation; the choices that are ours are marked."""

import math

import torch
from torch import nn

from dsv4.config import ModelConfig


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig) -> None:
    """Fill every parameter in place from torch's global generator; on the meta device nothing happens."""
    for name, p in sorted(model.named_parameters(), key=lambda item: draw_order(item[0])):
        if p.is_meta:
            continue
        leaf = name.rsplit(".", 1)[-1]
        if name.endswith("norm.weight"):
            p.fill_(1.0)
        elif leaf.startswith("hc_"):
            _hyper(leaf, p, config)
        elif leaf in ("attn_sink", "ape"):
            p.zero_()
        else:
            p.normal_(0.0, config.initializer_range)


def draw_order(name: str) -> int:
    """Numbers are drawn in the order of the published names, which in the MTP block is not that of the modules: a seed
    goes on giving the model that it gave."""
    if not name.startswith("mtp."):
        return 0
    return 1 if ".block.hc_" in name else 2 if ".hc_head_" in name else 3


def _hyper(leaf: str, p: torch.Tensor, config: ModelConfig) -> None:
    """Start near a plain residual connection (ours): read the mean of the streams, write 1, mix almost nothing."""
    num = config.hc_mult
    if leaf.endswith("_fn"):
        p.normal_(0.0, config.initializer_range)
    elif leaf.endswith("_scale"):
        p.fill_(0.01)  # the dynamic part starts small [paper: "small at start"]
    else:
        p.zero_()  # hc: mixing starts as the identity
        p[:num] = -math.log(num - 1) if num > 1 else 0.0  # sigmoid -> 1 / num
        if len(p) > num and config.residual == "mhc":
            p[2 * num :] = -4.0 * (1 - torch.eye(num, device=p.device)).flatten()
