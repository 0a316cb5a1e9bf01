"""The ops in C++ (src/): values only, for machines with AVX2 or more; what they do not serve runs in `blocked`.

Importing raises ImportError with the reason where the library was not built or cannot run (library.py).
"""

from dsv4.ops.cpu import hyper as _hyper
from dsv4.ops.cpu import linear as _linear
from dsv4.ops.cpu.hyper import head_collapse, hyper_enter, hyper_maps, hyper_write, sinkhorn
from dsv4.ops.cpu.linear import linear
from dsv4.ops.limits import Limits

__all__ = ["LIMITS", "head_collapse", "hyper_enter", "hyper_maps", "hyper_write", "linear", "sinkhorn"]

LIMITS: dict[str, Limits] = {**_linear.LIMITS, **_hyper.LIMITS}
