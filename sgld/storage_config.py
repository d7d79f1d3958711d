"""Where results are kept, and what is done to them before: flags, config keys and docs, as all of sgld.config.

Secrets are no fields of it, so that nothing that shows a config shows one: `sgld.storage.settings` reads them.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from sgld.fields import FieldError, check_fields, option

MAX_PRESIGN_S = 7 * 86400


class StorageConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The bucket that outputs are uploaded to, where None leaves the choice to the environment.

    :raises FieldError: a value is out of its range.
    """

    cloud_storage_type: Annotated[
        Literal["none", "s3"] | None,
        option("s3: outputs are uploaded to a bucket. Default: $SGLD_CLOUD_STORAGE_TYPE, else none"),
    ] = None
    s3_bucket_name: Annotated[str | None, option("its name. Default: $SGLD_S3_BUCKET_NAME")] = None
    s3_endpoint_url: Annotated[
        str | None, option("where it is, if not at AWS, as https://minio.example.com. Default: $SGLD_S3_ENDPOINT_URL")
    ] = None
    s3_region_name: Annotated[
        str | None, option("its region. Default: $SGLD_S3_REGION_NAME, else as AWS is set up")
    ] = None
    s3_key_prefix: Annotated[
        str | None, option("what the keys of all objects begin with, as images/. Default: $SGLD_S3_KEY_PREFIX")
    ] = None
    s3_public_url: Annotated[
        str | None,
        option(
            "where anybody gets objects by their keys, as a CDN; else URLs are signed. Default: $SGLD_S3_PUBLIC_URL"
        ),
    ] = None
    s3_presign_seconds: (
        Annotated[
            int,
            Meta(ge=1, le=MAX_PRESIGN_S),
            option("how long a signed URL is good. Default: $SGLD_S3_PRESIGN_SECONDS, else an hour"),
        ]
        | None
    ) = None
    storage_keep_local: Annotated[
        bool | None,
        option("keep the local file of what was uploaded, too. Default: sgld generate does, sgld serve doesn't"),
    ] = None

    output_hook: Annotated[
        str | None,
        option("function, as module:name, that is called with each finished file and its media type before it is kept"),
    ] = None

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("s3_endpoint_url", "s3_public_url"):
            _check_url(name, getattr(self, name))


def _check_url(name: str, url: str | None) -> None:
    if url is None:
        return
    scheme, _, rest = url.partition("://")
    if "@" in rest.partition("/")[0]:
        raise FieldError(
            name, f"{scheme}://...", "it holds a user or password; credentials have variables of their own"
        )
    if scheme not in ("http", "https") or not rest:
        raise FieldError(name, url, "it must be as https://minio.example.com")
