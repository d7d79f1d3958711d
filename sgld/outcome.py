"""The boundary to code that isn't ours, as pipelines, models, compilers and converters: it may raise anything.

Elsewhere errors of any kind are caught at the edges of HTTP and of the command line, and where what was begun is undone
by something that must be awaited.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True)
class Value(Generic[T_co]):
    """It returned this."""

    value: T_co


@dataclass(frozen=True)
class Raised:
    """It raised this."""

    error: BaseException


Outcome = Value[Any] | Raised


def outcome_of(
    work: Callable[[], T_co], *, catches: type[BaseException] = Exception, passes: tuple[type[Exception], ...] = ()
) -> Value[T_co] | Raised:
    """Do `work`, whatever comes of it; of what it raised nothing is held that was local there.

    :param passes: errors that are the caller's: they aren't caught.
    """
    try:
        return Value(work())
    except passes:
        raise
    except catches as error:
        forget_locals(error)
        return Raised(error)


@contextmanager
def on_failure(undo: Callable[[], object]) -> Iterator[None]:
    """Undo something if the block doesn't come to its end, whatever ends it."""
    try:
        yield
    except BaseException:
        undo()
        raise


def message_of(error: BaseException, max_chars: int | None = None) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return " ".join(str(error).split())[:max_chars] or type(error).__name__


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its type: what follows says what to do in the words of others."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def forget_locals(error: BaseException | None) -> None:
    """Clear the frames of an exception and of those that led to it; they still print."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
