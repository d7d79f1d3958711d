"""What files say of how they were made."""

import numpy as np

from sgld.events import Completed
from sgld.sampling_params import SamplingParams
from sgld.server.metadata import metadata_of


def test_metadata_repeats_an_output_and_says_what_was_done_to_it() -> None:
    params = SamplingParams(
        prompt="a cat", enable_upscaling=True, upscaling_model_path="lanczos", image_path=("a.png",)
    )
    about = {"request_id": "r", "frames": np.zeros((1, 2, 2, 3), np.uint8), "fps": None, "elapsed_s": 1.0}
    done = Completed(**about, seed=7, postprocessing=("4x size by lanczos",))  # type: ignore[arg-type]
    metadata = metadata_of("a/model", params, done)
    assert metadata["postprocessing"] == ("4x size by lanczos",)
    chosen = metadata["params"]
    assert (chosen["seed"], chosen["enable_upscaling"], chosen["upscaling_model_path"]) == (7, True, "lanczos")
    assert "image_path" not in chosen
    plain = Completed(**about, seed=7)  # type: ignore[arg-type]
    assert "postprocessing" not in metadata_of("a/model", params, plain)
