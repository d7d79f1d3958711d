import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.utils import BaseOutput
from torch import nn

from sgld.outcome import Outcome, Raised, Value
from sgld.worker.axes import Batched, CallAxes
from sgld.worker.calls import Call
from sgld.worker.clock import HostClock
from sgld.worker.executor import Executor, Tick
from sgld.worker.verdicts import RECHECK_EVERY, axes_key
from worker.requests import call_of, values

NAN = float("nan")


class Model(nn.Module):
    """Runs a function, and notes the number of rows of each forward."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.batches: list[int] = []

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.batches.append(len(x))
        return self.function(x, *args, **kwargs)


def linear(x: torch.Tensor) -> torch.Tensor:
    return x @ torch.linspace(-1, 1, 16).reshape(4, 4)


def rows(count: int, start: int = 0) -> list[torch.Tensor]:
    """Samples that all differ, one row each."""
    return [torch.linspace(index, index + 1, 4).reshape(1, 4) for index in range(start + 1, start + count + 1)]


def singly(model: Model, calls: Sequence[Call]) -> list[Any]:
    return [model.function(*call.args, **call.kwargs) for call in calls]


def together(executor: Executor, calls: Sequence[Call]) -> Tick:
    """Run calls that the scheduler would put together: those with equal keys that aren't None."""
    keys = {executor.merge_key(call) for call in calls}
    assert len(keys) == 1, keys
    assert None not in keys
    return executor.run(calls)


def check(executor: Executor, calls: Sequence[Call], expected: Sequence[Any]) -> Tick:
    tick = together(executor, calls)
    for value, wanted in zip(values(tick.outcomes), expected, strict=True):
        torch.testing.assert_close(value, wanted)
    return tick


def proved(executor: Executor, model: Model, num_calls: int = 4, **kwargs: Any) -> None:
    """Let calls prove that they may be merged."""
    calls = [call_of(model, x, **kwargs) for x in rows(num_calls)]
    assert not check(executor, calls, singly(model, calls)).is_merged
    assert executor.verdicts.modes == {"transformer": "merge"}
    model.batches.clear()


def test_first_calls_are_answered_singly_while_they_prove_merging() -> None:
    executor, model = Executor(), Model(linear)
    calls = [call_of(model, x) for x in rows(3)]

    tick = check(executor, calls, singly(model, calls))

    assert (tick.is_merged, tick.is_timed) == (False, False)
    assert model.batches == [1, 1, 1, 3, 3]
    assert executor.verdicts.modes == {"transformer": "merge"}


def test_calls_that_were_proved_share_one_forward() -> None:
    executor, model = Executor(), Model(linear)
    proved(executor, model)
    calls = [call_of(model, x) for x in rows(3, start=10)]

    tick = check(executor, calls, singly(model, calls))

    assert (tick.is_merged, tick.is_timed) == (True, True)
    assert model.batches == [3]
    assert tick.span.elapsed_s > 0


def test_forwards_elsewhere_are_checked_again_here() -> None:
    executor, model = Executor(), Model(linear)
    proved(executor, model)
    calls = [call_of(model, x) for x in rows(4, start=10)]
    assert executor.proved(calls) is not None
    [known] = executor.verdicts.proved.values()
    known.num_ticks = RECHECK_EVERY - 1
    assert executor.proved(calls) is None
    assert executor.run(calls).is_proof


def test_a_call_alone_runs_with_the_very_arguments_of_its_task() -> None:
    seen: list[Any] = []

    def noting(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x

    model = Model(noting)
    x = rows(1)[0]
    tick = Executor().run([call_of(model, x)])
    assert seen[0] is x
    assert (tick.outcomes, tick.is_merged, tick.is_timed) == ([Value(x)], False, True)


def test_an_executor_that_does_not_merge_has_no_keys() -> None:
    executor, model = Executor(merge=False), Model(linear)
    calls = [call_of(model, x) for x in rows(2)]
    assert [executor.merge_key(call) for call in calls] == [None, None]
    assert not executor.run(calls).is_merged
    assert model.batches == [1, 1]


def test_decoding_runs_alone() -> None:
    model = Model(linear)
    model.decode = model.forward  # type: ignore[assignment]
    assert Executor().merge_key(call_of(model, rows(1)[0], method="decode")) is None


def test_calls_without_tensors_run_alone() -> None:
    assert Executor().merge_key(call_of(Model(linear), "text", n=1)) is None


def test_results_of_a_merged_forward_have_storage_of_their_own() -> None:
    executor, model = Executor(), Model(linear)
    proved(executor, model)
    first, second = values(together(executor, [call_of(model, x) for x in rows(2)]).outcomes)
    first.fill_(NAN)
    assert not second.isnan().any()
    assert first.untyped_storage().nbytes() == first.nbytes


def test_arguments_of_a_task_are_left_as_they_are() -> None:
    """Models take things out of the dicts that they are given."""
    executor, model = Executor(), Model(lambda x, extra: linear(x) * extra.pop("scale"))
    calls = [call_of(model, x, extra={"scale": 2.0}) for x in rows(3)]
    for _ in range(2):
        batch = [call_of(model, call.args[0], extra={"scale": 2.0}) for call in calls]
        together(executor, batch)
    assert model.batches[-1] == 3
    assert batch[0].kwargs == {"extra": {"scale": 2.0}}


@dataclass
class Plain:
    x: torch.Tensor


class Output(BaseOutput):  # type: ignore[misc]
    sample: torch.Tensor


def plain(value: Any) -> Any:
    return plain(value.x) if isinstance(value, Plain) else value


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: y,
        lambda y: (y,),
        lambda y: [y, y + 1],
        lambda y: {"sample": y, "none": None},
        lambda y: Output(sample=y),
        lambda y: (y, (2 * y, None)),
        Plain,
        lambda y: Plain(Plain(y)),  # type: ignore[arg-type]
    ],
)
def test_results_of_every_form_are_merged(wrap: Callable[[torch.Tensor], Any]) -> None:
    executor, model = Executor(), Model(lambda x: wrap(linear(x)))
    for start in (0, 10):
        calls = [call_of(model, x) for x in rows(3, start)]
        tick = together(executor, calls)
        for value, wanted in zip(values(tick.outcomes), singly(model, calls), strict=True):
            assert type(value) is type(wanted)
            torch.testing.assert_close(plain(value), plain(wanted))
    assert tick.is_merged


@pytest.mark.parametrize(
    "wrap", [lambda y: (y, iter([])), lambda y: (y, y.square().mean()), lambda y: [*y], lambda y: (y, len(y))]
)
def test_results_that_can_not_be_split_are_interleaved(wrap: Callable[[torch.Tensor], Any]) -> None:
    executor, model = Executor(), Model(lambda x: wrap(linear(x)))
    calls = [call_of(model, x) for x in rows(3)]
    tick = together(executor, calls)
    assert all(isinstance(outcome, Value) for outcome in tick.outcomes)
    assert executor.verdicts.modes == {"transformer": "interleave"}
    assert [executor.merge_key(call) for call in calls] == [None] * 3


def test_result_of_another_structure_in_a_batch_is_interleaved() -> None:
    executor = Executor()
    model = Model(lambda x: (linear(x),) if len(x) == 1 else (linear(x), linear(x)))
    calls = [call_of(model, x) for x in rows(2)]
    outcomes = together(executor, calls).outcomes
    assert [value[0].shape for value in values(outcomes)] == [(1, 4), (1, 4)]
    assert executor.verdicts.modes == {"transformer": "interleave"}


class TestScalars:
    """A timestep is often a tensor without an axis."""

    model = staticmethod(lambda x, t: linear(x) * torch.as_tensor(t).reshape(-1, 1))

    def calls(self, model: Model, times: Sequence[float], start: int = 0) -> list[Call]:
        xs = rows(len(times), start)
        return [call_of(model, x, torch.tensor(t)) for x, t in zip(xs, times, strict=True)]

    def test_different_ones_are_expanded(self) -> None:
        executor, model = Executor(), Model(self.model)
        for start, times in enumerate(([0.9, 0.5, 0.1], [0.8, 0.4, 0.3])):
            calls = self.calls(model, times, start)
            tick = check(executor, calls, singly(model, calls))
        assert tick.is_merged
        assert executor.verdicts.modes == {"transformer": "merge"}

    def test_proof_with_equal_ones_does_not_cover_different_ones(self) -> None:
        executor, model = Executor(), Model(self.model)
        for start, times, is_merged in ((0, [0.9, 0.9], False), (2, [0.4, 0.4], True), (4, [0.9, 0.5], False)):
            calls = self.calls(model, times, start)
            assert check(executor, calls, singly(model, calls)).is_merged is is_merged
        calls = self.calls(model, [0.7, 0.3], 8)
        assert check(executor, calls, singly(model, calls)).is_merged

    def test_model_that_takes_only_one_is_merged_where_they_are_equal(self) -> None:
        executor, model = Executor(), Model(lambda x, t: linear(x) * t.item())
        for times in ([0.9, 0.9], [0.5, 0.5], [0.9, 0.5]):
            calls = self.calls(model, times)
            tick = check(executor, calls, singly(model, calls))
        assert not tick.is_merged
        # From now on they are part of the key.
        one, other = self.calls(model, [0.2, 0.6])
        assert executor.merge_key(one) != executor.merge_key(other)
        calls = self.calls(model, [0.5, 0.5])
        assert [check(executor, calls, singly(model, calls)).is_merged for _ in range(2)] == [False, True]


class TestRowZero:
    """A model that reads position ids from the first row only, as several do."""

    model = staticmethod(lambda x, ids: linear(x) + ids[0])

    def calls(self, model: Model, ids: Sequence[float], start: int = 0) -> list[Call]:
        xs = rows(len(ids), start)
        return [call_of(model, x, torch.full((1, 4), i)) for x, i in zip(xs, ids, strict=True)]

    def test_different_ids_are_compared_by_value_from_the_first(self, caplog: pytest.LogCaptureFixture) -> None:
        executor, model = Executor(), Model(self.model)
        calls = self.calls(model, [1.0, 2.0, 3.0])
        check(executor, calls, singly(model, calls))
        assert "transformer.forward is merged only with equal value of 1: merged results differ" in caplog.text

        one, two, three = self.calls(model, [1.0, 2.0, 1.0], 4)
        assert executor.merge_key(one) == executor.merge_key(three) != executor.merge_key(two)
        for is_merged in (False, True):
            assert check(executor, [one, three], singly(model, [one, three])).is_merged is is_merged

    def test_ids_are_found_where_the_first_two_calls_have_them_in_common(self) -> None:
        executor, model = Executor(), Model(self.model)
        calls = self.calls(model, [1.0, 1.0, 2.0, 2.0])
        check(executor, calls, singly(model, calls))
        for pair in (calls[:2], calls[2:]):
            assert [check(executor, pair, singly(model, pair)).is_merged for _ in range(2)] == [False, True]

    def test_equal_ids_merge_and_different_ones_are_compared_by_value_then(self) -> None:
        executor, model = Executor(), Model(self.model)
        for start, is_merged in ((0, False), (4, True)):
            calls = self.calls(model, [1.0] * 4, start)
            assert check(executor, calls, singly(model, calls)).is_merged is is_merged
        calls = self.calls(model, [1.0, 2.0, 1.0, 2.0], 8)
        assert not check(executor, calls, singly(model, calls)).is_merged

        one, two, three, four = self.calls(model, [1.0, 2.0, 1.0, 2.0], 12)
        keys = [executor.merge_key(call) for call in (one, two, three, four)]
        assert None not in keys
        assert keys[0] == keys[2] != keys[1] == keys[3]
        assert executor.verdicts.modes == {"transformer": "merge"}
        for pair in ([one, three], [two, four]):
            # A proof for each value, then they share forwards.
            assert [check(executor, pair, singly(model, pair)).is_merged for _ in range(2)] == [False, True]

    def test_keys_that_changed_since_the_scheduler_heard_of_them_do_no_harm(self) -> None:
        executor, model = Executor(), Model(self.model)
        for ids in ([1.0, 1.0], [1.0, 2.0]):
            calls = self.calls(model, ids)
            check(executor, calls, singly(model, calls))
        stale = self.calls(model, [3.0, 4.0])
        for value, wanted in zip(values(executor.run(stale).outcomes), singly(model, stale), strict=True):
            torch.testing.assert_close(value, wanted)
        assert not executor.verdicts.refused


def test_model_that_mixes_rows_is_interleaved_with_right_results() -> None:
    executor, model = Executor(), Model(lambda x: linear(x) - x.mean(0))
    calls = [call_of(model, x) for x in rows(4)]
    check(executor, calls, singly(model, calls))
    assert executor.verdicts.modes == {"transformer": "interleave"}
    assert [executor.merge_key(call) for call in calls] == [None] * 4
    tick = executor.run(calls)
    assert not tick.is_merged
    torch.testing.assert_close(values(tick.outcomes), singly(model, calls))


def test_reason_of_a_refusal_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    calls = [call_of(Model(lambda x: x - x.mean(0)), x) for x in rows(2)]
    together(Executor(), calls)
    assert "transformer.forward is interleaved, not merged: merged results differ by" in caplog.text


def test_one_form_of_calls_that_is_refused_leaves_others_merged() -> None:
    executor = Executor()
    model = Model(lambda x, mix=False: x - x.mean(0) if mix else linear(x))
    proved(executor, model)
    mixing = [call_of(model, x, mix=True) for x in rows(2)]
    together(executor, mixing)
    assert executor.merge_key(mixing[0]) is None
    assert executor.verdicts.modes == {"transformer": "merge"}
    assert together(executor, [call_of(model, x) for x in rows(2)]).is_merged


@pytest.mark.parametrize("bad_row", [0, 1, 2])
def test_not_a_number_never_proves(bad_row: int) -> None:
    def spoiling(x: torch.Tensor) -> torch.Tensor:
        y = linear(x)
        if len(y) > 1:
            y[bad_row] = NAN
        return y

    executor, model = Executor(), Model(spoiling)
    calls = [call_of(model, x) for x in rows(3)]
    check(executor, calls, singly(model, calls))
    assert executor.verdicts.modes == {"transformer": "interleave"}


@pytest.mark.parametrize("error", [RuntimeError("no"), IndexError("no"), TypeError("no")])
def test_merged_forward_that_raises_is_interleaved_from_the_first(error: Exception) -> None:
    def picky(x: torch.Tensor) -> torch.Tensor:
        if len(x) > 1:
            raise error
        return linear(x)

    executor, model = Executor(), Model(picky)
    calls = [call_of(model, x) for x in rows(3)]
    check(executor, calls, singly(model, calls))
    assert executor.verdicts.modes == {"transformer": "interleave"}


def test_merged_forward_that_raises_later_is_run_call_by_call_and_refused() -> None:
    limit = [10.0]

    def picky(x: torch.Tensor) -> torch.Tensor:
        if len(x) > 1 and float(x.sum()) > limit[0]:
            raise RuntimeError("too much at once")
        return linear(x)

    executor, model = Executor(), Model(picky)
    limit[0] = 1e9
    proved(executor, model, num_calls=2)
    limit[0] = 10.0
    calls = [call_of(model, x) for x in rows(2, start=20)]
    check(executor, calls, singly(model, calls))
    assert executor.merge_key(calls[0]) is None


def raised(outcome: Outcome) -> BaseException:
    assert isinstance(outcome, Raised)
    return outcome.error


def test_only_the_culprit_of_a_merged_forward_fails() -> None:
    def picky(x: torch.Tensor) -> torch.Tensor:
        if (x < 0).any():
            raise ValueError("negative")
        return linear(x)

    executor, model = Executor(), Model(picky)
    proved(executor, model)
    xs = rows(3)
    calls = [call_of(model, x) for x in (xs[0], -xs[1], xs[2])]

    outcomes = together(executor, calls).outcomes

    assert str(raised(outcomes[1])) == "negative"
    torch.testing.assert_close(values([outcomes[0], outcomes[2]]), [linear(xs[0]), linear(xs[2])])
    assert model.batches == [3, 1, 1, 1]
    # It was the call, not the merging.
    assert together(executor, [call_of(model, x) for x in xs]).is_merged


def test_call_that_fails_during_a_proof_is_its_own_outcome() -> None:
    def picky(x: torch.Tensor) -> torch.Tensor:
        if (x < 0).any():
            raise ValueError("negative")
        return linear(x)

    executor, model = Executor(), Model(picky)
    xs = rows(3)
    outcomes = together(executor, [call_of(model, x) for x in (xs[0], -xs[1], xs[2])]).outcomes
    assert str(raised(outcomes[1])) == "negative"
    torch.testing.assert_close(values([outcomes[0], outcomes[2]]), [linear(xs[0]), linear(xs[2])])
    proved(executor, model)


class Cramped:
    """A device with memory for some rows; the host if torch says it in words only."""

    def __init__(self, max_rows: int, *, is_host: bool = False) -> None:
        self.max_rows = max_rows
        self.is_host = is_host

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.max_rows:
            if self.is_host:
                torch.empty(10**15)
            raise torch.OutOfMemoryError("no room")
        return linear(x)


@pytest.mark.parametrize("is_host", [False, True])
def test_out_of_memory_splits_the_batch_and_the_next_are_split_before(is_host: bool) -> None:
    executor, model = Executor(), Model(Cramped(2, is_host=is_host))
    proved(executor, model, num_calls=2)
    for batches, is_timed in (([4, 2, 2], False), ([2, 2], True), ([2, 2], True)):
        model.batches.clear()
        calls = [call_of(model, x) for x in rows(4, start=10)]
        expected = [linear(call.args[0]) for call in calls]
        tick = check(executor, calls, expected)
        assert (tick.is_merged, tick.is_timed) == (True, is_timed)
        assert model.batches == batches
    assert not executor.verdicts.refused


def test_memory_that_is_free_again_is_used_after_a_while() -> None:
    function = Cramped(2)
    executor, model = Executor(), Model(function)
    proved(executor, model, num_calls=2)
    calls = [call_of(model, x) for x in rows(4)]
    together(executor, calls)
    function.max_rows = 4
    for _ in range(RECHECK_EVERY):
        together(executor, calls)
    assert model.batches[-1] == 4


def test_after_too_little_memory_for_a_proof_the_next_has_half_of_the_calls() -> None:
    executor, model = Executor(), Model(Cramped(2))
    calls = [call_of(model, x) for x in rows(4)]
    expected = [linear(call.args[0]) for call in calls]
    for _ in range(2):
        assert not check(executor, calls, expected).is_merged
    assert executor.verdicts.modes == {"transformer": "merge"}
    assert check(executor, calls, expected).is_merged
    assert model.batches[-2:] == [2, 2]


def test_calls_that_memory_has_no_room_for_two_of_are_interleaved() -> None:
    executor, model = Executor(), Model(Cramped(1))
    calls = [call_of(model, x) for x in rows(3)]
    for _ in range(2):
        outcomes = executor.run(calls).outcomes
        torch.testing.assert_close(values(outcomes), singly(model, calls))
    assert executor.merge_key(calls[0]) is None


def test_out_of_memory_with_one_row_fails_its_call_only() -> None:
    function = Cramped(1)
    executor, model = Executor(), Model(function)
    function.max_rows = 4
    proved(executor, model, num_calls=2)
    function.max_rows = 1
    big = call_of(model, torch.ones(2, 4))
    small = call_of(model, rows(1)[0])
    outcomes = together(executor, [big, small]).outcomes
    assert isinstance(raised(outcomes[0]), torch.OutOfMemoryError)
    torch.testing.assert_close(values([outcomes[1]]), [linear(rows(1)[0])])


def test_error_of_a_call_keeps_nothing_that_its_forward_allocated() -> None:
    activations: list[weakref.ref[torch.Tensor]] = []

    def fails(x: torch.Tensor) -> torch.Tensor:
        activation = x + 1
        activations.append(weakref.ref(activation))
        raise torch.OutOfMemoryError("so large")

    outcome = Executor().run([call_of(Model(fails), rows(1)[0])]).outcomes[0]
    assert isinstance(raised(outcome), torch.OutOfMemoryError)
    assert activations[0]() is None


class TestRagged:
    """A model that takes a list of samples and pads them itself."""

    @staticmethod
    def model(xs: list[torch.Tensor]) -> list[torch.Tensor]:
        padded = torch.nn.utils.rnn.pad_sequence(xs, batch_first=True)
        return [y[: len(x)] for x, y in zip(xs, linear(padded), strict=True)]

    def calls(self, model: Model, *lengths: int) -> list[Call]:
        return [call_of(model, [torch.linspace(n, n + 1, 4 * n).reshape(n, 4)]) for n in lengths]

    @pytest.fixture
    def executor(self) -> Executor:
        executor = Executor()
        arguments: Any = {(0, 0): Batched(None, 1)}
        key = axes_key(self.calls(Model(self.model), 1)[0])
        executor.verdicts.axes[key] = CallAxes(arguments, {(): Batched(None, 1)})
        return executor

    def test_samples_of_different_sizes_share_a_forward(self, executor: Executor) -> None:
        model = Model(self.model)
        for lengths, is_merged in (((2, 3, 5), False), ((7, 2, 1), True)):
            calls = self.calls(model, *lengths)
            assert check(executor, calls, singly(model, calls)).is_merged is is_merged

    def test_proof_with_equal_sizes_does_not_cover_different_ones(self, executor: Executor) -> None:
        model = Model(self.model)
        for lengths, is_merged in (((2, 2), False), ((3, 3), True), ((2, 3), False), ((5, 3), True)):
            calls = self.calls(model, *lengths)
            assert check(executor, calls, singly(model, calls)).is_merged is is_merged

    def test_model_that_needs_equal_sizes_gets_them(self, executor: Executor, caplog: pytest.LogCaptureFixture) -> None:
        model = Model(lambda xs: list(linear(torch.stack(xs))))
        calls = self.calls(model, 2, 3, 2)
        check(executor, calls, singly(model, calls))
        assert "merged only with equal shapes of 0: the merged forward raised RuntimeError" in caplog.text
        assert executor.merge_key(calls[0]) == executor.merge_key(calls[2]) != executor.merge_key(calls[1])
        for is_merged in (False, True):
            calls = self.calls(model, 2, 2)
            assert check(executor, calls, singly(model, calls)).is_merged is is_merged

    def test_time_is_that_of_the_largest(self, executor: Executor) -> None:
        def model(xs: list[torch.Tensor]) -> list[torch.Tensor]:
            return [x * 2 for x in xs]

        calls = [call_of(Model(model), [torch.ones(1, n)]) for n in (2, 9, 4)]
        assert together(executor, calls).cost_key == calls[1].cost_key


class TestBatchGlobalBranches:
    """A model that asks of a whole batch whether it was given an image, as HunyuanVideo 1.5 does."""

    @staticmethod
    def model(x: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return linear(x) if torch.all(image == 0) else linear(x) + 1

    def calls(self, model: Model, *images: float) -> list[Call]:
        xs = rows(len(images))
        return [call_of(model, x, torch.full((1, 3), image)) for x, image in zip(xs, images, strict=True)]

    def test_first_mixture_is_split_by_it(self) -> None:
        executor, model = Executor(), Model(self.model)
        calls = self.calls(model, 0.0, 1.0, 2.0, 0.0)
        check(executor, calls, singly(model, calls))
        without, one, two, also_without = (executor.merge_key(call) for call in calls)
        assert without == also_without != one == two

    def test_proof_without_zeros_does_not_cover_them(self) -> None:
        executor, model = Executor(), Model(self.model)
        for images in ((1.0, 2.0), (3.0, 4.0), (5.0, 0.0), (0.0, 0.0), (0.0, 0.0), (6.0, 0.0)):
            calls = self.calls(model, *images)
            torch.testing.assert_close(values(executor.run(calls).outcomes), singly(model, calls))
        assert executor.verdicts.modes == {"transformer": "merge"}

    def test_model_that_does_not_ask_merges_them(self) -> None:
        executor, model = Executor(), Model(lambda x, image: linear(x) + image.mean(1, keepdim=True))
        for is_merged in (False, True):
            calls = self.calls(model, 0.0, 1.0, 0.0)
            assert check(executor, calls, singly(model, calls)).is_merged is is_merged


class TestRandomNumbers:
    def calls(self, model: nn.Module) -> list[Call]:
        return [call_of(model, x) for x in rows(2)]

    def test_model_that_draws_from_the_global_generator_is_interleaved(self, caplog: pytest.LogCaptureFixture) -> None:
        executor, calls = Executor(), self.calls(nn.Dropout(0.5))
        expected = []
        for call in calls:
            torch.manual_seed(0)
            expected += singly(Model(nn.Dropout(0.5)), [call])
        assert values(together(executor, calls).outcomes)[1].equal(expected[1])
        assert executor.merge_key(calls[0]) is None
        assert "it draws from the global random number generator" in caplog.text

    def test_model_with_a_generator_of_its_own_is_not_taken_for_one(self) -> None:
        executor, model = Executor(), Model(lambda x: linear(x) + torch.rand(4, generator=torch.Generator()))
        proved(executor, model)


class TestRecheck:
    def test_one_merged_tick_in_a_thousand_is_checked(self) -> None:
        executor, model = Executor(), Model(linear)
        proved(executor, model, num_calls=2)
        calls = [call_of(model, x) for x in rows(2)]
        for _ in range(2 * RECHECK_EVERY):
            together(executor, calls)
        assert len(model.batches) == 2 * (RECHECK_EVERY - 1) + 2 * 4
        assert model.batches[RECHECK_EVERY - 1 :][:4] == [1, 1, 2, 2]

    def test_single_forwards_win_and_merging_ends_with_one_line(self, caplog: pytest.LogCaptureFixture) -> None:
        is_broken = [False]
        executor = Executor()
        model = Model(lambda x: linear(x) + 1.0 * (is_broken[0] and len(x) > 1))
        proved(executor, model, num_calls=2)
        calls = [call_of(model, x) for x in rows(2)]
        for _ in range(RECHECK_EVERY - 1):
            together(executor, calls)
        is_broken[0] = True
        tick = check(executor, calls, singly(model, calls))
        assert not tick.is_merged
        assert executor.merge_key(calls[0]) is None
        assert len(caplog.records) == 1
        assert "interleaved, not merged: merged results differ by" in caplog.text


def test_form_that_never_merges_is_not_tried_with_every_new_size(caplog: pytest.LogCaptureFixture) -> None:
    executor, model = Executor(), Model(lambda x: x - x.mean(0))
    for size in range(2, 9):
        calls = [call_of(model, torch.rand(1, size)) for _ in range(2)]
        executor.run(calls)
    assert max(index for index, rows in enumerate(model.batches) if rows > 1) < 3 * 6
    assert len(caplog.records) == 1


def test_a_call_with_several_rows_merges_with_one_of_one_row() -> None:
    executor, model = Executor(), Model(linear)
    xs = [torch.rand(2, 4), torch.rand(1, 4), torch.rand(3, 4)]
    for _ in range(2):
        tick = check(executor, [call_of(model, x) for x in xs], [linear(x) for x in xs])
    assert tick.is_merged
    assert model.batches[-1] == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_merging_is_proved_in_every_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64, dtype=dtype)
    executor, model = Executor(), Model(lambda x: torch.nn.functional.silu(x @ weight))
    for _ in range(2):
        tick = together(executor, [call_of(model, torch.randn(1, 64, dtype=dtype)) for _ in range(4)])
    assert tick.is_merged


def test_model_whose_error_is_too_large_is_interleaved() -> None:
    """A batch that is off by a thousandth would show in a picture after fifty steps."""
    executor, model = Executor(), Model(lambda x: linear(x) * (1 + 1e-3 * (torch.arange(len(x)) > 0).unsqueeze(1)))
    calls = [call_of(model, x) for x in rows(2)]
    together(executor, calls)
    assert executor.verdicts.modes == {"transformer": "interleave"}


def test_each_mixture_of_gradients_runs_by_itself() -> None:
    executor, model = Executor(), Model(linear)
    one = call_of(model, rows(1)[0])
    other = Call("request", "transformer", model, "forward", one.args, {}, one.context.__class__(True, (), *_rest(one)))
    assert executor.merge_key(one) != executor.merge_key(other)
    assert axes_key(one) == axes_key(other)


def _rest(call: Call) -> tuple[Any, Any]:
    return call.context.default_device, call.context.cache


class Settled(HostClock):
    """Says how often somebody waited for all that the device has to do."""

    num_settled = 0

    def settle(self) -> None:
        self.num_settled += 1


def test_failed_call_is_to_blame_only_if_the_device_is_fine() -> None:
    clock = Settled()
    executor = Executor(clock=clock)
    executor.run([call_of(Model(linear), rows(1)[0])])
    assert clock.num_settled == 0
    executor.run([call_of(Model(lambda x: x[:, 9]), rows(1)[0])])
    assert clock.num_settled == 1
