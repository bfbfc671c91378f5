"""Where the page listens, and who must show a login there."""

from __future__ import annotations

from opticnerve.types import OpticNerveError
from opticnerve.web.guard import Logins
from opticnerve.web.listen import is_loopback

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def address(host: str, logins: Logins, *, no_auth: bool) -> frozenset[str] | None:
    """The names that the page shall answer to when it listens on `host`; None for all of them.

    Raises:
        OpticNerveError: no such address; or others reach it, and neither a login nor `no_auth` is given.
    """
    local = is_loopback(host)
    if not local and not logins and not no_auth:
        raise OpticNerveError(
            f"{host} is reached by other machines: give --login-file (or OPTICNERVE_UI_LOGIN), or --no-auth if "
            "everybody who reaches it may use the page, see the runs and train"
        )
    return LOCAL_NAMES | {host.lower()} if local and not logins and not no_auth else None
