"""The files and the JSON objects that `sgld generate` leaves behind."""

import os
from datetime import datetime
from pathlib import Path
from typing import Any, assert_never

import msgspec

from sgld import __version__
from sgld.config import EngineConfig
from sgld.events import Completed
from sgld.media.animations import MAX_GIF_PIXELS, check_rate, write_animation
from sgld.media.audio import write_audio
from sgld.media.files import (
    Content,
    MediaFormat,
    extension_of,
    file_name,
    format_of,
    media_type_of,
    resolve_output,
    write_atomically,
    write_unique,
)
from sgld.media.hook import hooked, load_hook
from sgld.media.images import check_format, encode_image
from sgld.media.inputs import has_pictures
from sgld.media.videos import check_encoder, write_video
from sgld.request import NO_LIMITS, Limits
from sgld.sampling_params import DEFAULT_FPS, SamplingParams
from sgld_cli.options import UsageError
from sgld_cli.progress import Output
from sgld_cli.settings import Settings, flat
from sgld_cli.sources import ENGINE_METADATA, repeatable

IMAGE_FORMATS = ("png", "jpeg", "webp", "avif")
VIDEO_FORMATS = ("mp4", "gif", "webp")


class Timings(msgspec.Struct, frozen=True):
    """Where the time of an output went, in seconds.

    `queued_s`: until it ran; `elapsed_s`: until its pixels were there, the queue included; `write_s`: encoding and
    writing its files.
    """

    queued_s: float | None
    elapsed_s: float
    write_s: float


class Written(msgspec.Struct, frozen=True):
    """The files of one output, and where they were uploaded to, in the same order."""

    paths: tuple[str, ...] = ()
    frame_paths: tuple[str, ...] = ()
    urls: tuple[str, ...] = ()


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One output, as `--json` prints it."""

    request_id: str
    output_index: int
    prompt: str
    paths: tuple[str, ...]
    frame_paths: tuple[str, ...]
    urls: tuple[str, ...]
    seed: int
    size: str
    num_frames: int
    num_inference_steps: int | None
    postprocessing: tuple[str, ...] = ()
    """What was done to it after the pipeline, and by what."""
    timings: Timings


def result_of(
    params: SamplingParams, completed: Completed, files: Written, num_steps: int | None, timings: Timings
) -> Result:
    """What is said of an output; `num_steps` as its progress said, where the params leave that to the model."""
    num_frames, height, width, _ = completed.frames.shape
    size = f"{width}x{height}"
    if num_frames == 0 and completed.audio is not None and completed.sample_rate:
        size = f"{completed.audio.shape[1] / completed.sample_rate:.1f} s of sound"
    return Result(
        request_id=completed.request_id,
        output_index=completed.output_index,
        prompt=params.prompt,
        paths=files.paths,
        frame_paths=files.frame_paths,
        urls=files.urls,
        seed=completed.seed,
        size=size,
        num_frames=num_frames,
        num_inference_steps=num_steps or params.num_inference_steps,
        postprocessing=completed.postprocessing,
        timings=timings,
    )


class Files:
    """Names and writes the files of a run.

    :raises UsageError: the output folder can't be one.
    :raises FieldError: there is no such hook.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._config = settings.output
        self._folder = _folder(settings.output.output_path)
        self._hook = load_hook(settings.output.storage.output_hook)

    def prepare(self) -> None:
        """Check all that can be checked before there are results, and make the folder.

        :raises UsageError: the folder can't be written to, or the name has the wrong ending.
        :raises InvalidRequest: the name can't be used.
        """
        name = self._config.output_file_name
        if self._config.video.video_codec != "h264":
            check_encoder(self._config.video.video_codec)
        if name is not None:
            self._check_name(name)
        if not self._config.save_output:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"the output folder {self._folder} can't be made: {error.strerror}") from None
        if not os.access(self._folder, os.W_OK | os.X_OK):
            raise UsageError(f"the output folder {self._folder} can't be written to")

    @property
    def limits(self) -> Limits:
        """What the file that is named can take."""
        name = self._config.output_file_name
        return Limits(max_total_pixels=MAX_GIF_PIXELS) if name and format_of(name) == "gif" else NO_LIMITS

    def write(self, output: Output, params: SamplingParams, completed: Completed) -> Written:
        """Encode and write an output; takes long, so call it in a thread.

        :raises OSError: a file can't be written.
        :raises InvalidRequest: the format has no files of this size, or the metadata doesn't fit into it.
        """
        if not self._config.save_output:
            return Written()
        media_format = self._format(completed)
        metadata = self._metadata(params, completed) if self._config.metadata else None
        media_type = media_type_of(media_format)
        contents = [hooked(c, self._hook, media_type) for c in self._contents(media_format, completed, metadata)]
        names = [""] if len(contents) == 1 else [f"-picture-{index}" for index in range(len(contents))]
        paths = [
            self._write(output, completed.seed, media_format, content, name)
            for content, name in zip(contents, names, strict=True)
        ]
        frame_paths = self._write_frames(paths[0], completed) if _is_moving(completed) else ()
        return Written(tuple(map(str, paths)), frame_paths)

    def _check_name(self, name: str) -> None:
        media_format = format_of(name)
        resolve_output(self._folder, name)
        params = self._settings.params[0]
        num_frames = params.num_frames or 1
        if num_frames > 1 and media_format in IMAGE_FORMATS and media_format not in VIDEO_FORMATS:
            raise UsageError(f"{num_frames} frames don't fit into {name}: a video ends in .mp4, .gif or .webp")
        if params.bit_depth == 16 and media_format != "png":
            raise UsageError(f"{name} would have 8 bits for each channel, and bit_depth is 16: a name ends in .png")
        if num_frames > 1 and params.fps and (media_format == "gif" or media_format == "webp"):
            check_rate(media_format, params.fps * params.frame_factor)
        self.limits.check_asked(params, {}, has_pictures=has_pictures(params))
        if media_format == "avif":
            check_format(media_format)

    def _format(self, completed: Completed) -> MediaFormat:
        """The format that the name asks for, if it holds such a result: what comes isn't known before it is there."""
        asked = format_of(self._config.output_file_name) if self._config.output_file_name else None
        if len(completed.frames) == 0:
            return asked if asked in ("wav", "flac") else "wav"
        if _is_moving(completed):
            return asked if asked in VIDEO_FORMATS else "mp4"
        return asked if asked in (*IMAGE_FORMATS, *VIDEO_FORMATS) else "png"

    def _contents(
        self, media_format: MediaFormat, completed: Completed, metadata: dict[str, Any] | None
    ) -> list[Content]:
        """What goes into the files of an output; there are several where it has several pictures."""
        quality, audio, rate = self._config.encoding_quality, completed.audio, completed.sample_rate
        about: dict[str, Any] = {"metadata": metadata, "quality": quality}
        of_video = {**about, "fps": completed.fps or DEFAULT_FPS}
        match media_format:
            case "mp4":
                of_video |= {"encoding": self._config.video, "audio": audio, "sample_rate": rate}
                return [lambda path: write_video(path, completed.frames, **of_video)]
            case "wav" | "flac":
                assert audio is not None, "a result holds frames or sound"
                assert rate is not None, "sound has a rate"
                return [lambda path: write_audio(path, audio, rate, media_format, metadata=metadata)]
            case "gif":
                return [lambda path: write_animation(path, completed.frames, "gif", **of_video)]
            case "webp" if _is_moving(completed):
                return [lambda path: write_animation(path, completed.frames, "webp", **of_video)]
            case "png" | "jpeg" | "webp" | "avif":
                return [encode_image(frame, media_format, **about) for frame in completed.frames]
            case _:
                assert_never(media_format)

    def _write(self, output: Output, seed: int, media_format: MediaFormat, content: Content, suffix: str) -> Path:
        """Write to the given name, in place of a file that is there, or to a new name of our own."""
        if self._config.output_file_name is None:
            name = file_name(output.prompt, seed, media_format, datetime.now())
            path = self._folder / name
            return write_unique(path.with_stem(path.stem + suffix), content)
        path = self._folder / self._config.output_file_name
        if format_of(path.name) != media_format:
            path = path.with_suffix(extension_of(media_format))
        if output.total > 1:
            path = path.with_stem(f"{path.stem}-{output.number - 1}")
        path = path.with_stem(path.stem + suffix)
        write_atomically(path, content)
        return path

    def _write_frames(self, path: Path, completed: Completed) -> tuple[str, ...]:
        if not self._config.return_frames:
            return ()
        paths = [path.with_name(f"{path.stem}-frame-{index:04}.png") for index in range(len(completed.frames))]
        for frame_path, frame in zip(paths, completed.frames, strict=True):
            write_atomically(frame_path, hooked(encode_image(frame, "png"), self._hook, "image/png"))
        return tuple(map(str, paths))

    def _metadata(self, params: SamplingParams, completed: Completed) -> dict[str, Any]:
        """What repeats this output; defaults of the model stay open, so that they are looked up again."""
        engine, default = flat(self._settings.engine), flat(EngineConfig())
        chosen = msgspec.to_builtins(msgspec.structs.replace(params, seed=completed.seed))
        return {
            "version": __version__,
            "model_path": self._settings.engine.model_path,
            **{name: engine[name] for name in ENGINE_METADATA if engine[name] != default[name]},
            **({"postprocessing": completed.postprocessing} if completed.postprocessing else {}),
            "params": {n: value for n, value in chosen.items() if value is not None and n in repeatable()},
        }


def _is_moving(completed: Completed) -> bool:
    return completed.is_video and len(completed.frames) > 1


def _folder(output_path: str) -> Path:
    """The output folder; `~` in a config file, where no shell sees it, is the user's home."""
    try:
        folder = Path(output_path).expanduser()
        folder.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # no such user, links in a circle, a NUL
        raise UsageError(f"the output folder {output_path!r} can't be used: {error}") from None
    return folder
