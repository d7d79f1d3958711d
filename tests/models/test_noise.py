"""Noise schedulers that are chosen, against those that diffusers makes of the same values."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from engine.streams import difference, params_of, plain
from pipelines import build

from sgld.config import EngineConfig, NoiseConfig
from sgld.errors import ModelError
from sgld.models.load import load
from sgld.models.noise import Unshiftable, _carried, shifted
from sgld.models.plan import Plan, plan


def config(folder: Path, **choices: Any) -> EngineConfig:
    return EngineConfig(model_path=str(folder), device="cpu", num_cpu_threads=1, noise=NoiseConfig(**choices))


def planned(folder: Path, **choices: Any) -> Plan:
    return plan(config(folder, **choices))


def refusal(folder: Path, **choices: Any) -> str:
    with pytest.raises(ModelError) as caught:
        planned(folder, **choices)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="session")
def pixart_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pixart")
    build("pixart")[0].save_pretrained(folder)
    return folder


def test_model_has_its_own_noise_scheduler_unless_one_is_chosen(wan_folder: Path) -> None:
    assert planned(wan_folder).scheduler is None
    assert "scheduler" not in planned(wan_folder).decisions()


@pytest.mark.parametrize(
    ("name", "values"),
    [("EulerDiscreteScheduler", {}), ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True})],
)
def test_picture_is_that_of_diffusers_with_this_scheduler(
    pixart_folder: Path, name: str, values: dict[str, Any]
) -> None:
    pipeline, kwargs = build("pixart")
    params = params_of(kwargs, num_inference_steps=4)
    own = plain(pipeline, params)
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **values)
    expected = plain(pipeline, params)
    model = load(config(pixart_folder, scheduler=name, scheduler_config=values))
    model.pipeline.set_progress_bar_config(disable=True)
    assert difference(plain(model.pipeline, params), expected) == 0
    assert difference(own, expected) > 0


def test_what_is_not_chosen_stays_and_decisions_say_what_is(wan_folder: Path) -> None:
    chosen = planned(wan_folder, scheduler="DPMSolverMultistepScheduler", scheduler_config={"solver_order": 3})
    assert isinstance(chosen.scheduler, diffusers.DPMSolverMultistepScheduler)
    made = chosen.scheduler.config
    assert (made.solver_order, made.flow_shift, made.use_flow_sigmas, made.prediction_type) == (
        *(3, 3.0, True, "flow_prediction"),
    )
    said = "DPMSolverMultistepScheduler in the place of UniPCMultistepScheduler; solver_order: 3"
    assert chosen.decisions()["scheduler"] == said
    assert planned(wan_folder, flow_shift=5).decisions()["scheduler"] == "flow_shift: 5"


def test_families_for_flow_matching_understand_one_another(wan_folder: Path) -> None:
    euler = planned(wan_folder, scheduler="FlowMatchEulerDiscreteScheduler").scheduler
    assert torch.equal(euler.sigmas, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas)
    own = diffusers.FlowMatchEulerDiscreteScheduler(shift=4.0)
    for name in ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler"):
        made = getattr(diffusers, name).from_config(own.config, **_carried(own.config, getattr(diffusers, name)))
        assert (made.config.flow_shift, made.config.use_flow_sigmas) == (4.0, True)
        assert made.config.prediction_type == "flow_prediction"


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0),
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    ],
)
def test_shift_is_that_of_a_scheduler_made_with_it(scheduler: Any) -> None:
    key = "shift" if "shift" in scheduler.config else "flow_shift"
    expected = type(scheduler).from_config(scheduler.config, **{key: 6.0})
    found = shifted(scheduler, 6.0)
    for one in (found, expected, scheduler):
        one.set_timesteps(5)
    assert torch.equal(found.sigmas, expected.sigmas)
    assert not torch.equal(found.sigmas, scheduler.sigmas)


@pytest.mark.parametrize(
    ("scheduler", "problem"),
    [
        (diffusers.EulerDiscreteScheduler(), "EulerDiscreteScheduler has no shift here; that is for flow matching"),
        (diffusers.UniPCMultistepScheduler(), "UniPCMultistepScheduler has no shift here"),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            "shifts by the size of what is generated (use_dynamic_shifting)",
        ),
    ],
)
def test_schedules_without_a_shift_have_none(scheduler: Any, problem: str) -> None:
    with pytest.raises(Unshiftable) as caught:
        shifted(scheduler, 3.0)
    assert problem in str(caught.value)


def test_scheduler_that_does_not_suit_the_model_is_refused_with_those_that_do(
    pixart_folder: Path, wan_folder: Path
) -> None:
    message = refusal(pixart_folder, scheduler="FlowMatchEulerDiscreteScheduler")
    assert "scheduler FlowMatchEulerDiscreteScheduler isn't for models of predicted noise; these are: " in message
    assert "EulerDiscreteScheduler" in message
    assert "FlowMatchHeun" not in message
    # diffusers calls it compatible with that of Wan, but it matches no flows.
    message = refusal(wan_folder, scheduler="DDIMScheduler")
    assert "isn't for models of flow matching" in message
    assert "FlowMatchEulerDiscreteScheduler" in message
    assert "EulerAncestralDiscreteScheduler" not in message


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (
            {"scheduler": "UniPCMultistepSheduler"},
            "UniPCMultistepSheduler is no noise scheduler of diffusers; did you mean UniPCMultistepScheduler?",
        ),
        ({"scheduler": "unipc"}, "unipc is no noise scheduler of diffusers; did you mean UniPCMultistepScheduler?"),
        ({"scheduler": "WanPipeline"}, "scheduler WanPipeline is no noise scheduler of diffusers; these are: "),
        (
            {"scheduler_config": {"flow_shft": 3}},
            "scheduler_config.flow_shft: UniPCMultistepScheduler has no such value; did you mean flow_shift?",
        ),
        ({"scheduler_config": {"zzz": 3}}, "UniPCMultistepScheduler has no such value; it has num_train_timesteps, "),
        (
            {"scheduler_config": {"solver_type": "no"}},
            "UniPCMultistepScheduler can't be made with {'solver_type': 'no'}: ",
        ),
        (
            {"scheduler_config": {"use_flow_sigmas": False}, "flow_shift": 3},
            "flow_shift can't be 3: UniPCMultistepScheduler has no shift here",
        ),
    ],
)
def test_what_can_not_be_chosen_is_told(wan_folder: Path, choices: dict[str, Any], message: str) -> None:
    assert message in refusal(wan_folder, **choices)


def test_boundary_is_that_of_a_model_with_two_transformers(tmp_path: Path, wan_folder: Path) -> None:
    build("wan_2_2")[0].save_pretrained(tmp_path)
    model = load(config(tmp_path, boundary_ratio=0.5))
    assert model.pipeline.config.boundary_ratio == 0.5
    assert model.info().decisions["model"] == "boundary_ratio: 0.5"
    with pytest.raises(ModelError, match="boundary_ratio is for models with a second transformer"):
        load(config(wan_folder, boundary_ratio=0.5))


def test_embedded_guidance_is_the_default_of_models_that_have_it(tmp_path: Path, wan_folder: Path) -> None:
    build("flux")[0].save_pretrained(tmp_path)
    model = load(config(tmp_path, embedded_cfg_scale=6))
    assert model.defaults == {"guidance_scale": 6}
    assert model.info().decisions["model"] == "embedded_cfg_scale: 6"
    with pytest.raises(ModelError, match="isn't one: choose guidance_scale"):
        load(config(wan_folder, embedded_cfg_scale=6))


def test_modular_pipelines_take_it_too(modular_folder: Path) -> None:
    chosen = {"use_dynamic_shifting": False}
    model = load(config(modular_folder, scheduler_config=chosen, flow_shift=2))
    assert (model.pipeline.scheduler.config.shift, model.pipeline.scheduler.config.use_dynamic_shifting) == (2, False)
