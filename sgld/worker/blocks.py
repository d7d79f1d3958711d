"""The blocks of a denoiser: how hidden states go in and come out of each, and a way to watch them in one forward."""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from sgld.errors import InvalidRequest

ELSE = "the method taylor takes any model"


@dataclass(frozen=True)
class States:
    """Hidden states between two blocks, (rows, tokens, ...) each; `text` where blocks have it apart."""

    hidden: torch.Tensor
    text: torch.Tensor | None

    def rows(self, rows: slice) -> "States":
        """Those of some rows, with storage of their own."""
        return States(self.hidden[rows].clone(), None if self.text is None else self.text[rows].clone())


class Watcher(Protocol):
    """What happens to the blocks of one forward."""

    is_skipping: bool
    """Blocks return what they are given."""

    def begun(self, given: torch.Tensor, returned: States) -> States:
        """The first block ran; what it returns to the model instead."""

    def ended(self, returned: States) -> None:
        """The last block ran."""


class Split:
    """The blocks of a denoiser, watched while one forward runs.

    :raises InvalidRequest: they aren't known.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        names = [
            name
            for name, child in module.named_children()
            if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS and isinstance(child, nn.ModuleList) and len(child)
        ]
        blocks = [block for name in names for block in getattr(module, name)]
        kind = type(module).__name__
        if len(blocks) < 2:
            raise InvalidRequest(f"{kind} has too few transformer blocks in a row ({len(blocks)}); {ELSE}", "cache")
        if getattr(module, "_parallel_config", None) is not None:
            raise InvalidRequest(f"{kind} runs on several GPUs; {ELSE}", "cache")
        self._forms = [_Form(block) for block in blocks]
        watched = iter(_Watched(self, index, block) for index, block in enumerate(blocks))
        self._lists = {name: nn.ModuleList(next(watched) for _ in getattr(module, name)) for name in names}
        self._last = len(blocks) - 1
        self._pass: Watcher | None = None
        self.is_tested = False

    @contextlib.contextmanager
    def during(self, one: Watcher) -> Iterator[None]:
        """Watch the forward inside the block."""
        originals = {name: self._module._modules[name] for name in self._lists}
        # A model that was compiled as a whole has its blocks inside; compiled blocks stay what they are.
        compiled, self._module._compiled_call_impl = self._module._compiled_call_impl, None
        self._module._modules.update(self._lists)
        self._pass = one
        try:
            yield
        finally:
            self._module._modules.update(originals)
            self._module._compiled_call_impl = compiled
            self._pass = None

    def learn_from(self, other: "Split") -> None:
        """Know of the same blocks what another one knows, which has watched them."""
        self._forms = other._forms

    def run(self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Block `index` is called."""
        one, form = self._pass, self._forms[index]
        assert one is not None
        given = form.given(args, kwargs)
        if index and one.is_skipping:
            return form.as_output(given)
        output = block(*args, **kwargs)
        returned = form.returned(output, given)
        if index == self._last:
            one.ended(returned)
        return output if index else form.as_output(one.begun(given.hidden, returned), output)


class _Watched(nn.Module):
    """Stands in the place of a block, and is that for whoever looks at its attributes."""

    def __init__(self, split: Split, index: int, block: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(_split=split, _index=index, _block=block)
        # Whoever moves or casts the weights of the model meanwhile finds those of the block, too.
        self.__dict__.update({name: vars(block)[name] for name in ("_parameters", "_buffers", "_modules")})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._split.run(self._index, self._block, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)


class _Form:
    """How hidden states go into a block and come out of it; learned by their shapes when it runs."""

    def __init__(self, block: nn.Module) -> None:
        self._class = type(unwrap_module(block))
        self._names = tuple(inspect.signature(self._class.forward).parameters)[1:]
        try:
            self._about = TransformerBlockRegistry.get(self._class)
        except ValueError:
            self._about = TransformerBlockMetadata()
        self._length = 0
        """Of the tuple that it returns; 0: it returns a tensor."""
        self._hidden_at = 0
        self._text_at: int | None = None

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> States:
        """What the block is given; not each calls it as others do, but it comes first."""
        arguments = dict(zip(self._names, args, strict=False)) | kwargs
        hidden = arguments.get(self._about.hidden_states_argument_name, arguments.get(self._names[0]))
        text = arguments.get(self._about.encoder_hidden_states_argument_name)
        if not isinstance(hidden, torch.Tensor):
            raise InvalidRequest(f"{self._class.__name__} takes no hidden states; {ELSE}", "cache")
        return States(hidden, text if isinstance(text, torch.Tensor) else None)

    def returned(self, output: Any, given: States) -> States:
        """What it returned."""
        if not isinstance(output, tuple):
            return States(output, None)
        self._length = len(output)
        self._hidden_at, self._text_at = self._places(output, given)
        return States(output[self._hidden_at], None if self._text_at is None else output[self._text_at])

    def as_output(self, states: States, like: Any = None) -> Any:
        """The states as the block returns them: as `like`, or as it returned them before."""
        if not isinstance(like, tuple) and not self._length:
            return states.hidden
        made = list(like) if isinstance(like, tuple) else [None] * self._length
        made[self._hidden_at] = states.hidden
        if self._text_at is not None:
            made[self._text_at] = states.text
        return tuple(made)

    def _places(self, output: tuple[Any, ...], given: States) -> tuple[int, int | None]:
        shapes = [getattr(part, "shape", None) for part in output]
        places = [i for i, shape in enumerate(shapes) if shape == given.hidden.shape]
        if len(places) != 1 and self._about.return_hidden_states_index is not None:
            # Text and picture are of one size.
            return self._about.return_hidden_states_index, self._about.return_encoder_hidden_states_index
        if len(places) != 1:
            raise InvalidRequest(
                f"which of the outputs of {self._class.__name__} are hidden states isn't known; {ELSE}", "cache"
            )
        text = None if given.text is None else given.text.shape
        return places[0], next((i for i, shape in enumerate(shapes) if shape == text and i != places[0]), None)
