"""Names of a hub as folders of its cache, and what goes wrong on the way in one sentence with its remedy.

Everything that loads by name asks here first and then reads a folder: the files are known (so that runs record their
hashes), nothing is fetched twice, and transformers never picks a pickle in place of safetensors.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from opticnerve.common.cache import sha256_of
from opticnerve.types import OpticNerveError

# Configuration, tokenizer, templates; the README and what lies in sub-folders (onnx, original) are left.
_SMALL = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
_INDEX, _WHOLE, _TRAINED = "model.safetensors.index.json", "model.safetensors", "trained.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
NETWORK = {"aiohttp", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3"}
# In as many ways do transformers and its parts say that a file is missing, damaged, or of a kind they do not know.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, StrictDataclassError)
REMEDY = "give a local folder or a hub name in reach"


class HubError(OpticNerveError):
    """A name of the hub that cannot be had. `kind`: name, gated, repository, revision, file, weights, offline, token,
    network, refused, damaged or disk."""

    def __init__(self, problem: str, remedy: str = "", *, kind: str = "refused") -> None:
        super().__init__(f"{problem}; {remedy}" if remedy else problem)
        self.problem, self.remedy, self.kind = problem, remedy, kind


def fetch(name: str, *, weights: bool = True) -> str:
    """The folder that a model's name stands for: itself where it is one, else that of the hub's cache, filled first.

    Args:
        name: a local folder, or `OWNER/NAME` of the hub, with `@REVISION` (a branch, tag or commit) where one is meant.
        weights: bring the weights, too, and check them against the SHA-256 that the hub names; else only the small
            files (configuration, tokenizer).

    Raises:
        HubError: it is not to be had; the message says why, and what to do.
    """
    if Path(name).is_dir():
        return name
    repository, revision = split_revision(name)
    from huggingface_hub import snapshot_download

    with errors(name):
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=_SMALL, ignore_patterns=["*/*"]))
        if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
            raise HubError(
                f"{name!r} holds no config.json, so it is no model that transformers or timm can read",
                "check the name; of GGUF files alone `gguf_file` names one",
                kind="file",
            )
        if weights and not (folder / "adapter_config.json").is_file():
            for file in _weights(name, folder):
                check_hash(name, download(repository, file, folder.name))
    return str(folder)


def fetch_file(name: str, file: str) -> Path:
    """One file of a local folder or of a repository `OWNER/NAME[@REVISION]`."""
    if Path(name).is_dir():
        if not (Path(name) / file).is_file():
            raise HubError(f"{name} holds no {file}", "check the name of the file", kind="file")
        return Path(name) / file
    repository, revision = split_revision(name)
    with errors(name):
        return check_hash(name, download(repository, file, revision))


def split_revision(name: str) -> tuple[str, str | None]:
    """`owner/name@revision` as its two halves.

    Raises:
        HubError: it is no name that a hub could have.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repository, at, revision = name.partition("@")
    possible = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository, re.ASCII) and bool(at) == bool(revision)
    with contextlib.suppress(HFValidationError):
        if possible:
            validate_repo_id(repository)
            return repository, revision or None
    raise HubError(f"there is no folder {name!r}, and no hub has such a name (OWNER/NAME)", "check it", kind="name")


def download(repository: str, file: str, revision: str | None) -> Path:
    """A file in the hub's cache; one that broke off before goes on where it stopped."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository, file, revision=revision))


def check_hash(name: str, file: Path) -> Path:
    """`file` again, if its contents are those by whose SHA-256 the cache calls them (large files'; small ones' names
    are git's).

    Raises:
        HubError: they are not.
    """
    blob = file.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name) and sha256_of(blob) != blob.name:
        raise HubError(
            f"{file.name} of {name!r} is damaged: its SHA-256 is not the one that the hub names",
            f"delete {blob} and run the command again",
            kind="damaged",
        )
    return file


def _weights(name: str, folder: Path) -> list[str]:
    """The files that transformers reads a model's weights from (in a run's folder: what was trained)."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    repository, _ = split_revision(name)
    index = folder / _INDEX
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            remedy = f"delete {index} and run the command again"
            raise HubError(f"{_INDEX} of {name!r} lists no shards", remedy, kind="damaged") from e
        if wrong := [s for s in shards if not isinstance(s, str) or not re.fullmatch(r"[\w.-]+\.safetensors", s)]:
            raise HubError(f"{_INDEX} of {name!r} lists {str(wrong[0])[:80]!r}, which is no shard", kind="weights")
        return shards
    single = _TRAINED if (folder / "dock.json").is_file() else _WHOLE
    if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(repository, single, revision=folder.name), str):
        return [single]
    files = HfApi().list_repo_files(repository, revision=folder.name)
    if single in files:
        return [single]
    if pickles := [f for f in files if f.endswith(_PICKLES) and "/" not in f]:
        raise HubError(
            f"the weights of {name!r} are pickles ({pickles[0]}), and opticnerve reads safetensors alone",
            _converted(repository),
            kind="weights",
        )
    raise HubError(f"{name!r} holds no weights ({single})", "check the name and the revision", kind="weights")


def _converted(repository: str) -> str:
    """Where the hub's own conversion of pickles stands, if it can be found out."""
    from huggingface_hub import get_repo_discussions

    with contextlib.suppress(Exception):  # a hint; whatever fails here, the remedy is the other one
        for found in get_repo_discussions(repository):
            if found.is_pull_request and found.status == "open" and "safetensors" in found.title:
                return (
                    f"pull request {found.num} of the repository offers them ({found.title!r}, by {found.author}): if "
                    f"you trust it, write {repository}@refs/pr/{found.num}"
                )
    return (
        f"take a revision that has them ({repository}@REVISION), or save the model once by transformers' "
        "save_pretrained and name that folder"
    )


def read_config(name: str, called: str = "") -> Any:
    """transformers' configuration of a folder or hub model; `called`: what the user calls a folder of the cache.

    Raises:
        OpticNerveError: nothing there, the hub is not reached, or no configuration that transformers knows.
    """
    import torch
    from transformers import AutoConfig

    try:
        # Configurations hold tensors here and there, and are read even where `plan` builds on the meta device.
        with torch.device("cpu"), quiet():
            folder = fetch(name, weights=False)
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)  # an error, not a question
    except OpticNerveError:
        raise
    except UNREADABLE as e:
        raise unreadable(f"the configuration of {(called or name)!r}", e, REMEDY) from e


def find_file(name: str, file: str) -> Path | None:
    """A small file of a folder or hub model; None where the model has none of that name.

    Raises:
        OpticNerveError: whether it has one cannot be told: the hub is not reached, or refuses.
    """
    path = Path(fetch(name, weights=False)) / file
    return path if path.is_file() else None


def says_how(name: str, part: str) -> bool:
    """Whether a checkpoint says how media are prepared: in a file of its own, or as `part` ("image_processor",
    "feature_extractor") of a processor that was written as one file."""
    if find_file(name, "preprocessor_config.json"):
        return True
    file = find_file(name, "processor_config.json")
    return file is not None and f'"{part}"' in file.read_text(encoding="utf-8", errors="replace")


def unreadable(what: str, error: BaseException, remedy: str) -> OpticNerveError:
    """One sentence about a file that could not be read: what the library says, cut short, and what to do."""
    return OpticNerveError(f"cannot read {what}: {brief(error)}; {remedy}", kind="damaged")


@contextlib.contextmanager
def errors(name: str, *, writes: bool = False) -> Iterator[None]:
    """Whatever a library raises because a hub is asked for `name` is one sentence; all else passes."""
    try:
        yield
    except OpticNerveError:
        raise
    except Exception as e:
        found = explain(e, name)
        if found is None:
            raise
        if writes and found.kind in ("repository", "token", "gated"):
            remedy = "log in by `hf auth login` (or set HF_TOKEN) with a token that may write there"
            raise HubError(f"the hub does not let you write to {name!r}", remedy, kind="token") from e
        raise found from e


def explain(error: BaseException, name: str, *, kind: str = "model") -> HubError | None:
    """A library's error as ours, where it, or what it was raised from, speaks of the hub, its cache or the network."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hf

    chain = list(_causes(error))

    def one(*classes: Any) -> Any:
        return next((e for e in chain if isinstance(e, classes)), None)

    repository, _, revision = name.partition("@")
    where = f"{constants.ENDPOINT}/{'datasets/' if kind == 'data set' else ''}{repository}"
    log_in = "log in by `hf auth login` (or set HF_TOKEN)"
    status = next((s for e in chain if (s := getattr(getattr(e, "response", None), "status_code", None))), None)
    if one(hf.GatedRepoError):
        return HubError(f"{name!r} is gated", f"accept its licence on {where}, {log_in}, and try again", kind="gated")
    if one(hf.RevisionNotFoundError):
        problem = f"{repository!r} has no revision {revision or 'main'!r}"
        return HubError(problem, f"set a branch, tag or commit that {where} shows", kind="revision")
    if one(hf.RepositoryNotFoundError, hf.DisabledRepoError):
        problem = f"there is no folder {name!r} here, and no {kind} of that name at {where}"
        return HubError(problem, f"check the name or, if it is private, {log_in}", kind="repository")
    if missing := one(hf.RemoteEntryNotFoundError):
        file = str(missing.response.url).rpartition("/")[2] if missing.response is not None else "such file"
        return HubError(f"{name!r} holds no {file}", "check the name and the revision", kind="file")
    if status == 401:
        return HubError(f"the hub refuses the token that it was sent for {name!r}", f"{log_in} anew", kind="token")
    if status == 403:
        return HubError(f"the hub refuses {name!r} (403)", f"give the token access to {where}", kind="token")
    if any(isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT) for e in chain):
        problem = f"there is no room for {name!r} in {constants.HF_HUB_CACHE}"
        return HubError(problem, "make room, or set HF_HOME to a folder on another disk", kind="disk")
    network = next((e for e in chain if type(e).__module__.partition(".")[0] in NETWORK), None)
    torn = next((e for e in chain if "Consistency check failed" in str(e)), None)
    network = network or torn or one(hf.HfHubHTTPError, hf.LocalEntryNotFoundError, ConnectionError, TimeoutError)
    if one(hf.OfflineModeIsEnabled) or (constants.HF_HUB_OFFLINE and network is not None):
        problem = f"{name!r} is not (or not whole) in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it"
        return HubError(problem, "unset it once, or name a local folder", kind="offline")
    if network is not None:
        problem = f"{name!r} cannot be fetched from {constants.ENDPOINT}: "
        problem += f"it answers {status}" if status else brief(network)
        remedy = "check the network and run the command again: a download goes on where it stopped"
        return HubError(problem, remedy, kind="network")
    return None


def refusal(name: str) -> HubError | None:
    """Why the hub does not give a data set, asked of it directly; None where it would. (`datasets` drops it.)"""
    from huggingface_hub import HfApi

    repository, _, revision = name.partition("@")
    try:
        HfApi().repo_info(repository, repo_type="dataset", revision=revision or None)
        HfApi().auth_check(repository, repo_type="dataset")
    except Exception as e:  # whatever the hub, the network or the name is wrong in
        return explain(e, name, kind="data set")
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers' log says nothing below an error: of a checkpoint of which a part is taken it warns of the rest
    (SigLIP's text tower, for one, names tokens that it does not have)."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def brief(error: BaseException) -> str:
    """What an error says, short enough for a sentence."""
    said = " ".join(str(error).split()) or type(error).__name__
    return f"{said[:240]}…" if len(said) > 240 else said.rstrip(" .;:")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
