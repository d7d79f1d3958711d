"""A real S3 server on a loopback address, which can go away, come back, and let clients wait."""

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self
from urllib.parse import unquote

from moto.core.responses import ActionAuthenticatorMixin
from moto.iam.models import iam_backends
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from sgld.storage_config import StorageConfig

ACCOUNT = "123456789012"
BUCKET = "pictures"
Answer = Iterable[bytes]


class _Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002  # werkzeug's name
        pass


class S3Server:
    """moto over HTTP. `hold` and `refuse` decide by method and path what becomes of requests."""

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._port = 0
        self._server: BaseWSGIServer | None = None
        self._thread = threading.Thread()
        self.requests: list[str] = []
        self.refuse: Callable[[str], bool] = lambda request: False
        self.hold: Callable[[str], bool] = lambda request: False
        self.held = threading.Event()
        self.go = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Be there, at the same address as before, with what was kept before."""
        self._server = make_server("127.0.0.1", self._port, self._answer, threaded=True, request_handler=_Quiet)
        self._server.daemon_threads = True  # type: ignore[attr-defined]
        self._port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Be gone: connections are refused."""
        self.go.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None

    def new_bucket(self) -> None:
        """Begin with a bucket that is empty, and requests that are answered."""
        backend = self.backend
        backend.reset()
        backend.create_bucket(BUCKET, "us-east-1")
        self.refuse = self.hold = lambda request: False
        self.requests.clear()
        self.drop()
        if self._server is None:
            self.start()

    def drop(self) -> None:
        """What is held comes to nothing."""
        waiting, self.go, self.held = self.go, threading.Event(), threading.Event()
        waiting.set()

    @property
    def backend(self) -> Any:
        return s3_backends[ACCOUNT]["aws"]

    @property
    def objects(self) -> dict[str, Any]:
        """The objects of the bucket by name: `value`, `metadata`, `etag`."""
        return {key.name: key for key in self.backend.buckets[BUCKET].keys.values()}

    @property
    def unfinished(self) -> list[str]:
        """The names of objects of which there are only parts."""
        return [upload.key_name for upload in self.backend.buckets[BUCKET].multiparts.values()]

    def config(self, **settings: Any) -> StorageConfig:
        """A config that leads here."""
        given = {"cloud_storage_type": "s3", "s3_bucket_name": BUCKET, "s3_endpoint_url": self.url, **settings}
        return StorageConfig(**given)

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Answer:
        query = environ["QUERY_STRING"]
        request = unquote(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}{'?' if query else ''}{query}")
        self.requests.append(request)
        go, is_held = self.go, self.hold(request)
        if is_held:
            self.held.set()
            go.wait()
        if self.refuse(request) or (is_held and go is not self.go):
            start_response("503 Slow Down", [("Content-Length", "0"), ("Connection", "close")])
            return [b""]
        answer: Answer = self._app(environ, start_response)
        return answer


_ALL = json.dumps({"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]})


@contextmanager
def credentials_count(policy: str = _ALL) -> Iterator[tuple[str, str]]:
    """From here on only who has these keys may do anything, and only what the policy says: key id and secret."""
    backend = iam_backends[ACCOUNT]["aws"]
    backend.create_user(region_name="us-east-1", user_name="sgld")
    backend.put_user_policy("sgld", "all", policy)
    key = backend.create_access_key("sgld")
    before = ActionAuthenticatorMixin.request_count
    ActionAuthenticatorMixin.request_count = float("inf")
    try:
        yield key.access_key_id, key.secret_access_key
    finally:
        ActionAuthenticatorMixin.request_count = before
        backend.reset()
