"""Where a server listens: its socket, its address, and whether other machines reach it."""

from __future__ import annotations

import ipaddress
import socket

from opticnerve.types import OpticNerveError


def is_loopback(host: str) -> bool:
    """Whether every address of `host` is this machine's own. Raises OpticNerveError: there is no such address."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError as e:
        raise OpticNerveError(
            f"there is no address {host!r} to listen on: {e.strerror or e}", kind="unknown-name"
        ) from e
    return all(ipaddress.ip_address(a.split("%")[0]).is_loopback for a in found)


def listen(host: str, port: int, *, stalled_seconds: float | None = None) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    A client that reads nothing for `stalled_seconds` while its answer waits is cut off by the system, where it can
    (Linux's TCP_USER_TIMEOUT).

    Raises:
        OpticNerveError: the address or port is not to be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.create_server((host, port), family=family, backlog=512)
    except OSError as e:
        raise OpticNerveError(
            f"cannot listen on {host}, port {port}: {e.strerror or e}; try another --port", kind="network"
        ) from e
    if stalled_seconds is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * stalled_seconds))
    return made


def url_of(host: str, at: socket.socket) -> str:
    """`http://127.0.0.1:8000`, as a client types it."""
    return f"http://{f'[{host}]' if ':' in host else host}:{at.getsockname()[1]}"
