"""How many processes do what: `parallel.dp`, `parallel.cp`, `parallel.ep`, judged before anything is made."""

from dataclasses import dataclass

from dsv4.config import AnyConfig, ModelConfig
from dsv4.errors import UserError


@dataclass(frozen=True)
class ParallelConfig:
    """dp * cp * ep processes share a run. cp of them read a row together, each a contiguous part of it; ep of them hold
    the experts together, each some of them, and otherwise have rows of their own; dp such groups (0: as many as there
    are processes for) have rows of their own too. All other parameters lie in equal shares with all processes."""

    dp: int = 0
    cp: int = 1
    ep: int = 1

    def check(self, model: AnyConfig) -> None:
        """UserError if a model cannot be shared so, whatever the number of processes."""
        for name, smallest in (("dp", 0), ("cp", 1), ("ep", 1)):
            value = getattr(self, name)
            if not smallest <= value <= 1 << 20:
                raise UserError(f"parallel.{name}={value} must be from {smallest} to {1 << 20} processes")
        if self.cp > 1 and not (isinstance(model, ModelConfig) and model.attention == "compressed"):
            raise UserError(
                f"parallel.cp={self.cp}: only V4's own attention can read a row in several processes; "
                "leave parallel.cp at 1, or train a V4 model"
            )
        if self.ep > 1:
            if not isinstance(model, ModelConfig):
                raise UserError(f"parallel.ep={self.ep}: only V4's experts can be shared: leave parallel.ep at 1")
            if model.n_routed_experts % self.ep:
                num = model.n_routed_experts
                raise UserError(
                    f"parallel.ep={self.ep} must divide model.n_routed_experts={num}: choose one of "
                    f"{', '.join(str(n) for n in range(1, num + 1) if num % n == 0)}"
                )

    def sizes(self, world: int) -> tuple[int, int, int]:
        """(dp, cp, ep) for `world` processes; UserError if they do not come out."""
        inner = self.cp * self.ep
        if world % inner:
            raise UserError(
                f"{world} processes cannot be cut into groups of parallel.cp={self.cp} x parallel.ep={self.ep} = "
                f"{inner}: start a multiple of {inner} (torchrun --nproc-per-node {inner * -(-world // inner)}), or "
                "change parallel.cp or parallel.ep"
            )
        if self.dp and self.dp * inner != world:
            raise UserError(
                f"parallel.dp={self.dp} x parallel.cp={self.cp} x parallel.ep={self.ep} = {self.dp * inner} must be "
                f"the number of processes, which is {world}: start {self.dp * inner}, or leave parallel.dp at 0"
            )
        return world // inner, self.cp, self.ep
