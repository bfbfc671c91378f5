"""Questions in, answers out: in batches, or word by word."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextStreamer

from opticnerve.data.collators.next_token import Collator
from opticnerve.data.encode.chat_layout import form_of
from opticnerve.data.encode.packing import pack
from opticnerve.data.encode.tokenize import encode
from opticnerve.inference.decoding import decode, decode_compiled
from opticnerve.inference.shared_prefix import layout, read_shared, share
from opticnerve.language.thinking import AnswerText, shown
from opticnerve.models.vlm.processing import OpticNerveProcessor, stops
from opticnerve.ops.fused_decode import FusedDecoder
from opticnerve.types import Conversation

if TYPE_CHECKING:
    from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration


class Answerer:
    """A model with its processor, ready for conversations.

    Args:
        model, processor: as from `load_model` or `dock`.
        compile: `answer` decodes with a static cache and `torch.compile`. It pays on a CUDA device and for many
            answers: the first of each batch size waits for the compiler.
    """

    def __init__(
        self, model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor, *, compile: bool = False
    ) -> None:
        self.model, self.processor, self.compile = model, processor, compile
        self._fused: FusedDecoder | None = None

    def answer(
        self, conversations: Sequence[Conversation], *, max_new_tokens: int = 64, batch_size: int = 16,
        share_prefix: bool = True, progress: Callable[[int], None] | None = None,
    ) -> list[str]:  # fmt: skip
        """Greedy answers, one per conversation, in order. Prompts of like length share a batch, padded on the left.

        Conversations that show the same media first read them, and all that stands before their first different word,
        once (`share_prefix`; which can, `inference.shared_prefix` says). `progress` is called with the number of
        answers done so far.
        """
        prompts = [c.prompt() for c in conversations]
        answers, done = [""] * len(prompts), 0
        try:
            for numbers, inputs, cache in self._batches(prompts, max_new_tokens, batch_size, share_prefix):
                texts = self.answer_batch(inputs, cache, max_new_tokens=max_new_tokens)
                for i, text in zip(numbers, texts, strict=True):
                    answers[i] = text
                done += len(numbers)
                if progress is not None:
                    progress(done)
        finally:
            self.release()
        return answers

    def release(self) -> None:
        """Give back what batches keep of the weights between each other; `answer` does so at its end."""
        if self._fused is not None:
            self._fused.release()

    def _batches(
        self, prompts: Sequence[Conversation], max_new_tokens: int, batch_size: int, share_prefix: bool
    ) -> Iterator[tuple[list[int], Any, Any]]:
        """Which prompts, their inputs, and the cache of what is read of them already."""
        shares = share_prefix and not self.compile
        sharing = share(self.model, self.processor, prompts, max_new_tokens) if shares else []
        for start in range(0, len(sharing), batch_size):
            rows = sharing[start : start + batch_size]
            pad = self.processor.tokenizer.pad_token_id
            yield [row.number for row in rows], *read_shared(self.model, pad, rows, self.inputs)
        together = {row.number for row in sharing}
        lengths = [sum(len(m.text) for m in c.messages) for c in prompts]
        alone = sorted((i for i in range(len(prompts)) if i not in together), key=lengths.__getitem__)
        for start in range(0, len(alone), batch_size):
            chosen = alone[start : start + batch_size]
            yield chosen, self.inputs([prompts[i] for i in chosen]), None

    def answer_batch(self, inputs: Any, cache: Any = None, *, max_new_tokens: int = 64) -> list[str]:
        """Greedy answers to a batch; `cache` holds what was read of it already."""
        how = decode_compiled if self.compile else decode
        tokens = how(
            self.model, dict(inputs), cache=cache, max_new_tokens=max_new_tokens, do_sample=False, fused=self.fused(),
            **self.stops(),
        )  # fmt: skip
        tokens_BT = torch.stack(list(tokens), 1)
        return [shown(t) for t in self.processor.tokenizer.batch_decode(tokens_BT, skip_special_tokens=True)]

    def stream(
        self, conversation: Conversation, *, max_new_tokens: int = 256, temperature: float = 0.0, top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[str]:  # fmt: skip
        """The answer in pieces as they come. Closing the iterator stops the model after its current token."""
        sampling: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            sampling |= {"temperature": temperature, "top_p": top_p}
        words, answer = _PieceStreamer(self.processor.tokenizer), AnswerText()
        tokens = decode(
            self.model, dict(self.inputs([conversation])), max_new_tokens=max_new_tokens, fused=self.fused(), seed=seed,
            **sampling, **self.stops(),
        )  # fmt: skip
        for token_B in tokens:
            yield from filter(None, map(answer.put, words.put_and_take(token_B)))
        words.end()  # type: ignore[no-untyped-call]
        yield from filter(None, [*map(answer.put, words.take()), answer.end()])

    def fused(self) -> FusedDecoder | None:
        """The language model's fused form, made once; again, if its weights have moved since."""
        if self._fused is None or not self._fused.still_fits(self.model.language_model):
            self._fused = FusedDecoder.of(self.model.language_model)
        return self._fused

    def inputs(
        self, conversations: Sequence[Conversation], *, sanitize_control_tokens: bool | None = None
    ) -> dict[str, Any]:
        """Tensors on the model's device for prompts (a last assistant turn is left out), padded on the left: the tokens
        that training saw before the answer.

        Args:
            sanitize_control_tokens: as for `tokenize.encode`.
        """
        prompts = [
            encode(c.prompt(), self.processor, learn=False, sanitize_control_tokens=sanitize_control_tokens)
            for c in conversations
        ]
        ids = [p.input_ids for p in prompts]
        made = layout([[] for _ in ids], ids, pad=self.processor.tokenizer.pad_token_id)
        made |= Collator(self.processor).media([pack([[p]]) for p in prompts])
        return {name: tensor.to(self.model.device) for name, tensor in made.items()}

    def render(self, prompt: Conversation) -> str:
        """The prompt as text, the template's cue for the assistant at its end."""
        return form_of(self.processor).lay_out(prompt, cue=True).text

    def stops(self) -> dict[str, Any]:
        """What `generate` is told of ends: the tokens that end an answer, and the one that pads."""
        return stops(self.model.generation_config, self.processor)


class _PieceStreamer(TextStreamer):
    """Tokens in, whole words out: transformers' rules for when a piece of text will change no more."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._ready: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._ready.append(text)

    def put_and_take(self, token_B: Tensor) -> list[str]:
        self.put(token_B)  # type: ignore[no-untyped-call]
        return self.take()

    def take(self) -> list[str]:
        ready, self._ready = [t for t in self._ready if t], []
        return ready
