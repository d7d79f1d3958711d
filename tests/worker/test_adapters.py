"""Requests with different adapters share forwards, and get what diffusers and peft give each alone."""

import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models.adapters import as_diffusers, matrices
from pipelines import build

from sgld.errors import InvalidRequest
from sgld.messages import Pending, Start
from sgld.models.lora import Adaptable, Adapter, adaptable, read
from sgld.models.quantization import agreed
from sgld.models.quantized import quantize
from sgld.outcome import Outcome, Value
from sgld.sampling_params import LoraChoice, SamplingParams
from sgld.testing import run_together
from sgld.worker.adapters import Adapters, Source
from sgld.worker.admission import Admission
from sgld.worker.ahead import News
from sgld.worker.executor import Executor
from sgld.worker.filters import Filters
from sgld.worker.job import Job
from sgld.worker.session import Session
from sgld.worker.slots import Applied
from worker.requests import picture, request

# What request i has: an adapter, two at once, none, another one.
SETS = (("a",), ("b", "c"), (), ("c",))
SCALES = {"a": 0.8, "b": -0.5, "c": 1.3}
# Layers that some models call on the tokens of all requests, one behind the other.
BY_TOKEN = ("x_embedder", "cap_embedder")


def has_rows(name: str) -> bool:
    return not any(part in name for part in BY_TOKEN)


def written(pipeline: Any, folder: Path, only: Callable[[str], bool] = has_rows) -> dict[str, Path]:
    """Adapters of different ranks for all components."""
    made = {name: matrices(pipeline, seed, rank=2 + 3 * seed, size=0.05, only=only) for seed, name in enumerate("abc")}
    return {name: as_diffusers(folder / f"{name}.safetensors", layers) for name, layers in made.items()}


def choices_of(paths: dict[str, Path], names: Sequence[str]) -> list[LoraChoice]:
    return [LoraChoice(path=str(paths[name]), scale=SCALES[name]) for name in names]


def calls(name: str, kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """One prompt, so that what it encodes to would be reused if only the adapters didn't differ."""
    changed = {"prompt": "a red cat on the moon"}
    return [request(name, i, kwargs, num_inference_steps=3, **changed) for i in range(len(SETS))]


def with_peft(pipeline: Any, paths: dict[str, Path], call: dict[str, Any], names: Sequence[str]) -> torch.Tensor:
    """What diffusers makes of one request; the adapters are loaded once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, path in paths.items():
            if name not in {n for of in pipeline.get_list_adapters().values() for n in of}:
                pipeline.load_lora_weights(str(path), adapter_name=name)
    if not names:
        pipeline.disable_lora()
        return picture(pipeline(**call))
    pipeline.enable_lora()
    pipeline.set_adapters(list(names), [SCALES[name] for name in names])
    return picture(pipeline(**call))


@pytest.mark.parametrize("name", ["flux", "sd", "sdxl", "wan", "qwen_image", "z_image", "modular_flux"])
def test_requests_with_different_adapters_share_forwards(name: str, tmp_path: Path) -> None:
    pipeline, kwargs = build(name)
    paths = written(pipeline, tmp_path)

    report = run_together(pipeline, calls(name, kwargs), lora=[choices_of(paths, names) for names in SETS])

    assert report.largest_batch == len(SETS)
    for output, call, names in zip(report.outputs, calls(name, kwargs), SETS, strict=True):
        torch.testing.assert_close(picture(output), with_peft(pipeline, paths, call, names), rtol=0, atol=1e-5)
    without = with_peft(pipeline, paths, calls(name, kwargs)[0], ())
    assert (picture(report.outputs[0]) - without).abs().max() > 1e-4, "adapters change something"


def test_single_forwards_have_their_adapters_too(tmp_path: Path) -> None:
    pipeline, kwargs = build("flux")
    paths = written(pipeline, tmp_path)

    report = run_together(pipeline, calls("flux", kwargs), merge=False, lora=[choices_of(paths, n) for n in SETS])

    assert report.largest_batch == 1
    for output, call, names in zip(report.outputs, calls("flux", kwargs), SETS, strict=True):
        torch.testing.assert_close(picture(output), with_peft(pipeline, paths, call, names), rtol=0, atol=1e-5)


def test_where_a_layer_has_no_rows_only_equal_adapters_share_forwards(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline, kwargs = build("z_image")
    paths = written(pipeline, tmp_path, only=lambda name: not has_rows(name) or "attention" in name)
    sets = (("a",), ("b",), ("a",), ())
    sizes: list[int] = []
    pipeline.transformer.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))

    report = run_together(pipeline, calls("z_image", kwargs), lora=[choices_of(paths, names) for names in sets])

    # With guidance each has two rows: all were tried once, and at last the two that are alike were one forward.
    assert sizes.count(8) == 1
    assert max(sizes[-5:]) == 4
    assert "transformer.forward is merged only with equal adapters" in caplog.text
    for output, call, names in zip(report.outputs, calls("z_image", kwargs), sets, strict=True):
        torch.testing.assert_close(picture(output), with_peft(pipeline, paths, call, names), rtol=0, atol=1e-5)


def test_components_are_as_before_when_no_adapter_is_left(tmp_path: Path) -> None:
    pipeline, kwargs = build("flux")
    before = picture(pipeline(**calls("flux", kwargs)[0]))

    run_together(pipeline, calls("flux", kwargs)[:1], lora=[choices_of(written(pipeline, tmp_path), "a")])

    modules = [*pipeline.transformer.modules(), *pipeline.text_encoder.modules()]
    assert not any("forward" in vars(module) for module in modules)
    assert torch.equal(picture(pipeline(**calls("flux", kwargs)[0])), before)


class Held:
    """Adapters that are read when a test says so."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.num_read = 0

    def __call__(self, path: str, model: Adaptable, alpha: float | None) -> Adapter:
        assert self.go.wait(60)
        self.num_read += 1
        return read(path, model, alpha)


@pytest.fixture(scope="module")
def flux() -> Any:
    return build("flux")[0]


@pytest.fixture(scope="module")
def paths(flux: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return written(flux, tmp_path_factory.mktemp("adapters"), only=lambda name: name.endswith("to_q"))


class Desk:
    """An admission with its adapters, and what it started."""

    def __init__(self, pipeline: Any, *, max_bytes: int = 2**30, max_combinations: int = 8) -> None:
        self.read = Held()
        self.adapters = Adapters(
            pipeline,
            adaptable(pipeline),
            torch.device("cpu"),
            max_bytes=max_bytes,
            max_combinations=max_combinations,
            read=self.read,
        )
        self.started: dict[str, dict[str, Applied]] = {}
        self.failed: dict[str, BaseException] = {}
        self.admission = Admission(self.adapters, Filters(torch.device("cpu")), self._start, self.failed.__setitem__)

    def _start(self, asked: Start, applied: Any, _filters: Any) -> None:
        self.started[asked.request_id] = dict(applied)

    def add(self, request_id: str, *choices: LoraChoice) -> None:
        self.admission.add(Start(request_id=request_id, params=SamplingParams(lora=choices)))
        self.look()

    def look(self, *, can_install: bool = True) -> None:
        self.admission.look(can_install=lambda: can_install)

    def settle(self) -> None:
        """Until all that was asked for is read."""
        self.read.go.set()
        while self.adapters.is_loading:
            self.look()


@pytest.fixture
def desk(flux: Any) -> Any:
    made = Desk(flux)
    yield made
    made.read.go.set()
    for request_id in made.started:
        made.adapters.release(request_id)
    made.adapters.close()


def choice(paths: dict[str, Path], name: str, **fields: Any) -> LoraChoice:
    return LoraChoice(path=str(paths[name]), **fields)


def test_a_request_waits_for_its_adapter_while_others_start(desk: Desk, paths: dict[str, Path]) -> None:
    desk.add("with", choice(paths, "a"))
    desk.add("without")
    assert list(desk.started) == ["without"]
    desk.settle()
    assert desk.started["with"].keys() == {"transformer"}


def test_an_adapter_is_read_once_for_all_who_wait(desk: Desk, paths: dict[str, Path]) -> None:
    for request_id in "xyz":
        desk.add(request_id, choice(paths, "a", scale=2.0))
    desk.settle()
    assert desk.read.num_read == 1
    assert desk.started["x"] == desk.started["y"] == desk.started["z"]


def test_a_failure_ends_those_who_need_it_and_may_go_better_later(desk: Desk, tmp_path: Path, flux: Any) -> None:
    path = tmp_path / "a.safetensors"
    desk.add("x", LoraChoice(path=str(path)))
    desk.add("other")
    desk.settle()
    assert isinstance(desk.failed["x"], InvalidRequest)
    assert str(path) in str(desk.failed["x"])
    as_diffusers(path, matrices(flux, 0, only=lambda name: name.endswith("to_q")))
    desk.add("y", LoraChoice(path=str(path)))
    desk.settle()
    assert "y" in desk.started


def test_one_that_is_cancelled_while_it_waits_never_starts(desk: Desk, paths: dict[str, Path]) -> None:
    desk.add("x", choice(paths, "a"))
    assert desk.admission.cancel("x")
    assert not desk.admission.cancel("x")
    desk.settle()
    assert not desk.started


def test_nothing_is_installed_while_a_component_belongs_to_one_task(desk: Desk, paths: dict[str, Path]) -> None:
    desk.read.go.set()
    desk.adapters.load_now(Source(str(paths["a"])))
    desk.admission.add(Start(request_id="x", params=SamplingParams(lora=(choice(paths, "a"),))))
    desk.look(can_install=False)
    assert not desk.started
    desk.look()
    assert "x" in desk.started


def test_nothing_is_installed_beside_one_that_took_a_component_when_it_started(
    desk: Desk, paths: dict[str, Path]
) -> None:
    desk.add("x", choice(paths, "a"))
    desk.add("y", choice(paths, "b"))
    desk.read.go.set()
    while desk.adapters.is_loading:
        desk.admission.look(can_install=lambda: not desk.started)
    assert list(desk.started) == ["x"]
    desk.look()
    assert list(desk.started) == ["x", "y"]


def test_whatever_reading_raises_others_are_read_after_it(
    desk: Desk, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_args: Any) -> Adapter:
        raise RuntimeError("no route\nto host")

    monkeypatch.setattr(desk.adapters, "_read", unreachable)
    desk.add("x", LoraChoice(path="owner/name"))
    desk.settle()
    assert str(desk.failed["x"]) == "the LoRA adapter 'owner/name' can't be read: RuntimeError: no route"
    monkeypatch.setattr(desk.adapters, "_read", desk.read)
    desk.add("y", choice(paths, "a"))
    desk.settle()
    assert "y" in desk.started


def test_a_changed_file_is_read_again(desk: Desk, flux: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    keys = []
    for seed in (0, 1):
        as_diffusers(path, matrices(flux, seed, rank=2 + seed, only=lambda name: name.endswith("to_q")))
        desk.add(str(seed), LoraChoice(path=str(path)))
        desk.settle()
        keys.append(desk.started[str(seed)]["transformer"].key)
    assert keys[0] != keys[1]


def test_scale_zero_is_no_adapter(desk: Desk, paths: dict[str, Path]) -> None:
    desk.read.go.set()
    desk.add("x", choice(paths, "a", scale=0.0))
    desk.settle()
    assert desk.started["x"] == {}


def test_a_target_that_is_not_changed_is_an_error(desk: Desk, paths: dict[str, Path]) -> None:
    desk.add("x", choice(paths, "a", target="text_encoder"))
    desk.settle()
    assert "changes nothing in 'text_encoder'; it changes transformer" in str(desk.failed["x"])


def test_combinations_that_nobody_uses_give_way(flux: Any, paths: dict[str, Path]) -> None:
    desk = Desk(flux, max_combinations=1)
    desk.add("x", choice(paths, "a"))
    desk.add("y", choice(paths, "b"))
    desk.settle()
    assert list(desk.started) == ["x"]
    desk.adapters.release("x")
    desk.look()
    assert list(desk.started) == ["x", "y"]
    assert desk.adapters.held().num_slots == 1
    desk.adapters.release("y")
    desk.adapters.close()


def test_adapters_used_last_are_kept_as_far_as_memory_goes(flux: Any, paths: dict[str, Path]) -> None:
    size = {name: read(str(path), adaptable(flux)).size_bytes for name, path in paths.items()}
    desk = Desk(flux, max_bytes=size["a"] + size["c"])
    for name in "abac":
        desk.add(name, choice(paths, name))
        desk.settle()
    assert {Path(loaded.source.path).stem for loaded in desk.adapters.all()} == {"a", "c"}
    assert desk.adapters.held().adapter_bytes == size["a"] + size["c"]
    assert [[Path(source.path).stem for source in desk.adapters.take_dropped()] for _ in range(2)] == [["b"], []]
    # What was forgotten is in a slot still, and read again for another one.
    desk.add("again", choice(paths, "b", scale=2.0))
    desk.settle()
    assert "again" in desk.started
    for request_id in desk.started:
        desk.adapters.release(request_id)
    desk.adapters.close()


def test_an_adapter_that_is_unloaded_goes_on_for_those_who_use_it(desk: Desk, paths: dict[str, Path]) -> None:
    desk.add("x", choice(paths, "a"))
    desk.settle()
    desk.adapters.unload(Source(str(paths["a"])))
    assert (desk.adapters.held().num_adapters, desk.adapters.held().num_slots) == (0, 1)
    desk.adapters.release("x")
    assert desk.adapters.held().slot_bytes > 0


def test_pipelines_that_run_whole_have_their_adapters(tmp_path: Path) -> None:
    pipeline, kwargs = build("flux")
    paths = written(pipeline, tmp_path)
    desk, ends, replies = Desk(pipeline), dict[str, Outcome](), list[News]()
    session = Session(Executor(), replies.extend, lambda task, outcome: ends.update({task.request_id: outcome}))
    for name in ("a", ""):
        desk.add(name, *choices_of(paths, name))
        desk.settle()
        call = calls("flux", kwargs)[0]
        session.start(Job(name, pipeline, call, is_whole=True, adapters=desk.started[name]))
        while name not in ends:
            session.run([reply.call.id for reply in replies if isinstance(reply, Pending)][-1:])
        desk.adapters.release(name)
    desk.adapters.close()
    for name, outcome in ends.items():
        assert isinstance(outcome, Value), outcome
        expected = with_peft(pipeline, paths, calls("flux", kwargs)[0], tuple(name))
        torch.testing.assert_close(picture(outcome.value), expected, rtol=0, atol=1e-5)


def test_quantized_layers_have_adapters_on_top(tmp_path: Path) -> None:
    pipeline, kwargs = build("flux")
    quantization = agreed("int8", None, "transformer")
    assert quantization is not None
    assert quantize(pipeline.transformer, quantization, (), torch.device("cpu")) > 3
    path = as_diffusers(tmp_path / "a.safetensors", matrices(pipeline, 0, only=lambda name: "transformer" in name))
    lora = [[LoraChoice(path=str(path))], [LoraChoice(path=str(path), scale=-1.0)], []]

    together = run_together(pipeline, calls("flux", kwargs)[:3], lora=lora)
    alone = [run_together(pipeline, [c], lora=[of]) for c, of in zip(calls("flux", kwargs)[:3], lora, strict=True)]

    assert together.largest_batch == 3
    for output, single in zip(together.outputs, alone, strict=True):
        torch.testing.assert_close(picture(output), picture(single.outputs[0]), rtol=0, atol=1e-4)
    assert (picture(together.outputs[0]) - picture(together.outputs[2])).abs().max() > 1e-3


def test_each_of_two_transformers_has_its_own_adapters(tmp_path: Path) -> None:
    pipeline, kwargs = build("wan_2_2")
    made = [matrices(pipeline, seed, size=0.5, only=lambda name: "transformer.blocks" in name) for seed in range(2)]
    high, low = (as_diffusers(tmp_path / f"{seed}.safetensors", layers) for seed, layers in enumerate(made))
    own = [LoraChoice(path=str(high), target="transformer"), LoraChoice(path=str(low), target="transformer_2")]
    call = calls("wan_2_2", kwargs)[0]

    report = run_together(pipeline, [call, calls("wan_2_2", kwargs)[1]], lora=[own, []])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.load_lora_weights(str(high), adapter_name="high")
        pipeline.load_lora_weights(str(low), adapter_name="low", load_into_transformer_2=True)
    expected = picture(pipeline(**calls("wan_2_2", kwargs)[0]))
    torch.testing.assert_close(picture(report.outputs[0]), expected, rtol=0, atol=1e-5)
