"""Tensor parallelism: which layers of a model ranks have parts of, by the plans of its library or of our own.

transformers and diffusers say for many models how their layers are divided. Weights are cut as these plans have it, and
the layers are torch's with a part of the weights (`tensor_layers`): no distributed tensors, so whatever else is done
to modules goes on, and the same works on a CPU.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from sgld.models.tensor_layers import (
    Cut,
    JoinedLinear,
    Parted,
    SplitEmbedding,
    SplitLinear,
    SummedEmbedding,
    SummedLinear,
    Team,
    divide,
)

# Styles in the words of transformers; what they say of gradients doesn't matter here.
_KINDS: Mapping[str, type[Parted] | None] = {
    "colwise": SplitLinear,
    "colwise_rep": JoinedLinear,
    "colwise_gather_output": JoinedLinear,
    "rowwise": SummedLinear,
    "embedding_rowwise": SummedEmbedding,
    "embedding_colwise_local": SplitEmbedding,
    "replicate": None,
    "replicated_with_grad_allreduce": None,
}
_T5 = {
    "encoder.block.*.layer.0.SelfAttention.q": "colwise",
    "encoder.block.*.layer.0.SelfAttention.k": "colwise",
    "encoder.block.*.layer.0.SelfAttention.v": "colwise",
    "encoder.block.*.layer.0.SelfAttention.o": "rowwise",
    # One number for each head.
    "encoder.block.*.layer.0.SelfAttention.relative_attention_bias": "embedding_colwise_local",
    "encoder.block.*.layer.1.DenseReluDense.wi": "colwise",
    "encoder.block.*.layer.1.DenseReluDense.wi_0": "colwise",
    "encoder.block.*.layer.1.DenseReluDense.wi_1": "colwise",
    "encoder.block.*.layer.1.DenseReluDense.wo": "rowwise",
}
_CLIP = {
    "encoder.layers.*.self_attn.q_proj": "colwise",
    "encoder.layers.*.self_attn.k_proj": "colwise",
    "encoder.layers.*.self_attn.v_proj": "colwise",
    "encoder.layers.*.self_attn.out_proj": "rowwise",
    "encoder.layers.*.mlp.fc1": "colwise",
    "encoder.layers.*.mlp.fc2": "rowwise",
}
# Of models that have none of their own, by class name.
_PLANS: Mapping[str, Mapping[str, str]] = {
    "T5EncoderModel": _T5,
    "UMT5EncoderModel": _T5,
    # Versions of transformers differ in whether there is a `text_model` inside.
    "CLIPTextModel": _CLIP | {f"text_model.{name}": style for name, style in _CLIP.items()},
    "CLIPTextModelWithProjection": {f"text_model.{name}": style for name, style in _CLIP.items()},
}
# Attributes of attention layers that count what the plan divides; other layers ask their input.
_COUNTS = {"SelfAttention": ("n_heads", "inner_dim")}


class Indivisible(Exception):
    """Ranks can't have parts of a model; says why."""


class NoPlan(Indivisible):
    """Nobody says how."""


def divide_model(model: nn.Module, team: Team) -> dict[str, Cut]:
    """Have a model on the meta device hold this rank's parts of its layers.

    :return: the cuts of its weights, by their names.
    :raises NoPlan: nobody says how.
    :raises Indivisible: so many can't have parts of it.
    """
    kinds = _of_diffusers(model, team.size) if _is_of_diffusers(model) else _of_transformers(model)
    if not kinds:
        raise NoPlan("nothing says how its layers are divided")
    _check_heads(model, team.size)
    modules = dict(model.named_modules())
    for name, (kind, cuts) in kinds.items():
        divide(modules[name], kind, cuts, team)
    for name, module in modules.items():
        for attribute in _COUNTS.get(name.rpartition(".")[2], ()):
            if hasattr(module, attribute):
                setattr(module, attribute, getattr(module, attribute) // team.size)
    return {f"{name}.{leaf}": cut for name, (_, cuts) in kinds.items() for leaf, cut in cuts.items()}


_Kinds = dict[str, tuple[type[Parted], dict[str, Cut]]]


def _of_transformers(model: Any) -> _Kinds:
    """What becomes of each layer, by the plan of a model of transformers, and by ours for its vocabulary."""
    plan: Mapping[str, str] = _PLANS.get(type(model).__name__) or getattr(model, "_tp_plan", None) or {}
    styles = {name: style for name, module in model.named_modules() if (style := _style(name, plan)) is not None}
    unknown = sorted({style for style in plan.values() if style not in _KINDS})
    if unknown:
        raise NoPlan(f"its plan has layers that are {', '.join(unknown)}, which isn't supported")
    if styles:
        styles |= _of_vocabulary(model)
    kinds: _Kinds = {}
    for name, style in styles.items():
        kind, module = _KINDS[style], model.get_submodule(name)
        if kind is None:
            continue
        if not isinstance(module, nn.Embedding) and type(module) is not nn.Linear:
            raise NoPlan(f"{name} is a {type(module).__name__}, of which there are no parts")
        dim = 1 if kind in (SummedLinear, SplitEmbedding) else 0
        cuts = {"weight": Cut(dim, (module.weight.shape[dim],))}
        if dim == 0 and getattr(module, "bias", None) is not None:
            cuts["bias"] = cuts["weight"]
        kinds[name] = kind, cuts
    return kinds


def _style(name: str, plan: Mapping[str, str]) -> str | None:
    generic = (re.escape(pattern).replace(r"\*", r"\d+") for pattern in plan)
    return next(
        (style for pattern, style in zip(generic, plan.values(), strict=True) if re.fullmatch(pattern, name)), None
    )


def _of_vocabulary(model: Any) -> dict[str, str]:
    """The layers with a row for each token, which are a large part of some encoders."""
    num = model.get_input_embeddings().num_embeddings
    embeddings = {
        name: "embedding_rowwise"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings == num
    }
    head = model.get_output_embeddings()
    heads = {name: "colwise_gather_output" for name, module in model.named_modules() if module is head}
    return embeddings | heads


def _of_diffusers(model: Any, size: int) -> _Kinds:
    from diffusers.hooks.tensor_parallel import resolve_tp_shard_specs

    plan = getattr(model, "_tp_plan", None)
    if not plan:
        return {}
    try:
        specs = resolve_tp_shard_specs(model, plan, size)
    except ValueError as error:
        raise Indivisible(str(error)) from None
    kinds: _Kinds = {}
    for path, (dim, blocks) in specs.items():
        name, _, leaf = path.rpartition(".")
        _, cuts = kinds.setdefault(name, (SplitLinear, {}))
        if dim is not None:
            assert blocks is not None
            cuts[leaf] = Cut(dim, tuple(blocks))
        if leaf == "weight" and dim == 1:
            kinds[name] = SummedLinear, cuts
    return kinds


def _check_heads(model: Any, size: int) -> None:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    for attribute, what in (("num_attention_heads", "attention heads"), ("num_key_value_heads", "heads of keys")):
        num = getattr(config, attribute, None)
        if isinstance(num, int) and num % size:
            raise Indivisible(f"it has {num} {what}, and {num} isn't a multiple of {size}")


def _is_of_diffusers(model: nn.Module) -> bool:
    from diffusers import ModelMixin

    return isinstance(model, ModelMixin)
