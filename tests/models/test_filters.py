"""Filters, found by params and loaded."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sgld.errors import InvalidRequest
from sgld.models import filters, lookup
from sgld.models.filters import FilterSource, Interpolator, Lanczos, Upscaler, load_filter, sources_of
from sgld.models.rife import Rife, RifeSizes
from sgld.models.super_resolution import Compact
from sgld.sampling_params import SamplingParams

CPU = torch.device("cpu")


def source(kind: str, path: Path | str) -> FilterSource:
    return FilterSource(kind, str(path))  # type: ignore[arg-type]


@pytest.fixture
def rife(tmp_path: Path) -> Path:
    state = Rife(RifeSizes((8, 8, 4, 4), 4, 2)).state_dict()
    torch.save({f"module.{name}": weight for name, weight in state.items()}, tmp_path / "flownet.pkl")
    return tmp_path


def test_a_request_names_its_filters_in_their_order() -> None:
    params = SamplingParams(enable_upscaling=True, enable_frame_interpolation=True, upscaling_scale=3)
    assert sources_of(params) == (
        FilterSource("interpolation", ""),
        FilterSource("upscaling", "ai-forever/Real-ESRGAN:RealESRGAN_x4.pth"),
    )
    assert sources_of(SamplingParams(upscaling_model_path="lanczos")) == ()
    repo = SamplingParams(enable_upscaling=True, upscaling_scale=8, upscaling_model_path="ai-forever/Real-ESRGAN")
    assert [source.path for source in sources_of(repo)] == ["ai-forever/Real-ESRGAN:RealESRGAN_x8.pth"]


def test_a_changed_file_is_another_source(rife: Path) -> None:
    params = SamplingParams(enable_frame_interpolation=True, frame_interpolation_model_path=str(rife / "flownet.pkl"))
    before = sources_of(params)
    torch.save({}, rife / "flownet.pkl")
    assert sources_of(params) != before


def test_interpolation_has_rife_where_it_is(rife: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = {}
    for cached in (None, rife / "flownet.pkl"):
        monkeypatch.setattr(filters, "cached", lambda _repo, _name, cached=cached: cached)
        for path in ("", "optical-flow", rife):
            filter_ = load_filter(source("interpolation", path), CPU)
            assert isinstance(filter_, Interpolator)
            labels[cached is not None, str(path)] = filter_.label
    assert labels[False, ""] == labels[True, "optical-flow"] == "optical flow"
    assert labels[True, ""] == labels[False, str(rife)] == "RIFE"


def test_frames_between_have_alpha_too() -> None:
    filter_ = load_filter(source("interpolation", "optical-flow"), CPU)
    assert isinstance(filter_, Interpolator)
    first = torch.full((1, 16, 16, 4), 100, dtype=torch.uint8)
    last = first.clone()
    last[..., 3] = 200
    between = filter_.decode(first, last, 0.25, 1.0)
    assert torch.equal(between[..., :3], first[..., :3])
    assert bool((between[..., 3] == 125).all())


def test_upscaling_has_the_network_of_its_weights_or_none(tmp_path: Path) -> None:
    save_file(Compact(width=4, num_layers=1, scale=2).state_dict(), tmp_path / "net.safetensors")
    upscaler = load_filter(source("upscaling", tmp_path / "net.safetensors"), CPU)
    assert isinstance(upscaler, Upscaler)
    assert (upscaler.label, upscaler.scale, upscaler.training) == ("SRVGG 2x (1 layers)", 2, False)
    lanczos = load_filter(source("upscaling", "lanczos"), CPU)
    assert isinstance(lanczos, Lanczos)
    picture = torch.full((1, 5, 7, 3), 77, dtype=torch.uint8)
    assert torch.equal(lanczos.decode(picture, (15, 21)), torch.full((1, 15, 21, 3), 77, dtype=torch.uint8))


def test_other_weights_need_spandrel(tmp_path: Path) -> None:
    """Where it is, it says that it doesn't know them either."""
    save_file({"layers.0.weight": torch.zeros(2, 2)}, tmp_path / "net.safetensors")
    with pytest.raises(InvalidRequest, match=r"pip install 'sgld\[upscale\]'|spandrel knows no network"):
        load_filter(source("upscaling", tmp_path / "net.safetensors"), CPU)


def test_without_weights_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> Path:
        raise OSError("no network")

    monkeypatch.setattr(lookup, "hub_file", unreachable)
    (default,) = sources_of(SamplingParams(enable_upscaling=True))
    with pytest.raises(InvalidRequest, match=r"RealESRGAN_x4\.pth': no network; name a file of weights, or 'lanczos'"):
        load_filter(default, CPU)


def test_spandrel_runs_what_it_knows(tmp_path: Path) -> None:
    span = pytest.importorskip("spandrel.architectures.SPAN", exc_type=ImportError)
    model = span.SPAN(num_in_ch=3, num_out_ch=3, feature_channels=48, upscale=2)
    save_file(model.state_dict(), tmp_path / "span.safetensors")
    upscaler = load_filter(source("upscaling", tmp_path / "span.safetensors"), CPU)
    assert isinstance(upscaler, Upscaler)
    assert (upscaler.label, upscaler.scale) == ("SPAN 2x", 2)
