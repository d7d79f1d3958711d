"""Models that are one file: of which kind they are, and where the configuration of their components is."""

import re
from pathlib import Path
from typing import Any

from sgld.config import EngineConfig
from sgld.errors import ModelError
from sgld.models.resolve import ModelSource, hub_file_if_any, resolve
from sgld.models.weights import tensors_in
from sgld.outcome import one_line

# owner/name/path of the file, or its address on the hub.
_ON_HUB = re.compile(
    r"(https://(huggingface\.co|hf\.co)/)?(?P<id>[\w.-]+/[\w.-]+)/((blob|resolve)/(?P<revision>[^/]+)/)?(?P<file>.+)"
)
_OTHER_ENDINGS = (".ckpt", ".pt", ".pth", ".bin", ".gguf")


def single_file(config: EngineConfig) -> ModelSource | None:
    """The model, if it is a single file; one on the hub is fetched.

    :raises ModelError: it can't be had, or nothing says what it consists of.
    """
    path = config.model_path
    if path.endswith(_OTHER_ENDINGS):
        raise ModelError(f"{path} can't be a model: a model that is one file is .safetensors, which can't hold code")
    if not path.endswith(".safetensors"):
        return None
    file = _file(path, config.revision)
    chosen = config.source.single_file_config
    where = resolve(chosen) if chosen else ModelSource(_kind(file), None)
    return ModelSource(path, where.folder, hub_id=where.pretrained_name, file=file)


def _file(path: str, revision: str | None) -> Path:
    local = Path(path).expanduser()
    if local.is_file():
        return local
    match = _ON_HUB.fullmatch(path)
    if match is None:
        raise ModelError(f"there is no file {path!r}")
    try:
        found = hub_file_if_any(match["id"], match["file"], match["revision"] or revision)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be had from the hub: {one_line(error)}") from None
    if found is None:
        raise ModelError(f"there is no file {path!r}, neither here nor on the hub")
    return found


def _kind(file: Path) -> str:
    """The hub id of the model that has such components, by the names and shapes of the tensors."""
    from diffusers.loaders import single_file_utils as known  # takes seconds

    tensors = shapes_in(file)
    kind = known.infer_diffusers_model_type(tensors)
    # What it doesn't know it takes for a Stable Diffusion 1.
    if kind == "v1" and known.CHECKPOINT_KEY_NAMES["v1"] not in tensors:
        raise ModelError(
            f"{file} is of no kind that diffusers knows: say with --single-file-config what model it is of"
        )
    return str(known.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"])


def shapes_in(file: Path) -> dict[str, Any]:
    """Empty tensors with the names and shapes of those in the file, as diffusers looks at them."""
    import torch

    return {name: torch.empty(entry["shape"], device="meta") for name, entry in tensors_in(file).items()}
