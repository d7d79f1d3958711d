"""A tiny model on disk."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from diffusers import FluxAutoBlocks
from diffusers.models import attention_dispatch
from own_code import save_tiny_autoencoder
from pipelines import build

from sgld.models.exchange import Messages
from sgld.models.shared_attention import prepare
from sgld.models.tokens import TokenRanks


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_DIFFUSION_CACHE_ROOT", str(tmp_path / "cache"))


@pytest.fixture
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def shares_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusers asks for what ranks share, as in a rank, while the test runs."""
    for name in ("_templated_context_parallel_attention", "_native_attention_forward_op"):
        monkeypatch.setattr(attention_dispatch, name, getattr(attention_dispatch, name))
    prepare()


@pytest.fixture
def one_of_four(shares_attention: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TokenRanks]:
    """The first of four ranks, of which the others send nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    group = dist.group.WORLD
    assert group is not None
    try:
        yield TokenRanks(group, None, Messages(group.group_name, 0, 4), 1, 4, 0)
    finally:
        dist.destroy_process_group()
        torch.compiler.reset()


def saved(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny pipeline; tests that change one change a copy."""
    folder = tmp_path_factory.mktemp(name)
    build(name)[0].save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("sdxl", tmp_path_factory)


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("wan", tmp_path_factory)


@pytest.fixture(scope="session")
def modular_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A modular pipeline of the components of another one."""
    folder = tmp_path_factory.mktemp("modular")
    pipeline = FluxAutoBlocks().init_pipeline()
    parts = build("flux")[0].components
    pipeline.update_components(**{name: part for name, part in parts.items() if name in pipeline.components})
    pipeline.save_pretrained(str(folder), overwrite_modular_index=True)
    return folder


@pytest.fixture(scope="session")
def flux2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("flux2", tmp_path_factory)


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("flux", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A component whose class is code of its own, as fal/FLUX.2-Tiny-AutoEncoder."""
    return save_tiny_autoencoder(tmp_path_factory.mktemp("tiny_autoencoder"))
