"""A bucket of S3, or of anything that speaks its protocol."""

import base64
import hashlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import anyio
from anyio.to_thread import run_sync

from sgld.errors import StorageError
from sgld.storage.settings import credentials
from sgld.storage_config import StorageConfig

PART_BYTES = 8 * 2**20
"""All parts but the last must have 5 MiB or more. One is in memory at a time."""
# S3 takes no more parts of one object.
_MAX_PARTS = 10_000
_PRESIGN_S = 3600
_CONNECT_TIMEOUT_S = 5.0
_READ_TIMEOUT_S = 60.0
_ATTEMPTS = 3
_BEGIN_S, _ABORT_S = 10.0, 5.0
# Where nobody says: what S3 has as its default, and other servers take.
_REGION = "us-east-1"
_REASONS = {
    "NoSuchBucket": "there is no such bucket",
    "AccessDenied": "access is denied",
    "403": "access is denied",
    "404": "there is no such object",
    "NoSuchKey": "there is no such object",
    "PermanentRedirect": "the bucket is in another region; choose it with --s3-region-name",
    "AuthorizationHeaderMalformed": "the bucket is in another region; choose it with --s3-region-name",
    "IllegalLocationConstraintException": "the bucket is in another region; choose it with --s3-region-name",
}
_BAD_CREDENTIALS = (
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "InvalidToken",
    "ExpiredToken",
    "TokenRefreshRequired",
)


@asynccontextmanager
async def open_bucket(config: StorageConfig) -> AsyncIterator["Bucket"]:
    """The bucket, with one client as long as the block lasts; it was seen to be there and to take files.

    :param config: resolved, with the name of a bucket.
    :raises StorageError: it isn't there, can't be reached, or refuses us.
    :raises FieldError: there is half of a pair of credentials.
    """
    keys = credentials()
    session, client_config = await run_sync(
        _session, config, keys.access_key_id, keys.secret_access_key, keys.session_token
    )
    region = None if session.region_name else _REGION
    endpoint = config.s3_endpoint_url
    async with session.client("s3", region_name=region, endpoint_url=endpoint, config=client_config) as client:
        bucket = Bucket(client, config)
        await bucket.check()
        yield bucket


def _session(config: StorageConfig, key_id: str | None, secret: str | None, token: str | None) -> tuple[Any, Any]:
    import aioboto3  # these take a second, and only who uploads needs them
    from aiobotocore.config import AioConfig

    session = aioboto3.Session(key_id, secret, token, region_name=config.s3_region_name)
    # "when_required": other servers don't all know the checksums that AWS's libraries add since 2025.
    return session, AioConfig(
        signature_version="s3v4",
        s3={"addressing_style": "path" if config.s3_endpoint_url else "auto"},
        retries={"total_max_attempts": _ATTEMPTS, "mode": "standard"},
        connect_timeout=_CONNECT_TIMEOUT_S,
        read_timeout=_READ_TIMEOUT_S,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )


class Bucket:
    """Objects by name: a key with the prefix before it.

    :param client: aiobotocore's, of S3.
    :raises StorageError: from its methods, with one line that holds no secret.
    """

    def __init__(self, client: Any, config: StorageConfig) -> None:
        assert config.s3_bucket_name, "a bucket has a name"
        self._client = client
        self._config = config
        self._bucket = config.s3_bucket_name
        self.origin = ""
        """Scheme and host of the URLs of its objects."""

    def name_of(self, key: str) -> str:
        """The name of the object of a file."""
        return (self._config.s3_key_prefix or "") + key

    async def check(self) -> None:
        """See that it is there, and that we may write to it, without leaving anything."""
        name = self.name_of(".sgld-check")
        with self._translated("can't be used"):
            # GET, as an answer to HEAD doesn't say why it is refused.
            await self._client.list_objects_v2(Bucket=self._bucket, MaxKeys=1, Prefix=name)
            upload = await self._client.create_multipart_upload(Bucket=self._bucket, Key=name)
            await self._client.abort_multipart_upload(Bucket=self._bucket, Key=name, UploadId=upload["UploadId"])
        parts = urlsplit(await self.url(name))
        self.origin = f"{parts.scheme}://{parts.netloc}"

    async def upload(self, name: str, path: Path, media_type: str) -> None:
        """Make an object of a file: whole and as it is, or not at all."""
        with self._translated(f"doesn't take {name}"):
            size = (await run_sync(path.stat)).st_size
            if size > PART_BYTES:
                parts = _parts_of(path, max(PART_BYTES, -(-size // _MAX_PARTS)))
                await self.upload_parts(name, parts, media_type)
                return
            content = await run_sync(path.read_bytes)
            digest = _md5(content)
            about = {"Bucket": self._bucket, "Key": name, "ContentType": media_type, "ContentMD5": _base64(digest)}
            stored = await self._client.put_object(Body=content, **about)
            # That is the ETag, unless the bucket encrypts with keys of its own: then another question tells.
            if stored["ETag"].strip('"') != digest.hexdigest():
                await self._check_size(name, size)

    async def upload_parts(self, name: str, parts: AsyncGenerator[bytes, None], media_type: str) -> int:
        """Make an object of parts as they come, all but the last of 5 MiB or more: whole, or not at all.

        :return: its size.
        """
        with self._translated(f"doesn't take {name}"):
            place = {"Bucket": self._bucket, "Key": name}
            # Whoever is cancelled must know what to abort.
            with anyio.fail_after(_BEGIN_S, shield=True):
                created = await self._client.create_multipart_upload(ContentType=media_type, **place)
            place["UploadId"] = created["UploadId"]
            try:
                size, done = 0, list[dict[str, Any]]()
                async with aclosing(parts):
                    async for part in parts:
                        number, digest = len(done) + 1, await run_sync(_md5, part)
                        checksum = {"ContentMD5": _base64(digest)}
                        sent = await self._client.upload_part(PartNumber=number, Body=part, **checksum, **place)
                        size += len(part)
                        done.append({"PartNumber": number, "ETag": sent["ETag"]})
                await self._client.complete_multipart_upload(MultipartUpload={"Parts": done}, **place)
            except BaseException:
                # Parts cost money until they are removed. What isn't removed now is when the file is uploaded again.
                with anyio.move_on_after(_ABORT_S, shield=True), suppress(StorageError), self._translated("keeps it"):
                    await self._client.abort_multipart_upload(**place)
                raise
            await self._check_size(name, size)
            return size

    async def read(self, name: str) -> bytes:
        """The content of a small object."""
        with self._translated(f"doesn't give {name}"):
            found = await self._client.get_object(Bucket=self._bucket, Key=name)
            async with found["Body"] as body:
                content: bytes = await body.read()
                return content

    async def url(self, name: str) -> str:
        """From where clients get an object: for ever where it is public, else for a while."""
        if self._config.s3_public_url:
            return f"{self._config.s3_public_url.rstrip('/')}/{quote(name)}"
        with self._translated(f"gives no URL of {name}"):
            url: str = await self._client.generate_presigned_url(
                "get_object",
                Params={"Bucket": self._bucket, "Key": name},
                ExpiresIn=self._config.s3_presign_seconds or _PRESIGN_S,
            )
            return url

    async def delete(self, name: str) -> None:
        """Remove an object, if there is one."""
        with self._translated(f"doesn't delete {name}"):
            await self._client.delete_object(Bucket=self._bucket, Key=name)

    async def abort_uploads(self, name: str) -> None:
        """Remove what an upload in parts left that was interrupted."""
        with self._translated(f"doesn't tell of parts of {name}"):
            found = await self._client.list_multipart_uploads(Bucket=self._bucket, Prefix=name)
            for upload in found.get("Uploads", ()):
                if upload["Key"] == name:
                    await self._client.abort_multipart_upload(
                        Bucket=self._bucket, Key=name, UploadId=upload["UploadId"]
                    )

    async def _check_size(self, name: str, size: int) -> None:
        found = await self._client.head_object(Bucket=self._bucket, Key=name)
        if found["ContentLength"] != size:
            raise StorageError(f"{name} has {found['ContentLength']} bytes in the bucket, and {size} here")

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """Errors of the client as one line; what they quote of requests stays out of it."""
        from aiohttp import ClientError as HttpError
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except ClientError as error:
            reason = self._reason(str(error.response.get("Error", {}).get("Code", "")))
        except (BotoCoreError, HttpError, TimeoutError) as error:
            reason = self._cause(type(error).__name__)
        except OSError as error:
            reason = error.strerror or type(error).__name__
        else:
            return
        raise StorageError(f"the bucket {self._bucket!r} {what}: {reason}") from None

    def _reason(self, code: str) -> str:
        code = re.sub(r"\W", "", code)[:60]
        if code in _BAD_CREDENTIALS:
            return f"the credentials are refused ({code})"
        return _REASONS.get(code, code)

    def _cause(self, kind: str) -> str:
        if kind in ("NoCredentialsError", "PartialCredentialsError"):
            return "there are no credentials: set SGLD_S3_ACCESS_KEY_ID and SGLD_S3_SECRET_ACCESS_KEY"
        if kind == "ParamValidationError":
            return "no bucket can have this name"
        where = self._config.s3_endpoint_url or "AWS"
        return f"{where} can't be reached ({kind})"


async def _parts_of(path: Path, part_bytes: int) -> AsyncGenerator[bytes, None]:
    async with await anyio.open_file(path, "rb") as file:
        while part := await file.read(part_bytes):
            yield part


def _md5(content: bytes) -> "hashlib._Hash":
    return hashlib.md5(content, usedforsecurity=False)


def _base64(digest: "hashlib._Hash") -> str:
    """What the server compares with the content that arrived."""
    return base64.b64encode(digest.digest()).decode()
