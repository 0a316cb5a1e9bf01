"""V4's optimiser: Muon for the matrices and AdamW for the rest, in one class; and the clipping before it.

Who goes where (paper section 2.4; its silences are filled as said here):
  muon         all matrices but these: attention, compressors, indexer, router, experts, MTP, mHC `*_fn`
  adamw_decay  the embedding and the head
  adamw_plain  RMSNorm weights and mHC `*_base` and `*_scale`, which the paper gives to AdamW; and attention
               sinks and compressor `ape`, of which it says nothing: neither is a matrix that maps vectors
The paper states one weight decay and not whether it spares anything. Here it applies to matrices only,
because a gain pulled to zero mutes its channel, and a sink or a bias pulled to zero takes a side.

What Muon orthogonalises are the matrices of the paper's equations, one by one, however they are stored: each
expert's gate, up and down; the g groups of `wo_a`; W_pre, W_post and W_res inside an mHC `fn`; the two series
a and b inside a CSA compressor's `wkv` and `wgate`; W^DKV and W^KR inside V3.2's `wkv_a`. All heads of `wq_b` are one
matrix there, W^UQ; with `heads_apart` each is one of its own.

The learning-rate course belongs to `schedule.py`, losses and loops to `trainer.py`. Hyper-parameters belong
to the run's configuration: the state is tensors only, by parameter name, so that safetensors can hold it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from dsv4.config import AnyConfig, ModelConfig, V32Config
from dsv4.errors import UserError
from dsv4.model.init import fill
from dsv4.ops import whole_updates
from dsv4.ops.newton_schulz import HYBRID, JORDAN, POLAR_EXPRESS, newton_schulz, polar

Kind = Literal["muon", "adamw_decay", "adamw_plain"]
Stack = tuple[int, int, int]  # count, a, b: that many matrices [a, b], stored one after the other

UPDATE_RMS = 0.18  # gamma of the paper: RMS of Muon's update per unit of learning rate, close to AdamW's
POLYNOMIALS = {"hybrid10": HYBRID, "jordan5": JORDAN, "polar_express": POLAR_EXPRESS}
ORTHOGONALISERS: dict[str, Callable[..., Tensor]] = {
    **{name: partial(newton_schulz, steps=steps) for name, steps in POLYNOMIALS.items()},
    "svd": polar,
}


def kind_of(name: str, parameter: Tensor) -> Kind:
    """Which of the three groups a parameter belongs to, by its published name and its number of dims."""
    if name in ("embed.weight", "head.weight"):
        return "adamw_decay"
    # anchor_score is a vector, held as a matrix of one row
    plain = parameter.ndim < 2 or name.endswith((".ape", ".anchor_score.weight"))
    return "adamw_plain" if plain else "muon"


def logical_matrices(name: str, shape: torch.Size, config: AnyConfig, *, heads_apart: bool = False) -> list[Stack]:
    """The paper's matrices inside one stored parameter of at least two dims, as stacks in storage order.

    heads_apart: every head of V4's query projection `wq_b`, the indexer's too, is a matrix of its own.
    """
    *lead, rows, columns = shape
    if lead:  # experts: w13 [E, 2, I, D], w2 [E, D, I]
        return [(math.prod(lead), rows, columns)]
    heights = _heights(name, rows, config, heads_apart)
    assert sum(heights) == rows, f"{name}: {rows} rows do not divide into {heights}"
    if len(set(heights)) == 1:
        return [(len(heights), heights[0], columns)]
    return [(1, height, columns) for height in heights]


def _heights(name: str, rows: int, config: AnyConfig, heads_apart: bool) -> list[int]:
    """The heights of the matrices that stand above each other in a stored one of `rows` rows."""
    if isinstance(config, V32Config) and name.endswith(".wkv_a.weight"):
        return [config.kv_lora_rank, config.qk_rope_head_dim]  # W^DKV and W^KR
    if not isinstance(config, ModelConfig):
        return [rows]
    if name.endswith((".hc_attn_fn", ".hc_ffn_fn")):
        n = config.hc_mult
        return [n, n, n * n]  # pre, post, comb
    if heads_apart and name.endswith(".wq_b.weight"):
        width = config.index_head_dim if ".indexer." in name else config.head_dim
        return [width] * (rows // width)
    if name.endswith(".wo_a.weight"):
        return [rows // config.o_groups] * config.o_groups
    if name.endswith((".compressor.wkv.weight", ".compressor.wgate.weight")):
        width = config.index_head_dim if ".indexer." in name else config.head_dim
        return [width] * (rows // width)  # series a and b where groups overlap, else the only series
    return [rows]


def logical_view(tensor: Tensor, stacks: list[Stack]) -> list[Tensor]:
    """`tensor` seen as its logical matrices, one [count, a, b] per run; views if `tensor` is contiguous."""
    pieces = tensor.reshape(-1).split([math.prod(stack) for stack in stacks])
    return [piece.view(stack) for piece, stack in zip(pieces, stacks, strict=True)]


def parameter_groups(
    named_parameters: Iterable[tuple[str, Tensor]],
    config: AnyConfig,
    *,
    weight_decay: float = 0.1,
    heads_apart: bool = False,
) -> list[dict[str, Any]]:
    """The three groups `HybridOptimizer` wants, each trainable parameter in exactly one of them.

    A group is a dict with `kind`, `names`, `params`, `weight_decay`, and for Muon `matrices`, the logical
    matrices of each parameter. A group may be empty.
    """
    members: dict[Kind, list[tuple[str, Tensor]]] = {"muon": [], "adamw_decay": [], "adamw_plain": []}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            members[kind_of(name, parameter)].append((name, parameter))
    groups: list[dict[str, Any]] = [
        {
            "kind": kind,
            "names": [name for name, _ in pairs],
            "params": [parameter for _, parameter in pairs],
            "weight_decay": 0.0 if kind == "adamw_plain" else weight_decay,
        }
        for kind, pairs in members.items()
    ]
    groups[0]["matrices"] = [
        logical_matrices(name, p.shape, config, heads_apart=heads_apart) for name, p in members["muon"]
    ]
    return groups


class HybridOptimizer(torch.optim.Optimizer):
    """Muon and AdamW at one learning rate: `HybridOptimizer(parameter_groups(named, config), lr=2.7e-4)`.

    Muon (section 2.4), for each logical matrix W [n, m]:
        M <- mu M + G;  O = orthogonalise(mu M + G) sqrt(max(n, m)) 0.18;  W <- W (1 - lr wd) - lr O
    so that the update's RMS is 0.18 lr for a matrix of full rank. On a processor C++ does that for all matrices in one
    call (ops/cpu/newton_schulz.py); what it does not serve goes through torch, shape by shape, to the same but for
    rounding. AdamW is that of Loshchilov and Hutter.

    Sharded parameters (DTensors, as fully_shard makes them) take the same steps: each matrix is orthogonalised whole by
    one process, which the others send their parts (parallel/ownership.py).

    Parameters without a gradient are left alone, decay included. Momenta are kept in fp32 whatever the
    parameters are. A step is deterministic: same state and gradients, same bits.

    groups: what `parameter_groups` returns. lr: peak or current rate; `set_lr` changes it. momentum: mu.
    ns: `hybrid10` (V4), `jordan5` (the usual Muon), `polar_express` or `svd` (exact), for ablations. ns_dtype: its
    arithmetic, fp32 or bf16. chunk_elements: torch gets same-shaped matrices together, at most this many numbers at
    a time (the step needs a handful of such buffers), or one matrix where a single one is larger; default: what stays
    in a processor's cache, or fills a GPU. It changes no bit.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-20,
        ns: str = "hybrid10",
        ns_dtype: torch.dtype = torch.float32,
        chunk_elements: int | None = None,
    ) -> None:
        if ns not in ORTHOGONALISERS:
            raise UserError(f"unknown orthogonalisation {ns!r}: choose one of {', '.join(ORTHOGONALISERS)}")
        for label, value in {"momentum": momentum, "beta1": betas[0], "beta2": betas[1]}.items():
            if not 0 <= value < 1:
                raise UserError(f"{label} is {value}: choose it at least 0 and below 1")
        self._orthogonalise = partial(ORTHOGONALISERS[ns], dtype=ns_dtype)
        self._steps, self._ns_dtype = POLYNOMIALS.get(ns), ns_dtype
        self._chunk_elements = chunk_elements
        super().__init__(groups, {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps})
        self.set_lr(lr)

    def set_lr(self, lr: float) -> None:
        """The learning rate of every group from the next step on."""
        if not (math.isfinite(lr) and lr >= 0):
            raise UserError(f"the learning rate is {lr}: choose a finite number of at least 0")
        for group in self.param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. Closures are not supported."""
        assert closure is None, "HybridOptimizer takes no closure"
        for group in self.param_groups:
            if group["kind"] == "muon":
                self._muon(group)
            else:
                self._adamw(group)

    def _muon(self, group: dict[str, Any]) -> None:
        lr, mu, keep = group["lr"], group["momentum"], 1 - group["lr"] * group["weight_decay"]
        piles: dict[tuple, list[tuple[Tensor, ...]]] = {}  # same-shaped (weight, momentum, gradient)
        sharded: list[tuple[Any, ...]] = []
        whole: list[tuple[Any, ...]] = []  # those that C++ takes, all in one call
        update: Any = None
        for parameter, stacks in zip(group["params"], group["matrices"], strict=True):
            if parameter.grad is None:
                continue
            assert parameter.is_contiguous(), "the views below must write into the parameter"
            momentum = self._state(group, parameter)["momentum"]
            plain = self._steps is None or is_sharded(parameter)
            fast = None if plain else whole_updates(parameter.device)
            if fast is not None and fast.update_served(parameter, parameter.grad, stacks, self._ns_dtype):
                whole.append((parameter, momentum, parameter.grad, stacks))
                update = fast.muon_update
                continue
            momentum.mul_(mu).add_(parameter.grad)
            parameter.mul_(keep)
            if is_sharded(parameter):
                sharded.append((parameter, momentum, parameter.grad, stacks))
                continue
            views = (logical_view(t, stacks) for t in (parameter, momentum, parameter.grad))
            for weight, m, grad in zip(*views, strict=True):
                piles.setdefault((weight.device, *weight.shape[1:]), []).append((weight, m, grad))
        if whole:
            update(whole, mu, keep, -lr * UPDATE_RMS, self._steps, self._ns_dtype)
        if sharded:
            from dsv4.train.parallel import ownership

            held = [ownership.Held(*item) for item in sharded]
            numbers = self._numbers_at_a_time(held[0].parameter.device)
            ownership.step(held, mu, self._orthogonalise, -lr * UPDATE_RMS, numbers)
        for (device, a, b), pile in piles.items():
            for chunk in _chunks(pile, max(1, self._numbers_at_a_time(device) // (a * b))):
                ahead = torch.cat([torch.add(grad, m, alpha=mu) for _, m, grad in chunk])  # Nesterov
                updates = self._orthogonalise(ahead).split([len(weight) for weight, _, _ in chunk])
                for (weight, _, _), update in zip(chunk, updates, strict=True):
                    weight.add_(update, alpha=-lr * UPDATE_RMS * math.sqrt(max(a, b)))

    def _numbers_at_a_time(self, device: torch.device) -> int:
        """Of matrices that are orthogonalised together: what stays in a processor's cache, or fills a GPU."""
        return self._chunk_elements or (1 << 19 if device.type == "cpu" else 1 << 25)

    def _adamw(self, group: dict[str, Any]) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self._state(group, parameter)
            mean, square, steps = state["exp_avg"], state["exp_avg_sq"], state["steps"]
            grad = parameter.grad.to(mean.dtype)
            steps += 1
            mean.lerp_(grad, 1 - beta1)
            square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            unbias_mean, unbias_square = 1 - beta1 ** steps.item(), 1 - beta2 ** steps.item()
            scale = (square.sqrt() / math.sqrt(unbias_square)).add_(group["eps"])
            parameter.mul_(1 - lr * group["weight_decay"])
            parameter.add_(mean / scale, alpha=-lr / unbias_mean)

    def _state(self, group: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
        """This parameter's state, made of zeros when first asked for."""
        state = self.state[parameter]
        if not state:
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            slots = ("momentum",) if group["kind"] == "muon" else ("exp_avg", "exp_avg_sq")
            for slot in slots:
                state[slot] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            if group["kind"] != "muon":
                state["steps"] = torch.zeros((), dtype=torch.int64)  # on the CPU: read at every step
        return state

    def state_dict(self) -> dict[str, Tensor]:  # type: ignore[override]
        """The whole state as `<parameter name>.<slot>` -> tensor (not copied), zeros where no gradient came
        yet.

        Slots: `momentum` for Muon; `exp_avg`, `exp_avg_sq` and `steps` (int64, no dims) for AdamW.
        """
        return {
            f"{name}.{slot}": tensor
            for group in self.param_groups
            for name, parameter in zip(group["names"], group["params"], strict=True)
            for slot, tensor in self._state(group, parameter).items()
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:  # type: ignore[override]
        """Take over a state saved by `state_dict`; the next step is then that of the saved run, bit for bit.

        Strict: every tensor is used exactly once. Raises a UserError, before anything changes, on missing or
        unknown names and on another shape or dtype.
        """
        own = self.state_dict()
        missing, unknown = own.keys() - state_dict.keys(), state_dict.keys() - own.keys()
        for problem, names in {"lacks": missing, "also has": unknown}.items():
            if names:
                raise UserError(
                    f"the optimiser state {problem} {min(names)!r} ({len(names)} such names): "
                    "it belongs to another model, so resume with the configuration it was saved with"
                )
        for name, tensor in own.items():
            given = state_dict[name]
            if given.shape != tensor.shape or given.dtype != tensor.dtype:
                raise UserError(
                    f"optimiser state {name!r} is {given.dtype} {list(given.shape)} but this model needs "
                    f"{tensor.dtype} {list(tensor.shape)}: resume with the configuration it was saved with"
                )
        for name, tensor in own.items():
            fill(tensor, state_dict[name])

    def __repr__(self) -> str:
        sizes = ", ".join(f"{group['kind']}: {len(group['params'])}" for group in self.param_groups)
        return f"HybridOptimizer({sizes})"


def _chunks(pile: list[tuple[Tensor, ...]], limit: int) -> Iterator[list[tuple[Tensor, ...]]]:
    """The pile's [count, a, b] views in order, cut and gathered into chunks of at most `limit` matrices."""
    chunk: list[tuple[Tensor, ...]] = []
    room = limit
    for views in pile:
        start, count = 0, len(views[0])
        while start < count:
            take = min(room, count - start)
            chunk.append(tuple(view[start : start + take] for view in views))
            start, room = start + take, room - take
            if not room:
                yield chunk
                chunk, room = [], limit
    if chunk:
        yield chunk


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which each process holds a part (by its looks: the import takes long)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its parts."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _norms(grads: list[Tensor], order: float) -> Tensor:
    """The norm of each gradient, in fp32 at least; all are sharded or none is."""
    if is_sharded(grads[0]):
        from dsv4.train.parallel.norms import sharded_norms

        return sharded_norms(grads, order)  # type: ignore[arg-type]
    wide = (torch.promote_types(g.dtype, torch.float32) for g in grads)
    return torch.stack([torch.linalg.vector_norm(g, order, dtype=d) for g, d in zip(grads, wide, strict=True)])


def drop_zero_gradients(parameters: Iterable[Tensor]) -> None:
    """Take away gradients that are nothing but zeros: a parameter to which nothing flowed in an update, such as a
    compressor none of whose groups closed, is left alone by the optimiser, momentum and decay included.

    That it has a tensor until then is for the processes that share a model: all of them come to the same decision.
    """
    held = [p for p in parameters if p.grad is not None]
    if held:
        largest = _norms([p.grad for p in held if p.grad is not None], math.inf)
        for p, size in zip(held, largest.tolist(), strict=True):
            if size == 0:
                p.grad = None


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Scale all gradients together to a global 2-norm of at most `max_norm`; returns the norm before that.

    The norm is accumulated in fp32 whatever the gradients are. If it is not finite the gradients stay as they
    are, and the caller, who sees that by `math.isfinite`, skips the step or stops. `math.inf` only measures.
    """
    if not max_norm > 0:
        raise UserError(f"the gradient clip is {max_norm}: choose a positive norm, or inf for no clipping")
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return 0.0
    norm = torch.linalg.vector_norm(_norms(grads, 2)).item()
    if math.isfinite(norm) and norm > max_norm:
        for grad in grads:
            grad.mul_(max_norm / norm)
    return norm
