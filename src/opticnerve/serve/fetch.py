"""Pictures from other hosts: only from those that are allow-listed, and never from within this network.

A name is resolved once, all its addresses are checked, and the connection goes to a checked address; so no second
answer of the name service (DNS rebinding) leads elsewhere. Redirects are refused, for they would. Proxies from the
environment are not used.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from opticnerve.serve.errors import ApiError

# is_global calls these global; behind them are addresses of another kind that may be private (RFC 6052, 3056, 4380).
_WRAPPED = [ipaddress.ip_network(n) for n in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")]


def is_public(address: str) -> bool:
    """Whether this is a host of the open internet: not private, loopback, link-local, multicast, reserved."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif any(ip in network for network in _WRAPPED):
            return False
    return ip.is_global and not ip.is_multicast


def fetch(url: str, *, hosts: Sequence[str], max_bytes: int, seconds: float, param: str) -> bytes:
    """What is at an address on the web.

    Args:
        url: http or https. hosts: allowed ones, as `name` (ports 80 and 443) or `name:port`.
        max_bytes, seconds: bounds of the answer. param: the field that an error names.

    Raises:
        ApiError: 400, whatever the reason: a host that is not allowed or not public, a redirect, an answer that is no
            200, too big or too slow.
    """

    def refuse(why: str) -> ApiError:
        return ApiError(400, f"{param}: {why}", param=param, code="invalid_image_url")

    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port or (443 if parts.scheme == "https" else 80)
        host.encode("idna")
    except ValueError as e:
        raise refuse(f"this is no address: {e}") from None
    if parts.username is not None or parts.password is not None:
        raise refuse("an address with a user's name in it is not fetched")
    allowed = {h.lower() for h in hosts}
    if f"{host}:{port}" not in allowed and not (host in allowed and port in (80, 443)):
        raise refuse("this server does not fetch from that host; send the picture as a data URL")
    deadline = time.monotonic() + seconds
    try:
        address = _resolve(host, port)
    except OSError as e:
        raise refuse(f"{host} is not found: {e.strerror or e}") from None
    if address is None:
        raise refuse(f"{host} leads to an address that is not public")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    connection = _Checked(host, port, address, secure=parts.scheme == "https", timeout=seconds)
    # Socket timeouts are for each read; this one is for all of them.
    watch = threading.Timer(seconds, connection.break_off)
    watch.start()
    try:
        connection.request("GET", path, headers={"User-Agent": "opticnerve", "Accept": "image/*, audio/*"})
        answer = connection.getresponse()
        if 300 <= answer.status < 400:
            raise refuse(f"{host} redirects elsewhere, which is not followed")
        if answer.status != 200:
            raise refuse(f"{host} answered {answer.status}")
        body = answer.read(max_bytes + 1)
    except (OSError, http.client.HTTPException, ValueError) as e:
        if isinstance(e, ApiError):
            raise
        why = f"{host} did not answer within {seconds:g} s" if time.monotonic() >= deadline else f"{host} failed: {e}"
        raise refuse(why) from None
    finally:
        watch.cancel()
        connection.close()
    if time.monotonic() >= deadline:
        raise refuse(f"{host} did not answer within {seconds:g} s")
    if len(body) > max_bytes:
        raise refuse(f"what {host} sends has more than the {max_bytes:,} bytes allowed")
    return body


def _resolve(host: str, port: int) -> str | None:
    """An address of the host, None unless all that it has are public."""
    found = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    return found[0] if found and all(is_public(a) for a in found) else None


class _Checked(http.client.HTTPConnection):
    """HTTP to an address that has been checked, under the host's name."""

    def __init__(self, host: str, port: int, address: str, *, secure: bool, timeout: float) -> None:
        super().__init__(host, port, timeout=timeout)
        self.address, self.secure = address, secure
        self.raw: socket.socket | None = None

    def connect(self) -> None:
        # Of one's own: the connection forgets its socket as soon as an answer without a length begins.
        self.raw = self.sock = socket.create_connection((self.address, self.port), self.timeout)
        if self.secure:
            self.raw = self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)

    def break_off(self) -> None:
        if self.raw is not None:
            with contextlib.suppress(OSError):  # it may have ended by itself
                self.raw.shutdown(socket.SHUT_RDWR)
