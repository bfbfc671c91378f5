"""A request's messages as the model takes them, within the model's context."""

from __future__ import annotations

import copy
import threading
from typing import TYPE_CHECKING

from opticnerve.data.collators.next_token import Collator
from opticnerve.data.encode.packing import pack
from opticnerve.data.encode.tokenize import Encoded, encode, end_of_turn
from opticnerve.inference.generate import Answerer
from opticnerve.inference.shared_prefix import layout
from opticnerve.serve import schema
from opticnerve.serve.errors import ApiError
from opticnerve.serve.grammar import GrammarCompiler, constraint_of
from opticnerve.serve.limits import ServerLimits
from opticnerve.serve.media import MediaOpener, MediaSources
from opticnerve.serve.sequence import PromptInputs
from opticnerve.types import AudioPart, Conversation, ImagePart, Message, OpticNerveError, Part, TextPart

if TYPE_CHECKING:
    from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration

UNKNOWN_CONTEXT = 2048  # for language models whose configuration names no bound


def check_context(model: OpticNerveForConditionalGeneration, wished: int | None) -> int:
    """Tokens of prompt and answer together. Raises OpticNerveError: more are wished than the model knows positions."""
    config = model.language_model.config.get_text_config(decoder=True)
    known = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if wished is not None and known is not None and wished > known:
        raise OpticNerveError(
            f"--max-context {wished} is more than the {known} positions that the model knows", kind="out-of-range"
        )
    return int(wished or known or UNKNOWN_CONTEXT)


class PromptReader:
    """Makes prompts of requests; may be called from several threads.

    Args:
        answerer: the model and its processor. sources: where media may come from. limits: of the server.
    """

    def __init__(self, answerer: Answerer, sources: MediaSources, limits: ServerLimits) -> None:
        self.answerer, self.processor = answerer, answerer.processor
        self.sources, self.limits = sources, limits
        self.context = check_context(answerer.model, limits.context)
        # No text of more characters can be so few tokens: it need not be taken apart to be refused.
        self.most_letters = self.context * max(map(len, self.processor.tokenizer.get_vocab()))
        self.grammars = GrammarCompiler(copy.deepcopy(self.processor.tokenizer), answerer.stops()["eos_token_id"])
        # A Rust tokenizer refuses two threads that both set its padding.
        self._alone = threading.Lock()

    def read(self, asked: schema.ChatRequest) -> PromptInputs:
        """The prompt as the model takes it. Raises ApiError: 400: media that cannot be had, a conversation that the
        chat template does not know, too long."""
        self._check_turns(asked)
        self._check_biases(asked)
        constraint = constraint_of(asked)
        grammar = None if constraint is None else self.grammars.compile(constraint)
        conversation = self.conversation(asked)
        try:
            with self._alone:
                # Whatever a client writes, it is words: no `<|im_end|>` of theirs ends a turn.
                prompt = encode(conversation, self.processor, learn=asked.continued, sanitize_control_tokens=True)
                ids = self._unended(prompt) if asked.continued else prompt.input_ids
                inputs = layout([[]], [ids], pad=self.processor.tokenizer.pad_token_id)
                inputs |= Collator(self.processor).media([pack([[prompt]])])
        except OpticNerveError as e:
            raise ApiError(400, str(e), param="messages") from None
        raw = asked.continued or grammar is not None
        return PromptInputs(inputs, ids, self._answer_tokens(asked, len(ids)), raw, grammar)

    def _unended(self, sample: Encoded) -> list[int]:
        """A conversation's tokens up to the one that ends its last turn, as training reads them."""
        end = self.processor.tokenizer.convert_tokens_to_ids(end_of_turn(self.processor))
        ids = sample.input_ids
        return ids[: len(ids) - 1 - ids[::-1].index(end)]

    def conversation(self, asked: schema.ChatRequest) -> Conversation:
        """The messages, their media opened."""
        opener = MediaOpener(self.processor, self.sources, self.limits)
        messages = []
        for i, message in enumerate(asked.messages):
            role = "system" if message.role == "developer" else message.role
            content = message.content or ""
            if isinstance(content, str):
                parts: list[Part] = [TextPart(content)]
            else:
                parts = [_part(p, opener, f"messages.{i}.content.{k}") for k, p in enumerate(content)]
            messages.append(Message(role, tuple(parts), learn=i + 1 == len(asked.messages)))
        return Conversation(tuple(messages))

    def _check_biases(self, asked: schema.SampledRequest) -> None:
        size = self.answerer.model.language_model.config.get_text_config(decoder=True).vocab_size
        for token in map(int, asked.logit_bias or ()):
            if token >= size:
                raise ApiError(
                    400, f"logit_bias names token {token:,}; the model has {size:,} (0 to {size - 1:,})",
                    param="logit_bias",
                )  # fmt: skip

    def _check_turns(self, asked: schema.ChatRequest) -> None:
        last = len(asked.messages) - 1
        if asked.continued != (asked.messages[last].role == "assistant"):
            raise ApiError(
                400, "the last message must be the assistant's, to be continued"
                if asked.continued
                else "the last message is the assistant's; add continue_final_message: true to have it continued, or a "
                "message of the user", param=f"messages.{last}.role",
            )  # fmt: skip
        if asked.messages[last].role in ("system", "developer"):
            raise ApiError(400, "the last message must be the user's", param=f"messages.{last}.role")
        placeholders = [t for t in (self.processor.image_token, self.processor.audio_token) if t]
        letters = 0
        for i, message in enumerate(asked.messages):
            content = message.content or ""
            parts = [content] if isinstance(content, str) else [p.text for p in content if p.type == "text"]
            text = "".join(parts)
            letters += len(text)
            for token in placeholders:
                if token in text:
                    raise ApiError(
                        400, f"the text holds {token!r}, which stands for a picture or sound; send that as a part of "
                        "its own, or change the text", param=f"messages.{i}.content",
                    )  # fmt: skip
        if letters > self.most_letters:
            raise ApiError(
                400, f"{letters:,} letters do not fit into the model's context of {self.context:,} tokens",
                param="messages", code="context_length_exceeded",
            )  # fmt: skip

    def _answer_tokens(self, asked: schema.ChatRequest, prompt: int) -> int:
        left, wished = self.context - prompt, asked.answer_tokens
        if left < (wished or 1):
            raise ApiError(
                400, f"the prompt has {prompt:,} tokens, and with {wished or 1:,} for the answer that is more than the "
                f"model's context of {self.context:,}; shorten the messages, send fewer pictures, or ask for less",
                param="messages" if left < 1 else "max_tokens", code="context_length_exceeded",
            )  # fmt: skip
        return wished or min(left, self.limits.answer_tokens)


def _part(
    part: schema.TextContent | schema.ImageContent | schema.AudioContent, opener: MediaOpener, where: str
) -> Part:
    match part:
        case schema.TextContent():
            return TextPart(part.text)
        case schema.ImageContent():
            return ImagePart(opener.image(part.image_url.url, f"{where}.image_url.url"))
        case schema.AudioContent():
            return AudioPart(opener.audio(part.input_audio.data, f"{where}.input_audio.data"))
