"""`sgld serve` itself, killed in the middle of its work."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil  # type: ignore[import-untyped]
import pytest

from sgld.config import EMBEDDED_VIDEO_MODEL

pytestmark = pytest.mark.long
TIMEOUT_S = 200
NUM_JOBS = 20
SMALL = {"size": "64x64", "num_frames": 5, "num_inference_steps": 2, "partial_images": 0}


@contextmanager
def sgld_serve(
    folder: Path, model: str = EMBEDDED_VIDEO_MODEL
) -> Iterator[tuple[subprocess.Popen[str], httpx2.Client]]:
    """A server with a model that ships, by default the one for videos, and a client of it."""
    argv = [sys.executable, "-m", "sgld_cli", "serve", "--model-path", model, "--device", "cpu"]
    argv += ["--port", "0", "--data-dir", str(folder), "--max-running-requests", "3"]
    with (
        (folder / "log").open("a") as log,
        subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=log, text=True) as process,
    ):
        assert process.stderr is not None
        try:
            found = re.search(r"http://\S+", process.stderr.readline())
            assert found, process.stderr.read()
            with httpx2.Client(base_url=found[0], timeout=TIMEOUT_S) as client:
                yield process, client
        finally:
            process.kill()


def wait_for(client: httpx2.Client, is_enough: Any) -> list[dict[str, Any]]:
    """The videos, once they are as they should be."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        videos: list[dict[str, Any]] = client.get("/v1/videos", params={"limit": 100}).json()["data"]
        if is_enough([video["status"] for video in videos]):
            return videos
        # The newest come first. An event stream ends with its video: a wait for the oldest.
        unfinished = [video["id"] for video in videos if video["status"] in ("queued", "in_progress")]
        assert unfinished, [video["error"] for video in videos]
        client.get(f"/v1/videos/{unfinished[-1]}/events")
    raise AssertionError([video["status"] for video in videos])


def test_a_server_that_is_killed_in_the_middle_of_20_jobs_does_each_once(tmp_path: Path) -> None:
    with sgld_serve(tmp_path) as (process, client):
        made = [
            client.post("/v1/videos", json={"prompt": "a red circle", "seed": seed, **SMALL}).json()["id"]
            for seed in range(NUM_JOBS)
        ]
        before = wait_for(client, lambda states: states.count("completed") >= 5 and "in_progress" in states)
        niceness = [rank.nice() - psutil.Process().nice() for rank in psutil.Process(process.pid).children()]
        process.send_signal(signal.SIGKILL)
        process.wait(TIMEOUT_S)
    with sgld_serve(tmp_path) as (_, client):
        after = wait_for(client, lambda states: states.count("completed") == NUM_JOBS)
        sizes = [len(client.get(video["url"]).content) for video in after]

    unfinished = [video for video in before if video["status"] != "completed"]
    assert unfinished
    # The front goes first where the rank keeps the CPU busy.
    assert 5 in niceness
    assert [video["id"] for video in after] == made[::-1]
    assert sorted(video["seed"] for video in after) == list(range(NUM_JOBS))
    assert min(sizes) > 1000
    done = {video["id"]: video for video in after}
    # What was finished wasn't done again.
    for video in before:
        if video["status"] == "completed":
            assert done[video["id"]]["completed_at"] == video["completed_at"]
