"""Components are what they were, whatever a task did to them."""

from typing import Any

import torch
from pipelines import build
from torch import nn

from sgld.worker.snapshot import Snapshot


class Other(nn.Module):
    """A processor that is a module of its own."""


def test_processors_hooks_and_attributes_are_restored() -> None:
    pipeline, kwargs = build("sdxl")
    unet = pipeline.unet
    calls: list[int] = []
    before = {name: type(processor) for name, processor in unet.attn_processors.items()}
    snapshot = Snapshot(unet)

    unet.set_attn_processor(Other())
    unet.mid_block.register_forward_hook(lambda *_args: calls.append(1))
    unet.conv_in.note = "mine"
    snapshot.restore()

    assert {name: type(processor) for name, processor in unet.attn_processors.items()} == before
    assert not hasattr(unet.conv_in, "note")
    arguments: dict[str, Any] = kwargs | {"prompt": "a red cat", "num_inference_steps": 2, "output_type": "pt"}
    pipeline(**arguments, generator=torch.Generator().manual_seed(0))
    assert calls == []


def test_nothing_changes_where_nothing_was_changed() -> None:
    pipeline, _ = build("pixart")
    before = pipeline.transformer.state_dict().keys()
    Snapshot(pipeline.transformer).restore()
    assert pipeline.transformer.state_dict().keys() == before
