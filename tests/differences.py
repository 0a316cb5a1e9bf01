"""The largest difference that every test measured, for `pytest --differences`."""

import os

from torch import Tensor

from dsv4.measure.rows import difference

LARGEST: dict[str, float] = {}  # by test function


def differ(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; infinite for different shapes or anything that is not a number."""
    largest = difference(a, b)["max_abs"]
    test = os.environ.get("PYTEST_CURRENT_TEST", "").partition("[")[0].partition(" ")[0]
    LARGEST[test] = max(largest, LARGEST.get(test, 0.0))
    return largest
