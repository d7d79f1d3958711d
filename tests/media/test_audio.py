from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from sgld.media.audio import AudioFormat, write_audio
from sgld.media.metadata import read_metadata
from sgld.media.videos import write_video

RATE = 24_000


def tone(num_channels: int = 2, seconds: float = 1.0, rate: int = RATE) -> NDArray[np.float32]:
    """A tone of 440 Hz, at half of the volume in the second channel."""
    times = np.arange(int(seconds * rate)) / rate
    wave = 0.8 * np.sin(2 * np.pi * 440 * times)
    return np.stack([wave, wave / 2][:num_channels]).astype(np.float32)


def heard(path: Path) -> tuple[NDArray[np.float32], int, str]:
    """Samples, (channels, samples), rate and codec of a file."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        resampler = av.AudioResampler(format="fltp")
        frames = [part for frame in container.decode(stream) for part in resampler.resample(frame)]
        return np.concatenate([f.to_ndarray() for f in frames], axis=1), stream.rate, stream.codec_context.name


@pytest.mark.parametrize(("audio_format", "codec"), [("wav", "pcm_s16le"), ("flac", "flac")])
@pytest.mark.parametrize("num_channels", [1, 2])
def test_sound_comes_back(tmp_path: Path, audio_format: AudioFormat, codec: str, num_channels: int) -> None:
    path = tmp_path / f"a.{audio_format}"
    samples = tone(num_channels, seconds=3.1)
    write_audio(path, samples, RATE, audio_format, metadata={"params": {"seed": 3}})
    got, rate, name = heard(path)
    assert (rate, name, got.shape) == (RATE, codec, samples.shape)
    assert np.abs(got - samples).max() <= 1 / 32767
    assert read_metadata(path) == {"params": {"seed": 3}}
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_too_loud_is_cut(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.wav", 5 * tone(1), RATE, "wav")
    got, _, _ = heard(tmp_path / "a.wav")
    assert got.max() == pytest.approx(1, abs=1e-3)
    assert got.min() == pytest.approx(-1, abs=1e-3)


@pytest.mark.parametrize(
    ("samples", "rate"),
    [
        (tone()[0], RATE),
        (tone().astype(np.float64), RATE),
        (tone().repeat(2, 0), RATE),
        (tone()[:, :0], RATE),
        (tone(), 0),
    ],
)
def test_other_sound_is_refused(tmp_path: Path, samples: NDArray[np.float32], rate: int) -> None:
    with pytest.raises(ValueError, match=r"sound is|sample rate must be"):
        write_audio(tmp_path / "a.wav", samples, rate, "wav")
    with pytest.raises(ValueError, match=r"sound is|sample rate must be"):
        write_video(tmp_path / "a.mp4", np.zeros((2, 16, 16, 3), np.uint8), fps=8, audio=samples, sample_rate=rate)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("rate", "written"), [(24_000, 24_000), (16_000, 16_000), (20_000, 22_050), (192_000, 96_000)])
@pytest.mark.parametrize("num_channels", [1, 2])
def test_video_has_its_sound(tmp_path: Path, rate: int, written: int, num_channels: int) -> None:
    path = tmp_path / "a.mp4"
    samples = tone(num_channels, 2.0, rate)
    frames = np.zeros((16, 32, 48, 3), np.uint8)
    write_video(path, frames, fps=8, audio=samples, sample_rate=rate, metadata={"params": {}})
    got, got_rate, codec = heard(path)
    assert (got_rate, codec, len(got)) == (written, "aac", num_channels)
    assert got.shape[1] / got_rate == pytest.approx(2.0, abs=0.1)
    assert np.sqrt((got[0] ** 2).mean()) == pytest.approx(0.8 / np.sqrt(2), rel=0.1)
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 16
    assert read_metadata(path) == {"params": {}}
