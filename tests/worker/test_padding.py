from typing import Any

import pytest
import torch

from sgld.worker.axes import Batched, CallAxes, Mask
from sgld.worker.batch import differing, merge_key, merged_tree
from sgld.worker.calls import Call
from sgld.worker.digests import Digests
from sgld.worker.padding import mask_of, padded, with_padding
from worker.requests import Doubling, call_of

X, TEXT, MASK = (1, "x"), (1, "text"), (1, "mask")
AXES = CallAxes({X: Batched(0, 1), TEXT: Batched(0, 1)}, {(): Batched(0, 1)})
WITH_MASK = CallAxes({**AXES.arguments, MASK: Batched(0, 1)}, AXES.results)
PADDED = CallAxes(AXES.arguments, AXES.results, {TEXT: 1}, {MASK: Mask(TEXT, torch.bool)})


def tree(rows: int, length: int, mask: Any = None, **more: Any) -> Any:
    return (), {"x": torch.ones(rows, 7), "text": torch.ones(rows, length, 3), "mask": mask, **more}


RIGHT = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_mask_that_a_pipeline_makes_for_two_lengths_is_learned(dtype: torch.dtype) -> None:
    learned = with_padding(AXES, tree(1, 2), tree(2, 4, RIGHT.to(dtype)))
    assert learned == CallAxes(AXES.arguments, AXES.results, {TEXT: 1}, {MASK: Mask(TEXT, dtype)})


def test_mask_that_is_always_given_is_padded_with_the_text() -> None:
    learned = with_padding(WITH_MASK, tree(1, 2, torch.ones(1, 2)), tree(2, 4, RIGHT))
    assert (learned.lengths, learned.masks) == ({TEXT: 1, MASK: 1}, {})


def test_text_without_a_mask_may_be_padded_if_a_proof_says_so() -> None:
    assert with_padding(AXES, tree(1, 2), tree(2, 4)).lengths == {TEXT: 1}


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),  # padded on the left
        torch.tensor([[0, 0, -1e9, -1e9], [0, 0, 0, 0]]),  # added to scores
        torch.ones(2, 4),  # it doesn't say where the padding is
    ],
)
def test_other_masks_are_not_understood(mask: torch.Tensor) -> None:
    assert with_padding(AXES, tree(1, 2), tree(2, 4, mask)) == AXES
    assert with_padding(WITH_MASK, tree(1, 2, torch.ones(1, 2)), tree(2, 4, mask)) == WITH_MASK


@pytest.mark.parametrize(
    "mixed",
    [
        tree(2, 2),
        tree(2, 1),
        ((), {"x": torch.ones(2, 7), "text": torch.ones(2, 4, 5)}),
        ((), {"x": torch.ones(2, 7), "text": torch.ones(2, 4)}),
        ((), {"x": torch.ones(2, 7)}),
        ((), {"x": torch.ones(2, 9), "text": torch.ones(2, 4, 3)}),  # what the model works on is longer
    ],
)
def test_pipelines_that_pad_to_one_length_or_otherwise_teach_nothing(mixed: Any) -> None:
    assert with_padding(AXES, tree(1, 2), mixed) == AXES


def call(length: int, rows: int = 1, fill: float = 1.0) -> Call:
    text = torch.full((rows, length, 3), fill)
    return call_of(Doubling(), x=torch.ones(rows, 7), text=text, mask=None)


def test_length_is_a_difference_and_not_in_the_key() -> None:
    calls = [call(2), call(4)]
    digests = Digests()
    assert len({merge_key(c, PADDED, (), digests) for c in calls}) == 1
    assert len({merge_key(c, PADDED, {(TEXT, "length")}, digests) for c in calls}) == 2
    assert len({merge_key(c, AXES, (), digests) for c in calls}) == 2
    assert differing(calls, PADDED, digests) == {(TEXT, "value"), (TEXT, "length")}


def test_texts_are_padded_and_the_mask_says_where() -> None:
    _, kwargs = merged_tree([call(2), call(4, rows=2, fill=2.0), call(1)], PADDED, ())
    assert kwargs["mask"].dtype == torch.bool
    assert kwargs["mask"].int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert kwargs["text"].shape == (4, 4, 3)
    assert torch.equal(kwargs["text"][:, :, 0].sum(1), torch.tensor([2.0, 8.0, 8.0, 1.0]))


def test_equal_lengths_have_no_mask() -> None:
    _, kwargs = merged_tree([call(3), call(3)], PADDED, ())
    assert kwargs["mask"] is None
    assert mask_of([torch.ones(1, 3)], 1, torch.bool) is None


def test_masks_are_padded_with_false() -> None:
    one, other = padded([torch.ones(1, 2, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)], 1)
    assert one.tolist() == [[True, True, False]]
    assert other.all()
