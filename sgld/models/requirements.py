"""What each form of quantized weights needs: a library, a GPU. Decided before anything is loaded."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

from sgld.errors import ModelError
from sgld.models.quantization import Family, Quantization

Capability = tuple[int, int]


@dataclass(frozen=True)
class _Need:
    """What a family needs: a module to import, the package that has it, a GPU, and which."""

    module: str = ""
    package: str = ""
    needs_gpu: bool = False
    gpus: str = ""
    suits: Callable[[Capability], bool] = lambda _capability: True


_NEEDS: dict[Family, _Need] = {
    "gguf": _Need("gguf", "gguf"),
    "torchao": _Need("torchao", "torchao"),
    "bitsandbytes": _Need("bitsandbytes", "bitsandbytes", needs_gpu=True),
    "modelopt": _Need("modelopt", "nvidia-modelopt"),
    "quanto": _Need("optimum.quanto", "optimum-quanto"),
    "auto-round": _Need("auto_round", "auto-round"),
    "sdnq": _Need("sdnq", "sdnq"),
    "nunchaku_lite": _Need(
        "kernels", "kernels", True, "7.5 or more, but not 9.x (Hopper)", lambda c: c >= (7, 5) and c[0] != 9
    ),
    "svdquant": _Need("nunchaku", "nunchaku", True, "8.x or 12.x", lambda c: c[0] in (8, 12)),
}


def check(found: Quantization, name: str, capability: Capability | None) -> Quantization:
    """Can it be had here?

    :param name: of the component, for the message.
    :param capability: of the GPU; None on a CPU.
    :return: the same; FP8 activations become full ones on a GPU that can't multiply FP8.
    :raises ModelError: a library is missing, or the device doesn't suit; names it.
    """
    need = _NEEDS.get(found.family, _Need())
    what = f"{name} is quantized with {found.family} ({found.detail})"
    if need.module and not _is_installed(need.module):
        raise ModelError(f"{what}, which needs {need.package}; install it: pip install {need.package}")
    if need.needs_gpu and capability is None:
        raise ModelError(f"{what}, which runs on NVIDIA GPUs only, and the device is cpu")
    if capability is not None and not need.suits(capability):
        has = _dotted(capability)
        raise ModelError(f"{what}, which needs a GPU of compute capability {need.gpus}; this one has {has}")
    if found.family == "fp8" and found.activations != "full" and not multiplies_fp8(capability):
        if found.was_asked_for:
            raise ModelError(
                f"{what}, which needs a GPU of compute capability 8.9 or more; this one has {_dotted(capability)}"
            )
        return replace(found, activations="full", detail=found.detail + ", activations as they are: no FP8 on this GPU")
    return found


def _dotted(capability: Capability | None) -> str:
    return ".".join(map(str, capability or ()))


def multiplies_fp8(capability: Capability | None) -> bool:
    """A CPU does it with the same numbers, slowly."""
    return capability is None or capability >= (8, 9)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
