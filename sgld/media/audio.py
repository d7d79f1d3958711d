"""Sound: WAV and FLAC files, and the track of a video."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from numpy.typing import NDArray

from sgld.media.files import write_atomically
from sgld.media.metadata import mp4_tags

AudioFormat = Literal["wav", "flac"]
# Both hold 16 bits: what pipelines make has no more to tell.
_CODECS: dict[AudioFormat, str] = {"wav": "pcm_s16le", "flac": "flac"}
_LAYOUTS = {1: "mono", 2: "stereo"}
_CHUNK_SAMPLES = 1 << 16
Samples = NDArray[np.float32]


def write_audio(
    path: Path,
    samples: Samples,
    sample_rate: int,
    audio_format: AudioFormat,
    *,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a sound file, atomically.

    :param samples: (channels, samples), float32 in [-1, 1]; what is louder is cut.
    :param metadata: the parameters to write into it, see `sgld.media.metadata`.
    :raises ValueError: the samples have another shape or dtype, or there are none.
    :raises OSError: the file can't be written; nothing of it is left.
    """
    check_samples(samples, sample_rate)
    tags = {} if metadata is None else mp4_tags(metadata)

    def encode(temporary: Path) -> None:
        with av.open(str(temporary), "w", format=audio_format) as container:
            container.metadata.update(tags)
            stream = container.add_stream(_CODECS[audio_format], rate=sample_rate, layout=_LAYOUTS[len(samples)])
            encode_track(container, stream, samples, sample_rate)

    write_atomically(path, encode)


def add_track(container: Any, samples: Samples, sample_rate: int) -> Any:
    """The stream of an AAC track; all streams are added before the first is encoded."""
    rates = av.Codec("aac", "w").audio_rates or [sample_rate]
    # The codec knows some rates only; the nearest that loses nothing, else the highest.
    rate = min((r for r in rates if r >= sample_rate), default=max(rates))
    return container.add_stream("aac", rate=rate, layout=_LAYOUTS[len(samples)])


def encode_track(container: Any, stream: Any, samples: Samples, sample_rate: int) -> None:
    """Encode sound into a stream of a container, at the stream's own rate and format."""
    codec = stream.codec_context
    frame_size = codec.frame_size or None
    resampler = av.AudioResampler(format=codec.format, layout=codec.layout, rate=codec.rate, frame_size=frame_size)
    for start in range(0, samples.shape[1], _CHUNK_SAMPLES):
        piece = np.ascontiguousarray(samples[:, start : start + _CHUNK_SAMPLES].clip(-1, 1))
        frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=_LAYOUTS[len(samples)])
        frame.sample_rate, frame.pts = sample_rate, start
        for part in resampler.resample(frame):
            container.mux(stream.encode(part))
    for part in resampler.resample(None):
        container.mux(stream.encode(part))
    container.mux(stream.encode(None))


def check_samples(samples: Samples, sample_rate: int) -> None:
    """See that sound can be written.

    :raises ValueError: it can't.
    """
    if samples.dtype != np.float32 or samples.ndim != 2 or len(samples) not in _LAYOUTS or not samples.size:
        raise ValueError(f"sound is (1 or 2 channels, samples) of float32, got {samples.shape} of {samples.dtype}")
    if sample_rate < 1:
        raise ValueError(f"the sample rate must be positive, got {sample_rate}")
