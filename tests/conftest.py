"""What tests of several packages share, and the order of files."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from storage.s3_server import S3Server

# Before torch is imported, also by processes that tests start: there is one core for each of the two that run tests,
# and threads that wait for each other take it from both.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, so that no worker waits for the other's last one; then those of many tests."""
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.get_closest_marker("long") is None, -sizes[item.path], item.path))


@pytest.fixture(autouse=True)
def _recursion_limit() -> Iterator[None]:
    """Torch's compiler sets another one, and what is nested too deeply would be less so for tests that come later."""
    before = sys.getrecursionlimit()
    yield
    sys.setrecursionlimit(before)


@pytest.fixture(scope="session")
def _s3_server() -> "Iterator[S3Server]":
    from storage.s3_server import S3Server  # takes a second, which most tests don't need

    with S3Server() as server:
        yield server


@pytest.fixture
def bucket(_s3_server: "S3Server") -> "S3Server":
    """A server with a bucket that is empty; modules say how it is reached."""
    _s3_server.new_bucket()
    return _s3_server


@pytest.fixture
def one_cpu_thread() -> Iterator[None]:
    """Tasks have one CPU thread, and bits depend on the number of threads that sum."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
