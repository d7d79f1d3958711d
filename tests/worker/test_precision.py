"""Components in several precisions: as plain diffusers has them, and further than that where it would stop."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from pipelines import build
from torch import nn

from sgld.config import EngineConfig, MemoryConfig
from sgld.models.load import load
from sgld.testing import run_together
from sgld.worker.binding import bind, release
from sgld.worker.invocation import Invocation
from sgld.worker.precision import cast, computing_in, differs, is_wider, wanted
from sgld.worker.runtime import Runtime
from sgld.worker.task import Task
from worker.requests import picture, request

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in ("sdxl", "sd", "wan", "flux")}
    for name, folder in made.items():
        build(name)[0].save_pretrained(folder)
    return made


def together(folder: Path, name: str, dit: Any, encoder: Any, vae: Any) -> list[torch.Tensor]:
    """Two requests of a model that is loaded in these precisions."""
    memory = MemoryConfig(text_encoder_precision=(encoder,))
    config = EngineConfig(
        model_path=str(folder), device="cpu", num_cpu_threads=1, dit_precision=dit, vae_precision=vae, memory=memory
    )
    pipeline = load(config).pipeline
    pipeline.set_progress_bar_config(disable=True)
    calls = [request(name, index, build(name)[1]) for index in range(2)]
    return [picture(output).float() for output in run_together(pipeline, calls).outputs]


def plain(folder: Path, name: str, dit: str, encoder: str, vae: str) -> list[torch.Tensor]:
    """The same with diffusers alone."""
    of_encoders = {f"text_encoder{suffix}": _DTYPES[encoder] for suffix in ("", "_2")}
    dtypes = {"vae": _DTYPES[vae], "default": _DTYPES[dit], **of_encoders}
    named = DiffusionPipeline.load_config(folder)
    pipeline = DiffusionPipeline.from_pretrained(
        folder, dtype={part: dtype for part, dtype in dtypes.items() if part in named or part == "default"}
    )
    pipeline.set_progress_bar_config(disable=True)
    return [picture(pipeline(**request(name, index, build(name)[1]))).float() for index in range(2)]


# fp16 on a CPU rounds differently in a merged forward; SDXL casts its VAE around decoding, but scales the latents
# before in the precision of the weights here, in fp32 there.
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "precisions", "tolerance"),
    [
        ("sdxl", ("bf16", "bf16", "bf16"), 1e-6),
        ("sdxl", ("fp16", "fp16", "fp16"), 1e-3),
        ("sd", ("bf16", "bf16", "bf16"), 1e-6),
        ("sd", ("fp16", "fp16", "fp16"), 1e-3),
        ("wan", ("bf16", "bf16", "fp32"), 1e-6),
        ("wan", ("fp16", "fp32", "fp32"), 1e-3),
        ("wan", ("bf16", "fp32", "bf16"), 1e-6),
        ("flux", ("bf16", "bf16", "bf16"), 1e-6),
        ("flux", ("fp16", "fp16", "fp16"), 1e-3),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else str(value),
)
def test_pictures_are_those_of_plain_diffusers(
    folders: dict[str, Path], name: str, precisions: tuple[str, str, str], tolerance: float
) -> None:
    ours, theirs = together(folders[name], name, *precisions), plain(folders[name], name, *precisions)
    for output, alone in zip(ours, theirs, strict=True):
        torch.testing.assert_close(output, alone, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("name", "precisions"),
    [("flux", ("bf16", "fp32", "fp32")), ("sdxl", ("bf16", "bf16", "fp32")), ("sd", ("fp32", "bf16", "bf16"))],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else value,
)
def test_precisions_that_plain_diffusers_refuses_to_mix_give_nearly_the_picture_of_one(
    folders: dict[str, Path], name: str, precisions: tuple[str, str, str]
) -> None:
    with pytest.raises(RuntimeError, match=r"dtype|type \("):
        plain(folders[name], name, *precisions)
    exact = plain(folders[name], name, "fp32", "fp32", "fp32")
    for output, alone in zip(together(folders[name], name, *precisions), exact, strict=True):
        assert (output - alone).abs().mean() < 0.02


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_vae_that_would_overflow_decodes_in_the_precision_that_its_pipeline_asks_for() -> None:
    pipeline, kwargs = build("sdxl")
    pipeline.to(torch.float16)
    with torch.no_grad():
        # As large as what the VAE of SDXL has inside.
        pipeline.vae.post_quant_conv.weight.mul_(60_000)
    weights = [parameter.data_ptr() for parameter in pipeline.vae.parameters()]
    (output,) = run_together(pipeline, [request("sdxl", 0, kwargs)]).outputs
    assert picture(output).isfinite().all()
    # The very same weights are back.
    assert [parameter.data_ptr() for parameter in pipeline.vae.parameters()] == weights
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    assert not pipeline.vae.decode(latents)[0].isfinite().all(), "this test shows nothing"


def test_cast_of_a_component_holds_for_the_calls_of_its_task_and_to_less_never() -> None:
    pipeline, _ = build("sd")
    pipeline.vae.to(torch.bfloat16)
    task = Task("request", lambda task: None)
    bound = bind(pipeline, task)
    assert bound.vae.to(torch.float32) is bound.vae
    assert bound.vae.dtype is torch.float32
    assert bound.vae.call("decode", (), {}, "request").context.dtype is torch.float32
    assert pipeline.vae.dtype is torch.bfloat16
    bound.vae.to(dtype=torch.bfloat16)
    assert bound.vae.call("decode", (), {}, "request").context.dtype is None
    bound.unet.half()
    assert bound.unet.dtype is torch.float32
    bound.unet.to("cpu")
    assert bound.unet.call("forward", (), {}, "request").context.dtype is None
    release(bound)
    task.cancel()


@pytest.mark.parametrize(
    ("method", "args", "kwargs", "dtype"),
    [
        ("to", (torch.float16,), {}, torch.float16),
        ("to", ("cpu", torch.float16), {}, torch.float16),
        ("to", (), {"dtype": torch.float32}, torch.float32),
        ("to", ("cpu",), {}, None),
        ("float", (), {}, torch.float32),
        ("half", (), {}, torch.float16),
        ("bfloat16", (), {}, torch.bfloat16),
    ],
)
def test_what_a_cast_casts_to(
    method: str, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype | None
) -> None:
    assert wanted(method, args, kwargs) is dtype


def test_only_more_bits_are_wider() -> None:
    assert is_wider(torch.float32, torch.bfloat16)
    assert not is_wider(torch.float16, torch.bfloat16)
    assert not is_wider(torch.int64, torch.float32)
    assert not is_wider(None, torch.float32)


def test_weights_come_back_when_the_block_fails() -> None:
    module = nn.Linear(2, 2).half()
    before = module.weight.data_ptr()
    seen = []
    with contextlib.suppress(ZeroDivisionError), computing_in(module, torch.float32):
        seen.append(module.weight.dtype)
        raise ZeroDivisionError
    assert seen == [torch.float32]
    assert (module.weight.dtype, module.weight.data_ptr()) == (torch.float16, before)


def test_values_are_cast_and_numbers_and_times_are_not() -> None:
    timestep, ids = torch.tensor([999.0]), torch.ones(2, 3, dtype=torch.long)
    tree = ((torch.ones(2, 3),), {"timestep": timestep, "ids": ids, "scale": 2.0})
    assert differs(tree, torch.bfloat16)
    (sample,), kwargs = cast(tree, torch.bfloat16)
    assert sample.dtype is torch.bfloat16
    assert kwargs["timestep"] is timestep
    assert kwargs["ids"] is ids
    assert not differs(((sample,), kwargs), torch.bfloat16)


class Linear(nn.Module):
    """Refuses what isn't in its own precision, and counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4).to(torch.bfloat16)
        self.num_calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        if x.shape[-1] != 4:
            raise RuntimeError("x has another width")
        return self.inner(x)  # type: ignore[no-any-return]


def test_refusal_of_a_precision_is_met_once_and_then_known() -> None:
    module, runtime = Linear(), Runtime()
    for num_calls in (2, 3):
        assert runtime.run(Invocation(module, "forward", (torch.ones(2, 4),))).dtype is torch.bfloat16
        assert module.num_calls == num_calls


def test_other_errors_stay_what_they_are() -> None:
    module, runtime = Linear(), Runtime()
    with pytest.raises(RuntimeError, match="another width"):
        runtime.run(Invocation(module, "forward", (torch.ones(2, 5),)))
    with pytest.raises(RuntimeError, match="another width"):
        runtime.run(Invocation(module, "forward", (torch.ones(2, 5, dtype=torch.bfloat16),)))
    assert module.num_calls == 3
