"""Sequence parallelism through diffusers' context parallelism: the tokens of a forward are shared by several ranks."""

import warnings
from typing import Any

import torch
from diffusers.hooks import context_parallel
from diffusers.models import _modeling_parallel, attention_dispatch
from diffusers.models._modeling_parallel import ContextParallelConfig
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from sgld.errors import ModelError
from sgld.parallel import ParallelConfig

# Plans for models that have none of their own, by class name.
_PLANS: dict[str, dict[str, Any]] = {}
_UNEVEN = "must be divisible by mesh size"


def plan_of(cls: type) -> dict[str, Any] | None:
    """How a class of models splits its tokens and gathers them again; None: nobody knows."""
    plan = getattr(cls, "_cp_plan", None) or _PLANS.get(cls.__name__)
    return dict(plan) if plan else None


def check_attention(component: Any) -> None:
    """See that tokens can be shared with the kernel of attention that was chosen.

    :raises ModelError: they can't; says with which they can.
    """
    registry = attention_dispatch._AttentionBackendRegistry
    for part in component.modules():
        chosen = getattr(getattr(part, "processor", None), "_attention_backend", None)
        backend = (
            registry.get_active_backend()[0] if chosen is None else attention_dispatch.AttentionBackendName(chosen)
        )
        if not registry._is_context_parallel_available(backend):
            able = ", ".join(sorted(map(str, registry._supports_context_parallel)))
            raise ModelError(f"attention backend {backend.value} can't share tokens between GPUs; use one of {able}")


class Sequence:
    """The tokens of one component, shared by the ranks of a mesh ("ring", "ulysses").

    Each length is tried in equal parts first; where it can't be, all of that form are split unevenly, which costs a
    message at each attention. All ranks find that out by themselves, before they say anything to one another.
    """

    def __init__(self, component: Any, parallel: ParallelConfig, mesh: DeviceMesh, device: torch.device) -> None:
        plan = plan_of(type(component))
        assert plan is not None, "it was checked before anything was loaded"
        check_attention(component)
        self._parallel = parallel
        self._config = ContextParallelConfig(ring_degree=parallel.ring, ulysses_degree=parallel.ulysses)
        config = _modeling_parallel.ParallelConfig(context_parallel_config=self._config)
        config.setup(torch.distributed.get_rank(), torch.distributed.get_world_size(), device, mesh=mesh)
        component._parallel_config = config
        for part in component.modules():
            processor = getattr(part, "processor", None)
            if processor is not None and hasattr(processor, "_parallel_config"):
                processor._parallel_config = config
        heads = getattr(component.config, "num_attention_heads", None)
        self._is_always_uneven = isinstance(heads, int) and heads % parallel.ulysses != 0
        self._uneven: set[str] = set()
        context_parallel.apply_context_parallel(component, self._config, plan)

    def run(self, form: str, forward: Any) -> Any:
        """Run a forward of calls of one form.

        :raises ValueError: the tokens can't be shared by so many ranks.
        """
        self._split_unevenly(self._is_always_uneven or form in self._uneven)
        try:
            return forward()
        except AssertionError as error:
            if _UNEVEN not in str(error) or form in self._uneven:
                raise
        if not self._can_be_uneven:
            raise ValueError(
                f"the number of tokens of this request isn't a multiple of sp_degree {self._parallel.sp}, which"
                f" ulysses_degree {self._parallel.ulysses} x ring_degree {self._parallel.ring} need; ask for another"
                " size, or start with one of them only"
            )
        self._uneven.add(form)
        self._split_unevenly(True)
        return forward()

    @property
    def _can_be_uneven(self) -> bool:
        return 1 in (self._parallel.ulysses, self._parallel.ring)

    def _split_unevenly(self, is_uneven: bool) -> None:
        self._config.ulysses_anything = is_uneven and self._parallel.ring == 1
        self._config.ring_anything = is_uneven and self._parallel.ulysses == 1


def attention_with_lse(
    ctx: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _save_ctx: bool = True,
    _parallel_config: Any = None,
) -> Any:
    """Torch's own attention of (B, S, H, D), with the logarithm (B, S, H) of its denominators, which a ring needs."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if attn_mask is not None and attn_mask.ndim == 4 and attn_mask.shape[1] > query.shape[1]:
        # Repeated for all heads of the model, of which this rank has some.
        attn_mask = attn_mask[:, : query.shape[1]]
    if not return_lse:
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return out.transpose(1, 2)
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )
    elif attn_mask is None and query.dtype in (torch.float16, torch.bfloat16):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, return_debug_mask=False, scale=scale
        )
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
        )
    return out.transpose(1, 2), lse[:, :, : query.shape[2]].transpose(1, 2)


def gather_uneven(tensor: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
    """Tensors of all ranks joined along `dim`, where they may differ in length, on each of them."""
    sizes = _modeling_parallel.gather_size_by_comm(tensor.shape[dim], group)
    shape = list(tensor.shape)
    shape[dim] = max(sizes)
    padded = tensor.new_zeros(shape)
    padded.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    gathered = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(gathered, padded, group=group)
    return torch.cat([part.narrow(dim, 0, size) for part, size in zip(gathered, sizes, strict=True)], dim=dim)


def prepare() -> None:
    """Have diffusers' `native` attention take part in a ring, and gloo gather what is of different lengths."""
    attention_dispatch._native_attention_forward_op = attention_with_lse
    context_parallel._all_gather_anything = gather_uneven
    # What diffusers calls was renamed in torch 2.13.
    warnings.filterwarnings("ignore", "`torch.distributed._functional_collectives", FutureWarning)
