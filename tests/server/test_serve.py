"""A server from its start to its end."""

import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import httpx2
import msgspec
import pytest

from sgld.config import ServerConfig
from sgld.engine.statistics import MergeStatistics
from sgld.server.serve import listen

from .fakes import NOTHING, TIMEOUT_S, FakeEngine, running
from .test_images import error_of

HANGING = {"prompt": "hang", "stream": True}


@contextmanager
def program(folder: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`sgld serve` in a process of its own, and its URL."""
    argv = [sys.executable, "-m", "tests.server.program", "--port", "0", "--data-dir", str(folder), *flags]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stderr is not None
        try:
            found = re.search(r"http://\S+", process.stderr.readline())
            assert found, process.stderr.read()
            yield process, found[0]
        finally:
            process.kill()


def hanging(url: str, client: httpx2.Client) -> httpx2.Response:
    """A stream of a request that never ends."""
    request = client.build_request("POST", f"{url}/v1/images/generations", json=HANGING)
    return client.send(request, stream=True)


def test_sigterm_ends_open_streams_in_time(tmp_path: Path) -> None:
    """By default it would wait for the stream for 30 seconds."""
    with program(tmp_path, "--shutdown-timeout-s", "0.2") as (process, url), httpx2.Client(timeout=TIMEOUT_S) as client:
        response = hanging(url, client)
        process.send_signal(signal.SIGTERM)
        code = process.wait(25)
        text = response.read().decode()

        assert '"code":"shutting_down"' in text
        assert code == 0
        assert process.stderr is not None
        log = process.stderr.read()
        assert "leaving; requests on their way: 1, for 0.2 s at most" in log
        assert "Traceback" not in log


def test_a_second_signal_waits_for_nobody(tmp_path: Path) -> None:
    with (
        program(tmp_path, "--shutdown-timeout-s", "1000") as (process, url),
        httpx2.Client(timeout=TIMEOUT_S) as client,
    ):
        hanging(url, client)
        process.send_signal(signal.SIGINT)
        with client.stream("GET", f"{url}/health") as answer:
            assert answer.status_code == 503
        process.send_signal(signal.SIGINT)

        assert process.wait(TIMEOUT_S) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


async def test_requests_that_run_may_end_and_new_ones_are_refused(tmp_path: Path) -> None:
    engine = FakeEngine()
    answers: list[httpx2.Response] = []

    async with running(tmp_path, engine, shutdown_timeout_s=TIMEOUT_S) as server, anyio.create_task_group() as tasks:

        async def ask() -> None:
            answers.append(await server.post(prompt="wait"))

        tasks.start_soon(ask)
        await engine.hanging.wait()
        server.services.stopping.set()
        await anyio.wait_all_tasks_blocked()
        refused = await server.post(prompt="a cat")
        health = await server.http.get("/health")
        engine.go.set()

    assert [answer.status_code for answer in answers] == [200]
    assert (refused.status_code, error_of(refused)["code"]) == (503, "shutting_down")
    assert refused.headers["retry-after"]
    assert health.status_code == 503


async def test_clients_wait_for_the_model(tmp_path: Path) -> None:
    engine = FakeEngine(is_ready=False)
    async with running(tmp_path, engine) as server:
        health = await server.http.get("/health")
        alive = await server.http.get("/liveness")
        picture = await server.post(prompt="a cat")

    assert (health.status_code, alive.status_code, picture.status_code) == (503, 200, 200)
    assert error_of(health)["code"] == "loading"


@pytest.mark.parametrize(
    ("prompt", "status"), [("a red circle", 200), ("fail out_of_memory", 503), ("fail invalid_request", 200)]
)
async def test_health_generate_makes_a_picture(
    tmp_path: Path, prompt: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sgld.sampling_params import SamplingParams

    monkeypatch.setattr("sgld.server.info._PROBE", SamplingParams(prompt=prompt))
    async with running(tmp_path) as server:
        answer = await server.http.get("/health_generate")

    assert answer.status_code == status
    assert [params.prompt for params in server.engine.params] == [prompt]


async def test_server_info_has_the_layout_and_the_merging_and_tells_no_secrets(tmp_path: Path) -> None:
    engine = FakeEngine()
    merging = {"unet": MergeStatistics(mode="exclusive", reason="its processors were exchanged")}
    engine.counted = msgspec.structs.replace(NOTHING, merging=merging)
    async with running(tmp_path, engine, api_key=("secret",)) as server:
        answer = await server.http.get("/server_info", headers={"authorization": "Bearer secret"})

    assert answer.json()["status"] == "ready"
    assert answer.json()["limits"]["max_outputs"] == 10
    assert answer.json()["layout"] == "1 = dp 1 x cfg 1 x sp 1 (ulysses 1 x ring 1) x tp 1"
    assert answer.json()["merging"] == {"unet": {"mode": "exclusive", "reason": "its processors were exchanged"}}
    assert "secret" not in answer.text


async def test_an_upload_that_is_refused_leaves_other_streams_of_its_connection_alone(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with (
        running(tmp_path, engine, max_body_bytes=100_000) as server,
        httpx2.AsyncClient(base_url=server.url, http1=False, http2=True, timeout=TIMEOUT_S) as client,
        client.stream("POST", "/v1/images/generations", json={"prompt": "wait", "stream": True}) as stream,
    ):
        assert stream.http_version == "HTTP/2"
        body = b"x" * 200_000
        too_large = await client.post("/v1/images/edits", content=body)
        no_method = await client.post("/v1/models", content=body[:90_000])
        unchecked = await client.post("/v1/images/edits", content=_pieces(body))
        engine.go.set()
        text = (await stream.aread()).decode()

    assert (too_large.status_code, no_method.status_code, unchecked.status_code) == (413, 405, 415)
    assert error_of(too_large)["code"] == "request_too_large"
    assert "image_generation.completed" in text


@pytest.mark.parametrize("protocol", ["--http1.1", "--http2-prior-knowledge"])
async def test_who_asks_before_it_uploads_is_answered(tmp_path: Path, protocol: str) -> None:
    (tmp_path / "large").write_bytes(b"x" * 3_000_000)
    async with running(tmp_path, max_body_bytes=1000) as server:
        # For so much curl expects a "100 Continue" first, and stops when it sees an error.
        words = ["curl", protocol, "--silent", "--max-time", "8", "-F", "image=@large", f"{server.url}/v1/images/edits"]
        done = await anyio.run_process(words, cwd=tmp_path)

    assert b'"code":"request_too_large"' in done.stdout


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    yield body


async def test_a_connection_outlives_a_thousand_requests(tmp_path: Path) -> None:
    async with (
        running(tmp_path) as server,
        httpx2.AsyncClient(base_url=server.url, http1=False, http2=True, timeout=TIMEOUT_S) as client,
    ):
        statuses = {(await client.get("/liveness")).status_code for _ in range(1100)}

    assert statuses == {200}


async def test_a_body_without_length_is_cut_off_at_the_limit(tmp_path: Path) -> None:
    async with running(tmp_path, max_body_bytes=1000) as server:
        headers = {"content-type": "application/json"}
        answer = await server.http.post("/v1/images/generations", content=_pieces(b" " * 2000), headers=headers)

    assert answer.status_code == 413
    assert error_of(answer)["code"] == "request_too_large"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("PUT", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/images/img_../content", 404, "not_found"),
        ("GET", "/v1/images/img_" + "0" * 32 + "/content", 404, "not_found"),
    ],
)
async def test_the_router_answers_in_the_same_shape(
    tmp_path: Path, method: str, path: str, status: int, code: str
) -> None:
    async with running(tmp_path) as server:
        answer = await server.http.request(method, path)

    assert (answer.status_code, error_of(answer)["code"]) == (status, code)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'"a"', b"\xff"])
async def test_bodies_that_are_no_object_are_refused(tmp_path: Path, body: bytes) -> None:
    async with running(tmp_path) as server:
        headers = {"content-type": "application/json"}
        answer = await server.http.post("/v1/images/generations", content=body, headers=headers)

    assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_value")


async def test_a_clients_request_id_is_kept_if_it_can_be_logged(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        own = await server.http.get("/liveness", headers={"x-request-id": "abc-1"})
        other = await server.http.get("/liveness", headers={"x-request-id": "a b"})

    assert own.headers["x-request-id"] == "abc-1"
    assert other.headers["x-request-id"].startswith("req_")


def test_an_address_in_use_is_an_error_before_a_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        listen(ServerConfig(port=taken.getsockname()[1], data_dir=str(tmp_path)))


@pytest.mark.parametrize("files", [{"ssl_certfile": "a.pem"}, {"ssl_keyfile": "a.pem"}])
def test_a_certificate_needs_its_key(tmp_path: Path, files: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="belong together"):
        listen(ServerConfig(port=0, data_dir=str(tmp_path), **files))  # type: ignore[arg-type]
