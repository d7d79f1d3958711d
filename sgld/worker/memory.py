"""What an executor learned, kept between starts: axes and modes. Proofs are made anew, they depend on the device."""

import torch

from sgld.models.verdicts import Kept, KeptAxes, KeptLeaf, KeptMask, VerdictFile
from sgld.worker.axes import Batched, CallAxes, Mask
from sgld.worker.trees import Path
from sgld.worker.verdicts import Verdicts


class Memory:
    """Reads and writes the file of a model; without one nothing is kept."""

    def __init__(self, file: VerdictFile | None) -> None:
        self._file = file
        self._kept = file.read() if file is not None else Kept()

    def recall(self) -> Verdicts:
        """What earlier starts learned."""
        return Verdicts(axes={kept.key: _axes(kept) for kept in self._kept.axes}, modes=dict(self._kept.modes))

    def keep(self, verdicts: Verdicts) -> None:
        """Write what is known now, if it is news."""
        if self._file is None or (len(verdicts.axes) == len(self._kept.axes) and verdicts.modes == self._kept.modes):
            return
        axes = (
            KeptAxes(
                key,
                _kept(call.arguments),
                _kept(call.results),
                tuple(call.lengths.items()),
                tuple(KeptMask(path, mask.like, str(mask.dtype)) for path, mask in call.masks.items()),
            )
            for key, call in verdicts.axes.items()
            if call.results is not None
        )
        before, self._kept = self._kept, Kept(tuple(axes), dict(verdicts.modes))
        self._file.write(self._kept, before)


def _kept(leaves: dict[Path, Batched]) -> tuple[KeptLeaf, ...]:
    return tuple(KeptLeaf(path, batched.axis, batched.size) for path, batched in leaves.items())


def _axes(kept: KeptAxes) -> CallAxes:
    masks = {mask.path: Mask(mask.like, getattr(torch, mask.dtype.removeprefix("torch."))) for mask in kept.masks}
    return CallAxes(_leaves(kept.arguments), _leaves(kept.results), dict(kept.lengths), masks)


def _leaves(kept: tuple[KeptLeaf, ...]) -> dict[Path, Batched]:
    return {leaf.path: Batched(leaf.axis, leaf.size) for leaf in kept}
