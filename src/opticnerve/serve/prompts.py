"""A request's messages as the model takes them, within the model's context."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from opticnerve.data.collators.next_token import Collator
from opticnerve.data.encode.chat_skeleton import plain
from opticnerve.data.encode.packing import pack
from opticnerve.data.encode.tokenize import Encoded, encode, end_of_turn
from opticnerve.inference.generate import Answerer
from opticnerve.inference.shared_prefix import layout
from opticnerve.language.layers import context_length
from opticnerve.serve import schema
from opticnerve.serve.errors import ApiError
from opticnerve.serve.grammar import AnswerGrammar, Constraint, GrammarCompiler, constraint_of
from opticnerve.serve.limits import ServerLimits
from opticnerve.serve.media import MediaOpener, MediaSources
from opticnerve.serve.rendering import encode_with_tools
from opticnerve.serve.sequence import PromptInputs
from opticnerve.serve.tools import ToolAnswer, form_of_tools, tool_constraint
from opticnerve.types import AudioPart, Conversation, ImagePart, Message, OpticNerveError, Part, Role, TextPart

if TYPE_CHECKING:
    from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration

# Of media and words alone; what a tool says is shown to the template by its own role.
_ROLES: dict[str, Role] = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "user"
}  # fmt: skip
MAX_ECHOED = 2**28  # scores of a prompt: one for each token and word of the vocabulary, a gigabyte in float32
UNKNOWN_CONTEXT = 2048  # for language models whose configuration names no bound


def check_context(model: OpticNerveForConditionalGeneration, wished: int | None) -> int:
    """Tokens of prompt and answer together. Raises OpticNerveError: more are wished than the model knows positions."""
    known = context_length(model.language_model.config)
    if wished is not None and known is not None and wished > known:
        raise OpticNerveError(
            f"--max-context {wished} is more than the {known} positions that the model knows", kind="out-of-range"
        )
    return wished or known or UNKNOWN_CONTEXT


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
        self.vocabulary = int(answerer.model.language_model.config.get_text_config(decoder=True).vocab_size)
        self.grammars = GrammarCompiler(copy.deepcopy(self.processor.tokenizer), answerer.stops()["eos_token_id"])
        self.tool_form = form_of_tools(self.processor.chat_template, self.processor.tokenizer)
        # A Rust tokenizer refuses two threads that both set its padding.
        self._alone = threading.Lock()

    def read(self, asked: schema.ChatRequest) -> PromptInputs:
        """The prompt as the model takes it. Raises ApiError: 400: media that cannot be had, a conversation that the
        chat template does not know, too long."""
        self._check_turns(asked)
        self._check_biases(asked)
        tools = self._tools(asked)
        constraint = self._constraint(asked)
        grammar = None if constraint is None else self.grammars.compile(constraint)
        conversation = self.conversation(asked)
        try:
            with self._alone:
                # Whatever a client writes, it is words: no `<|im_end|>` of theirs ends a turn.
                if asked.with_tools:
                    specs = [t.model_dump(exclude_none=True) for t in asked.open_tools]
                    prompt = encode_with_tools(_chat(asked, conversation), specs, conversation, self.processor)
                else:
                    prompt = encode(conversation, self.processor, learn=asked.continued, sanitize_control_tokens=True)
                ids = self._unended(prompt) if asked.continued else prompt.input_ids
                inputs = layout([[]], [ids], pad=self.processor.tokenizer.pad_token_id)
                inputs |= Collator(self.processor).media([pack([[prompt]])])
        except ApiError:
            raise
        except OpticNerveError as e:
            raise ApiError(400, str(e), param="messages") from None
        raw = asked.continued or grammar is not None
        return PromptInputs(inputs, ids, self._answer_tokens(asked, len(ids)), raw, grammar, tools)

    def read_plain(self, asked: schema.CompletionRequest) -> list[PromptInputs]:
        """The prompts of a text completion. Raises ApiError: 400: tokens that are none, placeholders, too long."""
        self._check_biases(asked)
        constraint = constraint_of(asked)
        grammar = None if constraint is None else self.grammars.compile(constraint)
        several = len(asked.prompts) > 1
        return [
            self._plain(p, asked, grammar, f"prompt.{i}" if several else "prompt") for i, p in enumerate(asked.prompts)
        ]

    def _plain(
        self, prompt: str | list[int], asked: schema.CompletionRequest, grammar: AnswerGrammar | None, param: str
    ) -> PromptInputs:
        tokenizer = self.processor.tokenizer
        with self._alone:
            if isinstance(prompt, str):
                self._check_letters(len(prompt), param)
                ids, text = tokenizer(prompt, verbose=False)["input_ids"], prompt
            else:
                ids, text = prompt, str(tokenizer.decode(prompt))
        size = self.vocabulary
        media = {self.processor.image_token_id, self.processor.audio_token_id}
        for token in ids:
            if token in media or token >= size:
                raise ApiError(
                    400, f"{param} holds token {token:,}, which stands for a picture or sound; they go into chat"
                    if token in media
                    else f"{param} holds token {token:,}; the model has {size:,} (0 to {size - 1:,})", param=param,
                )  # fmt: skip
        if asked.echo and asked.likeliest is not None and len(ids) * size > MAX_ECHOED:
            raise ApiError(
                400, f"{param} has {len(ids):,} tokens, more than the {MAX_ECHOED // size:,} whose log-probabilities "
                "are told; leave echo or logprobs out, or shorten it", param=param,
            )  # fmt: skip
        pad = tokenizer.pad_token_id
        most = self._answer_tokens(asked, len(ids))
        return PromptInputs(layout([[]], [ids], pad=pad), ids, most, True, grammar, None, text if asked.echo else None)

    def _tools(self, asked: schema.ChatRequest) -> Callable[[], ToolAnswer] | None:
        """What finds calls in an answer; None where nothing may be called."""
        if not (tools := asked.open_tools):
            return None
        if self.tool_form is None:
            raise ApiError(
                400, "this model's chat template has no tools, or writes calls in a form that is not read here "
                "(docs/serving.md names three); leave tools out, or describe them in a message", param="tools",
            )  # fmt: skip
        return partial(ToolAnswer, self.tool_form, [t.function.name for t in tools], many=asked.many_calls)

    def _constraint(self, asked: schema.ChatRequest) -> Constraint | None:
        """The grammar that an answer must fit, if any."""
        own = constraint_of(asked)
        if own is not None and asked.open_tools:
            raise ApiError(
                400, f"{own.param} and tools exclude each other: what fits the one is no call; leave one out, or send "
                "tool_choice: none", param=own.param,
            )  # fmt: skip
        return own if self.tool_form is None else own or tool_constraint(asked, self.tool_form)

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
            role = _ROLES[message.role]
            content = message.content or ""
            if isinstance(content, str):
                parts: list[Part] = [TextPart(content)]
            else:
                made = [_parts(p, opener, f"messages.{i}.content.{k}") for k, p in enumerate(content)]
                parts = [part for some in made for part in some]
            messages.append(Message(role, tuple(parts), learn=i + 1 == len(asked.messages)))
        return Conversation(tuple(messages))

    def _check_biases(self, asked: schema.SampledRequest) -> None:
        size = self.vocabulary
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
            raise ApiError(400, "the last message must be the user's, or a tool's", param=f"messages.{last}.role")
        if asked.continued and asked.with_tools:
            raise ApiError(400, "a conversation with tools is not continued; leave them out", param="tools")
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
        self._check_letters(letters, "messages")

    def _check_letters(self, letters: int, param: str) -> None:
        if letters > self.most_letters:
            raise ApiError(
                400, f"{letters:,} letters do not fit into the model's context of {self.context:,} tokens",
                param=param, code="context_length_exceeded",
            )  # fmt: skip

    def _answer_tokens(self, asked: schema.SampledRequest, prompt: int) -> int:
        param = "messages" if isinstance(asked, schema.ChatRequest) else "prompt"
        left, wished = self.context - prompt, asked.answer_tokens
        least = 1 if wished is None else wished
        if left < least:
            raise ApiError(
                400, f"the prompt has {prompt:,} tokens, and with {least:,} for the answer that is more than the "
                f"model's context of {self.context:,}; shorten the messages, send fewer pictures, or ask for less",
                param=param if left < 1 else "max_tokens", code="context_length_exceeded",
            )  # fmt: skip
        return min(left, self.limits.answer_tokens) if wished is None else wished


def _chat(asked: schema.ChatRequest, conversation: Conversation) -> list[dict[str, Any]]:
    """The messages as chat templates take them, with what tools were called and said."""
    chat = []
    for i, (message, opened) in enumerate(zip(asked.messages, conversation.messages, strict=True)):
        media = any(not isinstance(p, TextPart) for p in opened.parts)
        said: dict[str, Any] = {
            "role": "system" if message.role == "developer" else message.role,
            # Some templates look into the words: what is only text goes as text.
            "content": plain(opened.written_out())["content"] if media else opened.text,
        }
        if isinstance(message, schema.AssistantMessage) and message.tool_calls:
            said["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {
                    "name": c.function.name,
                    "arguments": _arguments(c.function.arguments, f"messages.{i}.tool_calls.{k}.function.arguments"),
                }}
                for k, c in enumerate(message.tool_calls)
            ]  # fmt: skip
        if isinstance(message, schema.ToolMessage):
            said |= {"tool_call_id": message.tool_call_id} | ({} if message.name is None else {"name": message.name})
        chat.append(said)
    return chat


def _arguments(text: str, param: str) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError) as e:
        raise ApiError(400, f"{param} is no JSON: {e}", param=param) from None
    if not isinstance(found, dict):
        raise ApiError(400, f"{param} is no JSON object", param=param)
    return found


def _parts(part: schema.AnyContent, opener: MediaOpener, where: str) -> Sequence[Part]:
    """One part, or as many as a video has frames."""
    match part:
        case schema.TextContent():
            return [TextPart(part.text)]
        case schema.ImageContent():
            return [ImagePart(opener.image(part.image_url.url, f"{where}.image_url.url"))]
        case schema.VideoContent():
            return opener.video(part.video_url.url, f"{where}.video_url.url")
        case schema.AudioContent():
            return [AudioPart(opener.audio(part.input_audio.data, f"{where}.input_audio.data"))]
