"""Lines of the log as JSON."""

import logging

import msgspec
import pytest

from sgld.logs import JsonFormatter, request_id_var


def line(record: logging.LogRecord) -> dict[str, object]:
    return msgspec.json.decode(JsonFormatter().format(record), type=dict[str, object])


def record(message: str, **extra: object) -> logging.LogRecord:
    return logging.makeLogRecord({"name": "sgld.server.edge", "levelname": "INFO", "msg": message, **extra})


def test_a_line_has_the_id_of_its_request() -> None:
    token = request_id_var.set("req_1")
    try:
        found = line(record("GET /health", fields={"status": 200}))
    finally:
        request_id_var.reset(token)

    assert found.pop("time")
    assert found == {
        "level": "info",
        "logger": "sgld.server.edge",
        "message": "GET /health",
        "request_id": "req_1",
        "status": 200,
    }


def test_an_exception_is_in_its_line() -> None:
    with pytest.raises(RuntimeError) as caught:
        raise RuntimeError("a\nb")
    formatted = JsonFormatter().format(record("it broke", exc_info=(caught.type, caught.value, caught.tb)))

    assert "\n" not in formatted
    assert "RuntimeError: a" in msgspec.json.decode(formatted)["exception"]
