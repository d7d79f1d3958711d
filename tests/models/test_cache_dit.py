"""The cache-dit library: from options and variables to requests that run whole."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from engine.streams import completed, params_of
from pipelines import build
from worker.requests import picture, request

from sgld.config import CacheDitConfig, EngineConfig
from sgld.engine.engine import Engine
from sgld.errors import ModelError
from sgld.models import cache_dit
from sgld.models.backend import ENGINE, Backend
from sgld.models.cache_dit import CacheDit, choose
from sgld.models.describe import describe
from sgld.testing import InlineReplica

library = pytest.importorskip("cache_dit")
WHOLE = Backend(is_whole=True)
FEW = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 2, "residual_diff_threshold": 0.8}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("SGLANG_CACHE_DIT")]:
        monkeypatch.delenv(name)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def chosen(config: str | None = None, **variables: str) -> CacheDit | None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(f"SGLANG_CACHE_DIT_{name}", value)
        return choose(CacheDitConfig(cache_dit_config=config), WHOLE)


def made(config: str | None = None, **variables: str) -> CacheDit:
    cache = chosen(config, **variables)
    assert cache is not None
    return cache


def test_nothing_is_cached_unless_asked() -> None:
    assert chosen() is None
    assert chosen(ENABLED="false", FN="3") is None


def test_variables_have_sglangs_defaults() -> None:
    assert made(ENABLED="true").primary == {
        "Fn_compute_blocks": 1,
        "Bn_compute_blocks": 0,
        "max_warmup_steps": 4,
        "residual_diff_threshold": 0.24,
        "max_continuous_cached_steps": 3,
    }


def test_every_variable_has_its_option() -> None:
    cache = made(ENABLED="1", FN="2", BN="1", WARMUP="5", RDT="0.5", MC="2", TAYLORSEER="yes", TS_ORDER="2")
    assert list(cache.primary.values()) == [2, 1, 5, 0.5, 2, True, 2]
    cache = made(ENABLED="1", DMD="1", DMD_HISTORY="4", DMD_RANK="2", DMD_RIDGE="0.1", DMD_SVD_PRECISION="low")
    assert list(cache.primary.values())[5:] == [True, 4, 2, 0.1, "low"]
    cache = made(ENABLED="1", SECONDARY_FN="3", SECONDARY_RDT="0.1", SECONDARY_TAYLORSEER="1", SECONDARY_TS_ORDER="2")
    assert cache.secondary == {
        "Fn_compute_blocks": 3,
        "residual_diff_threshold": 0.1,
        "enable_taylorseer": True,
        "taylorseer_order": 2,
    }
    cache = made(ENABLED="1", SCM_COMPUTE_BINS="4,2", SCM_CACHE_BINS="1, 3", SCM_POLICY="static")
    assert (cache.bins, cache.primary["steps_computation_policy"]) == (([4, 2], [1, 3]), "static")
    assert made(ENABLED="1", SCM_PRESET="fast").preset == "fast"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"ENABLED": "maybe"}, "SGLANG_CACHE_DIT_ENABLED is 'maybe'; it is true or false"),
        ({"FN": "one"}, "SGLANG_CACHE_DIT_FN is 'one'; it is a number of at least 0"),
        ({"RDT": "nan"}, "SGLANG_CACHE_DIT_RDT is 'nan'"),
        ({"SCM_PRESET": "turbo"}, "one of none, slow, medium, fast, ultra"),
        ({"SCM_POLICY": "loose"}, "dynamic or static"),
        ({"SCM_CACHE_BINS": "1,2"}, "go together"),
        ({"TAYLORSEER": "1", "DMD": "1"}, "exclude each other"),
    ],
)
def test_values_that_make_no_sense_are_refused(variables: dict[str, str], said: str) -> None:
    with pytest.raises(ModelError) as caught:
        chosen(**{"ENABLED": "true"} | variables)
    assert said in str(caught.value)


@pytest.mark.parametrize("form", ["yaml", "json", "inline"])
def test_options_come_from_a_file_or_as_they_are(form: str, tmp_path: Path) -> None:
    texts = {"yaml": "cache_config:\n  Fn_compute_blocks: 4\n", "json": '{"cache_config": {"Fn_compute_blocks": 4}}'}
    path = tmp_path / f"options.{form}"
    path.write_text(texts.get(form, ""))
    cache = made('{"Fn_compute_blocks": 4}' if form == "inline" else str(path))

    assert cache.primary == {"Fn_compute_blocks": 4}
    assert cache.note == "cache-dit, by cache_dit_config: Fn_compute_blocks 4"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("nowhere.yaml", "No such file"),
        ("[1]", "No such file"),
        ('{"cache_config": 3}', "where only cache_config may be"),
        ('{"Fn_compute_block": 1}', "did you mean Fn_compute_blocks?"),
        ('{"cache_config": {}, "parallelism_config": {"ulysses_size": "auto"}}', "one GPU"),
        ('{"cache_config": {}, "quantize_config": {}}', "--quantization"),
        ('{"cache_config": {}, "attention_backend": "sage"}', "--attention-backend"),
        ('{"cache_config": {"steps_computation_mask": "turbo"}}', "one of slow, medium, fast, ultra"),
    ],
)
def test_files_that_make_no_sense_are_refused(config: str, said: str) -> None:
    with pytest.raises(ModelError) as caught:
        chosen(config)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_engine_has_a_step_cache_of_its_own() -> None:
    with pytest.raises(ModelError, match=r"works with --backend diffusers; .* as --cache"):
        choose(CacheDitConfig(cache_dit_config="{}"), ENGINE)


def cached(name: str, cache: CacheDit) -> tuple[Any, dict[str, Any], Any]:
    pipeline, kwargs = build(name)
    return pipeline, kwargs, cache_dit.apply(cache, pipeline)


@pytest.mark.parametrize("name", ["flux", "wan_2_2", "qwen_image"])
def test_each_request_begins_with_an_empty_memory_whatever_its_shape(name: str) -> None:
    plain = picture(build(name)[0](**request(name, 0, build(name)[1], num_inference_steps=8)))
    pipeline, kwargs, refresh = cached(name, CacheDit(FEW, {}))

    def run(**changed: Any) -> torch.Tensor:
        refresh(8)
        return picture(pipeline(**request(name, 0, kwargs | changed, num_inference_steps=8)))

    first = run()
    run(height=2 * kwargs["height"])
    assert torch.equal(run(), first)
    assert not torch.equal(first, plain)


def test_masks_are_made_for_the_number_of_steps() -> None:
    """A static mask skips the steps that it says, however much changes."""
    pipeline, kwargs, refresh = cached("flux", CacheDit(FEW | {"steps_computation_policy": "static"}, {}, "fast"))
    later: list[int] = []
    pipeline.transformer.single_transformer_blocks[-1].register_forward_hook(lambda *_: later.append(1))
    computed = {}
    for num_steps in (8, 12):
        later.clear()
        refresh(num_steps)
        pipeline(**request("flux", 0, kwargs, num_inference_steps=num_steps))
        computed[num_steps] = len(later)

    expected = {num: sum(library.steps_mask(total_steps=num, mask_policy="fast")) for num in computed}
    assert computed == expected


def test_second_denoiser_may_have_other_options() -> None:
    pipeline, *_ = cached("wan_2_2", CacheDit(FEW, {"max_warmup_steps": 3}))
    warmups = [
        part._context_manager.get_context(part._context_names[0]).cache_config.max_warmup_steps
        for part in (pipeline.transformer, pipeline.transformer_2)
    ]
    assert warmups == [2, 3]
    with pytest.raises(ModelError, match="FluxPipeline has none"):
        cached("flux", CacheDit(FEW, {"max_warmup_steps": 3}))


def test_kernels_of_attention_stay_those_of_diffusers() -> None:
    before = dict(_AttentionBackendRegistry._backends)
    cached("qwen_image", CacheDit(FEW, {}))
    assert _AttentionBackendRegistry._backends == before


def test_pipelines_that_cache_dit_does_not_know_are_refused() -> None:
    with pytest.raises(ModelError, match="cache-dit doesn't know the denoiser of StableDiffusionXLPipeline"):
        cached("sdxl", CacheDit(FEW, {}))


async def test_requests_of_the_engine_run_whole_and_cached(wan_folder: Path) -> None:
    config = EngineConfig(
        model_path=str(wan_folder),
        device="cpu",
        num_cpu_threads=1,
        cache_dit=CacheDitConfig(
            cache_dit_config='{"Fn_compute_blocks": 1, "max_warmup_steps": 2, "Bn_compute_blocks": 0,'
            ' "residual_diff_threshold": 0.8}'
        ),
    )
    kwargs = build("wan")[1]
    params = params_of(kwargs, num_inference_steps=8)
    async with Engine(config, rank_factory=InlineReplica(None)) as engine:
        pictures = [(await completed(engine, params)).frames for _ in range(2)]
        await completed(engine, params_of(kwargs | {"height": 2 * kwargs["height"]}))
        model = engine.model
    plainly = EngineConfig(model_path=str(wan_folder), device="cpu", num_cpu_threads=1)
    async with Engine(plainly, rank_factory=InlineReplica(None)) as engine:
        plain = (await completed(engine, params)).frames

    assert model is not None
    assert model.is_whole
    assert "cache_dit_config is for that" in model.decisions["model"]
    assert "cache-dit, by cache_dit_config" in describe(config).decisions["model"]
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] != plain).any()
