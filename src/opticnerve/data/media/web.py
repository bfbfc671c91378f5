"""What data name by an address: fetched once into a folder that the data entry names (`media_cache`), and found there.

Naming the folder is the consent. An address is fetched with a bound on its size and on the time it may say nothing, and
kept under the hash of its text; beside it stands the hash of what came, which is compared when the file is used again.
What is there is not fetched again, so a pass that was stopped goes on where it was; what failed is tried again. A few
are fetched side by side, fewer of one host. Hosts within this network are not asked, whatever a name leads to
(`common.fetch`), unless the data entry allows it.
`s3://`, `gs://`, `hf://` and the like go through fsspec (`media.cloud`).
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
import zlib
from pathlib import Path
from urllib.parse import urlsplit

from opticnerve.common import atomic
from opticnerve.common.cache import alone
from opticnerve.common.fetch import Unfetched, fetch
from opticnerve.data.media.cloud import explained, filesystem, in_cloud
from opticnerve.data.media.files import Kind
from opticnerve.types import DataError, OpticNerveError

MAX_MEDIUM: dict[Kind, int] = {"image": 64 << 20, "audio": 512 << 20, "video": 1 << 30}
"""Bytes that are fetched of one."""
SECONDS, TRIES, PAUSE = 30.0, 3, 1.0
"""How long one may say nothing, how often it is asked, and the first pause between (it doubles)."""
ALL_SECONDS, MOST_WAIT, REDIRECTS = 3600.0, 60.0, 5
"""How long one may take in all, how long a host's Retry-After is obeyed, and how many redirects are followed."""
AT_ONCE, OF_A_HOST = 8, 4
"""How many are fetched side by side, and how many of one host."""
_AGENT = "opticnerve (https://pypi.org/project/opticnerve)"
_SEEN: set[Path] = set()  # files whose hash this process has compared
_HOSTS = [threading.BoundedSemaphore(OF_A_HOST) for _ in range(256)]


def fetched(url: str, folder: Path, kind: Kind, *, private: bool = False) -> Path:
    """The file of an address, fetched if it is not there yet. `private`: hosts within this network are asked, too.

    Raises:
        DataError: it cannot be had, or is larger than it may be (kind `url`).
    """
    try:
        key = hashlib.sha256(url.encode()).hexdigest()
    except UnicodeEncodeError as e:
        problem = f"{url[:200]!a} holds half a surrogate pair, which is no character"
        raise DataError(problem, kind="url", remedy="correct the address, or leave the sample out") from e
    ending = Path(urlsplit(url).path).suffix.lower()
    file = folder / key[:2] / f"{key}{ending if ending[1:].isalnum() and len(ending) < 6 else ''}"
    notes = file.with_suffix(".json")
    if _is_there(file, notes):
        return file
    problem = f"the media cache {folder} cannot be written"
    with alone(file.parent, problem, "name another folder with media_cache"):  # two records may name one picture
        if _is_there(file, notes):
            return file
        content = _download(url, MAX_MEDIUM[kind], folder, private)
        try:
            atomic.write(file, content)
            about = {"url": url, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            atomic.write_json(notes, about)
        except OSError as e:
            raise OpticNerveError(
                f"{problem}: {e.strerror or e}; name another folder with media_cache", kind="no-permission"
            ) from e
    return file


def _is_there(file: Path, notes: Path) -> bool:
    """Whether it has been fetched, and is what it was then; a process compares each once."""
    if file not in _SEEN and not (file.is_file() and _is_whole(file, notes)):
        return False
    _SEEN.add(file)
    return True


def _is_whole(file: Path, notes: Path) -> bool:
    try:
        about = json.loads(notes.read_text())
        return bool(about["bytes"] == file.stat().st_size) and about["sha256"] == atomic.sha256(file)
    except (OSError, ValueError, KeyError):
        return False


def _download(url: str, most: int, folder: Path, private: bool) -> bytes:
    problem, wait = "", 0.0
    host = urlsplit(url).netloc.rpartition("@")[2].lower()
    with _HOSTS[zlib.crc32(host.encode()) % len(_HOSTS)]:
        for number in range(TRIES):
            if number:
                time.sleep(max(PAUSE * 2 ** (number - 1), min(wait, MOST_WAIT)))
            try:
                return _of_cloud(url, most) if in_cloud(url) else fetch(
                    url, max_bytes=most, seconds=ALL_SECONDS, idle=SECONDS, redirects=REDIRECTS, private=private,
                    agent=_AGENT,
                )  # fmt: skip
            except Unfetched as e:
                problem, wait = str(e), e.wait
                if not e.passing:
                    break
    remedy = "run again when it can be reached, or leave the sample out with bad_samples: skip"
    if "not public" in problem:
        remedy = "leave the sample out, or write allow_private_hosts: true if you trust this data"
    raise DataError(f"{url[:200]} cannot be fetched into {folder}: {problem}", kind="url", remedy=remedy)


def _of_cloud(url: str, most: int) -> bytes:
    """The bytes of a file that fsspec reads."""
    try:
        with filesystem(url)[0].open(url, "rb") as file:
            content: bytes = file.read(most + 1)
    except Exception as e:  # each of fsspec's packages has its own, few of them an OSError
        error = explained(e, url)
        if error.kind == "missing-file":
            raise Unfetched("there is no such file") from None
        if error.kind != "network":  # what holds for all files alike
            raise error from e
        raise Unfetched(str(e) or type(e).__name__, passing=not isinstance(e, ValueError)) from None
    if len(content) > most:
        raise Unfetched(f"it has more than the {most:,} bytes allowed")
    return content
