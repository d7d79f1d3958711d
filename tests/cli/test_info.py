from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from sgld_cli.info import as_json_text, as_text, size_text


@dataclass(frozen=True)
class FakeComponent:
    name: str
    library: str = "diffusers"
    class_name: str = "UNet2DConditionModel"
    size_bytes: int = 1_500_000
    dtype: str | None = "float32"


@dataclass(frozen=True)
class FakeDescription:
    pipeline_class: str = "StableDiffusionPipeline"
    components: tuple[FakeComponent, ...] = (
        FakeComponent("unet"),
        FakeComponent("scheduler", class_name="DDIMScheduler", size_bytes=0, dtype=None),
    )
    defaults: Mapping[str, Any] = field(default_factory=lambda: {"num_inference_steps": 50})
    modes: Mapping[str, str] = field(default_factory=lambda: {"unet": "merge"})


def test_text_has_a_row_per_component_and_the_defaults() -> None:
    lines = as_text("m", FakeDescription()).splitlines()
    assert lines[0] == "m: StableDiffusionPipeline, 1.5 MB"
    assert any(
        line.split() == ["unet", "diffusers.UNet2DConditionModel", "1.5", "MB", "float32", "merge"] for line in lines
    )
    assert any(line.split() == ["scheduler", "diffusers.DDIMScheduler"] for line in lines)
    assert lines[-2:] == ["defaults:", "  num_inference_steps: 50"]


def test_text_says_when_nothing_is_proved_yet() -> None:
    assert "isn't proved yet" in as_text("m", FakeDescription(modes={}, defaults={}))


def test_json_has_everything() -> None:
    content = msgspec.json.decode(as_json_text("m", FakeDescription()))
    assert content["components"][1] == {
        "name": "scheduler", "library": "diffusers", "class_name": "DDIMScheduler", "size_bytes": 0, "dtype": None,
    }  # fmt: skip
    assert content["modes"] == {"unet": "merge"}


def test_sizes_are_readable() -> None:
    assert [size_text(size) for size in (999, 1500, 24_000_000_000)] == ["999 B", "1.5 kB", "24.0 GB"]
