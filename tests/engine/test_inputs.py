"""Pictures inside `diffusers_kwargs`: from JSON to the pipeline that takes them."""

import base64
from io import BytesIO
from typing import Any

import msgspec
import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.loaders.unet import UNet2DConditionLoadersMixin
from PIL import Image
from pipelines import build
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from engine.streams import completed, difference, events_of, params_of, plain
from sgld.config import EngineConfig
from sgld.engine.engine import Engine
from sgld.events import Failed
from sgld.sampling_params import SamplingParams
from sgld.testing import InlineReplica

CONFIG = EngineConfig(device="cpu", num_cpu_threads=1)


def painted(mode: str = "RGB", size: int = 32) -> Image.Image:
    rows, columns = np.mgrid[0:size, 0:size]
    picture = np.stack([rows * 8, columns * 8, (rows > columns) * 255], axis=-1).astype(np.uint8)
    return Image.fromarray(picture).convert(mode)


def reference(picture: Image.Image, **extra: str) -> dict[str, str]:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return {"$image": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(), **extra}


async def served(pipeline: Any, params: SamplingParams) -> Any:
    async with Engine(CONFIG, rank_factory=InlineReplica(pipeline)) as engine:
        return (await completed(engine, params)).frames


async def test_mask_chooses_the_inpainting_sibling() -> None:
    pipeline, _ = build("sdxl")
    mask = painted("L")
    params = params_of(
        {"image": reference(painted()), "mask_image": reference(mask, mode="L"), "strength": 0.9},
        height=32,
        width=32,
        num_inference_steps=4,
    )
    frames = await served(pipeline, params)
    expected = plain(
        StableDiffusionXLInpaintPipeline(**pipeline.components), _with(params, image=painted(), mask_image=mask)
    )
    assert difference(frames, expected) == 0
    assert difference(frames, plain(pipeline, params_of({}, height=32, width=32, num_inference_steps=4))) > 0


def _with(params: SamplingParams, **pictures: Any) -> SamplingParams:
    """The params that a pipeline itself gets: with pictures in the place of references."""
    return msgspec.structs.replace(params, diffusers_kwargs={**params.diffusers_kwargs, **pictures})


async def test_control_picture_is_decoded_before_the_pipeline_sees_it() -> None:
    pipeline, _ = build("sdxl")
    controlled = StableDiffusionXLControlNetPipeline(controlnet=_controlnet(pipeline), **_parts(pipeline))
    options = {"controlnet_conditioning_scale": 0.9, "original_size": [64, 48]}
    params = params_of({"image": reference(painted()), **options}, height=32, width=32)
    frames = await served(controlled, params)
    # A pair, which JSON doesn't have.
    known = _with(params, original_size=(64, 48))
    assert difference(frames, plain(controlled, _with(known, image=painted()))) == 0
    assert difference(frames, plain(controlled, _with(known, image=Image.new("RGB", (32, 32))))) > 0


async def test_ip_adapter_takes_a_list_of_pictures() -> None:
    pipeline = _with_ip_adapter(build("sdxl")[0])
    params = params_of({"ip_adapter_image": [reference(painted())]}, height=32, width=32)
    frames = await served(pipeline, params)
    assert difference(frames, plain(pipeline, _with(params, ip_adapter_image=[painted()]))) == 0
    assert difference(frames, plain(pipeline, _with(params, ip_adapter_image=[painted().rotate(90)]))) > 0


async def test_mask_without_a_picture_fails_its_request_alone() -> None:
    pipeline, kwargs = build("sdxl")
    async with Engine(CONFIG, rank_factory=InlineReplica(pipeline)) as engine:
        bad = params_of({"mask_image": reference(painted("L"))}, height=32, width=32)
        event = (await events_of(engine, bad))[-1]
        assert isinstance(event, Failed)
        assert event.code == "invalid_request"
        await completed(engine, params_of(kwargs))


def _parts(pipeline: Any) -> dict[str, Any]:
    return {name: part for name, part in pipeline.components.items() if name not in ("image_encoder",)}


def _controlnet(pipeline: Any) -> ControlNetModel:
    torch.manual_seed(1)
    controlnet = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(8, 8))
    # An untrained one adds nothing: its last layers are zero.
    for parameter in controlnet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return controlnet.eval()


def _with_ip_adapter(pipeline: Any) -> Any:
    """The pipeline with an image encoder and the random weights of an IP adapter."""
    torch.manual_seed(2)
    vision = CLIPVisionConfig(
        hidden_size=8, projection_dim=8, num_hidden_layers=1, num_attention_heads=2, image_size=32, intermediate_size=8
    )
    encoder = CLIPVisionModelWithProjection(vision).eval()
    processor = CLIPImageProcessor(crop_size=32, size=32)
    pipeline = StableDiffusionXLPipeline(
        **{**pipeline.components, "image_encoder": encoder, "feature_extractor": processor}
    )
    pipeline.set_progress_bar_config(disable=True)
    unet = pipeline.unet
    width = unet.config.cross_attention_dim
    weights = {
        "image_proj": {
            "proj.weight": torch.randn(4 * width, 8),
            "proj.bias": torch.randn(4 * width),
            "norm.weight": torch.ones(width),
            "norm.bias": torch.zeros(width),
        },
        "ip_adapter": {},
    }
    number = 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            hidden = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
            for kind in ("k", "v"):
                weights["ip_adapter"][f"{number}.to_{kind}_ip.weight"] = torch.randn(hidden, width)
            number += 2
    assert isinstance(unet, UNet2DConditionLoadersMixin)
    unet._load_ip_adapter_weights([weights])
    return pipeline
