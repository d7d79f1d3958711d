"""Calls that are replayed as graphs: on the CPU with a recorder that runs them again, and on a GPU for real."""

import itertools
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry
from diffusers.utils import BaseOutput
from pipelines import build
from torch import nn

from sgld.models.lora import LoraLayer
from sgld.models.shared_attention import Intercept
from sgld.models.tokens import TokenRanks, Tokens
from sgld.testing import run_together
from sgld.worker.graph_keys import Key
from sgld.worker.graph_policy import CAPTURES_AFTER, GraphPolicy
from sgld.worker.graphs import MAX_BROKEN, Graphs, graphs_on
from sgld.worker.invocation import Invocation
from sgld.worker.recorder import Broken, Full, Leaking, Unfit
from sgld.worker.residency import Residency, Weights
from sgld.worker.runtime import Runtime
from sgld.worker.slots import Applied, Slots
from worker.recordings import FakeRecorder
from worker.requests import Function, call_of, picture, request

CPU = torch.device("cpu")
RANKS = TokenRanks(group=None, ring=None, exchange=None, num_ring=1, num_ulysses=2, index=0)


class World:
    """Graphs of one component, with all that they say."""

    def __init__(self, module: nn.Module, max_bytes: int = 10_000) -> None:
        self.module = module
        self.recorder = FakeRecorder()
        self.notes: list[tuple[str, str]] = []
        policy: GraphPolicy[Key] = GraphPolicy(max_bytes)
        self.graphs = Graphs(CPU, policy, self.recorder, {module: "unet"}, lambda *note: self.notes.append(note))
        self.runtime = Runtime(graphs=self.graphs)

    @torch.no_grad()
    def run(self, *args: Any, times: int = 1, fixed: Any = (), **kwargs: Any) -> Any:
        """The last result of a call that is made so often."""
        for _ in range(times):
            result = self.runtime.run(Invocation(self.module, "forward", args, kwargs, fixed=fixed))
        return result

    def is_replayed(self, *args: Any, **kwargs: Any) -> bool:
        """Whether a call is replayed now."""
        before = self.graphs.num_replays
        self.run(*args, **kwargs)
        return self.graphs.num_replays > before


UNTIL_REPLAYED = CAPTURES_AFTER + 1
"""Uses of a key after which it is replayed: the last is compared with an eager forward."""


def doubled(x: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    return 2 * x


class TestRun:
    def test_a_call_that_comes_again_and_again_is_replayed(self) -> None:
        world = World(Function(doubled))
        results = [world.run(torch.full((2,), float(n))).tolist() for n in range(8)]
        assert results == [[2.0 * n] * 2 for n in range(8)]
        assert (world.graphs.num_trials, world.graphs.num_replays) == (2, 8 - UNTIL_REPLAYED)
        assert world.notes == []

    def test_results_belong_to_who_called(self) -> None:
        world = World(Function(lambda x: x))
        world.run(torch.zeros(2), times=UNTIL_REPLAYED)
        first = world.run(torch.ones(2))
        world.run(torch.zeros(2))
        assert first.tolist() == [1.0, 1.0]

    def test_outputs_of_models_are_what_they_were(self) -> None:
        class Output(BaseOutput):  # type: ignore[misc]
            sample: torch.Tensor
            states: tuple[torch.Tensor, ...]

        world = World(Function(lambda x: Output(sample=x + 1, states=(x, x * 2))))
        world.run(torch.zeros(2), times=UNTIL_REPLAYED)
        result = world.run(torch.ones(2))
        assert world.graphs.num_replays == 1
        assert isinstance(result, Output)
        assert (result.sample.tolist(), result["states"][1].tolist()) == ([2.0, 2.0], [2.0, 2.0])

    def test_trials_are_not_timed_and_replays_have_a_time_of_their_own(self) -> None:
        world = World(Function(doubled))
        counts, variants = [], []
        for _ in range(UNTIL_REPLAYED + 1):
            before = world.runtime.num_irregular
            world.run(torch.ones(2))
            counts.append(world.runtime.num_irregular - before)
            variants.append(world.runtime.variant)
        assert counts == [0] * (CAPTURES_AFTER - 1) + [1, 1, 0]
        assert variants == ["eager"] * UNTIL_REPLAYED + ["graph"]

    def test_gradients_are_no_business_of_graphs(self) -> None:
        world = World(Function(doubled))
        for _ in range(10):
            world.runtime.run(Invocation(world.module, "forward", (torch.ones(2, requires_grad=True),), fixed=()))
        assert world.recorder.num_warmed == 0


class TestKey:
    @pytest.mark.parametrize(
        ("args", "kwargs"),
        [
            ((torch.ones(3),), {}),
            ((torch.ones(2, dtype=torch.float64),), {}),
            ((torch.ones(2, 2).T,), {}),
            ((torch.ones(2), 1), {}),
            ((torch.ones(2), True), {}),
            ((torch.ones(2),), {"scale": 1.0}),
            ((torch.ones(2),), {"kwargs": {"scale": 2.0}}),
            ((torch.ones(2), None), {}),
            ((torch.ones(2), [None]), {}),
        ],
    )
    def test_other_forms_and_constants_have_graphs_of_their_own(self, args: Any, kwargs: Any) -> None:
        world = World(Function(doubled))
        for known in [((torch.ones(2),), {}), ((torch.ones(2, 2),), {}), ((torch.ones(2),), {"scale": 2.0})]:
            world.run(*known[0], times=UNTIL_REPLAYED, **known[1])
            assert world.is_replayed(*known[0], **known[1])
        assert not world.is_replayed(*args, **kwargs)

    def test_autocast_belongs_to_it(self) -> None:
        world = World(Function(doubled))
        keys = {world.graphs.key(Invocation(world.module, "forward", (torch.ones(2),)))[0]}
        with torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available()), torch.no_grad():
            keys.add(world.graphs.key(Invocation(world.module, "forward", (torch.ones(2),)))[0])
        assert len(keys) == 2

    def test_so_do_adapters(self) -> None:
        world = World(Function(doubled))
        world.run(torch.ones(2), times=UNTIL_REPLAYED, fixed=(1, "a"))
        assert world.is_replayed(torch.ones(2), fixed=(1, "a"))
        assert not world.is_replayed(torch.ones(2), fixed=(2, "a"))

    @pytest.mark.parametrize(
        ("argument", "problem"),
        [
            (torch.ones(1, device="meta"), "a tensor on meta"),
            (doubled, "a function, which may have a state"),
            (torch.nn.Buffer(torch.ones(1)), None),
        ],
    )
    def test_what_a_graph_would_not_follow_is_refused_once_in_words(
        self, argument: Any, problem: str | None, caplog: pytest.LogCaptureFixture
    ) -> None:
        world = World(Function(doubled))
        with caplog.at_level(logging.WARNING):
            world.run(torch.ones(2), argument, times=10)
        if problem is None:
            assert world.graphs.num_replays > 0
            return
        assert world.recorder.num_warmed == 0
        assert world.notes == [("unet", f"some calls run without CUDA graphs: an argument is {problem}")]
        assert len(caplog.messages) == 1


class TestWhatIsNoGraph:
    def refused(self, world: World, *args: Any) -> str:
        """What is said of a call that is never replayed."""
        world.run(*args, times=3 * UNTIL_REPLAYED)
        assert world.graphs.num_replays == 0
        assert world.recorder.num_warmed == 1
        return world.notes[0][1].removeprefix("some calls run without CUDA graphs: ") if world.notes else ""

    def test_a_forward_that_the_device_is_busy_with(self) -> None:
        world = World(Function(doubled))
        world.recorder.launch_s = 0.1
        assert self.refused(world, torch.ones(2)) == ""
        assert world.recorder.num_recorded == 0

    def test_one_that_gains_nothing(self) -> None:
        world = World(Function(doubled))
        world.recorder.seconds = [1.0, 1.0]
        assert self.refused(world, torch.ones(2)) == ""
        assert world.recorder.num_renewed == 1

    def test_where_others_wait_for_the_host_both_are_one(self) -> None:
        world = World(Function(doubled))
        world.graphs._frees_host = True
        world.recorder.launch_s, world.recorder.seconds = 0.1, [1.0, 1.0]
        world.run(torch.ones(2), times=UNTIL_REPLAYED)
        assert world.is_replayed(torch.ones(2))

    def test_a_capture_that_fails(self, caplog: pytest.LogCaptureFixture) -> None:
        world = World(Function(doubled))
        world.recorder.problem = Unfit("operation not permitted when stream is capturing")
        with caplog.at_level(logging.WARNING):
            assert self.refused(world, torch.ones(2)) == "operation not permitted when stream is capturing"
        assert len(caplog.messages) == 1

    def test_no_more_calls_of_a_method_after_some_captures_were_cut_off(self) -> None:
        world = World(Function(doubled))
        world.recorder.problem = Broken("operation not permitted when stream is capturing")
        for size in range(1, MAX_BROKEN + 1):
            world.run(torch.ones(size), times=UNTIL_REPLAYED)
        world.recorder.problem = None
        world.run(torch.ones(MAX_BROKEN + 1), times=2 * UNTIL_REPLAYED)
        assert world.graphs.num_replays == 0
        assert "cut off" in world.notes[-1][1]

    def test_one_that_draws(self) -> None:
        assert "random" in self.refused(World(Function(lambda x: x + torch.rand(2))), torch.ones(2))

    def test_one_that_draws_from_what_it_is_given(self) -> None:
        world = World(Function(lambda x, generator: x + torch.rand(2, generator=generator)))
        assert "random" in self.refused(world, torch.ones(2), torch.Generator())

    def test_a_generator_that_is_only_handed_over_is_no_matter(self) -> None:
        world = World(Function(doubled))
        world.run(torch.ones(2), generator=torch.Generator(), times=UNTIL_REPLAYED)
        assert world.is_replayed(torch.ones(2), generator=torch.Generator().manual_seed(3))
        assert not world.is_replayed(torch.ones(2))

    def test_one_for_which_memory_was_short_until_it_is_not(self) -> None:
        world = World(Function(doubled))
        world.recorder.problem = Full("CUDA out of memory")
        world.run(torch.ones(2), times=CAPTURES_AFTER)
        world.recorder.problem = None
        world.run(torch.ones(2), times=2 * CAPTURES_AFTER - 1)
        assert world.recorder.num_recorded == 0
        world.run(torch.ones(2), times=2)
        assert world.is_replayed(torch.ones(2))

    def test_a_model_that_takes_things_out_of_what_it_is_given_gets_them_each_time(self) -> None:
        world = World(Function(lambda x, options: x * options.pop("scale", 1.0)))
        for _ in range(UNTIL_REPLAYED + 1):
            assert world.run(torch.ones(2), {"scale": 3.0}).tolist() == [3.0, 3.0]
        assert world.graphs.num_replays == 1

    def test_one_that_writes_to_its_arguments(self) -> None:
        assert "arguments" in self.refused(World(Function(lambda x: x.add_(1))), torch.ones(2))

    def test_one_whose_result_is_more_than_tensors(self) -> None:
        assert "returns a function" in self.refused(World(Function(lambda x: (x, doubled))), torch.ones(2))

    def test_one_that_remembers(self) -> None:
        count = itertools.count()
        world = World(Function(lambda x: x + next(count)))
        assert "something else" in self.refused(world, torch.ones(2))

    def test_one_with_a_hook(self) -> None:
        module = nn.Sequential(nn.Linear(2, 2))
        module[0].register_forward_hook(lambda *_: None)
        assert self.refused(World(module), torch.ones(2)) == "a hook is on 0"

    def test_hooks_with_which_ranks_share_tokens_are_no_matter(self) -> None:
        module = Function(doubled)
        HookRegistry.check_if_exists_or_initialize(module).register_hook(Intercept(Tokens("x", RANKS)), "tokens")
        world = World(module)
        world.run(torch.ones(2), times=UNTIL_REPLAYED)
        assert world.is_replayed(torch.ones(2))

    def test_other_calls_of_it_may_be(self) -> None:
        def sometimes(x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand(2) if len(x) == 2 else x

        world = World(Function(sometimes))
        world.run(torch.ones(2), times=10)
        world.run(torch.ones(3), times=UNTIL_REPLAYED)
        assert world.is_replayed(torch.ones(3))


class TestWhatGoes:
    def test_graphs_of_a_component_that_changed(self) -> None:
        module, other = Function(doubled), Function(doubled)
        world = World(module)
        world.run(torch.ones(2), times=UNTIL_REPLAYED)
        world.runtime.forget(other)
        assert world.is_replayed(torch.ones(2))
        module.function = lambda x: 3 * x
        world.runtime.forget(world.module)
        assert world.run(torch.ones(2)).tolist() == [3.0, 3.0]
        world.run(torch.ones(2), times=UNTIL_REPLAYED - 1)
        assert world.is_replayed(torch.ones(2))
        assert world.run(torch.ones(2)).tolist() == [3.0, 3.0]

    def test_the_oldest_when_memory_is_full(self) -> None:
        world = World(Function(doubled), max_bytes=325)
        for size in (1, 2, 3):
            world.run(torch.ones(size), times=UNTIL_REPLAYED)
        assert [world.is_replayed(torch.ones(size)) for size in (1, 2, 3)] == [False, True, True]
        assert world.recorder.num_renewed == 0

    def test_all_when_the_device_is_out_of_memory(self) -> None:
        world = World(Function(doubled))
        world.run(torch.ones(2), times=UNTIL_REPLAYED)
        failures = [torch.OutOfMemoryError("too large")]

        def large(x: torch.Tensor) -> torch.Tensor:
            if failures:
                raise failures.pop()
            return 4 * x

        with torch.no_grad():
            result = world.runtime.run(Invocation(Function(large), "forward", (torch.ones(1),), fixed=()))
            assert result.tolist() == [4.0]
            assert not world.is_replayed(torch.ones(2))
            failures += [torch.OutOfMemoryError("too large")]
            with pytest.raises(torch.OutOfMemoryError):
                world.runtime.run(Invocation(Function(large), "forward", (torch.ones(1),), fixed=()))

    def test_all_when_a_model_keeps_what_is_in_their_memory(self) -> None:
        world = World(Function(doubled))
        world.run(torch.ones(2), times=UNTIL_REPLAYED)
        world.recorder.problem = Leaking("it keeps tensors that it makes in a forward")
        world.run(torch.ones(3), times=UNTIL_REPLAYED)
        assert "keeps tensors" in world.notes[0][1]
        assert not world.is_replayed(torch.ones(2))
        assert world.recorder.num_renewed >= 1


class TestRuntime:
    def test_compiled_code_has_graphs_of_its_own(self) -> None:
        module = nn.Linear(2, 2)
        world = World(module)
        world.run(torch.ones(2), times=UNTIL_REPLAYED)
        assert world.is_replayed(torch.ones(2))
        # What other calls of this form run from now on.
        world.runtime = Runtime(compiled={module: "unet"}, graphs=world.graphs)
        assert not world.is_replayed(torch.ones(2))
        assert world.runtime.variant == "compiled"

    def test_offloaded_components_have_no_graphs(self) -> None:
        world = World(nn.Linear(2, 2))
        offloaded = {"unet": (world.module, Weights(world.module, CPU, pins=False))}
        world.runtime.residency = Residency(CPU, offloaded)
        world.run(torch.ones(2), times=10)
        assert world.recorder.num_warmed == 0

    def test_exact_calls_and_those_of_changed_components_run_eagerly(self) -> None:
        world = World(Function(doubled))
        world.run(torch.ones(2), times=UNTIL_REPLAYED)
        before = world.graphs.num_replays
        with torch.no_grad():
            usual = Invocation(world.module, "forward", (torch.ones(2),), fixed=())
            world.runtime.run(replace(usual, is_exact=True))
            world.runtime.run(replace(usual, dtype=torch.float64))
            world.runtime.are_changed = True
            world.run(torch.ones(2))
        assert world.graphs.num_replays == before

    def test_calls_that_need_python_in_between_say_so(self) -> None:
        world = World(Function(doubled))
        call = call_of(world.module, torch.ones(2))
        call.runtime = world.runtime
        for _ in range(UNTIL_REPLAYED):
            call.run(call.args, call.kwargs)
        call.run(call.args, call.kwargs)
        assert world.graphs.num_replays == 1
        call.around = torch.no_grad
        call.run(call.args, call.kwargs)
        assert world.graphs.num_replays == 1

    def test_graphs_follow_the_adapters_of_a_call(self) -> None:
        world = World(nn.Linear(2, 2))
        slots = Slots(world.module, CPU)
        slots.put("a", {})
        slots.put("b", {})
        call = call_of(world.module, torch.ones(2))
        call.runtime = world.runtime
        for key, num in (("a", 1), ("b", 2), ("b", 3)):
            call.adapters = Applied(slots, key)
            for _ in range(UNTIL_REPLAYED):
                call.run(call.args, call.kwargs)
            call.run(call.args, call.kwargs)
            assert world.graphs.num_replays == num + (UNTIL_REPLAYED if num == 3 else 0)


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.mark.parametrize(
        "name", ["flux", "sdxl", "sd3", "wan", "qwen_image", "chroma", "cogview_4", "kandinsky_5_image", "sana", "sd"]
    )
    def test_pipelines_return_the_same_bits(self, name: str) -> None:
        pipeline, kwargs = build(name)
        pipeline.to("cuda")
        graphs = graphs_on(torch.device("cuda"), 2**32, pipeline.components, lambda *_: None)
        assert graphs is not None

        def pictures(runtime: Runtime | None) -> list[torch.Tensor]:
            calls = [request(name, index, kwargs, num_inference_steps=6) for index in range(2)]
            report = run_together(pipeline, calls, merge=False, runtime=runtime)
            return [picture(output) for output in report.outputs]

        for expected, result in zip(pictures(None), pictures(Runtime(graphs=graphs)), strict=True):
            assert torch.equal(result, expected)
        assert graphs.num_replays > 0

    @pytest.mark.parametrize(
        ("name", "component", "method"), [("chroma", "transformer", "forward"), ("sd", "vae", "decode")]
    )
    def test_copies_from_the_host_and_generators_are_no_matter(self, name: str, component: str, method: str) -> None:
        pipeline, kwargs = build(name)
        pipeline.to("cuda")
        notes: list[tuple[str, str]] = []
        graphs = graphs_on(torch.device("cuda"), 2**32, pipeline.components, lambda *note: notes.append(note))
        assert graphs is not None
        calls = [request(name, 0, kwargs, num_inference_steps=8) for _ in range(5)]
        run_together(pipeline, calls, merge=False, runtime=Runtime(graphs=graphs))
        assert [note for note in notes if note[0] == component] == []
        assert (component, method) in {(graphs._name(key.module), key.method) for key in graphs._recordings}

    def test_merged_calls_are_replayed(self) -> None:
        pipeline, kwargs = build("sdxl")
        pipeline.to("cuda")
        graphs = graphs_on(torch.device("cuda"), 2**32, pipeline.components, lambda *_: None)
        assert graphs is not None
        calls = [request("sdxl", index, kwargs, num_inference_steps=12) for index in range(2)]
        alone = [picture(run_together(pipeline, [call]).outputs[0]) for call in calls]
        calls = [request("sdxl", index, kwargs, num_inference_steps=12) for index in range(2)]
        report = run_together(pipeline, calls, runtime=Runtime(graphs=graphs))
        assert report.merged_calls > 10
        assert graphs.num_replays > 3
        for output, expected in zip(report.outputs, alone, strict=True):
            torch.testing.assert_close(picture(output), expected, atol=2e-3, rtol=0)

    def test_adapters_in_their_slots_may_come_and_go(self) -> None:
        torch.manual_seed(0)
        module = nn.Sequential(*(nn.Linear(16, 16) for _ in range(20))).cuda()
        slots = Slots(module, torch.device("cuda"))
        graphs = graphs_on(torch.device("cuda"), 2**30, {"unet": module}, lambda *_: None)
        plain, replayed, x = Runtime(), Runtime(graphs=graphs), torch.randn(3, 5, 16, device="cuda")
        assert graphs is not None

        def put(key: str, rank: int) -> None:
            change = LoraLayer(torch.randn(rank, 16), torch.randn(16, rank))
            slots.put(key, {"3": [(change, 1.0)]})

        def check(keys: str) -> None:
            call = call_of(module, x)
            rows = [(Applied(slots, key), 3 // len(keys)) for key in keys]
            call.runtime = plain
            expected = call.run(call.args, call.kwargs, rows)
            call.runtime = replayed
            for _ in range(UNTIL_REPLAYED + 2):
                assert torch.equal(call.run(call.args, call.kwargs, rows), expected)

        put("a", 4)
        check("a")
        put("b", 8)
        put("c", 8)
        for keys in ("a", "b", "abc", "bac", "c"):
            check(keys)
        slots.remove("b")
        put("d", 6)
        for keys in ("d", "adc", "a"):
            check(keys)
        assert graphs.num_replays >= 18

    def test_weights_that_changed_count_once_graphs_are_forgotten(self) -> None:
        module = nn.Sequential(*(nn.Linear(16, 16) for _ in range(20))).cuda()
        runtime = Runtime(graphs=graphs_on(torch.device("cuda"), 2**30, {"unet": module}, lambda *_: None))
        x = torch.randn(3, 16, device="cuda")
        for _ in range(2):
            module[3].weight = nn.Parameter(torch.randn(16, 16, device="cuda"))
            runtime.forget(module)
            with torch.no_grad():
                for _ in range(UNTIL_REPLAYED + 2):
                    assert torch.equal(runtime.run(Invocation(module, "forward", (x,), fixed=())), module(x))
        assert runtime.graphs is not None
        assert runtime.graphs.num_replays == 4
