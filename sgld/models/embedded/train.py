"""Trains the models that ship with the package, on scenes drawn by scenes.py.

python -m sgld.models.embedded.train image --out DIR --autoencoder-minutes 4 --reading-steps 3000 --minutes 15 --compile

A run that finds an autoencoder (or a whole pipeline) in DIR goes on from there; `--done-minutes` says how much of the
denoiser's time has passed. The shipped weights, on one H200 each:

- pictures: autoencoder 4 minutes, reading 0.5, denoiser 15.5 (37,900 steps);
- clips: autoencoder 5.5 minutes from that of an earlier run, reading 0.5, denoiser 10.1 (16,800 steps).
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from sgld.models.embedded import networks
from sgld.models.embedded.autoencoding import normalise_latents, train_autoencoder
from sgld.models.embedded.captions import build_tokenizer
from sgld.models.embedded.clock import Clock
from sgld.models.embedded.datasets import Bucket, Captioned, CaptionWriter, encode_bucket, pixel_batches, render_bytes
from sgld.models.embedded.denoising import Predict, compile_blocks, train_denoiser
from sgld.models.embedded.predictions import predict_image, predict_video, shorten_padding
from sgld.models.embedded.reading import train_reader
from sgld.models.embedded.scenes import draw_scenes
from sgld.models.embedded.whole_clips import residual_blocks, take_whole_clips

PREVIEW_PROMPTS = (
    "A beautiful sunset over the mountains",
    "the sea at night, the moon is rising",
    "a sunny day in the desert with cacti, clouds drifting to the right",
    "dawn over green hills with a house",
    "a red circle bouncing on a white background",
    "a small blue star moving to the left on black",
    "three small green triangles on a yellow background",
    "a red square above a blue heart",
)


@dataclass(frozen=True)
class Recipe:
    """What differs between the two models; sizes are (frames, height, width)."""

    kind: str
    build: Callable[[Any], tuple[nn.Module, nn.Module, nn.Module]]
    assemble: Callable[..., DiffusionPipeline]
    defaults: dict[str, float]
    predict: Predict
    # Each with its part of the scenes and its weight in training.
    sizes: tuple[tuple[tuple[int, int, int], float, float], ...]
    num_scenes: int
    pool_clips: int
    pool_frames: int
    window: int
    autoencoder_batch: int
    render_batch: int
    denoiser_batch: int


IMAGE = Recipe(
    kind="image",
    build=lambda tokenizer: (
        networks.image_autoencoder(),
        networks.image_text_encoder(tokenizer),
        networks.image_denoiser(),
    ),
    assemble=networks.image_pipeline,
    defaults=networks.IMAGE_DEFAULTS,
    predict=predict_image,
    sizes=(((1, 256, 256), 0.84, 0.84), ((1, 224, 288), 0.08, 0.08), ((1, 288, 224), 0.08, 0.08)),
    num_scenes=220_000,
    pool_clips=16_000,
    pool_frames=1,
    window=1,
    autoencoder_batch=48,
    render_batch=256,
    denoiser_batch=256,
)
VIDEO = Recipe(
    kind="video",
    build=lambda tokenizer: (
        networks.video_autoencoder(),
        networks.video_text_encoder(tokenizer),
        networks.video_denoiser(),
    ),
    assemble=networks.video_pipeline,
    defaults=networks.VIDEO_DEFAULTS,
    predict=predict_video,
    sizes=(((25, 128, 192), 1.0, 1.0),),
    num_scenes=32_000,
    pool_clips=2000,
    pool_frames=25,
    # As many frames as are generated: trained on fewer, the decoder drifts beyond them.
    window=17,
    autoencoder_batch=16,
    render_batch=24,
    denoiser_batch=160,
)


# What a trial run on a CPU uses instead of the recipe's numbers.
TRIAL: dict[str, Any] = {
    "num_scenes": 48,
    "pool_clips": 8,
    "autoencoder_batch": 2,
    "render_batch": 8,
    "denoiser_batch": 4,
}
COMPONENTS = ("vae", "text_encoder", "transformer")


def main() -> None:
    start_s = time.monotonic()
    arguments = _arguments()
    torch.manual_seed(arguments.seed)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    recipe = {"image": IMAGE, "video": VIDEO}[arguments.kind]
    if arguments.trial:
        recipe = replace(recipe, **TRIAL)
    writer = CaptionWriter(
        recipe.num_scenes, arguments.seed, moving=recipe.kind == "video", num_workers=arguments.workers
    )
    tokenizer = build_tokenizer()
    modules = recipe.build(tokenizer)
    load_weights(modules, arguments.out)
    if recipe.kind == "video":
        take_whole_clips(modules[0])
        if arguments.compile:
            compile_blocks(residual_blocks(modules[0]))
    generator = torch.Generator(arguments.device).manual_seed(arguments.seed)
    if arguments.autoencoder_minutes:
        _train_autoencoder(recipe, modules[0], generator, arguments.autoencoder_minutes * 60)
        save_modules(recipe, modules, tokenizer, arguments.out)
    captioned = writer.result()
    if arguments.reading_steps:
        text, batch_size = modules[1].to(arguments.device), recipe.denoiser_batch
        train_reader(text, captioned, width=networks.WIDTH, batch_size=batch_size, num_steps=arguments.reading_steps)
    buckets = _encode(recipe, modules[0], captioned, generator, arguments.encode_seconds)
    done_s = arguments.done_minutes * 60
    until_s = done_s + arguments.run_minutes * 60 - (time.monotonic() - start_s)
    total_s = until_s if arguments.minutes is None else arguments.minutes * 60
    clock = Clock(total_s, done_s=done_s, until_s=until_s)
    _train_denoiser(recipe, modules, buckets, clock, tokenizer.eos_token_id, arguments)
    print(f"denoiser trained for {clock.elapsed_s / 60:.2f} minutes in all", flush=True)
    pipeline = save_modules(recipe, modules, tokenizer, arguments.out)
    _preview(pipeline, recipe, arguments.out.with_suffix(".png"), arguments.device)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("image", "video"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--autoencoder-minutes", type=float, default=0.0, help="0 keeps the autoencoder found in OUT")
    parser.add_argument("--reading-steps", type=int, default=0, help="0 keeps the text encoder found in OUT")
    parser.add_argument("--minutes", type=float, help="of the denoiser, over all runs; by default until this run ends")
    parser.add_argument("--done-minutes", type=float, default=0.0, help="of these, in earlier runs")
    parser.add_argument("--run-minutes", type=float, default=1e9, help="of this run, all phases together")
    parser.add_argument("--encode-seconds", type=float, default=60.0, help="at most, for each size of picture")
    parser.add_argument("--workers", type=int, default=8, help="processes that write captions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of denoiser and video autoencoder")
    parser.add_argument("--trial", action="store_true", help="a few scenes only, to try the code")
    return parser.parse_args()


def load_weights(modules: Sequence[nn.Module], folder: Path) -> None:
    """Loads what the folder has of an earlier run."""
    for name, module in zip(COMPONENTS, modules, strict=True):
        for path in (folder / name).glob("*.safetensors"):
            missing = module.load_state_dict(load_file(path), strict=False).missing_keys
            # T5 stores its embedding once under another name.
            assert all("embed_tokens" in key for key in missing), missing
            print(f"goes on from {path}", flush=True)


def save_modules(recipe: Recipe, modules: Sequence[nn.Module], tokenizer: Any, folder: Path) -> DiffusionPipeline:
    """Saves copies in half precision and returns their pipeline; the modules stay as they are."""
    copies = recipe.build(tokenizer)
    for module, source in zip(copies, modules, strict=True):
        module.load_state_dict({name: value.cpu() for name, value in source.state_dict().items()})
    vae, text, denoiser = copies
    pipeline = recipe.assemble(vae, text, denoiser, tokenizer)
    networks.save_pipeline(pipeline, folder, recipe.defaults)
    return pipeline


def _train_autoencoder(recipe: Recipe, vae: Any, generator: torch.Generator, total_s: float) -> None:
    _, height, width = recipe.sizes[0][0]
    scenes = torch.tensor(draw_scenes(recipe.pool_clips, 1, moving=recipe.kind == "video"))
    pool = torch.cat(
        [
            render_bytes(rows, generator, num_frames=recipe.pool_frames, height=height, width=width)
            for rows in torch.split(scenes, recipe.render_batch)
        ]
    )
    device = generator.device.type
    batches = pixel_batches(pool, recipe.autoencoder_batch, recipe.window)
    train_autoencoder(vae, batches, Clock(total_s), device)
    some = pool[: 8 * recipe.render_batch]
    encode = partial(_encode_bytes, recipe, vae)
    normalise_latents(vae, lambda: torch.cat([encode(part) for part in torch.split(some, recipe.render_batch)]))


@torch.no_grad()
def _encode_bytes(recipe: Recipe, vae: Any, clips: Tensor) -> Tensor:
    """The means of the latents of uint8 clips (B, 3, T, H, W); pictures lose their axis of one frame."""
    pixels = (clips[:, :, 0] if recipe.kind == "image" else clips).float() / 127.5 - 1
    with torch.autocast(clips.device.type, torch.bfloat16):
        latents: Tensor = vae.encode(pixels).latent_dist.mean
    return latents


def _encode(recipe: Recipe, vae: Any, captioned: Captioned, generator: torch.Generator, max_s: float) -> list[Bucket]:
    vae.to(generator.device).eval()
    buckets, start = [], 0
    for size, part, weight in recipe.sizes:
        rows = slice(start, start + int(part * recipe.num_scenes))
        some = Captioned(captioned.scenes[rows], captioned.tokens[rows])
        bucket = encode_bucket(
            partial(_encode_bytes, recipe, vae), some, generator,
            size=size, batch_size=recipe.render_batch, weight=weight, max_s=max_s,
        )  # fmt: skip
        buckets.append(bucket)
        start = rows.stop
    if recipe.kind == "video":
        buckets = [bucket for whole in buckets for bucket in _beginnings(whole)]
    return buckets


def _beginnings(bucket: Bucket) -> list[Bucket]:
    """The video autoencoder is causal: the first latents of a clip are the latents of a shorter clip."""
    frames = bucket.latents.shape[2]
    parts = ((3, 0.08), (5, 0.80), (frames, 0.12))
    return [Bucket(bucket.latents[:, :, :count], bucket.tokens, bucket.weight * part) for count, part in parts]


def _train_denoiser(
    recipe: Recipe,
    modules: Sequence[nn.Module],
    buckets: Sequence[Bucket],
    clock: Clock,
    end_token: int,
    arguments: argparse.Namespace,
) -> None:
    _, text, denoiser = (module.to(arguments.device).train() for module in modules)
    if isinstance(denoiser, WanTransformer3DModel):
        shorten_padding(denoiser)
    if arguments.compile:
        compile_blocks(denoiser.get_submodule("transformer_blocks" if recipe.kind == "image" else "blocks").children())
    train_denoiser(
        text, denoiser, recipe.predict, buckets,
        batch_size=recipe.denoiser_batch, end_token=end_token, clock=clock,
    )  # fmt: skip


def _preview(pipeline: Any, recipe: Recipe, path: Path, device: str) -> None:
    """Two samples of each preview prompt; of clips the first and the last frame."""
    pipeline.to(device, torch.float32 if device == "cpu" else torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    options = {name: value for name, value in recipe.defaults.items() if name != "fps"}
    prompts = list(PREVIEW_PROMPTS)
    generator = torch.Generator("cpu").manual_seed(0)
    rows = []
    for _ in range(2):
        out = pipeline(prompts, output_type="np", generator=generator, **options)
        rows += [out.images] if recipe.kind == "image" else [out.frames[:, 0], out.frames[:, -1]]
    grid = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
    Image.fromarray((grid * 255).round().astype(np.uint8)).save(path)


if __name__ == "__main__":
    main()
