"""How good are frames made in between, how equal are tiles to the whole, and what memory does a video take?

Interpolation: the middle of two frames of a known motion (bench/drawn.py), against repeating the first frame and
blending both, and where OpenCV is there against its flow. Upscaling: a small network of Real-ESRGAN's layout, trained
for `--train-s` seconds on landscapes, against Lanczos on others; and the largest difference of tiles to the whole.
Memory: a video of 81 frames goes from a rank of its own through interpolation and upscaling into an MP4; of both
processes the peaks of what is theirs alone (RssAnon), above what they had after a small video.

    python bench/post_processing.py --out bench/results/post_processing [--device cuda]

On a GPU: what a frame of 832x480 takes there, in milliseconds and MB, and tiles against the whole.
"""

import argparse
import functools
import importlib.util
import math
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs where the package isn't installed, too
os.environ.setdefault("TQDM_DISABLE", "1")

import anyio
import drawn
import numpy as np
import reports
import torch
from anyio.to_thread import run_sync
from PIL import Image
from torch.nn import functional

from sgld.config import EngineConfig, SourceConfig
from sgld.engine import entry
from sgld.engine.engine import Engine
from sgld.engine.frames import FrameStore
from sgld.events import Completed, Failed
from sgld.media.videos import write_video
from sgld.models.embedded.scenes import draw_dice, draw_scenes, render
from sgld.models.filters import Interpolator, Upscaler
from sgld.models.optical_flow import OpticalFlow, warp
from sgld.models.rife import Rife
from sgld.models.super_resolution import Compact, Rrdb, label_of
from sgld.models.tiles import Canvas
from sgld.sampling_params import SamplingParams
from sgld.worker.postprocess import edge_of

SIZE: dict[str, Any] = {"height": 192, "width": 256}
SPEEDS = (4, 10, 20)
VIDEO: dict[str, Any] = {"num_frames": 81, "height": 480, "width": 832}
TINY_VIDEO: dict[str, Any] = {"num_frames": 3, "height": 96, "width": 128}
_SAMPLE_S = 0.02


def psnr(picture: torch.Tensor, expected: torch.Tensor) -> float:
    """In dB, of values in [0, 1]."""
    return -10 * math.log10(float(((picture - expected) ** 2).mean()) + 1e-12)


def interpolation(speeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """How near middle frames are to the true ones."""
    rows = []
    for motion in drawn.MOTIONS:
        for speed in speeds:
            first, middle, last = (drawn.frame_at(motion, at, speed=speed, **SIZE) for at in (0, 0.5, 1))
            made = {"repeat": first, "blend": (first + last) / 2, "flow": OpticalFlow()(first, last, 0.5)}
            if importlib.util.find_spec("cv2"):
                made["OpenCV's DIS"] = by_dis(first, last)
            rows.append({"motion": motion, "speed": speed, **{name: psnr(f, middle) for name, f in made.items()}})
    return rows


def by_dis(first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """The middle by OpenCV's flow between the frames, both ways, as Super SloMo puts flow to a middle together."""
    cv2 = importlib.import_module("cv2")
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = [(frame[0].mean(0) * 255).byte().numpy() for frame in (first, last)]
    forth, back = (
        torch.from_numpy(dis.calc(*pair, None)).permute(2, 0, 1)[None] for pair in (grey, list(reversed(grey)))
    )
    before, after = (back - forth) / 4, (forth - back) / 4
    return (warp(first, before) + warp(last, after)) / 2


def pictures(count: int, seed: int, size: int) -> torch.Tensor:
    """Landscapes, (count, 3, size, size) in [0, 1]."""
    scenes = torch.tensor(draw_scenes(count, seed))
    return render(scenes, draw_dice(count, torch.Generator().manual_seed(seed)), size, size)


def trained(seconds: float, scale: int = 2) -> Compact:
    """A small network that has learned to enlarge landscapes."""
    torch.manual_seed(0)
    network = Compact(width=16, num_layers=4, scale=scale)
    for weight in network.body[-1].parameters():
        torch.nn.init.zeros_(weight)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    large, started = pictures(256, 1, 128), time.monotonic()
    small = functional.interpolate(large, scale_factor=1 / scale, mode="area")
    while (left := 1 - (time.monotonic() - started) / seconds) > 0:
        optimizer.param_groups[0]["lr"] = 2e-3 * max(left, 0.02)
        chosen, (row, column) = torch.randint(0, len(large), (8,)), torch.randint(0, 33, (2,)).tolist()
        part = small[chosen, :, row : row + 32, column : column + 32]
        rows, columns = (slice(scale * start, scale * (start + 32)) for start in (row, column))
        loss = functional.mse_loss(network(part), large[chosen, :, rows, columns])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network.requires_grad_(False)


def enlarging(network: Compact) -> dict[str, float]:
    """PSNR on landscapes that it hasn't seen."""
    large = pictures(16, 2, 128)
    small = functional.interpolate(large, scale_factor=1 / network.scale, mode="area")
    lanczos = [_lanczos(picture, network.scale) for picture in small]
    return {"network": psnr(network(small).clamp(0, 1), large), "lanczos": psnr(torch.stack(lanczos), large)}


def _lanczos(picture: torch.Tensor, scale: int) -> torch.Tensor:
    image = Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())
    larger = image.resize((scale * image.width, scale * image.height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(larger)).permute(2, 0, 1) / 255


def tiles(network: Compact | Rrdb, edge: int, height: int, width: int) -> dict[str, Any]:
    """The largest and the mean difference of a picture in tiles to the whole, in levels of 255."""
    about: dict[str, Any] = {"scale": network.scale, "radius": network.radius, "multiple": network.multiple}
    upscaler = Upscaler(network, label="", bytes_per_pixel=1, **about)
    picture = drawn.to_bytes(drawn.frame_at("textures", 0, height=height, width=width, speed=0)).permute(0, 2, 3, 1)
    size = height * network.scale, width * network.scale
    results = []
    for longest in (10**6, edge):
        canvas = Canvas(height, width, edge=longest, size=size, **about)
        for index in range(len(canvas.tiles)):
            result = upscaler.decode(picture, canvas, index)
        assert result is not None, "the last tile makes it whole"
        results.append(result.int())
    difference = (results[0] - results[1]).abs()
    return {
        "network": label_of(network),
        "tiles": len(canvas.tiles),
        "edge": edge,
        "largest": int(difference.max()),
        "mean": float(difference.float().mean()),
    }


def on_gpu() -> list[dict[str, Any]]:
    """What one frame takes: between two others, or enlarged, whole and in tiles; weights are random."""
    device, size = torch.device("cuda"), {"height": 480, "width": 832}
    first, last = (torch.randint(0, 256, (2, 1, 480, 832, 3), dtype=torch.uint8, device=device)).unbind()
    rows = []
    for between in (Rife(), OpticalFlow()):
        interpolator = Interpolator(between).to(device)
        work = functools.partial(interpolator.decode, first, last, 0.5, 1.0)
        rows.append({"what": between.label, "tiles": 1, **taken(work)[0], "largest": None})
    for network in (
        Compact(width=64, num_layers=16, scale=4),
        Rrdb(width=64, growth=32, num_blocks=23, num_doublings=2),
    ):
        about: dict[str, Any] = {"scale": 4, "radius": network.radius, "multiple": 1}
        upscaler = Upscaler(network, label="", bytes_per_pixel=network.bytes_per_pixel, **about).half().to(device)
        whole = None
        for edge in (10**6, edge_of(upscaler, device), 256):
            work = functools.partial(enlarged, upscaler, first, edge, about | size)
            spent, result = taken(work)
            whole = result if whole is None else whole
            num_tiles = len(Canvas(480, 832, edge=edge, size=(1920, 3328), **about).tiles)
            largest = int((result.int() - whole.int()).abs().max())
            rows.append({"what": f"{label_of(network)}, fp16", "tiles": num_tiles, **spent, "largest": largest})
    return rows


def enlarged(upscaler: Upscaler, picture: torch.Tensor, edge: int, about: dict[str, Any]) -> torch.Tensor:
    scale = about["scale"]
    canvas = Canvas(edge=edge, size=(about["height"] * scale, about["width"] * scale), **about)
    for index in range(len(canvas.tiles)):
        result = upscaler.decode(picture, canvas, index)
    assert result is not None, "the last tile makes it whole"
    return result


def taken(work: Callable[[], torch.Tensor], repeats: int = 3) -> tuple[dict[str, float], torch.Tensor]:
    """Milliseconds and MB that something takes once it is warm, and its result."""
    result = work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, started = torch.cuda.memory_allocated(), time.perf_counter()
    for _ in range(repeats):
        result = work()
    torch.cuda.synchronize()
    milliseconds = 1000 * (time.perf_counter() - started) / repeats
    return {"ms": milliseconds, "mb": (torch.cuda.max_memory_allocated() - before) / 1e6}, result


class Watch:
    """The peaks of memory of a process that is its own (RssAnon), sampled by a thread."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self._is_over = threading.Event()
        self.before = {name: anonymous_mb(pid) for name, pid in pids.items()}
        self.peaks = dict(self.before)

    @contextmanager
    def watching(self) -> Iterator[None]:
        thread = threading.Thread(target=self._sample)
        thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            thread.join()

    def _sample(self) -> None:
        while not self._is_over.wait(_SAMPLE_S):
            for name, pid in self._pids.items():
                self.peaks[name] = max(self.peaks[name], anonymous_mb(pid))

    def above(self) -> dict[str, int]:
        return {name: round(self.peaks[name] - self.before[name]) for name in self._pids}


def anonymous_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1000


def rank_pid() -> int:
    """The process of the engine's rank."""
    (process,) = multiprocessing.active_children()
    assert process.pid is not None, "it was started"
    return process.pid


async def memory(choices: dict[str, Any], video: dict[str, Any], *, in_file: bool) -> dict[str, Any]:
    """What both processes hold at most while a video is made and written."""
    vars(entry)["FrameStore"] = FrameStore if in_file else functools.partial(FrameStore, 2**62)
    with tempfile.TemporaryDirectory() as folder:
        drawn.save(Path(folder))
        config = EngineConfig(
            model_path=folder,
            source=SourceConfig(custom_pipeline=folder),
            trust_remote_code=True,
            device="cpu",
            num_cpu_threads=1,
        )
        small = SamplingParams(prompt="pan", num_inference_steps=1, **TINY_VIDEO, **choices)
        large = SamplingParams(prompt="textures", num_inference_steps=1, **video, **choices)
        async with Engine(config) as engine:
            await written(engine, small, Path(folder) / "small.mp4")
            watch, started = Watch({"front": os.getpid(), "rank": rank_pid()}), time.monotonic()
            with watch.watching():
                completed = await written(engine, large, Path(folder) / "large.mp4")
    return {
        "what": ", ".join(completed.postprocessing) or "nothing",
        "frames": "x".join(map(str, completed.frames.shape[:3])),
        "frames_mb": round(completed.frames.nbytes / 1e6),
        "kept": "in a file" if in_file else "in memory",
        **{f"{name}_mb": value for name, value in watch.above().items()},
        "seconds": round(time.monotonic() - started),
    }


async def written(engine: Engine, params: SamplingParams, path: Path) -> Completed:
    """Make a video and write it, as the command line does."""
    async for event in engine.generate(params):
        assert not isinstance(event, Failed), event
        if isinstance(event, Completed):
            await run_sync(functools.partial(write_video, path, event.frames, fps=event.fps or 24))
            return event
    raise AssertionError("each request ends")


def memory_cases(tiny: bool) -> Iterator[tuple[dict[str, Any], bool]]:
    between = {"enable_frame_interpolation": True, "frame_interpolation_scale": 0.25}
    larger = {"enable_upscaling": True, "upscaling_model_path": "lanczos"}
    yield {}, True
    yield between | larger | {"upscaling_scale": 2}, False
    yield between | larger | {"upscaling_scale": 2}, True
    if not tiny:
        yield between | larger | {"upscaling_scale": 4}, True


def text_of(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = ["# Post-processing", "", f"{report['machine']}, {report['versions']}", "", f"`{report['command']}`"]
    lines += ["", "Middle frames, PSNR in dB", ""]
    lines += table(report["interpolation"], "{:.1f}")
    lines += ["", "Twice the size, on landscapes that the network hasn't seen, PSNR in dB", ""]
    lines += table([report["enlarging"]], "{:.1f}")
    lines += ["", "Tiles against the whole, in levels of 255; weights are random but for the first", ""]
    lines += table(report["tiles"], "{:.4f}")
    lines += ["", "Peaks of memory above what the processes had after a small video, in MB", ""]
    lines += table(report["memory"], "{:.1f}")
    return "\n".join([*lines, ""])


def table(rows: list[dict[str, Any]], form: str) -> list[str]:
    names = list(rows[0]) if rows else []
    cells = [[form.format(v) if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    return reports.table(names, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--train-s", type=float, default=60.0)
    parser.add_argument("--tiny", action="store_true", help="try it out")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    if args.device == "cuda":
        about = {**reports.where("cuda"), "command": reports.command()}
        with torch.no_grad():
            gpu = {**about, "frames": on_gpu()}
        heading = "One frame of 832x480; largest: difference to the whole, in levels of 255"
        lines = ["# Post-processing on a GPU", "", f"{gpu['machine']}, {gpu['versions']}", "", f"`{gpu['command']}`"]
        text = "\n".join([*lines, "", heading, "", *table(gpu["frames"], "{:.1f}"), ""])
        if args.out:
            reports.write(args.out, gpu, text)
        print(text)
        return
    network = trained(2.0 if args.tiny else args.train_s)
    report: dict[str, Any] = {
        **reports.where("cpu"),
        "command": reports.command(),
        "interpolation": interpolation(SPEEDS[:1] if args.tiny else SPEEDS),
        "enlarging": enlarging(network),
    }
    torch.manual_seed(0)
    cases: list[tuple[Compact | Rrdb, int]] = [(network, 96), (Compact(width=64, num_layers=16, scale=4), 128)]
    if not args.tiny:
        cases += [(Rrdb(width=64, growth=32, num_blocks=number, num_doublings=2), 128) for number in (6, 23)]
    report["tiles"] = [tiles(case.requires_grad_(False), edge, 128, 192) for case, edge in cases]
    report["memory"] = []
    for choices, in_file in memory_cases(args.tiny):
        video = {"num_frames": 9, "height": 96, "width": 128} if args.tiny else VIDEO
        report["memory"].append(anyio.run(functools.partial(memory, choices, video, in_file=in_file)))
        print(report["memory"][-1], file=sys.stderr)
    text = text_of(report)
    if args.out:
        reports.write(args.out, report, text)
    print(text)


if __name__ == "__main__":
    main()
