"""One answer as it is written: its text so far, and what is told of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from opticnerve.language.thinking import AnswerText
from opticnerve.serve.errors import ApiError
from opticnerve.serve.grammar import AnswerGrammar
from opticnerve.serve.replies import AnswerToolCall, Finish, TokenLogprob, TopLogprob
from opticnerve.serve.sampling import TokenSampler
from opticnerve.serve.schema import SampledRequest
from opticnerve.serve.tools import ToolAnswer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration

# -- tokens to text: whole characters only, nothing behind a stop word ------------------------------------------------

_HALF = "\ufffd"  # what a tokenizer writes for a character whose last bytes are still to come


class IncrementalDetokenizer:
    """The text of one answer.

    A piece is handed out when no later token can change it: it ends in no half character, and it cannot be the
    beginning of a stop word. (The decoding window of Hugging Face's text-generation-inference: tokenizers that write a
    space before a word need the token before it.)

    Args:
        tokenizer: of transformers. stops: words at which the answer ends; they are left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, list(stops)
        self.ids: list[int] = []
        self._from, self._read = 0, 0  # the window begins at one token, and is decoded up to the other
        self.text, self.given = "", 0  # decoded for certain; how much of it has been handed out
        self.cut: int | None = None  # where a stop word begins

    def put(self, token: int) -> str:
        """One more token; the text that is now certain. `cut` is set if a stop word came."""
        self.ids.append(token)
        known, now = self._decode(self._from, self._read), self._decode(self._from, len(self.ids))
        if len(now) > len(known) and not now.endswith(_HALF):
            self._from, self._read = self._read, len(self.ids)
            return self._more(now[len(known) :])
        return ""

    def end(self) -> str:
        """The rest, when no token comes any more."""
        if self.cut is None:
            known, now = self._decode(self._from, self._read), self._decode(self._from, len(self.ids))
            self._search(now[len(known) :])
        return self._give(len(self.text) if self.cut is None else self.cut)

    def _more(self, piece: str) -> str:
        self._search(piece)
        if self.cut is not None:
            return self._give(self.cut)
        held = max((_overlap(self.text, stop) for stop in self.stops), default=0)
        return self._give(len(self.text) - held)

    def _search(self, piece: str) -> None:
        old = len(self.text)
        self.text += piece
        found = [self.text.find(stop, max(0, old - len(stop) + 1)) for stop in self.stops]
        self.cut = min((at for at in found if at >= 0), default=None)

    def _give(self, until: int) -> str:
        piece = self.text[self.given : until]
        self.given = max(self.given, until)
        return piece

    def _decode(self, start: int, end: int) -> str:
        return str(self.tokenizer.decode(self.ids[start:end], skip_special_tokens=True))


def _overlap(text: str, stop: str) -> int:
    """How much of the end of `text` is the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


@lru_cache(maxsize=65_536)
def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> tuple[str, list[int] | None]:
    """A token alone, as text and as UTF-8 bytes (None where the tokenizer does not tell)."""
    raw: Any = tokenizer.convert_ids_to_tokens(token)
    text = str(tokenizer.decode([token]))
    if raw is not None and raw.startswith("▁") and not text.startswith(" "):
        text = " " + text  # SentencePiece's decoders strip the first space
    if _HALF not in text:
        return text, list(text.encode())
    if raw is not None and raw.startswith("<0x") and len(raw) == 6:
        return text, [int(raw[3:5], 16)]
    letters = _bytes_of_letters()
    return text, [letters[c] for c in raw] if raw and all(c in letters for c in raw) else None


@cache
def _bytes_of_letters() -> dict[str, int]:
    """GPT-2's letters for bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}


# -- an answer while it is written ------------------------------------------------------------------------------------


class PromptInputs(NamedTuple):
    """A prompt as the model takes it: `inputs` of one row, its token ids, and how many tokens its answer may have.
    `raw`: the answer is told to its last space, for it continues a text, or fits a grammar. `grammar`: that one.
    `tools`: what finds calls of tools in an answer. `echo`: the prompt's text, told before its continuation."""

    inputs: dict[str, Any]
    ids: list[int]
    max_tokens: int
    raw: bool = False
    grammar: AnswerGrammar | None = None
    tools: Callable[[], ToolAnswer] | None = None
    echo: str | None = None


@dataclass(frozen=True, slots=True)
class AnswerPiece:
    """Something new of choice `number`: text, its tokens' log-probabilities, its end and the tools it calls; `tokens`
    counts all so far."""

    number: int
    text: str
    logprobs: list[TokenLogprob]
    finish: Finish | None
    tokens: int
    calls: Sequence[AnswerToolCall] = ()

    def __add__(self, later: AnswerPiece) -> AnswerPiece:
        """Two pieces of one choice as one."""
        return replace(
            later, text=self.text + later.text, logprobs=[*self.logprobs, *later.logprobs],
            calls=[*self.calls, *later.calls],
        )  # fmt: skip


@dataclass(eq=False)
class GenerationJob:
    """A request as the scheduler sees it.

    Args:
        asked: how tokens are chosen, how many answers, and the words that end one. prompt: what is read.
        deadline: in seconds of `time.monotonic`.
        tell: called from the model's thread with what is new; the last event is an error, or a piece with an end for
            each choice.
    """

    asked: SampledRequest
    prompt: PromptInputs
    deadline: float
    tell: Callable[[AnswerPiece | ApiError], None]
    gone: threading.Event = field(default_factory=threading.Event)  # nobody waits any more: its rows leave the batch


class RunningSequence:
    """A choice of a job while it is written."""

    def __init__(
        self,
        job: GenerationJob,
        number: int,
        model: OpticNerveForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        ends: Sequence[int],
    ) -> None:
        self.job, self.number, self.tokenizer, self.ends = job, number, tokenizer, ends
        grammar = job.prompt.grammar
        own = None if grammar is None else grammar.copy()
        self.sampler = TokenSampler(model, job.asked, job.prompt.ids, number, own)
        self.text = IncrementalDetokenizer(tokenizer, job.asked.stops)
        self.answer = None if job.prompt.raw else AnswerText()
        self.tools = None if job.prompt.tools is None else job.prompt.tools()
        self.count, self.token, self.live = 0, 0, True
        self._logprobs: list[tuple[int, TokenLogprob]] = []  # not yet told, and where their text begins

    def emit(self, logits_V: Tensor) -> None:
        """Choose the next token and tell what is new; `live` is False after the last."""
        self.token, self.count = self.sampler.choose(logits_V), self.count + 1
        ended, at = self.token in self.ends, len(self.text.text)
        text = "" if ended else self.text.put(self.token)
        if self.job.asked.likeliest is not None and (self.job.asked.tells_end or not ended):
            self._logprobs.append((at, self._logprob(self.token, logits_V)))
        if ended:
            self.end("stop")
        elif self.text.cut is not None:
            self._tell(text, "stop")
        elif self.sampler.finished:
            self.end("stop", text)
        elif self.count >= self.job.prompt.max_tokens:
            self.end("length", text)
        elif text:
            self._tell(text, None)

    def end(self, finish: Finish, text: str = "") -> None:
        """The last piece: nothing is chosen any more."""
        text += self.text.end()
        self._tell(text, "stop" if self.text.cut is not None else finish)

    def _tell(self, text: str, finish: Finish | None) -> None:
        cut = self.text.cut
        logprobs = [found for at, found in self._logprobs if cut is None or at < cut]
        self._logprobs = []
        self.live = finish is None
        if self.answer is not None:
            text = self.answer.put(text) + (self.answer.end() if finish else "")
        calls: list[AnswerToolCall] = []
        if self.tools is not None:
            text = self.tools.put(text)
            if finish:
                rest, calls = self.tools.end()
                text += rest
                finish = "tool_calls" if calls and finish == "stop" else finish
        self.job.tell(AnswerPiece(self.number, text, logprobs, finish, self.count, calls))

    def of_prompt(self, logits_TV: Tensor) -> list[TokenLogprob]:
        """The log-probabilities of the prompt's tokens, the same for all its answers. `logits_TV`: behind each."""
        # Before the first token nothing stands; whoever writes it down leaves its number out.
        before = zip(self.job.prompt.ids, [logits_TV[0], *logits_TV[:-1]], strict=True)
        return [self._logprob(token, logits_V) for token, logits_V in before]

    def echo(self, found: list[TokenLogprob]) -> None:
        """Tell the prompt. `found`: from `of_prompt`, where log-probabilities are wanted."""
        over = self.job.prompt.max_tokens == 0
        self.live = not over
        text = self.job.prompt.echo or ""
        self.job.tell(AnswerPiece(self.number, text, found, "length" if over else None, 0))

    def _logprob(self, token: int, logits_V: Tensor) -> TokenLogprob:
        """The model's own, before temperature and top_p."""
        log_p_V = logits_V.float().log_softmax(-1)
        best = log_p_V.topk(min(self.job.asked.likeliest or 0, len(log_p_V)))
        top = [self._named(*both) for both in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
        return TokenLogprob(**self._named(token, float(log_p_V[token])).model_dump(), top_logprobs=top)

    def _named(self, token: int, log_p: float) -> TopLogprob:
        text, raw = token_text(self.tokenizer, token)
        return TopLogprob(token=text, logprob=max(log_p, -9999.0), bytes=raw)  # JSON knows no infinity
