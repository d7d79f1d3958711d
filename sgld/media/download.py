"""Downloads of what requests refer to: only from public hosts unless that is allowed, small, and not for ever.

A client that gives a URL makes this process connect to a host of the client's choice. So each address is checked, of
redirects too, and the connection goes to the very address that was checked: a name may mean another one a moment later.
"""

import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from threading import Timer
from urllib.parse import SplitResult, urljoin, urlsplit

from sgld.outcome import on_failure

MAX_REDIRECTS = 5
_CHUNK_BYTES = 64 * 1024
_REDIRECTS = (301, 302, 303, 307, 308)
# RFC 6052: the last four bytes are an IPv4 address.
_NAT64 = IPv6Network("64:ff9b::/96")
_Connect = Callable[[str, int], socket.socket]


class Refused(Exception):
    """A URL isn't followed, or what it leads to isn't taken."""


def download(url: str, *, max_bytes: int, timeout_s: float, allow_private_hosts: bool = False) -> bytes:
    """What a URL leads to.

    :param timeout_s: for all of it, redirects included; finding an address isn't counted.
    :raises Refused: it isn't http(s), leads to a private host or nowhere, is too large, or takes too long.
    :raises OSError: the host can't be reached.
    """
    deadline = time.monotonic() + timeout_s
    with _watchdog(timeout_s) as watch:

        def connect(host: str, port: int) -> socket.socket:
            addresses = public_addresses(host, port, allow_private_hosts=allow_private_hosts)
            return watch(_connected(addresses, deadline))

        for _ in range(1 + MAX_REDIRECTS):
            answer = _fetch(_checked(url), connect, max_bytes)
            if isinstance(answer, bytes):
                return answer
            url = urljoin(url, answer)
    raise Refused(f"it is redirected more than {MAX_REDIRECTS} times")


@contextmanager
def _watchdog(timeout_s: float) -> Iterator[Callable[[socket.socket], socket.socket]]:
    """End connections when the time is over: their own timeouts begin anew with every byte that a server sends.

    :raises Refused: it was over.
    """
    copies: list[socket.socket] = []
    is_over = False

    def watch(sock: socket.socket) -> socket.socket:
        # A copy, as wrapping a socket for TLS takes its descriptor away.
        copies.append(sock.dup())
        # In this order: what `end` doesn't see any more is seen here.
        if is_over:
            sock.close()
            raise TimeoutError
        return sock

    def end() -> None:
        nonlocal is_over
        is_over = True
        for copy in copies:
            with suppress(OSError):
                copy.shutdown(socket.SHUT_RDWR)

    timer = Timer(timeout_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield watch
        problem = None
    except (Refused, OSError) as error:
        problem = error
    finally:
        timer.cancel()
        timer.join()
        for copy in copies:
            copy.close()
    # What was read until then may look whole.
    problem = Refused(f"it takes longer than {timeout_s:g} s") if is_over else problem
    if problem is not None:
        raise problem


def _fetch(parts: SplitResult, connect: _Connect, max_bytes: int) -> bytes | str:
    """What a URL holds, or the URL to which it is redirected."""
    connection = (_TLSConnection if parts.scheme == "https" else _Connection)(parts, connect)
    try:
        connection.request("GET", _target(parts), headers={"User-Agent": "sgld", "Accept": "image/*"})
        response = connection.getresponse()
        location = response.getheader("Location")
        if response.status in _REDIRECTS and location is not None:
            return location
        return _body(response, max_bytes)
    except HTTPException as error:
        raise Refused(f"the answer isn't HTTP ({type(error).__name__})") from None
    finally:
        connection.close()


def public_addresses(host: str, port: int, *, allow_private_hosts: bool) -> list[tuple[int, tuple[str, int]]]:
    """Address family and address of a host, those that may be connected to.

    :raises Refused: one of them isn't public.
    :raises OSError: there is no such host.
    """
    infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    found = [(int(family), (str(address[0]), port)) for family, _, _, _, address in infos]
    for _, (address, _) in found:
        if not allow_private_hosts and not is_public(address):
            raise Refused(f"{host} is {address}, which isn't a public address")
    return found


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet."""
    ip = ip_address(address.partition("%")[0])
    # Addresses that carry an IPv4 address are as public as that is.
    if isinstance(ip, IPv6Address):
        embedded = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        ip = IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else embedded or ip
    return ip.is_global and not ip.is_multicast


def _checked(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        has_host = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError as error:
        raise Refused(str(error)) from None
    if parts.scheme not in ("http", "https") or not has_host:
        raise Refused(f"{url[:80]!r} is no http(s) URL")
    if not url.isascii() or not url.isprintable() or " " in url:
        raise Refused("it holds characters that must be escaped")
    return parts


def _target(parts: SplitResult) -> str:
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _connected(addresses: list[tuple[int, tuple[str, int]]], deadline: float) -> socket.socket:
    """A connection to the first address that answers until then; a host may have many."""
    problem = OSError("the host has no address")
    for family, address in addresses:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(max(deadline - time.monotonic(), 1e-3))
            sock.connect(address)
        except OSError as error:
            problem = error
            sock.close()
        else:
            return sock
    raise problem


def _body(response: HTTPResponse, max_bytes: int) -> bytes:
    if response.status != 200:
        raise Refused(f"the server says {response.status} {response.reason}")
    chunks: list[bytes] = []
    size = 0
    while chunk := response.read1(_CHUNK_BYTES):
        chunks.append(chunk)
        size += len(chunk)
        if size > max_bytes:
            raise Refused(f"it has more than {max_bytes} bytes")
    if response.length:  # what is left of the length that was announced
        raise Refused("the connection ended early")
    return b"".join(chunks)


class _Connection(HTTPConnection):
    """A connection that is made by our own rules."""

    def __init__(self, parts: SplitResult, connect: _Connect) -> None:
        super().__init__(parts.hostname or "", parts.port or self.default_port)
        self._connect = connect

    def connect(self) -> None:
        self.sock = self._connect(self.host, self.port)


class _TLSConnection(HTTPSConnection):
    def __init__(self, parts: SplitResult, connect: _Connect) -> None:
        super().__init__(parts.hostname or "", parts.port or self.default_port)
        self._connect = connect

    def connect(self) -> None:
        sock = self._connect(self.host, self.port)
        with on_failure(sock.close):
            self.sock = ssl.create_default_context().wrap_socket(sock, server_hostname=self.host)
