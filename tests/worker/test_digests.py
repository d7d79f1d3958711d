from collections.abc import Callable

import pytest
import torch

from sgld.worker.digests import Digests


def of(digests: Digests, value: object) -> str:
    (found,) = digests.of(value)
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64])
def test_every_dtype_has_one(dtype: torch.dtype) -> None:
    one, other = torch.tensor([0, 1, 1]).to(dtype), torch.tensor([0, 1, 0]).to(dtype)
    digests = Digests()
    assert of(digests, one) == of(digests, one.clone()) != of(digests, other)


def test_complex_values_have_one() -> None:
    freqs = torch.polar(torch.ones(3), torch.arange(3.0))
    digests = Digests()
    assert of(digests, freqs) == of(digests, freqs.clone()) != of(digests, freqs.conj())


def test_strides_do_not_matter() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert of(Digests(), x.T) == of(Digests(), x.T.contiguous())


@pytest.mark.parametrize("empty", [torch.ones(0), torch.ones(2, 0)])
def test_empty_tensors_have_one(empty: torch.Tensor) -> None:
    assert of(Digests(), empty) == of(Digests(), empty.clone())


def test_tensor_that_was_written_to_has_another() -> None:
    digests, x = Digests(), torch.zeros(3)
    before = of(digests, x)
    x[1] = 1
    assert of(digests, x) != before


def test_tensor_of_inference_mode_that_was_written_to_has_another() -> None:
    with torch.inference_mode():
        digests, x = Digests(), torch.zeros(3)
        before = of(digests, x)
        x[1] = 1
        assert of(digests, x) != before


def test_objects_are_equal_to_themselves_only() -> None:
    digests, one, other = Digests(), object(), object()
    assert of(digests, one) == of(digests, one) != of(digests, other)


@pytest.mark.parametrize("shape", [(), (1,), (1, 2), (2, 0)])
def test_expanded_and_strange_shapes_have_one(shape: tuple[int, ...]) -> None:
    x = torch.ones(()).expand(shape) if 0 not in shape else torch.ones(shape)
    assert of(Digests(), x) == of(Digests(), x.clone())


def test_several_values_have_those_of_each_alone() -> None:
    values = [torch.ones(3), {"a": torch.zeros(2, dtype=torch.bfloat16), "b": 1}, "text", torch.ones(3)]
    digests = Digests()
    assert digests.of(*values) == [of(Digests(), value) for value in values]
    assert len(set(digests.of(*values))) == 3


class Transfers:
    """Counts what is read from the device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for name in ("cpu", "tolist"):
            monkeypatch.setattr(torch.Tensor, name, self._counting(getattr(torch.Tensor, name)))

    def _counting(self, function: Callable[[torch.Tensor], object]) -> Callable[[torch.Tensor], object]:
        def counting(tensor: torch.Tensor) -> object:
            self.count += 1
            return function(tensor)

        return counting


def test_what_is_unknown_is_read_in_one_transfer_and_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.full((n,), float(n % 2)) for n in range(1, 6)]
    digests, transfers = Digests(), Transfers(monkeypatch)
    for _ in range(2):
        digests.of(*tensors)
        assert transfers.count == 1
    for _ in range(2):
        assert digests.are_zero(*tensors) == [False, True, False, True, False]
        assert transfers.count == 2
    tensors[1][0] = 1
    assert digests.are_zero(*tensors) == [False, False, False, True, False]
