"""The models that the page offers, by the names that `opticnerve ask` takes, and the few of them that are in memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opticnerve.data.media.images import MAX_PIXELS
from opticnerve.types import OpticNerveError


@dataclass(frozen=True)
class PageLimits:
    """`upload_bytes`: of a picture's file, or a video's. `pixels`: of a picture, by its header. `video_pixels`: in all
    frames of a video, which may have to be decoded. `waiting`: questions in the queue. `question_characters`: of one
    question. `answer_tokens`: of the longest answer. `models`: kept in memory."""

    upload_bytes: int = 20_000_000
    pixels: int = min(64_000_000, MAX_PIXELS)
    video_pixels: int = 10_000_000_000
    waiting: int = 16
    question_characters: int = 4_000
    answer_tokens: int = 512
    models: int = 2

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise OpticNerveError(f"{name.replace('_', '-')} must be 1 or more, not {value}", kind="out-of-range")


class Models:
    """One model works at a time, and the `keep` last used ones stay loaded.

    Only what is offered is ever loaded: the names given, their stages, and the finished runs under `runs`. A page
    cannot name another folder or a hub.

    Args:
        names: as for `opticnerve ask`; each is looked at here, so that a wrong one is found before the page opens.
        runs: the folder whose runs are offered beside them.
        keep: loaded models in memory.
        device, trust_remote_code: as for `load_model`.

    Raises:
        OpticNerveError: a name that stands for no model, or for one that holds no conversation.
    """

    def __init__(
        self, names: Sequence[str], *, runs: Path | None = None, keep: int = 2, device: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:  # fmt: skip
        from opticnerve.models.checkpoint.source import resolve
        from opticnerve.models.family import family_of

        self.names, self.runs, self.keep = list(dict.fromkeys(names)), runs, keep
        self.device, self.trust_remote_code = device, trust_remote_code
        self._lock = threading.Lock()  # one turn at a time; released by whichever thread ends the answer
        self._loaded: OrderedDict[tuple[str, bool], Any] = OrderedDict()
        for name in self.names:
            if not (family := family_of(resolve(name))).MODEL.can_generate():
                raise OpticNerveError(
                    f"{name} holds a {family.SPEC.KIND} model, which holds no conversation; name a docked one",
                    kind="unsupported",
                )

    def choices(self) -> list[str]:
        """What can be asked now: the names given, then stages and runs, for a run may have ended since."""
        found = list(self.names)
        for name in self.names:
            found += _stages(Path(name))
        if self.runs is not None and self.runs.is_dir():
            for folder in sorted(p for p in self.runs.iterdir() if p.is_dir()):
                stages = _stages(folder)
                found += [str(folder), *stages] if stages else []
        return list(dict.fromkeys(found))

    def is_loaded(self, name: str) -> bool:
        """Whether a turn with this model begins at once; else it is read from disk first."""
        return (name, False) in self._loaded

    @contextmanager
    def turn(self, name: str, *, exact: bool = False) -> Iterator[Any]:
        """The `Answerer` of a model, for the caller alone until the block is left.

        `exact`: weights as float32, as `opticnerve look` takes them.

        Raises:
            OpticNerveError: the model is not on offer, or does not load.
        """
        with self._lock:
            yield self._get(name, exact)

    def _get(self, name: str, exact: bool) -> Any:
        import torch

        from opticnerve.inference.generate import Answerer
        from opticnerve.inference.load import load_model

        key, usual = (name, exact), self._loaded.get((name, False))
        if exact and usual is not None and usual.model.dtype == torch.float32:
            key = (name, False)
        if key not in self._loaded:
            if name not in self.choices():
                raise OpticNerveError(f"there is no model {name!r} on this page", kind="unknown-name")
            while len(self._loaded) >= self.keep:  # before the next one: both at once may be too much
                self._loaded.popitem(last=False)
            dtype = torch.float32 if exact else None
            both = load_model(name, device=self.device, dtype=dtype, trust_remote_code=self.trust_remote_code)
            self._loaded[key] = Answerer(*both)
        self._loaded.move_to_end(key)
        return self._loaded[key]


def _stages(folder: Path) -> list[str]:
    """The finished stages of a run, as `opticnerve ask` takes them; those that hold no conversation are left out."""
    from opticnerve.models.family import family_of

    found = []
    for stage in sorted(p.parent for p in folder.glob("stages/*/dock.json")):
        with suppress(OpticNerveError):  # being written, or damaged: it is not on offer
            found += [str(stage)] if family_of(str(stage)).MODEL.can_generate() else []
    return found
