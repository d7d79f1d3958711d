"""How many ranks there are and what they share: the arithmetic of several GPUs."""

from typing import Annotated

import msgspec
from msgspec import Meta

from sgld.fields import FieldError, check_fields, option

# As many processes as one machine has GPUs, and more.
MAX_RANKS = 64


class Ranks(msgspec.Struct, frozen=True, array_like=True):
    """Some ranks of a replica that stand side by side: a power of two, beginning at a multiple of it."""

    first: int = 0
    num: int = 1

    @property
    def every(self) -> range:
        """Their indices."""
        return range(self.first, self.first + self.num)

    def __str__(self) -> str:
        return f"rank {self.first}" if self.num == 1 else f"ranks {self.first} to {self.first + self.num - 1}"


FIRST = Ranks()
"""Rank 0 alone."""


class ParallelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the GPUs share the work: num_gpus = dp x cfg x sp x tp, and sp = ulysses x ring.

    What is left open follows from the rest: sequence parallelism takes the GPUs that nothing else does, Ulysses all
    of these. On a CPU the ranks are processes that compute beside one another.

    :raises FieldError: a value is out of its range, or they don't fit together.
    """

    num_gpus: (
        Annotated[int, Meta(ge=1), option("GPUs, with --device cpu processes; default: as many as the degrees need")]
        | None
    ) = None
    tp_size: Annotated[
        int,
        Meta(ge=1),
        option("GPUs that have parts of each layer, of text encoders and of denoisers that can be divided"),
    ] = 1
    sp_degree: (
        Annotated[
            int,
            Meta(ge=1),
            option(
                "GPUs that share the tokens of each forward of the denoiser; default: those that are left",
                aliases=("sp_size",),
            ),
        ]
        | None
    ) = None
    ulysses_degree: (
        Annotated[int, Meta(ge=1), option("how many of these exchange attention heads; default: all that ring leaves")]
        | None
    ) = None
    ring_degree: (
        Annotated[int, Meta(ge=1), option("how many pass keys and values around; default: 1, or what ulysses leaves")]
        | None
    ) = None
    elastic_sp: Annotated[
        bool,
        option("each forward takes as many GPUs of a copy as pay, by what was measured; several run side by side"),
    ] = False
    enable_cfg_parallel: Annotated[bool, option("both halves of guidance at the same time, on two groups of GPUs")] = (
        False
    )
    dp_size: Annotated[int, Meta(ge=1), option("copies of the model, which share the requests", aliases=("dp",))] = 1
    vae_sp: (
        Annotated[
            bool,
            option("the GPUs of a copy decode tiles of a picture or video beside one another; default: if several"),
        ]
        | None
    ) = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.elastic_sp:
            self._check_elastic()
        if self.total > MAX_RANKS:
            raise FieldError("num_gpus", self.total, f"it must be at most {MAX_RANKS}: all are of one machine")
        apart = self.dp_size * self.cfg_degree * self.tp_size
        if self.total % apart:
            product = f"{self.dp_size} x {self.cfg_degree} x {self.tp_size} = {apart}"
            raise FieldError("num_gpus", self.num_gpus, f"it must be a multiple of dp x cfg x tp = {product}")
        if self.total != apart * self.sp:
            product = f"{self.dp_size} x {self.cfg_degree} x {self.sp} x {self.tp_size} = {apart * self.sp}"
            raise FieldError("num_gpus", self.num_gpus, f"it must be dp x cfg x sp x tp = {product}")
        if self.sp != self.ulysses * self.ring:
            product = f"ulysses x ring = {self.ulysses} x {self.ring} = {self.ulysses * self.ring}"
            if self.sp_degree is not None:
                raise FieldError("sp_degree", self.sp, f"it must be {product}")
            others = f"dp {self.dp_size} x cfg {self.cfg_degree} x tp {self.tp_size}"
            raise FieldError(
                "num_gpus", self.num_gpus, f"{others} leaves {self.sp} of them for sp, which must be {product}"
            )

    def _check_elastic(self) -> None:
        """See that the ranks of a copy can be taken in halves, and that nothing else says how many share a forward."""
        fixed = {
            "sp_degree": self.sp_degree,
            "ulysses_degree": self.ulysses_degree,
            "ring_degree": self.ring_degree,
            "enable_cfg_parallel": self.enable_cfg_parallel or None,
            "tp_size": self.tp_size if self.tp_size > 1 else None,
        }
        for name, value in fixed.items():
            if value is not None:
                raise FieldError(
                    name, value, "with elastic_sp the degree is chosen anew for each forward; leave it out"
                )
        if self.num_gpus is None or self.num_gpus % self.dp_size:
            return  # the sum says what is wrong
        num = self.num_gpus // self.dp_size
        if num & (num - 1):
            problem = (
                f"with elastic_sp each copy must have a power of two of GPUs, not {self.num_gpus} / dp {self.dp_size}"
            )
            raise FieldError("num_gpus", self.num_gpus, f"{problem} = {num}")

    @property
    def num_lanes(self) -> int:
        """So many forwards of one copy may run side by side."""
        return self.num_ranks if self.elastic_sp else 1

    @property
    def degrees(self) -> tuple[int, ...]:
        """So many ranks may share the tokens of a forward."""
        return tuple(2**n for n in range(self.num_ranks.bit_length())) if self.elastic_sp else (self.sp,)

    @property
    def total(self) -> int:
        """The GPUs of all copies."""
        if self.num_gpus is not None:
            return self.num_gpus
        return self.dp_size * self.cfg_degree * self.sp * self.tp_size

    @property
    def num_ranks(self) -> int:
        """The GPUs of one copy."""
        return self.total // self.dp_size

    @property
    def cfg_degree(self) -> int:
        """Groups that share the rows of a forward."""
        return 2 if self.enable_cfg_parallel else 1

    @property
    def sp(self) -> int:
        """Ranks that share the tokens of a forward."""
        if self.sp_degree is not None:
            return self.sp_degree
        if self.num_gpus is not None and None in (self.ulysses_degree, self.ring_degree):
            return self.num_gpus // (self.dp_size * self.cfg_degree * self.tp_size)
        return (self.ulysses_degree or 1) * (self.ring_degree or 1)

    @property
    def ulysses(self) -> int:
        """Those of them that exchange attention heads."""
        return self.ulysses_degree or max(self.sp // (self.ring_degree or 1), 1)

    @property
    def ring(self) -> int:
        """Those of them that pass keys and values around."""
        return self.ring_degree or max(self.sp // self.ulysses, 1)

    @property
    def layout(self) -> str:
        """The arithmetic for people, as `4 = dp 1 x cfg 2 x sp 2 (ulysses 2 x ring 1) x tp 1`."""
        sp = f"sp {self.sp} (ulysses {self.ulysses} x ring {self.ring})"
        if self.elastic_sp:
            sp = f"sp {' or '.join(map(str, self.degrees))} (elastic)"
        return f"{self.total} = dp {self.dp_size} x cfg {self.cfg_degree} x {sp} x tp {self.tp_size}"
