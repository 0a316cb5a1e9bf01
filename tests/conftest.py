"""What every test stands on: one thread, fixed seeds, poisoned fresh memory, warnings as errors, no network.

Fresh memory is filled with NaN (the largest integer, for integers), so that a kernel which reads what it
never wrote fails here instead of working by luck. Hypothesis draws the same examples on every run.
"""

import os
import random
import socket
from collections.abc import Iterator

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matmuls, should CUDA be used
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True, warn_only=True)  # what switches the next line on
torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
assert torch.empty(3).isnan().all(), "this torch does not poison fresh memory: the tests would prove less"

hypothesis.settings.register_profile("house", derandomize=True, deadline=None, max_examples=50, database=None)
hypothesis.settings.load_profile("house")


@pytest.fixture(autouse=True)
def same_seed() -> None:
    """Every test starts from the same random state, whatever ran before it and wherever."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A test may ask for more; the next one has one again."""
    yield
    torch.set_num_threads(1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What uses `isa` runs with every set of instructions that the machine has."""
    if "isa" in metafunc.fixturenames:
        from dsv4.ops.cpu import library  # here: the other tests run on a machine without the C++ ops

        metafunc.parametrize("isa", library.AVAILABLE, indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instructions that the C++ ops use in this test, by name."""
    from dsv4.ops.cpu import library

    with library.using_isa(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that leaves the machine is an error, so a download cannot hide in a test."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address):
        outside = self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost")
        assert not outside, f"a test tried to reach {address}: tests run without network"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--differences", action="store_true", help="print the largest difference of each test (with -n 0)")


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not config.getoption("--differences"):
        return
    from differences import LARGEST

    terminalreporter.section("largest absolute differences")
    for test, largest in LARGEST.items():
        terminalreporter.write_line(f"{largest:9.2e}  {test}")
