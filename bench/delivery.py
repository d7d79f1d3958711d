"""What does a request cost beside its model, from the decoder to the client?

`sgld serve` with a pipeline that has no models (bench/drawn.py): what a picture takes from the client's request to its
bytes, as base64 in JSON and as the file behind a URL, and what each part of that takes by itself. A picture of noise is
what nothing compresses, as that of a model with random weights; a scene has the grain of a photograph.

    python bench/delivery.py --out bench/results/delivery [--side 1024] [--repeats 9]
"""

import argparse
import asyncio
import base64
import functools
import io
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs where the package isn't installed, too
os.environ.setdefault("TQDM_DISABLE", "1")

import drawn
import httpx2
import numpy as np
import reports
from numpy.typing import NDArray
from PIL import Image
from served import picture, ready_s, serving

from sgld.engine.frames import FrameStore
from sgld.media.files import write_atomically
from sgld.media.images import encode_image
from sgld.media.videos import write_video

KINDS = ("noise", "scene")
CLIP = (81, 480, 832)


def least_ms(work: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """By the clock, and CPU time of all threads: what else the machine does only adds to both."""
    elapsed, cpu = [], []
    for _ in range(repeats):
        begin, begin_cpu = time.perf_counter(), time.process_time()
        work()
        elapsed.append(1e3 * (time.perf_counter() - begin))
        cpu.append(1e3 * (time.process_time() - begin_cpu))
    return round(min(elapsed), 1), round(min(cpu), 1)


async def asked_ms(work: Callable[[], Awaitable[Any]], repeats: int, pid: int) -> dict[str, float]:
    """The same after the first; the CPU time is the mean of the server's front process, and of the client."""
    await work()
    elapsed, begin_server, begin_client = [], cpu_s(pid), time.process_time()
    for _ in range(repeats):
        begin = time.perf_counter()
        await work()
        elapsed.append(1e3 * (time.perf_counter() - begin))
    server, client = cpu_s(pid) - begin_server, time.process_time() - begin_client
    per_request = {"server_cpu_ms": 1e3 * server / repeats, "client_cpu_ms": 1e3 * client / repeats}
    return {name: round(value, 1) for name, value in {"ms": min(elapsed), **per_request}.items()}


def cpu_s(pid: int) -> float:
    """What a process has used, in all of its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def requests(side: int, repeats: int) -> list[dict[str, Any]]:
    """What requests take over HTTP."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        drawn.save(Path(folder))
        flags = ["--model-path", folder, "--custom-pipeline", folder, "--trust-remote-code", "--device", "cpu"]
        async with serving(Path(folder), [*flags, "--num-cpu-threads", "1"]) as server, server.client() as http:
            await ready_s(server, http)
            for kind in KINDS:
                request = {"prompt": kind, "height": side, "width": side, "num_inference_steps": 1}
                for how, ask in (("b64_json", picture), ("url", fetched)):
                    taken = await asked_ms(functools.partial(ask, http, request), repeats, server.pid)
                    rows.append({"picture": kind, "asked_for": how, **taken})
    return rows


async def fetched(http: httpx2.AsyncClient, request: dict[str, Any]) -> bytes:
    """A picture that is fetched by its URL."""
    body = {"prompt": request["prompt"], "size": f"{request['width']}x{request['height']}", "response_format": "url"}
    answer = (await http.post("/v1/images/generations", json=body)).raise_for_status()
    return (await http.get(answer.json()["data"][0]["url"])).raise_for_status().content


def by_pillow(frame: NDArray[np.uint8]) -> bytes:
    """A PNG as Pillow makes it at its fastest level that compresses."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def parts(side: int, folder: Path) -> Iterator[tuple[str, str, Callable[[], Any], int]]:
    """Of what, the part, how it is done, and the bytes that come of it."""
    for kind in KINDS:
        frame = np.ascontiguousarray(drawn.still(kind, 1, side, side)[0].permute(1, 2, 0).numpy())
        content, pillows = encode_image(frame, "png"), by_pillow(frame)
        yield kind, "PNG by Pillow", functools.partial(by_pillow, frame), len(pillows)
        yield kind, "PNG", functools.partial(encode_image, frame, "png"), len(content)
        written = functools.partial(write_atomically, folder / "picture", content, is_durable=True)
        yield kind, "file, forced to the disk", written, len(content)
        yield kind, "base64", functools.partial(base64.b64encode, content), 4 * -(-len(content) // 3)
    clip = np.ascontiguousarray(drawn.still("scene", *CLIP).permute(0, 2, 3, 1).numpy())
    yield "clip", "frames kept as they come", functools.partial(kept, clip), clip.nbytes
    yield (
        "clip",
        "frames that are elsewhere, joined by copying",
        functools.partial(np.concatenate, list(clip[:, None])),
        clip.nbytes,
    )
    yield "clip", "MP4", functools.partial(write_video, folder / "clip.mp4", clip, fps=16), 0


def kept(clip: NDArray[np.uint8], per_piece: int = 4) -> NDArray[np.uint8]:
    """Frames that come four at a time, as a clip."""
    store = FrameStore()
    for start in range(0, len(clip), per_piece):
        store.put(start, clip[start : start + per_piece])
    return store.joined()


def measured(side: int, repeats: int) -> list[dict[str, Any]]:
    """What each part takes by itself."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, part, work, num_bytes in parts(side, Path(folder)):
            elapsed, cpu = least_ms(work, repeats if part != "MP4" else 2)
            rows.append({"of": kind, "part": part, "ms": elapsed, "cpu_ms": cpu, "kb": num_bytes // 1000})
    return rows


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = ["# What does a request cost beside its model?", "", f"`{report['command']}`", ""]
    measured = f"The least of {report['repeats']}; of CPU time over HTTP the mean."
    lines += [f"{report['machine']}. Load of the machine: {report['load']}. {measured}", ""]
    lines += ["Over HTTP, from the request to the bytes of the picture, all of it beside a model:", ""]
    head = ["picture", "asked for", "ms", "CPU time of the server, ms", "of the client, ms"]
    lines += reports.table(head, [list(row.values()) for row in report["requests"]])
    lines += ["", "The parts by themselves; the CPU time is that of all threads:", ""]
    rows = ((r["of"], r["part"], r["ms"], r["cpu_ms"], r["kb"] or "") for r in report["parts"])
    lines += reports.table(["of", "part", "ms", "CPU time, ms", "kB"], rows)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--side", type=int, default=1024)
    args = parser.parse_args()
    report = {"command": reports.command(), **reports.where("cpu"), "repeats": args.repeats, "side": args.side}
    report |= {"parts": measured(args.side, args.repeats), "requests": asyncio.run(requests(args.side, args.repeats))}
    report["load"] = f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(text(report))
    if args.out:
        reports.write(args.out, report, text(report))


if __name__ == "__main__":
    main()
