"""What one update of a run costs that many GPUs share as train/parallel shares it: memory, bytes sent, what hides what.

    python -m dsv4.cost.scale pro --gpus 2048 --ep 64 --tokens 94.4e6 --seq 4096

A plan on paper: formulas over the configuration, none of it measured. docs/scale.md says where each one comes from.
Numbers travel and lie as the trainer has them: masters, gradients and momenta fp32, activations in BF16.
Symbols: N GPUs = DP * CP * EP; d hidden, c head width, K experts a token, r compress ratio, w window.
"""

import argparse
import json
from dataclasses import dataclass

from dsv4.config import ModelConfig
from dsv4.cost.flops import train
from dsv4.cost.params import BIAS, families, mtp_families
from dsv4.errors import UserError

FP32, HALF = 4, 2  # bytes
PEAK, MFU = 989.5e12, 0.4  # of an H100 in BF16 (hardware.py), and the share of it that a plan may count on
NEAR, FAR = 450e9, 50e9  # bytes/s a GPU sends within a machine of 8 (NVLink 4) and beyond it (400 Gbit/s)
MACHINE = 8


@dataclass(frozen=True)
class Plan:
    """`gpus` processes, of which `ep` share experts and `cp` a row of `seq` tokens; `tokens` an update, that each
    process computes in `micro` parts."""

    config: ModelConfig
    gpus: int
    ep: int
    cp: int
    tokens: int
    seq: int
    micro: int

    def __post_init__(self) -> None:
        if self.gpus % (self.ep * self.cp) or self.config.n_routed_experts % self.ep:
            raise UserError(
                f"{self.gpus} GPUs with ep={self.ep} and cp={self.cp}: ep * cp must divide the GPUs, and ep the "
                f"{self.config.n_routed_experts} experts; choose others"
            )

    @property
    def each(self) -> float:
        """Tokens of an update that one process computes."""
        return self.tokens / self.gpus

    def counts(self) -> tuple[int, int, int]:
        """Parameters: of routed experts, of everything else, and of both those that AdamW has (two momenta)."""
        found = [f for f in (*families(self.config), *mtp_families(self.config)) if f.component != BIAS]
        experts = sum(f.count for f in found if f.kind == "expert")
        adamw = sum(f.count for f in found if f.component in ("embedding", "head"))
        return experts, sum(f.count for f in found) - experts, adamw

    def memory(self) -> dict[str, float]:
        """Bytes in a process: its share of the state, the block that is whole at the time and the next one, and the
        streams between blocks that are kept for the backward pass of one part (each block is computed again)."""
        experts, dense, adamw = self.counts()
        k = self.config
        layers = k.num_hidden_layers + k.num_nextn_predict_layers
        streams = self.each / self.micro * k.num_streams * k.hidden_size * HALF * layers
        share = {
            "masters": FP32 * (experts + dense) / self.gpus,
            "gradients": FP32 * (experts + dense) / self.gpus,
            "momenta": FP32 * (experts + dense + adamw) / self.gpus,
            "two whole blocks": 2 * FP32 * (experts / self.ep + dense) / layers,
            "streams": streams,
        }
        return {**share, "in all": sum(share.values())}

    def sent(self) -> dict[str, float]:
        """Bytes that a process sends in an update."""
        experts, dense, _ = self.counts()
        k = self.config
        others = lambda n: (n - 1) / n  # noqa: E731
        fsdp = 3 * FP32 * self.micro  # gathered forward and backward, gradients scattered
        layers = k.num_hidden_layers + k.num_nextn_predict_layers
        rows = 4 * k.num_experts_per_tok * k.hidden_size * HALF  # there and back, forward and backward
        return {
            "FSDP, dense": fsdp * dense * others(self.gpus),
            "FSDP, experts": fsdp * experts / self.ep * others(self.gpus // self.ep),
            "experts": self.each * layers * rows * others(self.ep),
            "context": 2 * self._context() * self.each * self.cp / self.seq if self.cp > 1 else 0.0,
            "Muon": 2 * FP32 * (experts + dense) / self.gpus,
        }

    def _context(self) -> float:
        """Bytes that a process sends forward for one row, all layers together; gradients take the same way back."""
        k = self.config
        layers = k.num_hidden_layers + k.num_nextn_predict_layers
        total = layers * (k.sliding_window - 1) * k.head_dim * HALF
        for kind in k.trunk_kinds:
            if not kind.ratio:
                continue
            r, twice = kind.ratio, 2 if kind.overlap else 1
            for width in (k.head_dim, *([k.index_head_dim] if kind.indexed else [])):
                total += (r * twice - 1) * 2 * twice * width * FP32  # values and gate scores of the open group
                total += (self.cp - 1) * self.seq / self.cp / r * width * HALF  # own entries to everyone
        return total

    def seconds(self) -> dict[str, float]:
        """The least time each takes: arithmetic at the assumed rate, bytes over the links that they take; and an
        update, in which fully_shard sends beside the arithmetic, and everything else waits for its rows."""
        work = sum(w.flops for w in train(self.config, self.seq)) / self.seq * self.each
        sent = self.sent()
        link = NEAR if self.ep <= MACHINE else FAR
        near = NEAR if self.ep * self.cp <= MACHINE else FAR
        took = {name: value / {"experts": link, "context": near}.get(name, FAR) for name, value in sent.items()}
        arithmetic = work / (PEAK * MFU)
        beside = took["FSDP, dense"] + took["FSDP, experts"]
        update = max(arithmetic, beside) + took["experts"] + took["context"] + took["Muon"]
        return {"arithmetic": arithmetic, **took, "update": update}


def main(words: list[str] | None = None) -> None:
    """Print a plan as JSON."""
    parser = argparse.ArgumentParser(prog="python -m dsv4.cost.scale", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model")
    for name, kind, default in (
        ("gpus", int, 2048), ("ep", int, 64), ("cp", int, 1), ("tokens", float, 94.4e6), ("seq", int, 4096),
        ("micro", int, 1),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default)
    given = parser.parse_args(words)
    config = ModelConfig.preset(given.model)
    plan = Plan(config, given.gpus, given.ep, given.cp, int(given.tokens), given.seq, given.micro)
    experts, dense, adamw = plan.counts()
    print(json.dumps({
        "parameters": {"experts": experts, "dense": dense, "AdamW": adamw}, "tokens each": plan.each,
        "GB": {name: round(value / 1e9, 3) for name, value in plan.memory().items()},
        "GB sent an update": {name: round(value / 1e9, 3) for name, value in plan.sent().items()},
        "seconds": {name: round(value, 3) for name, value in plan.seconds().items()},
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
