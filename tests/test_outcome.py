"""What comes of code that isn't ours."""

import weakref

import pytest

from sgld.errors import Cancelled
from sgld.outcome import Raised, Value, message_of, on_failure, one_line, outcome_of


class Large:
    """What a forward allocates."""


def test_work_returns_or_raises() -> None:
    assert outcome_of(lambda: 3) == Value(3)
    raised = outcome_of(lambda: 1 // 0)
    assert isinstance(raised, Raised)
    assert isinstance(raised.error, ZeroDivisionError)


def test_what_was_local_to_failed_work_is_gone() -> None:
    known: list[weakref.ref[Large]] = []

    def work() -> None:
        large = Large()
        known.append(weakref.ref(large))
        try:
            raise KeyError(1)
        except KeyError:
            raise ValueError(2)  # noqa: B904 - the error of another

    raised = outcome_of(work)
    assert isinstance(raised, Raised)
    assert known[0]() is None
    assert raised.error.__traceback__ is not None


def test_some_errors_are_the_callers() -> None:
    with pytest.raises(ZeroDivisionError):
        outcome_of(lambda: 1 // 0, passes=(ZeroDivisionError,))


def test_cancellation_is_caught_only_where_a_task_ends() -> None:
    def work() -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        outcome_of(work)
    assert isinstance(outcome_of(work, catches=BaseException), Raised)


def test_message_is_one_line() -> None:
    assert message_of(ValueError("a\n  b"), 2) == "a "
    assert message_of(ValueError("a\n  b")) == "a b"
    assert message_of(ValueError()) == "ValueError"


def test_what_was_begun_is_undone_only_on_failure() -> None:
    undone: list[str] = []
    with on_failure(lambda: undone.append("never")):
        pass
    with pytest.raises(Cancelled), on_failure(lambda: undone.append("once")):
        raise Cancelled
    assert undone == ["once"]


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("\n\n  first\nsecond"), "  first"), (KeyError(), "KeyError"), (OSError("one"), "one")],
)
def test_one_line_of_an_error(error: Exception, line: str) -> None:
    assert one_line(error) == line
