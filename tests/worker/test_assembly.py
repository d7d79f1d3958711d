"""What runs the components of a model is made as the config says."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sgld.config import EngineConfig
from sgld.models.load import LoadedModel
from sgld.parallel import ParallelConfig
from sgld.worker.assembly import runtime_of


@pytest.mark.parametrize("elastic", [True, False])
def test_graphs_free_the_host_where_forwards_run_side_by_side(elastic: bool) -> None:
    told: list[bool] = []

    def graphs_on(*_args: Any, frees_host: bool) -> None:
        told.append(frees_host)

    model = LoadedModel(SimpleNamespace(components={}), torch.device("cpu"), {}, "")
    parallel = ParallelConfig(num_gpus=2, elastic_sp=elastic, enable_cfg_parallel=not elastic)
    runtime_of(model, {}, EngineConfig(model_path="x", parallel=parallel), graphs_on=graphs_on)
    assert told == [elastic]
