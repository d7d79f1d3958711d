"""Trees on their way between ranks."""

from dataclasses import dataclass

import pytest
import torch

from sgld.worker.wire import Unsendable, packed, unpacked

CPU = torch.device("cpu")


@dataclass
class Output:
    sample: torch.Tensor


def test_tree_arrives_as_it_was() -> None:
    whole = torch.arange(1000.0)
    tree = ((whole[:4], None), {"scale": 2.5, "size": torch.Size([2]), "made": Output(whole[4:6])})
    parcel, buffer = packed(tree, CPU)
    (first, nothing), named = unpacked(parcel, buffer, CPU)
    assert torch.equal(first, whole[:4])
    assert nothing is None
    assert named["scale"] == 2.5
    assert torch.equal(named["made"].sample, whole[4:6])


def test_view_of_a_large_tensor_is_sent_without_the_rest() -> None:
    parcel, _ = packed(torch.zeros(1000)[:2], CPU)
    assert parcel.tree.untyped_storage().nbytes() == 8


def test_generator_goes_on_from_where_it_is() -> None:
    """Stable Diffusion gives one to its VAE."""
    generator = torch.Generator().manual_seed(3)
    torch.rand(5, generator=generator)
    parcel, buffer = packed([generator], CPU)
    [there] = unpacked(parcel, buffer, CPU)
    assert there is not generator
    assert torch.equal(torch.rand(5, generator=there), torch.rand(5, generator=generator))


def test_what_has_a_state_cannot_be_sent() -> None:
    with pytest.raises(Unsendable, match="past is a object"):
        packed(((), {"past": object()}), CPU)


@pytest.mark.gpu
def test_tensors_of_a_gpu_are_one_buffer() -> None:
    device = torch.device("cuda", 0)
    tree = [torch.arange(3, device=device), torch.tensor(0.5, device=device), torch.tensor([True], device=device)]
    parcel, buffer = packed(tree, device)
    assert buffer is not None
    assert all(torch.equal(got, sent) for got, sent in zip(unpacked(parcel, buffer, device), tree, strict=True))
