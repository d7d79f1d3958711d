"""LoRA adapters over HTTP."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from sgld.engine.statistics import ReplicaStatistics
from sgld.media.metadata import read_metadata
from sgld.messages import LorasHeld
from sgld.sampling_params import LoraChoice

from .fakes import FakeEngine, Running, running
from .test_edits import png

OK = {"status": "ok"}


async def ask(server: Running, path: str, status: int = 200, **body: Any) -> Any:
    answer = await server.http.post(f"/v1/{path}", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


async def listed(server: Running) -> dict[str, Any]:
    answer: dict[str, Any] = (await server.http.get("/v1/list_loras")).json()
    return answer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with adapters, which clients may name."""
    made = tmp_path / "adapters"
    made.mkdir()
    for name in ("a", "b", "bad"):
        (made / f"{name}.safetensors").write_text("")
    return made


async def test_adapters_are_set_switched_listed_and_unloaded(tmp_path: Path, folder: Path) -> None:
    paths = [str(folder / f"{name}.safetensors") for name in "ab"]
    async with running(tmp_path, allow_path=(str(folder),)) as server:
        assert await listed(server) == {"loaded_adapters": [], "active": {}}
        done = await ask(server, "set_lora", lora_nickname=["a", "b"], lora_path=paths, strength=[0.5, 1.0])
        assert done.items() >= OK.items()
        both = await listed(server)
        assert [adapter["nickname"] for adapter in both["loaded_adapters"]] == ["a", "b"]
        assert both["loaded_adapters"][0]["path"] == paths[0]
        first = both["active"]["transformer"][0]
        assert (first["nickname"], first["nicknames"], first["strength"], first["merged"]) == ("a", ["a"], 0.5, False)

        await server.post(prompt="x")
        await ask(server, "unmerge_lora_weights")
        assert (await listed(server))["active"] == {}
        await server.post(prompt="x")
        await ask(server, "merge_lora_weights", strength=2.0)
        await server.post(prompt="x")
        await ask(server, "unload_lora", lora_nickname="a")
        assert (await server.http.delete("/v1/loras/b")).json()["status"] == "ok"
        assert await listed(server) == {"loaded_adapters": [], "active": {}}
        got = [[(choice.nickname, choice.scale) for choice in params.lora or ()] for params in server.engine.params]
    assert got == [[("a", 0.5), ("b", 1.0)], [], [("a", 2.0), ("b", 2.0)]]


async def test_a_nickname_that_was_loaded_can_be_set_again_without_a_path(tmp_path: Path, folder: Path) -> None:
    path = str(folder / "a.safetensors")
    async with running(tmp_path, allow_path=(str(folder),)) as server:
        await ask(server, "set_lora", lora_nickname="a", lora_path=path, target="transformer", lora_alpha=4)
        await ask(server, "set_lora", lora_nickname="a", strength=0.3, target="transformer")
        await server.post(prompt="x")
        assert server.engine.params[-1].lora == (
            LoraChoice(nickname="a", path=path, scale=0.3, target="transformer", alpha=4),
        )
        error = (await ask(server, "set_lora", 400, lora_nickname="other"))["error"]
        assert "there is no LoRA adapter 'other'; there are a" in error["message"]


async def test_requests_choose_by_nickname_or_path(tmp_path: Path, folder: Path) -> None:
    path = str(folder / "b.safetensors")
    async with running(tmp_path, allow_path=(str(folder),)) as server:
        await ask(server, "set_lora", lora_nickname="a", lora_path=str(folder / "a.safetensors"))
        answer = await server.post(prompt="x", lora=[{"nickname": "a", "scale": 0.5}, {"path": path}])
        assert answer.status_code == 200, answer.text
        form = {"prompt": "x", "lora": f'[{{"path": "{path}"}}]'}
        answer = await server.http.post("/v1/images/edits", data=form, files={"image": ("a.png", png(), "image/png")})
        assert answer.status_code == 200, answer.text
        answer = await server.http.post("/v1/videos", json={"prompt": "x", "num_frames": 2, "lora": []})
        assert answer.status_code == 200, answer.text
        await server.engine.has_ended.wait()
        lora = [params.lora or () for params in server.engine.params[:2]]
    assert [(choice.nickname, choice.path, choice.scale) for choice in lora[0]] == [
        ("a", str(folder / "a.safetensors"), 0.5),
        (None, path, 1.0),
    ]
    assert [choice.path for choice in lora[1]] == [path]


async def test_a_request_that_is_sent_again_is_the_same_job_whatever_is_active_then(
    tmp_path: Path, folder: Path
) -> None:
    paths = [str(folder / f"{name}.safetensors") for name in "ab"]
    headers, body = {"idempotency-key": "k"}, {"prompt": "x"}
    async with running(tmp_path, allow_path=(str(folder),)) as server:
        await ask(server, "set_lora", lora_nickname="a", lora_path=paths[0])
        first = await server.http.post("/v1/images/generations", json=body, headers=headers)
        await ask(server, "set_lora", lora_nickname="b", lora_path=paths[1])
        again = await server.http.post("/v1/images/generations", json=body, headers=headers)
        got = [[choice.nickname for choice in params.lora or ()] for params in server.engine.params]

    assert again.json()["id"] == first.json()["id"]
    assert got == [["a"]]


async def test_a_job_that_came_while_none_were_active_has_none(tmp_path: Path, folder: Path) -> None:
    async with running(tmp_path, allow_path=(str(folder),)) as server:
        await server.http.post("/v1/images/generations", json={"prompt": "x"}, headers={"idempotency-key": "k"})
        assert [params.lora for params in server.engine.params] == [()]


async def test_files_say_which_adapters_made_them(tmp_path: Path, folder: Path) -> None:
    path = str(folder / "a.safetensors")
    async with running(tmp_path, allow_path=(str(folder),)) as server:
        await ask(server, "set_lora", lora_nickname="a", lora_path=path, strength=0.5)
        url = (await server.post(prompt="x", response_format="url")).json()["data"][0]["url"]
        (tmp_path / "a.png").write_bytes((await server.http.get(url)).content)
    assert read_metadata(tmp_path / "a.png")["params"]["lora"] == [{"nickname": "a", "path": path, "scale": 0.5}]


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ([{"path": "{outside}/x.safetensors"}], "is in none of the folders that this server reads"),
        ([{"path": "{folder}/../x.safetensors"}], "is in none of the folders that this server reads"),
        ([{"path": "{outside}:x.safetensors"}], "is in none of the folders that this server reads"),
        ([{"nickname": "a", "path": "{outside}/x.safetensors"}], "is in none of the folders"),
        ([{"path": "owner/name"}], "clients may not have any downloaded (--allow-lora-download)"),
        ([{"path": "owner/name:x.safetensors"}], "clients may not have any downloaded"),
        ([{"nickname": "other"}], "there is no LoRA adapter 'other'"),
        ([{"scale": 1.0}], "needs a nickname or a path"),
        ([{"nickname": "a", "scale": 1e9}], "<= 100"),
        ("a", "array"),
    ],
)
async def test_adapters_that_a_client_may_not_have_are_refused(
    tmp_path: Path, folder: Path, lora: Any, message: str
) -> None:
    (tmp_path / "x.safetensors").write_text("")
    if isinstance(lora, list):
        places = {"outside": str(tmp_path), "folder": str(folder)}
        lora = [{n: v.format(**places) if isinstance(v, str) else v for n, v in choice.items()} for choice in lora]
    async with running(tmp_path, allow_path=(str(folder),)) as server:
        answer = await server.post(prompt="x", lora=lora)
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]
        assert not server.engine.params


async def test_links_out_of_the_folder_are_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "x.safetensors").write_text("")
    (folder / "link.safetensors").symlink_to(tmp_path / "x.safetensors")
    async with running(tmp_path, allow_path=(str(folder),)) as server:
        answer = await server.post(prompt="x", lora=[{"path": str(folder / "link.safetensors")}])
    assert answer.status_code == 400


async def test_adapters_on_the_hub_may_be_allowed(tmp_path: Path) -> None:
    async with running(tmp_path, allow_lora_download=True) as server:
        answer = await server.post(prompt="x", lora=[{"path": "owner/name:x.safetensors"}])
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"lora_nickname": ["a", "b"], "lora_path": ["x"]}, "lora_path"),
        ({"lora_nickname": ["a", "b"], "lora_path": "x"}, "lora_path"),
        ({"lora_nickname": ["a"], "strength": [1.0, 2.0]}, "strength"),
        ({"lora_nickname": []}, "lora_nickname"),
        ({"lora_nickname": ["a", "a"]}, "lora_nickname"),
        ({"lora_nickname": "a", "lora_path": "{folder}/bad.safetensors"}, "lora_path"),
        ({"lora_nickname": "a", "lora_path": "{folder}/a.safetensors", "target": "unet"}, "target"),
        ({"lora_nickname": "a", "surprise": 1}, None),
    ],
)
async def test_what_can_not_be_set_is_refused(
    tmp_path: Path, folder: Path, fields: dict[str, Any], param: str | None
) -> None:
    fields = {n: v.format(folder=folder) if isinstance(v, str) else v for n, v in fields.items()}
    async with running(tmp_path, allow_path=(str(folder),)) as server:
        error = (await ask(server, "set_lora", 400, **fields))["error"]
        assert (await listed(server))["loaded_adapters"] == []
    assert param is None or error["param"] == param


async def test_what_is_not_there_is_not_switched_or_unloaded(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        assert "no LoRA adapter is set" in (await ask(server, "merge_lora_weights", 400))["error"]["message"]
        assert (await ask(server, "unmerge_lora_weights", 400, target="transformer"))["error"]["param"] == "target"
        assert (await ask(server, "unload_lora", 404, lora_nickname="a"))["error"]["code"] == "not_found"
        assert (await server.http.delete("/v1/loras/a")).status_code == 404


async def test_what_each_rank_holds_is_told(tmp_path: Path) -> None:
    engine = FakeEngine()
    held = LorasHeld(num_adapters=2, adapter_bytes=300, num_slots=3, slot_bytes=900)
    replicas = [
        ReplicaStatistics(is_ready=True, num_queued=0, num_running=0, adapters=each) for each in (LorasHeld(), held)
    ]
    engine.counted = msgspec.structs.replace(engine.counted, replicas=tuple(replicas))
    async with running(tmp_path, engine) as server:
        info = (await server.http.get("/server_info")).json()
        metrics = (await server.http.get("/metrics")).text
    assert [each["adapters"] for each in info["replicas"]] == msgspec.to_builtins([LorasHeld(), held])
    assert 'sgld:lora_adapter_bytes{replica="1"} 300.0' in metrics
    assert 'sgld:lora_slots{replica="0"} 0.0' in metrics


async def test_adapters_need_a_key_where_others_do(tmp_path: Path) -> None:
    async with running(tmp_path, api_key=("secret",)) as server:
        await ask(server, "set_lora", 401, lora_nickname="a")
        assert (await server.http.get("/v1/list_loras")).status_code == 401
