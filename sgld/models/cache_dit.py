"""The cache-dit library, which skips blocks of denoisers where diffusers alone runs a pipeline.

It has one memory for each model, so it is for requests that run one at a time; it is emptied before each. Settings come
from a file (`--cache-dit-config`), or from the variables that SGLang has for it.
"""

import dataclasses
import difflib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from sgld.config import CacheDitConfig
from sgld.errors import ModelError
from sgld.models.backend import Backend
from sgld.outcome import message_of

Options = dict[str, Any]
"""Of one model, by cache-dit's names."""
_PRESETS = ("slow", "medium", "fast", "ultra")
_ON, _OFF = frozenset({"1", "true", "yes", "on"}), frozenset({"", "0", "false", "no", "off"})
# What a calibrator takes, which cache-dit reads from the same object as the rest.
_CALIBRATOR = frozenset(
    {"enable_taylorseer", "enable_encoder_taylorseer", "taylorseer_cache_type", "taylorseer_order", "enable_dmd"}
    | {"enable_encoder_dmd", "dmd_history", "dmd_rank", "dmd_ridge", "dmd_svd_precision", "calibrator_cache_type"}
    | {"enable_foca", "enable_encoder_foca"}
)
# What else its files may hold, and who has that here.
_ELSEWHERE = {
    "parallelism_config": "with Cache-DiT there is one GPU for each copy of the model",
    "quantize_config": "quantize with --quantization",
    "attention_backend": "choose it with --attention-backend",
}


@dataclass(frozen=True)
class CacheDit:
    """What was decided: options of the denoiser, of the second one where that has others, and which steps compute.

    `preset` or `bins` tell these by the number of steps of a request.
    """

    primary: Options
    secondary: Options
    preset: str | None = None
    bins: tuple[list[int], list[int]] | None = None
    source: str = "SGLANG_CACHE_DIT_ENABLED"

    @property
    def note(self) -> str:
        """The decision, for people."""
        said = [f"{name} {value}" for name, value in self.primary.items()]
        return f"cache-dit, by {self.source}: {', '.join(said) or 'its own defaults'}"


def asked_for(config: CacheDitConfig) -> str | None:
    """What asks for cache-dit, if something does.

    :raises ModelError: a variable is neither on nor off.
    """
    if config.cache_dit_config is not None:
        return "cache_dit_config"
    return "SGLANG_CACHE_DIT_ENABLED" if _switch(os.environ.get("SGLANG_CACHE_DIT_ENABLED"), "ENABLED") else None


def choose(config: CacheDitConfig, backend: Backend) -> CacheDit | None:
    """Decide how cache-dit is used; None: it isn't asked for.

    :raises ModelError: it can't be had; an option is unknown or has a value that it can't have.
    """
    source = asked_for(config)
    if source is None:
        return None
    if not backend.is_whole:
        raise ModelError(
            f"{source} asks for cache-dit, which works with --backend diffusers; in sgld's engine each request may ask "
            'for a step cache, as --cache \'{"method": "first_block"}\''
        )
    if config.cache_dit_config is None:
        return _of_variables()
    return _of_file(config.cache_dit_config)


def _of_file(given: str) -> CacheDit:
    """A path of YAML or JSON, or JSON itself."""
    try:
        content = json.loads(given) if given.lstrip().startswith("{") else yaml.safe_load(Path(given).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ModelError(f"cache_dit_config {given} can't be read: {message_of(error)}") from None
    if not isinstance(content, dict):
        raise ModelError(f"cache_dit_config {given} doesn't hold keys and values")
    for key, instead in _ELSEWHERE.items():
        if key in content:
            raise ModelError(f"cache_dit_config has {key}: {instead}")
    options = content.get("cache_config", content)
    beside = sorted(content.keys() - {"cache_config"}) if "cache_config" in content else []
    if beside or not isinstance(options, dict):
        raise ModelError(f"cache_dit_config has {', '.join(beside) or 'no keys'} where only cache_config may be")
    _check_names(options)
    mask = options.get("steps_computation_mask")
    if not isinstance(mask, str):
        return CacheDit(options, {}, source="cache_dit_config")
    if mask not in _PRESETS:
        raise ModelError(f"steps_computation_mask is {mask!r}; it is a list, or one of {', '.join(_PRESETS)}")
    rest = {n: v for n, v in options.items() if n not in ("steps_computation_mask", "num_inference_steps")}
    return CacheDit(rest, {}, preset=mask, source="cache_dit_config")


def _check_names(options: Mapping[str, Any]) -> None:
    """See that no key is a slip: cache-dit takes no notice of those that it doesn't know."""
    library = _library()
    configs = (library.DBCacheConfig, library.DBPruneConfig)
    known = _CALIBRATOR | {field.name for config in configs for field in dataclasses.fields(config)}
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ModelError(f"cache_dit_config has {name!r}, which cache-dit doesn't know{hint}")


def _of_variables() -> CacheDit:
    options: Options = {
        "Fn_compute_blocks": _number(os.environ.get("SGLANG_CACHE_DIT_FN"), "FN", int, 1),
        "Bn_compute_blocks": _number(os.environ.get("SGLANG_CACHE_DIT_BN"), "BN", int, 0),
        "max_warmup_steps": _number(os.environ.get("SGLANG_CACHE_DIT_WARMUP"), "WARMUP", int, 4),
        "residual_diff_threshold": _number(os.environ.get("SGLANG_CACHE_DIT_RDT"), "RDT", float, 0.24),
        "max_continuous_cached_steps": _number(os.environ.get("SGLANG_CACHE_DIT_MC"), "MC", int, 3),
    }
    taylor = _switch(os.environ.get("SGLANG_CACHE_DIT_TAYLORSEER"), "TAYLORSEER")
    order = _number(os.environ.get("SGLANG_CACHE_DIT_TS_ORDER"), "TS_ORDER", int, 1)
    if taylor:
        options |= {"enable_taylorseer": True, "taylorseer_order": order}
    if _switch(os.environ.get("SGLANG_CACHE_DIT_DMD"), "DMD"):
        if taylor:
            raise ModelError("SGLANG_CACHE_DIT_TAYLORSEER and SGLANG_CACHE_DIT_DMD exclude each other")
        options |= {
            "enable_dmd": True,
            "dmd_history": _number(os.environ.get("SGLANG_CACHE_DIT_DMD_HISTORY"), "DMD_HISTORY", int, 6),
            "dmd_rank": _number(os.environ.get("SGLANG_CACHE_DIT_DMD_RANK"), "DMD_RANK", int, 0),
            "dmd_ridge": _number(os.environ.get("SGLANG_CACHE_DIT_DMD_RIDGE"), "DMD_RIDGE", float, 1e-8),
            "dmd_svd_precision": os.environ.get("SGLANG_CACHE_DIT_DMD_SVD_PRECISION") or "medium",
        }
    preset, bins = _steps_of_variables()
    policy = _policy(os.environ.get("SGLANG_CACHE_DIT_SCM_POLICY"))
    if preset or bins:
        options["steps_computation_policy"] = policy
    return CacheDit(options, _secondary(order), preset, bins)


def _secondary(order: int) -> Options:
    """What the second denoiser has otherwise."""
    given: dict[str, Any] = {
        "Fn_compute_blocks": _number(os.environ.get("SGLANG_CACHE_DIT_SECONDARY_FN"), "SECONDARY_FN", int),
        "Bn_compute_blocks": _number(os.environ.get("SGLANG_CACHE_DIT_SECONDARY_BN"), "SECONDARY_BN", int),
        "max_warmup_steps": _number(os.environ.get("SGLANG_CACHE_DIT_SECONDARY_WARMUP"), "SECONDARY_WARMUP", int),
        "residual_diff_threshold": _number(
            os.environ.get("SGLANG_CACHE_DIT_SECONDARY_RDT"), "SECONDARY_RDT", float, None
        ),
        "max_continuous_cached_steps": _number(
            os.environ.get("SGLANG_CACHE_DIT_SECONDARY_MC"), "SECONDARY_MC", int, None
        ),
    }
    taylor = os.environ.get("SGLANG_CACHE_DIT_SECONDARY_TAYLORSEER")
    of_second = _number(os.environ.get("SGLANG_CACHE_DIT_SECONDARY_TS_ORDER"), "SECONDARY_TS_ORDER", int)
    if taylor is not None:
        given["enable_taylorseer"] = _switch(taylor, "SECONDARY_TAYLORSEER")
        given["taylorseer_order"] = order
    if of_second is not None:
        given["taylorseer_order"] = of_second
    return {name: value for name, value in given.items() if value is not None}


def _steps_of_variables() -> tuple[str | None, tuple[list[int], list[int]] | None]:
    """Which steps compute: a preset, or bins of steps that compute and of steps that may be skipped."""
    preset = os.environ.get("SGLANG_CACHE_DIT_SCM_PRESET") or "none"
    if preset not in ("none", *_PRESETS):
        raise ModelError(f"SGLANG_CACHE_DIT_SCM_PRESET is {preset!r}; it is one of none, {', '.join(_PRESETS)}")
    compute = _numbers(os.environ.get("SGLANG_CACHE_DIT_SCM_COMPUTE_BINS"), "SCM_COMPUTE_BINS")
    cache = _numbers(os.environ.get("SGLANG_CACHE_DIT_SCM_CACHE_BINS"), "SCM_CACHE_BINS")
    if bool(compute) != bool(cache):
        raise ModelError("SGLANG_CACHE_DIT_SCM_COMPUTE_BINS and SGLANG_CACHE_DIT_SCM_CACHE_BINS go together")
    return None if preset == "none" else preset, (compute, cache) if compute else None


def _policy(value: str | None) -> Literal["dynamic", "static"]:
    if value == "static":
        return "static"
    if value in (None, "", "dynamic"):
        return "dynamic"
    raise ModelError(f"SGLANG_CACHE_DIT_SCM_POLICY is {value!r}; it is dynamic or static")


def _switch(value: str | None, name: str) -> bool:
    said = (value or "").strip().lower()
    if said not in _ON | _OFF:
        raise ModelError(f"SGLANG_CACHE_DIT_{name} is {value!r}; it is true or false")
    return said in _ON


def _number(value: str | None, name: str, kind: Callable[[str], Any], default: Any = None) -> Any:
    try:
        number = kind(value) if value else default
    except ValueError:
        number = -1
    if number is not None and not 0 <= number < float("inf"):
        raise ModelError(f"SGLANG_CACHE_DIT_{name} is {value!r}; it is a number of at least 0")
    return number


def _numbers(value: str | None, name: str) -> list[int]:
    return [_number(part.strip(), name, int) for part in value.split(",")] if value else []


def _library() -> Any:
    """:raises ModelError: it isn't there."""
    try:
        import cache_dit
    except ImportError as error:
        raise ModelError(f"cache-dit can't be imported ({error}): pip install 'sgld[cache-dit]'") from None
    return cache_dit


def apply(chosen: CacheDit, pipeline: Any) -> Callable[[int], None]:
    """Let cache-dit watch the denoisers.

    :return: empties its memory, before a request with so many steps.
    :raises ModelError: it doesn't know the pipeline, or takes an option for wrong.
    """
    library, kind = _library(), type(pipeline).__name__
    from cache_dit.caching.cache_adapters import CachedAdapter

    denoisers = [
        part for name in ("transformer", "transformer_2") if (part := getattr(pipeline, name, None)) is not None
    ]
    if chosen.secondary and len(denoisers) < 2:
        raise ModelError(f"SGLANG_CACHE_DIT_SECONDARY_* are for a second denoiser, {kind} has none")
    if not denoisers or not all(library.BlockAdapterRegister.is_supported(part) for part in denoisers):
        raise ModelError(f"cache-dit doesn't know the denoiser of {kind}")
    guided = {"enable_separate_cfg": library.BlockAdapterRegister.has_separate_cfg(pipeline)}
    options = [guided | chosen.primary | (chosen.secondary if index else {}) for index in range(len(denoisers))]
    try:
        for denoiser, own in zip(denoisers, options, strict=True):
            config, calibrator = library.load_cache_config({"cache_config": own})
            # `enable_cache` would put kernels of its own in the place of diffusers', which don't take each mask.
            CachedAdapter.apply(denoiser, cache_config=config, calibrator_config=calibrator)
    except (ValueError, TypeError, AssertionError, AttributeError) as error:
        raise ModelError(f"cache-dit can't be used with {kind}: {message_of(error)}") from error

    def refresh(num_steps: int) -> None:
        for denoiser, own in zip(denoisers, options, strict=True):
            config, calibrator = library.load_cache_config({"cache_config": own | _mask(library, chosen, num_steps)})
            given = {"cache_config": config} | ({"calibrator_config": calibrator} if calibrator is not None else {})
            library.refresh_context(denoiser, **given)

    return refresh


def _mask(library: Any, chosen: CacheDit, num_steps: int) -> Options:
    """Which steps of a request compute, if that is told by their number."""
    if not num_steps or not (chosen.preset or chosen.bins):
        return {}
    compute, cache = chosen.bins or (None, None)
    try:
        mask = library.steps_mask(compute, cache, num_steps, chosen.preset or "medium")
    except AssertionError as error:
        raise ModelError(f"cache-dit has no mask for {num_steps} steps: {error}") from None
    return {"steps_computation_mask": mask}
