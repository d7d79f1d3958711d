"""Sequence parallelism: the tokens of a denoiser's forward are shared by several ranks, as a plan says."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from sgld.models.shared_attention import Intercept, SharedLinearAttention, check_attention
from sgld.models.token_plans import Argument, Count, Each, Joined, Leading, Output, TokenPlan, Whole, plan_of
from sgld.models.tokens import TokenRanks, Tokens, UnevenTokens

# To forget one costs messages, no more.
MAX_COURSES = 256


class Sequence:
    """The tokens of one component, shared by ranks: always the same ones, or those that a forward names.

    Each length is tried in equal parts first; where it can't be, all of that course are split unevenly. All ranks find
    that out by themselves, before they say anything to one another. What is known of some ranks all of these know.
    """

    def __init__(self, component: Any, ranks: TokenRanks) -> None:
        plan = plan_of(type(component))
        assert plan is not None, "it was checked before anything was loaded"
        check_attention(component)
        self._tokens = Tokens(type(component).__name__, ranks)
        self._uneven: dict[int, dict[str, list[list[int]] | None]] = {}
        """By the number of ranks: courses of which the tokens are split unevenly, and how; None: it isn't known yet."""
        component._parallel_config = self._tokens
        _apply(component, plan, self._tokens)

    def run(self, course: str, forward: Callable[[], Any], ranks: TokenRanks | None = None) -> Any:
        """Run a forward.

        :param course: equal for those that go through the same layers in the same order, with tensors of the same form.
        :raises ValueError: there are fewer tokens than ranks.
        """
        outer, self._tokens.ranks = self._tokens.ranks, ranks or self._tokens.ranks
        try:
            return self._run(course, forward)
        finally:
            # What a task runs of a part of the component by itself it shares with nobody.
            self._tokens.ranks = outer

    def _run(self, course: str, forward: Callable[[], Any]) -> Any:
        uneven = self._uneven.setdefault(self._tokens.ranks.num, {})
        if course not in uneven:
            self._tokens.begin([], is_uneven=False)
            try:
                return forward()
            except UnevenTokens:
                _learn(uneven, course, None)
        lengths = list(uneven[course] or ())
        self._tokens.begin(lengths, is_uneven=True)
        result = forward()
        # One that fails is no measure: others may have come further in it.
        _learn(uneven, course, lengths)
        return result


def _learn(uneven: dict[str, list[list[int]] | None], course: str, lengths: list[list[int]] | None) -> None:
    """What is learned last is kept; all ranks do alike, and so forget alike."""
    uneven.pop(course, None)
    uneven[course] = lengths
    if len(uneven) > MAX_COURSES:
        del uneven[next(iter(uneven))]


def _apply(component: nn.Module, plan: TokenPlan, tokens: Tokens) -> None:
    # The hook that is registered last runs first.
    for index, (name, step) in reversed(list(enumerate(plan.steps))):
        for module in _modules(component, name.split(".") if name else []):
            hook = _Gather(tokens, step) if isinstance(step, Whole) else _Split(tokens, step)
            _hook(module, hook, f"tokens-{index}")
    if plan.attention is None:
        shared = [module for module in component.modules() if _is_prepared(module)]
    else:
        shared = [module for name in plan.attention for module in _modules(component, name.split("."))]
    for module in shared:
        if _is_prepared(module):
            vars(module.processor)["_parallel_config"] = tokens
        else:
            _hook(module, Intercept(tokens))
    for names, make in ((plan.linear, _linear), (plan.convolutions, _Rows)):
        for module in [module for name in names for module in _modules(component, name.split("."))]:
            _hook(module, make(tokens))
    _hook(component, _Again(tokens), "tokens-again")


def _linear(tokens: Tokens) -> Intercept:
    return Intercept(tokens, SharedLinearAttention)


def _hook(module: nn.Module, hook: ModelHook, name: str = "tokens") -> None:
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)


def _is_prepared(module: nn.Module) -> bool:
    """Whether its attention goes through diffusers' dispatcher."""
    return hasattr(getattr(module, "processor", None), "_parallel_config")


def _modules(parent: Any, path: list[str]) -> Iterator[nn.Module]:
    """Of a path like `blocks.*.attn`, `blocks.-1`. What is None has none."""
    if parent is None:
        return
    if not path:
        yield parent
        return
    first, *rest = path
    if first == "*":
        chosen = list(parent.children())
    elif first.lstrip("-").isdigit():
        chosen = list(parent.children())[int(first) :][:1]
    else:
        chosen = [getattr(parent, first)]
    for child in chosen:
        yield from _modules(child, rest)


class _Again(ModelHook):  # type: ignore[misc]
    """A call may take several forwards, as one that is captured as a CUDA graph does."""

    def __init__(self, tokens: Tokens) -> None:
        super().__init__()
        self._tokens = tokens

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._tokens.again()
        return args, kwargs


class _Split(ModelHook):  # type: ignore[misc]
    """Splits arguments of a module before it runs, or its outputs after."""

    def __init__(self, tokens: Tokens, step: Any) -> None:
        super().__init__()
        self._tokens = tokens
        self._inputs: dict[str, Argument] = {n: one for n, one in step.items() if not isinstance(one, Output)}
        self._outputs: dict[int, int] = {n: one.dim for n, one in step.items() if isinstance(one, Output)}
        self._names: list[str] = []

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self._names = list(inspect.signature(type(module).forward).parameters)[1:]
        self._inputs = {
            name: one for name, one in self._inputs.items() if name in self._names or not isinstance(one, Leading)
        }
        unknown = self._inputs.keys() - set(self._names)
        assert not unknown, f"{type(module).__name__} has no arguments {unknown}"
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        # Masks are asked of what is split in this very call, too.
        for name, one in self._inputs.items():
            if given.get(name) is not None:
                given[name] = self._split(given[name], one, given)
        num = len(args)
        return (
            *(given[name] for name in self._names[:num]),
            *args[len(self._names) :],
        ), {name: given[name] for name in kwargs}

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if not self._outputs:
            return output
        outputs = [output] if isinstance(output, torch.Tensor) else list(output)
        for index, dim in self._outputs.items():
            outputs[index] = self._tokens.part(outputs[index], dim)
        return outputs[0] if isinstance(output, torch.Tensor) else tuple(outputs)

    def _split(self, value: Any, one: Argument, given: dict[str, Any]) -> Any:
        match one:
            case Each():
                return self._part(value, one, given[one.unit] if one.unit else 1)
            case Count():
                start, stop = self._tokens.bounds(value)
                return stop - start
            case Joined(names):
                return _in_order(value, [self._tokens.lengths(given[name].shape[1]) for name in names])
            case Leading(name):
                lengths = self._tokens.lengths(given[name].shape[1])
                index = self._tokens.ranks.index
                return max(0, min(value - sum(lengths[:index]), lengths[index]))

    def _part(self, value: Any, each: Each, unit: int) -> Any:
        if isinstance(value, torch.Tensor):
            is_whole = each.num_dims not in (None, value.ndim) or (each.can_be_one and value.shape[each.dim] == 1)
            return value if is_whole else self._tokens.part(value, each.dim, unit)
        if isinstance(value, dict):
            return {key: self._part(item, each, unit) for key, item in value.items()}
        return tuple(self._part(item, each, unit) for item in value)


class _Gather(ModelHook):  # type: ignore[misc]
    """Joins outputs of a module."""

    def __init__(self, tokens: Tokens, step: Whole) -> None:
        super().__init__()
        self._tokens, self._dims = tokens, step.dims

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        outputs = [output] if isinstance(output, torch.Tensor) else list(output)
        joined = [
            value if dim is None else self._tokens.whole(value, dim)
            for value, dim in zip(outputs, self._dims, strict=True)
        ]
        return joined[0] if isinstance(output, torch.Tensor) else tuple(joined)


class _Rows(ModelHook):  # type: ignore[misc]
    """A convolution of three rows sees those of other ranks beside its own."""

    def __init__(self, tokens: Tokens) -> None:
        super().__init__()
        self._tokens = tokens

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, nn.Conv2d)
        assert (module.kernel_size[0], module.padding[0], module.stride[0], module.dilation[0]) == (3, 1, 1, 1)
        return module

    def pre_forward(self, module: nn.Module, rows: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (self._tokens.with_neighbours(rows),), {}

    def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        return output[:, :, 1:-1]


def _in_order(mask: torch.Tensor, streams: list[list[int]]) -> torch.Tensor:
    """A mask of several sequences one after the other, in the order in which ranks have parts of each of them."""
    of_streams = torch.split(mask, [sum(lengths) for lengths in streams], -1)
    parts = [torch.split(stream, lengths, -1) for stream, lengths in zip(of_streams, streams, strict=True)]
    return torch.cat([of_rank for of_all in zip(*parts, strict=True) for of_rank in of_all], dim=-1)
