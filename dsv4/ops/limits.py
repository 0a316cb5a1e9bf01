"""What a form of an op serves, in the words in which a refusal is said."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4.ops.formats import PackedRows
from dsv4.ops.weights import PackedMatrix

_PACKED = (PackedRows, PackedMatrix)


@dataclass(frozen=True)
class Limits:
    """The calls that a form serves; None allows everything. No form with limits rounds what a matrix multiplies
    (PackedMatrix.rounds_inputs): the reference does.

    devices: types of device. dtypes: of floating-point tensors. gradient, packed: False where the form has no backward
    pass, or reads no packed rows and weights. also: a function of the op's arguments that gives "" or a further reason,
    such as a shape.
    """

    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    gradient: bool = True
    packed: bool = True
    also: Callable[..., str] | None = None

    def refuses(self, *args: Any) -> str:
        """ "" or why a call with these arguments is not served."""
        return self.refuses_kind(*args) or ("" if self.also is None else self.also(*args))

    def refuses_kind(self, *args: Any) -> str:
        """ "" or why arguments of these devices and kinds are not served, whatever their shapes."""
        devices, dtypes, cpu = self.devices, self.dtypes, self.devices == ("cpu",)
        no_gradient = not self.gradient and torch.is_grad_enabled()
        for arg in args:  # at every call of every op: nothing is looked up that need not be
            if not isinstance(arg, Tensor):
                if not self.packed and isinstance(arg, _PACKED):
                    return "packed rows" if isinstance(arg, PackedRows) else "a packed weight"
                if isinstance(arg, PackedMatrix) and arg.rounds_inputs:
                    return "a weight whose inputs are rounded"
                continue
            if devices is not None and not (cpu and arg.is_cpu) and arg.device.type not in devices:
                return f"device {arg.device.type}"
            if dtypes is not None and arg.dtype not in dtypes and arg.is_floating_point():
                return f"dtype {str(arg.dtype).removeprefix('torch.')}"
            if no_gradient and arg.requires_grad:
                return "a gradient is needed"
        return ""
