import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch as dispatcher
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from pipelines import build

from sgld.models import attention, attention_choice
from sgld.models.attention_choice import (
    LENGTHS,
    Choice,
    Heads,
    fastest,
    head_divisors,
    heads_of,
    native_only,
    settle,
    steer,
)
from sgld.models.flash3 import adopt_wheel
from sgld.models.sharing import NOTHING, Sharing
from sgld.models.tensor_choice import Divided
from sgld.models.tokens import TokenRanks, Tokens
from sgld.parallel import ParallelConfig

HEADS = Heads(2, 8)
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _registry_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_AttentionBackendRegistry, "_backends", dict(_AttentionBackendRegistry._backends))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> str:
    """A kernel whose results are told from others: zeros."""
    _AttentionBackendRegistry._backends[AttentionBackendName.FLASH] = _zeros
    return "flash"


def transformer_of_flux() -> Any:
    return build("flux")[0].transformer


class OneOfTwo(Tokens):
    """A rank that gets of itself what the other one would send: tokens, or heads."""

    def attention(self, query: Any, key: Any, value: Any, mask: Any, compute: Any) -> torch.Tensor:
        num_heads = query.shape[2]
        own = [torch.cat([x[:, :, : (num_heads + 1) // 2]] * 2, dim=1) for x in (query, key, value)]
        result: torch.Tensor = compute(*own, mask)
        return torch.cat([result[:, : query.shape[1]]] * 2, dim=2)[:, :, :num_heads]


def _zeros(query: Any, key: Any, value: Any, scale: Any = None, is_causal: bool = False) -> Any:
    return torch.zeros_like(query)


def is_steered(length: int, heads: Heads = HEADS, **options: Any) -> bool:
    key_length = options.pop("key_length", length)
    query, key = torch.ones(1, length, *heads), torch.ones(1, key_length, *heads)
    result: torch.Tensor = dispatch_attention_fn(query, key, key, **options)
    return not result.any()


def seconds(**gains: tuple[float, ...]) -> dict[str, list[float]]:
    return {"native": [1.0] * len(LENGTHS)} | {name: [1 / gain for gain in own] for name, own in gains.items()}


def test_kernel_is_chosen_from_the_length_on_from_which_it_is_always_faster() -> None:
    choice = fastest(seconds(flash=(1.2, 0.9, 1.1, 1.2, 1.15), slow=(0.5,) * 5))
    assert choice is not None
    assert (choice.backend, choice.min_length) == ("flash", LENGTHS[2])
    assert choice.gain == pytest.approx(1.2)


def test_small_gain_is_not_worth_other_bits() -> None:
    assert fastest(seconds(flash=(1.02,) * 5)) is None
    assert fastest(seconds(flash=(1.5, 1.5, 1.5, 1.5, 1.0))) is None


def test_fastest_of_several_is_chosen() -> None:
    choice = fastest(seconds(flash=(1.1,) * 5, better=(1.0, 1.0, 1.3, 1.3, 1.3)))
    assert choice is not None
    assert choice.backend == "better"


def test_long_plain_attention_among_one_sequence_goes_to_the_chosen_kernel(kernel: str) -> None:
    steer({HEADS: Choice(backend=kernel, min_length=16, gain=1.2)})
    assert is_steered(16)
    assert not is_steered(15)
    assert not is_steered(16, Heads(4, 8))
    assert not is_steered(16, key_length=17)
    assert not is_steered(16, attn_mask=torch.ones(1, 1, 16, 16, dtype=torch.bool))
    assert not is_steered(16, enable_gqa=True)


def test_fewer_heads_have_the_kernel_of_those_that_they_are_part_of(kernel: str) -> None:
    """A rank attends to some of its heads while others come."""
    steer({Heads(8, 8): Choice(backend=kernel, min_length=16, gain=1.2), Heads(4, 8): None})
    assert [num for num in range(1, 10) if is_steered(16, Heads(num, 8))] == [5, 6, 7, 8]
    steer({Heads(8, 8): None, Heads(4, 8): Choice(backend=kernel, min_length=16, gain=1.2)})
    assert [num for num in range(1, 10) if is_steered(16, Heads(num, 8))] == [1, 2, 3, 4]


def test_backend_that_is_asked_for_is_not_overruled(kernel: str) -> None:
    steer({HEADS: Choice(backend=kernel, min_length=1, gain=1.2)})
    assert not is_steered(16, backend=AttentionBackendName._NATIVE_MATH)


def test_exact_requests_never_leave_native(kernel: str) -> None:
    steer({HEADS: Choice(backend=kernel, min_length=1, gain=1.2)})
    with native_only():
        assert not is_steered(16)
    assert is_steered(16)


def test_chosen_kernel_leaves_compiled_code_in_one_piece(kernel: str) -> None:
    """With a branch on the length: two forms for all lengths, and no break."""
    steer({HEADS: Choice(backend=kernel, min_length=16, gain=1.2)})
    num_forms = 0

    def backend(graph: Any, _inputs: Any) -> Any:
        nonlocal num_forms
        num_forms += 1
        return graph.forward

    compiled: Any = torch.compile(dispatch_attention_fn, backend=backend, fullgraph=True, dynamic=True)
    try:
        for length in (9, 10, 11, 20, 21, 22):
            x = torch.ones(2, length, *HEADS)
            assert compiled(x, x, x).any() == (length < 16)
        assert num_forms == 2
    finally:
        torch._dynamo.reset()


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch, kernel: str) -> list[str]:
    """Of two kernels that run there `flash` is faster; what was measured."""
    measured: list[str] = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(attention, "problem_of", lambda name, *_: None if name in (kernel, "_native_cudnn") else "no")
    return measured


def test_what_is_measured_is_said_and_kept_for_the_next_start(on_a_gpu: list[str]) -> None:
    transformer = transformer_of_flux()
    (heads,) = heads_of(transformer)

    def timer(backend: str, of: Heads, length: int, dtype: torch.dtype) -> float:
        assert of == heads
        on_a_gpu.append(backend)
        return 0.5 if backend == "flash" else 1.0

    said = [settle([("transformer", transformer)], CUDA, {}, timer) for _ in range(2)]
    assert said[0] == said[1] == {"transformer": "attention by flash from 1024 positions on, up to 2.00 times as fast"}
    assert set(on_a_gpu) == {"native", "flash", "_native_cudnn"}
    assert len(on_a_gpu) == 3 * len(LENGTHS)


def test_native_stays_where_nothing_is_faster(on_a_gpu: list[str]) -> None:
    before = dict(_AttentionBackendRegistry._backends)
    said = settle([("transformer", transformer_of_flux())], CUDA, {}, lambda *_: 1.0)
    assert said == {"transformer": "attention by native, which is as fast as any here"}
    assert _AttentionBackendRegistry._backends == before


def test_heads_that_ranks_have_are_measured_too(on_a_gpu: list[str]) -> None:
    transformer = transformer_of_flux()
    (whole,) = heads_of(transformer)
    gains = {whole: 2.0, Heads(1, whole.dim): 1.5}
    measured = set()

    def timer(backend: str, of: Heads, length: int, dtype: torch.dtype) -> float:
        measured.add(of)
        is_faster = backend == "flash" and (of == whole or length > LENGTHS[0])
        return 1 / gains[of] if is_faster else 1.0

    said = settle([("transformer", transformer)], CUDA, {"transformer": {1, whole.num}, "vae": {8}}, timer)
    assert measured == set(gains)
    assert said == {"transformer": "attention by flash from 1024 or 2048 positions on, up to 2.00 times as fast"}
    assert is_steered(1024, whole)
    assert not is_steered(1024, Heads(1, whole.dim))
    assert is_steered(2048, Heads(1, whole.dim))


def test_heads_are_divided_by_those_who_exchange_them_and_by_those_with_parts_of_layers() -> None:
    shared = Sharing(denoisers=("transformer",), vaes=("vae",))
    assert head_divisors(shared, ParallelConfig(num_gpus=4)) == {"transformer": {1, 4}, "vae": {1}}
    assert head_divisors(shared, ParallelConfig(enable_cfg_parallel=True))["transformer"] == {1}
    assert head_divisors(shared, ParallelConfig(ulysses_degree=2, ring_degree=2))["transformer"] == {1}
    elastic = Sharing(denoisers=("a", "b"), max_degrees={"a": 4, "b": 1})
    assert head_divisors(elastic, ParallelConfig(num_gpus=8, elastic_sp=True)) == {"a": {1, 2, 4}, "b": {1}}
    parted = Sharing(denoisers=("transformer",), divided=Divided(("transformer",)))
    assert head_divisors(parted, ParallelConfig(tp_size=2, sp_degree=2))["transformer"] == {2, 4}
    assert head_divisors(NOTHING, ParallelConfig()) == {}


def test_heads_that_do_not_divide_are_those_that_they_are_padded_to() -> None:
    assert attention_choice._parts({Heads(10, 64), Heads(20, 64)}, (1, 4)) == {Heads(num, 64) for num in (10, 3, 20, 5)}


def test_kernel_of_some_heads_only_says_of_which() -> None:
    fast = Choice(backend="flash", min_length=1024, gain=1.2)
    heads = [Heads(num, 8) for num in (12, 6, 3, 2)]
    chosen = {heads[0]: fast, heads[2]: fast, heads[3]: Choice(backend="other", min_length=4096, gain=1.5)}
    assert attention_choice._note(heads, chosen) == (
        "attention of 12 or 3 heads by flash from 1024 positions on, up to 1.20 times as fast; "
        "attention of 2 heads by other from 4096 positions on, up to 1.50 times as fast"
    )


@pytest.mark.usefixtures("shares_attention")
def test_attention_that_ranks_share_goes_to_the_kernel_chosen_for_the_heads_of_one(kernel: str) -> None:
    steer({HEADS: Choice(backend=kernel, min_length=16, gain=1.2)})
    tokens = OneOfTwo("Model", TokenRanks(None, None, None, 1, 2, 0))
    shared: Any = {"parallel_config": tokens}
    assert is_steered(8, Heads(3, 8), **shared)
    assert not is_steered(7, Heads(3, 8), **shared)
    assert not is_steered(8, Heads(6, 8), **shared)
    with native_only():
        assert not is_steered(8, Heads(3, 8), **shared)


def settled_at_once(first: Any, second: Any) -> list[dict[str, str]]:
    """What is said by two ranks that begin before the other one has ended; the second one to begin ends first."""
    said: list[dict[str, str]] = []

    def timer(backend: str, of: Heads, length: int, dtype: torch.dtype) -> float:
        if not said:
            said.append(settle([("transformer", transformer_of_flux())], CUDA, {"transformer": {1, 2}}, second))
        return float(first(backend, of, length, dtype))

    said.append(settle([("transformer", transformer_of_flux())], CUDA, {"transformer": {1, 2}}, timer))
    return said


def by_flash(backend: str, *_: Any) -> float:
    return 0.5 if backend == "flash" else 1.0


def by_cudnn(backend: str, *_: Any) -> float:
    return 0.4 if backend == "_native_cudnn" else 1.0


def test_ranks_that_measure_at_once_choose_alike(on_a_gpu: list[str]) -> None:
    one, other = settled_at_once(by_flash, by_cudnn)
    assert one == other
    assert "_native_cudnn" in one["transformer"]


def test_ranks_that_cannot_tell_each_other_choose_alike(
    on_a_gpu: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(attention_choice, "cache_root", lambda: tmp_path / "file")
    one, other = settled_at_once(by_flash, by_cudnn)
    native = "attention by native: ranks can't agree on another kernel, as nothing can be kept"
    assert one == other == {"transformer": native}
    alone = settle([("transformer", transformer_of_flux())], CUDA, {}, by_flash)
    assert "flash" in alone["transformer"]


def test_what_another_process_measured_first_holds(tmp_path: Path) -> None:
    choice, file = Choice(backend="flash", min_length=4096, gain=1.2), tmp_path / "a.json"
    attention_choice._settled(file, {}, {"2x64": choice}, is_alone=True)
    known = attention_choice._settled(file, {}, {"2x64": None, "4x64": None}, is_alone=True)
    assert known == attention_choice._read(file) == {"2x64": choice, "4x64": None}


def test_nothing_is_measured_on_a_cpu() -> None:
    assert settle([("transformer", transformer_of_flux())], torch.device("cpu"), {}) == {}


def test_wheel_of_flash_attention_3_is_found_on_the_gpus_that_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    wheel: Any = ModuleType("fa3_fwd_interface")
    wheel.__spec__ = object()
    wheel.flash_attn_func, wheel.flash_attn_varlen_func = "a", "b"
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", wheel)
    for name in ("_CAN_USE_FLASH_ATTN_3", "flash_attn_3_func", "flash_attn_3_varlen_func"):
        monkeypatch.setattr(dispatcher, name, getattr(dispatcher, name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    adopt_wheel()
    assert not dispatcher._CAN_USE_FLASH_ATTN_3
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    adopt_wheel()
    assert dispatcher._CAN_USE_FLASH_ATTN_3
    assert (dispatcher.flash_attn_3_func, dispatcher.flash_attn_3_varlen_func) == ("a", "b")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_kernels_are_measured_on_the_device() -> None:
    dtype = torch.bfloat16
    times = [attention_choice._seconds(CUDA, "native", Heads(24, 128), length, dtype) for length in (1024, 8192)]
    assert 0 < 8 * times[0] < times[1] < 0.1
