"""SGLang Diffusion's page of the command line, command by command, with `sgld` in the place of `sglang`.

Models are tiny ones of the same architecture, and sizes and steps are small. The commands with parallel options
(`--num-gpus 4 --ulysses-degree 2 --ring-degree 2`) run without them, but for one. A command with a flag
that sgld doesn't have yet must be refused by the name of that flag; it runs as soon as the flag is there.
"""

import json
import re
import shlex
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import av
import httpx2
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from engine.preloaded import preloaded_rank
from own_code import copy_code, save_tiny_autoencoder
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from pipelines import BUILDERS, build
from storage.s3_server import BUCKET, S3Server

from cli.page_config import PAGE_CONFIG
from sgld.config import EngineConfig
from sgld.engine.engine import Engine
from sgld.media.metadata import read_metadata
from sgld.models import lookup
from sgld.models.super_resolution import Rrdb
from sgld.server import serve as server
from sgld.testing import InlineReplica
from sgld_cli.later import find_later
from sgld_cli.main import main
from sgld_cli.options import options_by_name

from .conftest import Outcome

pytestmark = pytest.mark.long
TIMEOUT_S = 100
_PARALLEL = ("--num-gpus", "--ulysses-degree", "--ring-degree")
_SERVED = "--port 0 --device cpu --num-cpu-threads 1"
_SMALL = "--num-inference-steps 2 --num-cpu-threads 1 --device cpu"
Models = Callable[[str], Path]
Page = Callable[..., Outcome]


def in_this_process(config: EngineConfig) -> Engine:
    """An engine whose rank is a thread: it loads and runs what one in a process of its own does."""
    return Engine(config, rank_factory=InlineReplica(None))


def in_processes(config: EngineConfig) -> Engine:
    """An engine whose ranks are processes."""
    return Engine(config, rank_factory=preloaded_rank)


@pytest.fixture(autouse=True)
def _as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands run in a folder of their own, keep what they learn there, and leave the threads alone."""
    monkeypatch.setenv("SGLANG_DIFFUSION_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The folder of a tiny pipeline, by its name; each is made once."""
    root = tmp_path_factory.mktemp("models")

    def folder_of(name: str) -> Path:
        if not (root / name).exists():
            build(name)[0].save_pretrained(root / name)
        return root / name

    return folder_of


@pytest.fixture
def page(capsys: pytest.CaptureFixture[str]) -> Page:
    """Runs a command of the page.

    A command with flags that sgld doesn't have yet is seen to be refused, and passes for that.
    """

    def run(command: str, *, model: Path | str | None = None, more: str = "", **replaced: Path | str) -> Outcome:
        argv = arguments(command, model=model, more=more, is_parallel=False, **replaced)
        code = main(argv, engine_class=in_this_process)
        captured = capsys.readouterr()
        done = Outcome(code, captured.out.splitlines(), captured.err.splitlines())
        if waiting := not_yet(argv):
            assert done.code == 2
            assert f"{waiting[0]} isn't supported yet" in done.err[-1]
            pytest.xfail(f"refused as it should be, until it is there: {', '.join(waiting)}")
        assert done.code == 0, done.err
        return done

    return run


def arguments(
    command: str, *, model: Path | str | None = None, more: str = "", is_parallel: bool = False, **replaced: Path | str
) -> list[str]:
    """The arguments of a command: with `model`, the values of flags replaced, and parallel options if `is_parallel`."""
    name, *words = shlex.split(command.replace("\\\n", " "))
    assert name == "sglang"
    values = {"--model-path": model} if model is not None else {}
    values |= {"--" + flag.replace("_", "-"): value for flag, value in replaced.items()}
    argv: list[str] = []
    tokens = iter(words)
    for token in tokens:
        if token in _PARALLEL and not is_parallel:
            next(tokens)
        elif token in values:
            argv += [token, str(values[token])]
            next(tokens)
        else:
            argv.append(token)
    return [*argv, *shlex.split(more)]


def not_yet(argv: Sequence[str]) -> list[str]:
    """The flags that wait for their feature."""
    names = {flag: flag.removeprefix("--").replace("-", "_") for flag in argv if flag.startswith("--")}
    return [flag for flag, name in names.items() if name not in options_by_name() and find_later(name) is not None]


def kwargs_of(name: str, *skipped: str) -> str:
    """Flags with what a tiny pipeline needs beside a prompt."""
    known = options_by_name()
    kwargs = {key: value for key, value in BUILDERS[name].kwargs.items() if key not in skipped}
    flags = [f"--{key.replace('_', '-')} {shlex.quote(str(v))}" for key, v in kwargs.items() if key in known]
    others = {key: value for key, value in kwargs.items() if key not in known}
    more = f"--diffusers-kwargs {shlex.quote(json.dumps(others))}" if others else ""
    return " ".join([_SMALL, *flags, more])


def size_of(path: str) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def num_frames(path: Path | str) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.mark.parametrize("command", ["sglang generate --help", "sglang serve --help"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments(command))
    assert left.value.code == 0
    told = capsys.readouterr().out
    for flag in ("--model-path", "--num-gpus", "--backend", "--port", "--vae-tiling", "--trust-remote-code"):
        assert flag in told


def test_quick_start(page: Page, models: Models) -> None:
    done = page(
        """sglang generate \\
          --model-path Qwen/Qwen-Image \\
          --prompt "A beautiful sunset over the mountains" \\
          --save-output""",
        model=models("qwen_image"),
        more=kwargs_of("qwen_image"),
    )
    (path,) = done.out
    assert Path(path).name.startswith("A_beautiful_sunset_over_the_mountains_")
    assert size_of(path) == (32, 32)


def test_overlay_of_a_source_repo(page: Page, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "SGLANG_DIFFUSION_MODEL_OVERLAY_REGISTRY",
        json.dumps(
            {
                "Wan-AI/Wan2.2-S2V-14B": {
                    "overlay_repo_id": str(models("wan")),
                    "overlay_revision": "main",
                }
            }
        ),
    )
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "wan_s2v.yaml").write_text("prompt: a red cat\nnum_frames: 5\n")
    done = page(
        """sglang generate \\
          --model-path Wan-AI/Wan2.2-S2V-14B \\
          --config configs/wan_s2v.yaml""",
        more=kwargs_of("wan", "num_frames"),
    )
    assert num_frames(done.out[0]) == 5


def test_overlay_repo_itself(page: Page, models: Models, tmp_path: Path) -> None:
    """It makes a model of its own files and the weights of a source."""
    source, overlay = tmp_path / "source", tmp_path / "overlay"
    shutil.copytree(models("wan"), source)
    shutil.copytree(models("wan"), overlay, ignore=shutil.ignore_patterns("*.safetensors"))
    trees = [{"type": "tree", "src": name, "dst_dir": name} for name in ("transformer", "text_encoder", "vae")]
    manifest = {"source_model_id": str(source), "file_mappings": trees}
    (overlay / "_overlay").mkdir()
    (overlay / "_overlay" / "overlay_manifest.json").write_text(json.dumps(manifest))
    done = page("sglang generate --model-path overlay --prompt 'a red cat'", model=overlay, more=kwargs_of("wan"))
    assert num_frames(done.out[0]) == 9
    assert list((tmp_path / "cache" / "materialized_models").iterdir())


def test_configuration_file(page: Page, models: Models, tmp_path: Path) -> None:
    """Its model and sizes are replaced by flags, which come before the file; so are its two GPUs."""
    (tmp_path / "config.yaml").write_text(PAGE_CONFIG)
    done = page(
        "sglang generate --config config.yaml",
        more=f"--model-path {models('hunyuan_video')} --num-gpus 1 --sp-size 1 {kwargs_of('hunyuan_video')}",
    )
    (path,) = done.out
    assert Path(path).resolve().parent == tmp_path / "outputs"
    assert num_frames(path) == 9


def test_two_transformers_with_an_encoder_in_memory_of_the_host(page: Page, models: Models, tmp_path: Path) -> None:
    done = page(
        """sglang generate \\
          --model-path Wan-AI/Wan2.2-T2V-A14B-Diffusers \\
          --text-encoder-cpu-offload \\
          --pin-cpu-memory \\
          --num-gpus 4 \\
          --ulysses-degree 2 \\
          --ring-degree 2 \\
          --prompt "A curious raccoon" \\
          --save-output \\
          --output-path outputs \\
          --output-file-name "a-curious-raccoon.mp4" """,
        model=models("wan_2_2"),
        more=kwargs_of("wan_2_2"),
    )
    assert [Path(path).resolve() for path in done.out] == [tmp_path / "outputs" / "a-curious-raccoon.mp4"]
    assert num_frames(done.out[0]) == BUILDERS["wan_2_2"].kwargs["num_frames"]


@pytest.mark.parametrize(
    ("flags", "variables"),
    [
        ("--cache-dit-config cache.yaml", {}),
        ("", {"SGLANG_CACHE_DIT_ENABLED": "true", "SGLANG_CACHE_DIT_FN": "1", "SGLANG_CACHE_DIT_WARMUP": "1"}),
    ],
)
def test_cache_dit(
    flags: str, variables: dict[str, str], page: Page, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cache_dit")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = {"Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 0.12}
    (tmp_path / "cache.yaml").write_text(json.dumps({"cache_config": settings}))
    command = "sglang generate --backend diffusers --model-path black-forest-labs/FLUX.1-dev --prompt 'a cat'"
    done = page(f"{command} {flags}", model=models("flux"), more=kwargs_of("flux"))
    assert size_of(done.out[-1]) == (16, 16)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("--vae-tiling --vae-slicing", "qwen_image"),
        ("--dit-precision bf16 --vae-precision fp32", "qwen_image"),
        ("--attention-backend torch_sdpa", "qwen_image"),
        ("--enable-torch-compile false", "qwen_image"),
        ("--num-gpus 1 --tp-size 1 --sp-degree 1 --ulysses-degree 1 --ring-degree 1", "qwen_image"),
    ],
)
def test_common_options(flags: str, name: str, page: Page, models: Models) -> None:
    done = page(
        f"sglang generate --model-path {models(name)} --prompt 'a cat' --seed 7", more=f"{flags} {kwargs_of(name)}"
    )
    assert size_of(done.out[0]) == (32, 32)


def test_adapter(page: Page, models: Models, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(models("flux"))
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    layers = get_peft_model_state_dict(pipeline.transformer)
    pipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers=layers)
    command = "sglang generate --model-path black-forest-labs/FLUX.1-dev --prompt 'a cat' --seed 3"
    plain = page(command, model=models("flux"), more=kwargs_of("flux"))
    adapted = page(f"{command} --lora-path lora --lora-nickname mine", model=models("flux"), more=kwargs_of("flux"))
    assert Path(plain.out[0]).read_bytes() != Path(adapted.out[0]).read_bytes()


def test_info_shows_where_components_come_from(page: Page, models: Models, tmp_path: Path) -> None:
    vae = save_tiny_autoencoder(tmp_path / "vae")
    done = page(
        f"sglang info --model-path black-forest-labs/FLUX.2-dev --vae-path {vae} --trust-remote-code",
        model=models("flux2"),
        more="--backend diffusers --device cpu",
    )
    assert f"  vae: fp32; Flux2TinyAutoEncoder from {vae}" in done.out
    assert "  model: backend diffusers (asked for): requests run whole, one at a time" in done.out


@pytest.mark.parametrize("flag", ["--transformer-path", "--transformer-weights-path"])
def test_another_transformer(flag: str, page: Page, models: Models) -> None:
    """What quantized ones make of it is seen in tests of these."""
    transformer = models("flux") / "transformer"
    path = transformer if flag == "--transformer-path" else transformer / "diffusion_pytorch_model.safetensors"
    command = f"sglang generate --model-path black-forest-labs/FLUX.1-dev --prompt 'a cat' {flag} {path}"
    assert size_of(page(command, model=models("flux"), more=kwargs_of("flux")).out[0]) == (16, 16)


def test_image_path_and_frames(page: Page, models: Models, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "in.png")
    done = page(
        "sglang generate --model-path Wan-AI/Wan2.1-I2V-14B-480P-Diffusers --prompt 'a cat' --negative-prompt 'a dog' "
        "--image-path in.png --fps 8 --return-frames",
        model=models("wan_i2v"),
        more=kwargs_of("wan_i2v"),
    )
    assert num_frames(done.out[0]) == BUILDERS["wan_i2v"].kwargs["num_frames"]
    assert list(Path(done.out[0]).parent.glob("*-frame-0000.png"))


_OVIS = """sglang generate \\
  --model-path AIDC-AI/Ovis-Image-7B \\
  --backend diffusers \\
  --trust-remote-code \\
  --diffusers-attention-backend flash \\
  --prompt "A serene Japanese garden with cherry blossoms" \\
  --height 1024 \\
  --width 1024 \\
  --num-inference-steps 30 \\
  --save-output \\
  --output-path outputs \\
  --output-file-name ovis_garden.png"""


@pytest.fixture(scope="module")
def own_ovis(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ovis-Image with a pipeline class of its own."""
    folder = tmp_path_factory.mktemp("own") / "ovis"
    shutil.copytree(models("ovis_image"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = ["own_ovis", "MirroredOvisImagePipeline"]
    (folder / "model_index.json").write_text(json.dumps(index))
    copy_code("own_ovis", folder)
    return folder


def test_diffusers_backend_with_a_class_of_the_model(page: Page, own_ovis: Path, tmp_path: Path) -> None:
    """The kernel `flash` needs a GPU, so torch's own is named in its place."""
    small = {"height": "32", "width": "32", "num_inference_steps": "3", "diffusers_attention_backend": "native"}
    more = "--device cpu --num-cpu-threads 1 --max-sequence-length 16 --negative-prompt 'a dog' --seed 5"
    done = page(_OVIS, model=own_ovis, more=more, **small)
    assert [Path(path).resolve() for path in done.out] == [tmp_path / "outputs" / "ovis_garden.png"]
    torch.set_num_threads(1)
    expected = DiffusionPipeline.from_pretrained(own_ovis, trust_remote_code=True)(
        prompt="A serene Japanese garden with cherry blossoms",
        negative_prompt="a dog",
        height=32,
        width=32,
        num_inference_steps=3,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    pixels = (expected * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    with Image.open(done.out[0]) as picture:
        np.testing.assert_array_equal(np.asarray(picture), pixels)


def test_flash_on_a_cpu_and_code_that_is_not_trusted_are_refused(
    own_ovis: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(_OVIS, model=own_ovis, more="--device cpu")
    assert main(argv, engine_class=in_this_process) == 2
    assert "flash" in capsys.readouterr().err
    argv.remove("--trust-remote-code")
    assert main(argv, engine_class=in_this_process) == 2
    assert "allow it with --trust-remote-code" in capsys.readouterr().err


def test_further_arguments_of_a_pipeline_in_a_file(page: Page, models: Models, tmp_path: Path) -> None:
    sizes = {"height": 16, "width": 16, "max_sequence_length": 16}
    own = {"sigmas": [1.0, 0.3]}
    (tmp_path / "c.json").write_text(json.dumps({**sizes, "prompt": "a cat", "diffusers_kwargs": own}))
    done = page(
        "sglang generate --config c.json --backend diffusers --model-path black-forest-labs/FLUX.1-dev",
        model=models("flux"),
        more=_SMALL,
    )
    assert size_of(done.out[0]) == (16, 16)


@asynccontextmanager
async def served(
    argv: list[str], folder: Path, engine_class: Callable[[EngineConfig], Engine] = in_this_process
) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the server that a command starts, which runs here until the block ends."""
    started: list[tuple[EngineConfig, server.Listener]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(folder / "data"))
        patch.setattr(
            "sgld_cli.serve.anyio.run", lambda _main, config, listener, *_: started.append((config, listener))
        )
        assert main(argv) == 0
    ((config, listener),) = started
    url = listener.url
    async with anyio.create_task_group() as tasks:
        services = await tasks.start(partial(server.serve, config, listener, engine_class))
        async with httpx2.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client:
            yield client
        services.stopping.set()


async def video_from(client: httpx2.AsyncClient, **fields: Any) -> bytes:
    """A video by the API of videos."""
    job = (await client.post("/v1/videos", json=fields)).json()
    with anyio.fail_after(TIMEOUT_S):
        while job["status"] not in ("completed", "failed"):
            await anyio.sleep(0.05)
            job = (await client.get(f"/v1/videos/{job['id']}")).json()
    assert job["status"] == "completed", job
    return (await client.get(f"/v1/videos/{job['id']}/content")).content


_SERVE_WAN = """sglang serve \\
  --model-path Wan-AI/Wan2.1-T2V-1.3B-Diffusers \\
  {offload} \\
  --num-gpus 4 \\
  --ulysses-degree 2 \\
  --ring-degree 2 \\
  --port 30010"""


@pytest.mark.parametrize("offload", ["", "--text-encoder-cpu-offload --pin-cpu-memory"])
async def test_serve(offload: str, models: Models, tmp_path: Path) -> None:
    """Its port is a free one. With offload it has its four ranks, as processes, and tokens enough for these."""
    command = _SERVE_WAN.format(offload=offload)
    small = "--device cpu --num-cpu-threads 1"
    argv = arguments(command, model=models("wan"), port="0", more=small, is_parallel=bool(offload))
    if waiting := not_yet(argv):
        assert main(argv) == 2
        pytest.xfail(f"refused as it should be, until it is there: {', '.join(waiting)}")
    async with served(argv, tmp_path, in_processes if offload else in_this_process) as client:
        kwargs = dict(BUILDERS["wan"].kwargs)
        size = "32x64" if offload else f"{kwargs.pop('width')}x{kwargs.pop('height')}"
        kwargs = {name: value for name, value in kwargs.items() if name not in ("width", "height")}
        content = await video_from(client, prompt="a cat", size=size, num_inference_steps=2, **kwargs)
    (tmp_path / "x.mp4").write_bytes(content)
    assert num_frames(tmp_path / "x.mp4") == 9


async def test_cloud_storage(models: Models, bucket: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bucket is one on this machine."""
    monkeypatch.setenv("SGLANG_CLOUD_STORAGE_TYPE", "s3")
    monkeypatch.setenv("SGLANG_S3_BUCKET_NAME", BUCKET)
    monkeypatch.setenv("SGLANG_S3_ACCESS_KEY_ID", "your-access-key")
    monkeypatch.setenv("SGLANG_S3_SECRET_ACCESS_KEY", "your-secret-key")
    monkeypatch.setenv("SGLANG_S3_ENDPOINT_URL", bucket.url)
    argv = arguments("sglang serve --model-path Qwen/Qwen-Image", model=models("qwen_image"), more=_SERVED)
    async with served(argv, tmp_path) as client:
        fields = {"prompt": "a cat", "size": "32x32", "num_inference_steps": 2, "response_format": "url"}
        answer = await client.post("/v1/images/generations", json=fields)
        assert answer.status_code == 200, answer.text
        picture = await client.get(answer.json()["data"][0]["url"])
    assert picture.url.port == int(bucket.url.rpartition(":")[2])
    (tmp_path / "x.png").write_bytes(picture.content)
    assert size_of(str(tmp_path / "x.png")) == (32, 32)


async def test_component_path_overrides(models: Models, tmp_path: Path) -> None:
    """The class of that autoencoder is code that comes with it, so --trust-remote-code is added."""
    argv = arguments(
        """sglang serve \\
          --model-path black-forest-labs/FLUX.2-dev \\
          --vae-path fal/FLUX.2-Tiny-AutoEncoder""",
        model=models("flux2"),
        vae_path=save_tiny_autoencoder(tmp_path / "vae"),
        more="--port 0 --device cpu --num-cpu-threads 1 --trust-remote-code",
    )
    async with served(argv, tmp_path) as client:
        fields = {"prompt": "a cat", "size": "8x8", "num_inference_steps": 2, "max_sequence_length": 16}
        own = {"diffusers_kwargs": {"text_encoder_out_layers": [1]}}
        answer = await client.post("/v1/images/generations", json=fields | own)
        assert answer.status_code == 200, answer.text
        decisions = (await client.get("/server_info")).text
    assert "Flux2TinyAutoEncoder" in decisions


DOCS = Path(__file__).parents[2] / "docs" / "post_processing.md"
POST_PROCESSING = re.findall(r"^sgld (generate .*)$", DOCS.read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", POST_PROCESSING)
def test_post_processing(command: str, page: Page, models: Models) -> None:
    """What docs/post_processing.md shows of the flags of that page."""
    words = shlex.split(command)
    name = "wan" if "sgld/tiny-video" in words else "qwen_image"
    for flag in ("--model-path", "--num-inference-steps"):
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
    done = page(f"sglang {shlex.join(words)}", more=f"--model-path {models(name)} {kwargs_of(name)}")
    scale = int(words[words.index("--upscaling-scale") + 1]) if "--upscaling-scale" in words else 1
    kwargs = BUILDERS[name].kwargs
    if name == "qwen_image":
        assert size_of(done.out[0]) == (kwargs["width"] * scale, kwargs["height"] * scale)
        assert read_metadata(Path(done.out[0]))["postprocessing"] == [f"{scale}x size by lanczos"]
        return
    with av.open(done.out[0]) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        rate = container.streams.video[0].average_rate
    assert len(frames) == 2 * kwargs["num_frames"] - 1
    assert frames[0].shape == (kwargs["height"] * scale, kwargs["width"] * scale, 3)
    assert rate == 48
    assert read_metadata(Path(done.out[0]))["postprocessing"][0] == "2x frames by optical flow"
    assert "2x frames by optical flow" in done.err[-1]


@pytest.mark.parametrize(
    ("command", "factors"),
    [
        (
            """sglang generate \\
              --model-path Wan-AI/Wan2.2-T2V-A14B-Diffusers \\
              --prompt "A dog running through a park" \\
              --num-frames 5 \\
              --enable-frame-interpolation \\
              --frame-interpolation-exp 1 \\
              --save-output""",
            (2, 1),
        ),
        (
            """sglang generate \\
              --model-path Wan-AI/Wan2.1-T2V-1.3B-Diffusers \\
              --prompt "A curious raccoon" \\
              --num-frames 5 \\
              --enable-frame-interpolation \\
              --frame-interpolation-exp 1 \\
              --enable-upscaling \\
              --upscaling-scale 4 \\
              --save-output""",
            (2, 4),
        ),
    ],
)
def test_post_processing_as_sglang_shows_it(
    command: str, factors: tuple[int, int], page: Page, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights that it fetches by default are tiny ones of the same layout."""
    state = Rrdb(width=4, growth=2, num_blocks=1, num_doublings=2).state_dict()
    torch.save(state, tmp_path / "RealESRGAN_x4.pth")
    monkeypatch.setattr(lookup, "hub_file", lambda _repo, name, _revision: tmp_path / name)
    done = page(command, model=models("wan"), more=kwargs_of("wan", "num_frames"))
    with av.open(done.out[0]) as container:
        video = container.streams.video[0]
        assert (video.width, video.height) == tuple(BUILDERS["wan"].kwargs[s] * factors[1] for s in ("width", "height"))
        assert sum(1 for _ in container.decode(video=0)) == 4 * factors[0] + 1
