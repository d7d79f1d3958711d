from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from sgld.encoding import VideoCodec, VideoEncoding
from sgld.errors import InvalidRequest
from sgld.fields import FieldError
from sgld.media import videos
from sgld.media.metadata import read_metadata
from sgld.media.videos import check_encoder, crf_of, encoder_options, write_video


def moving_gradient(num_frames: int = 9, height: int = 64, width: int = 96) -> NDArray[np.uint8]:
    """Coloured, smooth, and brighter from frame to frame."""
    index, rows, columns = np.mgrid[0:num_frames, 0:height, 0:width]
    red = rows * 200 // height + index * 5
    green = columns * 200 // width + index * 3
    return np.stack([red, green, 255 - red], axis=-1).astype(np.uint8)


def decode(path: Path) -> NDArray[np.uint8]:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_frames_come_back(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    frames = moving_gradient()
    write_video(path, frames, fps=24)
    got = decode(path)
    assert got.shape == frames.shape
    assert np.abs(got.astype(int) - frames).mean() < 3
    assert list(tmp_path.iterdir()) == [path]


def test_stream_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, moving_gradient(), fps=24)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        # 1 is BT.709 in all three, and limited range.
        assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (1, 1, 1, 1)


def test_index_comes_before_the_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, moving_gradient(), fps=24)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize(("height", "width"), [(63, 95), (64, 95), (63, 96), (1, 1), (33, 64)])
def test_odd_sizes_are_padded_by_the_edge(tmp_path: Path, height: int, width: int) -> None:
    path = tmp_path / "a.mp4"
    frames = moving_gradient(3, height, width)
    write_video(path, frames, fps=8)
    got = decode(path)
    assert got.shape == (3, height + height % 2, width + width % 2, 3)
    assert np.abs(got[:, :height, :width].astype(int) - frames).mean() < 4
    assert np.abs(got[:, -1, :width].astype(int) - frames[:, -1]).mean() < 8


@pytest.mark.parametrize(
    ("fps", "rate"),
    [(24, Fraction(24)), (30000 / 1001, Fraction(30000, 1001)), (12.5, Fraction(25, 2)), (0.5, Fraction(1, 2))],
)
def test_fractional_rates_are_exact(tmp_path: Path, fps: float, rate: Fraction) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, moving_gradient(5), fps=fps)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == rate
        assert stream.duration is not None
        assert stream.time_base is not None
        assert stream.duration * stream.time_base == pytest.approx(5 / rate, rel=1e-3)


def test_single_frame_is_a_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, moving_gradient(1), fps=24)
    assert decode(path).shape[0] == 1


def test_view_with_strides_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    frames = moving_gradient()[::-1, :, ::-1]
    write_video(path, frames, fps=24)
    assert np.abs(decode(path).astype(int) - frames).mean() < 3


def test_quality_makes_files_larger(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    sizes = []
    for quality in (1, 50, 90, 100):
        write_video(tmp_path / "a.mp4", frames, fps=8, quality=quality)
        sizes.append((tmp_path / "a.mp4").stat().st_size)
    assert sizes == sorted(set(sizes))
    assert crf_of(90) == 18


@pytest.mark.parametrize(("codec", "tag"), [("hevc", "hvc1"), ("av1", "av01")])
def test_other_codecs_keep_frames_parameters_and_silence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], codec: VideoCodec, tag: str
) -> None:
    path, frames = tmp_path / "a.mp4", moving_gradient(5, 63, 96)
    sound = np.zeros((2, 8000), np.float32)
    encoding = VideoEncoding(video_codec=codec)
    write_video(path, frames, fps=8, encoding=encoding, metadata={"a": 1}, audio=sound, sample_rate=16_000)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.codec_tag, context.width, context.height) == (tag, 96, 64)
        assert len(container.streams.audio) == 1
    assert np.abs(decode(path)[:, :63].astype(int) - frames).mean() < 3
    assert read_metadata(path) == {"a": 1}
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1"])
def test_a_fragmented_video_holds_the_same_and_only_grows(tmp_path: Path, codec: VideoCodec) -> None:
    path, frames, sound = tmp_path / "a.mp4", moving_gradient(9), np.zeros((1, 8000), np.float32)
    encoding = VideoEncoding(video_codec=codec, video_fragmented=True)
    write_video(path, frames, fps=8, encoding=encoding, metadata={"a": 1}, audio=sound, sample_rate=16_000)
    assert np.abs(decode(path).astype(int) - frames).mean() < 3
    assert read_metadata(path) == {"a": 1}
    content = path.read_bytes()
    assert content.index(b"mvex") < content.index(b"moof") < content.index(b"mdat")
    with av.open(str(path)) as container:
        assert len(container.streams.audio) == 1


def test_the_encoder_is_told_what_was_chosen() -> None:
    assert encoder_options(VideoEncoding(), 90) == ("libx264", {"crf": "18", "preset": "veryfast"})
    chosen = VideoEncoding(video_codec="hevc", video_crf=30, x264_preset="slow")
    assert encoder_options(chosen, 90) == (
        "libx265",
        {"crf": "30", "preset": "slow", "x265-params": "log-level=none"},
    )
    assert encoder_options(VideoEncoding(video_codec="av1"), 90) == ("libsvtav1", {"crf": "22", "preset": "9"})
    with pytest.raises(FieldError, match="h264 has 0 to 51"):
        VideoEncoding(video_crf=52)
    with pytest.raises(FieldError, match="it is for h264 and hevc"):
        VideoEncoding(video_codec="av1", x264_preset="fast")


def test_a_rate_factor_counts_more_than_a_quality(tmp_path: Path) -> None:
    frames, sizes = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8), []
    for crf in (10, 40):
        write_video(tmp_path / "a.mp4", frames, fps=8, quality=50, encoding=VideoEncoding(video_crf=crf))
        sizes.append((tmp_path / "a.mp4").stat().st_size)
    assert sizes[0] > 2 * sizes[1]


def test_an_encoder_that_isnt_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(videos._ENCODERS, "av1", "libnothing")
    with pytest.raises(InvalidRequest, match="no encoder for av1: the PyAV that is installed lacks libnothing"):
        check_encoder("av1")


def test_other_arrays_and_rates_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    for shape, dtype in (((4, 4, 3), np.uint8), ((0, 4, 4, 3), np.uint8), ((1, 4, 4, 3), np.float32)):
        with pytest.raises(ValueError, match=r"\(F, H, W, 3\) of uint8"):
            write_video(path, np.zeros(shape, dtype), fps=8)
    with pytest.raises(ValueError, match="must be positive"):
        write_video(path, moving_gradient(), fps=0)
    assert not list(tmp_path.iterdir())


def test_failed_encoding_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(frame: object, converter: object) -> None:
        raise MemoryError

    monkeypatch.setattr("sgld.media.videos._to_yuv", fail)
    with pytest.raises(MemoryError):
        write_video(tmp_path / "a.mp4", moving_gradient(), fps=8)
    assert not list(tmp_path.iterdir())
