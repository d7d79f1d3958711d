from typing import Any

import pytest

from sgld.config import ServerConfig
from sgld.errors import InvalidRequest
from sgld.sampling_params import SamplingParams
from sgld.server.limits import check_limits

CONFIG = ServerConfig(max_pixels=100, max_frames=5, max_steps=4, max_outputs=3, max_prompt_chars=10)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"width": 10, "height": 10},
        {"width": 10},
        {"num_frames": 5, "num_inference_steps": 4, "num_outputs_per_prompt": 3},
        {"prompt": "x" * 10, "negative_prompt": "x" * 10},
        {"diffusers_kwargs": {"sigmas": [1.0] * 4, "timesteps": None}},
    ],
)
def test_what_is_within_the_limits_passes(fields: dict[str, Any]) -> None:
    check_limits(SamplingParams(**fields), CONFIG)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"width": 10, "height": 11}, "width"),
        ({"height": 11}, "height"),
        ({"num_frames": 6}, "num_frames"),
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
