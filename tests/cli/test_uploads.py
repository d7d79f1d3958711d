"""`sgld generate` with a bucket."""

import json
import urllib.request
from pathlib import Path

import pytest
from storage.s3_server import BUCKET, S3Server

from sgld.media.metadata import read_metadata
from sgld.storage import s3

from .conftest import Engines, Sgld


@pytest.fixture
def bucket(bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    monkeypatch.setattr(s3, "_ATTEMPTS", 1)
    monkeypatch.setenv("SGLANG_CLOUD_STORAGE_TYPE", "s3")
    monkeypatch.setenv("SGLANG_S3_BUCKET_NAME", BUCKET)
    monkeypatch.setenv("SGLANG_S3_ACCESS_KEY_ID", "your-access-key")
    monkeypatch.setenv("SGLANG_S3_SECRET_ACCESS_KEY", "your-secret-key")
    monkeypatch.setenv("SGLANG_S3_ENDPOINT_URL", bucket.url)
    return bucket


def test_outputs_are_uploaded_and_kept(bucket: S3Server, sgld: Sgld, tmp_path: Path) -> None:
    done = sgld("generate", "--prompt", "a cat", "--output-file-name", "cat.png", "--s3-key-prefix", "mine/")

    path, url = done.out
    assert done.code == 0
    assert path == "outputs/cat.png"
    assert url.startswith(f"{bucket.url}/{BUCKET}/mine/cat.png?")
    with urllib.request.urlopen(url) as answer:
        assert answer.headers["content-type"] == "image/png"
        assert answer.read() == (tmp_path / path).read_bytes()
    assert "your-secret-key" not in json.dumps(read_metadata(tmp_path / path))


def test_outputs_are_uploaded_and_not_kept_where_that_is_asked(bucket: S3Server, sgld: Sgld, tmp_path: Path) -> None:
    done = sgld(
        *("generate", "--prompt", "a cat", "--num-frames", "2", "--return-frames", "--json"),
        *("--storage-keep-local", "false"),
    )

    result = json.loads(done.out[0])
    assert (result["paths"], result["frame_paths"]) == ([], [])
    assert len(result["urls"]) == 3
    assert sorted(name.rpartition(".")[2] for name in bucket.objects) == ["mp4", "png", "png"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_upload_that_fails_is_told_and_leaves_the_file(
    bucket: S3Server, sgld: Sgld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sgld.storage.s3._ATTEMPTS", 1)
    bucket.refuse = lambda request: request.startswith("PUT")

    done = sgld("generate", "--prompt", "a cat", "--output-file-name", "cat.png")

    assert (done.code, done.out) == (1, ["outputs/cat.png"])
    (line,) = [line for line in done.err if line.startswith("sgld: error:")]
    assert line == f"sgld: error: the bucket '{BUCKET}' doesn't take cat.png: 503; the output is here"
    assert (tmp_path / "outputs" / "cat.png").exists()


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--s3-bucket-name", "nowhere"], "the bucket 'nowhere' can't be used: there is no such bucket"),
        (["--s3-endpoint-url", "http://127.0.0.1:1"], "http://127.0.0.1:1 can't be reached"),
        (["--s3-endpoint-url", "minio"], "it must be as https://minio.example.com"),
    ],
)
def test_a_bucket_that_cant_be_used_is_told_before_a_model_is_loaded(
    bucket: S3Server, sgld: Sgld, engines: Engines, flags: list[str], problem: str
) -> None:
    done = sgld("generate", "--prompt", "a cat", *flags)

    assert (done.code, done.out, len(done.err), engines.made) == (2, [], 1, [])
    assert problem in done.err[0]


def test_a_bucket_can_be_left_aside(bucket: S3Server, sgld: Sgld) -> None:
    done = sgld("generate", "--prompt", "a cat", "--cloud-storage-type", "none")

    assert (done.code, len(done.out)) == (0, 1)
    assert bucket.requests == []


def test_a_server_says_what_it_misses_before_a_model_is_loaded(bucket: S3Server, sgld: Sgld) -> None:
    done = sgld("serve", "--data-dir", "data", "--port", "0", "--s3-bucket-name", "")
    refused = sgld("serve", "--data-dir", "data", "--port", "0", "--s3-bucket-name", "nowhere")

    assert (done.code, done.err) == (
        2,
        ["sgld: error: the server can't start: s3_bucket_name is '': cloud storage needs one: --s3-bucket-name"],
    )
    assert refused.code == 2
    assert refused.err[-1] == "sgld: error: the bucket 'nowhere' can't be used: there is no such bucket"
