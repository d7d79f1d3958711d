"""One CPU thread: the modules are so small that a second one only waits, and bits don't depend on the machine."""

from collections.abc import Iterator

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-table", action="store_true", help="write docs/pipelines.md from the parity matrix")


@pytest.fixture(autouse=True)
def _one_cpu_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
