from dataclasses import replace

import msgspec

from sgld.models.call_defaults import Default
from sgld.models.describe import Component, Description
from sgld_cli.info import as_json_text, as_text, size_text

SAYING_NOTHING = "what requests get that say nothing:"
DESCRIPTION = Description(
    pipeline_class="StableDiffusionPipeline",
    components=(
        Component("unet", "diffusers", "UNet2DConditionModel", 1_500_000, "float32"),
        Component("scheduler", "diffusers", "DDIMScheduler", 0, None),
    ),
    defaults={"num_inference_steps": Default(50, "signature of P")},
    modes={"unet": "merge"},
    decisions={"unet": "bf16"},
)


def test_text_has_a_row_per_component_and_the_defaults() -> None:
    lines = as_text("m", DESCRIPTION).splitlines()
    assert lines[0] == "m: StableDiffusionPipeline, 1.5 MB"
    assert any(
        line.split() == ["unet", "diffusers.UNet2DConditionModel", "1.5", "MB", "float32", "merge"] for line in lines
    )
    assert any(line.split() == ["scheduler", "diffusers.DDIMScheduler"] for line in lines)
    assert lines[-5:] == [
        "loaded as:",
        "  unet: bf16",
        "",
        SAYING_NOTHING,
        "  num_inference_steps: 50 (signature of P)",
    ]


def test_text_says_when_nothing_is_proved_yet() -> None:
    assert "isn't proved yet" in as_text("m", replace(DESCRIPTION, modes={}, defaults={}))


def test_json_has_everything() -> None:
    content = msgspec.json.decode(as_json_text("m", DESCRIPTION))
    assert content["components"][1] == {
        "name": "scheduler", "library": "diffusers", "class_name": "DDIMScheduler", "size_bytes": 0, "dtype": None,
    }  # fmt: skip
    assert content["defaults"] == {"num_inference_steps": 50}
    assert content["default_origins"] == {"num_inference_steps": "signature of P"}
    assert (content["modes"], content["decisions"]) == ({"unet": "merge"}, {"unet": "bf16"})


def test_sizes_are_readable() -> None:
    assert [size_text(size) for size in (999, 1500, 24_000_000_000)] == ["999 B", "1.5 kB", "24.0 GB"]
