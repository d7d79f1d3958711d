"""What text encoders returned, for when they are asked the same again: most requests have the same negative prompt."""

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from sgld.worker.axes import is_constant
from sgld.worker.calls import Call
from sgld.worker.digests import Digests
from sgld.worker.trees import clone, closed, opened, values


class Encodings:
    """Results of single forwards of text encoders, those used last; each caller gets tensors of its own.

    :param max_bytes: 0: nothing is kept. A result of T5-XXL with 512 tokens takes 4 MiB in bfloat16.
    """

    def __init__(self, digests: Digests, max_bytes: int) -> None:
        self._digests = digests
        self._max_bytes = max_bytes
        self._results: OrderedDict[str, Any] = OrderedDict()
        self._size_bytes = 0

    def key(self, call: Call) -> str | None:
        """Calls with an equal one return the same; None: that isn't known of this call."""
        if (
            not self._max_bytes
            or call.method != "forward"
            or call.context.is_grad_enabled
            or not _is_text_encoder(call.module)
        ):
            return None
        if not all(isinstance(leaf, torch.Tensor) or is_constant(leaf) for leaf in values(call.tree)):
            return None
        weights = [(id(p), p._version) for p in call.module.parameters()]
        # Which pipelines may set on the components that they hold; what begins with _ transformers sets itself.
        attributes = [(n, repr(v)) for n, v in vars(call.module).items() if is_constant(v) and not n.startswith("_")]
        state = hash((*weights, *attributes))
        return f"{call.component} {call.context} {call.adapters} {state} {self._digests.of(call.tree)}"

    def recall(self, key: str) -> Any:
        """What a call with this key returned; None if that isn't kept."""
        if key not in self._results:
            return None
        self._results.move_to_end(key)
        return closed(clone(self._results[key]))

    def keep(self, key: str, result: Any) -> None:
        """Keep what a call returned, in the place of those used least recently."""
        if key in self._results or _size_bytes(opened(result)) > self._max_bytes:
            return
        self._results[key] = kept = clone(opened(result))
        self._size_bytes += _size_bytes(kept)
        while self._size_bytes > self._max_bytes:
            _, oldest = self._results.popitem(last=False)
            self._size_bytes -= _size_bytes(oldest)

    def clear(self) -> None:
        """Forget all: memory is short."""
        self._results.clear()
        self._size_bytes = 0


def _is_text_encoder(module: nn.Module) -> bool:
    """A model of transformers that does nothing but answer.

    Hooks would expect to see each of its forwards, except for those with which transformers itself collects results.
    """
    if module.training or not any(_is_of_transformers(base) for base in type(module).__mro__):
        return False
    hooks = (hook for m in module.modules() for d in (m._forward_hooks, m._forward_pre_hooks) for hook in d.values())
    return all(map(_is_of_transformers, hooks))


def _is_of_transformers(thing: Any) -> bool:
    return getattr(thing, "__module__", "").startswith("transformers.")


def _size_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in values(tree) if isinstance(leaf, torch.Tensor))
