"""/openapi.json says what the server does."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from sgld.server import openapi, pages
from sgld.server.app import ROUTES
from sgld.server.schemas import SAMPLING_FIELDS, ImageOptions

from .fakes import running
from .test_serve import program

PAGES = {pages.dashboard, pages.docs, pages.asset, openapi.openapi}
PHASES = "examples,coverage,fuzzing"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_every_route_is_in_it() -> None:
    missing = [route.path for route in ROUTES if route.endpoint not in {*openapi.SPECS, *PAGES}]
    document = openapi.document(ROUTES)
    num_operations = sum(len(methods) for methods in document["paths"].values())

    assert missing == []
    assert num_operations == sum(route.endpoint not in PAGES for route in ROUTES)


def test_every_field_of_a_request_is_in_it() -> None:
    fields = openapi.document(ROUTES)["components"]["schemas"]["ImageGeneration"]["properties"]

    assert {*SAMPLING_FIELDS, *ImageOptions.__struct_fields__} <= set(fields)


def test_all_types_that_are_referred_to_are_there() -> None:
    document = openapi.document(ROUTES)
    text = msgspec.json.encode(document).decode()
    names = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}

    assert names <= set(document["components"]["schemas"])
    assert all(operation["summary"] for methods in document["paths"].values() for operation in methods.values())


async def test_it_can_be_read_without_a_key(tmp_path: Path) -> None:
    async with running(tmp_path, api_key=("secret",)) as server:
        answer = await server.http.get("/openapi.json")

    assert answer.content == msgspec.json.encode(openapi.document(ROUTES))


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
            "examples,coverage,fuzzing",
        ]
        done = subprocess.run([*argv, "--checks", CHECKS, *limits], capture_output=True, text=True, cwd=tmp_path)

        assert done.returncode == 0, done.stdout[-8000:]
        assert process.poll() is None
