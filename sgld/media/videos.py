"""Videos: MP4 with H.264 that plays everywhere, or with HEVC or AV1."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from io import RawIOBase
from pathlib import Path
from typing import Any, assert_never

import av
import numpy as np
from av.container import OutputContainer
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from sgld.encoding import MAX_CRF, VideoCodec, VideoEncoding, X264Preset
from sgld.errors import InvalidRequest
from sgld.media.audio import Samples, add_track, check_samples, encode_track
from sgld.media.files import write_atomically
from sgld.media.metadata import mp4_tags

# 81 frames of 832x480 on two cores: 1.2 s; preset medium 1.6 s.
_PRESET: X264Preset = "veryfast"
_ENCODERS: dict[VideoCodec, str] = {"h264": "libx264", "hevc": "libx265", "av1": "libsvtav1"}
# Of SVT-AV1, from 0 (slow) to 13; those above 9 leave artefacts.
_AV1_PRESET = "9"
# Exact for 24000/1001 and its like, and for rates given with three decimals.
_MAX_FPS_DENOMINATOR = 1001
_PLAIN = VideoEncoding()
_FRAGMENTED = "frag_keyframe+empty_moov+default_base_moof"


def write_video(path: Path, frames: NDArray[np.uint8], **about: Any) -> None:
    """Write an MP4 file, atomically; see `video_writer`.

    :raises OSError: the file can't be written; nothing of it is left.
    """
    write_atomically(path, video_writer(frames, **about))


def video_writer(
    frames: NDArray[np.uint8],
    *,
    fps: float,
    quality: int = 90,
    encoding: VideoEncoding = _PLAIN,
    metadata: Mapping[str, Any] | None = None,
    audio: Samples | None = None,
    sample_rate: int | None = None,
) -> Callable[[Path], None]:
    """What writes an MP4 file to a path; its index comes first, so that it plays while it is downloaded.

    With `video_fragmented` each fragment has an index of its own instead, and the file only grows.

    :param frames: (F, H, W, 3), uint8, RGB, or 4 channels, whose alpha is dropped. Codecs at 4:2:0
        need even sizes: the last row and column of odd ones are repeated once.
    :param quality: 1 to 100, see `crf_of`; what `encoding` says counts more.
    :param metadata: the parameters to write into it, see `sgld.media.metadata`.
    :param audio: its sound, (channels, samples) of `sample_rate`, see `sgld.media.audio`.
    :raises ValueError: the frames or the sound have another shape or dtype, or there are none; the rate isn't positive.
    :raises InvalidRequest: there is no such encoder.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] not in (3, 4) or 0 in frames.shape:
        raise ValueError(f"a video is (F, H, W, 3) of uint8 or has 4 channels, got {frames.shape} of {frames.dtype}")
    rate = _rate(fps)
    tags = {} if metadata is None else mp4_tags(metadata)
    sound = None
    if audio is not None:
        check_samples(audio, sample_rate or 0)
        sound = audio, sample_rate or 0
    check_encoder(encoding.video_codec)

    def write(path: Path) -> None:
        with _opened(path, encoding.video_fragmented) as container:
            container.metadata.update(tags)
            _encode(container, frames[..., :3], rate, encoder_options(encoding, quality), sound)

    return write


class GrowingVideo:
    """Encodes frames as they come into an MP4 file whose beginning plays before its end is there.

    A fragmented MP4 of H.264, without sound. A frame's fragment is there when the next frame is.

    :param size: height and width.
    """

    def __init__(self, size: tuple[int, int], *, fps: float, quality: int = 90) -> None:
        self._sink, self._converter = _Sink(), VideoReformatter()
        flags = f"{_FRAGMENTED}+frag_every_frame"
        self._container = av.open(self._sink, "w", format="mp4", options={"movflags": flags})
        # Without zerolatency the encoder keeps dozens of frames back.
        options = {"crf": str(crf_of(quality)), "preset": _PRESET, "tune": "zerolatency"}
        self._stream = self._container.add_stream("libx264", rate=_rate(fps), options=options)
        _describe(self._stream, height=size[0], width=size[1])

    def add(self, frames: NDArray[np.uint8]) -> bytes:
        """Encode frames, (F, H, W, 3 or 4), uint8; what there is of the file since the last call."""
        for frame in frames:
            self._container.mux(self._stream.encode(_to_yuv(frame[..., :3], self._converter)))
        return self._sink.take()

    def close(self) -> bytes:
        """The end of the file."""
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._sink.take()


class _Sink:
    """A file that is read while it is written."""

    def __init__(self) -> None:
        self._content = bytearray()

    def write(self, content: bytes) -> int:
        self._content += content
        return len(content)

    def take(self) -> bytes:
        content = bytes(self._content)
        self._content.clear()
        return content


class _AppendOnly:
    """A file for a muxer that would go back in it if it could."""

    def __init__(self, file: RawIOBase) -> None:
        self.write = file.write


def crf_of(quality: int) -> int:
    """The constant rate factor of x264 for a quality of 1 to 100: 45 (poor) to 15; 90 gives 18, visually lossless."""
    return round(45 - 0.3 * quality)


def encoder_options(encoding: VideoEncoding, quality: int) -> tuple[str, dict[str, str]]:
    """The name of the encoder that is meant, and its options."""
    codec, crf = encoding.video_codec, encoding.video_crf
    options: dict[str, str] = {"preset": encoding.x264_preset or _PRESET}
    match codec:
        case "h264":
            pass
        case "hevc":
            # It tells of itself on stderr.
            options["x265-params"] = "log-level=none"
        case "av1":
            # It tells of itself on stderr, too.
            os.environ.setdefault("SVT_LOG", "1")
            options = {"preset": _AV1_PRESET}
        case _:
            assert_never(codec)
    # The scales of the codecs are stretched to look alike.
    of_quality = round(crf_of(quality) * MAX_CRF[codec] / MAX_CRF["h264"])
    return _ENCODERS[codec], {"crf": str(of_quality if crf is None else crf), **options}


def check_encoder(codec: VideoCodec) -> None:
    """:raises InvalidRequest: this PyAV has no encoder of a codec."""
    try:
        av.codec.Codec(_ENCODERS[codec], "w")
    except av.codec.codec.UnknownCodecError:
        message = f"there is no encoder for {codec}: the PyAV that is installed lacks {_ENCODERS[codec]}; choose h264"
        raise InvalidRequest(message, "video_codec") from None


def _rate(fps: float) -> Fraction:
    rate = Fraction(fps).limit_denominator(_MAX_FPS_DENOMINATOR)
    if rate <= 0:
        raise ValueError(f"the frame rate must be positive, got {fps}")
    return rate


@contextmanager
def _opened(path: Path, is_fragmented: bool) -> Iterator[OutputContainer]:
    if is_fragmented:
        options = {"movflags": _FRAGMENTED}
        with path.open("wb", buffering=0) as file, av.open(_AppendOnly(file), "w", "mp4", options) as container:
            yield container
        return
    # faststart works only as an option of the container (on the stream it does nothing) and with a real path.
    with av.open(str(path), "w", "mp4", {"movflags": "+faststart"}) as container:
        yield container


def _encode(
    container: OutputContainer,
    frames: NDArray[np.uint8],
    rate: Fraction,
    chosen: tuple[str, dict[str, str]],
    sound: tuple[Samples, int] | None,
) -> None:
    encoder, options = chosen
    stream = container.add_stream(encoder, rate=rate, options=options)
    assert isinstance(stream, VideoStream), f"{encoder} makes videos"
    _describe(stream, height=frames.shape[1], width=frames.shape[2])
    if encoder == _ENCODERS["hevc"]:
        # Without it Apple's players take it for something else.
        stream.codec_context.codec_tag = "hvc1"
    if sound is not None:
        # All of it first: it is small, and the muxer puts packets into the order of their times.
        encode_track(container, add_track(container, *sound), *sound)
    converter = VideoReformatter()
    for frame in frames:
        container.mux(stream.encode(_to_yuv(frame, converter)))
    container.mux(stream.encode(None))


def _describe(stream: VideoStream, *, height: int, width: int) -> None:
    """Set the size, and the colours that `_to_yuv` makes: players guess wrongly where they aren't said."""
    stream.height = height + height % 2
    stream.width = width + width % 2
    stream.pix_fmt = "yuv420p"
    stream.codec_context.color_primaries = ColorPrimaries.BT709
    stream.codec_context.color_trc = ColorTrc.BT709
    stream.codec_context.colorspace = Colorspace.ITU709
    stream.codec_context.color_range = ColorRange.MPEG


def _to_yuv(frame: NDArray[np.uint8], converter: VideoReformatter) -> av.VideoFrame:
    """One RGB frame (H, W, 3) as yuv420p of even size, BT.709, limited range.

    :param converter: one for all frames of a video: it has threads, which would be started anew for each.
    """
    height, width, _ = frame.shape
    if height % 2 or width % 2:
        frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return converter.reformat(
        av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"),
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
    )
