import pytest

from engine.calls import LinearCost, call
from sgld.engine.cost import Cost, CostModel
from sgld.engine.demand import Demand, Profiles, call_class
from sgld.engine.remaining import Tracked
from sgld.messages import CallInfo

COST = LinearCost(by_key={"encode": 3.0, "decode": 5.0, "step": 1.0, "control": 0.5})


def request() -> Tracked:
    return Tracked("a", 0, 0.0, Demand())


def remaining(tracked: Tracked, cost: Cost = COST, profiles: Profiles | None = None) -> float | None:
    tracked.update(cost, profiles or Profiles(cost))
    return tracked.remaining_s


def run(tracked: Tracked, *calls: CallInfo, step: int | None = None) -> None:
    for info in calls:
        tracked.pending(info)
        tracked.ran(info.id)
    if step is not None:
        tracked.stepped(step)


def encode() -> CallInfo:
    return call("a", kind="encode", cost_key="encode", num_steps=0)


def step_call(cost_key: str = "step", num_steps: int = 10, step: int = 0) -> CallInfo:
    return call("a", cost_key=cost_key, num_steps=num_steps, step=step)


def decode() -> CallInfo:
    return call("a", kind="decode", cost_key="decode")


def learned() -> Profiles:
    """Of one request: an encode call, ten steps of one call, a decode call."""
    profiles, whole = Profiles(COST), request()
    run(whole, encode())
    for step in range(10):
        run(whole, step_call(), step=step + 1)
    run(whole, decode())
    profiles.learn(whole.demand, whole.made)
    return profiles


def test_nothing_is_known_of_the_first_request_until_it_denoises() -> None:
    first = request()
    assert remaining(first) is None
    run(first, encode())
    assert remaining(first) is None
    first.pending(step_call())
    assert remaining(first) == 10.0


def test_whole_request_is_what_one_like_it_took() -> None:
    profiles, second = learned(), request()
    assert remaining(second, profiles=profiles) == 18.0
    run(second, encode())
    assert remaining(second, profiles=profiles) == 15.0
    second.pending(step_call())
    assert remaining(second, profiles=profiles) == 15.0


def test_decoding_is_left_after_the_steps() -> None:
    profiles, second = learned(), request()
    for step in range(10):
        run(second, step_call(), step=step + 1)
    assert remaining(second, profiles=profiles) == 5.0


def test_steps_of_a_request_count_more_than_those_of_others() -> None:
    profiles, second = learned(), request()
    second.pending(step_call(num_steps=4))
    assert remaining(second, profiles=profiles) == 4.0 + 5.0


def test_step_that_a_device_has_is_behind_its_request() -> None:
    """What is told of steps comes later than the calls that follow them."""
    ahead = request()
    for step in range(10):
        ahead.pending(waiting := step_call(step=step))
        assert remaining(ahead) == pytest.approx(10 - step)
        ahead.ran(waiting.id)
        if step:
            ahead.stepped(step)


def test_several_calls_in_a_step_are_added_up() -> None:
    guided = request()
    run(guided, step_call("control"), step_call(), step=1)
    assert remaining(guided) == pytest.approx(9 * 1.5)
    guided.pending(step_call("control"))
    guided.pending(step_call())
    assert remaining(guided) == pytest.approx(9 * 1.5)


def test_request_whose_steps_are_not_known_is_measured_by_the_last_one() -> None:
    profiles, second = learned(), request()
    run(second, encode(), step_call(num_steps=0))
    assert remaining(second, profiles=profiles) == 14.0


def test_calls_that_wait_are_left_at_least() -> None:
    profiles, second = learned(), request()
    for _ in range(20):
        run(second, step_call(num_steps=0))
    second.pending(step_call(num_steps=0))
    assert remaining(second, profiles=profiles) == 1.0


def test_restarted_request_has_everything_left() -> None:
    profiles, second = learned(), request()
    run(second, encode(), step_call(), step=1)
    second.restart()
    assert remaining(second, profiles=profiles) == 18.0
    assert not second.calls
    assert not second.made


def test_nothing_is_computed_again_without_news() -> None:
    cost, tracked = CostModel(), request()
    profiles = Profiles(cost)
    assert tracked.update(cost, profiles)
    assert not tracked.update(cost, profiles)
    cost.observe("step", 1, 1.0)
    assert tracked.update(cost, profiles)
    tracked.pending(step_call())
    assert tracked.update(cost, profiles)


def test_calls_that_were_made_are_counted() -> None:
    tracked, first, second = request(), step_call(), step_call()
    run(tracked, first, second, encode())
    assert tracked.made[call_class(first)] == 2
    assert tracked.made.total() == 3


def test_after_the_pipeline_calls_are_left_at_their_mean_cost() -> None:
    """Frames come between and are enlarged in turn."""
    cost = LinearCost(by_key={"step": 1.0, "decode": 5.0, "interpolator": 3.0, "upscaler": 1.0})
    tracked = request()
    run(tracked, step_call(num_steps=1), step=1)
    run(tracked, decode())
    assert remaining(tracked, cost) == 0.0
    for num_left, key in ((9, "upscaler"), (8, "interpolator"), (7, "upscaler"), (6, "interpolator")):
        run(tracked, call("a", kind="decode", cost_key=key))
        tracked.processed(num_left)
    assert remaining(tracked, cost) == 6 * 2.0
    tracked.restart()
    assert remaining(tracked, cost) is None
