"""Plain diffusers, eager or compiled: sides of the comparison."""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from budget import Budget
from diffusers import DiffusionPipeline
from lines import fits, keep
from numpy.typing import NDArray
from real_models import MODELS
from roofline import ROOF_SIDE, moment, roof_tflops, step_tflop
from rows import Measured, Row

# Of the staggered requests a plain pipeline runs so many, which have as many steps in the mean as all.
_SOME_STAGGERED = (0, 5, 10, 15)


class Plain:
    """The pipeline as diffusers runs it."""

    def __init__(self, model: str, folder: Path, device: str, side: str) -> None:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self._device = device
        start = time.perf_counter()
        self.pipeline = DiffusionPipeline.from_pretrained(str(folder), dtype=dtype).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.load_s = time.perf_counter() - start
        self.denoiser = denoiser = getattr(self.pipeline, MODELS[model].denoiser)
        if side == "compiled":
            denoiser.compile_repeated_blocks(fullgraph=True)
        elif side == "max-autotune":
            denoiser.to(memory_format=torch.channels_last)
            denoiser.compile(mode="max-autotune", fullgraph=True)

    def run(self, request: dict[str, Any]) -> tuple[float, float, NDArray[np.uint8]]:
        """Seconds of a request, milliseconds of its steps, and its frames."""
        ends: list[Any] = []

        def note(_pipeline: Any, _step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
            ends.append(self._mark())
            return {}

        kwargs = {name: value for name, value in request.items() if name != "seed"}
        generator = torch.Generator().manual_seed(request["seed"])
        start = time.perf_counter()
        output = self.pipeline(**kwargs, generator=generator, callback_on_step_end=note)[0]
        self._wait()
        elapsed_s = time.perf_counter() - start
        between = self._between_ms(ends[0], ends[-1]) / (len(ends) - 1)
        return elapsed_s, between, _as_frames(output)

    def launch_us(self) -> float:
        """What one small operation costs to launch; the device is done with each sooner."""
        x = torch.ones(1, device=self._device)
        for _ in range(100):
            x.add_(1)
        self._wait()
        num, rounds = 500, []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(num):
                x.add_(1)
            rounds.append(1e6 * (time.perf_counter() - start) / num)
            self._wait()
        return statistics.median(rounds)

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()

    def _mark(self) -> Any:
        """A moment of the device; nobody waits for it."""
        if self._device != "cuda":
            return time.perf_counter()
        event = moment()
        event.record()
        return event

    def _between_ms(self, before: Any, after: Any) -> float:
        return float(before.elapsed_time(after) if self._device == "cuda" else 1e3 * (after - before))


def plain_rows(rows: Sequence[Row], args: argparse.Namespace, budget: Budget) -> Iterator[Measured]:
    """Measure with plain diffusers, one request after the other."""
    torch.set_grad_enabled(False)
    plain = Plain(args.model, args.folder, args.device, args.side)
    call = MODELS[args.model].call
    notes: dict[str, Any] = {"load_s": plain.load_s}
    launch_us = plain.launch_us()
    if args.side == "eager":
        notes["roof_tflops"] = roof_tflops(args.device, 256 if args.tiny else ROOF_SIDE)
    for row in rows:
        if not fits(row, budget):
            continue
        measured = Measured(row.name, args.side, launch_us=launch_us, notes=dict(notes))
        if row.kind == "staggered":
            plain.run(row.request(0, call) | {"num_inference_steps": 2})
            some = [plain.run(row.request(index, call))[0] for index in _SOME_STAGGERED]
            measured.warm_s = [statistics.fmean(some)]
            measured.notes["num_measured"] = len(some)
            yield measured
            continue
        measured.first_s, _, frames = plain.run(row.request(0, call))
        keep(args, row, args.side, frames)
        for index in budget.as_many(range(1, args.repeats + 1)):
            elapsed_s, step_ms, _ = plain.run(row.request(index, call))
            measured.warm_s.append(elapsed_s)
            measured.step_ms.append(step_ms)
        if args.side == "eager":
            measured.notes["step_tflop"] = step_tflop(plain.pipeline, plain.denoiser, row.request(0, call))
        yield measured


def _as_frames(output: Any) -> NDArray[np.uint8]:
    """(F, H, W, 3), of pictures, or of one video as floats."""
    first = output[0]
    if isinstance(first, np.ndarray):
        return (255 * first).round().astype(np.uint8)
    return np.stack([np.asarray(picture) for picture in output])
