"""`sgld serve` in processes of its own, for benches that ask over HTTP."""

import asyncio
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx2
import msgspec
from stuck import show_stacks

ROOT = Path(__file__).parents[1]
_POLL_S = 0.05
CACHES = ("SGLANG_DIFFUSION_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
"""Variables that name folders of what is kept between starts."""


class _Picture(msgspec.Struct):
    b64_json: bytes


class _Answer(msgspec.Struct):
    """What is read of an answer to a request for pictures."""

    data: list[_Picture]


@dataclass(frozen=True)
class Server:
    """Where it listens, when its process was started, by time.monotonic(), and which that is."""

    url: str
    started_at: float
    pid: int
    log: IO[str]

    def said(self) -> str:
        """Its log."""
        self.log.seek(0)
        return self.log.read()

    def client(self) -> httpx2.AsyncClient:
        limits = httpx2.Limits(max_connections=None)
        return httpx2.AsyncClient(base_url=self.url, timeout=None, limits=limits, trust_env=False)


@asynccontextmanager
async def serving(
    folder: Path, flags: Sequence[str], environment: Mapping[str, str] | None = None
) -> AsyncIterator[Server]:
    """Start it; its jobs are kept in the folder. It is told to leave in the end."""
    everything = ("-m", "sgld_cli", "serve", "--port", "0", "--data-dir", str(folder / "data"), *flags)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryFile("a+") as log:
        started_at = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *everything,
            stdout=log,
            stderr=log,
            env={**os.environ, **(environment or {}), "PYTHONPATH": path},
        )
        try:
            yield Server(await _address(process, log), started_at, process.pid, log)
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            await process.wait()


async def _address(process: asyncio.subprocess.Process, log: IO[str]) -> str:
    while True:
        log.seek(0)
        said = log.read()
        found = re.search(r"https?://[^\s]+:\d+", said)
        if found:
            return found[0]
        if process.returncode is not None:
            raise RuntimeError(f"sgld serve ended with code {process.returncode}: {said[-2000:]}")
        await asyncio.sleep(_POLL_S)


async def ready_s(server: Server, http: httpx2.AsyncClient, limit_s: float = 600.0) -> float:
    """Seconds from the start of the process until its model is loaded.

    :raises RuntimeError: it isn't after so many, and says what its processes do; or it is gone.
    """
    while True:
        try:
            answer = await http.get("/health")
        except httpx2.TransportError as error:
            raise RuntimeError(f"sgld serve is gone:\n{server.said()[-6000:]}") from error
        if answer.status_code == 200:
            return time.monotonic() - server.started_at
        if answer.status_code != 503:
            answer.raise_for_status()
        if time.monotonic() > server.started_at + limit_s:
            show_stacks(server.pid)
            raise RuntimeError(f"sgld serve isn't ready after {limit_s:g} s:\n{server.said()[-6000:]}")
        await asyncio.sleep(_POLL_S)


def image_body(request: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling params as a body of /v1/images/generations."""
    others = {key: value for key, value in request.items() if key not in ("height", "width")}
    return {**others, "size": f"{request['width']}x{request['height']}", "response_format": "b64_json"}


async def picture(http: httpx2.AsyncClient, request: Mapping[str, Any]) -> bytes:
    """Ask for a picture and wait for it.

    :raises httpx2.HTTPStatusError: it was refused, or failed.
    """
    answer = await http.post("/v1/images/generations", json=image_body(request))
    if answer.status_code != 200:
        raise httpx2.HTTPStatusError(answer.text[:500], request=answer.request, response=answer)
    # The bench measures the server: the standard library takes four times as long as this.
    return msgspec.json.decode(answer.content, type=_Answer).data[0].b64_json
