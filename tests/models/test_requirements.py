from typing import Any

import pytest

from sgld.errors import ModelError
from sgld.models import requirements
from sgld.models.quantization import Family, Quantization, agreed
from sgld.models.requirements import Capability, check


def some(family: Family, **more: Any) -> Quantization:
    return Quantization(family, 8, "x", "tensors", **more)


@pytest.mark.parametrize(
    ("family", "package"),
    [
        ("gguf", "gguf"),
        ("torchao", "torchao"),
        ("bitsandbytes", "bitsandbytes"),
        ("modelopt", "nvidia-modelopt"),
        ("quanto", "optimum-quanto"),
        ("svdquant", "nunchaku"),
        ("nunchaku_lite", "kernels"),
    ],
)
def test_missing_library_is_named(family: Family, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "_is_installed", lambda _module: False)
    with pytest.raises(ModelError) as caught:
        check(some(family), "transformer", (8, 6))
    said = f"transformer is quantized with {family} (x), which needs {package}; install it: pip install {package}"
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("family", "capability", "problem"),
    [
        ("bitsandbytes", None, "runs on NVIDIA GPUs only, and the device is cpu"),
        ("svdquant", None, "runs on NVIDIA GPUs only, and the device is cpu"),
        ("svdquant", (9, 0), "needs a GPU of compute capability 8.x or 12.x; this one has 9.0"),
        ("nunchaku_lite", (9, 0), r"7.5 or more, but not 9.x \(Hopper\); this one has 9.0"),
        ("nunchaku_lite", (7, 0), "this one has 7.0"),
    ],
)
def test_device_that_does_not_suit_is_named(
    family: Family, capability: Capability | None, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requirements, "_is_installed", lambda _module: True)
    with pytest.raises(ModelError, match=problem):
        check(some(family), "transformer", capability)


def test_device_that_suits_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "_is_installed", lambda _module: True)
    for family, capability in (("svdquant", (8, 6)), ("svdquant", (12, 0)), ("bitsandbytes", (7, 0)), ("gguf", None)):
        assert check(some(family), "transformer", capability) == some(family)  # type: ignore[arg-type]


def test_gpu_without_fp8_computes_checkpoints_in_full_precision() -> None:
    static = some("fp8", activations="static")
    assert check(static, "transformer", (8, 9)) is static
    assert check(static, "transformer", None) is static
    result = check(static, "transformer", (8, 0))
    assert (result.activations, "no FP8 on this GPU" in result.detail) == ("full", True)


def test_gpu_without_fp8_does_not_get_what_was_asked_for() -> None:
    asked = agreed("fp8_dynamic", None, "transformer")
    assert asked is not None
    with pytest.raises(ModelError, match=r"needs a GPU of compute capability 8.9 or more; this one has 8.0"):
        check(asked, "transformer", (8, 0))
