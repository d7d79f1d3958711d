"""What the environment says of cloud storage: its choices, where flags leave them open, and its secrets."""

import os
from dataclasses import dataclass, field

import msgspec

from sgld.fields import FieldError
from sgld.storage_config import StorageConfig

_TYPES = ("none", "s3")


@dataclass(frozen=True)
class Credentials:
    """Keys of an account; None: as AWS's own libraries find them (variables, files, the role of the machine)."""

    access_key_id: str | None = field(default=None, repr=False)
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)


def resolved(config: StorageConfig) -> StorageConfig | None:
    """The config with what the environment says where it says nothing; None where nothing is uploaded.

    :raises FieldError: a value can't be used, or there is no bucket.
    """
    environment = _environment()
    chosen = {name: value for name, value in environment.items() if value and getattr(config, name) is None}
    kind = config.cloud_storage_type or chosen.pop("cloud_storage_type", "none").lower()
    if kind not in _TYPES:
        raise FieldError("SGLD_CLOUD_STORAGE_TYPE", kind, f"it must be one of {', '.join(_TYPES)}")
    if kind == "none":
        return None
    values = {**msgspec.to_builtins(config), **chosen, "cloud_storage_type": kind}
    seconds = values["s3_presign_seconds"]
    if isinstance(seconds, str):
        if not seconds.isdecimal():
            raise FieldError("SGLD_S3_PRESIGN_SECONDS", seconds, "it must be a number of seconds")
        values["s3_presign_seconds"] = int(seconds)
    found = StorageConfig(**values)
    if not found.s3_bucket_name:
        raise FieldError("s3_bucket_name", found.s3_bucket_name, "cloud storage needs one: --s3-bucket-name")
    return found


def credentials() -> Credentials:
    """The keys that the environment gives under our names.

    :raises FieldError: half of them is missing; what there is isn't shown.
    """
    key_id = os.environ.get("SGLD_S3_ACCESS_KEY_ID") or os.environ.get("SGLANG_S3_ACCESS_KEY_ID") or None
    secret = os.environ.get("SGLD_S3_SECRET_ACCESS_KEY") or os.environ.get("SGLANG_S3_SECRET_ACCESS_KEY") or None
    if (key_id is None) != (secret is None):
        missing = "SGLD_S3_ACCESS_KEY_ID" if key_id is None else "SGLD_S3_SECRET_ACCESS_KEY"
        raise FieldError(missing, None, "an access key id and a secret access key belong together; give both or none")
    return Credentials(key_id, secret, os.environ.get("SGLD_S3_SESSION_TOKEN") or None)


def _environment() -> dict[str, str]:
    return {
        "cloud_storage_type": os.environ.get("SGLD_CLOUD_STORAGE_TYPE")
        or os.environ.get("SGLANG_CLOUD_STORAGE_TYPE", ""),
        "s3_bucket_name": os.environ.get("SGLD_S3_BUCKET_NAME") or os.environ.get("SGLANG_S3_BUCKET_NAME", ""),
        "s3_endpoint_url": os.environ.get("SGLD_S3_ENDPOINT_URL") or os.environ.get("SGLANG_S3_ENDPOINT_URL", ""),
        "s3_region_name": os.environ.get("SGLD_S3_REGION_NAME") or os.environ.get("SGLANG_S3_REGION_NAME", ""),
        "s3_key_prefix": os.environ.get("SGLD_S3_KEY_PREFIX", ""),
        "s3_public_url": os.environ.get("SGLD_S3_PUBLIC_URL", ""),
        "s3_presign_seconds": os.environ.get("SGLD_S3_PRESIGN_SECONDS", ""),
    }
