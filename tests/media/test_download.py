import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sgld.media import download as module
from sgld.media.download import Refused, download, is_public, public_addresses

Answer = Callable[[BaseHTTPRequestHandler], None]
BODY = b"0123456789" * 20_000


class Server:
    """An HTTP server on this machine; `answers` are its pages."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.seen: list[str] = []
        answers, seen = self.answers, self.seen

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                seen.append(self.path)
                answers[self.path](self)

            def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def page(body: bytes = BODY, length: int | None = None, status: int = 200, location: str | None = None) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        if location is not None:
            handler.send_header("Location", location)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def fetched(url: str, *, max_bytes: int = 10**6, timeout_s: float = 20, allow_private_hosts: bool = True) -> bytes:
    return download(url, max_bytes=max_bytes, timeout_s=timeout_s, allow_private_hosts=allow_private_hosts)


def test_page_is_fetched_through_redirects(server: Server) -> None:
    server.answers |= {
        "/a?b=c": page(b"", status=302, location="/d"),
        "/d": page(b"", status=307, location=server.url("/e")),
        "/e": page(),
    }
    assert fetched(server.url("/a?b=c")) == BODY
    assert server.seen == ["/a?b=c", "/d", "/e"]


def test_private_host_is_not_even_asked(server: Server) -> None:
    server.answers["/"] = page()
    for host in ("127.0.0.1", "localhost", "0.0.0.0", "[::ffff:127.0.0.1]", "2130706433"):
        with pytest.raises(Refused, match="isn't a public address"):
            fetched(f"http://{host}:{server.port}/", allow_private_hosts=False)
    assert server.seen == []


def test_redirect_to_a_private_host_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers["/"] = page(b"", status=302, location=f"http://localhost:{server.port}/secret")

    def addresses(host: str, port: int, *, allow_private_hosts: bool) -> list[tuple[int, tuple[str, int]]]:
        # The server of this test stands for a public one.
        return public_addresses(host, port, allow_private_hosts=allow_private_hosts or host == "127.0.0.1")

    monkeypatch.setattr(module, "public_addresses", addresses)
    with pytest.raises(Refused, match=r"localhost is .* isn't a public address"):
        fetched(server.url("/"), allow_private_hosts=False)
    assert server.seen == ["/"]


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://host/a", "gopher://x", "http://a:0/"])
def test_redirect_to_anything_but_http_is_refused(server: Server, target: str) -> None:
    server.answers["/"] = page(b"", status=302, location=target)
    with pytest.raises(Refused, match="no http"):
        fetched(server.url("/"))


def test_circle_of_redirects_ends(server: Server) -> None:
    server.answers["/"] = page(b"", status=302, location="/")
    with pytest.raises(Refused, match="more than 5 times"):
        fetched(server.url("/"))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (page(b"", status=404), "the server says 404"),
        (page(BODY, length=len(BODY) + 1), "ended early"),
        (lambda handler: handler.wfile.write(b"junk\r\n\r\n"), "isn't HTTP"),
    ],
)
def test_answer_that_is_no_picture_is_refused(server: Server, answer: Answer, message: str) -> None:
    server.answers["/"] = answer
    with pytest.raises(Refused, match=message):
        fetched(server.url("/"))


def test_large_page_is_left_early(server: Server) -> None:
    server.answers["/"] = page()
    with pytest.raises(Refused, match="more than 1000 bytes"):
        fetched(server.url("/"), max_bytes=1000)


def test_server_that_dribbles_is_left_at_the_deadline(server: Server) -> None:
    is_left = threading.Event()

    def dribble(handler: BaseHTTPRequestHandler) -> None:
        try:
            while not is_left.wait(0.01):
                handler.wfile.write(b"x")
        except OSError:
            is_left.set()

    server.answers["/"] = dribble
    with pytest.raises(Refused, match=r"longer than 0\.2 s"):
        fetched(server.url("/"), timeout_s=0.2)
    assert is_left.wait(20)


def test_time_that_is_over_before_a_connection_is_made_counts(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    is_over = threading.Event()

    def addresses(host: str, port: int, *, allow_private_hosts: bool) -> list[tuple[int, tuple[str, int]]]:
        assert is_over.wait(20)
        return public_addresses(host, port, allow_private_hosts=allow_private_hosts)

    class Clock(threading.Timer):
        """Says when it has struck."""

        def run(self) -> None:
            super().run()
            is_over.set()

    monkeypatch.setattr(module, "public_addresses", addresses)
    monkeypatch.setattr(module, "Timer", Clock)
    server.answers["/"] = page()
    with pytest.raises(Refused, match=r"longer than 0\.05 s"):
        fetched(server.url("/"), timeout_s=0.05)
    assert server.seen == []


def test_host_that_does_not_answer_is_an_error() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        with pytest.raises(OSError, match="refused"):
            fetched(f"http://127.0.0.1:{sock.getsockname()[1]}/")


@pytest.mark.parametrize("url", ["http://host/a b", "http://host/\r\nHost: x", "http://höst/", "http://[::1", "x"])
def test_urls_that_are_none_are_refused(url: str) -> None:
    with pytest.raises(Refused):
        fetched(url)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("1.1.1.1", True),
        ("2606:4700:4700::1111", True),
        ("10.0.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("::ffff:10.0.0.1", False),
        ("2002:0a00:0001::", False),
        ("64:ff9b::a00:1", False),
    ],
)
def test_public_addresses_are_told_from_others(address: str, expected: bool) -> None:
    assert is_public(address) is expected
