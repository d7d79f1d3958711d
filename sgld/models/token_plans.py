"""Where denoisers split their tokens and join them again: diffusers' plans, and our own for models that have none.

A plan has, by module, which arguments are split before it runs, which of its outputs are split (by index), or along
which axis its outputs are joined.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput


@dataclass(frozen=True)
class Each:
    """An argument with tokens along an axis: a tensor, or all tensors of a list, a tuple or a dict."""

    dim: int
    num_dims: int | None = None
    """Tensors of another number of axes have no tokens."""
    can_be_one: bool = False
    """An axis of length 1 is for all tokens."""
    unit: str | None = None
    """The argument that says how many tokens stay together, as those of a row."""


@dataclass(frozen=True)
class Output:
    """An output of a module that is split before others see it."""

    dim: int


@dataclass(frozen=True)
class Joined:
    """An argument with a mask of all tokens of these arguments, in this order, that are split already.

    It stays whole, in the order in which the tokens of all ranks come together.
    """

    of: tuple[str, ...]


@dataclass(frozen=True)
class Leading:
    """An argument that says how many tokens at the front of another one, which is split, are of a kind.

    Modules that don't ask for it have none.
    """

    of: str


@dataclass(frozen=True)
class Count:
    """An argument that says how many tokens, or rows of them, there are."""


@dataclass(frozen=True)
class Whole:
    """The outputs of a module are joined; None: that one isn't split."""

    dims: tuple[int | None, ...]


Argument = Each | Joined | Leading | Count
Step = Mapping[str | int, Argument | Output] | Whole


@dataclass(frozen=True)
class TokenPlan:
    """What is split and joined, by names of modules, where `*` stands for all of a list and a number for one of it.

    `attention`: the modules whose attention is among the tokens of all ranks; None: those that diffusers prepared.
    `linear`: those whose attention is linear. `convolutions`: those that see one row of tokens beyond their own.
    How many tokens there are must follow from the shapes of the arguments, not from what is in a mask.
    """

    steps: tuple[tuple[str, Step], ...]
    attention: tuple[str, ...] | None = None
    linear: tuple[str, ...] = ()
    convolutions: tuple[str, ...] = ()


def plan_of(cls: type) -> TokenPlan | None:
    """How a class of models splits its tokens; None: nobody knows."""
    own = _PLANS.get(cls.__name__)
    if own is not None:
        return own
    given = getattr(cls, "_cp_plan", None)
    if not given:
        return None
    steps = [(name, _step(entry)) for name, entry in given.items()]
    return TokenPlan((*steps, *_ALSO.get(cls.__name__, ())))


def why_not(class_name: str) -> str:
    """Why the tokens of such models aren't shared."""
    problem = next((why for pattern, why in _REASONS if re.search(pattern, class_name)), None)
    return f"can't share its tokens, as {problem}" if problem else "has no plan of how to split its tokens"


def _step(entry: Any) -> Step:
    """Of diffusers' notation."""
    if isinstance(entry, Mapping):
        return {name: _argument(name, split) for name, split in entry.items()}
    outputs = [entry] if isinstance(entry, ContextParallelOutput) else entry
    return Whole(tuple(None if one is None else one.gather_dim for one in outputs))


def _argument(name: str | int, split: Any) -> Each | Output:
    one = split if isinstance(split, ContextParallelInput) else split[0]
    return Output(one.split_dim) if isinstance(name, int) else Each(one.split_dim, one.expected_dims)


_TWO_STREAMS: dict[str | int, Argument | Output] = {"hidden_states": Each(1), "encoder_hidden_states": Each(1)}
_HUNYUAN: dict[str | int, Argument] = {
    "attention_mask": Joined(("hidden_states", "encoder_hidden_states")),
    "num_tokens": Leading("hidden_states"),
}
_LTX_2: Step = {
    "video_rotary_emb": Each(-2),
    "ca_video_rotary_emb": Each(-2),
    "temb": Each(1, can_be_one=True),
    "temb_ca_scale_shift": Each(1, can_be_one=True),
    "temb_ca_gate": Each(1, can_be_one=True),
}
# What diffusers' plans leave out.
_ALSO: dict[str, tuple[tuple[str, Step], ...]] = {
    "FluxTransformer2DModel": (
        ("", {"controlnet_block_samples": Each(1), "controlnet_single_block_samples": Each(1)}),
    ),
    # It may be different for each token.
    "LTXVideoTransformer3DModel": (("", {"timestep": Each(1, 2, can_be_one=True)}),),
    "QwenImageTransformer2DModel": (("", {"controlnet_block_samples": Each(1)}),),
}

_JOINED: Step = Whole((1,))
_PLANS: dict[str, TokenPlan] = {
    "AuraFlowTransformer2DModel": TokenPlan(
        (("joint_transformer_blocks.0", _TWO_STREAMS), ("proj_out", _JOINED)),
        ("joint_transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    ),
    "CogView3PlusTransformer2DModel": TokenPlan(
        (("transformer_blocks.0", _TWO_STREAMS), ("proj_out", _JOINED)),
        ("transformer_blocks.*.attn1",),
    ),
    "CogView4Transformer2DModel": TokenPlan(
        (
            ("transformer_blocks.0", _TWO_STREAMS),
            ("transformer_blocks.*", {"image_rotary_emb": Each(0)}),
            ("proj_out", _JOINED),
        ),
        ("transformer_blocks.*.attn1",),
    ),
    "OvisImageTransformer2DModel": TokenPlan(
        (
            ("", {**_TWO_STREAMS, "img_ids": Each(0), "txt_ids": Each(0)}),
            ("proj_out", _JOINED),
        ),
    ),
    "PixArtTransformer2DModel": TokenPlan(
        (("transformer_blocks.0", {"hidden_states": Each(1)}), ("proj_out", _JOINED)),
        ("transformer_blocks.*.attn1",),
    ),
    "WanVACETransformer3DModel": TokenPlan(
        (
            ("rope", {0: Output(1), 1: Output(1)}),
            ("vace_blocks.0", {"control_hidden_states": Each(1)}),
            ("vace_blocks.*", {"hidden_states": Each(1)}),
            ("blocks.0", {"hidden_states": Each(1)}),
            ("proj_out", _JOINED),
        ),
    ),
    "SD3Transformer2DModel": TokenPlan(
        (
            ("", {"block_controlnet_hidden_states": Each(1)}),
            ("pos_embed", {0: Output(1)}),
            ("context_embedder", {0: Output(1)}),
            ("proj_out", _JOINED),
        ),
        ("transformer_blocks.*.attn", "transformer_blocks.*.attn2"),
    ),
    "CogVideoXTransformer3DModel": TokenPlan(
        (
            ("transformer_blocks.0", _TWO_STREAMS),
            ("transformer_blocks.*", {"image_rotary_emb": Each(0)}),
            ("proj_out", _JOINED),
        ),
        ("transformer_blocks.*.attn1",),
    ),
    "HunyuanVideoTransformer3DModel": TokenPlan(
        (
            ("transformer_blocks.0", _TWO_STREAMS),
            ("transformer_blocks.*", _HUNYUAN | {"freqs_cis": Each(0)}),
            ("single_transformer_blocks.*", _HUNYUAN | {"image_rotary_emb": Each(0)}),
            ("proj_out", _JOINED),
        ),
        ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    ),
    # Sound stays whole: all ranks compute it.
    "LTX2VideoTransformer3DModel": TokenPlan(
        (
            ("transformer_blocks.0", {"hidden_states": Each(1)}),
            ("transformer_blocks.*", _LTX_2),
            ("transformer_blocks.-1", Whole((1, None))),
        ),
        ("transformer_blocks.*.attn1", "transformer_blocks.*.video_to_audio_attn"),
    ),
    "SanaTransformer2DModel": TokenPlan(
        (
            ("transformer_blocks.0", {"hidden_states": Each(1, unit="width")}),
            ("transformer_blocks.*", {"height": Count()}),
            ("proj_out", _JOINED),
        ),
        attention=(),
        linear=("transformer_blocks.*.attn1",),
        convolutions=("transformer_blocks.*.ff.conv_depth",),
    ),
    "ZImageTransformer2DModel": TokenPlan(
        (
            ("noise_refiner.0", {"x": Each(1)}),
            ("noise_refiner.*", {"freqs_cis": Each(1), "noise_mask": Each(1)}),
            ("noise_refiner.-1", Whole((1,))),
            ("layers.0", {"x": Each(1)}),
            ("layers.*", {"freqs_cis": Each(1), "noise_mask": Each(1)}),
            ("layers.-1", Whole((1,))),
        ),
        ("noise_refiner.*.attention", "layers.*.attention"),
    ),
}

_REASONS = (
    (r"UNet|^ControlNetModel", "its convolutions see the pixels around each one"),
    (r"^SanaVideo", "its layers have convolutions that see the frames around each one"),
    (r"^Lumina2", "how many they are depends on what is in its masks"),
    (r"^Chroma", "its masks are different for each of them"),
    (r"^Latte", "its layers look at the tokens of a frame and at those of a place in turn"),
)
