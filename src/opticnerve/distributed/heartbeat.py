"""A sign of life from each process: a dead or stopped one ends the others with its name, instead of leaving them to
hang.

Every process counts up in the store through which torch's processes find each other, from a thread of its own. The
first process watches all, all watch the first. An exchange that fails, or a count that stands still, is then explained:
which process is missing, what it was doing, and what error it told.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from opticnerve.types import OpticNerveError


class LostProcess(OpticNerveError):
    """Another process has stopped."""

    kind = "lost-process"


BEAT = 0.5
"""Seconds between two signs of life."""


class Heartbeat:
    """This process's signs of life, and its view of the others'.

    Args:
        rank, world: this process and how many there are.
        timeout: of exchanges between them. A process that gives no sign for a fifth of it is given up; one that does
            not end by itself a fifth after it should have is ended.
    """

    def __init__(self, rank: int, world: int, timeout: timedelta) -> None:
        self.rank, self.world, self.doing = rank, world, "starting"
        self.patience = timeout.total_seconds() / 5
        self._store = _connect(timeout)
        self._barriers = 0
        self._over = threading.Event()
        self._beat(0)
        self._thread = threading.Thread(target=self._live, name="opticnerve-heartbeat", daemon=True)
        self._thread.start()
        atexit.register(self._leave)

    def tell(self, error: Exception) -> None:
        """Leave word of an error that ends this process; the first word counts."""
        kind = "" if isinstance(error, OpticNerveError) else f"{type(error).__name__}: "
        self._mark_failed(f"process {self.rank} of {self.world} stopped ({self.doing}): {kind}{error}")

    def explain(self, error: Exception) -> str:
        """Who is missing after an exchange has failed."""
        cause = str(error).partition("\n")[0]
        try:
            before = self._counts()
            time.sleep(6 * BEAT)
            if (said := self._status()) is not None:
                return f"{said}. Process {self.rank} ends with it"
            after, left = self._counts(), self._left()
            silent = [r for r in range(self.world) if after[r] == before[r] and r != self.rank]
            if missing := sorted({*silent, *left} - {self.rank}):
                self._mark_failed(why := self._missing(missing))
                return f"{why} (process {self.rank}: {cause})"
            places = "; ".join(f"process {r}: {self._doing(r)}" for r in range(self.world))
            return (
                f"the processes did not meet within the time limit, though all of them live ({places}). Where one is "
                f"slow for good reason, set OPTICNERVE_TIMEOUT to more seconds (process {self.rank}: {cause})"
            )
        except dist.DistError:
            return f"{self._missing([0])} (process {self.rank}: {cause})"

    def barrier(self) -> None:
        """Wait until every process has called this as often."""
        self._barriers += 1
        key, pause = f"barrier/{self._barriers}", 0.01
        try:
            self._store.add(key, 1)
            while self._store.add(key, 0) < self.world:
                if (said := self._status()) is not None:
                    raise LostProcess(f"{said}. Process {self.rank} ends with it")
                if left := self._left():
                    raise LostProcess(self._missing(left, "ended"))
                time.sleep(pause)
                pause = min(1.0, 1.5 * pause)
        except dist.DistError as e:
            raise LostProcess(self.explain(e)) from e

    def _live(self) -> None:
        watched = range(1, self.world) if self.rank == 0 else range(1)
        heard = dict.fromkeys(watched, ("", time.monotonic()))
        doomed_since: float | None = None
        count = 0
        while not self._over.wait(BEAT):
            count += 1
            now = time.monotonic()
            try:
                self._beat(count)
                for r in watched:
                    if (sign := self._sign(r)) != heard[r][0]:
                        heard[r] = (sign, now)
                silent = [r for r, (_, since) in heard.items() if now - since > self.patience]
                if silent and (gone := [r for r in silent if r not in self._left()]):
                    self._mark_failed(self._missing(gone))
                said = self._status()
            except dist.DistError:  # the store lives in the first process, or in its launcher
                said = self._missing([0])
            if said is None:
                doomed_since = None
            elif doomed_since is None:
                doomed_since = now  # an exchange that fails says more; and all may be saving, or leaving, right now
            elif now - doomed_since > self.patience:
                sys.stderr.write(f"opticnerve: {said}. Process {self.rank} ends with it\n")
                sys.stderr.flush()
                os._exit(1)  # the main thread waits in an exchange that nobody will answer

    def _leave(self) -> None:
        self._over.set()
        self._thread.join(timeout=2 * BEAT)
        with contextlib.suppress(dist.DistError):
            self._store.set(f"left/{self.rank}", "1")

    def _beat(self, count: int) -> None:
        self._store.set(f"sign/{self.rank}", f"{count} {self.doing}")

    def _sign(self, rank: int) -> str:
        return self._read(f"sign/{rank}") or ""

    def _counts(self) -> list[str]:
        return [self._sign(r).partition(" ")[0] for r in range(self.world)]

    def _doing(self, rank: int) -> str:
        return self._sign(rank).partition(" ")[2] or "starting"

    def _left(self) -> list[int]:
        return [r for r in range(self.world) if self._store.check([f"left/{r}"])]

    def _status(self) -> str | None:
        return self._read("status")

    def _read(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _mark_failed(self, why: str) -> None:
        with contextlib.suppress(dist.DistError):
            self._store.compare_set("status", "", why)

    def _missing(self, ranks: list[int], how: str = "ended or does not answer") -> str:
        where = ""
        with contextlib.suppress(dist.DistError):
            where = f", last seen {self._doing(ranks[0])}"
        return (
            f"process {', '.join(map(str, ranks))} of {self.world} (counted from 0) has {how}{where}; the others "
            f"cannot go on without it. Its own output says more, if it could still write; go on with --resume"
        )


def _connect(timeout: timedelta) -> dist.Store:
    """A connection of our own to the process group's store: torch's is locked while the main thread waits in it."""
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as e:
        raise OpticNerveError(
            "several processes, but no MASTER_ADDR and MASTER_PORT; start them with `accelerate launch` or `torchrun`",
            kind="missing-field",
        ) from e
    within = min(timeout, timedelta(minutes=1))
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=within)
    return dist.PrefixStore(f"opticnerve/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
