"""How videos are encoded: flags, config keys and fields of requests alike."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from sgld.fields import FieldError, check_fields, option

VideoCodec = Literal["h264", "hevc", "av1"]
X264Preset = Literal[
    "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"
]  # fmt: skip
OutputQuality = Literal["default", "maximum", "high", "medium", "low"]
DEFAULT_QUALITY = 90
_QUALITIES: dict[OutputQuality, int] = {"default": DEFAULT_QUALITY, "maximum": 100, "high": 90, "medium": 75, "low": 50}
MAX_CRF: dict[VideoCodec, int] = {"h264": 51, "hevc": 51, "av1": 63}


def quality_of(quality: int | OutputQuality | None, compression: int | None = None) -> int:
    """1 to 100, also of SGLang's words.

    :param compression: the same, from 0 to 100; it counts more.
    """
    if compression is not None:
        return max(1, compression)
    return quality if isinstance(quality, int) else _QUALITIES[quality or "default"]


class VideoEncoding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the encoder of MP4 files is told; None leaves it to the quality.

    :raises FieldError: a value is out of its range, or the codec has no such setting.
    """

    video_codec: Annotated[
        VideoCodec, option("codec of MP4: h264 plays everywhere, hevc and av1 are smaller and slower")
    ] = "h264"
    video_crf: (
        Annotated[
            int,
            Meta(ge=0, le=63),
            option(
                "constant rate factor of MP4, 0 is the best: to 51 (h264, hevc) or 63 (av1). Default: by the quality"
            ),
        ]
        | None
    ) = None
    x264_preset: Annotated[X264Preset, option("effort of the encoders of h264 and hevc. Default: veryfast")] | None = (
        None
    )

    video_fragmented: Annotated[
        bool,
        option("MP4 in fragments, which only grows while it is written; seeking is slower"),
    ] = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.video_crf is not None and self.video_crf > MAX_CRF[self.video_codec]:
            raise FieldError("video_crf", self.video_crf, f"{self.video_codec} has 0 to {MAX_CRF[self.video_codec]}")
        if self.x264_preset is not None and self.video_codec == "av1":
            raise FieldError("x264_preset", self.x264_preset, "it is for h264 and hevc; av1 has no such setting here")
