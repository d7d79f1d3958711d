from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.utils import BaseOutput
from torch import nn

from sgld.worker.calls import Call
from sgld.worker.executor import Executor, Tick, axes_key
from sgld.worker.task import Outcome, Raised, Value
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
    assert tick.elapsed_s > 0


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


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: y,
        lambda y: (y,),
        lambda y: [y, y + 1],
        lambda y: {"sample": y, "none": None},
        lambda y: Output(sample=y),
        lambda y: (y, (2 * y, None)),
    ],
)
def test_results_of_every_form_are_merged(wrap: Callable[[torch.Tensor], Any]) -> None:
    executor, model = Executor(), Model(lambda x: wrap(linear(x)))
    for start in (0, 10):
        calls = [call_of(model, x) for x in rows(3, start)]
        tick = together(executor, calls)
        for value, wanted in zip(values(tick.outcomes), singly(model, calls), strict=True):
            assert type(value) is type(wanted)
            torch.testing.assert_close(value, wanted)
    assert tick.is_merged


@pytest.mark.parametrize("wrap", [Plain, lambda y: (y, object()), lambda y: (y, y.mean()), lambda y: [*y]])
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

    def test_different_ids_are_never_merged(self) -> None:
        executor, model = Executor(), Model(self.model)
        calls = self.calls(model, [1.0, 2.0, 3.0])
        check(executor, calls, singly(model, calls))
        assert executor.verdicts.modes == {"transformer": "interleave"}
        assert executor.merge_key(calls[0]) is None

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
        assert executor.verdicts.refused == {}


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
    """A device with memory for some rows."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.max_rows:
            raise torch.OutOfMemoryError("no room")
        return linear(x)


def test_out_of_memory_splits_the_batch() -> None:
    executor, model = Executor(), Model(Cramped(2))
    proved(executor, model, num_calls=2)
    for num_calls, batches in ((4, [4, 2, 2]), (3, [3, 1, 2])):
        model.batches.clear()
        calls = [call_of(model, x) for x in rows(num_calls, start=10)]
        expected = [linear(call.args[0]) for call in calls]
        check(executor, calls, expected)
        assert model.batches == batches
    assert executor.verdicts.refused == {}


def test_after_too_little_memory_for_a_proof_the_next_has_half_of_the_calls() -> None:
    executor, model = Executor(), Model(Cramped(2))
    calls = [call_of(model, x) for x in rows(4)]
    expected = [linear(call.args[0]) for call in calls]
    for _ in range(2):
        assert not check(executor, calls, expected).is_merged
    assert executor.verdicts.modes == {"transformer": "merge"}
    assert check(executor, calls, expected).is_merged
    assert model.batches[-3:] == [4, 2, 2]


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


def test_time_of_a_tick_includes_the_wait_for_the_device() -> None:
    waited: list[int] = []
    executor = Executor(synchronize=lambda: waited.append(1))
    executor.run([call_of(Model(linear), rows(1)[0])])
    assert waited == [1]
