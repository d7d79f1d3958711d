"""How many ranks there are and what they share: the arithmetic of several GPUs."""

from typing import Annotated

import msgspec
from msgspec import Meta

from sgld.fields import FieldError, check_fields, option


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
    enable_cfg_parallel: Annotated[bool, option("both halves of guidance at the same time, on two groups of GPUs")] = (
        False
    )
    dp_size: Annotated[int, Meta(ge=1), option("copies of the model, which share the requests")] = 1
    vae_sp: (
        Annotated[
            bool,
            option("the GPUs of a copy decode tiles of a picture or video beside one another; default: if several"),
        ]
        | None
    ) = None

    def __post_init__(self) -> None:
        check_fields(self)
        apart = self.dp_size * self.cfg_degree * self.tp_size
        if self.total % apart:
            problem = f"it must be a multiple of dp x cfg x tp = {self.dp_size} x {self.cfg_degree} x {self.tp_size}"
            raise FieldError("num_gpus", self.num_gpus, problem)
        if self.total != apart * self.sp:
            product = f"{self.dp_size} x {self.cfg_degree} x {self.sp} x {self.tp_size} = {apart * self.sp}"
            raise FieldError("num_gpus", self.num_gpus, f"it must be dp x cfg x sp x tp = {product}")
        if self.sp != self.ulysses * self.ring:
            problem = f"it must be ulysses x ring = {self.ulysses} x {self.ring} = {self.ulysses * self.ring}"
            raise FieldError("sp_degree", self.sp, problem)

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
        return self.ulysses_degree or self.sp // (self.ring_degree or 1)

    @property
    def ring(self) -> int:
        """Those of them that pass keys and values around."""
        return self.ring_degree or self.sp // self.ulysses

    @property
    def layout(self) -> str:
        """The arithmetic for people, as `4 = dp 1 x cfg 2 x sp 2 (ulysses 2 x ring 1) x tp 1`."""
        sp = f"sp {self.sp} (ulysses {self.ulysses} x ring {self.ring})"
        return f"{self.total} = dp {self.dp_size} x cfg {self.cfg_degree} x {sp} x tp {self.tp_size}"
