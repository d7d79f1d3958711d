"""First-block caching: against diffusers' own, and what isn't cached so."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from pipelines import build

from sgld.errors import InvalidRequest
from sgld.sampling_params import FirstBlockCache
from sgld.testing import run_together
from sgld.worker.blocks import Split
from sgld.worker.calls import Call
from sgld.worker.first_block import FirstBlockSite, answered
from worker.requests import call_of, picture, request

# Of which some calls skip and others don't.
THRESHOLDS = {"flux_true_cfg": 0.3, "wan": 0.09, "qwen_image": 0.31, "hunyuan_video": 0.24}


@pytest.mark.parametrize("name", THRESHOLDS)
def test_single_request_is_as_with_diffusers_own_cache(name: str) -> None:
    pipeline, kwargs = build(name)
    cache = FirstBlockCache(threshold=THRESHOLDS[name], warmup_steps=1, max_skips=1000)
    own = run_together(pipeline, [request(name, 0, kwargs, num_inference_steps=10)], caches=[cache])
    plain = pipeline(**request(name, 0, kwargs, num_inference_steps=10))
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=THRESHOLDS[name]))
    expected = pipeline(**request(name, 0, kwargs, num_inference_steps=10))

    assert own.skipped_calls[0] > 0
    torch.testing.assert_close(picture(own.outputs[0]), picture(expected), rtol=0, atol=1e-5)
    assert not torch.allclose(picture(own.outputs[0]), picture(plain), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["flux2", "cogview_4", "z_image", "sd3"])
def test_blocks_of_all_kinds_are_understood(name: str) -> None:
    """Text and picture apart, in one after some blocks, in a list of rows, and text that ends before the picture."""
    pipeline, kwargs = build(name)
    report = run_together(
        pipeline,
        [request(name, index, kwargs, num_inference_steps=6) for index in range(2)],
        caches=[FirstBlockCache(threshold=10, warmup_steps=1, max_skips=1)] * 2,
    )
    for output in report.outputs:
        assert torch.isfinite(picture(output)).all()
    assert min(report.skipped_calls) >= 3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sdxl", "too few transformer blocks in a row (0)"),
        ("kandinsky_5_image", "too few transformer blocks in a row (1)"),
        ("wan_vace", "does more between its blocks"),
        ("flux_controlnet", "FluxControlNetModel does more between its blocks"),
    ],
)
def test_models_that_do_more_than_their_blocks_are_refused(name: str, said: str) -> None:
    pipeline, kwargs = build(name)
    (output,) = run_together(pipeline, [request(name, 0, kwargs)], caches=[FirstBlockCache()]).outputs

    assert isinstance(output, InvalidRequest)
    assert said in str(output)
    assert str(output).endswith("the method taylor takes any model")


def flux_call(site: FirstBlockSite | None = None) -> Call:
    model = build("flux")[0].transformer
    generator = torch.Generator().manual_seed(0)
    call = call_of(
        model,
        hidden_states=torch.randn(1, 4, 4, generator=generator),
        timestep=torch.tensor([0.5]),
        guidance=torch.tensor([3.0]),
        pooled_projections=torch.randn(1, 32, generator=generator),
        encoder_hidden_states=torch.randn(1, 5, 32, generator=generator),
        txt_ids=torch.zeros(5, 3),
        img_ids=torch.zeros(4, 3),
        return_dict=False,
    )
    call.site = FirstBlockSite(1, 100, threshold=0.1, split=Split(model)) if site is None else site
    return call


def forward(calls: Sequence[Call]) -> list[Any]:
    return [call.run(call.args, call.kwargs)[0] for call in calls]


def test_computed_forward_has_the_bits_that_it_has_without_a_cache() -> None:
    call = flux_call()
    (value,), num_skipped = answered([call], [1], forward)

    assert num_skipped == 0
    assert torch.equal(value, forward([call])[0])


def test_model_that_was_compiled_as_a_whole_runs_block_by_block() -> None:
    call = flux_call()

    def compiled(*_args: Any, **_kwargs: Any) -> Any:
        raise AssertionError("its blocks can't be watched")

    call.module._compiled_call_impl = compiled
    (value,), _ = answered([call], [1], forward)

    assert call.module._compiled_call_impl is compiled
    call.module._compiled_call_impl = None
    assert torch.equal(value, forward([call])[0])


def test_forward_that_fails_changes_nothing() -> None:
    call = flux_call()
    assert call.site is not None
    answered([call], [1], forward)
    kept = call.site.residuals

    def failing(calls: Sequence[Call]) -> list[Any]:
        forward(calls)
        raise RuntimeError("out of luck")

    for threshold in (0.1, 0.0):  # skipped or not
        call.site.threshold = threshold
        with pytest.raises(RuntimeError):
            answered([call], [1], failing)
        assert (call.site.num_calls, call.site.num_since, call.site.skips.num) == (1, 0, 0)
        assert call.site.residuals is kept
    assert forward([call])[0].isfinite().all()


def test_change_that_is_not_a_number_is_computed() -> None:
    call = flux_call()
    assert call.site is not None
    answered([call], [1], forward)
    assert call.site.residuals is not None
    call.site.residuals.head.zero_()

    assert answered([call], [1], forward)[1] == 0


def merged(calls: Sequence[Call]) -> list[Any]:
    """One forward of calls with one row each."""
    kwargs = {
        name: value if name.endswith("ids") or name == "return_dict" else torch.cat([c.kwargs[name] for c in calls])
        for name, value in calls[0].kwargs.items()
    }
    return list(calls[0].run((), kwargs)[0].split(1))


def test_request_that_never_ran_alone_can_skip_alone() -> None:
    first = flux_call()
    second = replace(first, site=FirstBlockSite(1, 100, threshold=0.1, split=Split(first.module)))
    (_, computed), num_skipped = answered([first, second], [1, 1], merged)
    assert num_skipped == 0
    (value,), num_skipped = answered([second], [1], merged)
    assert num_skipped == 1
    torch.testing.assert_close(value, computed, rtol=0, atol=1e-5)


def test_weights_of_watched_blocks_are_those_of_the_model() -> None:
    call = flux_call()
    assert call.site is not None
    names = [name for name, _ in call.module.named_parameters()]

    def looking(calls: Sequence[Call]) -> list[Any]:
        assert [name for name, _ in call.module.named_parameters()] == names
        return forward(calls)

    assert answered([call], [1], looking)[1] == 0
    assert answered([call], [1], looking)[1] == 1
