"""Which adapters a request gets."""

from typing import Any

import pytest

from sgld.config import LoraConfig
from sgld.engine.loras import Loras, of_config
from sgld.errors import InvalidRequest
from sgld.fields import FieldError
from sgld.messages import LoraLoaded
from sgld.sampling_params import LoraChoice

STYLE = LoraChoice(nickname="style", path="a.safetensors", scale=0.5)
SPEED = LoraChoice(nickname="speed", path="b.safetensors")
HIGH = LoraChoice(nickname="high", path="high.safetensors", target="transformer")
LOW = LoraChoice(nickname="low", path="low.safetensors", target="transformer_2")


def loras(*choices: LoraChoice, target: str = "all") -> Loras:
    return Loras().with_registered(choices).with_chosen(choices, target)


def problem_of(loras: Loras, nickname: str) -> str:
    with pytest.raises(InvalidRequest) as caught:
        loras.resolved([LoraChoice(nickname=nickname)])
    assert caught.value.param == "lora"
    return str(caught.value)


def test_adapters_of_the_start_are_active() -> None:
    config = LoraConfig(lora_path=("x/style.safetensors", "owner/name:fast.safetensors"), lora_scale=(0.5,))

    assert of_config(config).active == (
        LoraChoice(nickname="style", path="x/style.safetensors", scale=0.5),
        LoraChoice(nickname="fast", path="owner/name:fast.safetensors", scale=0.5),
    )
    assert LoraConfig(lora_path=("owner/name",), lora_weight_name="a.safetensors").paths == (
        "owner/name:a.safetensors",
    )
    assert of_config(LoraConfig(lora_path=("x",))).active == (LoraChoice(nickname="default", path="x"),)
    assert of_config(LoraConfig()).active == ()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"lora_path": ("a", "b"), "lora_nickname": ("x",)}, "lora_nickname"),
        ({"lora_path": ("a", "b"), "lora_nickname": ("x", "x")}, "lora_nickname"),
        ({"lora_path": ("a/x.safetensors", "b/x.safetensors")}, "lora_nickname"),
        ({"lora_path": ("a",), "lora_scale": (1.0, 2.0)}, "lora_scale"),
        ({"lora_alpha": 0.0}, "lora_alpha"),
    ],
)
def test_a_start_that_makes_no_sense_is_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(FieldError, match=f"^{field} is"):
        LoraConfig(**fields)


def test_a_request_gets_what_it_chooses_or_what_is_active() -> None:
    known = loras(STYLE, SPEED)

    assert known.resolved(None) == (STYLE, SPEED)
    assert known.resolved([]) == ()
    chosen = [LoraChoice(nickname="speed", scale=2.0), LoraChoice(path="c.safetensors")]
    assert known.resolved(chosen) == (
        LoraChoice(nickname="speed", path="b.safetensors", scale=2.0),
        LoraChoice(path="c.safetensors"),
    )
    assert known.resolved(known.resolved(chosen)) == known.resolved(chosen)


def test_what_a_request_got_stays_though_the_nickname_is_given_to_another() -> None:
    got = loras(STYLE).resolved(None)

    assert loras(LoraChoice(nickname="style", path="other.safetensors")).resolved(got) == got


def test_unknown_nicknames_are_named_with_those_that_are_meant() -> None:
    assert problem_of(loras(STYLE), "stlye") == "there is no LoRA adapter 'stlye'; did you mean 'style'?"
    assert problem_of(loras(STYLE, SPEED), "x") == "there is no LoRA adapter 'x'; there are style, speed"
    assert problem_of(Loras(), "x") == "there is no LoRA adapter 'x'; none is loaded"


def test_what_is_set_for_one_transformer_leaves_that_of_the_other() -> None:
    both = loras(HIGH, target="transformer").with_registered([LOW]).with_chosen([LOW], "transformer_2")

    assert both.active == (HIGH, LOW)
    assert both.with_chosen([STYLE], "all").active == (STYLE,)
    with pytest.raises(InvalidRequest, match="have target 'all'"):
        loras(STYLE).with_chosen([LOW], "transformer_2")


def test_switched_off_they_are_remembered() -> None:
    off = loras(STYLE).switched(False)

    assert off.resolved(None) == ()
    assert off.resolved([LoraChoice(nickname="style")])[0].path == STYLE.path
    assert off.switched(True, 2.0).active == (LoraChoice(nickname="style", path="a.safetensors", scale=2.0),)
    with pytest.raises(InvalidRequest, match="no LoRA adapter is set"):
        Loras().switched(True)


def test_an_adapter_that_is_unloaded_is_nobodys_any_more() -> None:
    known = loras(STYLE, SPEED).without("style")

    assert known.active == (SPEED,)
    assert [adapter.nickname for adapter in known.registered] == ["speed"]
    with pytest.raises(InvalidRequest):
        known.without("style")


def test_sizes_come_from_the_rank() -> None:
    reply = LoraLoaded(path="a.safetensors", size_bytes=7, num_layers={"unet": 3}, num_unmatched=1)

    adapter = loras(STYLE, SPEED).loaded(reply).find("style")

    assert (adapter.size_bytes, adapter.num_layers, adapter.num_unmatched) == (7, {"unet": 3}, 1)
