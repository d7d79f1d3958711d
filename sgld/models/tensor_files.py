"""Models of which each rank reads its own parts from the files of the weights, and nothing else of what is divided."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sgld.errors import ModelError
from sgld.models.blueprints import configuration, is_of_transformers, without_weights
from sgld.models.hub import fetch
from sgld.models.sources import ComponentSource
from sgld.models.tensor import divide_model
from sgld.models.tensor_layers import Cut, Slice, Team
from sgld.models.weight_files import read_json

_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


def divided(cls: Any, source: ComponentSource, team: Team) -> tuple[nn.Module, dict[str, Cut]]:
    """A model on the meta device with this rank's parts, made of its configuration alone.

    :raises Indivisible: nobody says how, or it can't be done.
    """
    model = without_weights(cls, source)
    return model, divide_model(model, team)


def load_parts(cls: Any, source: ComponentSource, team: Team, dtype: torch.dtype) -> nn.Module:
    """A model with this rank's parts, on the CPU.

    :raises ModelError: the files of its weights aren't there, or aren't those of such a model.
    """
    model, cuts = divided(cls, source, team)
    names = model.state_dict().keys()
    with _opened(weight_files(cls, source)) as slices:
        parts = {key: _Part(whole, _cut_of(key, names, cuts), team) for key, whole in slices.items()}
        if is_of_transformers(cls):
            return _load_with_transformers(cls, source, team, parts, dtype)
        in_full = getattr(cls, "_keep_in_fp32_modules", None) or ()
        state = {
            key: part[...].to(torch.float32 if any(name in in_full for name in key.split(".")) else dtype)
            for key, part in parts.items()
        }
    missing = model.load_state_dict(state, strict=False, assign=True).missing_keys
    if missing:
        raise ModelError(f"the weights have no {', '.join(missing[:4])}")
    return model.eval()


def _load_with_transformers(
    cls: Any, source: ComponentSource, team: Team, parts: Mapping[str, "_Part"], dtype: torch.dtype
) -> nn.Module:
    """By its own loader, which knows what weights were called in older files."""

    class Divided(cls):  # type: ignore[misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            self.__class__ = cls
            divide_model(self, team)

    Divided.__name__ = cls.__name__
    model: nn.Module = Divided.from_pretrained(
        None, config=configuration(cls, source), state_dict=dict(parts), dtype=dtype
    )
    return model


@dataclass(frozen=True)
class _Part:
    """The part of a weight that a rank has, read from its file when it is asked for."""

    whole: Any
    cut: Cut | None
    team: Team

    def __getitem__(self, index: Any) -> Tensor:
        if self.cut is None:
            return self.whole[...]  # type: ignore[no-any-return]
        return self.cut.part(self.whole, self.team.index, self.team.size)[index]


def _cut_of(key: str, names: Any, cuts: Mapping[str, Cut]) -> Cut | None:
    """How a weight of a file is divided, by the name of the model's weight that ends like its own.

    Older files have other beginnings. Where this is wrong the shapes don't fit, and the loader says so.
    """
    if key in names:
        return cuts.get(key)
    atoms = key.split(".")
    for start in range(1, len(atoms)):
        end = ".".join(atoms[start:])
        alike = [name for name in names if name == end or name.endswith(f".{end}")]
        # Towers of a model have layers of the same names; what is before them is in both, in whatever order.
        own = [name for name in alike if set(atoms[:start]) <= set(name.split("."))]
        found = {cuts.get(name) for name in own or alike}
        if len(found) == 1:
            return found.pop()
    return None


@contextmanager
def _opened(files: tuple[Path, ...]) -> Iterator[dict[str, Slice]]:
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        yield {name: file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118


def weight_files(cls: Any, source: ComponentSource) -> tuple[Path, ...]:
    """The files of safetensors of a component, fetched from the hub if need be.

    :raises ModelError: there are none, so parts can't be read.
    """
    stem = _STEMS["transformers" if is_of_transformers(cls) else "diffusers"]
    variant = f".{source.variant}" if source.variant else ""
    whole, index = f"{stem}{variant}.safetensors", f"{stem}.safetensors.index{variant}.json"
    folder = source.folder
    if folder is None:
        inside = f"{source.subfolder}/" if source.subfolder else ""
        allow = [f"{inside}{stem}*{variant}.safetensors", f"{inside}{index}", f"{inside}config.json"]
        folder = fetch(source.path, source.revision, allow=allow) / inside
    if (folder / whole).is_file():
        return (folder / whole,)
    if (folder / index).is_file():
        return tuple(folder / name for name in sorted(set(read_json(folder / index)["weight_map"].values())))
    raise ModelError(f"{source} has no {whole}, and only of safetensors ranks can read parts; it can't have --tp-size")
