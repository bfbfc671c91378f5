"""One answer as it is written: its tokens, its text, its end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from opticnerve.language.thinking import AnswerText
from opticnerve.serve.detokenizer import GrowingText, token_text
from opticnerve.serve.errors import ApiError
from opticnerve.serve.sampling import Chosen, TokenSampler, Wishes
from opticnerve.serve.schema import Finish, TokenLogprob, TopLogprob


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the model takes it: `inputs` of one row, and its token ids."""

    inputs: dict[str, Any]
    ids: list[int]


@dataclass(frozen=True, slots=True)
class Piece:
    """Something new of choice `number`: text, its tokens' log-probabilities, its end; `tokens` counts all so far."""

    number: int
    text: str
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None
    tokens: int = 0


Event = Piece | ApiError


@dataclass(eq=False)
class Job:
    """A request as the scheduler sees it.

    Args:
        prompt, wishes: what is read, and how tokens are chosen. choices: answers wanted. max_tokens: of each.
        stops: words that end an answer. deadline: in seconds of `time.monotonic`.
        tell: called from the model's thread with what is new; the last event is an error, or a piece with an end for
            each choice.
    """

    prompt: Prompt
    wishes: Wishes
    choices: int
    max_tokens: int
    stops: Sequence[str]
    deadline: float
    tell: Callable[[Event], None]
    gone: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Nobody waits for it any more: its rows leave the batch before the next token."""
        self.gone.set()


class Row:
    """A choice of a job while it is written."""

    def __init__(self, job: Job, number: int, model: Any, tokenizer: Any, ends: Sequence[int]) -> None:
        self.job, self.number, self.tokenizer, self.ends = job, number, tokenizer, ends
        self.token_sampler = TokenSampler(model, job.wishes, job.prompt.ids, number)
        self.text, self.answer = GrowingText(tokenizer, job.stops), AnswerText()
        self.count, self.token, self.live = 0, 0, True
        self._waiting: list[tuple[int, Chosen]] = []  # tokens with log-probabilities, and where their text begins

    def emit(self, logits_V: Tensor) -> None:
        """Choose the next token and tell what is new; `live` is False after the last."""
        chosen = self.token_sampler.choose(logits_V)
        self.token, self.count = chosen.token, self.count + 1
        if chosen.token in self.ends:
            self.end("stop")
            return
        at = len(self.text.text)
        text = self.text.put(chosen.token)
        if chosen.logprob is not None:
            self._waiting.append((at, chosen))
        if self.text.cut is not None:
            self._tell(text, "stop")
        elif self.count >= self.job.max_tokens:
            self._tell(text + self.text.end(), "stop" if self.text.cut is not None else "length")
        elif text:
            self._tell(text, None)

    def end(self, finish: Finish) -> None:
        """The last piece: nothing is chosen any more."""
        text = self.text.end()
        self._tell(text, "stop" if self.text.cut is not None else finish)

    def _tell(self, text: str, finish: Finish | None) -> None:
        cut = self.text.cut
        spoken = [chosen for at, chosen in self._waiting if cut is None or at < cut]
        self._waiting = []
        self.live = finish is None
        text = self.answer.put(text) + (self.answer.end() if finish else "")
        self.job.tell(Piece(self.number, text, [self._logprob(c) for c in spoken], finish, self.count))

    def _logprob(self, chosen: Chosen) -> TokenLogprob:
        top = [self._named(token, log_p) for token, log_p in chosen.top]
        assert chosen.logprob is not None
        return TokenLogprob(**self._named(chosen.token, chosen.logprob).model_dump(), top_logprobs=top)

    def _named(self, token: int, log_p: float) -> TopLogprob:
        text, raw = token_text(self.tokenizer, token)
        return TopLogprob(token=text, logprob=max(log_p, -9999.0), bytes=raw)  # JSON knows no infinity
