from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch as dispatcher
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from pipelines import build

from sgld.config import AttentionConfig, EngineConfig
from sgld.errors import ModelError
from sgld.models import attention
from sgld.models.attention import Attention, AttentionOptions, choose
from sgld.models.describe import describe
from sgld.models.load import load

# On a CPU it runs, and takes no mask.
FLASH = "_native_flash"


@pytest.fixture(autouse=True)
def _registry_as_before(monkeypatch: pytest.MonkeyPatch, threads_as_before: None) -> None:
    for name in ("_backends", "_supported_arg_names"):
        monkeypatch.setattr(_AttentionBackendRegistry, name, dict(getattr(_AttentionBackendRegistry, name)))
    for name in ("_active_backend", "_checks_enabled"):
        monkeypatch.setattr(_AttentionBackendRegistry, name, getattr(_AttentionBackendRegistry, name))


def chosen(**config: str) -> Attention | None:
    return choose(AttentionConfig(**config), "cpu", "fp32")


def refusal(**config: str) -> str:
    with pytest.raises(ModelError) as caught:
        chosen(**config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def first_keys(query: Any, key: Any, value: Any, attn_mask: Any = None, scale: float | None = None) -> torch.Tensor:
    """A kernel for texts of several lengths as diffusers calls them: it believes that what counts comes first."""
    first = None
    if attn_mask is not None:
        numbers = attn_mask.reshape(len(query), -1, key.shape[1]).any(1).sum(1)
        first = torch.arange(key.shape[1])[None] < numbers[:, None]
    native = AttentionBackendName.NATIVE
    result: torch.Tensor = dispatch_attention_fn(query, key, value, first, scale=scale, backend=native)
    return result


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a kernel that is there, and drops the last keys where padding is in the middle."""
    monkeypatch.setattr(dispatcher, "_CAN_USE_SAGE_ATTN", True)
    _AttentionBackendRegistry.register(AttentionBackendName.SAGE_VARLEN)(first_keys)
    return "sage_varlen"


@pytest.mark.parametrize("name", ["torch_sdpa", "native", "TORCH_SDPA"])
def test_sglangs_and_diffusers_names_are_known(name: str) -> None:
    assert chosen(attention_backend=name) == Attention("native", takes_masks=True, options=AttentionOptions())
    assert chosen(diffusers_attention_backend=name) == chosen(attention_backend=name)


def test_nothing_is_chosen_where_nothing_is_asked_for() -> None:
    assert chosen() is None
    assert chosen(attention_backend="auto") is None


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("fa", "flash-attn"),
        ("fa3", "FA3"),
        ("sage_attn", "sageattention"),
        ("xformers", "xformers"),
        ("fa4", "kernels"),
    ],
)
def test_missing_package_is_named_with_what_works(name: str, package: str) -> None:
    message = refusal(attention_backend=name)

    assert package in message
    assert message.endswith("These work here: flex, native, _native_flash, _native_math")


def test_kernel_that_is_for_gpus_is_refused_on_a_cpu() -> None:
    assert "_native_cudnn doesn't run on cpu in float32" in refusal(attention_backend="torch_cudnn_sdpa")


def test_names_that_mean_nothing_here_are_refused() -> None:
    assert "SGLang's own models" in refusal(attention_backend="video_sparse_attn")
    assert "unknown" in refusal(attention_backend="fa33")
    assert "give one of them" in refusal(attention_backend="native", diffusers_attention_backend="flash")


@pytest.mark.parametrize("given", ['{"checks": true, "masks": "error"}', "checks=true, masks=error", "file"])
def test_options_come_as_json_file_or_pairs(given: str, tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text("checks: true\nmasks: error\n")
    given = str(tmp_path / "options.yaml") if given == "file" else given
    made = chosen(attention_backend="native", attention_backend_config=given)

    assert made is not None
    assert made.options == AttentionOptions(checks=True, masks="error")


@pytest.mark.parametrize(
    ("given", "said"),
    [("sparsity=0.9", "sparsity"), ("{", "Expecting"), ("masks", "No such file"), ("a=1,b", "isn't key=value")],
)
def test_options_that_mean_nothing_are_refused(given: str, said: str) -> None:
    message = refusal(attention_backend="native", attention_backend_config=given)
    assert said in message
    assert "it has the keys checks, masks" in message


def test_options_without_a_backend_are_refused() -> None:
    assert "give attention_backend" in refusal(attention_backend_config="checks=true")


@pytest.mark.parametrize(("name", "takes"), [("native", True), (FLASH, False), ("flex", False)])
def test_whether_a_kernel_takes_masks_is_tried(name: str, takes: bool) -> None:
    assert attention.takes_masks(name, "cpu", torch.float32) is takes


def test_kernel_that_drops_keys_behind_padding_is_found_out(varlen: str) -> None:
    made = chosen(attention_backend=varlen)

    assert made == Attention(varlen, takes_masks=False, options=AttentionOptions())
    assert made.note == "attention by sage_varlen; with a mask by native"


def test_kernel_that_computes_something_else_is_found_out(varlen: str) -> None:
    _AttentionBackendRegistry.register(AttentionBackendName.SAGE_VARLEN)(lambda query, key, value: value * 2)
    assert "computes something else" in refusal(attention_backend=varlen)


def padded_forward(kernel: Attention | None) -> torch.Tensor:
    """A forward of Qwen-Image with two prompts of different lengths: keys are text, padding, then the picture."""
    model = build("qwen_image")[0].transformer
    if kernel is not None:
        attention.apply(kernel, [("transformer", model)])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        result: torch.Tensor = model(
            hidden_states=torch.randn(2, 4, 16, generator=generator),
            timestep=torch.tensor([0.5, 0.5]),
            encoder_hidden_states=torch.randn(2, 7, 16, generator=generator),
            encoder_hidden_states_mask=torch.tensor([[1] * 4 + [0] * 3, [1] * 7]).bool(),
            img_shapes=[[(1, 2, 2)]] * 2,
            return_dict=False,
        )[0]
    return result


@pytest.mark.parametrize("name", [FLASH, "sage_varlen"])
def test_no_mask_is_dropped(name: str, varlen: str) -> None:
    expected = padded_forward(None)
    torch.testing.assert_close(padded_forward(chosen(attention_backend=name)), expected)


def test_masks_would_be_dropped_without_the_guard(varlen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "guard", lambda kernel: None)
    wrong = padded_forward(chosen(attention_backend=varlen))

    assert not torch.allclose(wrong, padded_forward(None), atol=1e-3)


def test_masks_are_an_error_where_that_is_asked_for() -> None:
    kernel = chosen(attention_backend=FLASH, attention_backend_config="masks=error")
    with pytest.raises(ValueError, match="has a mask, which _native_flash doesn't take"):
        padded_forward(kernel)


def test_guard_hands_on_all_that_each_kernel_takes() -> None:
    """`_native_math` knows `enable_gqa`; a fake that doesn't isn't given it, but torch's own is, with a mask."""
    made = attention.guarded(lambda query: ("kernel", query), lambda **kwargs: ("masked", kwargs), ["query"])

    assert made(query=1, attn_mask=None, enable_gqa=True) == ("kernel", 1)
    mask = torch.ones(1)
    assert made(query=1, attn_mask=mask, enable_gqa=True) == (
        "masked",
        {"query": 1, "attn_mask": mask, "enable_gqa": True},
    )


def test_checks_of_diffusers_are_switched_on() -> None:
    padded_forward(chosen(attention_backend="native", attention_backend_config="checks=true"))
    assert _AttentionBackendRegistry._checks_enabled


def config(folder: Path, **options: str) -> EngineConfig:
    return EngineConfig(model_path=str(folder), device="cpu", num_cpu_threads=1, attention=AttentionConfig(**options))


def test_loaded_model_has_the_kernel_and_says_so(wan_folder: Path) -> None:
    asked = config(wan_folder, attention_backend=FLASH)
    model = load(asked)

    layers = [m for m in model.pipeline.transformer.modules() if hasattr(m, "processor")]
    assert layers
    assert {layer.processor._attention_backend for layer in layers} == {AttentionBackendName(FLASH)}
    # That of the process is for the other models.
    assert _AttentionBackendRegistry._active_backend == AttentionBackendName.NATIVE
    assert model.decisions["model"] == "attention by _native_flash; with a mask by native"
    assert describe(asked).decisions["model"] == model.decisions["model"]


def test_layers_that_ignore_the_choice_are_reported(sdxl_folder: Path) -> None:
    decisions = load(config(sdxl_folder, attention_backend="native")).decisions

    assert decisions["unet"].startswith("fp32; ")
    assert decisions["unet"].endswith(" attention layers ignore the backend")


def test_choice_that_nothing_heeds_is_refused(sdxl_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"would do nothing here: unet: (\d+) of \1 attention layers ignore"):
        load(config(sdxl_folder, attention_backend=FLASH))
