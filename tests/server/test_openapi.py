"""/openapi.json says what the server does."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from sgld.config import ServerConfig
from sgld.server import openapi, pages
from sgld.server.app import ROUTES
from sgld.server.events import Snapshot
from sgld.server.previews import PreviewEvent
from sgld.server.request_fields import SAMPLING_FIELDS
from sgld.server.schemas import ImageOptions
from sgld.server.specs import SPECS
from sgld.server.stats import ServerStats
from sgld.server.status import RequestProgress, RequestStatus
from sgld.server.watcher import EVENT_NAMES

from .fakes import running
from .test_events import listening
from .test_serve import program

PAGES = {pages.dashboard, pages.docs, pages.asset, openapi.openapi}
PHASES = "examples,coverage,fuzzing"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_every_route_is_in_it() -> None:
    missing = [route.path for route in ROUTES if route.endpoint not in {*SPECS, *PAGES}]
    document = openapi.document(ROUTES, ServerConfig())
    num_operations = sum(len(methods) for methods in document["paths"].values())

    assert missing == []
    assert num_operations == sum(route.endpoint not in PAGES for route in ROUTES)


def test_every_field_of_a_request_is_in_it() -> None:
    fields = openapi.document(ROUTES, ServerConfig())["components"]["schemas"]["ImageGeneration"]["properties"]

    assert {*SAMPLING_FIELDS, *ImageOptions.__struct_fields__} <= set(fields)


def test_all_types_that_are_referred_to_are_there() -> None:
    document = openapi.document(ROUTES, ServerConfig())
    text = msgspec.json.encode(document).decode()
    names = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}

    assert names <= set(document["components"]["schemas"])
    assert all(operation["summary"] for methods in document["paths"].values() for operation in methods.values())


async def test_it_can_be_read_without_a_key(tmp_path: Path) -> None:
    async with running(tmp_path, api_key=("secret",)) as server:
        answer = await server.http.get("/openapi.json")

    assert answer.content == msgspec.json.encode(openapi.document(ROUTES, server.services.config))


async def test_limits_of_the_server_are_in_it(tmp_path: Path) -> None:
    async with running(tmp_path, max_steps=7) as server:
        schemas = (await server.http.get("/openapi.json")).json()["components"]["schemas"]

    for name in ("ImageGeneration", "ImageEdit", "VideoGeneration", "VideoUpload"):
        assert schemas[name]["properties"]["num_inference_steps"]["maximum"] == 7


async def test_events_are_what_it_says(tmp_path: Path) -> None:
    """Of the stream that doesn't end, which no tool can try."""
    types = {"snapshot": Snapshot, "request.preview": PreviewEvent, "server.stats": ServerStats}
    found = []
    async with running(tmp_path) as server, listening(server) as events:
        await server.post(prompt="a cat", num_previews=1, num_inference_steps=2, wait=False)
        while "request.completed" not in found or "server.stats" not in found:
            name, data = await events.next()
            found.append(name)
            kind = types.get(name, RequestProgress if name == "request.progress" else RequestStatus)
            struct = msgspec.convert(data, kind)
            assert data.keys() == {field for field in struct.__struct_fields__ if field in data}

    assert {"snapshot", *found} <= {"snapshot", *EVENT_NAMES}
    assert "request.preview" in found


@pytest.mark.schema
def test_answers_are_what_it_says(tmp_path: Path) -> None:
    pytest.importorskip("schemathesis")
    # These streams don't end.
    excluded = ["--exclude-path", "/v1/events"]
    with program(tmp_path) as (process, url):
        argv = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", *excluded]
        limits = [
            "--max-examples",
            "15",
            "--seed",
            "1",
            "--request-timeout",
            "20",
            "--phases",
            PHASES,
            # They are about how fast examples are found, not about the answers.
            "--suppress-health-check",
            "all",
        ]
        done = subprocess.run([*argv, "--checks", CHECKS, *limits], capture_output=True, text=True, cwd=tmp_path)

        assert done.returncode == 0, done.stdout[-8000:]
        assert process.poll() is None
