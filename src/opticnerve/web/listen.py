"""Where a server listens: its socket, its address, and whether other machines reach it."""

from __future__ import annotations

import ipaddress
import socket

from opticnerve.types import OpticNerveError


def is_loopback(host: str) -> bool:
    """Whether every address of `host` is this machine's own.

    Raises:
        OpticNerveError: there is no such address.
    """
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError as e:
        raise OpticNerveError(f"there is no address {host!r} to listen on: {e.strerror or e}") from e
    return all(ipaddress.ip_address(a.split("%")[0]).is_loopback for a in found)


def listen(host: str, port: int, *, backlog: int = 128) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        OpticNerveError: the address or port is not to be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=backlog)
    except OSError as e:
        raise OpticNerveError(f"cannot listen on {host}, port {port}: {e.strerror or e}; try another --port") from e


def url_of(host: str, at: socket.socket) -> str:
    """`http://127.0.0.1:8000`, as a client types it."""
    return f"http://{f'[{host}]' if ':' in host else host}:{at.getsockname()[1]}"
