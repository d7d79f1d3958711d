import os
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import av
import msgspec
import numpy as np
import pytest
from PIL import Image

from sgld.config import EngineConfig
from sgld.media.images import encode_image
from sgld.media.metadata import read_metadata
from sgld_cli.generate import Job
from sgld_cli.progress import Lines
from sgld_cli.results import Files
from sgld_cli.settings import accept, build, merge

from .conftest import Engines, FakeEngine, Sgld

# `sgld` in a process of its own, with a fake engine.
SCRIPT = (
    "import sys; from cli.conftest import FakeEngine; from sgld_cli.main import main; "
    "sys.exit(main(sys.argv[1:], engine_class=FakeEngine))"
)
_PATHS = (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", ""))
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, _PATHS))}


def pixel(path: str | Path) -> int:
    """The first pixel, which the fake engine paints with the seed."""
    with Image.open(path) as image:
        return int(np.asarray(image).flat[0])


def test_picture_is_written_and_its_path_is_the_only_result(sgld: Sgld) -> None:
    done = sgld("generate", "--prompt", "a cat", "--seed", "7")
    assert done.code == 0
    (path,) = done.out
    assert path.startswith("outputs/a_cat_")
    assert path.endswith(".png")
    assert pixel(path) == 7
    assert "a cat: seed 7, 24x16, 4 steps, 0.5 s" in done.err


def test_several_prompts_and_outputs_are_numbered(sgld: Sgld, engines: Engines) -> None:
    done = sgld(
        "generate", "--prompt", "a", "b", "--num-outputs-per-prompt", "2", "--output-path", "out",
        "--output-file-name", "x.png",
    )  # fmt: skip
    assert done.code == 0
    assert sorted(done.out) == [f"out/x-{number}.png" for number in range(4)]
    assert [pixel(path) for path in sorted(done.out)] == [42, 43, 42, 43]
    assert [params.prompt for params in engines.made[0].params] == ["a", "b"]


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        ("png", "PNG"),
        ("jpg", "JPEG"),
        ("jpeg", "JPEG"),
        ("webp", "WEBP"),
        ("avif", "AVIF"),
        ("gif", "GIF"),
        ("PNG", "PNG"),
    ],
)
def test_ending_of_the_name_chooses_the_format(ending: str, kind: str, sgld: Sgld) -> None:
    (path,) = sgld("generate", "--prompt", "a", "--output-file-name", f"sub/x.{ending}").out
    with Image.open(path) as image:
        assert image.format == kind
    assert read_metadata(Path(path))["params"]["prompt"] == "a"


def test_video_and_its_frames(sgld: Sgld, engines: Engines) -> None:
    done = sgld("generate", "--prompt", "a", "--num-frames", "3", "--return-frames", "--output-file-name", "v.mp4")
    assert done.out == ["outputs/v.mp4", *(f"outputs/v-frame-{index:04}.png" for index in range(3))]
    assert all(Path(path).stat().st_size for path in done.out)
    assert engines.made[0].config.model_path == "sgld/tiny-video"
    assert read_metadata(Path("outputs/v.mp4"))["params"]["num_frames"] == 3


@pytest.mark.parametrize("ending", ["mp4", "gif", "webp"])
def test_short_videos_may_be_animated_pictures(ending: str, sgld: Sgld) -> None:
    done = sgld("generate", "--prompt", "a", "--num-frames", "3", "--fps", "8", "--output-file-name", f"v.{ending}")
    assert done.out == [f"outputs/v.{ending}"]
    sgld("generate", "--from", done.out[0], "--seed", "7", "--output-file-name", f"again.{ending}")
    params = read_metadata(Path(f"outputs/again.{ending}"))["params"]
    assert (params["num_frames"], params["fps"], params["seed"]) == (3, 8, 7)


def test_what_a_file_can_not_hold_is_refused_before_it_is_made(sgld: Sgld, engines: Engines) -> None:
    size = ("--width", "2048", "--height", "2048")
    film = ("generate", "--prompt", "a", "--output-file-name", "v.gif", "--num-frames")
    assert "such a file has at most 256 of them" in sgld(*film, "400", *size).err[0]
    assert engines.made == []
    sgld(*film, "3")
    assert engines.made[0].limits.max_total_pixels == 2**30


def test_the_encoder_of_videos_can_be_chosen(sgld: Sgld) -> None:
    encoder = ("--video-codec", "hevc", "--video-crf", "40", "--x264-preset", "fast", "--output-quality", "high")
    done = sgld("generate", "--prompt", "a", "--num-frames", "3", "--output-file-name", "v.mp4", *encoder)
    with av.open(done.out[0]) as container:
        assert container.streams.video[0].codec_context.name == "hevc"


@pytest.mark.parametrize(
    ("flags", "quality"),
    [((), 90), (("--output-quality", "low"), 50), (("--output-quality", "low", "--output-compression", "0"), 1)],
)
def test_quality_has_a_number_or_a_word(flags: tuple[str, ...], quality: int, sgld: Sgld) -> None:
    done = sgld("generate", "--prompt", "a", "--output-file-name", "x.jpg", "--no-metadata", *flags)
    expected = encode_image(np.full((16, 24, 3), 42, np.uint8), "jpeg", quality=quality)
    assert Path(done.out[0]).read_bytes() == expected


def test_video_has_its_sound(sgld: Sgld) -> None:
    (path,) = sgld("generate", "--prompt", "film", "--num-frames", "12").out
    with av.open(path) as container:
        assert container.streams.audio[0].rate == 24_000


@pytest.mark.parametrize(("name", "written"), [("x.flac", "x.flac"), ("x.png", "x.wav"), ("x.wav", "x.wav")])
def test_sound_is_a_file_of_its_own(name: str, written: str, sgld: Sgld) -> None:
    done = sgld("generate", "--prompt", "sound", "--output-file-name", name)
    assert done.out == [f"outputs/{written}"]
    assert "sound: seed 42, 0.5 s of sound, 4 steps, 0.5 s" in done.err
    assert read_metadata(Path(done.out[0]))["params"]["prompt"] == "sound"


def test_layers_are_pictures_of_their_own(sgld: Sgld) -> None:
    done = sgld("generate", "--prompt", "layers 2", "--output-file-name", "x.png")
    assert done.out == ["outputs/x-picture-0.png", "outputs/x-picture-1.png"]
    assert [pixel(path) for path in done.out] == [42, 42]


def test_nothing_is_written_without_save_output(sgld: Sgld, tmp_path: Path) -> None:
    done = sgld("generate", "--prompt", "a", "--no-save-output")
    assert (done.code, done.out) == (0, [])
    assert "a: seed 42, 24x16, 4 steps, 0.5 s" in done.err
    assert not list(tmp_path.iterdir())


def test_metadata_repeats_the_output(sgld: Sgld, engines: Engines) -> None:
    (first,) = sgld(
        "generate", "--model-path", "m", "--prompt", "a: b", "--height", "32", "--seed", "9", "--precision", "bf16",
        "--diffusers-kwargs", '{"eta": 1}',
    ).out  # fmt: skip
    (second,) = sgld("generate", "--from", first).out
    assert first != second
    before, after = engines.made
    assert after.params == before.params
    assert after.config == before.config
    assert Path(first).read_bytes() == Path(second).read_bytes()


def test_what_the_engine_made_of_weights_is_repeated_and_values_that_are_zero(sgld: Sgld, engines: Engines) -> None:
    (path,) = sgld(
        "generate", "--prompt", "a", "--quantization", "int8", "--quantization-ignored-layers", "proj_out",
        "--transformer-weights-path", "w", "--boundary-ratio", "0", "--embedded-cfg-scale", "0", "--vae-path", "v",
    ).out  # fmt: skip
    sgld("generate", "--from", path)
    before, after = engines.made
    assert after.config == before.config


def test_when_an_output_was_wanted_is_not_repeated(sgld: Sgld, engines: Engines) -> None:
    (path,) = sgld("generate", "--prompt", "a", "--priority", "7", "--deadline-s", "60", "--exact").out
    assert {"priority", "deadline_s"}.isdisjoint(read_metadata(Path(path))["params"])
    sgld("generate", "--from", path)
    (before,), (after,) = (engine.params for engine in engines.made)
    assert (before.priority, before.deadline_s, before.exact) == (7, 60.0, True)
    assert (after.priority, after.deadline_s, after.exact) == (0, None, True)


def test_one_of_several_outputs_is_repeated_with_its_own_seed_and_flags_override(sgld: Sgld, engines: Engines) -> None:
    paths = sgld("generate", "--prompt", "a", "--num-outputs-per-prompt", "3", "--output-file-name", "x.png").out
    sgld("generate", "--from", sorted(paths)[2], "--prompt", "b")
    (params,) = engines.made[1].params
    assert (params.prompt, params.seed, params.num_outputs_per_prompt) == ("b", 44, 1)


def test_metadata_can_be_left_out(sgld: Sgld) -> None:
    (path,) = sgld("generate", "--prompt", "a", "--no-metadata").out
    assert sgld("generate", "--from", path).code == 2
    with Image.open(path) as image:
        assert not image.info


def test_json_has_one_object_per_output(sgld: Sgld) -> None:
    done = sgld("generate", "--prompt", "a", "--num-outputs-per-prompt", "2", "--json", "--num-inference-steps", "3")
    first, second = (msgspec.json.decode(line) for line in sorted(done.out))
    assert (first["request_id"], first["seed"], second["seed"]) == ("request-1", 42, 43)
    assert (first["prompt"], first["size"], first["num_inference_steps"]) == ("a", "24x16", 3)
    assert Path(first["paths"][0]).is_file()
    assert first["timings"].keys() == {"queued_s", "elapsed_s", "write_s"}


def test_failure_of_one_prompt_leaves_the_others(sgld: Sgld) -> None:
    done = sgld("generate", "--prompt", "fail out_of_memory", "b", "refuse queue_full", "--output-file-name", "x.png")
    assert done.code == 1
    assert done.out == ["outputs/x-1.png"]
    assert "sgld: error: [1/3] fail out_of_memory: it broke" in done.err
    assert "sgld: error: [3/3] refuse queue_full: it was refused" in done.err


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ("fail pipeline_failed", 1),
        ("fail invalid_request", 2),
        ("refuse invalid_request", 2),
        ("refuse model_error", 2),
        ("refuse model_lost", 1),
        ("refuse queue_full", 1),
    ],
)
def test_exit_code_says_whose_fault_it_is(prompt: str, code: int, sgld: Sgld) -> None:
    assert sgld("generate", "--prompt", prompt).code == code


def test_failed_generation_outweighs_bad_input(sgld: Sgld) -> None:
    assert sgld("generate", "--prompt", "refuse invalid_request", "fail rank_lost", "c").code == 1


def test_error_of_the_model_is_said_once(sgld: Sgld) -> None:
    done = sgld("generate", "--prompt", "refuse model_error", "refuse model_error")
    assert done.err == ["sgld: error: it was refused"]


def test_model_that_is_missing_is_bad_input(sgld: Sgld) -> None:
    done = sgld("generate", "--model-path", "missing", "--prompt", "a")
    assert (done.code, done.err) == (2, ["sgld: error: There is no model 'missing'."])


def test_file_that_cannot_be_written_fails_one_output(sgld: Sgld, tmp_path: Path) -> None:
    (tmp_path / "outputs" / "x-0.png").mkdir(parents=True)
    done = sgld("generate", "--prompt", "a", "b", "--output-file-name", "x.png")
    assert done.code == 1
    assert done.out == ["outputs/x-1.png"]
    assert any(line.startswith("sgld: error: [1/2] a: the output can't be written") for line in done.err)


@pytest.mark.parametrize("prompt", ["rate inf", "rate 1e12", "rate nan", "wide 16400"])
def test_video_that_cannot_be_encoded_fails_one_output(prompt: str, sgld: Sgld) -> None:
    # 16400: H.264 is at most 16384 wide.
    done = sgld("generate", "--prompt", "a", prompt, "b", "--num-frames", "2", "--output-file-name", "x.mp4")
    assert (done.code, sorted(done.out)) == (1, ["outputs/x-0.mp4", "outputs/x-2.mp4"])
    assert any(line.startswith(f"sgld: error: [2/3] {prompt}: the output can't be written") for line in done.err)
    assert sorted(path.name for path in Path("outputs").iterdir()) == ["x-0.mp4", "x-2.mp4"]


def test_output_folder_in_the_home_of_the_user(sgld: Sgld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "c.yaml").write_text("output_path: ~/x")
    done = sgld("generate", "--config", "c.yaml", "--prompt", "a", "--output-file-name", "y.png")
    assert done.out == [str(tmp_path / "home" / "x" / "y.png")]


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ((), "there is no prompt"),
        (("--prompt", "a", "--height", "0"), "--height is '0'"),
        (("--prompt", "a", "--seed", "-1"), "--seed is '-1'"),
        (("--prompt", "a", "--prompt-paths", "x"), "--prompt-paths is unknown; did you mean --prompt-path?"),
        (("--prompt", "a", "--num-gpus", "2", "--sp-size", "4"), "num_gpus is 2: it must be dp x cfg x sp x tp"),
        (("--prompt", "a", "--vae-path"), "--vae-path needs a folder or a hub id"),
        (("--prompt", "a", "--vae-path", "x", "--vae-path=y"), "--vae-path is given twice"),
        (("--prompt", "a", "--vae-weights-path", "x"), "--vae-weights-path is unknown"),
        (("--prompt", "a", "--perf-dump-path", "x"), "--perf-dump-path isn't supported yet"),
        (("--prompt", "a", "--output-file-name", "x.bmp"), "'x.bmp'"),
        (("--prompt", "a", "--output-file-name", "../x.png"), "'../x.png'"),
        (("--prompt", "a", "--output-file-name", "x.png", "--num-frames", "2"), "a video ends in .mp4, .gif or .webp"),
        (("--prompt", "a", "--output-file-name", "x.jpg", "--bit-depth", "16"), "a name ends in .png"),
        (("--prompt", "a", "--enable-upscaling", "--bit-depth", "16"), "interpolated or enlarged have 8 bits"),
        (("--prompt", "a", "--num-frames", "2", "--bit-depth", "16"), "frames of videos have 8 bits"),
        (("--prompt", "a", "--video-crf", "52"), "video_crf is 52: h264 has 0 to 51"),
        (("--prompt", "a", "--output-quality", "good"), "--output-quality is 'good'"),
        (("--prompt", "a", "--image-path", "none.png"), "none.png"),
        (("--prompt-path", "none.txt"), "none.txt can't be read: No such file or directory"),
        (("--config", "none.yaml"), "none.yaml can't be read"),
        (("--from", "none.png"), "none.png"),
        (("--prompt", "a", "--output-path", "/dev/null/x"), "the output folder /dev/null/x can't be made"),
        (("--prompt", "a", "--output-path", "a\0b"), "can't be used: embedded null byte"),
        (("--prompt", "a", "--output-path", "a\0b", "--output-file-name", "x.png"), "can't be used"),
        (("--prompt", "a", "--output-path", "~there is no such user/x"), "can't be used"),
        (("--prompt", "a", "--fps", "inf"), "--fps is 'inf': Expected float <= 1000"),
        (("--prompt", "a", "--fps", "0.01"), "--fps is '0.01': Expected float >= 0.1"),
        (("--prompt", "a", "--diffusers-kwargs", '{"a":' * 5000), "nested too deeply"),
        (("--prompt", "a", "--save-output", "maybe"), "--save-output is 'maybe'"),
        (("--prompt",), "argument --prompt: expected at least one argument"),
    ],
)
def test_bad_input_is_one_line_before_any_engine_is_made(
    argv: tuple[str, ...], problem: str, sgld: Sgld, engines: Engines
) -> None:
    done = sgld("generate", *argv)
    assert (done.code, done.out, engines.made) == (2, [], [])
    (line,) = done.err
    assert line.startswith("sgld: error: ")
    assert problem in line


def test_config_file_and_flags(sgld: Sgld, engines: Engines, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"model_path": "m", "prompt": "a", "seed": 3, "diffusers_kwargs": {"eta": 1}}')
    assert sgld("generate", "--config", "c.json", "--seed", "4", "--port", "1").code == 0
    (engine,) = engines.made
    (params,) = engine.params
    assert (engine.config.model_path, params.seed, params.diffusers_kwargs) == ("m", 4, {"eta": 1})


def test_print_config_shows_sources_and_makes_no_engine(sgld: Sgld, engines: Engines, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("fps: 8")
    assert sgld("generate", "--print-config").code == 0
    done = sgld("generate", "--config", "c.yaml", "--prompt", "a", "--print_config")
    assert (done.code, done.err, engines.made) == (0, [], [])
    assert {'prompt: ["a"]  # flag', "fps: 8.0  # c.yaml", "seed: 42  # default"} <= set(done.out)
    assert not (tmp_path / "outputs").exists()


def test_more_prompts_than_the_queue_holds_wait_for_their_turn(sgld: Sgld) -> None:
    prompts = [f"prompt {number}" for number in range(9)]
    done = sgld("generate", "--max-queued-requests", "2", "--no-save-output", "--json", "--prompt", *prompts)
    assert (done.code, len(done.out)) == (0, 9)


def test_prompts_run_at_the_same_time(sgld: Sgld) -> None:
    steps = [line for line in sgld("generate", "--prompt", "a", "b", "--no-save-output").err if "step" in line]
    assert {line[:5] for line in steps[:4]} == {"[1/2]", "[2/2]"}


async def test_cancellation_closes_every_stream() -> None:
    settings = build(merge([accept({"--prompt": ["hang", "b"], "--save-output": "false"}, "flag")]))
    engine = FakeEngine(EngineConfig())
    job = Job(settings, Files(settings), Lines(), as_json=False)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(job.run, engine)
        await engine.hanging.wait()
        tasks.cancel_scope.cancel()
    assert sorted(engine.ended)[-1] == "hang"


def test_interrupt_ends_with_one_line_and_keeps_what_was_written(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, "generate", "--prompt", "a", "hang", "--output-file-name", "x.png"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "outputs/x-0.png\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "sgld: interrupted"
    assert "Traceback" not in err
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["x-0.png"]


def test_reader_that_leaves_does_not_end_the_work(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, "generate", "--prompt", *"abc", "--output-file-name", "x.png"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, b"BrokenPipe" in done.stderr) == (0, False)
    assert len(list((tmp_path / "outputs").iterdir())) == 3
