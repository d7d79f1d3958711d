from pathlib import Path

import pytest

from sgld.config import ServerConfig
from sgld.server.auth import Keys, is_loopback, read_keys

from .fakes import running
from .test_images import error_of


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "headers", [{}, bearer("wrong"), {"authorization": "Basic b25lOg=="}, {"authorization": "Bearer"}]
)
async def test_without_a_key_there_is_no_answer(tmp_path: Path, headers: dict[str, str]) -> None:
    async with running(tmp_path, api_key=("one", "two")) as server:
        answer = await server.http.get("/v1/models", headers=headers)

    assert answer.status_code == 401
    assert error_of(answer)["type"] == "authentication_error"


async def test_probes_need_no_key(tmp_path: Path) -> None:
    async with running(tmp_path, api_key=("one",)) as server:
        statuses = [(await server.http.get(path)).status_code for path in ("/health", "/liveness", "/health_generate")]

    assert statuses == [200, 200, 401]


async def test_a_key_sees_only_its_own_pictures(tmp_path: Path) -> None:
    async with running(tmp_path, api_key=("one", "two")) as server:
        body = {"prompt": "a cat"}
        answer = await server.http.post("/v1/images/generations", json=body, headers=bearer("one"))
        path = f"/v1/images/{answer.json()['id']}"
        others = [(await server.http.request(method, path, headers=bearer("two"))) for method in ("GET", "DELETE")]
        content = await server.http.get(f"{path}/content", headers=bearer("two"))
        own = await server.http.get(f"{path}/content", headers=bearer("one"))

    assert [other.status_code for other in [*others, content]] == [404, 404, 404]
    assert own.status_code == 200


def test_keys_come_from_flags_and_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\ntwo\n\n three \n")

    assert read_keys(ServerConfig(api_key=("one",), api_key_file=str(file))) == ("one", "two", "three")


@pytest.mark.parametrize("content", ["", "# none\n", "ab cd\n", "schlüssel\n"])
def test_key_files_without_usable_keys_are_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content)

    with pytest.raises(ValueError, match="key"):
        read_keys(ServerConfig(api_key_file=str(file)))


def test_an_owner_does_not_tell_the_key() -> None:
    keys = Keys(["one", "two"])

    assert keys.owner("three") is None
    assert keys.owner("one") != keys.owner("two")
    assert "one" not in str(keys.owner("one"))


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:30000", "", "[::1"])
async def test_other_hosts_are_refused_on_loopback(tmp_path: Path, host: str) -> None:
    async with running(tmp_path) as server:
        answer = await server.http.get("/v1/models", headers={"host": host})

    assert answer.status_code == 403
    assert error_of(answer)["code"] == "forbidden_host"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "[::1]:30000", "proxy.example"])
async def test_own_hosts_are_served(tmp_path: Path, host: str) -> None:
    async with running(tmp_path, allowed_hosts=("proxy.example",)) as server:
        answer = await server.http.get("/v1/models", headers={"host": host})

    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("origin", "origins", "status"),
    [
        ("https://evil.example", (), 403),
        ("null", (), 403),
        ("http://localhost:30000", (), 200),
        ("https://good.example", ("https://good.example",), 200),
        ("https://evil.example", ("https://good.example",), 403),
        ("https://evil.example", ("*",), 200),
    ],
)
async def test_pages_of_others_are_refused_on_loopback(
    tmp_path: Path, origin: str, origins: tuple[str, ...], status: int
) -> None:
    async with running(tmp_path, cors_origins=origins) as server:
        answer = await server.http.get("/v1/models", headers={"origin": origin})

    assert answer.status_code == status
    assert ("access-control-allow-origin" in answer.headers) == (status == 200 and bool(origins))


def test_loopback_addresses() -> None:
    assert [is_loopback(host) for host in ("localhost", "127.0.0.2", "::1", "0.0.0.0", "example.com")] == [
        True, True, True, False, False,
    ]  # fmt: skip
