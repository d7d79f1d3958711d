"""What breaks naive merging, on tiny pipelines of diffusers: it is merged right, or not merged."""

from typing import Any

import pytest
import torch
from pipelines import build
from torch import nn

from sgld.testing import Report, run_together
from sgld.worker.axes import Batched, CallAxes
from sgld.worker.calls import Call
from sgld.worker.executor import Executor, single
from sgld.worker.verdicts import axes_key
from worker.requests import call_of, picture, request, values

Changes = list[dict[str, Any]]


class Forwards:
    """Counts the rows of each forward of a component."""

    def __init__(self, component: nn.Module) -> None:
        self.sizes: list[int] = []
        component.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.sizes.append(len([*args, *kwargs.values()][0]))


def served(name: str, changes: Changes, component: str) -> tuple[Report, Forwards]:
    """Requests with these changes served together; each must give the picture that it gives alone."""
    pipeline, kwargs = build(name)

    def calls() -> Changes:
        return [request(name, index, kwargs, **changed) for index, changed in enumerate(changes)]

    plain = [picture(pipeline(**call)) for call in calls()]
    forwards = Forwards(getattr(pipeline, component))
    report = run_together(pipeline, calls())
    for output, expected in zip(report.outputs, plain, strict=True):
        torch.testing.assert_close(picture(output), expected, rtol=0, atol=1e-5)
    return report, forwards


def test_different_sizes_prompts_and_guidance_of_z_image_share_forwards() -> None:
    changes: Changes = [
        {"height": 32, "width": 32},
        {"height": 48, "width": 32, "prompt": "a cat"},
        {"height": 32, "width": 64, "guidance_scale": 0.0},
        {"prompt": "the red sun over a green hill under the moon"},
    ]
    report, forwards = served("z_image", changes, "transformer")
    assert report.largest_batch == 4
    assert 2 + 2 + 1 + 2 in forwards.sizes


# As many tokens as words.
LENGTHS: Changes = [{}, {"prompt": "a cat"}, {"prompt": "a red cat on the moon under a green hill"}]


@pytest.mark.parametrize("name", ["qwen_image", "qwen_image_controlnet"])
def test_prompts_of_different_lengths_share_forwards_where_a_mask_makes_that_exact(name: str) -> None:
    report, _ = served(name, LENGTHS, "transformer")
    assert report.largest_batch == 3


@pytest.mark.parametrize("name", ["kandinsky_5_image", "bria_fibo"])
def test_prompts_of_different_lengths_share_none_where_padding_is_not_exact(name: str) -> None:
    assert served(name, LENGTHS, "transformer")[0].largest_batch == 1


def test_padding_without_a_mask_is_tried_once_and_refused_by_the_proof(caplog: pytest.LogCaptureFixture) -> None:
    """CogView 4 attends to whatever it is given."""
    pipeline, _ = build("cogview_4")
    model, executor = pipeline.transformer, Executor()
    sizes = torch.full((1, 2), 32.0)

    def calls(*lengths: int) -> list[Call]:
        torch.manual_seed(0)
        return [
            call_of(
                model,
                torch.rand(1, model.config.in_channels, 8, 8),
                torch.rand(1, length, model.config.text_embed_dim),
                torch.tensor([500.0]),
                sizes,
                sizes,
                torch.zeros(1, 2),
                return_dict=False,
            )
            for length in lengths
        ]

    one = calls(16)[0]
    arguments: Any = {(0, index): Batched(0, 1) for index in range(6)}
    executor.verdicts.axes[axes_key(one)] = CallAxes(arguments, {(0,): Batched(0, 1)}, {(0, 1): 1})
    mixed = calls(16, 32)
    assert executor.merge_key(mixed[0]) == executor.merge_key(mixed[1])
    outcomes = executor.run(mixed).outcomes
    torch.testing.assert_close(values(outcomes), values([single(call) for call in mixed]), rtol=0, atol=0)
    assert "merged only with equal length of 1: merged results differ" in caplog.text
    assert executor.merge_key(mixed[0]) != executor.merge_key(mixed[1])
    for is_merged in (False, True):
        assert executor.run(calls(32, 32)).is_merged is is_merged


@pytest.mark.parametrize("name", ["qwen_image", "z_image", "lumina2"])
def test_text_encoders_that_return_a_cache_share_forwards(name: str) -> None:
    _, forwards = served(name, [{}, {}, {}], "text_encoder")
    assert max(forwards.sizes) >= 3


def test_different_sizes_of_flux_never_share_a_forward() -> None:
    """As many tokens each, but other positions."""
    changes: Changes = [{"height": 16, "width": 32}, {"height": 32, "width": 16}] * 2
    report, forwards = served("flux", changes, "transformer")
    assert (max(forwards.sizes), report.mode) == (2, "merge")


def test_images_share_an_encoding() -> None:
    pipeline, kwargs = build("wan_i2v")
    encoded: list[int] = []
    encode = pipeline.vae.encode

    def counting(images: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        encoded.append(len(images))
        return encode(images, *args, **kwargs)

    pipeline.vae.encode = counting
    run_together(pipeline, [request("wan_i2v", index, kwargs) for index in range(3)])
    assert max(encoded) == 3
