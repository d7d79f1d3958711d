import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest

from sgld.config import EngineConfig
from sgld.models.backend import choose_backend
from sgld.models.describe import describe
from sgld.models.load import load
from sgld.models.plan import plan
from sgld.models.resolve import INDEX_FILE
from sgld.models.verdicts import Kept, VerdictFile

pytestmark = pytest.mark.usefixtures("threads_as_before")


@pytest.mark.parametrize(
    ("asked", "class_name", "modes", "because"),
    [
        ("auto", "FluxPipeline", {"transformer": "merge", "vae": "interleave"}, None),
        ("auto", "FluxPipeline", {"transformer": "merge", "vae": "exclusive"}, "was seen to change vae while it runs"),
        ("auto", "StableDiffusionAttendAndExcitePipeline", {}, "needs gradients"),
        ("sglang", "FluxPipeline", {"vae": "exclusive"}, None),
        ("sgld", "StableDiffusionAttendAndExcitePipeline", {}, None),
        ("diffusers", "FluxPipeline", {}, "asked for"),
    ],
)
def test_backend_is_what_was_asked_for_or_what_suits(
    asked: Literal["auto", "sglang", "sgld", "diffusers"], class_name: str, modes: dict[str, str], because: str | None
) -> None:
    chosen = choose_backend(asked, [class_name], modes)
    assert chosen.is_whole == (because is not None)
    assert because is None or because in (chosen.note or "")


def test_backend_is_decided_from_what_was_learned_and_told(sdxl_folder: Path, tmp_path: Path) -> None:
    def configured(**chosen: Any) -> EngineConfig:
        return EngineConfig(model_path=str(sdxl_folder), device="cpu", num_cpu_threads=1, **chosen)

    planned = plan(configured())
    assert not planned.backend.is_whole
    VerdictFile(planned.source, planned.index, planned.components).write(Kept(modes={"unet": "exclusive"}))
    model = load(configured())
    said = "backend diffusers (the pipeline was seen to change unet while it runs): requests run whole, one at a time"
    assert model.info().is_whole
    assert model.decisions["model"] == describe(configured()).decisions["model"] == said
    assert not load(configured(backend="sglang")).is_whole


def test_index_with_a_class_that_needs_gradients(sdxl_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(sdxl_folder / INDEX_FILE, folder)
    index = json.loads((folder / INDEX_FILE).read_text())
    named = index | {"_class_name": "StableDiffusionAttendAndExcitePipeline"}
    (folder / INDEX_FILE).write_text(json.dumps(named))
    assert plan(EngineConfig(model_path=str(folder), device="cpu")).backend.is_whole
