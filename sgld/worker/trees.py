"""Nested arguments and results of calls as trees: dicts, lists and tuples are nodes, everything else is a leaf.

Results may hold objects whose attributes are tensors, such as caches of keys and values; `opened` makes nodes of them.
"""

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Path = tuple[str | int, ...]
"""Where a leaf is: the keys and indexes on the way to it."""


@dataclass(frozen=True)
class Opened:
    """An object as a node: its class and its attributes. No dict, as classes of outputs take those apart."""

    kind: type
    attributes: dict[str, Any]


def leaves(tree: Any, stop: Container[Path] = (), path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every leaf with its path, in the order of the tree; a node at a path in `stop` counts as a leaf."""
    if path in stop:
        yield path, tree
    elif isinstance(tree, Opened):
        yield from leaves(tree.attributes, stop, path)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, stop, (*path, key))
    elif is_sequence(tree):
        for index, value in enumerate(tree):
            yield from leaves(value, stop, (*path, index))
    else:
        yield path, tree


def values(tree: Any) -> list[Any]:
    """Every leaf, in the order of the tree: `leaves` for who needs no paths, and many times faster."""
    found: list[Any] = []
    stack = [tree]
    while stack:
        node = stack.pop()
        node = node.attributes if isinstance(node, Opened) else node
        if isinstance(node, dict):
            stack.extend(reversed(node.values()))
        elif is_sequence(node):
            stack.extend(reversed(node))
        else:
            found.append(node)
    return found


def is_sequence(tree: Any) -> bool:
    """Whether this is a node that holds its children in order."""
    return isinstance(tree, list | tuple) and not isinstance(tree, torch.Size)


def rebuilt(tree: Any, replace: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """A new tree of the same shape and types.

    :param replace: gets the path and the value of every node and leaf, and returns the value that stands there
        instead, or the value itself to go on inside it.
    """
    new = replace(path, tree)
    if new is not tree:
        return new
    if isinstance(tree, Opened):
        return Opened(tree.kind, rebuilt(tree.attributes, replace, path))
    if isinstance(tree, dict):
        items = {key: rebuilt(value, replace, (*path, key)) for key, value in tree.items()}
        return items if type(tree) is dict else type(tree)(**items)
    if is_sequence(tree):
        values = [rebuilt(value, replace, (*path, index)) for index, value in enumerate(tree)]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return tree


def copied(tree: T) -> T:
    """The tree for one forward, with containers of its own: models take things out of the dicts that they are given."""
    return rebuilt(tree, lambda _path, value: value)  # type: ignore[no-any-return]


def clone(tree: Any) -> Any:
    """The tree with tensors of its own."""
    return rebuilt(tree, lambda _path, value: value.clone() if isinstance(value, torch.Tensor) else value)


def at(tree: Any, path: Path) -> Any:
    """The node or leaf at a path.

    :raises LookupError: there is none.
    """
    for key in path:
        tree = tree.attributes if isinstance(tree, Opened) else tree
        if not (isinstance(tree, dict) or is_sequence(tree)):
            raise LookupError(f"nothing at {path}")
        tree = tree[key]
    return tree


def opened(tree: Any, outer: frozenset[int] = frozenset()) -> Any:
    """The tree with its objects as nodes. An object that holds itself stays a leaf inside."""

    def open_(_path: Path, value: Any) -> Any:
        if not _is_object(value) or id(value) in outer:
            return value
        inside = outer | {id(value)}
        return Opened(type(value), {name: opened(child, inside) for name, child in vars(value).items()})

    return rebuilt(tree, open_)


def closed(tree: Any) -> Any:
    """The inverse of `opened`: new objects with these attributes."""

    def close(_path: Path, value: Any) -> Any:
        if not isinstance(value, Opened):
            return value
        made: Any = object.__new__(value.kind)
        vars(made).update(closed(value.attributes))
        return made

    return rebuilt(tree, close)


def _is_object(value: Any) -> bool:
    """Whether this is more than its value: it has attributes, and isn't a tensor, a node, a class or a function."""
    is_other = isinstance(value, torch.Tensor | dict | list | tuple | Enum | Opened) or callable(value)
    return hasattr(value, "__dict__") and not is_other
