"""Where the page listens, and who must show a login there."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path

from opticnerve.types import OpticNerveError
from opticnerve.ui.door import Logins

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def address(host: str, logins: Logins, *, no_auth: bool) -> frozenset[str] | None:
    """The names that the page shall answer to when it listens on `host`; None for all of them.

    Raises:
        OpticNerveError: no such address; or others reach it, and neither a login nor `no_auth` is given.
    """
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError as e:
        raise OpticNerveError(f"there is no address {host!r} to listen on: {e.strerror or e}") from e
    local = all(ipaddress.ip_address(a.split("%")[0]).is_loopback for a in found)
    if not local and not logins and not no_auth:
        raise OpticNerveError(
            f"{host} is reached by other machines: give --login-file (or OPTICNERVE_UI_LOGIN), or --no-auth if "
            "everybody who reaches it may use the page, see the runs and train"
        )
    return LOCAL_NAMES | {host.lower()} if local and not logins and not no_auth else None


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        OpticNerveError: the address or port is not to be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as e:
        raise OpticNerveError(f"cannot listen on {host}, port {port}: {e.strerror or e}; try another --port") from e


def read_logins(path: Path) -> list[str]:
    """`user:password` pairs of a file, one a line; empty lines and `#` lines do not count."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]
