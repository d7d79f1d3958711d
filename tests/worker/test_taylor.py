import pytest
import torch
from diffusers.hooks.taylorseer_cache import TaylorSeerState

from sgld.worker.taylor import TaylorSite, extrapolated, updated

PATH = (0,)


def expansion(outputs: dict[int, torch.Tensor], order: int) -> list[dict[tuple[str | int, ...], torch.Tensor]]:
    """After the steps with these outputs were computed."""
    factors: list[dict[tuple[str | int, ...], torch.Tensor]] = []
    steps = list(outputs)
    for before, step in zip([steps[0] - 1, *steps], steps, strict=False):
        factors = updated(factors, {PATH: outputs[step]}, step - before, order)
    return factors


def test_straight_lines_are_continued() -> None:
    line = {step: torch.tensor([2.0 * step, -step]) for step in (0, 1, 4)}
    torch.testing.assert_close(extrapolated(expansion(line, 1), 2)[PATH], torch.tensor([12.0, -6.0]))


def test_order_0_repeats_the_last_output() -> None:
    outputs = {step: torch.randn(3) for step in (0, 1)}
    assert torch.equal(extrapolated(expansion(outputs, 0), 2)[PATH], outputs[1])


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_expansion_is_that_of_diffusers(order: int) -> None:
    outputs = {step: torch.randn(2, 3) for step in (0, 1, 2, 5, 8)}
    state = TaylorSeerState(taylor_factors_dtype=torch.float32, max_order=order)
    for step, output in outputs.items():
        state.current_step = step
        state.update((output,))
    state.current_step = 10

    torch.testing.assert_close(extrapolated(expansion(outputs, order), 2)[PATH], state.predict()[0])


def test_no_more_outputs_are_kept_than_the_order_needs() -> None:
    assert len(expansion({step: torch.randn(2) for step in range(6)}, 2)) == 3


def test_what_the_pipeline_writes_to_a_result_is_not_continued() -> None:
    site, result = TaylorSite(1, 2, order=0), (torch.ones(2), None)
    site.note(result)
    result[0].mul_(5)

    first, second = site.predicted(), site.predicted()
    first[0].zero_()
    assert torch.equal(second[0], torch.ones(2))
    assert second[1] is None


@pytest.mark.parametrize("result", [(torch.ones(2), object()), (torch.ones(2, dtype=torch.long),)])
def test_what_is_not_numbers_is_not_continued(result: object) -> None:
    site = TaylorSite(1, 2)
    site.note(result)
    assert site.is_hopeless
