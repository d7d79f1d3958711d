"""Loading a model with diffusers' own loader, and the pipelines that share its components."""

import inspect
import os
import platform
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch

from sgld.config import EngineConfig
from sgld.errors import InvalidRequest, ModelError
from sgld.messages import ModelInfo
from sgld.models import attention, attention_choice, cache_dit, noise, performance
from sgld.models.call_defaults import counts
from sgld.models.components import DTYPES, LOAD_ERRORS, load_component, stand_in
from sgld.models.from_file import load_from_file
from sgld.models.hub import fetch
from sgld.models.modular import load_modular
from sgld.models.performance import Compilation
from sgld.models.placement import compile_components, dtype_of, place
from sgld.models.plan import Plan, plan, with_notes
from sgld.models.quantized import quantize_components
from sgld.models.resolve import ModelSource, defaults, is_modular
from sgld.models.sharing import NOTHING, Sharing, with_tiles
from sgld.models.stages import Tell, nobody, reading, size_gb
from sgld.models.tensor_layers import in_parts
from sgld.models.verdicts import VerdictFile
from sgld.outcome import one_line

# What a request gives, the strongest first: the sibling that takes it, what it is, and diffusers' table of these.
_SIBLINGS = {
    "mask_image": ("inpainting", "mask", "AUTO_INPAINT_PIPELINES_MAPPING"),
    "image": ("image-to-image", "input image", "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING"),
}


@dataclass
class LoadedModel:
    """A model on its device: the pipeline that was loaded, and its siblings for other inputs.

    `defaults` are the sampling params that the model's author recommends; `verdict_file` keeps what is learned of it.
    `is_whole`: its requests run as diffusers runs them, one at a time.
    """

    pipeline: Any
    device: torch.device
    defaults: dict[str, Any]
    model_path: str
    verdict_file: VerdictFile | None = None
    decisions: dict[str, str] = field(default_factory=dict)
    is_whole: bool = False
    offloaded: tuple[str, ...] = ()
    """Components that wait on the host, whole."""
    compiled: tuple[str, ...] = ()
    """Components that are compiled, now or later."""
    compilation: Compilation | None = None
    """How."""
    sharing: Sharing = NOTHING
    """What all ranks have."""
    call_defaults: dict[str, int] = field(default_factory=dict)
    """What the front says of requests that leave size, frames or steps open."""
    refresh: Callable[[int], None] | None = None
    """Called before each request, with the number of its steps."""
    _siblings: dict[str, Any] = field(default_factory=dict)

    @property
    def is_compiled_aside(self) -> bool:
        """Whether another process compiles what is compiled."""
        return self.compilation is not None and self.compilation.is_aside

    def pipeline_for(self, given: Collection[str]) -> Any:
        """The pipeline that takes these arguments; a sibling has the same components, which aren't cast or moved.

        :raises InvalidRequest: there is none.
        """
        accepted = self._accepted
        needed = next((name for name in _SIBLINGS if name in given), None)
        if needed is None or needed in accepted:
            return self.pipeline
        if needed not in self._siblings:
            self._siblings[needed] = _sibling(self.pipeline, needed)
        return self._siblings[needed]

    @property
    def _accepted(self) -> Collection[str]:
        """What the pipeline takes. A modular one's __call__ takes anything; its blocks say what they use."""
        of_blocks: Collection[str] | None = getattr(self.pipeline, "default_call_parameters", None)
        return inspect.signature(self.pipeline.__call__).parameters if of_blocks is None else of_blocks

    @property
    def makes_videos(self) -> bool:
        """Whether it may: what only makes pictures of its frames doesn't, unless it is asked how many there are."""
        has_processor = {kind: hasattr(self.pipeline, f"{kind}_processor") for kind in ("image", "video")}
        is_of_pictures = has_processor["image"] and not has_processor["video"]
        return not is_of_pictures or any(name in self._accepted for name in ("num_frames", "video_length"))

    def takes(self, name: str) -> bool:
        """Whether there is a pipeline with this argument."""
        try:
            return self.pipeline_for({name}) is not None
        except InvalidRequest:
            return False

    def info(self) -> ModelInfo:
        """What the front says of the model."""
        modules = {n: m for n, m in self.pipeline.components.items() if isinstance(m, torch.nn.Module)}
        return ModelInfo(
            model_path=self.model_path,
            pipeline_class=type(self.pipeline).__name__,
            device=str(self.device),
            precisions={
                name: str(dtype_of(module)).removeprefix("torch.")
                for name, module in modules.items()
                if next(module.parameters(), None) is not None
            },
            fps=self.defaults.get("fps"),
            inputs=tuple(name for name in sorted(_SIBLINGS) if self.takes(name)),
            device_name=_device_name(self.device),
            identity=self.verdict_file.name if self.verdict_file is not None else None,
            decisions=self.decisions,
            is_whole=self.is_whole,
            call_defaults=self.call_defaults,
            makes_videos=self.makes_videos,
        )


def load(config: EngineConfig, rank: int = 0, tell: Tell = nobody) -> LoadedModel:
    """Load a model onto its device.

    :param rank: of those of its replica; each has a device of its own, and the first one all components.
    :param tell: is told how far it is.
    :raises ModelError: it can't be found, read or served.
    """
    tell(f"looking at {config.model_path}")
    planned = plan(config)
    device = _device(planned, rank)
    recommended, is_whole = defaults(planned.source), planned.backend.is_whole
    pipeline, quantized = _placed(planned, rank, device, tell)
    if not rank or "vae" in planned.sharing.names:
        _set_up_vae(pipeline, config)
    sharing, in_tiles = with_tiles(planned.sharing, pipeline.components, config.parallel)
    of_parts = {name: in_parts(pipeline.components[name]) for name in sharing.divided.names}
    guidance, of_noise = noise.apply(config.noise, pipeline, config.model_path)
    refresh = cache_dit.apply(planned.cached, pipeline) if planned.cached is not None else None
    tell("choosing a kernel of attention", at_once=device.type == "cuda")
    of_attention = _settle_attention(planned, pipeline, device)
    compilation = performance.choose(config, device.type, is_whole=is_whole)
    compiled, of_compilation = _compiled(planned, pipeline, compilation)
    decisions = planned.decisions()
    of_model = {"model": of_noise} if of_noise else {}
    for notes in (quantized, of_attention, in_tiles, of_parts, of_model, of_compilation):
        decisions = with_notes(decisions, notes)
    return LoadedModel(
        pipeline,
        device,
        recommended | guidance,
        config.model_path,
        VerdictFile(planned.source, planned.index, planned.components),
        decisions,
        is_whole=is_whole,
        offloaded=() if is_whole else tuple(part.name for part in planned.components if part.place == "offload"),
        compiled=compiled,
        sharing=sharing,
        compilation=compilation,
        refresh=refresh,
        call_defaults={} if rank else counts(planned),
    )


def _device(planned: Plan, rank: int) -> torch.device:
    """The device of a rank, which is this thread's from now on."""
    config = planned.config
    # With its index: a task's thread has to be told which device is its own.
    device = torch.device("cuda", rank) if planned.device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The main thread runs the forwards.
    torch.set_num_threads(config.num_cpu_threads or max(1, (os.cpu_count() or 1) // config.parallel.num_ranks))
    return device


def _placed(planned: Plan, rank: int, device: torch.device, tell: Tell) -> tuple[Any, dict[str, str]]:
    """The pipeline of a rank with its components in their places, and what is to be said of those quantized now."""
    config = planned.config
    try:
        with reading(tell):
            pipeline = _pipeline(planned, rank)
        if rank:
            _keep_only(pipeline, planned.sharing.names)
        quantized = quantize_components(planned.components, pipeline.components, config.quantized, device)
        if device.type == "cuda":
            size = sum(size_gb(part) for part in pipeline.components.values() if isinstance(part, torch.nn.Module))
            tell(f"moving {size:.1f} GB to {device}", at_once=True)
        places = {part.name: part.place for part in planned.components if part.place != "device"}
        is_whole = planned.backend.is_whole
        place(pipeline, places, device, pins=config.memory.pin_cpu_memory, is_whole=is_whole)
    except LOAD_ERRORS as error:
        raise ModelError(f"{config.model_path} can't be loaded: {one_line(error)}") from error
    return pipeline, quantized


def _settle_attention(planned: Plan, pipeline: Any, device: torch.device) -> dict[str, str]:
    """Give components the kernel that was asked for, or the fastest; what is to be said of them."""
    parts = pipeline.components.items()
    if planned.attention is not None:
        return attention.apply(planned.attention, parts)
    if planned.backend.is_whole:
        return {}
    divisors = attention_choice.head_divisors(planned.sharing, planned.config.parallel)
    return attention_choice.settle(parts, device, divisors)


def _compiled(planned: Plan, pipeline: Any, compilation: Compilation | None) -> tuple[tuple[str, ...], dict[str, str]]:
    """Which components are compiled, now or later, and what is to be said of them."""
    if compilation is None:
        return (), {}
    denoisers = {part.name: pipeline.components[part.name] for part in planned.components if part.can_be_compiled}
    names, notes = compilation.components(denoisers)
    if not compilation.is_aside:
        compile_components({name: denoisers[name] for name in names}, in_order=bool(planned.sharing.denoisers))
    return names, notes


def _pipeline(planned: Plan, rank: int) -> Any:
    dtypes = {part.name: DTYPES[part.precision] for part in planned.components if part.precision}
    # Of parts that the index doesn't name; most get the same.
    dtype: Any = dtypes | {"default": next(iter(dtypes.values()), torch.float32)}
    parts = _parts(planned, rank)
    if planned.scheduler is not None:
        parts[noise.NAME] = planned.scheduler
    source, config = planned.source, planned.config
    if source.file is not None:
        return load_from_file(planned, parts)
    given: dict[str, Any] = {"revision": source.revision, "trust_remote_code": config.trust_remote_code, "dtype": dtype}
    if is_modular(planned.index):
        variants = {part.name: part.source.variant for part in planned.components if part.source.variant}
        return load_modular(source, parts, variants=variants, **given)
    given |= {"variant": config.source.variant, "custom_pipeline": config.source.custom_pipeline}
    is_own = isinstance(planned.index["_class_name"], list)
    # By its own class: DiffusionPipeline doesn't know which parts may be left out, and loads these although they are
    # given.
    general = diffusers.DiffusionPipeline
    cls: Any = general if is_own else getattr(diffusers, planned.pipeline_class, general)
    pipeline = cls.from_pretrained(_local_copy(source), **given, **parts)
    # A class of the model's own is known only now.
    pipeline.register_modules(**{n: p for n, p in parts.items() if getattr(pipeline, n, None) is not p})
    return pipeline


def _parts(planned: Plan, rank: int) -> dict[str, Any]:
    """Components that are loaded by themselves, and what stands for those that a rank doesn't keep."""
    others = [part for part in planned.components if rank and part.name not in planned.sharing.names]
    parts = {part.name: stand_in(part) for part in others if planned.source.file is None}
    own = (part for part in planned.components if part.is_separate or part.has_parts)
    loaded = {part.name: load_component(part, planned, rank) for part in own if parts.get(part.name) is None}
    return {name: part for name, part in parts.items() if part is not None} | loaded


def _keep_only(pipeline: Any, names: Collection[str]) -> None:
    """Have no models but these."""
    rest = [n for n, part in pipeline.components.items() if isinstance(part, torch.nn.Module) and n not in names]
    for name in rest:
        setattr(pipeline, name, None)


def _local_copy(source: ModelSource) -> str:
    """What diffusers loads; it can't load a pipeline from a subfolder of a repository."""
    if source.folder is not None or source.subfolder is None:
        return source.pretrained_name
    return str(fetch(source.pretrained_name, source.revision, allow=[source.inside("*")]) / source.subfolder)


def _device_name(device: torch.device) -> str:
    """The same for devices on which a forward takes the same time."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{processor or platform.machine()}, {torch.get_num_threads()} threads"


def _set_up_vae(pipeline: Any, config: EngineConfig) -> None:
    vae = getattr(pipeline, "vae", None)
    for is_wanted, method in ((config.vae_tiling, "enable_tiling"), (config.vae_slicing, "enable_slicing")):
        if not is_wanted:
            continue
        try:
            getattr(vae, method)()
        except (AttributeError, NotImplementedError):
            message = f"{method} is asked for, but {type(vae).__name__} of {config.model_path} doesn't have it"
            raise ModelError(message) from None


def _sibling(pipeline: Any, needed: str) -> Any:
    """The pipeline of the same model for another input, from the same components. `from_pipe` would cast them."""
    from diffusers.pipelines import auto_pipeline

    kind, what, mapping = _SIBLINGS[needed]
    name = type(pipeline).__name__
    sibling = auto_pipeline._get_task_class(getattr(auto_pipeline, mapping), name, throw_error_if_not_exist=False)
    if sibling is None:
        raise InvalidRequest(f"{name} takes no {what}, and has no {kind} sibling", "image_path")
    accepted = inspect.signature(sibling.__init__).parameters
    own = {n: v for n, v in pipeline.config.items() if n[0] != "_"} | pipeline.components
    return sibling(**{name: part for name, part in own.items() if name in accepted})
