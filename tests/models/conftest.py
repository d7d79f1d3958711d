"""A tiny model on disk."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import FluxAutoBlocks
from own_code import save_tiny_autoencoder
from pipelines import build


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_DIFFUSION_CACHE_ROOT", str(tmp_path / "cache"))


@pytest.fixture
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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
