"""Which kernel computes attention: SGLang's names and diffusers', what runs here, and masks that are never dropped.

All attention that goes through diffusers' dispatcher can be computed by another kernel. Whether one runs on this
device, and what it makes of masks, isn't listed here but tried.
"""

import functools
import inspect
import json
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import yaml

from sgld.config import AttentionConfig, Precision
from sgld.errors import ModelError
from sgld.models.flash3 import adopt_wheel
from sgld.outcome import Raised, Value, one_line, outcome_of

if TYPE_CHECKING:
    import torch
    from torch import nn

# SGLang's names to diffusers' ones; the first that runs here is taken. The order: its own build before one that is
# downloaded, newer before older.
_OF_SGLANG = {
    "torch_sdpa": ("native",),
    "torch_cudnn_sdpa": ("_native_cudnn",),
    "dynamic_cudnn_sdpa": ("_native_cudnn",),
    "fa": ("_flash_3", "flash", "_flash_3_hub", "flash_hub"),
    "fa2": ("flash", "flash_hub"),
    "fa3": ("_flash_3", "_flash_3_hub"),
    "fa4": ("flash_4_hub",),
    "sage_attn": ("sage", "sage_hub"),
    "sage_attn_3": ("sage_blackwell_hub",),
    "aiter": ("aiter_fa2_hub",),
}
# They leave out parts of attention, in ways that SGLang wrote for single models.
_SPARSE = re.compile(
    r"(sparge|sliding_tile|video_sparse|sparse_video_gen_2|vmoba|sla|sage_sla|laser|block_sparse|rain_fusion|sol|"
    r"subblock_sparse|cube_sparse)_attn|(video_sparse|hybrid_window)_attn_h3|fp8_fa_sm120|aiter_sage"
)
# A kernel that quantizes is this far from exact attention at most; one that doesn't heed a mask is further.
_MAX_ERROR = 0.1


class AttentionOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `--attention-backend-config` may say.

    `checks`: diffusers checks the arguments of every call (`DIFFUSERS_ATTN_CHECKS`). `masks`: attention with a mask
    that the kernel can't take runs on torch's own, or is an error.
    """

    checks: bool = False
    masks: Literal["native", "error"] = "native"


@dataclass(frozen=True)
class Attention:
    """What was decided: diffusers' name of the kernel, and whether it takes masks."""

    backend: str
    takes_masks: bool
    options: AttentionOptions

    @property
    def note(self) -> str:
        """The decision, for people."""
        masked = {"native": "with a mask by native", "error": "with a mask is an error"}[self.options.masks]
        return f"attention by {self.backend}" + ("" if self.takes_masks else f"; {masked}")


def choose(config: AttentionConfig, device_type: str, precision: Precision) -> Attention | None:
    """Decide on a kernel by trying it on this device; None where nothing is asked for, or `auto`.

    :raises ModelError: it is unknown, isn't installed or doesn't run here; says what does.
    """
    options = _options(config.attention_backend_config)
    name = _asked_for(config)
    if name is None:
        if options != AttentionOptions():
            raise ModelError("attention_backend_config is for a backend; give attention_backend, too")
        return None
    candidates, dtype, problems = _candidates(name), _dtype(precision), []
    adopt_wheel()
    for backend in candidates:
        if (problem := problem_of(backend, device_type, dtype)) is None:
            return Attention(backend, takes_masks(backend, device_type, dtype), options)
        problems.append(problem)
    works = ", ".join(b for b in known_backends() if problem_of(b, device_type, dtype) is None)
    raise ModelError(f"attention_backend is {name!r}: {'; '.join(problems)}. These work here: {works}")


def _dtype(precision: Precision) -> "torch.dtype":
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def _asked_for(config: AttentionConfig) -> str | None:
    names = {name.lower() for name in (config.attention_backend, config.diffusers_attention_backend) if name}
    if len(names) > 1:
        raise ModelError(
            f"attention_backend is {config.attention_backend!r}, diffusers_attention_backend is "
            f"{config.diffusers_attention_backend!r}: every model runs in diffusers here, so give one of them"
        )
    name = names.pop() if names else "auto"
    return None if name == "auto" else name


def _candidates(name: str) -> tuple[str, ...]:
    if name in known_backends():
        return (name,)
    if _SPARSE.fullmatch(name):
        raise ModelError(f"attention_backend is {name!r}: that is a kernel of SGLang's own models, diffusers has none")
    if name not in _OF_SGLANG:
        raise ModelError(
            f"attention_backend is {name!r}, which is unknown; SGLang's names are auto, {', '.join(_OF_SGLANG)}, "
            f"diffusers' are {', '.join(known_backends())}"
        )
    return _OF_SGLANG[name]


def known_backends() -> list[str]:
    """The names in diffusers of all kernels, whether they are installed or not."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    return [backend.value for backend in AttentionBackendName]


def _options(given: str | None) -> AttentionOptions:
    """JSON, a path of a JSON or YAML file, or `key=value,key=value`, as SGLang takes them."""
    if not given:
        return AttentionOptions()
    try:
        if given.lstrip().startswith("{"):
            values = json.loads(given)
        elif "=" in given:
            values = {key.strip(): yaml.safe_load(value) for key, value in map(_pair, given.split(","))}
        else:
            values = yaml.safe_load(Path(given).read_text())
        return msgspec.convert(values, AttentionOptions)
    except (OSError, ValueError, yaml.YAMLError, msgspec.ValidationError) as error:
        keys = ", ".join(AttentionOptions.__struct_fields__)
        problem = str(error).replace("`", "").replace("\n", " ")
        raise ModelError(f"attention_backend_config is {given!r}: {problem}; it has the keys {keys}") from None


def _pair(part: str) -> tuple[str, str]:
    key, sign, value = part.partition("=")
    if not sign:
        raise ValueError(f"{part!r} isn't key=value")
    return key, value


def problem_of(backend: str, device_type: str, dtype: "torch.dtype") -> str | None:
    """Why a kernel can't be used here, or None."""
    from diffusers.models import attention_dispatch as dispatcher

    name = dispatcher.AttentionBackendName(backend)

    def tried() -> float:
        dispatcher._check_attention_backend_requirements(name)
        dispatcher._maybe_download_kernel_for_backend(name)
        return _error(backend, device_type, dtype, None)

    # Kernels fail in as many ways as there are kernels.
    outcome = outcome_of(tried)
    if isinstance(outcome, Raised):
        where = f"{device_type} in {str(dtype).removeprefix('torch.')}"
        problem = one_line(outcome.error).strip(" .")
        return f"{backend} doesn't run on {where}: {problem}"
    return f"{backend} computes something else than attention here" if outcome.value > _MAX_ERROR else None


def takes_masks(backend: str, device_type: str, dtype: "torch.dtype") -> bool:
    """Whether a kernel heeds masks of each form that models give, with padding in the middle as Qwen-Image has it."""
    import torch

    keys = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1], [1] * 8], dtype=torch.bool, device=device_type)
    pairs = keys[:, None, :, None] & keys[:, None, None, :] | torch.eye(8, dtype=torch.bool, device=device_type)
    added = torch.zeros(2, 1, 8, 8, dtype=dtype, device=device_type).masked_fill(~pairs, float("-inf"))
    masks = (keys, keys[:, None, None, :], pairs, added)
    tried = (outcome_of(functools.partial(_error, backend, device_type, dtype, mask)) for mask in masks)
    return all(isinstance(error, Value) and error.value <= _MAX_ERROR for error in tried)


def _error(backend: str, device_type: str, dtype: "torch.dtype", mask: "torch.Tensor | None") -> float:
    """The relative error of a small attention; NaN counts as infinite."""
    import torch

    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 8, 2, 64, generator=generator).to(device_type, dtype) for _ in range(3)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        right, made = (computed(name, inputs, mask).float() for name in ("native", backend))
    error = float((made - right).norm() / right.norm())
    return error if error == error else float("inf")


def computed(backend: str, inputs: "Sequence[torch.Tensor]", mask: "torch.Tensor | None") -> "torch.Tensor":
    """What a kernel makes of query, key and value by itself, without a guard."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    kernel = inspect.unwrap(_AttentionBackendRegistry._backends[AttentionBackendName(backend)])
    given = dict(zip(("query", "key", "value"), inputs, strict=True)) | {"attn_mask": mask}
    taken = inspect.signature(kernel).parameters
    result: torch.Tensor = kernel(**{name: value for name, value in given.items() if name in taken})
    return result


def apply(chosen: Attention, components: Iterable[tuple[str, "nn.Module"]]) -> dict[str, str]:
    """Let denoisers compute attention as it was chosen; returns what is to be said of each.

    Other components keep theirs: autoencoders have heads that few kernels take, and little attention.

    :raises ModelError: no layer would heed the choice.
    """
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    guard(chosen)
    Registry._checks_enabled = Registry._checks_enabled or chosen.options.checks
    notes, num_heeding = {}, 0
    for name, module in components:
        if not is_denoiser(module):
            continue
        before = Registry._active_backend
        module.set_attention_backend(chosen.backend)  # type: ignore[operator]
        # It sets that of the whole process, too.
        Registry.set_active_backend(before)
        num_layers, num_ignoring = _layers(module)
        num_heeding += num_layers - num_ignoring
        if num_ignoring:
            notes[name] = f"{num_ignoring} of {num_layers} attention layers ignore the backend"
    if chosen.backend != "native" and not num_heeding:
        said = (
            "; ".join(f"{name}: {note}" for name, note in notes.items()) or "it has no denoiser with attention layers"
        )
        raise ModelError(f"attention_backend {chosen.backend} would do nothing here: {said}")
    return notes


def is_denoiser(module: Any) -> bool:
    """A model of diffusers that is told how much noise there is."""
    from diffusers import ModelMixin

    return isinstance(module, ModelMixin) and "timestep" in inspect.signature(type(module).forward).parameters


def _layers(module: "nn.Module") -> tuple[int, int]:
    """Attention layers, and how many of these call torch themselves instead of the dispatcher."""
    from diffusers.hooks._common import _ATTENTION_CLASSES

    layers = [layer for layer in module.modules() if isinstance(layer, _ATTENTION_CLASSES)]
    ignoring = [layer for layer in layers if not hasattr(layer.processor, "_attention_backend")]
    return len(layers), len(ignoring)


def guard(chosen: Attention) -> None:
    """See that no mask is dropped: a kernel that doesn't take them isn't given any."""
    from diffusers.models.attention_dispatch import AttentionBackendName
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    if chosen.takes_masks:
        return
    name, native = AttentionBackendName(chosen.backend), AttentionBackendName.NATIVE
    supported, masked = Registry._supported_arg_names[name], Registry._backends[native]
    kernel = inspect.unwrap(Registry._backends[name])
    if chosen.options.masks == "error":
        masked = functools.partial(_refuse, chosen.backend)
    names = set(inspect.signature(kernel).parameters)
    Registry._backends[name] = guarded(kernel, masked, names)
    vars(Registry._backends[name])["set_up"] = functools.partial(guard, chosen)
    Registry._supported_arg_names[name] = supported | Registry._supported_arg_names[native]


def set_ups() -> list[Callable[[], None]]:
    """What was done to the kernels of this process; another one that calls these has the same."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    return [kernel.set_up for kernel in Registry._backends.values() if hasattr(kernel, "set_up")]


def guarded(kernel: Callable[..., Any], masked: Callable[..., Any], names: Iterable[str]) -> Callable[..., Any]:
    """The kernel for calls without a mask, `masked` for the others.

    :param names: of the arguments that the kernel takes.
    """
    import torch

    taken = frozenset(names)

    @functools.wraps(kernel)
    def dispatched(**kwargs: Any) -> Any:
        # A mask that isn't a tensor was made for this kernel.
        if isinstance(kwargs.get("attn_mask"), torch.Tensor):
            return masked(**kwargs)
        return kernel(**{name: value for name, value in kwargs.items() if name in taken})

    return dispatched


def _refuse(backend: str, **_kwargs: Any) -> Any:
    raise ValueError(
        f"this call of attention has a mask, which {backend} doesn't take; with masks=native in "
        "attention_backend_config it runs on torch's own"
    )
