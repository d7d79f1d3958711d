"""The arithmetic of several GPUs."""

from typing import Any

import pytest

from sgld.fields import FieldError
from sgld.parallel import ParallelConfig


def test_one_gpu_shares_nothing() -> None:
    config = ParallelConfig()
    assert (config.num_ranks, config.cfg_degree, config.sp, config.ulysses, config.ring) == (1, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("choices", "problem"),
    [
        (
            {"num_gpus": 3, "enable_cfg_parallel": True},
            "num_gpus is 3: it must be a multiple of dp x cfg x tp = 1 x 2 x 1 = 2",
        ),
        ({"num_gpus": 4, "sp_degree": 2}, "num_gpus is 4: it must be dp x cfg x sp x tp = 1 x 1 x 2 x 1 = 2"),
        ({"num_gpus": 1, "sp_degree": 2}, "num_gpus is 1: it must be dp x cfg x sp x tp = 1 x 1 x 2 x 1 = 2"),
        ({"num_gpus": 8, "ulysses_degree": 2, "ring_degree": 2}, "dp x cfg x sp x tp = 1 x 1 x 4 x 1 = 4"),
        (
            {"num_gpus": 4, "ulysses_degree": 3},
            "num_gpus is 4: dp 1 x cfg 1 x tp 1 leaves 4 of them for sp, which must be ulysses x ring = 3 x 1 = 3",
        ),
        ({"sp_degree": 4, "ulysses_degree": 2, "ring_degree": 1}, "sp_degree is 4: it must be ulysses x ring = 2 x 1"),
        (
            {"num_gpus": 2, "ulysses_degree": 4},
            "num_gpus is 2: dp 1 x cfg 1 x tp 1 leaves 2 of them for sp, which must be ulysses x ring = 4 x 1 = 4",
        ),
        (
            {"num_gpus": 4, "ring_degree": 8},
            "num_gpus is 4: dp 1 x cfg 1 x tp 1 leaves 4 of them for sp, which must be ulysses x ring = 1 x 8 = 8",
        ),
        ({"num_gpus": 0}, ">= 1"),
        ({"num_gpus": 64_000}, "num_gpus is 64000: it must be at most 64"),
        ({"dp_size": 16, "tp_size": 8}, "num_gpus is 128: it must be at most 64"),
        ({"num_gpus": 6, "elastic_sp": True}, "each copy must have a power of two of GPUs, not 6 / dp 1 = 6"),
        (
            {"num_gpus": 4, "elastic_sp": True, "ring_degree": 2},
            "ring_degree is 2: with elastic_sp the degree is chosen",
        ),
        (
            {"num_gpus": 4, "elastic_sp": True, "enable_cfg_parallel": True},
            "enable_cfg_parallel is True: with elastic_sp",
        ),
    ],
)
def test_degrees_that_do_not_fit_are_refused_with_the_sum(choices: dict[str, Any], problem: str) -> None:
    with pytest.raises(FieldError, match=problem):
        ParallelConfig(**choices)


def test_elastic_ranks_of_each_copy_are_lanes_for_any_power_of_two() -> None:
    config = ParallelConfig(num_gpus=8, dp_size=2, elastic_sp=True)
    assert (config.num_ranks, config.num_lanes, config.degrees) == (4, 4, (1, 2, 4))
    assert config.layout == "8 = dp 2 x cfg 1 x sp 1 or 2 or 4 (elastic) x tp 1"
    static = ParallelConfig(num_gpus=4)
    assert (static.num_lanes, static.degrees) == (1, (4,))
