"""One chat template for pictures and words, made from any language model's own.

The templates of text-only models take a message's content as one string. A short prelude, itself Jinja, joins the parts
of each message into such a string, a placeholder where a picture stands, and hands over to the model's template
unchanged:
so a text-only prompt renders to the same letters as before, in every library that renders Jinja.
"""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jinja2 import TemplateError

from opticnerve.language import thinking as think
from opticnerve.types import OpticNerveError, Thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_TOKEN = "<image>"
AUDIO_TOKEN = "<audio>"

# Vicuna v1.1's form (LLaVA's `conv_vicuna_v1`), for language models without a template: it needs no special token but
# EOS.
PLAIN_CHAT = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ message['content'] + '\n' }}"
    "{%- elif message['role'] == 'user' -%}{{ 'USER: ' + message['content'] + '\n' }}"
    "{%- else -%}{{ 'ASSISTANT: ' + message['content'] + eos_token + '\n' }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)

# ChatML as OpenAI published it: no default system prompt, which many models' own templates put into every conversation.
CHATML = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)

# LLaVA's alignment form (`conv_plain`, `preprocess_plain`): the picture, then its caption, and nothing else to spend
# tokens on; what the user says beside a picture is left out.
_IMAGES = "'" + IMAGE_TOKEN + "' * message['content'].count('" + IMAGE_TOKEN + "')"
_SOUNDS = "'" + AUDIO_TOKEN + "' * message['content'].count('" + AUDIO_TOKEN + "')"
CAPTION_ONLY = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{ message['content'] }}{{ eos_token }}"
    "{%- else -%}{{ (" + _IMAGES + " + " + _SOUNDS + ") or message['content'] }}{%- endif -%}{%- endfor -%}"
)

# Names that a recipe may give as `model.language.chat_template`.
NAMED = {"chatml": CHATML, "vicuna": PLAIN_CHAT}

_MARK = "{#- opticnerve: parts to text -#}"
_PRELUDE = _MARK + "".join(
    line.strip()
    for line in r"""
    {%- set opticnerve = namespace(messages=[]) -%}
    {%- for message in messages -%}
      {%- if message['content'] is string -%}{%- set opticnerve.messages = opticnerve.messages + [message] -%}
      {%- else -%}
        {%- set joined = namespace(text='', gap='') -%}
        {%- for part in message['content'] -%}
          {%- if part['type'] == 'image' -%}
            {%- set joined.text = joined.text + joined.gap + '<image>' -%}{%- set joined.gap = '\n' -%}
          {%- elif part['type'] == 'audio' -%}
            {%- set joined.text = joined.text + joined.gap + '<audio>' -%}{%- set joined.gap = '\n' -%}
          {%- elif part['type'] == 'text' -%}
            {%- set joined.text = joined.text + joined.gap + part['text'] -%}{%- set joined.gap = '' -%}
          {%- else -%}{{ raise_exception('unknown content part: ' + part['type']) }}{%- endif -%}
        {%- endfor -%}
        {%- set opticnerve.messages = opticnerve.messages + [dict(message, content=joined.text)] -%}
      {%- endif -%}
    {%- endfor -%}
    {%- set messages = opticnerve.messages -%}
    """.splitlines()
).replace(r"\n", "\n")


def with_parts(template: str | None) -> str:
    """The template with the prelude before it; the plain chat form where the language model has none. Idempotent."""
    template = template or PLAIN_CHAT
    if template.startswith(_MARK):
        return template
    # The prelude's last block swallows white space behind it: write out what the template alone would have begun with.
    body = template.lstrip()
    space = template[: len(template) - len(body)]
    if body.startswith(("{%-", "{{-", "{#-")):
        space = ""
    elif body.startswith(("{%", "{#")) and body[2:3] != "+":
        space = space.rstrip(" \t")  # chat templates are rendered with Jinja's `lstrip_blocks`
    return _PRELUDE + (f"{{{{ {space!r} }}}}" if space else "") + body


_ENDED = "".join(
    line.strip()
    for line in """
    {%- set opticnerve_ended = namespace(messages=[]) -%}
    {%- for message in messages -%}
      {%- set content = message['content'] -%}
      {%- if message['role'] == 'assistant' and content is string -%}
        {%- set content = content + eos_token -%}
      {%- elif message['role'] == 'assistant' and content and content[-1]['type'] == 'text' -%}
        {%- set content = content[:-1] + [dict(content[-1], text=content[-1]['text'] + eos_token)] -%}
      {%- endif -%}
      {%- set opticnerve_ended.messages = opticnerve_ended.messages + [dict(message, content=content)] -%}
    {%- endfor -%}
    {%- set messages = opticnerve_ended.messages -%}
    """.splitlines()
)


def ended(template: str) -> str:
    """A template that takes parts, with the end of text behind each of an assistant's turns. (That of LLaVA's
    checkpoints on the hub writes a space there, where LLaVA's own code trains with the end of text.)"""
    return _ENDED + template


def read_template(text: str) -> str:
    """A template by name, as it stands, or from a file."""
    if text in NAMED:
        return NAMED[text]
    if "{" in text:
        return text
    if not Path(text).is_file():
        raise OpticNerveError(
            f"chat_template {text!r} is no file, no Jinja, and none of {', '.join(NAMED)}", kind="unknown-name"
        )
    return Path(text).read_text(encoding="utf-8")


def set_template(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Give a tokenizer a chat template instead of its own: by name, as it stands, or from a file."""
    template = read_template(text)
    tokenizer.chat_template = begun(template, tokenizer) if text in NAMED else template


def stage_template(name: Literal["chat", "caption"], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What a stage trains with instead of the model's own template: LLaVA's alignment form, or nothing else."""
    return with_parts(begun(CAPTION_ONLY, tokenizer)) if name == "caption" else None


def begun(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A template that writes no beginning of text, with one where the language model wants it and its tokenizer adds
    none (DeepSeek-V3's): its own template then writes it."""
    bos = tokenizer.bos_token_id
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    wanted = getattr(tokenizer, "add_bos_token", False) or "bos_token" in own
    if bos is None or not wanted or tokenizer("a")["input_ids"][:1] == [bos]:
        return template
    return "{{ bos_token }}" + template


def settled(tokenizer: PreTrainedTokenizerBase, *, thinking: Thinking | None, date: datetime.date) -> str:
    """The template of a docked model: the tokenizer's own, with parts, its clock stopped at a day, and a generation
    prompt behind which answers are learned as they stand.

    What a template writes between its prompt and every answer goes into the prompt (gpt-oss's channel header). White
    space does not, for it joins the first word; nor does what stands before the last answer alone (Qwen3's empty think
    block, unless `thinking` is "empty"): it is learned.

    Raises:
        OpticNerveError: the template is no Jinja, or writes a date in a form that is not told in it.
    """
    body = stopped_clock(tokenizer.chat_template or PLAIN_CHAT, date)
    if body.startswith(_MARK):
        return body

    def render(roles: str, cue: bool = False, template: str = body) -> str:
        chat = [{"role": {"u": "user", "a": "assistant"}[r], "content": "\ue0f0"} for r in roles]
        made = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=cue)
        return str(made)

    try:
        asked, whole, twice = render("u", True), render("ua"), render("uaua")
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return with_parts(body)  # whatever it is that this template refuses, each conversation is told so
    gap = whole[len(asked) :].partition("\ue0f0")[0].rstrip(" \t") if whole.startswith(asked) else ""
    opened = think.opened(asked)
    if opened and thinking == "strip":
        return with_parts(_cue_without(body, opened))
    # What stands before earlier answers, too, is asked with: else those would be trained as nobody asks for them.
    wanted = bool(gap.strip()) and twice.startswith(asked + gap) and not (thinking == "keep" and think.CLOSE in gap)
    if thinking == "empty" and not think.closed(asked):
        gap, wanted = (gap if think.CLOSE in gap else think.EMPTY.removeprefix(opened)), True
    if not wanted:
        return with_parts(body)
    # Qwen3 and its kin have a name for it, which whoever asks may give another value.
    named = "{%- if enable_thinking is not defined -%}{%- set enable_thinking = false -%}{%- endif %}{{ '' }}" + body
    return with_parts(named if render("u", True, named) == asked + gap else _cue_with(body, gap))


_CLOCK = re.compile(r"strftime_now\(\s*(?:'([^']*)'|\"([^\"]*)\")\s*\)")


def stopped_clock(template: str, date: datetime.date) -> str:
    """A template that writes today's date, with this day in its place: a run asks as it was trained, whenever.

    Raises:
        OpticNerveError: it writes the date in a form that it computes.
    """
    made = _CLOCK.sub(lambda m: repr(date.strftime(m[1] if m[1] is not None else m[2])), template)
    if re.search(r"strftime_now\s*\(", made):
        raise OpticNerveError(
            "the chat template writes today's date in a form that is not told in it (strftime_now of something that is "
            "no text); write the date into the template, and give that as model.language.chat_template",
            kind="unsupported",
        )
    return made


def _cue_with(body: str, suffix: str) -> str:
    """The template with something behind its generation prompt."""
    # Jinja leaves out a template's last line break, as long as it is the last.
    return body.removesuffix("\n") + f"{{{{ {suffix!r} if add_generation_prompt else '' }}}}"


def _cue_without(body: str, end: str) -> str:
    """The template without the end of its generation prompt."""
    return (
        "{% set opticnerve_text %}{{ '' }}" + body.removesuffix("\n") + "{{ '' }}{% endset %}"
        f"{{{{ opticnerve_text[:-{len(end)}] if add_generation_prompt and opticnerve_text.endswith({end!r}) "
        "else opticnerve_text }}"
    )
