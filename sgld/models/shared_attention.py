"""Attention of tokens that ranks share, in the place of what models compute: diffusers' dispatcher and torch's own."""

import ast
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.models import attention_dispatch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sgld.errors import ModelError
from sgld.models.peers import Peers
from sgld.models.tokens import Compute, Tokens


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


class SharedLinearAttention(TorchFunctionMode):
    """Linear attention: values times keys, its first product of matrices, is the sum over the tokens of all ranks."""

    def __init__(self, tokens: Tokens) -> None:
        super().__init__()
        self._tokens, self._is_summed = tokens, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not torch.matmul or self._is_summed:
            return result
        self._is_summed = True
        return self._tokens.total(result)


class SharedAttention(TorchFunctionMode):
    """Attention that torch computes is among the tokens of all ranks."""

    def __init__(self, tokens: Tokens) -> None:
        super().__init__()
        self._tokens = tokens

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return self._attended(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attended(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """All but the first three are the same, and in the same order."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        kwargs |= {"forward_op": attention_dispatch._native_attention_forward_op, "_parallel_config": self._tokens}
        return shared_attention(query, key, value, *args, **kwargs).transpose(1, 2)


class Intercept(ModelHook):  # type: ignore[misc]
    """Some functions of torch do another thing inside of a module.

    :param mode: what they do.
    """

    def __init__(self, tokens: Tokens, mode: Callable[[Tokens], TorchFunctionMode] = SharedAttention) -> None:
        super().__init__()
        self._tokens, self._mode = tokens, mode

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with self._mode(self._tokens):
            return self.fn_ref.original_forward(*args, **kwargs)


def shared_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    *,
    forward_op: Any,
    _parallel_config: Tokens,
    **_: Any,
) -> torch.Tensor:
    """What diffusers' kernels do of tokens (B, S, H, D) that are shared: its `_templated_context_parallel_attention`.

    :param forward_op: the kernel, for tensors of one rank.
    """
    if is_causal or return_lse:
        raise ValueError("attention that is causal, or returns more than its result, can't be shared by ranks")
    tokens = _parallel_config
    if torch.compiler.is_compiling() and isinstance(tokens.ranks.exchange, Peers):
        partial = isinstance(forward_op, functools.partial)
        kernel, options = (forward_op.func, forward_op.keywords) if partial else (forward_op, {})
        named = kernel.__name__, _written(tuple(sorted(options.items())))
        return _attended(query, key, value, attn_mask, *named, dropout_p, scale, enable_gqa)  # type: ignore[no-any-return]
    return tokens.attention(query, key, value, attn_mask, _computing(forward_op, dropout_p, scale, enable_gqa))


def _computing(forward_op: Any, dropout_p: float, scale: float | None, enable_gqa: bool) -> Compute:
    def compute(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> Any:
        is_grouped = enable_gqa and key.shape[2] != query.shape[2]
        return forward_op(
            None, query, key, value, mask, dropout_p, False, scale, is_grouped, False,
            _save_ctx=False, _parallel_config=None,
        )  # fmt: skip

    return compute


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _written(options: tuple[tuple[str, Any], ...]) -> str:
    """Options of a kernel, as compiled code has them."""
    return repr(options)


@torch.library.custom_op("sgld::shared_attention", mutates_args=())
def _attended(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    kernel: str,
    options: str,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """One operator for compiled code: nothing of it touches memory that other GPUs write into.

    :param kernel: the name of diffusers' function, with these `options`.
    """
    assert Tokens.running is not None
    forward_op = functools.partial(getattr(attention_dispatch, kernel), **dict(ast.literal_eval(options)))
    compute = _computing(forward_op, dropout_p, scale, enable_gqa)
    with torch._C.DisableTorchFunction():
        return Tokens.running.attention(query, key, value, mask, compute).contiguous()


@_attended.register_fake
def _(query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


def _native_attention_forward_op(
    ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool, *_: Any, **__: Any,
) -> torch.Tensor:  # fmt: skip
    """Torch's own attention, or what was measured to be faster."""
    registry = attention_dispatch._AttentionBackendRegistry
    native: Any = registry._backends[attention_dispatch.AttentionBackendName.NATIVE]
    result: torch.Tensor = native(
        query, key, value, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return result


_theirs = attention_dispatch._templated_context_parallel_attention


def _templated(*args: Any, _parallel_config: Any = None, **kwargs: Any) -> torch.Tensor:
    compute: Any = shared_attention if isinstance(_parallel_config, Tokens) else _theirs
    return compute(*args, _parallel_config=_parallel_config, **kwargs)  # type: ignore[no-any-return]


def prepare() -> None:
    """Have attention of diffusers be shared as `Tokens` does it, for all of its kernels.

    What diffusers itself was told to share is left to it.
    """
    attention_dispatch._templated_context_parallel_attention = _templated
    attention_dispatch._native_attention_forward_op = _native_attention_forward_op
    # Kept between calls it would be known on one stream, and read on others.
    without_mask = "_prepare_for_flash_attn_or_sage_varlen_without_mask"
    vars(attention_dispatch)[without_mask] = inspect.unwrap(getattr(attention_dispatch, without_mask))
