"""Components go where the plan has them, and denoisers are compiled where that is asked for."""

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from sgld.errors import ModelError
from sgld.models.roles import Place

# So many forms of calls (one row or several, sizes that a kernel needs to know) are compiled of a layer. Beyond that
# torch would go on without compiling, and bits would change.
_MAX_FORMS = 64
# Else torch sends what ranks exchange as late as it can: that takes less memory, and they wait for it.
_IN_ORDER = {"reorder_for_peak_memory": False}


def place(
    pipeline: Any, places: Mapping[str, Place], device: torch.device, *, pins: bool, is_whole: bool = False
) -> None:
    """Move the components to where they belong; those that are offloaded as a whole stay where they were loaded.

    :param places: of components that aren't simply on the device.
    :param pins: weights that come layer by layer wait in pinned memory.
    :param is_whole: the pipeline runs its models itself, so those that are offloaded are moved by diffusers.
    :raises ModelError: a component can't be offloaded by layers.
    """
    if not places:
        pipeline.to(device)
        return
    for name, component in pipeline.components.items():
        if not isinstance(component, nn.Module):
            continue
        match places.get(name):
            case "layerwise":
                _offload_layers(name, component, device, pins=pins)
            case None | "device":
                component.to(device)
    if is_whole and "offload" in places.values():
        stays = [name for name in pipeline.components if places.get(name) != "offload"]
        pipeline._exclude_from_cpu_offload = [*pipeline._exclude_from_cpu_offload, *stays]
        pipeline.enable_model_cpu_offload(device=device)


def _offload_layers(name: str, component: Any, device: torch.device, *, pins: bool) -> None:
    try:
        component.enable_group_offload(
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=device.type == "cuda",
            record_stream=device.type == "cuda",
            low_cpu_mem_usage=not pins,
        )
    except (AttributeError, ValueError):
        kind = type(component).__name__
        message = f"dit_layerwise_offload is asked for, but {name} ({kind}) can't be offloaded by layers"
        raise ModelError(f"{message}; use dit_cpu_offload") from None


def dtype_of(component: nn.Module) -> torch.dtype:
    """The dtype in which a component computes; a model may keep some of its weights in another."""
    own = getattr(component, "dtype", None)
    weights = (weight.dtype for weight in component.parameters() if weight.is_floating_point())
    return own if isinstance(own, torch.dtype) else next(weights, torch.float32)


def compile_components(components: Mapping[str, Any], *, in_order: bool = False) -> None:
    """Have components compiled in place by their first forwards.

    One compilation is for all sizes and numbers of rows, but for one row.

    :param in_order: of operators as the model has it, whatever memory that takes: ranks exchange something meanwhile.
    """
    for component in components.values():
        for part in regions(component) if isinstance(component, nn.Module) else ():
            compile_module(part, in_order=in_order)


def regions(component: nn.Module) -> list[nn.Module]:
    """What of a component is compiled by itself: the layers that it repeats, if it names them, else all of it."""
    names = getattr(component, "_repeated_blocks", None) or ()
    return [part for part in component.modules() if type(part).__name__ in names] or [component]


def compile_module(module: nn.Module, *, in_order: bool = False) -> None:
    """Have a module compiled in place by its first forwards; `in_order` as of `compile_components`."""
    import torch._dynamo.config  # takes a second, and only compilation needs it
    import torch.fx.experimental._config

    torch._dynamo.config.recompile_limit = _MAX_FORMS
    # All is dynamic from the start. What is compiled doesn't depend on what was before, so another process can do it;
    # nor on lengths that happen to be equal, as two rows and two heads: three rows would be compiled once more.
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch.fx.experimental._config.use_duck_shape = False
    # Of sizes only: an epsilon that is a variable has every trace done twice, and nothing of it is found in the cache.
    torch._dynamo.config.specialize_float = True
    module.compile(dynamic=True, options=_IN_ORDER if in_order else None)
    called = _called_with_numbers if _takes_numbers(module) else _called
    module._compiled_call_impl = functools.partial(called, module._compiled_call_impl)


def _takes_numbers(module: nn.Module) -> bool:
    """Whether requests may choose numbers that its forward is given, as the scale of a ControlNet."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return any(float in (each.annotation, type(each.default)) or each.annotation == "float" for each in parameters)


def _called(compiled: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    assert compiled is not None
    return compiled(*plain(args), **plain(kwargs))


def _called_with_numbers(compiled: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    """One compilation for all of them."""
    with torch._dynamo.config.patch(specialize_float=False):
        return _called(compiled, *args, **kwargs)


def plain(value: Any) -> Any:
    """The same values in tensors that aren't views of others and have no strides that mean nothing, as that of one row.

    Torch compiles once more where these differ: FLUX's first block is given whole tensors, and the next ones parts.
    """
    if isinstance(value, torch.Tensor):
        is_known = type(value) is torch.Tensor and not value.requires_grad
        return value.view(value.shape).detach() if is_known and (value._base is not None or 1 in value.shape) else value
    if type(value) in (tuple, list):
        parts = [plain(part) for part in value]
        # A module may write into what it is given.
        return value if all(map(operator.is_, parts, value)) else type(value)(parts)
    if type(value) is dict:
        named = {key: plain(part) for key, part in value.items()}
        return value if all(named[key] is part for key, part in value.items()) else named
    return value


def decompile(parts: Iterable[nn.Module]) -> None:
    """Undo `compile_components` for the modules of one of them."""
    for part in parts:
        part._compiled_call_impl = None
