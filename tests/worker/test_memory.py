"""What an executor learned, kept between starts."""

from pathlib import Path

import pytest
import torch

from sgld.models.resolve import model_index, resolve
from sgld.models.verdicts import VerdictFile
from sgld.worker.axes import Batched, CallAxes, Mask
from sgld.worker.memory import Memory
from sgld.worker.recent import Recent
from sgld.worker.verdicts import Proof, Verdicts

KEY = ("transformer", "forward", "hidden_states:T3")
AXES = CallAxes(
    {(1, "hidden_states"): Batched(0, 2), (1, "rows"): Batched(None, 1), (1, "text"): Batched(0, 1)},
    {(0,): Batched(1, 2)},
    {(1, "text"): 1},
    {(1, "mask"): Mask((1, "text"), torch.int64)},
)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VerdictFile:
    monkeypatch.setenv("SGLANG_DIFFUSION_CACHE_ROOT", str(tmp_path))
    source = resolve("sgld/tiny-image")
    return VerdictFile(source, model_index(source))


def test_next_start_knows_axes_and_modes(file: VerdictFile) -> None:
    Memory(file).keep(Verdicts(axes={KEY: AXES}, modes={"transformer": "merge"}, proved=Recent(key=Proof(set()))))
    recalled = Memory(file).recall()
    assert recalled.axes == {KEY: AXES}
    assert recalled.modes == {"transformer": "merge"}


def test_proofs_are_made_anew(file: VerdictFile) -> None:
    Memory(file).keep(Verdicts(axes={KEY: AXES}, proved=Recent(key=Proof(set())), refused=Recent(other="it differs")))
    recalled = Memory(file).recall()
    assert not recalled.proved
    assert not recalled.refused


def test_axes_without_results_are_not_kept(file: VerdictFile) -> None:
    Memory(file).keep(Verdicts(axes={KEY: CallAxes(AXES.arguments, None)}, modes={"transformer": "merge"}))
    assert not Memory(file).recall().axes


def test_nothing_is_written_without_news(file: VerdictFile, tmp_path: Path) -> None:
    Memory(file).keep(Verdicts())
    assert not list(tmp_path.rglob("*.json"))


def test_pipeline_of_the_caller_has_no_file() -> None:
    memory = Memory(None)
    memory.keep(Verdicts(axes={KEY: AXES}))
    assert not memory.recall().axes
