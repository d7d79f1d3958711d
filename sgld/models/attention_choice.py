"""The fastest kernel of attention on the GPU at hand, where none is asked for: measured once for a model's heads.

Which kernel computes a call follows from the length of its sequence alone, not from its rows: a request gets the same
one in company as alone, and compiled code has one branch more and no break. It is settled while the model is loaded,
before anything is compiled or captured, and kept on disk for the device.
"""

import functools
import hashlib
import inspect
import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from sgld.config import cache_root
from sgld.models import attention
from sgld.models.flash3 import adopt_wheel
from sgld.models.placement import dtype_of
from sgld.models.shared_file import change

if TYPE_CHECKING:
    import torch
    from torch import nn

    from sgld.models.sharing import Sharing
    from sgld.parallel import ParallelConfig

logger = logging.getLogger(__name__)
# Kernels that compute exact attention. Torch's own choice among its kernels is `native`, and mostly the fastest.
CANDIDATES = ("_native_cudnn", "_native_flash", "flash", "_flash_3")
LENGTHS = (1024, 2048, 4096, 8192, 16384)
# What is less isn't worth other bits.
MIN_GAIN = 0.03
_NUM_LAUNCHES = 5
# The launches wait behind it, so that the time between their events is that of the device. About 5 ms.
_SLEEP_CYCLES = 10_000_000


class Heads(NamedTuple):
    """The attention of a layer."""

    num: int
    dim: int


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """`backend` for sequences of `min_length` and more, native for others; `gain`: by how much it is faster there."""

    backend: str
    min_length: int
    gain: float


Timer = Callable[[str, Heads, int, "torch.dtype"], float]
"""Seconds of a kernel for these heads and a sequence of this length."""


def fastest(seconds: Mapping[str, Sequence[float]]) -> Choice | None:
    """The kernel that is faster than native from some length on, at all that are longer; None: none is.

    :param seconds: by kernel, at each of LENGTHS.
    """
    native, found = seconds["native"], []
    for backend, own in seconds.items():
        gains = [before_s / after_s for before_s, after_s in zip(native, own, strict=True)]
        slow = [index for index, gain in enumerate(gains) if gain < 1 + MIN_GAIN]
        first = slow[-1] + 1 if slow else 0
        if first < len(LENGTHS):
            found.append(Choice(backend=backend, min_length=LENGTHS[first], gain=max(gains[first:])))
    return max(found, key=lambda choice: (choice.gain, -choice.min_length), default=None)


def settle(
    components: Iterable[tuple[str, "nn.Module"]],
    device: "torch.device",
    divisors: Mapping[str, Collection[int]],
    timer: Timer | None = None,
) -> dict[str, str]:
    """Let the denoisers compute attention by what is fastest here; returns what is to be said of each.

    :param divisors: by component, by how many ranks its heads may be divided in a forward; empty for a rank alone.
    """
    denoisers = {name: part for name, part in components if attention.is_denoiser(part)}
    found = {
        name: heads
        for name, part in denoisers.items()
        if (heads := sorted(_parts(heads_of(part), divisors.get(name, (1,))), reverse=True))
    }
    if device.type != "cuda" or not found:
        return {}
    dtype = dtype_of(denoisers[next(iter(found))])
    adopt_wheel()
    usable = [name for name in CANDIDATES if attention.problem_of(name, device.type, dtype) is None]
    file = _file(device, dtype, usable)
    known = _read(file)
    wanted = {heads for of_one in found.values() for heads in of_one}
    if new := [heads for heads in wanted if _name(heads) not in known]:
        measured = _measured(new, ("native", *usable), dtype, timer or functools.partial(_seconds, device))
        known = _settled(file, known, measured, is_alone=not divisors)
    best = {heads: known.get(_name(heads)) for heads in wanted}
    choices = {heads: choice for heads, choice in best.items() if choice is not None}
    if choices:
        steer(best)
    native = (
        "attention by native, which is as fast as any here"
        if all(_name(heads) in known for heads in wanted)
        else "attention by native: ranks can't agree on another kernel, as nothing can be kept"
    )
    return {name: _note(of_one, choices) or native for name, of_one in found.items()}


def _measured(
    every: Iterable[Heads], backends: Collection[str], dtype: "torch.dtype", timer: Timer
) -> dict[str, Choice | None]:
    """The fastest of these kernels for each of the heads."""
    found = {}
    for heads in every:
        times = {name: [timer(name, heads, length, dtype) for length in LENGTHS] for name in backends}
        logger.debug("attention of %s: %s", _name(heads), times)
        found[_name(heads)] = fastest(times)
    return found


def head_divisors(sharing: "Sharing", parallel: "ParallelConfig") -> dict[str, set[int]]:
    """By component, by how many ranks the heads of its attention may be divided in a forward.

    What can't be shared is run by one. Around a ring there are more keys than queries: that is left out.
    """
    found = {name: {1} for name in sharing.names}
    for name in sharing.denoisers if parallel.ring == 1 else ():
        found[name] |= {degree for degree in parallel.degrees if degree <= sharing.max_degrees.get(name, degree)}
    parts = {name: parallel.tp_size if name in sharing.divided.names else 1 for name in found}
    return {name: {degree * parts[name] for degree in degrees} for name, degrees in found.items()}


def _parts(heads: Iterable[Heads], divisors: Iterable[int]) -> set[Heads]:
    """What ranks have of them; they are padded where they must be."""
    return {Heads(-(-own.num // num), own.dim) for own, num in itertools.product(heads, divisors)}


def _note(heads: Sequence[Heads], choices: Mapping[Heads, Choice]) -> str:
    """What was chosen for a model with these heads, for people: one phrase for each kernel."""
    phrases = []
    for backend in dict.fromkeys(choices[own].backend for own in heads if own in choices):
        those = [own for own in heads if own in choices and choices[own].backend == backend]
        of_those = "" if len(those) == len(heads) else f" of {_either(own.num for own in those)} heads"
        lengths = _either(sorted(choices[own].min_length for own in those))
        gain = max(choices[own].gain for own in those)
        phrases.append(f"attention{of_those} by {backend} from {lengths} positions on, up to {gain:.2f} times as fast")
    return "; ".join(phrases)


def _either(numbers: Iterable[int]) -> str:
    return " or ".join(dict.fromkeys(map(str, numbers)))


def heads_of(module: "nn.Module") -> set[Heads]:
    """The heads of those layers of a model that heed what kernel is chosen."""
    from diffusers.hooks._common import _ATTENTION_CLASSES

    found = set()
    for layer in module.modules():
        if not isinstance(layer, _ATTENTION_CLASSES) or not hasattr(layer.processor, "_attention_backend"):
            continue
        num, width = getattr(layer, "heads", None), getattr(layer, "inner_dim", None)
        if isinstance(num, int) and isinstance(width, int) and num:
            found.add(Heads(num, width // num))
    return found


def steer(choices: Mapping[Heads, Choice | None]) -> None:
    """From now on attention without a mask goes to the chosen kernels, where no other is asked for.

    What was chosen for some heads holds for fewer, too, which a rank attends to while others are on their way.

    :param choices: for all heads that there are; None: native.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    native = inspect.unwrap(Registry._backends[AttentionBackendName.NATIVE])
    kernels: dict[tuple[int, int], Any] = {}
    for heads, choice in sorted(choices.items(), reverse=True):
        kernel = choice and inspect.unwrap(Registry._backends[AttentionBackendName(choice.backend)])
        chosen = choice and (choice.min_length, kernel)
        kernels |= {(num, heads.dim): chosen for num in range(1, heads.num + 1)}

    @functools.wraps(native)
    def steered(query: Any, key: Any, value: Any, **options: Any) -> Any:
        # Attention among one sequence, as that was measured; whatever else is asked for only native is sure to have.
        if query.shape[2:] == key.shape[2:] and query.shape[1] == key.shape[1] and _is_plain(options):
            chosen = kernels.get((int(query.shape[2]), int(query.shape[3])))
            if chosen is not None and query.shape[1] >= chosen[0]:
                return chosen[1](
                    query, key, value, scale=options.get("scale"), is_causal=options.get("is_causal", False)
                )
        return native(query, key, value, **options)

    Registry._backends[AttentionBackendName.NATIVE] = steered
    vars(steered)["set_up"] = functools.partial(_steer_again, choices)


@contextmanager
def native_only() -> Iterator[None]:
    """While the block runs attention is computed as if nothing were chosen; for requests whose bits never change."""
    from diffusers.models.attention_dispatch import AttentionBackendName
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    steered = Registry._backends[AttentionBackendName.NATIVE]
    Registry._backends[AttentionBackendName.NATIVE] = inspect.unwrap(steered)
    try:
        yield
    finally:
        Registry._backends[AttentionBackendName.NATIVE] = steered


def _steer_again(choices: Mapping[Heads, Choice | None]) -> None:
    """In another process."""
    adopt_wheel()
    steer(choices)


def _is_plain(options: Mapping[str, Any]) -> bool:
    """Whether this is attention and nothing more."""
    return (
        options.get("attn_mask") is None
        and not options.get("dropout_p")
        and not options.get("enable_gqa")
        and not options.get("return_lse")
        and options.get("_parallel_config") is None
    )


def _seconds(device: "torch.device", backend: str, heads: Heads, length: int, dtype: "torch.dtype") -> float:
    """Of the device alone: in graphs and compiled code nobody waits for launches."""
    import torch

    inputs = [torch.randn(1, length, *heads, device=device, dtype=dtype) for _ in range(3)]
    event: Any = functools.partial(torch.cuda.Event, enable_timing=True)
    start, end, sleep = event(), event(), vars(torch.cuda)["_sleep"]
    times: list[float] = []
    with torch.no_grad():
        attention.computed(backend, inputs, None)
        for _ in range(2):
            sleep(_SLEEP_CYCLES)
            start.record()
            for _ in range(_NUM_LAUNCHES):
                attention.computed(backend, inputs, None)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / _NUM_LAUNCHES)
    return min(times)


def _name(heads: Heads) -> str:
    return f"{heads.num}x{heads.dim}"


def _file(device: "torch.device", dtype: "torch.dtype", usable: Sequence[str]) -> Path:
    import torch

    named = msgspec.json.encode(
        (torch.cuda.get_device_name(device), str(torch.__version__), str(dtype), usable, LENGTHS)
    )
    return cache_root() / "learned" / f"attention-{hashlib.sha256(named).hexdigest()[:24]}.json"


def _read(file: Path) -> dict[str, Choice | None]:
    try:
        return _decoded(file.read_bytes())
    except OSError:
        return {}


def _decoded(content: bytes) -> dict[str, Choice | None]:
    try:
        known = msgspec.json.decode(content, type=dict[str, Choice | None])
    except msgspec.DecodeError:
        return {}
    return {name: choice for name, choice in known.items() if choice is None or choice.backend in CANDIDATES}


def _settled(
    file: Path, known: Mapping[str, Choice | None], measured: Mapping[str, Choice | None], *, is_alone: bool
) -> dict[str, Choice | None]:
    """What all processes know, kept for the next start; what others measured first holds here, too.

    So ranks and copies of a model that start together compute alike. Where nothing can be kept, the next start measures
    again, and what was measured holds for a rank alone only.
    """
    settled = {**known, **measured}

    def merged(content: bytes) -> bytes:
        settled.update(_decoded(content))
        return msgspec.json.encode(settled)

    try:
        change(file, merged)
    except OSError as error:
        logger.warning("what was measured of attention can't be kept: %s", error)
        return settled if is_alone else dict(known)
    return settled
