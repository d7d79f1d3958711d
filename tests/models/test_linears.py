from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sgld.models.linears import Activations, QuantizedLinear, for_int8_kernel, fp8_rows, int8_rows, quantized

ALL = [(bits, activations) for bits in ("fp8", "int8") for activations in ("full", "rows")]


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 33)


def rows(*shape: int) -> Tensor:
    """Rows of very different sizes: one scale for all of them would lose the small ones."""
    torch.manual_seed(1)
    return torch.randn(*shape) * torch.logspace(-4, 2, shape[-2]).unsqueeze(-1)


def off(result: Tensor, expected: Tensor) -> float:
    """How far the row that is furthest off is off, as part of it."""
    return float(((result - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


@pytest.mark.parametrize(("quantize", "error"), [(fp8_rows, 2**-4), (int8_rows, 0.5 / 127)])
def test_each_row_has_a_scale_of_its_own(quantize: Callable[[Tensor], tuple[Tensor, Tensor]], error: float) -> None:
    values = rows(6, 40)
    values[3] = 0
    codes, scale = quantize(values)
    restored = codes.float() * scale
    assert (codes.shape, scale.shape, scale.dtype) == (values.shape, (6, 1), torch.float32)
    assert torch.all((restored - values).abs() <= error * values.abs().amax(1, keepdim=True))
    assert torch.all(restored[3] == 0)


@pytest.mark.parametrize(("bits", "activations"), ALL)
@torch.no_grad()
def test_result_of_a_row_does_not_depend_on_its_batch(linear: nn.Linear, bits: str, activations: Activations) -> None:
    layer = quantized(linear, bits, activations)  # type: ignore[arg-type]
    x = rows(3, 7, 48)
    together = layer(x)
    for index in range(3):
        # The scales are the same bits; only the order of summation may differ, with the number of threads, too.
        assert off(layer(x[index : index + 1]), together[index : index + 1]) < 1e-6
    assert off(layer(x[:, 2]), together[:, 2]) < 1e-6


@pytest.mark.parametrize(("bits", "activations"), ALL)
@torch.no_grad()
def test_result_is_that_of_the_layer_up_to_rounding(linear: nn.Linear, bits: str, activations: Activations) -> None:
    layer = quantized(linear, bits, activations)  # type: ignore[arg-type]
    x = rows(2, 7, 48)
    expected = linear(x)
    error = (layer(x) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert 0 < error.max() < (0.06 if bits == "fp8" else 0.015)


@pytest.mark.parametrize("bits", ["fp8", "int8"])
@torch.no_grad()
def test_numbers_of_activations_in_eight_bits_are_those_of_their_codes(linear: nn.Linear, bits: str) -> None:
    layer = quantized(linear, bits, "rows")  # type: ignore[arg-type]
    x = rows(1, 5, 48)[0]
    codes, scale = (fp8_rows if bits == "fp8" else int8_rows)(x)
    expected = (codes.double() * scale) @ layer.weight.double().t() + linear.bias
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("num_rows", "num_in", "num_out"), [(1, 48, 32), (17, 45, 33), (64, 48, 32)])
def test_small_products_are_made_large_enough_for_the_kernel_of_int8(num_rows: int, num_in: int, num_out: int) -> None:
    torch.manual_seed(2)
    x, codes = torch.randint(-127, 128, (num_rows, num_in)), torch.randint(-127, 128, (num_out, num_in))
    large_x, large_codes = for_int8_kernel(x, codes)
    assert len(large_x) > 16
    assert not [n for n in (*large_codes.shape, large_x.shape[1]) if n % 8]
    assert torch.equal((large_x @ large_codes.t())[:num_rows, :num_out], x @ codes.t())
    if num_rows == 64:
        assert (large_x is x, large_codes is codes) == (True, True)


@torch.no_grad()
def test_static_scale_is_that_of_the_checkpoint(linear: nn.Linear) -> None:
    codes, scale = fp8_rows(linear.weight)
    layer = QuantizedLinear(codes, scale, None, activations="static", input_scale=torch.tensor(0.25))
    x = torch.tensor([[1.0, -0.3] * 24, [1000.0, 0] * 24])
    # Values beyond 448 scales are clamped, as no checkpoint has met them.
    seen = (x / 0.25).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.25
    assert seen[1, 0] == 112
    torch.testing.assert_close(layer(x), seen @ layer.weight.t())


@torch.no_grad()
def test_cast_and_move_leave_the_codes_alone(linear: nn.Linear) -> None:
    layer = quantized(linear, "fp8", "full")
    before = layer.weight.clone()
    model = nn.Sequential(layer).to(torch.bfloat16).to("cpu")
    assert (layer.codes.dtype, layer.scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert torch.equal(layer.weight, before)
    assert model(rows(2, 48).bfloat16()).dtype == torch.bfloat16
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16
    assert model.to("meta")[0].codes.device.type == "meta"


@pytest.mark.parametrize(("bits", "activations"), ALL)
@torch.no_grad()
def test_buffers_that_are_cast_by_force_lose_nothing(linear: nn.Linear, bits: str, activations: Activations) -> None:
    layer = quantized(linear, bits, activations)  # type: ignore[arg-type]
    x = rows(4, 48)
    expected = layer(x)
    for buffer in layer.buffers():
        buffer.data = buffer.float()
    assert torch.equal(layer(x), expected)


def test_layer_looks_like_a_linear_layer(linear: nn.Linear) -> None:
    layer = quantized(linear, "int8", "full")
    assert (layer.in_features, layer.out_features) == (48, 33)
    assert (layer.weight.dtype, layer.weight.shape) == (torch.float32, linear.weight.shape)
    assert sum(t.numel() * t.element_size() for t in layer.buffers()) == 48 * 33 + 4 * 33
