"""What files say of how they were made."""

from typing import Any

import msgspec

from sgld import __version__
from sgld.events import Completed
from sgld.media.inputs import references
from sgld.sampling_params import SamplingParams

# What changed nothing of what is seen.
_NOT_SEEN = frozenset({"num_previews", "priority", "deadline_s"})


def metadata_of(model_path: str, params: SamplingParams, completed: Completed) -> dict[str, Any]:
    """What repeats an output, as `sgld generate` writes it; input pictures aren't in it."""
    params = msgspec.structs.replace(params, seed=completed.seed, image_path=(), num_outputs_per_prompt=1)
    fields: dict[str, Any] = msgspec.to_builtins(params)
    chosen = {name: v for name, v in fields.items() if v not in (None, (), [], {}) and name not in _NOT_SEEN}
    if any(references(params.diffusers_kwargs)):
        del chosen["diffusers_kwargs"]
    done = {"postprocessing": completed.postprocessing} if completed.postprocessing else {}
    return {"version": __version__, "model_path": model_path, **done, "params": chosen}
