"""What an executor learned, kept between starts: axes and modes. Proofs are made anew, they depend on the device."""

from sgld.models.verdicts import Kept, KeptAxes, KeptLeaf, VerdictFile
from sgld.worker.axes import Batched, CallAxes
from sgld.worker.trees import Path
from sgld.worker.verdicts import Verdicts


class Memory:
    """Reads and writes the file of a model; without one nothing is kept."""

    def __init__(self, file: VerdictFile | None) -> None:
        self._file = file
        self._kept = file.read() if file is not None else Kept()

    def recall(self) -> Verdicts:
        """What earlier starts learned."""
        axes = {a.key: CallAxes(_leaves(a.arguments), _leaves(a.results)) for a in self._kept.axes}
        return Verdicts(axes=axes, modes=dict(self._kept.modes))

    def keep(self, verdicts: Verdicts) -> None:
        """Write what is known now, if it is news."""
        if self._file is None or (len(verdicts.axes) == len(self._kept.axes) and verdicts.modes == self._kept.modes):
            return
        axes = (
            KeptAxes(key, _kept(call.arguments), _kept(call.results or {}))
            for key, call in verdicts.axes.items()
            if call.results is not None
        )
        self._kept = Kept(tuple(axes), dict(verdicts.modes))
        self._file.write(self._kept)


def _kept(leaves: dict[Path, Batched]) -> tuple[KeptLeaf, ...]:
    return tuple(KeptLeaf(path, batched.axis, batched.size) for path, batched in leaves.items())


def _leaves(kept: tuple[KeptLeaf, ...]) -> dict[Path, Batched]:
    return {leaf.path: Batched(leaf.axis, leaf.size) for leaf in kept}
