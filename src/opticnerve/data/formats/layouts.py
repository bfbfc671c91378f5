"""How data sets that people have name what our formats name otherwise: each a column map, taken where its fields are
there.

A layout is nothing but what a recipe could say under `columns:`; what it does not name is used or refused as ever. The
data sets that need none, for a format reads them as they are, stand in docs/data.md and in `tests/data/layouts.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opticnerve.data.formats.base import about
from opticnerve.data.formats.columns import Columns, Source, filled, found
from opticnerve.data.formats.fields import empty
from opticnerve.data.formats.names import kind_by_name, kind_by_value, names_by_number, words_of
from opticnerve.data.media.files import KINDS, Kind
from opticnerve.types import DataError


@dataclass(frozen=True)
class DataLayout:
    """A column map for records that have all fields of `wants`. `ignore`: fields that say the same again."""

    name: str
    wants: tuple[str, ...]
    format: str
    columns: Mapping[str, Source]
    ignore: tuple[str, ...] = ()
    map: Columns = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "map", Columns(self.columns))

    def fits(self, record: dict[str, Any]) -> bool:
        """Whether the record has what the map reads, and nothing of its own where that goes."""
        if any(empty(found(record, path, None)) for path in self.wants):
            return False
        rest = {k: v for k, v in record.items() if k not in self.map.paths and k not in self.ignore}
        named = any(kind_by_name(name) for name in self.columns)
        return not (named and about(rest)) and all(empty(rest.get(name)) for name in self.columns)


def _choices_under(*names: str) -> dict[str, Source]:
    return dict(zip("ABCDEFGH", names, strict=False))


LAYOUTS: tuple[DataLayout, ...] = (
    DataLayout("the question's place among choices (A-OKVQA)", ("question", "choices", "correct_choice_idx"), "vqa",
           {"answer": "correct_choice_idx"}, ("answer",)),
    DataLayout("SEED-Bench", ("question", "choice_a", "choice_b", "answer"), "vqa",
           _choices_under("choice_a", "choice_b", "choice_c", "choice_d")),
    DataLayout("NExT-QA", ("question", "a0", "a1", "answer"), "vqa",
           {**_choices_under("a0", "a1", "a2", "a3", "a4"), "answer": "{answer:place}"}),
    DataLayout("M3IT", ("instruction", "outputs"), "instruction",
           {"input": "inputs", "output": "outputs", "images": "image_base64_str"}),
    DataLayout("ms-swift's preferences", ("query", "response", "rejected_response"), "preference", {}),
    DataLayout("ms-swift", ("query", "response"), "instruction", {"instruction": "query", "output": "response"}),
    DataLayout("RLHF-V", ("text.question", "text.chosen", "text.rejected"), "preference",
           {"question": "text.question", "chosen": "text.chosen", "rejected": "text.rejected"}),
    DataLayout("Mantis", ("conversation",), "chat", {"messages": "conversation"}),
    DataLayout("LLaVA-Pretrain's notes", ("image", "blip_caption"), "captions", {"caption": "blip_caption"}),
    DataLayout("ChartQA", ("imgname", "query", "label"), "vqa",
           {"image": "imgname", "question": "query", "answer": "label"}),
    DataLayout("ChartQA on the hub", ("image", "query", "label"), "vqa", {"question": "query", "answer": "label"}),
    DataLayout("PaliGemma, Florence", ("prefix", "suffix"), "vqa", {"question": "prefix", "answer": "suffix"}),
    DataLayout("POPE", ("question_id", "image", "text", "label"), "vqa", {"question": "text", "answer": "label"}),
    DataLayout("VideoInstruct", ("q", "a"), "vqa", {"question": "q", "answer": "a"}),
    DataLayout("Karpathy's splits as rows", ("filepath", "filename", "sentences"), "captions",
           {"image": "{filepath}/{filename}", "captions": "sentences"}),
    DataLayout("Karpathy's splits without folders", ("filename", "sentences"), "captions",
           {"image": "filename", "captions": "sentences"}),
    DataLayout("TextCaps", ("image_id", "caption_str"), "captions",
           {"image": "{image_id}.jpg", "caption": "caption_str"}, ("image_name", "image_path")),
    DataLayout("Clotho", ("file_name", "caption_1", "caption_2"), "captions",
           {"captions": [f"caption_{n}" for n in range(1, 6)]}),
    DataLayout("Common Voice", ("path", "sentence"), "captions", {"audio": "path", "caption": "sentence"}),
    DataLayout("open_clip's tables", ("filepath", "title"), "captions", {"caption": "title"}),
    DataLayout("LAION", ("URL", "TEXT"), "captions", {"image": "URL", "caption": "TEXT"}),
    DataLayout("DataComp", ("url", "text"), "captions", {"image": "url", "caption": "text"}),
    DataLayout("CC3M, CC12M", ("url", "caption"), "captions", {"image": "url"}),
)  # fmt: skip


def layout_of(record: dict[str, Any], format: str | None = None) -> DataLayout | None:
    """The first layout whose fields a record has; with `format`, of those that lead there."""
    return next((x for x in LAYOUTS if format in (None, x.format) and x.fits(record)), None)


# -- what would probably fit ------------------------------------------------------------------------------------------

_ASKED = ("question", "query", "problem", "prompt", "instruction", "q", "input", "user", "text")
_ANSWERED = ("answer", "label", "response", "output", "a", "target", "gt_answer", "ground_truth", "gt", "solution",
             "reply", "assistant", "answers")  # fmt: skip
_CAPTIONED = ("caption", "title", "description", "sentence", "alt_text", "alt", "text", "transcript", "label")
_SPEAKERS, _SPOKEN = (
    ("role", "from", "speaker", "author", "sender"),
    ("content", "value", "text", "message", "utterance"),
)
_BY_NUMBER: dict[Kind, tuple[str, ...]] = {
    "image": ("{%s}.jpg", "{%s}", "{%s}.png", "{%s}.jpeg", "{%s:012d}.jpg", "COCO_train2014_{%s:012d}.jpg",
              "COCO_val2014_{%s:012d}.jpg"),
    "video": ("{%s}.mp4", "{%s}", "{%s}.avi", "{%s}.webm", "{%s}.mkv", "vid{%s}.avi", "video{%s}.mp4"),
    "audio": ("{%s}.wav", "{%s}", "{%s}.mp3", "{%s}.flac"),
}  # fmt: skip


def guessed(record: dict[str, Any], media: Path) -> dict[str, str]:
    """The column map that would probably fit a record whose format cannot be told; empty if nothing would."""
    texts = {k.lower(): k for k, v in record.items() if isinstance(k, str) and isinstance(v, str | int | float)}
    made = picture_by_number(record, media) if not about(record) else {}
    if not made and not about(record):
        of_value = ((k, kind_by_value(v)) for k, v in record.items() if isinstance(k, str))
        made = next(({kind: k} for k, kind in of_value if kind), {})
    for name, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            speaker, words = (next((n for n in names if n in value[0]), None) for names in (_SPEAKERS, _SPOKEN))
            if speaker and words:
                wanted = {"messages": name, "messages.role": speaker, "messages.content": words}
                return made | {k: v for k, v in wanted.items() if k != v and k != f"messages.{v}"}
    asked = next((texts[n] for n in _ASKED if n in texts), None)
    answered = next((texts[n] for n in _ANSWERED if n in texts and texts[n] != asked), None)
    if asked and answered:
        return made | {k: v for k, v in (("question", asked), ("answer", answered)) if k != v}
    caption = next((texts[n] for n in _CAPTIONED if n in texts), None)
    return made | ({"caption": caption} if caption and caption != "caption" else {})


def picture_by_number(record: dict[str, Any], media: Path) -> dict[str, str]:
    """`{"image": "{image_id}.jpg"}` where a record names a picture by a number alone; the file that is there decides
    how the number is written."""
    for key, value in dict.items(record):
        if isinstance(key, str) and names_by_number(key) and isinstance(value, str | int) and not empty(value):
            kind: Kind = next((k for k in KINDS if k in words_of(key)), "image")
            templates = [t % key for t in _BY_NUMBER[kind]]
            return {kind: next((t for t in templates if _is_there(media, t, record)), templates[0])}
    return {}


def as_option(columns: Mapping[str, str]) -> str:
    """A map as a recipe writes it."""
    shown = (f'{k}: "{v}"' if "{" in v else f"{k}: {v}" for k, v in columns.items())
    return f"columns: {{{', '.join(shown)}}}"


def _is_there(media: Path, template: str, record: dict[str, Any]) -> bool:
    try:
        return (media / str(filled(template, record))).is_file()
    except (DataError, OSError, ValueError):
        return False
