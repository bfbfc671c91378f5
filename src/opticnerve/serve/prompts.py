"""A request's messages as the model takes them, within the model's context."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from opticnerve.inference.generate import Answerer
from opticnerve.serve import schema
from opticnerve.serve.errors import ApiError
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
        # A Rust tokenizer refuses two threads that both set its padding.
        self._alone = threading.Lock()

    def read(self, asked: schema.ChatRequest) -> PromptInputs:
        """The prompt as the model takes it. Raises ApiError: 400: media that cannot be had, a conversation that the
        chat template does not know, too long."""
        self._check_turns(asked)
        conversation = self.conversation(asked)
        try:
            with self._alone:
                # Whatever a client writes, it is words: no `<|im_end|>` of theirs ends a turn.
                inputs = self.answerer.inputs([conversation], sanitize_control_tokens=True)
        except OpticNerveError as e:
            raise ApiError(400, str(e), param="messages") from None
        ids = inputs["input_ids"][0].tolist()
        return PromptInputs(inputs, ids, self._answer_tokens(asked, len(ids)))

    def conversation(self, asked: schema.ChatRequest) -> Conversation:
        """The messages, their media opened."""
        opener = MediaOpener(self.processor, self.sources, self.limits)
        messages = []
        for i, message in enumerate(asked.messages):
            role = "system" if message.role == "developer" else message.role
            content = message.content
            if isinstance(content, str):
                parts: list[Part] = [TextPart(content)]
            else:
                parts = [_part(p, opener, f"messages.{i}.content.{k}") for k, p in enumerate(content)]
            messages.append(Message(role, tuple(parts)))
        return Conversation(tuple(messages))

    def _check_turns(self, asked: schema.ChatRequest) -> None:
        last = len(asked.messages) - 1
        if asked.messages[last].role != "user":
            raise ApiError(400, "the last message must be the user's", param=f"messages.{last}.role")
        placeholders = [t for t in (self.processor.image_token, self.processor.audio_token) if t]
        letters = 0
        for i, message in enumerate(asked.messages):
            content = message.content
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
