import pytest

from sgld.worker.graph_chain import chain


def test_what_is_in_order_already_stays_so() -> None:
    assert chain([3, 1, 2], [(3, 1), (1, 2)], ()) == [3, 1, 2]
    assert chain([1], [], ()) == [1]
    assert chain([], [], ()) == []


def test_ties_to_earlier_nodes_change_no_order() -> None:
    assert chain([1, 2, 3, 4], [(1, 2), (2, 3), (3, 4), (1, 3), (1, 4)], ()) == [1, 2, 3, 4]


def test_an_event_beside_a_node_comes_right_after_it() -> None:
    # A collective with an event, what comes after it, and another one.
    edges = [(1, 2), (2, 20), (2, 3), (3, 4), (20, 4), (4, 40)]
    assert chain([1, 2, 20, 3, 4, 40], edges, {20, 40}) == [1, 2, 20, 3, 4, 40]


def test_an_event_that_is_waited_for_comes_first() -> None:
    assert chain([1, 2, 10], [(1, 2), (10, 2)], {10}) == [10, 1, 2]


@pytest.mark.parametrize("events", [set[int](), {5}])
def test_nodes_that_run_beside_others_are_no_chain(events: set[int]) -> None:
    assert chain([1, 2, 3, 4, 5], [(1, 2), (1, 3), (2, 4), (3, 4), (1, 5)], events) is None
