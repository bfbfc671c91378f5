"""One chat template for pictures and words, made from any language model's own.

The templates of text-only models take a message's content as one string. A short prelude, itself Jinja, joins the parts
of each message into such a string, a placeholder where a picture stands, and hands over to the model's template
unchanged:
so a text-only prompt renders to the same letters as before, in every library that renders Jinja.
"""

from __future__ import annotations

from pathlib import Path

from opticnerve.types import OpticNerveError

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
_PRELUDE = (
    _MARK
    + "{%- set opticnerve = namespace(messages=[]) -%}"
    + "{%- for message in messages -%}"
    + "{%- if message['content'] is string -%}{%- set opticnerve.messages = opticnerve.messages + [message] -%}"
    + "{%- else -%}"
    + "{%- set joined = namespace(text='', gap='') -%}"
    + "{%- for part in message['content'] -%}"
    + "{%- if part['type'] == 'image' -%}"
    + "{%- set joined.text = joined.text + joined.gap + '"
    + IMAGE_TOKEN
    + "' -%}{%- set joined.gap = '\n' -%}"
    + "{%- elif part['type'] == 'audio' -%}"
    + "{%- set joined.text = joined.text + joined.gap + '"
    + AUDIO_TOKEN
    + "' -%}{%- set joined.gap = '\n' -%}"
    + "{%- elif part['type'] == 'text' -%}"
    + "{%- set joined.text = joined.text + joined.gap + part['text'] -%}{%- set joined.gap = '' -%}"
    + "{%- else -%}{{ raise_exception('unknown content part: ' + part['type']) }}{%- endif -%}"
    + "{%- endfor -%}"
    + "{%- set opticnerve.messages = opticnerve.messages + [dict(message, content=joined.text)] -%}"
    + "{%- endif -%}{%- endfor -%}"
    + "{%- set messages = opticnerve.messages -%}"
)


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


def read_template(text: str) -> str:
    """A template by name, as it stands, or from a file."""
    if text in NAMED:
        return NAMED[text]
    if "{" in text:
        return text
    if not Path(text).is_file():
        raise OpticNerveError(f"chat_template {text!r} is no file, no Jinja, and none of {', '.join(NAMED)}")
    return Path(text).read_text(encoding="utf-8")
