from collections import Counter

import pytest

from engine.calls import LinearCost
from sgld.engine.cost import CostModel
from sgld.engine.demand import MAX_PROFILES, CallClass, Demand, Profiles, demand_of
from sgld.sampling_params import SamplingParams, TaylorCache

CALLS: Counter[CallClass] = Counter({("denoise", "c", 1): 20, ("decode", "d", 1): 1})


def test_demand_holds_what_is_asked() -> None:
    demand = demand_of(SamplingParams(priority=3, deadline_s=9.5))
    assert (demand.priority, demand.deadline_s, demand.work) == (3, 9.5, None)


def test_work_is_pixels_times_steps_where_both_were_chosen() -> None:
    assert demand_of(SamplingParams(width=64, height=32, num_inference_steps=10)).work == 64 * 32 * 10
    assert demand_of(SamplingParams(width=64, height=32, num_frames=5, num_inference_steps=2)).work == 64 * 32 * 10
    assert demand_of(SamplingParams(width=64, num_inference_steps=10)).work is None


def test_requests_are_alike_whatever_their_prompts_and_seeds() -> None:
    one = SamplingParams(prompt="a", seed=1, priority=2, diffusers_kwargs={"a": 1})
    same = SamplingParams(prompt="b", seed=2, deadline_s=3.0, diffusers_kwargs={"a": 2})
    assert demand_of(one).like == demand_of(same).like


@pytest.mark.parametrize(
    "other",
    [
        {"width": 64},
        {"num_frames": 9},
        {"num_inference_steps": 9},
        {"guidance_scale": 1.0},
        {"negative_prompt": "a"},
        {"image_path": ("a.png",)},
        {"diffusers_kwargs": {"a": 1}},
        {"cache": TaylorCache()},
    ],
)
def test_requests_of_other_shapes_are_not_alike(other: dict[str, object]) -> None:
    assert demand_of(SamplingParams(**other)).like != demand_of(SamplingParams()).like  # type: ignore[arg-type]


def test_times_are_those_of_the_calls_that_were_made() -> None:
    profiles = Profiles(LinearCost(by_key={"c": 0.5, "d": 4.0}))
    demand = Demand(like="a", work=100.0)
    assert (profiles.known_s(demand), profiles.total_s(demand), profiles.tail_s(demand)) == (None, None, 0.0)
    profiles.learn(demand, CALLS)
    assert (profiles.known_s(demand), profiles.total_s(demand), profiles.tail_s(demand)) == (14.0, 14.0, 4.0)


def test_unknown_requests_are_priced_by_the_nearest_in_proportion() -> None:
    profiles = Profiles(LinearCost(by_key={"c": 0.5, "d": 4.0}))
    profiles.learn(Demand(like="small", work=1.0), Counter({("denoise", "c", 1): 2}))
    profiles.learn(Demand(like="large", work=100.0), CALLS)
    new = Demand(like="new", work=50.0)
    assert (profiles.known_s(new), profiles.total_s(new), profiles.tail_s(new)) == (None, 7.0, 2.0)
    assert profiles.total_s(Demand(like="no work")) is None


def test_times_follow_the_cost_model() -> None:
    cost = CostModel()
    profiles = Profiles(cost)
    profiles.learn(Demand(), Counter({("denoise", "c", 1): 20}))
    assert profiles.total_s(Demand()) is None
    cost.observe("c", 1, 0.5)
    assert profiles.total_s(Demand()) == 10.0


def test_requests_that_were_not_seen_for_long_are_forgotten() -> None:
    profiles = Profiles(LinearCost())
    for index in range(MAX_PROFILES + 1):
        profiles.learn(Demand(like="first"), CALLS)
        profiles.learn(Demand(like=str(index)), CALLS)
    assert profiles.known_s(Demand(like="first")) is not None
    assert profiles.known_s(Demand(like="0")) is None
    assert len(profiles.learned()) == MAX_PROFILES
