"""What lies in a cloud: `s3://`, `gs://`, `hf://` and the like, through fsspec and the packages that it wants.

Credentials are found as these packages find them (environment, files of the provider's own tools); of a bucket that is
open to all, fsspec's environment variables say so (filesystem-spec.readthedocs.io, "Configuration").
"""

from __future__ import annotations

from typing import Any

from opticnerve.types import DataError, OpticNerveError, to_install

CLOUD = ("s3://", "gs://", "gcs://", "hf://", "az://", "abfs://")
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
_KEYS = {
    "s3fs": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a public bucket FSSPEC_S3_ANON=true",
    "gcsfs": "set GOOGLE_APPLICATION_CREDENTIALS; for a public bucket FSSPEC_GS_TOKEN=anon",
    "adlfs": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "hf": "set HF_TOKEN",
}


def in_cloud(path: object) -> bool:
    return str(path).startswith(CLOUD)


def filesystem(path: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path within it.

    Raises:
        OpticNerveError: the package for it is missing (kind `not-installed`).
    """
    import fsspec  # type: ignore[import-untyped]

    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(path)
    except ImportError as e:
        package = _package(path)
        problem = f"{path[:200]} wants the package {package}; {to_install(package)}"
        raise OpticNerveError(problem, kind="not-installed") from e
    except Exception as e:
        raise explained(e, path) from e
    return found


def explained(error: Exception, path: str) -> OpticNerveError:
    """What went wrong with an address, whichever package says it: of kind `missing-file`, `no-permission` (nobody has
    said who we are, or they may not read it) or `network`."""
    if isinstance(error, OpticNerveError):
        return error
    seen = f"{path[:200]} cannot be read"
    says = (str(error).strip().split("\n")[0] or type(error).__name__)[:300]
    if isinstance(error, FileNotFoundError):
        return DataError(f"there is no {path[:200]}", remedy="check the path", kind="missing-file")
    denied = isinstance(error, PermissionError) or getattr(error, "code", None) in (401, 403, "401", "403")
    # adlfs has a ValueError for nobody having said who we are.
    unknown = "Credential" in type(error).__name__ or (isinstance(error, ValueError) and "credentials" in str(error))
    if denied or unknown:
        remedy = _KEYS.get(_package(path), "give your credentials as its package wants them")
        return OpticNerveError(f"{seen}: {says}; {remedy}", kind="no-permission")
    return OpticNerveError(f"{seen}: {says}; run again when it can be reached", kind="network")


def _package(path: str) -> str:
    scheme = path.partition("://")[0]
    return _PACKAGES.get(scheme, scheme)
