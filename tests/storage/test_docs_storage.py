"""docs/cloud_storage.md says what is done."""

import re
import shlex
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
import yaml
from cli.conftest import Engines
from server.fakes import running

from sgld.storage.s3 import PART_BYTES, open_bucket
from sgld.storage_config import StorageConfig
from sgld_cli.main import main

from .s3_server import BUCKET, S3Server, credentials_count

PAGE = (Path(__file__).parents[2] / "docs" / "cloud_storage.md").read_text()
SHELL, CURL = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
(POLICY,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
(CONFIG,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def bucket(bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The variables of the page, but for the place of the bucket."""
    for name, value in re.findall(r"export (\w+)=(\S+)", SHELL):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SGLANG_S3_BUCKET_NAME", BUCKET)
    monkeypatch.setenv("SGLANG_S3_ENDPOINT_URL", bucket.url)
    return bucket


def test_the_first_example(
    bucket: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    assert main(shlex.split(SHELL.splitlines()[-1])[1:], engine_class=Engines()) == 0

    path, url = capsys.readouterr().out.splitlines()
    assert path == "outputs/circle.png"
    assert url.startswith(f"{bucket.url}/{BUCKET}/circle.png?")
    assert list(bucket.objects) == ["circle.png"]


def test_the_config_file_is_one() -> None:
    assert StorageConfig(**yaml.safe_load(CONFIG)).s3_key_prefix == "pictures/"
    listed = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    assert listed == set(StorageConfig.__struct_fields__) - {"output_hook"}


async def test_the_commands(bucket: S3Server, tmp_path: Path) -> None:
    answers: list[dict[str, Any]] = []
    async with running(tmp_path) as server:
        for command in CURL.splitlines():
            words = [word.replace("http://localhost:30000", server.url) for word in shlex.split(command)]
            done = await anyio.run_process([*words, "--fail", "--silent"], cwd=tmp_path)
            answers.append(msgspec.json.decode(done.stdout))

    assert answers[0]["data"][0]["url"].startswith(f"{bucket.url}/{BUCKET}/img_")
    assert answers[1]["id"].startswith("video_")


async def test_the_permissions_are_enough(bucket: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "large.mp4"
    file.write_bytes(b"x" * (PART_BYTES + 1))
    with credentials_count(POLICY.replace("my-bucket", BUCKET)) as (key_id, secret):
        monkeypatch.setenv("SGLANG_S3_ACCESS_KEY_ID", key_id)
        monkeypatch.setenv("SGLANG_S3_SECRET_ACCESS_KEY", secret)
        async with open_bucket(bucket.config()) as opened:
            await opened.upload("large.mp4", file, "video/mp4")
            await opened.abort_uploads("large.mp4")
            assert len(await opened.read("large.mp4")) == PART_BYTES + 1
            await opened.delete("large.mp4")
