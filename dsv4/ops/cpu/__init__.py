"""The ops in C++ (src/): values only, for machines with AVX2 or more; what they do not serve runs in `blocked`.

Importing raises ImportError with the reason where the library was not built or cannot run (library.py).
"""

from dsv4.ops.cpu import experts as _experts
from dsv4.ops.cpu import linear as _linear
from dsv4.ops.cpu import project as _project
from dsv4.ops.cpu.experts import experts, mlp
from dsv4.ops.cpu.linear import linear
from dsv4.ops.cpu.project import compressor_rows, project_in, project_out
from dsv4.ops.limits import Limits

__all__ = ["LIMITS", "compressor_rows", "experts", "linear", "mlp", "project_in", "project_out"]

LIMITS: dict[str, Limits] = {**_experts.LIMITS, **_linear.LIMITS, **_project.LIMITS}
