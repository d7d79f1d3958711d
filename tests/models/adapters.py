"""LoRA adapters of random numbers, written as their trainers do."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sgld.models.lora import adaptable

Matrices = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Module name, with the component in front, to (rank, in) and (out, rank)."""


def matrices(
    pipeline: Any, seed: int, *, rank: int = 4, size: float = 0.3, only: Callable[[str], bool] = lambda name: True
) -> Matrices:
    """Random matrices for all linear layers of a pipeline that adapters change, apart from those that aren't `only`."""
    generator = torch.Generator().manual_seed(seed)
    made: Matrices = {}
    for component, targets in adaptable(pipeline).targets.items():
        part = getattr(pipeline, component)
        for name, target in targets.items():
            full = f"{component}.{name}"
            if isinstance(part.get_submodule(name), torch.nn.Linear) and only(full):
                down = torch.randn(rank, target.num_in, generator=generator)
                up = torch.randn(target.num_out, rank, generator=generator)
                made[full] = size * down, size * up
    return made


def as_diffusers(path: Path, made: Matrices, metadata: Mapping[str, Any] | None = None) -> Path:
    """With `save_lora_weights`; `metadata` is that of diffusers, as `transformer.lora_alpha`."""
    tensors = {f"{name}.lora_{m}.weight": t for name, pair in made.items() for m, t in zip("AB", pair, strict=True)}
    header = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None
    return _saved(path, tensors, header)


def as_peft(folder: Path, made: Matrices, **config: Any) -> Path:
    """With `PeftModel.save_pretrained` of the denoiser: a folder with a config."""
    folder.mkdir()
    tensors = {
        f"base_model.model.{name.partition('.')[2]}.lora_{m}.weight": t
        for name, pair in made.items()
        for m, t in zip("AB", pair, strict=True)
    }
    _saved(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder


_KOHYA = {"unet": "lora_unet", "transformer": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def as_kohya(path: Path, made: Matrices, alpha: float, names: Mapping[str, str] = _KOHYA) -> Path:
    """With kohya's sd-scripts: names without dots, and an alpha for each layer."""
    tensors: dict[str, torch.Tensor] = {}
    for name, (down, up) in made.items():
        component, _, module = name.partition(".")
        flat = f"{names[component]}_{module.replace('.', '_')}"
        tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        tensors[f"{flat}.alpha"] = torch.tensor(alpha)
    return _saved(path, tensors)


def _saved(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, dict(metadata or {}))
    return path
