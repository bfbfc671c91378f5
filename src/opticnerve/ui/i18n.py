"""Every text of the page, in English and in Japanese (`texts.yaml`).

The page is built once for each language, in one process: what two pages must share (loaded models, a training run)
lives outside the functions that build tabs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from opticnerve.types import OpticNerveError

LANGUAGES = {"en": "English", "ja": "日本語"}
TEXTS, RUN_TEXTS = (
    {language: {key: pair[i] for key, pair in part.items()} for i, language in enumerate(LANGUAGES)}
    for part in yaml.safe_load(Path(__file__).with_name("texts.yaml").read_text(encoding="utf-8")).values()
)


@dataclass(frozen=True)
class Translations:
    """The texts of one language: `words("send")` is the text of a key; `words("took", seconds=3)` fills in a blank."""

    language: str

    def __post_init__(self) -> None:
        if self.language not in LANGUAGES:
            raise OpticNerveError(
                f"the page speaks {' and '.join(LANGUAGES)}; there is no {self.language!r}", kind="unknown-name"
            )

    def __call__(self, key: str, **values: object) -> str:
        """The text of `key`. Raises KeyError: no text has that key."""
        own = TEXTS[self.language]
        text: str = own[key] if key in own else RUN_TEXTS[self.language][key]
        return text.format(**values) if values else text


def preferred(accept_language: str) -> str:
    """The language to speak to a browser that sends this `Accept-Language` header; English where neither is named.

    Source: RFC 9110, section 12.5.4.
    """
    best, weight = "en", 0.0
    for entry in accept_language.split(","):
        name, _, parameters = entry.strip().partition(";")
        language = name.strip().lower().partition("-")[0]
        if language not in LANGUAGES:
            continue
        key, _, value = parameters.strip().partition("=")
        try:
            quality = float(value) if key.strip() == "q" else 1.0
        except ValueError:
            quality = 0.0
        if quality > weight:
            best, weight = language, quality
    return best
