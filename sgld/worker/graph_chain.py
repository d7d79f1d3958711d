"""Captured graphs as chains: what was launched in order is in order again, one node after the other.

NCCL ties each collective that is captured to the one before, with an event beside it. CUDA spreads a graph with
branches over its hardware queues, and what other streams are given then waits there for most of the graph, though the
device has room: on two H200s a small kernel waited for 106 of the 150 ms of a forward, for the same one as a chain 0.3.
"""

import ctypes
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

Node = int
Edge = tuple[Node, Node]
# CUgraphNodeType
_WAIT_EVENT, _EVENT_RECORD = 6, 7


def chain(nodes: Sequence[Node], edges: Iterable[Edge], events: Collection[Node]) -> list[Node] | None:
    """The nodes, each after all that it depends on; None: some of them run beside others.

    :param events: nodes that take no time, so these may be anywhere.
    """
    after: defaultdict[Node, list[Node]] = defaultdict(list)
    num_before = dict.fromkeys(nodes, 0)
    for first, second in edges:
        after[first].append(second)
        num_before[second] += 1
    ready = [node for node in nodes if not num_before[node]]
    order: list[Node] = []
    while ready:
        ready.sort(key=lambda node: node in events)
        if len(ready) > 1 and ready[-2] not in events and ready[-1] not in events:
            return None
        order.append(node := ready.pop())
        for other in after[node]:
            num_before[other] -= 1
            if not num_before[other]:
                ready.append(other)
    return order


def make_chain(graph: int) -> bool:
    """Have the nodes of a graph that isn't instantiated depend on one another in a chain; False: it stays as it is.

    :param graph: a cudaGraph_t.
    :raises RuntimeError: CUDA says no.
    """
    if (edges := edges_of(graph)) is None:
        return False
    kinds = _kinds(graph)
    events = {node for node, kind in kinds.items() if kind in (_WAIT_EVENT, _EVENT_RECORD)}
    if (order := chain(list(kinds), edges, events)) is None:
        return False
    links = set(pairwise(order))
    _change("cuGraphRemoveDependencies", graph, [edge for edge in edges if edge not in links])
    _change("cuGraphAddDependencies", graph, sorted(links.difference(edges)))
    return True


def edges_of(graph: int) -> list[Edge] | None:
    """Which nodes depend on which, the earlier one first; None: some let the next one begin before they are over."""
    num = ctypes.c_size_t()
    if _call("cuGraphGetEdges", ctypes.c_void_p(graph), None, None, ctypes.byref(num)):
        return None
    first, second = _array(num.value), _array(num.value)
    # Of such edges this one knows nothing, and says so.
    if _call("cuGraphGetEdges", ctypes.c_void_p(graph), first, second, ctypes.byref(num)):
        return None
    return list(zip(first, second, strict=True))


def _kinds(graph: int) -> dict[Node, int]:
    num = ctypes.c_size_t()
    _checked("cuGraphGetNodes", ctypes.c_void_p(graph), None, ctypes.byref(num))
    nodes, kind = _array(num.value), ctypes.c_int()
    _checked("cuGraphGetNodes", ctypes.c_void_p(graph), nodes, ctypes.byref(num))
    kinds = {}
    for node in nodes:
        _checked("cuGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(kind))
        kinds[node] = kind.value
    return kinds


def _change(name: str, graph: int, edges: Sequence[Edge]) -> None:
    if edges:
        first, second = (_array(len(edges), nodes) for nodes in zip(*edges, strict=True))
        _checked(name, ctypes.c_void_p(graph), first, second, ctypes.c_size_t(len(edges)))


def _array(num: int, nodes: Iterable[Node] = ()) -> Any:
    return (ctypes.c_void_p * num)(*nodes)


def _checked(name: str, *args: Any) -> None:
    if code := _call(name, *args):
        raise RuntimeError(f"{name} failed with CUDA error {code}")


def _call(name: str, *args: Any) -> int:
    return int(_driver()[name](*args))


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
