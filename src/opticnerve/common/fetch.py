"""What is at an address on the web, for servers and for data alike: bounded, and never from within this network.

A name is resolved once, all its addresses are checked, and the connection goes to a checked address, so that no second
answer of the name service (DNS rebinding) leads elsewhere; where redirects are followed, each step is checked anew.
Proxies from the environment are not used, for behind them no address can be checked.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import string
import threading
import time
from collections.abc import Callable
from urllib.parse import SplitResult, quote, urljoin, urlsplit

# is_global calls these global, and fec0::/10, once private; behind these are addresses of another
# kind that may be private (RFC 6052, 3056, 4380).
_WRAPPED = [ipaddress.ip_network(n) for n in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")]


class Unfetched(Exception):
    """Why an address was not fetched. `passing`: it may go well another time; `wait`: seconds that the host wants."""

    def __init__(self, reason: str, *, passing: bool = False, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.passing, self.wait = passing, wait


def is_public(address: str) -> bool:
    """Whether this is a host of the open internet: not private, loopback, link-local, multicast, reserved."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip.is_site_local or any(ip in network for network in _WRAPPED):
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def fetch(
    url: str,
    *,
    max_bytes: int,
    seconds: float,
    idle: float | None = None,
    redirects: int = 0,
    private: bool = False,
    refuse: Callable[[str, int], str | None] = lambda host, port: None,
    agent: str = "opticnerve",
) -> bytes:
    """The content of an address.

    Args:
        url: http or https. max_bytes, seconds: bounds of the answer. idle: seconds for which a host may say nothing
            (default: all of them). redirects: how many are followed. private: whether hosts that are not public are
            asked, too. refuse: told host and port, says why it is not to be asked, or None. agent: who asks.

    Raises:
        Unfetched: whatever the reason.
    """
    deadline = time.monotonic() + seconds
    for _ in range(redirects + 1):
        parts, host, port = _parsed(url)
        if (why := refuse(host, port)) is not None:
            raise Unfetched(why)
        found = _once(parts, host, port, max_bytes, seconds, deadline, idle or seconds, private, agent)
        if isinstance(found, bytes):
            return found
        try:
            # Headers are read as ISO 8859-1, whatever bytes came.
            url = urljoin(url, quote(found, safe=string.punctuation, encoding="iso-8859-1"))
        except ValueError as e:
            raise Unfetched(f"{host} redirects to what is no address: {e}") from None
    raise Unfetched(f"{host} redirects elsewhere, which is not followed")


def _parsed(url: str) -> tuple[SplitResult, str, int]:
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port or (443 if parts.scheme == "https" else 80)
        host.encode("idna")
    except ValueError as e:
        raise Unfetched(f"this is no address: {e}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise Unfetched("this is no address of http or https")
    if parts.username is not None or parts.password is not None:
        raise Unfetched("an address with a user's name in it is not fetched")
    return parts, host, port


def _once(
    parts: SplitResult, host: str, port: int, max_bytes: int, seconds: float, deadline: float, idle: float,
    private: bool, agent: str,
) -> bytes | str:  # fmt: skip
    """What one host answers, or where it redirects."""
    try:
        address = _resolve(host, port, private)
    except OSError as e:
        raise Unfetched(f"{host} is not found: {e.strerror or e}", passing=True) from None
    if address is None:
        raise Unfetched(f"{host} leads to an address that is not public")
    path = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=string.punctuation)
    left = max(0.001, deadline - time.monotonic())
    connection = _Checked(host, port, address, secure=parts.scheme == "https", timeout=min(idle, left))
    # Socket timeouts are for each read; this one is for all of them.
    watch = threading.Timer(left, connection.break_off)
    watch.daemon = True
    watch.start()
    try:
        connection.request("GET", path, headers={"User-Agent": agent, "Accept": "image/*, audio/*, video/*, */*"})
        with connection.getresponse() as answer:  # which may hold the socket when the connection has closed it
            if 300 <= answer.status < 400 and (to := answer.getheader("Location")):
                return to
            if answer.status != 200:
                wait = answer.getheader("Retry-After") or ""
                raise Unfetched(
                    f"{host} answered {answer.status}", passing=answer.status >= 500 or answer.status == 429,
                    wait=float(wait) if wait.isdecimal() else 0.0,
                )  # fmt: skip
            body = answer.read(max_bytes + 1)
            cut = bool(answer.length) and len(body) <= max_bytes
    except (OSError, http.client.HTTPException, ValueError) as e:
        late = time.monotonic() >= deadline
        why = f"{host} did not answer within {seconds:g} s" if late else f"{host} failed: {e}"
        raise Unfetched(why, passing=not isinstance(e, ValueError)) from None
    finally:
        watch.cancel()
        connection.close()
    if time.monotonic() >= deadline:
        raise Unfetched(f"{host} did not answer within {seconds:g} s", passing=True)
    if len(body) > max_bytes:
        raise Unfetched(f"what {host} sends has more than the {max_bytes:,} bytes allowed")
    if cut:
        raise Unfetched(f"{host} broke off after {len(body):,} bytes", passing=True)
    return body


def _resolve(host: str, port: int, private: bool) -> str | None:
    """An address of the host, None unless all that it has are public (or others are asked, too)."""
    found = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    return found[0] if found and (private or all(is_public(a) for a in found)) else None


class _Checked(http.client.HTTPConnection):
    """HTTP to an address that has been checked, under the host's name."""

    def __init__(self, host: str, port: int, address: str, *, secure: bool, timeout: float) -> None:
        super().__init__(host, port, timeout=timeout)
        self.address, self.secure = address, secure
        self.raw: socket.socket | None = None
        self.broken_off = False

    def connect(self) -> None:
        # Of one's own: the connection forgets its socket as soon as an answer without a length begins.
        self.raw = self.sock = socket.create_connection((self.address, self.port), self.timeout)
        if self.secure:
            self.raw = self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)
        if self.broken_off:  # before there was this socket to shut
            raise TimeoutError

    def break_off(self) -> None:
        self.broken_off = True
        if self.raw is not None:
            with contextlib.suppress(OSError):  # it may have ended by itself
                self.raw.shutdown(socket.SHUT_RDWR)
