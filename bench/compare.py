"""How much faster is sgld than plain diffusers, on the same model, weights, seeds and GPU, in one run?

    python bench/compare.py --out bench/results/compare_gpu [--rows flux-256 ...] [--sides eager compiled sgld http]

Models of real size with random weights are made (bench/real_models.py), then each side measures in a process of its
own (bench/sides.py says what the sides are). First requests are told apart; of the others the median counts, each with
a prompt and a seed of its own. Times are those of whole requests up to pictures or frames in memory; of HTTP requests
up to the PNG at the client. The report is written whenever something is known. `--tiny --device cpu` tries it out.
"""

import argparse
import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import reports
from compared import PAIRS, text
from real_models import MODELS
from rows import CHOSEN, ROWS, Row
from sides import SIDES

HERE = Path(__file__).parent
_LEAVE_S = 30.0
# The models in this order, each in turns; the folder of one is gone before the next is made.
_ORDER = ("flux", "sdxl", "wan", "qwen-image", "z-image", "sd3.5-medium")


class Comparison:
    """What is known so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._environment = dict(os.environ)
        self._began = time.monotonic()
        self.report: dict[str, Any] = {
            "command": reports.command(),
            **reports.where(args.device),
            "options": json.loads(args.options),
            "models": [],
            "measured": [],
            "starts": [],
            "decisions": {},
            "pictures": {},
            "settling": [],
            "problems": [],
        }

    def model(self, name: str, rows: Sequence[Row]) -> None:
        """Make the model, measure its rows, and remove it."""
        root = self._args.models / name
        made = [str(HERE / "real_models.py"), str(self._args.models), name, "--device", self._args.device]
        with tempfile.TemporaryDirectory() as temporary:
            try:
                for line in self._lines(made, "make", name, self._args.limit_s):
                    self.report["models"].append(line)
                for side in self._args.sides:
                    self._side(side, name, root, Path(temporary), rows)
                    self._compare_pictures(Path(temporary), rows)
                    self.write()
            finally:
                shutil.rmtree(root, ignore_errors=True)

    def _side(self, side: str, name: str, root: Path, pictures: Path, rows: Sequence[Row]) -> None:
        chosen = [row.name for row in rows if (row.kind == "http") == (side == "http")]
        if not chosen or (side == "max-autotune" and name != "sdxl"):
            return
        args = [str(HERE / "sides.py"), side, name, str(root), str(pictures), *chosen, "--device", self._args.device]
        args += ["--repeats", str(self._args.repeats), "--settle-s", str(self._args.settle_s)]
        args += ["--options", self._args.options]
        for line in self._lines(args, side, name, self._args.limit_s):
            for kind, value in line.items():
                if kind == "decisions":
                    self.report["decisions"][name] = value
                else:
                    self.report[{"measured": "measured", "start": "starts", "settling": "settling"}[kind]].append(value)
            self.write()

    def _lines(self, args: Sequence[str], what: str, name: str, limit_s: float) -> Iterator[Any]:
        """What a process of its own says, a JSON value for each line; it is ended when it is late."""
        with tempfile.TemporaryDirectory() as caches, tempfile.TemporaryFile("w+") as log:
            environment = {**self._environment, "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor"}
            environment |= {"TRITON_CACHE_DIR": f"{caches}/triton", "SGLANG_DIFFUSION_CACHE_ROOT": f"{caches}/sgld"}
            extra = ["--tiny"] if self._args.tiny else []
            command = [sys.executable, "-W", "ignore", *args, *extra]
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, start_new_session=True
            )
            lines: queue.Queue[str | None] = queue.Queue()
            threading.Thread(target=_forward, args=(process, lines), daemon=True).start()
            deadline = time.monotonic() + limit_s
            try:
                while (line := lines.get(timeout=max(deadline - time.monotonic(), 0.001))) is not None:
                    print(f"{time.monotonic() - self._began:6.1f} s {name} {what}: {line.strip()[:400]}", flush=True)
                    if line.startswith("{"):
                        yield json.loads(line)
                process.wait(_LEAVE_S)
            except queue.Empty:
                self._problem(name, what, f"not done after {limit_s:.0f} s")
            finally:
                # With its children, among which may be a server.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.returncode:
                log.seek(0)
                self._problem(name, what, f"code {process.returncode}: {log.read()[-1500:]}")

    def _problem(self, name: str, what: str, text: str) -> None:
        self.report["problems"].append(f"{name}, {what}: {text}")
        print(self.report["problems"][-1], flush=True)

    def _compare_pictures(self, folder: Path, rows: Sequence[Row]) -> None:
        for row in rows:
            found = {file.name.split(".npy")[0].rpartition(".")[2]: file for file in folder.glob(f"{row.name}.*.npy")}
            for one, other in PAIRS:
                if {one, other} <= found.keys():
                    error = relative_error(np.load(found[one]), np.load(found[other]))
                    self.report["pictures"].setdefault(row.name, {})[f"{one} to {other}"] = round(error, 5)

    def write(self) -> None:
        if self._args.out:
            self._args.out.parent.mkdir(parents=True, exist_ok=True)
            reports.write(self._args.out, self.report, text(self.report))


def _forward(process: "subprocess.Popen[str]", lines: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def relative_error(one: Any, other: Any) -> float:
    """In the L2 norm, of pixels in [-1, 1]."""
    a, b = (value.astype(np.float32) / 127.5 - 1 for value in (one, other))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(CHOSEN))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["eager", "compiled", "sgld", "http"])
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--settle-s", type=float, default=30.0, help="requests of sgld that aren't measured, seconds")
    parser.add_argument("--limit-s", type=float, default=600.0, help="seconds that a side may take for a model")
    parser.add_argument("--options", default="{}", help="JSON: options of sgld, as of its config file")
    parser.add_argument("--models", type=Path, default=Path("/dev/shm/sgld-bench"), help="where models are made")
    parser.add_argument("--tiny", action="store_true", help="models with next to no layers, to try the script")
    parser.add_argument("--out", type=Path, help="writes FILE.json and FILE.md")
    args = parser.parse_args()
    comparison = Comparison(args)
    chosen = [ROWS[name] for name in args.rows]
    for name in _ORDER:
        rows = [row for row in chosen if row.model == name]
        if rows:
            comparison.model(name, rows)
    comparison.write()
    print(text(comparison.report))


if __name__ == "__main__":
    assert set(_ORDER) == set(MODELS)
    main()
