import pytest

from sgld.engine.eta import BOUNDS, EtaErrors


def test_errors_are_relative_to_what_was_left() -> None:
    errors = EtaErrors()
    errors.told("a", "queued", 8.0, 100.0)
    errors.told("a", "halfway", 6.0, 106.0)
    errors.told("a", "halfway", 1.0, 109.0)
    errors.ended("a", 110.0, is_completed=True)
    queued, halfway = errors.statistics
    assert (queued.told, queued.num, halfway.told) == ("queued", 1, "halfway")
    assert [queued.error_sum, halfway.error_sum] == pytest.approx([0.2, 0.5])
    assert sum(halfway.buckets) == halfway.buckets[BOUNDS.index(0.5)] == 1


def test_requests_that_were_told_nothing_or_did_not_complete_do_not_count() -> None:
    errors = EtaErrors()
    errors.told("a", "queued", None, 100.0)
    errors.told("b", "queued", 5.0, 100.0)
    errors.ended("a", 101.0, is_completed=True)
    errors.ended("b", 101.0, is_completed=False)
    assert errors.statistics == ()


def test_error_beyond_all_bounds_is_in_the_last_bucket() -> None:
    errors = EtaErrors()
    errors.told("a", "started", 100.0, 0.0)
    errors.ended("a", 1.0, is_completed=True)
    assert errors.statistics[0].buckets[-1] == 1
