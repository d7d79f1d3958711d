"""Plans of how denoisers split their tokens."""

import diffusers
import pytest

from sgld.models.token_plans import Each, Whole, plan_of, why_not


def test_plans_of_diffusers_are_read() -> None:
    plan = plan_of(diffusers.FluxTransformer2DModel)
    assert plan is not None
    assert plan.attention is None
    steps = dict(reversed(plan.steps))
    assert steps["proj_out"] == Whole((1,))
    inputs = steps[""]
    assert not isinstance(inputs, Whole)
    assert inputs["img_ids"] == Each(0, 2)


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "ZImageTransformer2DModel", "CogVideoXTransformer3DModel"])
def test_models_without_one_have_ours(name: str) -> None:
    cls = getattr(diffusers, name)
    assert not getattr(cls, "_cp_plan", None)
    assert plan_of(cls) is not None


def test_models_that_have_none_are_told_why() -> None:
    assert plan_of(diffusers.UNet2DConditionModel) is None
    assert (
        why_not("UNet2DConditionModel") == "can't share its tokens, as its convolutions see the pixels around each one"
    )
    assert why_not("Unheard") == "has no plan of how to split its tokens"
