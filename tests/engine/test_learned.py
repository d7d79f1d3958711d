from collections import Counter
from pathlib import Path

import msgspec
import pytest

from engine.ranks import MODEL
from sgld.config import EngineConfig, ParallelConfig
from sgld.engine.cost import MAX_KEYS, CostModel, LearnedTime
from sgld.engine.demand import MAX_PROFILES, Demand, Profile, Profiles
from sgld.engine.learned import Learned, LearnedFile
from sgld.engine.memory import Memory

TIMES: list[LearnedTime] = [
    ("transformer.forward(64x8)", 1, "eager", 0.25),
    ("transformer.forward(64x8)", 2, "graph", 0.3),
]
PROFILES = [Profile("a", 100.0, ((("denoise", "transformer.forward(64x8)", 1), 20),)), Profile("b", None, ())]
CONFIG = EngineConfig()
KEPT = msgspec.structs.replace(MODEL, identity="1234", device_name="NVIDIA H200")


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SGLANG_DIFFUSION_CACHE_ROOT", str(tmp_path))
    return tmp_path / "learned"


def test_what_is_written_is_read_back(folder: Path) -> None:
    LearnedFile(KEPT, CONFIG).write(TIMES, PROFILES)
    learned = LearnedFile(KEPT, CONFIG).read()
    assert (list(learned.times), list(learned.profiles)) == (TIMES, PROFILES)
    assert [path.suffix for path in folder.glob("[!.]*")] == [".json"]


@pytest.mark.parametrize(
    "change", [{"identity": "5"}, {"device_name": "another GPU"}, {"precisions": {"transformer": "float16"}}]
)
def test_other_models_and_devices_have_other_files(change: dict[str, object]) -> None:
    LearnedFile(KEPT, CONFIG).write(TIMES, PROFILES)
    assert LearnedFile(msgspec.structs.replace(KEPT, **change), CONFIG).read() == Learned()


def test_options_that_forwards_depend_on_have_other_files() -> None:
    LearnedFile(KEPT, CONFIG).write(TIMES, PROFILES)
    assert LearnedFile(KEPT, EngineConfig(enable_torch_compile=True)).read() == Learned()
    several = EngineConfig(parallel=ParallelConfig(num_gpus=2))
    assert LearnedFile(KEPT, several).read() == Learned()
    LearnedFile(KEPT, several).write(TIMES, PROFILES)
    assert LearnedFile(KEPT, EngineConfig(parallel=ParallelConfig(ulysses_degree=2))).read() != Learned()
    assert LearnedFile(KEPT, EngineConfig(parallel=ParallelConfig(num_gpus=4))).read() == Learned()
    copies = EngineConfig(parallel=ParallelConfig(dp_size=2))
    assert LearnedFile(KEPT, copies).read() == Learned()  # which share the cores
    assert LearnedFile(KEPT, EngineConfig(max_batch_size=3)).read() != Learned()
    on_gpu = msgspec.structs.replace(KEPT, device="cuda:0")
    LearnedFile(on_gpu, CONFIG).write(TIMES, PROFILES)
    assert LearnedFile(on_gpu, copies).read() != Learned()


def test_what_others_wrote_meanwhile_stays_but_for_what_is_news() -> None:
    first = LearnedFile(KEPT, CONFIG)
    first.write(TIMES, PROFILES, ("64x64",))
    second = LearnedFile(KEPT, CONFIG)
    second.read()
    faster: LearnedTime = (*TIMES[0][:3], 0.125)
    first.write([faster, TIMES[1]], PROFILES, ("64x64",))
    other: LearnedTime = ("vae.decode(8)", 1, "eager", 0.5)
    second.write([*TIMES, other], [Profile("c", 1.0, ())], ("32x32",))
    learned = first.read()
    assert list(learned.times) == [faster, TIMES[1], other]
    assert [profile.like for profile in learned.profiles] == ["a", "b", "c"]
    assert learned.calibrated == ("64x64", "32x32")


def test_what_was_used_last_is_kept_and_a_file_does_not_grow() -> None:
    times: list[LearnedTime] = [(f"vae.decode({n}x8)", 1, "eager", 0.5) for n in range(MAX_KEYS + 8)]
    profiles = [Profile(str(n), 1.0, ()) for n in range(MAX_PROFILES + 8)]
    file = LearnedFile(KEPT, CONFIG)
    file.write(times[:MAX_KEYS], profiles[:MAX_PROFILES])
    used_again: LearnedTime = (*times[0][:3], 0.25)
    now = [*times[9:], used_again], [*profiles[9:], Profile("0", 2.0, ())]
    file.write(*now)
    learned = file.read()
    assert (list(learned.times), list(learned.profiles)) == now


def test_what_could_not_be_written_is_written_later(folder: Path) -> None:
    file = LearnedFile(KEPT, CONFIG)
    file.write(TIMES[:1], [])
    (lock := folder / ".lock").unlink()
    lock.mkdir()
    file.write(TIMES, PROFILES)
    lock.rmdir()
    file.write(TIMES, PROFILES)
    assert (list(file.read().times), list(file.read().profiles)) == (TIMES, PROFILES)


async def test_what_another_kind_of_request_takes_is_kept_though_no_time_is_news() -> None:
    cost = CostModel()
    profiles = Profiles(cost)
    memory = Memory(CONFIG, cost, profiles)
    await memory.recall(KEPT)
    cost.observe("transformer.forward(64x8)", 1, 0.25)
    await memory.keep()
    profiles.learn(Demand(like="longer"), Counter({("denoise", "transformer.forward(64x8)", 1): 40}))
    await memory.keep()
    assert [profile.like for profile in LearnedFile(KEPT, CONFIG).read().profiles] == ["longer"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"format": 0, "times": [["c", 1, "eager", 0.5]]}',
        b'{"format": 2, "times": [["c", 1, "eager", -0.5]]}',
        b'{"format": 2, "times": [["c", 0, "eager", 0.5]]}',
        b'{"format": 2, "times": [["c", "one", "eager", 0.5]]}',
        b'{"format": 2, "profiles": [["a", 1.0, [[["denoise", "c", 1], -3]]]]}',
        b'{"format": 2, "profiles": [["a", 0.0, []]]}',
    ],
)
def test_broken_and_foreign_files_are_like_none(folder: Path, content: bytes) -> None:
    file = LearnedFile(KEPT, CONFIG)
    file.write(TIMES, PROFILES)
    next(folder.glob("*.json")).write_bytes(content)
    assert file.read() == Learned()
    file.write(TIMES, PROFILES)
    assert file.read() != Learned()


def test_folder_that_cannot_be_written_to_is_no_error(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.write_text("a file is in its place")
    LearnedFile(KEPT, CONFIG).write(TIMES, PROFILES)
    assert "can't be kept" in caplog.text
    assert LearnedFile(KEPT, CONFIG).read() == Learned()
