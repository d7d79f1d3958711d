"""What breaks naive merging, on tiny pipelines of diffusers: it is merged right, or not merged."""

from typing import Any

import pytest
import torch
from pipelines import build
from torch import nn

from sgld.testing import Report, run_together
from worker.requests import picture, request

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


@pytest.mark.parametrize("name", ["qwen_image", "z_image"])
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
