"""Who may ask: keys, where the server may listen without one, and which names it answers to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from opticnerve.serve.errors import ApiError
from opticnerve.types import OpticNerveError
from opticnerve.web.listen import Secrets, is_loopback


class Keys:
    """API keys, kept as digests; with none, everybody may ask."""

    def __init__(self, keys: Sequence[str]) -> None:
        for key in keys:
            if len(key) < 8 or key.strip() != key or not key.isascii():
                raise OpticNerveError(
                    f"an API key wants 8 or more ASCII characters without spaces around; this one has {len(key)}. "
                    "Make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
                )
        self._known = Secrets(keys)

    def __bool__(self) -> bool:
        return bool(self._known)

    def check(self, authorization: bytes | None) -> None:
        """Refuse unless `Authorization: Bearer …` holds one of the keys."""
        if not self._known:
            return
        scheme, _, given = (authorization or b"").partition(b" ")
        if not given or scheme.lower() != b"bearer":
            raise ApiError(401, "send an API key as the header Authorization: Bearer KEY", code="missing_api_key")
        if not self._known.hold(given.strip()):
            raise ApiError(401, "this API key is not known here", code="invalid_api_key")


def check_address(host: str, keys: Keys, *, no_auth: bool) -> bool:
    """Whether `host` is this machine alone; an address that others reach is refused without a key.

    Raises:
        OpticNerveError: no such address; or others reach it, and neither a key nor `no_auth` is given.
    """
    local = is_loopback(host)
    if not local and not keys and not no_auth:
        raise OpticNerveError(
            f"{host} is reached by other machines: give --api-key (or OPTICNERVE_API_KEY), or --no-auth if everybody "
            "who reaches it may use it"
        )
    return local


def check_host(headers: Mapping[bytes, bytes], host: str) -> None:
    """On a keyless server for this machine alone, refuse names that a web page could make up for it (DNS rebinding)."""
    name = headers.get(b"host", b"").decode("latin-1").lower()
    name = name[1 : name.find("]")] if name.startswith("[") else name.partition(":")[0]
    if name not in ("localhost", "127.0.0.1", "::1", host.lower()):
        raise ApiError(403, "this server answers to localhost alone; give it an API key to use another name")
