from typing import Any

import pytest
import torch
from pipelines import build
from pipelines.parts import clip
from torch import nn

from sgld.config import ConditioningConfig
from sgld.testing import run_together
from sgld.worker.calls import Call
from sgld.worker.digests import Digests
from sgld.worker.executor import Executor
from sgld.worker.reuse import Encodings
from worker.requests import call_of, picture, request, values

MAX_BYTES = 2**20


class Count:
    """Counts the forwards of a component; a hook would keep its results from being used again."""

    def __init__(self, component: nn.Module) -> None:
        self.num_forwards = 0
        self._forward = component.forward
        component.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.num_forwards += 1
        return self._forward(*args, **kwargs)


@pytest.fixture
def encoder() -> nn.Module:
    torch.manual_seed(0)
    made = clip()
    assert isinstance(made, nn.Module)
    return made


@pytest.fixture
def count(encoder: nn.Module) -> Count:
    return Count(encoder)


def tokens(*ids: int) -> torch.Tensor:
    return torch.tensor([[*ids, 1]])


def encoded(executor: Executor, encoder: nn.Module, *ids: int, **kwargs: Any) -> Any:
    tick = executor.run([call_of(encoder, tokens(*ids), component="text_encoder", **kwargs)])
    return values(tick.outcomes)[0]


def test_text_that_was_encoded_before_has_the_same_bits_without_a_forward(encoder: nn.Module, count: Count) -> None:
    executor = Executor()
    first = encoded(executor, encoder, 3, 4, output_hidden_states=True)
    again = encoded(executor, encoder, 3, 4, output_hidden_states=True)
    assert count.num_forwards == 1
    assert type(again) is type(first)
    assert again.keys() == first.keys()
    for one, other in zip(again.hidden_states, first.hidden_states, strict=True):
        assert torch.equal(one, other)


def test_each_caller_has_tensors_of_its_own(encoder: nn.Module, count: Count) -> None:
    executor = Executor()
    for _ in range(3):
        result = encoded(executor, encoder, 3, 4)
        assert not result.last_hidden_state.isnan().any()
        result.last_hidden_state.fill_(float("nan"))
    assert count.num_forwards == 1


def test_other_text_and_other_options_are_encoded(encoder: nn.Module, count: Count) -> None:
    executor = Executor()
    for _ in range(2):
        encoded(executor, encoder, 3, 4)
        encoded(executor, encoder, 4, 3)
        encoded(executor, encoder, 3, 4, attention_mask=torch.ones(1, 3))
        encoded(executor, encoder, 3, 4, output_hidden_states=True)
    assert count.num_forwards == 4


def test_encoder_whose_weights_changed_is_asked_again(encoder: nn.Module) -> None:
    executor = Executor()
    before = encoded(executor, encoder, 3, 4).last_hidden_state
    with torch.no_grad():
        next(encoder.parameters()).mul_(2)
    assert not torch.equal(encoded(executor, encoder, 3, 4).last_hidden_state, before)


def test_encoder_with_other_attributes_is_asked_again(encoder: nn.Module, count: Count) -> None:
    executor = Executor()
    for attention in ("some", "other", "some"):
        encoder.attention = attention  # type: ignore[assignment]
        encoded(executor, encoder, 3, 4)
    assert count.num_forwards == 2


def test_encoder_with_hooks_that_is_trained_or_drawn_from_is_asked_each_time(encoder: nn.Module, count: Count) -> None:
    next(encoder.children()).register_forward_hook(lambda *_: None)
    for _ in range(2):
        encoded(Executor(), encoder, 3, 4)
    assert count.num_forwards == 2
    assert Encodings(Digests(), MAX_BYTES).key(call_of(clip().train(), tokens(3))) is None


def test_only_forwards_of_text_encoders_without_a_state_are_known(encoder: nn.Module) -> None:
    encodings = Encodings(Digests(), MAX_BYTES)
    assert encodings.key(call_of(encoder, tokens(3))) is not None
    assert encodings.key(call_of(encoder, tokens(3), method="generate")) is None
    assert encodings.key(call_of(encoder, tokens(3), past_key_values=object())) is None
    assert encodings.key(call_of(nn.Identity(), tokens(3))) is None
    with_gradients = call_of(encoder, tokens(3))
    context = type(with_gradients.context)(True, (), torch.device("cpu"), None)
    call = Call("request", "text_encoder", encoder, "forward", (tokens(3),), {}, context)
    assert encodings.key(call) is None


def test_a_batch_runs_without_those_that_are_known(encoder: nn.Module, count: Count) -> None:
    executor = Executor()
    texts = [tokens(3, 4), tokens(5, 6), tokens(7, 8)]
    expected = [call_of(encoder, text).run((text,), {}).last_hidden_state for text in texts]
    encoded(executor, encoder, 5, 6)
    count.num_forwards = 0
    tick = executor.run([call_of(encoder, text, component="text_encoder") for text in texts])
    for result, wanted in zip(values(tick.outcomes), expected, strict=True):
        assert torch.equal(result.last_hidden_state, wanted)
    assert not tick.is_timed
    assert count.num_forwards == 2 + 2  # a proof with two


def test_those_used_last_are_kept_within_a_limit() -> None:
    encodings = Encodings(Digests(), max_bytes=100)
    for key in "ab":
        encodings.keep(key, {"x": torch.ones(12)})
    encodings.recall("a")
    encodings.keep("c", (torch.zeros(12),))
    assert encodings.recall("b") is None
    assert torch.equal(encodings.recall("a")["x"], torch.ones(12))
    encodings.keep("large", torch.zeros(26))
    assert encodings.recall("large") is None
    assert encodings.recall("c") is not None
    encodings.clear()
    assert encodings.recall("a") is None
    encodings.keep("d", torch.ones(25))
    assert encodings.recall("d") is not None


def test_nothing_is_kept_where_nothing_may_be(encoder: nn.Module, count: Count) -> None:
    executor = Executor(max_encodings_bytes=0)
    for _ in range(2):
        tick = executor.run([call_of(encoder, tokens(3, 4), component="text_encoder")])
        assert tick.num_reused == 0
    assert count.num_forwards == 2
    assert ConditioningConfig(disable_conditioning_cache=True).max_bytes == 0
    assert ConditioningConfig(conditioning_cache_size=0.5).max_bytes == 2**19


def test_calls_that_were_known_are_counted(encoder: nn.Module) -> None:
    executor = Executor()
    encoded(executor, encoder, 3, 4)
    calls = [call_of(encoder, tokens(*ids), component="text_encoder") for ids in ((3, 4), (5, 6), (3, 4))]
    assert executor.run(calls).num_reused == 2


def test_negative_prompt_of_several_requests_is_encoded_once() -> None:
    pipeline, kwargs = build("sdxl")
    negative = {"negative_prompt": "a dog on the hill"}
    plain = [picture(pipeline(**request("sdxl", index, kwargs, **negative))) for index in range(3)]
    count = Count(pipeline.text_encoder)
    report = run_together(pipeline, [request("sdxl", index, kwargs, **negative) for index in range(3)], merge=False)
    assert [torch.equal(picture(o), p) for o, p in zip(report.outputs, plain, strict=True)] == [True] * 3
    assert count.num_forwards == 3 + 1
