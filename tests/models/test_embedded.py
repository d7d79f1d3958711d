import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import sgld.models.embedded.evaluation as evaluation
from sgld.models.embedded.networks import DEFAULTS_FILE, video_denoiser, video_text_encoder
from sgld.models.embedded.predictions import WAN_TEXT_LENGTH, predict_video, shorten_padding

MODELS = Path(evaluation.__file__).parent
MAX_SIZE_BYTES = 20_000_000
NUM_PROMPTS = 64
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]


def load(name: str) -> tuple[Any, dict[str, Any]]:
    """The shipped pipeline, and its recommended sampling params without the frame rate."""
    pipeline = DiffusionPipeline.from_pretrained(MODELS / name, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    options = json.loads((MODELS / name / DEFAULTS_FILE).read_text())
    return pipeline, {key: value for key, value in options.items() if key != "fps"}


@pytest.mark.parametrize("name", ["tiny_image", "tiny_video"])
def test_folder_is_small(name: str) -> None:
    assert sum(path.stat().st_size for path in (MODELS / name).rglob("*")) <= MAX_SIZE_BYTES


@pytest.mark.parametrize(("height", "width"), [(256, 192), (320, 256)])
def test_image_model_draws_other_sizes(height: int, width: int) -> None:
    pipeline, options = load("tiny_image")
    options |= {"height": height, "width": width, "num_inference_steps": 2}
    assert evaluation.generate_pixels(pipeline, ["a red circle"], 0, options).shape == (1, 3, height, width)


@pytest.mark.parametrize("num_frames", [9, 21])
def test_video_model_draws_other_lengths_with_the_pipelines_own_padding(num_frames: int) -> None:
    pipeline, options = load("tiny_video")
    options |= {"num_frames": num_frames, "num_inference_steps": 2}
    clip = evaluation.generate_pixels(pipeline, ["the sun sets over the sea"], 0, options)
    assert clip.shape == (1, num_frames, 3, options["height"], options["width"])


@torch.no_grad()
def test_short_padding_in_training_equals_the_padding_of_the_pipeline() -> None:
    tokenizer = load("tiny_video")[0].tokenizer
    text, denoiser = video_text_encoder(tokenizer).eval(), video_denoiser().eval()
    tokens = torch.zeros(2, 32, dtype=torch.long)
    tokens[0, :5], tokens[1, 0] = torch.tensor([5, 6, 7, 8, 1]), 1
    mask = tokens != 0
    embeds = text(input_ids=tokens, attention_mask=mask.long()).last_hidden_state * mask[:, :, None]
    padded = torch.cat([embeds, torch.zeros(2, WAN_TEXT_LENGTH - 32, embeds.shape[2])], dim=1)
    noisy, timestep = torch.randn(2, 12, 3, 8, 8), torch.tensor([500.0, 20.0])
    expected = denoiser(noisy, timestep, padded, return_dict=False)[0]
    shorten_padding(denoiser)
    torch.testing.assert_close(predict_video(text, denoiser, noisy, timestep, tokens), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny_image", "tiny_video"])
def test_a_colours_vector_tells_what_has_it(name: str) -> None:
    pipeline, _ = load(name)
    red = pipeline.tokenizer.get_vocab()["red"]
    prompts = ["a red circle on a blue background", "a blue circle on a red background"]
    tokens = pipeline.tokenizer(prompts, return_tensors="pt")["input_ids"]
    one, other = pipeline.text_encoder(tokens).last_hidden_state[tokens == red]
    assert (one - other).norm() > 0.2 * one.norm()


@pytest.fixture(scope="module")
def score_of_images() -> evaluation.Score:
    pipeline, options = load("tiny_image")
    scenes, prompts = evaluation.held_out_prompts(NUM_PROMPTS, 123)
    return evaluation.score(pipeline, scenes, prompts, options)


# All pictures are drawn for the first of these: two minutes on two cores, far more when others use them too.
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("name", "target"),
    [("time", 0.85), ("place", 0.75), ("number", 0.75), ("colour", 0.85), ("background", 0.85)],
)
def test_pictures_of_held_out_prompts_show_what_was_asked(
    score_of_images: evaluation.Score, name: str, target: float
) -> None:
    assert score_of_images.rate(name) >= target
