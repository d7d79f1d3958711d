"""Keys of browsers: a cookie that counts for pages of this server only."""

from pathlib import Path

import httpx2
import pytest

from sgld.server.auth import Keys

from .fakes import Running, running
from .test_images import error_of


async def log_in(server: Running, key: str) -> httpx2.Response:
    return await server.http.post("/login", json={"key": key})


async def test_a_key_is_exchanged_for_a_cookie_that_pages_can_not_read(tmp_path: Path) -> None:
    async with running(tmp_path, api_key=("secret",)) as server:
        before = (await server.http.get("/login")).json()
        answer = await log_in(server, "secret")
        after = (await server.http.get("/login")).json()
        listed = await server.http.get("/v1/requests")

    assert (before["needs_key"], before["logged_in"], after["logged_in"]) == (True, False, True)
    cookie = answer.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
    assert "secret" not in cookie
    assert listed.status_code == 200


async def test_a_wrong_key_gets_none(tmp_path: Path) -> None:
    async with running(tmp_path, api_key=("secret",)) as server:
        answer = await log_in(server, "Secret")

    assert answer.status_code == 401
    assert error_of(answer)["code"] == "invalid_api_key"
    assert "set-cookie" not in answer.headers


async def test_without_keys_there_is_nothing_to_do(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        state = (await server.http.get("/login")).json()

    assert state == {"needs_key": False, "logged_in": True}


async def test_a_browser_can_be_logged_out(tmp_path: Path) -> None:
    async with running(tmp_path, api_key=("secret",)) as server:
        await log_in(server, "secret")
        await server.http.delete("/login")
        listed = await server.http.get("/v1/requests")

    assert listed.status_code == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "{own}"}, 200),
        ({"origin": "http://127.0.0.1:1"}, 401),
        ({}, 401),
        ({"origin": "http://127.0.0.1:1", "authorization": "Bearer secret"}, 200),
    ],
)
async def test_the_cookie_changes_nothing_for_pages_of_others(
    tmp_path: Path, headers: dict[str, str], status: int
) -> None:
    async with running(tmp_path, api_key=("secret",)) as server:
        await log_in(server, "secret")
        own = {name: value.format(own=server.url) for name, value in headers.items()}
        answer = await server.http.post("/v1/images/generations", json={"prompt": "a cat"}, headers=own)

    assert answer.status_code == status


async def test_pages_of_others_can_not_read_with_the_cookie(tmp_path: Path) -> None:
    async with running(tmp_path, api_key=("secret",)) as server:
        await log_in(server, "secret")
        answer = await server.http.get("/v1/requests", headers={"sec-fetch-site": "same-site"})

    assert answer.status_code == 401


def test_cookies_are_as_good_as_their_keys() -> None:
    keys = Keys(["one", "two"])

    assert keys.owner_of_cookie(keys.cookie("two")) == keys.owner("two")
    assert keys.owner_of_cookie("two") is None
    assert Keys(["three"]).owner_of_cookie(keys.cookie("two")) is None
