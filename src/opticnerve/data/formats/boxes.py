"""Boxes and points: from a record's `objects`, in pixels of the picture's file, to words in a stated frame, and back.

A record lists them as `{"box": [left, top, right, bottom], "label": "cup"}` or `{"point": [x, y], "label": "cup"}`,
each with `image: 1` where it lies in the second picture; or in ms-swift's form, `{"ref": ["cup"], "bbox": [[…]]}` with
`image_id`. In the words `<ref-object>` stands for the next label, `<bbox>` for the next box or point (both as in
ms-swift), and `<objects>` for all that are left, a line each.

The frame is that of the whole, upright picture, so that it means the same whether the picture is squashed, padded,
tiled or shown at its native resolution: thousandths of its sides (as Qwen2-VL, InternVL), or pixels of the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from opticnerve.data.formats.fields import Fields, brief, empty
from opticnerve.data.media.images import Source
from opticnerve.data.media.open import image_size
from opticnerve.types import DataError

Numbers = tuple[float, ...]
"""Left, top, right, bottom; or x, y."""

STYLES: dict[str, tuple[str, str, str]] = {
    "plain": ("[{x0}, {y0}, {x1}, {y1}]", "[{x0}, {y0}]", "{label}"),
    "qwen": (
        "<|box_start|>({x0},{y0}),({x1},{y1})<|box_end|>", "<|box_start|>({x0},{y0})<|box_end|>",
        "<|object_ref_start|>{label}<|object_ref_end|>",
    ),
    "internvl": ("<box>[[{x0}, {y0}, {x1}, {y1}]]</box>", "<point>[[{x0}, {y0}]]</point>", "<ref>{label}</ref>"),
}  # fmt: skip
"""How a box, a point and a label are written."""
FRAMES: dict[str, int | None] = {"thousandths": 1000, "pixels": None}
"""Into how many parts a side of the picture is divided; None: the file's pixels."""
TAGS = ("<ref-object>", "<bbox>", "<objects>")
_FARTHEST = 1 << 31  # NaN and what no float holds are no places either
_KEYS = {"box", "point", "label", "image"}
_TAG = re.compile("|".join(map(re.escape, TAGS)))
_NUMBER = r"(-?\d++(?:\.\d++)?)"  # what has matched is not taken back: an answer of digits alone costs no square
_BETWEEN = r"[\s,;()\[\]]{1,4}"
_BOX = re.compile(r"(?<!\d)" + _BETWEEN.join([_NUMBER] * 4))
_POINT = re.compile(r"(?<!\d)" + _BETWEEN.join([_NUMBER] * 2))


@dataclass(frozen=True)
class Located:
    """A box or a point of picture number `image`, in pixels of its file."""

    numbers: Numbers
    label: str = ""
    image: int = 0


@dataclass(frozen=True)
class BoxOptions:
    """How boxes are written: one of `STYLES`, and of `FRAMES`."""

    style: str = "plain"
    frame: str = "thousandths"

    def written(self, located: Located, height: int, width: int) -> str:
        """A box or a point in a picture of `height` × `width` pixels.

        Raises:
            DataError: it lies outside the picture, or its corners are in the wrong order.
        """
        sides = (width, height) * (len(located.numbers) // 2)
        numbers = located.numbers
        if any(not 0 <= n <= side for n, side in zip(numbers, sides, strict=True)):
            raise DataError(
                f"{list(numbers)} lies outside the picture of {width} × {height} pixels",
                remedy="boxes are [left, top, right, bottom] in pixels of the upright picture", kind="box",
            )  # fmt: skip
        if len(numbers) == 4 and not (numbers[0] < numbers[2] and numbers[1] < numbers[3]):
            raise DataError(
                f"the box {list(numbers)} has no inside", remedy="write [left, top, right, bottom]", kind="box"
            )
        parts = FRAMES[self.frame]
        scaled = [round(n if parts is None else n / side * parts) for n, side in zip(numbers, sides, strict=True)]
        box, point, _ = STYLES[self.style]
        names = dict(zip(("x0", "y0", "x1", "y1"), scaled, strict=False))
        return (box if len(numbers) == 4 else point).format(**names)


def boxes_in(words: str) -> list[Numbers]:
    """The boxes that words name, in order; whatever the style. Where there are none, the points.

    >>> boxes_in("the cup <|box_start|>(10,20),(30,40)<|box_end|>")
    [(10.0, 20.0, 30.0, 40.0)]
    """
    found = _BOX.findall(words) or _POINT.findall(words)
    return [tuple(float(n) for n in numbers) for numbers in found]


def objects_of(fields: Fields) -> list[Located]:
    """What a record says is where; empty if it says nothing.

    Raises:
        DataError: kind `box`: it is not in one of the two forms.
    """
    raw = fields.get("objects")
    if empty(raw):
        return []
    rows = list(_swift(raw)) if isinstance(raw, dict) else raw
    if not isinstance(rows, list):
        raise _wrong(raw)
    return [_located(row) for row in rows]


class Placer:
    """Puts a record's objects where its turns have tags for them, in order."""

    def __init__(self, objects: Sequence[Located], sources: Sequence[Source], options: BoxOptions) -> None:
        self.labels, self.boxes, self.sources, self.options = list(objects), list(objects), sources, options
        self._sizes: dict[int, tuple[int, int]] = {}  # a record may have many boxes in one picture

    def placed(self, words: str) -> str:
        """Words with their tags replaced.

        Raises:
            DataError: kind `box`: more tags than objects, an object of a picture that is not there, one outside it.
        """
        return _TAG.sub(self._replaced, words)

    def check_all_used(self) -> None:
        """Raises a `DataError` of kind `unused-field` where a box stands in no turn."""
        if self.boxes:
            raise DataError(
                f"{len(self.boxes)} of the record's objects stand in none of its turns",
                remedy='write <bbox> or <objects> where they belong, as in columns: {answer: "=<objects>"}, or pass '
                "them over with ignore: [objects]", kind="unused-field",
            )  # fmt: skip

    def _replaced(self, found: re.Match[str]) -> str:
        if found[0] == "<objects>":
            lines = [" ".join(filter(None, (self._label(o), self._box(o)))) for o in self.boxes]
            self.labels.clear()
            self.boxes.clear()
            return "\n".join(lines)
        queue = self.labels if found[0] == "<ref-object>" else self.boxes
        if not queue:
            raise DataError(f"there are more {found[0]} in the words than objects in the record", kind="box")
        return self._label(queue.pop(0)) if queue is self.labels else self._box(queue.pop(0))

    def _label(self, located: Located) -> str:
        return STYLES[self.options.style][2].format(label=located.label) if located.label else ""

    def _box(self, located: Located) -> str:
        if located.image >= len(self.sources):
            raise DataError(
                f"an object lies in picture {located.image}, counted from 0, and there are {len(self.sources)}",
                kind="box",
            )
        if located.image not in self._sizes:
            self._sizes[located.image] = image_size(self.sources[located.image])
        return self.options.written(located, *self._sizes[located.image])


def _swift(raw: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """ms-swift's lists side by side as objects."""
    boxes, labels = raw.get("bbox"), raw.get("ref") or []
    if not isinstance(boxes, list) or not isinstance(labels, list):
        raise _wrong(raw)
    if (kind := raw.get("bbox_type", "real")) != "real":
        raise DataError(
            f"objects.bbox_type is {brief(kind)}; boxes in pixels of the file (real) are read",
            remedy="write them in pixels, or as words in the turns", kind="box",
        )  # fmt: skip
    numbers = raw.get("image_id") or [0] * len(boxes)
    if not isinstance(numbers, list) or len(numbers) != len(boxes) or not all(isinstance(b, list) for b in boxes):
        raise _wrong(raw)
    for n in range(max(len(boxes), len(labels))):
        label = labels[n] if n < len(labels) else ""
        if n >= len(boxes):
            raise DataError(f"{len(labels)} labels (ref) and {len(boxes)} boxes (bbox) in objects", kind="box")
        yield {("point" if len(boxes[n]) == 2 else "box"): boxes[n], "label": label, "image": numbers[n]}


def _located(row: object) -> Located:
    if not isinstance(row, dict) or len({"box", "point"} & row.keys()) != 1 or row.keys() - _KEYS:
        raise _wrong(row)
    numbers, label, image = row.get("box", row.get("point")), row.get("label") or "", row.get("image") or 0
    if not isinstance(numbers, list) or len(numbers) != (4 if "box" in row else 2):
        raise _wrong(row)
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and abs(n) <= _FARTHEST for n in numbers):
        raise _wrong(row)
    if not isinstance(label, str) or not isinstance(image, int) or image < 0:
        raise _wrong(row)
    return Located(tuple(map(float, numbers)), label, image)


def _wrong(value: object) -> DataError:
    return DataError(
        f"objects holds {brief(value)}",
        remedy='a list of {"box": [left, top, right, bottom], "label": "cup"} or {"point": [x, y], …} is wanted, or '
        'ms-swift\'s {"ref": […], "bbox": [[…]]}',
        kind="box",
    )  # fmt: skip
