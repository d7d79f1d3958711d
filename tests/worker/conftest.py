"""One CPU thread: the modules are so small that a second one only waits, and bits don't depend on the machine."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-table", action="store_true", help="write docs/pipelines.md from the parity matrix")


@pytest.fixture(autouse=True)
def _one_cpu_thread(one_cpu_thread: None) -> None:
    """For all tests of these modules."""
