"""Which calls may share a CUDA graph: what is equal for all its uses is its key; tensors among the arguments differ."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import nn

from sgld.messages import Variant
from sgld.worker.axes import is_constant
from sgld.worker.invocation import Invocation
from sgld.worker.recorder import Unfit
from sgld.worker.trees import is_sequence

# With which ranks share tokens.
_SHARES = "sgld.models.sequence", "sgld.models.shared_attention"


class Key(NamedTuple):
    """Calls with an equal one may share a graph."""

    module: nn.Module
    method: str
    fixed: tuple[Variant, Hashable]
    """What beside the arguments is the same in each use: how it runs without a graph, and adapters."""
    state: tuple[object, ...]
    signature: tuple[object, ...]


def key_of(invocation: Invocation, variant: Variant, device_type: str) -> tuple[Key, list[torch.Tensor]]:
    """The key of an invocation, and its tensors.

    :param variant: what its graph is captured of.
    :raises Unfit: an argument isn't only its value, or is read by the host.
    """
    parts, tensors = flattened(invocation.tree, device_type)
    is_autocast = torch.is_autocast_enabled("cuda")
    state = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_autocast_dtype("cuda") if is_autocast else None,
    )
    fixed = (variant, invocation.fixed)
    return Key(invocation.module, invocation.method, fixed, state, tuple(parts)), tensors


def flattened(tree: Any, device_type: str) -> tuple[list[object], list[torch.Tensor]]:
    """What is equal in all uses of a graph, and the tensors that may differ.

    :raises Unfit: a leaf isn't only its value, or is read by the host.
    """
    parts: list[object] = []
    tensors: list[torch.Tensor] = []
    _flatten(tree, parts, tensors, device_type)
    return parts, tensors


def unfit(module: nn.Module) -> str:
    """Why a component can't be captured, as far as one can see: Python that runs in each forward isn't in a graph.

    The hooks with which transformers collects results are no matter: they return what the forward made. Nor are those
    with which ranks share tokens: what they do depends on shapes only.
    """
    for name, part in module.named_modules():
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        if any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks):
            return f"a hook is on {name or 'it'}"
        registry = getattr(part, "_diffusers_hook", None)
        of_diffusers = registry.hooks.values() if registry is not None else ()
        if hasattr(part, "_hf_hook") or any(type(hook).__module__ not in _SHARES for hook in of_diffusers):
            return f"a hook is on {name or 'it'}"
    return ""


def _flatten(node: Any, parts: list[object], tensors: list[torch.Tensor], device_type: str) -> None:
    """Append what is equal in all uses of a graph to `parts`, and the tensors."""
    if isinstance(node, torch.Tensor):
        if type(node) is not torch.Tensor and type(node) is not nn.Parameter:
            raise Unfit(f"an argument is a {type(node).__name__}")
        if node.device.type != device_type:
            raise Unfit(f"an argument is a tensor on {node.device}")
        parts.append((node.shape, None if node.is_contiguous() else node.stride(), node.dtype, node.device.index))
        tensors.append(node)
    elif isinstance(node, dict):
        parts.append((type(node), tuple(node)))
        for value in node.values():
            _flatten(value, parts, tensors, device_type)
    elif is_sequence(node):
        parts.append((type(node), len(node)))
        for value in node:
            _flatten(value, parts, tensors, device_type)
    elif isinstance(node, torch.Generator):
        # Most decoders are given one and draw nothing; those that draw are refused.
        parts.append((torch.Generator, node.device.type))
    elif is_constant(node):
        parts.append((type(node), node))
    else:
        raise Unfit(f"an argument is a {type(node).__name__}, which may have a state")
