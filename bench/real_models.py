"""Models of real size with random weights, made from their public configs: nothing is downloaded.

    python bench/real_models.py FOLDER flux sdxl [--tiny] [--device cuda]

Each becomes a folder that `sgld serve` and plain diffusers load. The weights are drawn on the GPU in bf16, by the
layers' own initialisation; the tokenizers know the words of `prompt`. A picture or clip of two steps shows that no
value is lost in bf16. With `--tiny` the same pipelines have next to no layers, so that benches can be tried on a CPU.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

PROMPTS = [
    f"a photograph of a {colour} {thing} on a hill by the {water}, in the soft light of the morning, with fine detail"
    for colour, thing, water in product(("red", "green", "blue"), ("house", "boat", "horse", "tree"), ("sea", "lake"))
]
_NUM_NUMBERS = 1000
_SPECIAL = ["<pad>", "</s>", "<unk>"]
_SHARD_BYTES = 1024**3
_NUM_WRITERS = 12
_BUFFER_BYTES = 64 * 1024**2
_ALIGNMENT = 64
# Last to be written: what was said of a model that is whole.
_SAID = "made.json"
_DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """A component: its class in diffusers or transformers, its public config, and what is smaller in tiny models."""

    cls: str
    config: Config = field(default_factory=dict)
    tiny: Config = field(default_factory=dict)

    def build(self, device: str, *, is_tiny: bool) -> Any:
        """Models are made on the device; noise schedulers compute with numpy."""
        config = {**self.config, **(self.tiny if is_tiny else {})}
        if self.cls == "tokenizer":
            return _tokenizer(**config)
        if self.cls.endswith("Scheduler"):
            return getattr(diffusers, self.cls)(**config)
        with torch.device(device):
            if hasattr(diffusers, self.cls):
                return getattr(diffusers, self.cls)(**config)
            cls = getattr(transformers, self.cls)
            return cls(cls.config_class(**config))


@dataclass(frozen=True)
class Model:
    """A pipeline, and the requests that suit it.

    :ivar denoiser: the name of the component that is called in each step.
    :ivar call: arguments of each request beside size and steps, by SamplingParams' names.
    :ivar small: the size of the first look at its results.
    """

    pipeline: str
    parts: Mapping[str, Part]
    denoiser: str = "transformer"
    call: Config = field(default_factory=dict)
    small: Config = field(default_factory=lambda: {"height": 256, "width": 256})
    options: Config = field(default_factory=dict)

    def build(self, *, is_tiny: bool, device: str) -> Any:
        """The pipeline on the device, in bf16 on a GPU."""
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
        try:
            parts = {name: part.build(device, is_tiny=is_tiny) for name, part in self.parts.items()}
        finally:
            torch.set_default_dtype(before)
        for part in parts.values():
            if isinstance(part, torch.nn.Module):
                part.eval().requires_grad_(False)
        _fill_padding(parts[self.denoiser])
        return getattr(diffusers, self.pipeline)(**parts, **self.options).to(device)


def _clip(config: Config, cls: str = "CLIPTextModel") -> Part:
    ids = {"vocab_size": 49408, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    tiny = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Part(cls, {**ids, **config}, {**tiny, "projection_dim": 32, "vocab_size": 1100})


def _t5(cls: str = "T5EncoderModel", vocab_size: int = 32128) -> Part:
    config = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": vocab_size}
    tiny = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, "vocab_size": 1100}
    return Part(cls, {**config, "feed_forward_proj": "gated-gelu"}, tiny)


def _tokens(max_length: int) -> Part:
    return Part("tokenizer", {"max_length": max_length})


def _vae(latent_channels: int, **config: Any) -> Part:
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": latent_channels,
        "sample_size": 1024,
    }
    tiny = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    return Part("AutoencoderKL", blocks | config, tiny)


def _video_vae(cls: str) -> Part:
    """Wan 2.1's, which Qwen-Image has, too; its config is the classes' default."""
    return Part(cls, {}, {"base_dim": 3, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1})


_CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
_CLIP_L |= {"projection_dim": 768, "hidden_act": "quick_gelu"}
_CLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
}
_CLIP_G |= {"projection_dim": 1280, "hidden_act": "gelu"}
_FLUX_VAE = _vae(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
_SHIFTS = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
_TINY_DIT = {"num_attention_heads": 2, "attention_head_dim": 16}

MODELS = {
    "sdxl": Model(
        "StableDiffusionXLPipeline",
        {
            "vae": _vae(4, scaling_factor=0.13025, force_upcast=True),
            "text_encoder": _clip(_CLIP_L),
            "text_encoder_2": _clip(_CLIP_G, "CLIPTextModelWithProjection"),
            "tokenizer": _tokens(77),
            "tokenizer_2": _tokens(77),
            "unet": Part(
                "UNet2DConditionModel",
                {
                    "sample_size": 128,
                    "block_out_channels": (320, 640, 1280),
                    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                    "layers_per_block": 2,
                    "attention_head_dim": (5, 10, 20),
                    "transformer_layers_per_block": (1, 2, 10),
                    "cross_attention_dim": 2048,
                    "use_linear_projection": True,
                    "addition_embed_type": "text_time",
                    "addition_time_embed_dim": 256,
                    "projection_class_embeddings_input_dim": 2816,
                },
                {
                    "block_out_channels": (8, 16, 16),
                    "attention_head_dim": 4,
                    "layers_per_block": 1,
                    "transformer_layers_per_block": 1,
                    "cross_attention_dim": 64,
                    "addition_time_embed_dim": 8,
                    "projection_class_embeddings_input_dim": 32 + 6 * 8,
                    "norm_num_groups": 4,
                },
            ),
            "scheduler": Part(
                "EulerDiscreteScheduler",
                {
                    "beta_start": 0.00085,
                    "beta_end": 0.012,
                    "beta_schedule": "scaled_linear",
                    "timestep_spacing": "leading",
                    "steps_offset": 1,
                },
            ),
        },
        denoiser="unet",
        call={"guidance_scale": 5.0},
    ),
    "flux": Model(
        "FluxPipeline",
        {
            "vae": _FLUX_VAE,
            "text_encoder": _clip(_CLIP_L),
            "text_encoder_2": _t5(),
            "tokenizer": _tokens(77),
            "tokenizer_2": _tokens(512),
            "transformer": Part(
                "FluxTransformer2DModel",
                {
                    "in_channels": 64,
                    "num_layers": 19,
                    "num_single_layers": 38,
                    "attention_head_dim": 128,
                    "num_attention_heads": 24,
                    "joint_attention_dim": 4096,
                    "pooled_projection_dim": 768,
                    "guidance_embeds": True,
                },
                {
                    **_TINY_DIT,
                    "num_layers": 1,
                    "num_single_layers": 1,
                    "joint_attention_dim": 32,
                    "pooled_projection_dim": 32,
                    "axes_dims_rope": (4, 4, 8),
                },
            ),
            "scheduler": Part(
                "FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True, **_SHIFTS}
            ),
        },
        call={"guidance_scale": 3.5},
    ),
    "qwen-image": Model(
        "QwenImagePipeline",
        {
            "vae": _video_vae("AutoencoderKLQwenImage"),
            "text_encoder": Part(
                "Qwen2_5_VLForConditionalGeneration",
                {
                    "text_config": {
                        "hidden_size": 3584,
                        "intermediate_size": 18944,
                        "num_hidden_layers": 28,
                        "num_attention_heads": 28,
                        "num_key_value_heads": 4,
                        "vocab_size": 152064,
                        "rope_parameters": {
                            "mrope_section": [16, 24, 24],
                            "rope_type": "default",
                            "rope_theta": 1000000.0,
                        },
                    },
                    "vision_config": {
                        "depth": 32,
                        "hidden_size": 1280,
                        "intermediate_size": 3420,
                        "num_heads": 16,
                        "out_hidden_size": 3584,
                    },
                },
                {
                    "text_config": {
                        "hidden_size": 32,
                        "intermediate_size": 32,
                        "num_hidden_layers": 2,
                        "num_attention_heads": 2,
                        "num_key_value_heads": 2,
                        "vocab_size": 152064,
                        "rope_parameters": {
                            "mrope_section": [2, 3, 3],
                            "rope_type": "default",
                            "rope_theta": 1000000.0,
                        },
                    },
                    "vision_config": {
                        "depth": 1,
                        "hidden_size": 16,
                        "intermediate_size": 16,
                        "num_heads": 2,
                        "out_hidden_size": 32,
                    },
                },
            ),
            "tokenizer": _tokens(1024),
            "transformer": Part(
                "QwenImageTransformer2DModel",
                {"num_layers": 60, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 3584},
                {**_TINY_DIT, "num_layers": 2, "joint_attention_dim": 32, "axes_dims_rope": (8, 4, 4)},
            ),
            "scheduler": Part(
                "FlowMatchEulerDiscreteScheduler",
                {
                    **_SHIFTS,
                    "max_shift": 0.9,
                    "max_image_seq_len": 8192,
                    "use_dynamic_shifting": True,
                    "time_shift_type": "exponential",
                    "shift_terminal": 0.02,
                },
            ),
        },
        call={"true_cfg_scale": 4.0, "negative_prompt": "a tree"},
    ),
    "z-image": Model(
        "ZImagePipeline",
        {
            "vae": _FLUX_VAE,
            "text_encoder": Part(
                "Qwen3Model",
                {
                    "hidden_size": 2560,
                    "intermediate_size": 9728,
                    "num_hidden_layers": 36,
                    "num_attention_heads": 32,
                    "num_key_value_heads": 8,
                    "head_dim": 128,
                    "vocab_size": 151936,
                },
                {
                    "hidden_size": 32,
                    "intermediate_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                    "head_dim": 16,
                    "vocab_size": 1100,
                },
            ),
            "tokenizer": _tokens(512),
            "transformer": Part(
                "ZImageTransformer2DModel",
                {"dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30}
                | {"cap_feat_dim": 2560, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512]},
                {"dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
                | {"cap_feat_dim": 32, "axes_dims": [8, 4, 4]},
            ),
            "scheduler": Part("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        },
        call={"guidance_scale": 4.0},
    ),
    "wan": Model(
        "WanPipeline",
        {
            "tokenizer": _tokens(512),
            "text_encoder": _t5("UMT5EncoderModel", 256384),
            "vae": _video_vae("AutoencoderKLWan"),
            "transformer": Part(
                "WanTransformer3DModel",
                {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
                {**_TINY_DIT, "text_dim": 32, "freq_dim": 32, "ffn_dim": 32, "num_layers": 2},
            ),
            "scheduler": Part(
                "UniPCMultistepScheduler",
                {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
            ),
        },
        call={"guidance_scale": 5.0},
        small={"height": 256, "width": 256, "num_frames": 5},
    ),
    "sd3.5-medium": Model(
        "StableDiffusion3Pipeline",
        {
            "transformer": Part(
                "SD3Transformer2DModel",
                {
                    "sample_size": 128,
                    "num_layers": 24,
                    "attention_head_dim": 64,
                    "num_attention_heads": 24,
                    "caption_projection_dim": 1536,
                    "joint_attention_dim": 4096,
                    "pooled_projection_dim": 2048,
                    "pos_embed_max_size": 384,
                    "dual_attention_layers": tuple(range(13)),
                    "qk_norm": "rms_norm",
                },
                {
                    **_TINY_DIT,
                    "num_layers": 2,
                    "caption_projection_dim": 32,
                    "joint_attention_dim": 64,
                    "pooled_projection_dim": 64,
                    "dual_attention_layers": (0,),
                },
            ),
            "scheduler": Part("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
            "vae": _vae(
                16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False
            ),
            "text_encoder": _clip(_CLIP_L, "CLIPTextModelWithProjection"),
            "tokenizer": _tokens(77),
            "text_encoder_2": _clip(_CLIP_G, "CLIPTextModelWithProjection"),
            "tokenizer_2": _tokens(77),
            "text_encoder_3": Part("T5EncoderModel", _t5().config, {**_t5().tiny, "d_model": 64}),
            "tokenizer_3": _tokens(256),
        },
        call={"guidance_scale": 5.0},
    ),
}


def prompt(index: int) -> str:
    """Each has tokens of its own, as many as the others: what encoders said of one is no answer for another."""
    return f"{PROMPTS[index % len(PROMPTS)]}, number {index % _NUM_NUMBERS}"


def _tokenizer(max_length: int) -> Any:
    """Words of `PROMPTS`, ended by </s>."""
    words = sorted({word for text in PROMPTS for word in text.replace(",", " ,").split()} | {"number"})
    words += [str(number) for number in range(_NUM_NUMBERS)]
    vocabulary = {word: index for index, word in enumerate([*_SPECIAL, *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=max_length
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return tokenizer


def _fill_padding(denoiser: torch.nn.Module) -> None:
    """Rows of padding are trained from an uninitialised tensor."""
    for name, parameter in denoiser.named_parameters():
        if name.endswith("pad_token"):
            torch.nn.init.normal_(parameter)


def save(pipeline: Any, folder: Path) -> None:
    """As `save_pretrained`, but with many writers: on a RAM disk a model of 34 GB takes seconds."""
    folder.mkdir(parents=True)
    pipeline.save_config(folder)
    jobs: list[tuple[Path, dict[str, torch.Tensor]]] = []
    for name, part in pipeline.components.items():
        if part is None:
            continue
        if not isinstance(part, torch.nn.Module):
            part.save_pretrained(folder / name)
            continue
        is_ours = isinstance(part, diffusers.ModelMixin)
        write_config: Any = part.save_config if is_ours else part.config.save_pretrained  # type: ignore[union-attr]
        write_config(folder / name)
        jobs += _shards(part, folder / name, "diffusion_pytorch_model" if is_ours else "model")
    with ThreadPoolExecutor(_NUM_WRITERS) as pool:
        list(pool.map(lambda job: _write(*job), jobs))


def _shards(module: torch.nn.Module, folder: Path, name: str) -> list[tuple[Path, dict[str, torch.Tensor]]]:
    """Which tensors go into which file; the index that says so is written."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size, seen = 0, set()
    for key, tensor in module.state_dict().items():
        if tensor.data_ptr() in seen:  # tied weights
            continue
        seen.add(tensor.data_ptr())
        if size and size + tensor.nbytes > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        return [(folder / f"{name}.safetensors", shards[0])]
    files = [f"{name}-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    weights = {key: file for file, shard in zip(files, shards, strict=True) for key in shard}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weights}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index))
    return [(folder / file, shard) for file, shard in zip(files, shards, strict=True)]


def _write(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A safetensors file; the interpreter's lock isn't held meanwhile."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    # Where they come from a GPU, through pinned memory: threads that copy into pageable memory wait for each other.
    is_pinned = next(iter(tensors.values())).is_cuda
    buffer = torch.empty(_BUFFER_BYTES, dtype=torch.uint8, pin_memory=is_pinned)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for chunk in torch.split(tensor.detach().contiguous().flatten().view(torch.uint8), _BUFFER_BYTES):
                part = buffer[: chunk.numel()]
                part.copy_(chunk)
                file.write(part.numpy().data)


def look(name: str, pipeline: Any, *, is_tiny: bool) -> str:
    """Two steps up to pixels; what these are like.

    :raises ValueError: values were lost, or the result is flat.
    """
    model = MODELS[name]
    pipeline.set_progress_bar_config(disable=True)
    size = {key: 64 if is_tiny and key != "num_frames" else value for key, value in model.small.items()}
    latents: list[torch.Tensor] = []

    def note(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(tensors["latents"])
        return {}

    with torch.no_grad():
        output = pipeline(
            prompt(0), **size, **model.call, num_inference_steps=2, output_type="pt", callback_on_step_end=note
        )
    pixels, last = output[0].float(), latents[-1].float()
    spreads = (float(last.std()), float(pixels.std()))
    if not all(math.isfinite(spread) and spread > 0 for spread in spreads):
        raise ValueError(f"{name}: the spread of latents and pixels is {spreads}; weights of another scale are needed")
    return f"latents {last.mean():.3f}±{spreads[0]:.3f}, pixels {pixels.mean():.3f}±{spreads[1]:.3f}"


def make(name: str, root: Path, *, is_tiny: bool, device: str) -> dict[str, Any]:
    """Build, look and save, unless it is there; :return: seconds and gigabytes."""
    said = root / name / _SAID
    if said.exists():
        return dict(json.loads(said.read_text()))
    shutil.rmtree(root / name, ignore_errors=True)
    start = time.perf_counter()
    pipeline = MODELS[name].build(is_tiny=is_tiny, device=device)
    _wait(device)
    built = time.perf_counter()
    seen = look(name, pipeline, is_tiny=is_tiny)
    looked = time.perf_counter()
    save(pipeline, root / name)
    saved = time.perf_counter()
    sizes = {
        part: round(sum(p.nbytes for p in module.parameters()) / 1e9, 2)
        for part, module in pipeline.components.items()
        if isinstance(module, torch.nn.Module)
    }
    times = {"build_s": built - start, "look_s": looked - built, "save_s": saved - looked}
    made = {"model": name, "gb": sizes, **{key: round(value, 2) for key, value in times.items()}, "look": seen}
    said.write_text(json.dumps(made))
    return made


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> Iterator[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="+", choices=list(MODELS))
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    for name in args.models:
        yield make(name, args.folder, is_tiny=args.tiny, device=args.device)


if __name__ == "__main__":
    for made in main():
        print(json.dumps(made), flush=True)
