"""What a target is, and what every case of it must keep to."""

from __future__ import annotations

import contextlib
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from opticnerve.types import OpticNerveError

SECONDS = 2.0  # that a case may take
# Peak memory that the cases of a target may add, in MiB. The largest picture allowed, 64 million pixels with an alpha
# channel, takes 1,000 by itself.
MEBIBYTES = 1_500


@dataclass(frozen=True)
class Target:
    """One way in for files that somebody else wrote.

    `make(rng)` gives a case as bytes. `run(case, folder)` does with it what opticnerve does, in a folder of the target; it
    returns, or raises an `OpticNerveError`, which the command line turns into one message. `share`: of the cases that
    are asked for, how many are tried; under 1 for what takes long.
    """

    name: str
    make: Callable[[random.Random], bytes]
    run: Callable[[bytes, Path], None]
    share: float = 1.0


class Hang(BaseException):
    """A case took too long. (Not an `Exception`: nothing on the way may catch it.)"""


def case(target: Target, seed: int, index: int) -> bytes:
    """The same bytes for the same numbers, on every machine."""
    return target.make(random.Random(f"{seed} {target.name} {index}"))


def attempt(target: Target, data: bytes, folder: Path, *, seconds: float = SECONDS) -> str:
    """Run a case; "accepted" or "refused".

    Raises:
        Hang: it took longer. Whatever else: it was not refused by an error of ours.
    """
    try:
        with limited(seconds):
            target.run(data, folder)
    except OpticNerveError as e:
        check_message(str(e))
        return "refused"
    return "accepted"


def check_message(message: str) -> None:
    """A message that a terminal can show: there is one, and it does not scroll everything else away."""
    assert message.strip(), "an error without a message"
    assert len(message) < 20_000, f"a message of {len(message):,} characters: {message[:200]}"


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises `Hang` in the block after so many seconds of the clock: a blocked `open` takes no processor time."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"still busy after {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    # Whoever runs us (pytest-timeout) may have an alarm of its own under way.
    theirs, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if theirs:
            signal.setitimer(signal.ITIMER_REAL, theirs)


def peak_mebibytes() -> float:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)
