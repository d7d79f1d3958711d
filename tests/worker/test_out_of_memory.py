import pytest
import torch

from sgld.worker.out_of_memory import is_out_of_memory, one_error

MORE_THAN_THERE_IS = 10**15


def test_other_errors_are_not_taken_for_missing_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes don't fit"))


def test_memory_of_the_host_is_missing_as_that_of_a_gpu_is() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="can't allocate memory"), one_error():
        torch.empty(MORE_THAN_THERE_IS)
    with pytest.raises(torch.OutOfMemoryError), one_error():
        bytearray(2**62)


def test_other_errors_stay_what_they_are() -> None:
    class OfCompiler(RuntimeError):
        pass

    for error in (
        RuntimeError("shapes don't fit"),
        OfCompiler("can't allocate memory"),
        torch.OutOfMemoryError("full"),
    ):
        with pytest.raises(type(error)) as raised, one_error():
            raise error
        assert raised.value is error
