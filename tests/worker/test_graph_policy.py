"""Which calls are captured, and what goes when memory is short."""

import pytest

from sgld.worker.graph_policy import CAPTURES_AFTER, Decision, GraphPolicy, is_worth_capturing, pays


def until_captured(policy: GraphPolicy[str], key: str) -> int:
    """How many uses of a key run eagerly before it is captured."""
    for num in range(100):
        if policy.decide(key) is Decision.CAPTURE:
            return num
    raise AssertionError("it is never captured")


def with_graphs(policy: GraphPolicy[str], *keys: str, size_bytes: int = 10, growth: int = 0) -> GraphPolicy[str]:
    """The policy after these keys were captured and proved."""
    for key in keys:
        until_captured(policy, key)
        assert policy.captured(key, size_bytes, growth) == []
        policy.proved(key)
    return policy


def test_a_key_is_captured_after_some_uses_then_compared_then_replayed() -> None:
    policy = GraphPolicy[str](1000)
    assert until_captured(policy, "a") == CAPTURES_AFTER - 1
    assert policy.captured("a", 10, 100) == []
    assert policy.decide("a") is Decision.COMPARE
    policy.proved("a")
    assert [policy.decide("a") for _ in range(3)] == [Decision.REPLAY] * 3
    assert (policy.size_bytes, policy.num_graphs) == (110, 1)
    assert policy.decide("b") is Decision.EAGER


def test_without_memory_nothing_is_captured() -> None:
    policy = GraphPolicy[str](0)
    assert {policy.decide("a") for _ in range(20)} == {Decision.EAGER}


def test_what_was_refused_runs_eagerly_for_good() -> None:
    policy = with_graphs(GraphPolicy[str](1000), "a", growth=100)
    policy.refuse("a")
    policy.refuse("b")
    assert {policy.decide(key) for key in "ab" * 20} == {Decision.EAGER}
    assert policy.size_bytes == 0


def test_the_graph_used_least_recently_goes_first() -> None:
    policy = with_graphs(GraphPolicy[str](35), "a", "b", "c")
    policy.decide("a")
    until_captured(policy, "d")
    assert policy.captured("d", 10, 0) == ["b"]
    assert policy.decide("b") is Decision.EAGER
    assert [policy.decide(key) for key in "acd"] == [Decision.REPLAY, Decision.REPLAY, Decision.COMPARE]


def test_a_key_that_lost_its_graph_waits_longer_for_the_next() -> None:
    policy = with_graphs(GraphPolicy[str](35), "a", "b", "c")
    until_captured(policy, "d")
    policy.captured("d", 10, 0)
    assert until_captured(policy, "a") == 2 * CAPTURES_AFTER - 1
    policy.captured("a", 10, 0)
    assert until_captured(policy, "b") == 2 * CAPTURES_AFTER - 1


def test_a_pool_that_is_too_large_goes_with_all_its_graphs() -> None:
    policy = with_graphs(GraphPolicy[str](1000), "a", "b", growth=400)
    until_captured(policy, "c")
    assert policy.captured("c", 10, 400) == ["a", "b", "c"]
    assert policy.size_bytes == 0
    assert until_captured(policy, "c") == 2 * CAPTURES_AFTER - 1


def test_what_has_no_room_alone_is_not_tried_again() -> None:
    policy = GraphPolicy[str](1000)
    until_captured(policy, "a")
    assert policy.captured("a", 10, 2000) == ["a"]
    assert {policy.decide("a") for _ in range(20)} == {Decision.EAGER}


def test_what_had_no_memory_is_tried_again_ever_later() -> None:
    policy = GraphPolicy[str](1000)
    waited = []
    for _ in range(3):
        waited.append(until_captured(policy, "a") + 1)
        policy.postpone("a")
    assert waited == [CAPTURES_AFTER, 2 * CAPTURES_AFTER, 4 * CAPTURES_AFTER]
    until_captured(policy, "a")
    assert policy.captured("a", 10, 0) == []
    policy.postpone("a")
    assert policy.num_graphs == 0


def test_what_is_outdated_is_forgotten_and_may_come_again() -> None:
    policy = with_graphs(GraphPolicy[str](1000), "a1", "b1")
    policy.refuse("a2")
    assert policy.forget(lambda key: key.startswith("a")) == ["a1"]
    assert policy.decide("b1") is Decision.REPLAY
    assert until_captured(policy, "a1") == until_captured(policy, "a2") == CAPTURES_AFTER - 1


def test_all_graphs_can_go_at_once() -> None:
    policy = with_graphs(GraphPolicy[str](1000), "a", "b", growth=5)
    assert policy.evict() == ["a", "b"]
    assert (policy.size_bytes, policy.evict()) == (0, [])


def test_keys_that_never_come_again_are_not_remembered_for_ever() -> None:
    policy = with_graphs(GraphPolicy[str](1000), "a")
    policy.decide("b")
    for num in range(5000):
        policy.decide(str(num))
    assert policy.decide("a") is Decision.REPLAY
    assert until_captured(policy, "b") == CAPTURES_AFTER - 1


@pytest.mark.parametrize(("launch_s", "total_s", "is_worth"), [(9.0, 10.0, True), (2.0, 10.0, False)])
def test_what_the_device_is_busy_with_is_not_worth_a_graph(launch_s: float, total_s: float, is_worth: bool) -> None:
    assert is_worth_capturing(launch_s, total_s) is is_worth


def test_a_graph_pays_if_it_saves_more_than_noise() -> None:
    assert pays(replay_s=0.5, eager_s=1.0)
    assert not pays(replay_s=0.99, eager_s=1.0)


def test_where_others_wait_for_the_host_a_graph_need_not_be_faster() -> None:
    assert is_worth_capturing(launch_s=0.06, total_s=0.4, frees_host=True)
    assert not is_worth_capturing(launch_s=0.005, total_s=0.4, frees_host=True)
    assert pays(replay_s=1.08, eager_s=1.0, frees_host=True)
    assert not pays(replay_s=1.11, eager_s=1.0, frees_host=True)
