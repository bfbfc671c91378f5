"""Where a server listens, and who is let in: what `opticnerve serve` and `opticnerve ui` have in common."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Iterable
from pathlib import Path

from opticnerve.types import OpticNerveError


class Secrets:
    """Keys or passwords, kept as digests alone."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._digests = [_digest(secret.encode()) for secret in secrets]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def hold(self, given: bytes) -> bool:
        """Whether it is one of them. All are compared, in a time that depends on none of them."""
        digest = _digest(given)
        return bool(sum(hmac.compare_digest(digest, known) for known in self._digests))


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


def read_secrets(path: Path) -> list[str]:
    """Those of a file, one a line; empty lines and `#` lines do not count."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


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
