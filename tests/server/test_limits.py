from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sgld.config import ServerConfig
from sgld.errors import InvalidRequest
from sgld.messages import ModelInfo
from sgld.request import Limits
from sgld.sampling_params import SamplingParams
from sgld.server.limits import check_limits, check_sources

CONFIG = ServerConfig(max_pixels=100, max_frames=5, max_steps=4, max_outputs=3, max_prompt_chars=10)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"width": 10, "height": 10},
        {"width": 10},
        {"num_frames": 5, "num_inference_steps": 4, "num_outputs_per_prompt": 3},
        {
            "num_frames": 3,
            "enable_frame_interpolation": True,
            "width": 5,
            "enable_upscaling": True,
            "upscaling_scale": 2,
        },
        {"num_frames": 5, "frame_interpolation_exp": 4, "width": 10, "upscaling_scale": 8},
        {"prompt": "x" * 10, "negative_prompt": "x" * 10},
        {"diffusers_kwargs": {"sigmas": [1.0] * 4, "timesteps": None}},
    ],
)
def test_what_is_within_the_limits_passes(fields: dict[str, Any]) -> None:
    check_limits(SamplingParams(**fields), CONFIG)


MODEL = ModelInfo(
    model_path="m",
    pipeline_class="P",
    device="cpu",
    precisions={},
    fps=None,
    call_defaults={"width": 8, "height": 6, "num_frames": 3, "num_inference_steps": 4},
)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, None),
        ({"width": 17}, "width"),
        ({"enable_upscaling": True, "upscaling_scale": 2}, "width"),
        ({"enable_frame_interpolation": True}, None),
        ({"enable_frame_interpolation": True, "frame_interpolation_exp": 2}, "num_frames"),
        # As large as its picture: that is seen when it is made.
        ({"enable_upscaling": True, "upscaling_scale": 2, "image_path": ("a.png",)}, None),
    ],
)
def test_the_models_defaults_count_where_nothing_is_named(fields: dict[str, Any], param: str | None) -> None:
    problem = None
    try:
        check_limits(SamplingParams(**fields), CONFIG, MODEL)
    except InvalidRequest as error:
        problem = error.param
    assert problem == param


VIDEO = Limits(max_total_pixels=200, only_videos=True)


@pytest.mark.parametrize(
    ("fields", "makes_videos", "problem"),
    [
        ({}, True, None),
        ({"num_frames": 5}, True, "5 frames of 48 pixels each, and such a file has at most 4"),
        ({"num_frames": 5, "width": 10, "height": 4}, True, None),
        ({}, False, "makes no videos"),
        ({"num_frames": 1}, False, None),
    ],
)
def test_what_the_file_can_not_hold_is_refused(fields: dict[str, Any], makes_videos: bool, problem: str | None) -> None:
    model = msgspec.structs.replace(MODEL, makes_videos=makes_videos)
    refused = pytest.raises(InvalidRequest, match=problem) if problem else nullcontext()
    with refused:
        check_limits(SamplingParams(**fields), CONFIG, model, VIDEO)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"width": 10, "height": 11}, "width"),
        ({"height": 11}, "height"),
        ({"num_frames": 6}, "num_frames"),
        ({"num_frames": 3, "enable_frame_interpolation": True, "frame_interpolation_exp": 2}, "num_frames"),
        ({"width": 5, "height": 6, "enable_upscaling": True, "upscaling_scale": 2}, "width"),
        ({"num_inference_steps": 5}, "num_inference_steps"),
        ({"num_outputs_per_prompt": 4}, "n"),
        ({"prompt": "x" * 11}, "prompt"),
        ({"negative_prompt": "x" * 11}, "negative_prompt"),
        ({"diffusers_kwargs": {"timesteps": [1] * 5}}, "diffusers_kwargs"),
    ],
)
def test_what_is_above_names_its_field_and_the_limit(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest, match="at most") as caught:
        check_limits(SamplingParams(**fields), CONFIG)

    assert caught.value.param == param


@pytest.mark.parametrize(
    ("path", "refused"),
    [
        ("optical-flow", None),
        ("lanczos", None),
        ("ai-forever/Real-ESRGAN:RealESRGAN_x2.pth", None),
        ("elfgum/RIFE-4.22.lite", None),
        ("{}/open/a.pth", None),
        ("{}/a.pth", "in none of the folders"),
        ("{}/open/../a.pth", "in none of the folders"),
        ("{}/open/link.pth", "in none of the folders"),
        ("{}/open/missing.pth", "isn.t there"),
        ("somebody/weights", "--allow-filter-download"),
        ("https://a.example/a.pth", "can't name addresses"),
        ("s3://a/b", "can't name addresses"),
    ],
)
@pytest.mark.parametrize("field", ["frame_interpolation_model_path", "upscaling_model_path"])
async def test_weights_are_those_that_the_operator_allows(
    field: str, path: str, refused: str | None, tmp_path: Path
) -> None:
    (tmp_path / "open").mkdir()
    for name in ("a.pth", "open/a.pth"):
        (tmp_path / name).touch()
    (tmp_path / "open" / "link.pth").symlink_to(tmp_path / "a.pth")
    params = msgspec.structs.replace(SamplingParams(), **{field: path.format(tmp_path)})
    config = ServerConfig(allow_path=(str(tmp_path / "open"),))
    if refused is None:
        await check_sources(params, config)
        return
    with pytest.raises(InvalidRequest, match=refused) as caught:
        await check_sources(params, config)
    assert caught.value.param == field
    if "/" in path and refused.startswith("--"):
        await check_sources(params, ServerConfig(allow_filter_download=True))
