import math
from typing import Any

import pytest

from sgld.errors import InvalidRequest
from sgld.sampling_params import MAX_NUMBER, LoraChoice, SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("guidance_scale", 1e300),
        ("flow_shift", math.inf),
        ("diffusers_kwargs", {"strength": math.nan}),
        ("lora", (LoraChoice(nickname="ink", alpha=1e39),)),
        ("diffusers_kwargs", {"strength": -1e39}),
        ("diffusers_kwargs", {"sigmas": [1.0, 10**39]}),
    ],
)
def test_numbers_that_no_tensor_holds_are_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=rf"{field} is .*: numbers may be up to 3\.4e\+38") as refused:
        SamplingParams(**{field: value})
    assert refused.value.param == field


def test_the_largest_number_is_taken() -> None:
    assert SamplingParams(guidance_scale=MAX_NUMBER).guidance_scale == MAX_NUMBER
