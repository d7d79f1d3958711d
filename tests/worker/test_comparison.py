"""How far results are from one another."""

from typing import Any

import pytest
import torch

from sgld.worker.comparison import relative_error


class TestRelativeError:
    def test_is_the_largest_over_the_tensors(self) -> None:
        expected = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0]), "n": None}
        result = {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([1.3]), "n": None}
        assert relative_error(result, expected) == pytest.approx(0.3)
        assert relative_error(expected, expected) == 0.0

    def test_is_nan_where_something_is_not_a_number(self) -> None:
        bad = [torch.tensor([float("nan")]), torch.ones(1)]
        good = [torch.ones(1), torch.ones(1)]
        for result, expected in ((bad, good), (good, bad), (bad[::-1], good)):
            assert relative_error(result, expected) != relative_error(result, expected)

    def test_is_infinite_for_another_shape(self) -> None:
        assert relative_error(torch.ones(2), torch.ones(3)) == float("inf")

    @pytest.mark.parametrize(
        "other", [(torch.ones(1), 3), (torch.ones(1), "2"), (2, torch.ones(1)), (torch.ones(1), None)]
    )
    def test_is_infinite_where_more_than_tensors_differs(self, other: Any) -> None:
        assert relative_error(other, (torch.ones(1), 2)) == float("inf")
        assert relative_error((torch.ones(1), 2), (torch.ones(1), 2)) == 0.0

    def test_of_zeros_is_zero_or_huge(self) -> None:
        assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
        assert relative_error(torch.ones(2), torch.zeros(2)) > 1e20

    def test_counts_whole_numbers_and_imaginary_parts(self) -> None:
        assert relative_error(torch.tensor([2]), torch.tensor([1])) == 1.0
        assert relative_error(torch.tensor([1 + 1j]), torch.tensor([1 + 0j])) == pytest.approx(1.0)
