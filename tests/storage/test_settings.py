"""What the environment says of cloud storage."""

import msgspec
import pytest

from sgld.config import OutputConfig, ServerConfig
from sgld.fields import FieldError
from sgld.storage.settings import credentials, resolved
from sgld.storage_config import StorageConfig


@pytest.fixture(autouse=True)
def _page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of SGLang's page."""
    monkeypatch.setenv("SGLANG_CLOUD_STORAGE_TYPE", "s3")
    monkeypatch.setenv("SGLANG_S3_BUCKET_NAME", "my-bucket")
    monkeypatch.setenv("SGLANG_S3_ACCESS_KEY_ID", "your-access-key")
    monkeypatch.setenv("SGLANG_S3_SECRET_ACCESS_KEY", "your-secret-key")
    monkeypatch.setenv("SGLANG_S3_ENDPOINT_URL", "https://minio.example.com")


def test_sglangs_variables_are_understood() -> None:
    found = resolved(StorageConfig())

    assert found is not None
    assert (found.s3_bucket_name, found.s3_endpoint_url) == ("my-bucket", "https://minio.example.com")
    keys = credentials()
    assert (keys.access_key_id, keys.secret_access_key, keys.session_token) == (
        "your-access-key",
        "your-secret-key",
        None,
    )


def test_our_names_go_before_sglangs_and_flags_before_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLD_S3_BUCKET_NAME", "ours")
    monkeypatch.setenv("SGLD_S3_KEY_PREFIX", "a/")
    monkeypatch.setenv("SGLD_S3_PRESIGN_SECONDS", "60")
    found = resolved(StorageConfig(s3_key_prefix="b/"))

    assert found is not None
    assert (found.s3_bucket_name, found.s3_key_prefix, found.s3_presign_seconds) == ("ours", "b/", 60)
    assert resolved(StorageConfig(cloud_storage_type="none")) is None


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("SGLANG_S3_BUCKET_NAME", "", "cloud storage needs one: --s3-bucket-name"),
        ("SGLANG_CLOUD_STORAGE_TYPE", "gcs", "must be one of none, s3"),
        ("SGLD_S3_PRESIGN_SECONDS", "soon", "must be a number of seconds"),
        ("SGLD_S3_PRESIGN_SECONDS", "604801", "604800"),
        ("SGLANG_S3_ENDPOINT_URL", "minio:9000", "must be as https://minio.example.com"),
    ],
)
def test_what_cant_be_used_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str, value: str, problem: str) -> None:
    monkeypatch.setenv(name, value)

    with pytest.raises(FieldError, match=problem):
        resolved(StorageConfig())


def test_half_of_the_credentials_is_an_error_that_doesnt_show_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_S3_ACCESS_KEY_ID")

    with pytest.raises(FieldError, match="SGLD_S3_ACCESS_KEY_ID is None") as refused:
        credentials()

    assert "your-secret-key" not in str(refused.value)


def test_nothing_that_shows_a_config_shows_a_secret() -> None:
    found = resolved(StorageConfig())
    shown = [repr(config) for config in (found, OutputConfig(), ServerConfig(), credentials())]
    shown.append(msgspec.json.encode(found).decode())

    assert not [text for text in shown if "your-secret-key" in text or "your-access-key" in text]


def test_a_url_that_holds_a_password_is_refused_without_showing_it() -> None:
    with pytest.raises(FieldError, match="user or password") as refused:
        StorageConfig(s3_endpoint_url="https://me:password@minio.example.com")

    assert "me:password" not in str(refused.value)
