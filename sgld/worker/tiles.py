"""A VAE's tiled decode on several ranks: each computes some of the tiles, all get all of them.

The VAE's own code cuts and blends. It runs twice: first each rank's share of its calls of the decoder is computed,
with zeros in the place of the others; then with the tiles of all.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from sgld.outcome import on_failure
from sgld.worker.randomness import default_states
from sgld.worker.trees import leaves, values

Share = Callable[[torch.Tensor, int], torch.Tensor]
"""A tensor from the rank that has it to all: what this rank has in its place, and that rank."""
_Geometry = tuple[Any, ...]
_NO_CACHE = object()
"""Stands for what the next call of a tile needs, on ranks that don't compute it."""


@dataclass
class Shapes:
    """What decoders returned for arguments of some geometry; None: they drew random numbers, too."""

    known: dict[_Geometry, "_Form | None"] = field(default_factory=dict)


class _Form(NamedTuple):
    """What a decoder returns. `has_cache`: with it what the next call of a tile needs, asked for or not."""

    shape: torch.Size
    dtype: torch.dtype
    has_cache: bool


@dataclass
class _Tile:
    """A call of the decoder: what it returned, or zeros of that form, and who computes it; None: everybody did."""

    value: torch.Tensor
    owner: int | None
    has_cache: bool


class _Recorder:
    """The first pass. Calls that follow one another with a cache belong to one tile, which one rank computes.

    What isn't known yet everybody computes, to know the shape of the others; and what draws random numbers, as those of
    a tile depend on the ones before.
    """

    def __init__(self, vae: Any, given: Any, rank: int, num_ranks: int, shapes: Shapes) -> None:
        self.tiles: list[_Tile] = []
        self._decode = vae.decoder.forward
        self._latents, self._generators = _latents(given), [x for x in values(given) if isinstance(x, torch.Generator)]
        self._rank, self._num_ranks, self._shapes = rank, num_ranks, shapes
        self._num_units = 0
        self._in_unit = 0
        self._is_shared = False

    def begin_unit(self) -> None:
        """What comes next has no cache of what came before."""
        self._in_unit = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if "feat_cache" not in kwargs and kwargs.get("conv_cache") is None:
            self.begin_unit()
        if self._in_unit == 0:
            self._num_units += 1
        key = (self._latents, self._in_unit, *_geometry(args))
        if self._in_unit == 0:
            self._is_shared = self._shapes.known.get(key) is not None
        self._in_unit += 1
        owner = (self._num_units - 1) % self._num_ranks
        if self._is_shared and owner != self._rank:
            form = self._shapes.known[key]
            assert form is not None
            value = args[0].new_zeros(form.shape, dtype=form.dtype)
            self.tiles.append(_Tile(value, owner, form.has_cache))
            return (value, _NO_CACHE) if form.has_cache else value
        before = [] if key in self._shapes.known else self._random_states()
        result = self._decode(*args, **kwargs)
        has_cache = isinstance(result, tuple)
        value = result[0] if has_cache else result
        if key not in self._shapes.known:
            is_drawn = not all(map(torch.equal, before, self._random_states()))
            self._shapes.known[key] = None if is_drawn else _Form(value.shape, value.dtype, has_cache)
        # The VAE blends in place.
        self.tiles.append(_Tile(value.clone(), owner if self._is_shared else None, has_cache))
        return result

    def _random_states(self) -> list[torch.Tensor]:
        return [*default_states(), *(generator.get_state() for generator in self._generators)]


@contextmanager
def shared(vae: Any, rank: int, num_ranks: int, shapes: Shapes, share: Share) -> Iterator[None]:
    """While the block runs, `vae.decode` is that of all ranks: they must all call it, with the same arguments.

    :param shapes: what is known of this VAE; the same on all ranks.
    """
    own = vae.decode

    def decode(*args: Any, **kwargs: Any) -> Any:
        known = dict(shapes.known)

        def forget() -> None:
            """Others may have come further, or not as far; all know the same again."""
            shapes.known = known

        with on_failure(forget):
            recorder = _Recorder(vae, (args, kwargs), rank, num_ranks, shapes)
            return _decoded(vae, own, args, kwargs, recorder, share)

    vars(vae)["decode"] = decode
    try:
        yield
    finally:
        del vars(vae)["decode"]


def _latents(given: Any) -> tuple[int, ...]:
    return next(tuple(leaf.shape) for _, leaf in leaves(given) if isinstance(leaf, torch.Tensor))


def _decoded(
    vae: Any,
    decode: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    recorder: _Recorder,
    share: Share,
) -> Any:
    with _instead(vae, recorder, recorder.begin_unit):
        result = decode(*args, **kwargs)
    if all(tile.owner is None for tile in recorder.tiles):
        return result
    for tile in recorder.tiles:
        if tile.owner is not None:
            tile.value = share(tile.value, tile.owner)
    rest = iter(recorder.tiles)

    def known(*_args: Any, **_kwargs: Any) -> Any:
        tile = next(rest)
        return (tile.value, None) if tile.has_cache else tile.value

    with _instead(vae, known, lambda: None):
        return decode(*args, **kwargs)


@contextmanager
def _instead(vae: Any, decoder: Callable[..., Any], begin_unit: Callable[[], None]) -> Iterator[None]:
    """While the block runs, calls of the VAE's decoder go elsewhere."""
    clear_cache = getattr(vae, "clear_cache", None)
    own = vars(vae.decoder).get("forward")
    vars(vae.decoder)["forward"] = decoder
    if clear_cache is not None:

        def cleared() -> None:
            clear_cache()
            begin_unit()

        vars(vae)["clear_cache"] = cleared
    try:
        yield
    finally:
        del vars(vae.decoder)["forward"]
        if own is not None:
            vars(vae.decoder)["forward"] = own
        vars(vae).pop("clear_cache", None)


def _geometry(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(tuple(leaf.shape) for _, leaf in leaves(args) if isinstance(leaf, torch.Tensor))
