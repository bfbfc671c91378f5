"""One thread owns the model: it takes requests in the order they came, and gives every row one token at a time."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import deque
from typing import Any

import torch
from torch import Tensor

from opticnerve.inference.generate import Answerer
from opticnerve.serve.batch import RunningBatch
from opticnerve.serve.errors import ApiError
from opticnerve.serve.limits import Metrics
from opticnerve.serve.sequence import GenerationJob, RunningSequence

log = logging.getLogger("opticnerve.serve")


class Scheduler:
    """Answers jobs, together where they wait together.

    Args:
        answerer: the model and its processor; from `start` on no other thread may call the model.
        slots: rows answered at a time. metrics: what is counted.

    Between two steps at most one prompt is read, so that those who are being answered wait for one reading and not for
    all. Jobs are taken in order: one with several choices waits until so many slots are free, and those behind it wait
    with it.
    """

    def __init__(self, answerer: Answerer, *, slots: int, metrics: Metrics) -> None:
        self.batch, self.slots, self.metrics = RunningBatch(answerer), slots, metrics
        self.model = answerer.model
        # The reading thread pads with the other tokenizer: a Rust tokenizer refuses two threads at a time.
        self.tokenizer: Any = copy.deepcopy(answerer.processor.tokenizer)
        self.ends = answerer.stops()["eos_token_id"]
        self.rows: list[RunningSequence] = []  # as they stand in the batch
        self.waiting: deque[GenerationJob] = deque()
        self.stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: GenerationJob) -> None:
        """Queue a job; how many may wait is for the caller to bound."""
        if job.asked.choices > self.slots:
            raise ApiError(
                400, f"n is {job.asked.choices}, more than the {self.slots} answers made at a time", param="n"
            )
        with self._changed:
            if self.stopping:
                raise ApiError(503, "the server is stopping", retry_after=5)
            if not self.alive:
                raise ApiError(503, "the model's thread has ended; the server must be started again")
            self.waiting.append(job)
            self._changed.notify()

    def stop(self) -> None:
        """End now: what runs is cut off, what waits is refused. Returns when the thread has ended."""
        with self._changed:
            self.stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=30)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def running(self) -> int:
        return sum(row.live for row in self.rows)

    # -- the model's thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.stopping or self.waiting or self.rows)
            if self.stopping:
                break
            try:
                self._turn()
            except Exception:
                # Whatever broke, broke for all rows of this step; the next requests find a clean batch.
                log.exception("a step of the model failed; %d answers are lost", self.running)
                self._fail({row.job for row in self.rows if row.live}, 500, "the model failed while it answered")
                self.rows = []
                self.batch.clear()
            self._count()
        for row in self.rows:
            if row.live:
                row.end("length")
        self._fail(set(self.waiting), 503, "the server is stopping")
        self.rows, self.waiting = [], deque()
        self._count()

    def _turn(self) -> None:
        self._drop()
        job = self._next()
        if job is not None:
            self._admit(job)
            self._count()
        if self.running == 0:
            self.rows = []
            self.batch.clear()
            return
        started = time.monotonic()
        logits_BV = self.batch.step([row.token for row in self.rows], [row.live for row in self.rows])
        for row, logits_V in zip(self.rows, logits_BV, strict=True):
            if row.live:
                self._emit(row, logits_V)
        self.metrics.step.observe(time.monotonic() - started)

    def _emit(self, row: RunningSequence, logits_V: Tensor) -> None:
        try:
            row.emit(logits_V)
        except ApiError as e:  # a grammar that became too costly
            self._lose(row.job, e)
        except Exception:  # logits that are no numbers, for one: the others' are
            log.exception("a token could not be chosen")
            self._lose(row.job, ApiError(500, "the model failed while it answered"))

    def _lose(self, job: GenerationJob, why: ApiError) -> None:
        for row in self.rows:
            row.live = row.live and row.job is not job
        job.tell(why)

    def _drop(self) -> None:
        """Rows nobody waits for end here, and so do those whose time is over; what has ended is left out by halves."""
        now = time.monotonic()
        for row in self.rows:
            if row.live and row.job.gone.is_set():
                row.live = False
            elif row.live and now >= row.job.deadline:
                row.end("length")
        if 2 * self.running <= len(self.rows):
            self._compact()

    def _compact(self) -> None:
        live = [i for i, row in enumerate(self.rows) if row.live]
        if len(live) < len(self.rows):
            self.batch.keep(live)
            # A batch that no row can leave early keeps its rows until the last has ended.
            if self.batch.joins or not live:
                self.rows = [self.rows[i] for i in live]

    def _next(self) -> GenerationJob | None:
        """The first job in line, if it can be taken now."""
        now = time.monotonic()
        with self._changed:
            over = {job for job in self.waiting if now >= job.deadline and not job.gone.is_set()}
            self.waiting = deque(job for job in self.waiting if job not in over and not job.gone.is_set())
            job = self.waiting[0] if self.waiting else None
            fits = job is not None and job.asked.choices <= self.slots - self.running
            if job is None or not fits or (self.running and not self.batch.joins):
                job = None
            else:
                self.waiting.popleft()
        self._fail(over, 504, "the time for this request was over before its turn came")
        return job

    def _admit(self, job: GenerationJob) -> None:
        """Read a prompt; its answers begin. A prompt that breaks the model breaks for its own request alone."""
        started = time.monotonic()
        try:
            echo = job.prompt.echo is not None
            each = echo and job.asked.likeliest is not None
            logits_NV, read = self.batch.read(job.prompt.inputs, job.asked.choices, each=each)
            new = [RunningSequence(job, i, self.model, self.tokenizer, self.ends) for i in range(job.asked.choices)]
            of_prompt = [] if read.logits_LV is None else new[0].of_prompt(read.logits_LV)
            for row, logits_V in zip(new, logits_NV, strict=True):
                if echo:
                    row.echo(of_prompt)
                if row.live:
                    row.emit(logits_V)
            chosen = [row.number for row in new if row.live] if self.batch.joins else list(range(len(new)))
            if any(row.live for row in new):
                self._compact()
                self.batch.join(read, chosen)
                self.rows += [new[i] for i in chosen]
        except ApiError as e:
            job.tell(e)
            return
        except torch.OutOfMemoryError:
            log.exception("no memory for a prompt of %d tokens", len(job.prompt.ids))
            self._fail({job}, 503, "there is not enough memory for this prompt now")
            return
        except Exception:
            log.exception("a prompt of %d tokens could not be read", len(job.prompt.ids))
            self._fail({job}, 500, "the model failed while it read the prompt")
            return
        self.metrics.prompt_seconds.observe(time.monotonic() - started)
        self.metrics.prompt_tokens.inc(len(job.prompt.ids))

    def _fail(self, jobs: set[GenerationJob], status: int, message: str) -> None:
        for job in jobs:
            job.tell(ApiError(status, message, retry_after=1 if status == 503 else None))

    def _count(self) -> None:
        self.metrics.running.set(self.running)
        self.metrics.waiting.set(len(self.waiting))
