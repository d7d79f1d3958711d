"""Tokens on several ranks, which are processes: what all of them return is what one returns."""

import copy
import functools
import shutil
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from pipelines import SHARING, build
from worker.requests import request

from models.ranks import Attending, Given, Group, group
from sgld.models import tokens
from sgld.models.exchange import Messages
from sgld.models.placement import compile_components
from sgld.models.sequence import Sequence
from sgld.models.token_plans import plan_of
from sgld.models.tokens import TokenRanks
from sgld.parallel import ParallelConfig
from sgld.worker.invocation import Invocation
from sgld.worker.trees import leaves, opened

pytestmark = pytest.mark.long
# In float32, relative to the largest value; the largest difference seen is 2e-6.
TOLERANCE = 1e-5
ULYSSES, RING = ParallelConfig(ulysses_degree=2), ParallelConfig(ring_degree=2)
BOTH = ParallelConfig(ulysses_degree=2, ring_degree=2)

ATTENTIONS = pytest.mark.parametrize(
    ("heads", "key_heads", "num", "num_keys", "mask"),
    [
        (4, 4, 8, 8, None),
        (3, 3, 9, 6, (2, 6)),
        (6, 3, 7, 7, (2, 1, 1, 7)),
        (4, 2, 6, 9, (2, 4, 1, 9)),
        (3, 3, 5, 5, (1, 3, 1, 5)),
    ],
    ids=["plain", "other keys", "grouped and uneven", "grouped and a mask for each head", "heads are padded"],
)
IN_PARTS = pytest.mark.parametrize(
    ("rows", "heads", "num", "is_masked"),
    [(1, 8, 6400, False), (1, 3, 9001, False), (1, 8, 9001, False), (2, 4, 6400, True)],
    ids=["halves", "one first, padded and uneven", "one first, and between GPUs one last", "rows with masks"],
)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    with group(2, tmp_path_factory.mktemp("two")) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    with group(4, tmp_path_factory.mktemp("four")) as ranks:
        yield ranks


def denoiser_calls(name: str) -> list[tuple[Any, list[Given], list[Any]]]:
    """The denoisers of a tiny pipeline that can share tokens, their first two calls, and what they return."""
    pipeline, kwargs = build(name)
    denoisers = [part for part in pipeline.components.values() if part is not None and plan_of(type(part)) is not None]
    found = [(part, *recorded(part)) for part in denoisers]
    with torch.no_grad():
        pipeline(**request(name, 0, kwargs))
    for part in denoisers:
        del part.forward
    return found


def recorded(part: Any) -> tuple[list[Given], list[Any]]:
    """Two calls of a component that are still to come, and what they return."""
    calls: list[Given] = []
    results: list[Any] = []
    forward = part.forward

    @functools.wraps(forward)
    def record(*args: Any, **kwargs: Any) -> Any:
        given = copy.deepcopy((args, kwargs))
        result = forward(*args, **kwargs)
        if len(calls) < 2:
            calls.append(Given(Invocation(part, "forward", *given).course, *given))
            results.append(copy.deepcopy(result))
        return result

    part.forward = record
    return calls, results


def check(
    ranks: Group,
    parallel: ParallelConfig,
    component: Any,
    calls: list[Given],
    wanted: list[Any],
    tolerance: float = TOLERANCE,
) -> None:
    assert calls
    for results in ranks.run(component, parallel, calls):
        assert len(results) == len(wanted), results
        for result, want in zip(results, wanted, strict=True):
            assert not isinstance(result, str), result
            got, right = (tensors(x) for x in (result, want))
            assert len(got) == len(right) > 0
            for one, other in zip(got, right, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.abs().max()))


def tensors(result: Any) -> list[torch.Tensor]:
    return [leaf for _, leaf in leaves(opened(result)) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("name", SHARING)
def test_denoisers_return_what_they_return_on_one_rank(two_ranks: Group, name: str) -> None:
    for component, calls, wanted in denoiser_calls(name):
        check(two_ranks, ULYSSES, component, calls, wanted)


@pytest.mark.parametrize("name", ["sd3", "sana", "hunyuan_video", "z_image", "qwen_image_edit_plus", "ltx_2"])
def test_rings_do_too_and_both_together(two_ranks: Group, four_ranks: Group, name: str) -> None:
    for component, calls, wanted in denoiser_calls(name):
        check(two_ranks, RING, component, calls, wanted)
        check(four_ranks, BOTH, component, calls, wanted)


@pytest.mark.gpu
@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="it needs two GPUs")
def test_denoisers_return_on_two_gpus_what_they_return_on_a_cpu(two_gpus: Group) -> None:
    """In float32, whose products GPUs don't round to fewer bits by themselves."""
    for name in SHARING:
        for component, calls, wanted in denoiser_calls(name):
            check(two_gpus, ULYSSES, component, calls, wanted, tolerance=1e-3)
            check(two_gpus, RING, component, calls, wanted, tolerance=1e-3)


@ATTENTIONS
@pytest.mark.gpu
@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="it needs two GPUs")
def test_attention_on_two_gpus_is_among_all_tokens(
    two_gpus: Group, heads: int, key_heads: int, num: int, num_keys: int, mask: tuple[int, ...] | None
) -> None:
    calls, wanted = called(Attending(), **attending(heads, key_heads, num, num_keys, mask))
    check(two_gpus, ULYSSES, Attending(), calls, wanted, tolerance=1e-3)


@IN_PARTS
@pytest.mark.gpu
@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="it needs two GPUs")
def test_heads_in_parts_on_two_gpus_are_those_of_one(
    two_gpus: Group, rows: int, heads: int, num: int, is_masked: bool
) -> None:
    """Again and again, so that nobody writes over what another one still reads."""
    calls, wanted = called(Attending(), **attending_in_parts(rows, heads, num, is_masked))
    check(two_gpus, ULYSSES, Attending(), 9 * calls, 9 * wanted, tolerance=1e-3)


@pytest.fixture(scope="module")
def two_gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    with group(2, tmp_path_factory.mktemp("gpus"), "cuda") as ranks:
        yield ranks


def called(component: Any, **kwargs: Any) -> tuple[list[Given], list[Any]]:
    """Two calls that are alike, and what they return."""
    with torch.no_grad():
        result = component(**copy.deepcopy(kwargs))
    return [Given("alike", (), kwargs)] * 2, [result] * 2


def test_layers_that_are_skipped_and_residuals_of_others_are_as_on_one_rank(two_ranks: Group) -> None:
    """Of Stable Diffusion 3.5, some layers look at the picture twice."""
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
        num_attention_heads=3, joint_attention_dim=16, caption_projection_dim=24, pooled_projection_dim=16,
        dual_attention_layers=(0, 1), qk_norm="rms_norm", pos_embed_max_size=8,
    ).eval()  # fmt: skip
    calls, wanted = called(
        model,
        hidden_states=torch.randn(2, 4, 5, 5),
        encoder_hidden_states=torch.randn(2, 7, 16),
        pooled_projections=torch.randn(2, 16),
        timestep=torch.tensor([3.0, 3.0]),
        block_controlnet_hidden_states=[torch.randn(2, 25, 24)],
        skip_layers=[0],
        return_dict=False,
    )
    check(two_ranks, ULYSSES, model, calls, wanted)


def test_first_frame_that_is_given_is_as_on_one_rank(two_ranks: Group) -> None:
    """HunyuanVideo changes tokens of the first frame in another way; all of them are of the first rank."""
    torch.manual_seed(0)
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=False, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4), image_condition_type="token_replace",
    ).eval()  # fmt: skip
    calls, wanted = called(
        model,
        hidden_states=torch.randn(1, 4, 3, 3, 3),
        timestep=torch.tensor([3]),
        encoder_hidden_states=torch.randn(1, 5, 16),
        encoder_attention_mask=torch.tensor([[1, 1, 1, 0, 0]]),
        pooled_projections=torch.randn(1, 8),
        return_dict=False,
    )
    check(two_ranks, ULYSSES, model, calls, wanted)


def test_rows_of_tokens_stay_together_where_convolutions_see_their_neighbours(two_ranks: Group) -> None:
    """Sana has linear attention, and five rows here."""
    torch.manual_seed(0)
    model = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8,
    ).eval()  # fmt: skip
    calls, wanted = called(
        model,
        hidden_states=torch.randn(2, 4, 5, 3),
        encoder_hidden_states=torch.randn(2, 3, 8),
        encoder_attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1]]),
        timestep=torch.tensor([3.0, 3.0]),
        return_dict=False,
    )
    check(two_ranks, ULYSSES, model, calls, wanted)


@ATTENTIONS
@pytest.mark.parametrize("parallel", [ULYSSES, RING, BOTH], ids=["ulysses", "ring", "both"])
def test_attention_is_among_all_tokens(
    two_ranks: Group,
    four_ranks: Group,
    parallel: ParallelConfig,
    heads: int,
    key_heads: int,
    num: int,
    num_keys: int,
    mask: tuple[int, ...] | None,
) -> None:
    calls, wanted = called(Attending(), **attending(heads, key_heads, num, num_keys, mask))
    check(two_ranks if parallel.sp == 2 else four_ranks, parallel, Attending(), calls, wanted)


def attending(heads: int, key_heads: int, num: int, num_keys: int, mask: tuple[int, ...] | None) -> dict[str, Any]:
    torch.manual_seed(0)
    query, key = torch.randn(2, num, heads, 8), torch.randn(2, num_keys, key_heads, 8)
    inputs = {"query": query, "key": key, "value": torch.randn_like(key)}
    return inputs if mask is None else inputs | {"mask": torch.randn(mask) > -0.5}


@IN_PARTS
def test_heads_that_are_attended_to_in_parts_are_those_of_one_rank(
    two_ranks: Group, rows: int, heads: int, num: int, is_masked: bool
) -> None:
    assert len(Messages("two", 0, 2).parts(-(-heads // 2), rows, num)) == 2
    calls, wanted = called(Attending(), **attending_in_parts(rows, heads, num, is_masked))
    check(two_ranks, ULYSSES, Attending(), calls, wanted)


def attending_in_parts(rows: int, heads: int, num: int, is_masked: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    inputs = {name: torch.randn(rows, num, heads, 4) for name in ("query", "key", "value")}
    return inputs | {"mask": torch.randn(rows, num) > -0.5} if is_masked else inputs


def test_too_few_tokens_are_refused_by_name_and_nothing_hangs(two_ranks: Group) -> None:
    few = {name: torch.randn(1, 1, 2, 8) for name in ("query", "key", "value")}
    for results in two_ranks.run(Attending(), ULYSSES, [Given("few", (), few)]):
        assert results == ["ValueError: Attending has a sequence of 1 tokens, which sp_degree 2 can't share"]


@pytest.mark.parametrize("shape", [(1, 1, 4), (1, 3, 1)], ids=["for each query", "for other heads"])
def test_mask_that_is_not_of_keys_is_refused(two_ranks: Group, shape: tuple[int, ...]) -> None:
    inputs = {name: torch.randn(1, 4, 2, 8) for name in ("query", "key", "value")}
    calls = [Given("masked", (), inputs | {"mask": torch.ones(*shape, 4, dtype=torch.bool)})]
    for results in two_ranks.run(Attending(), ULYSSES, calls):
        assert results == [f"ValueError: Attending has a mask of {(*shape, 2)}, which can't be shared by its tokens"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++, which isn't here")
def test_tokens_that_are_no_multiple_can_be_compiled(one_of_four: TokenRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "gathered_sizes", lambda num, *_: [num, num, num, num - 1])
    pipeline, _ = build("wan")
    model = pipeline.transformer
    latents, text = torch.randn(1, model.config.in_channels, 3, 6, 6), torch.randn(1, 4, model.config.text_dim)
    forward = functools.partial(model, latents, torch.tensor([5]), text, return_dict=False)
    sequence = Sequence(model, one_of_four)
    compile_components({"transformer": model})
    with torch.no_grad():
        [result] = sequence.run("a course", forward)
    assert result.shape == latents.shape


def test_ranks_that_a_forward_names_share_no_other_one() -> None:
    pipeline, _ = build("wan")
    sequence = Sequence(pipeline.transformer, TokenRanks.alone())
    shares = pipeline.transformer._parallel_config

    def forward() -> int:
        return int(shares.ranks.num)

    def fails() -> None:
        raise ValueError("the model's own")

    two = TokenRanks(None, None, None, 1, 2, 0)
    assert sequence.run("a course", forward, two) == 2
    assert shares.ranks.num == 1
    with pytest.raises(ValueError, match="own"):
        sequence.run("a course", fails, two)
    assert shares.ranks.num == 1
