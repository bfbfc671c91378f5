"""Receipts on disk: pictures, and the data files that name them."""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from opticnerve.common import atomic
from opticnerve.common.cache import cache_dir, new_folder
from opticnerve.common.progress import Waiting
from opticnerve.starter.receipts.goods import LOCALES, Side, purchase
from opticnerve.starter.receipts.paper import Box, Paper, enclosing, families, font_file, print_out
from opticnerve.starter.receipts.photo import STYLES, Photo, photograph
from opticnerve.starter.receipts.questions import ReceiptQuestion, questions, to_read

COUNTS: dict[Side, int] = {"train": 6000, "test": 400}
_LAYOUT = 3  # raise when what is written below changes
READING = ("characters", "lines", "regions", "whole")
_LINES, _REGIONS = 3, 1  # crops of each training receipt
_MOST_PIXELS = 1200  # of a picture's length

Row = dict[str, Any]


def prepare(folder: Path | None = None, *, counts: dict[Side, int] | None = None) -> dict[str, Path]:
    """Draw the receipts into `folder` (default: in the cache), unless they are there already: some minutes.

    Args:
        counts: how many for training and for testing.

    Returns:
        `train` and `test`: questions and answers (`type`, `locale`, `style`, and `box`, in pixels of the picture, of
        what answers it); `lines`, `regions` and `whole`: transcriptions of crops and of whole training receipts;
        `characters`: each printed character of them with its box; and `media`, from which the pictures' paths start.

    Raises:
        OpticNerveError: a package with fonts cannot be fetched.
    """
    counts = counts or COUNTS
    name = "-".join(["receipts", *map(str, counts.values()), f"v{_LAYOUT}"])
    folder = (folder or cache_dir()) / name
    if not folder.is_dir():
        for side in counts:  # fetched here, not by each process
            for locale in LOCALES:
                for family in families(side, locale):
                    font_file(side, locale, family, bold=False)
        with new_folder(folder) as new:
            for side, count in counts.items():
                _draw(new, side, count)
    files = {kind: folder / f"{kind}.jsonl" for kind in ("train", "test", *READING)}
    return {**files, "media": folder}


def receipt(number: int, side: Side) -> tuple[Paper, Photo, list[ReceiptQuestion], Row]:
    """The receipt of a number, the same every time, with its questions and what is told of it; at most 1,200 pixels
    long."""
    rng = random.Random(f"{side} {number}")
    style, most = STYLES[number % len(STYLES)], 18
    while True:
        bought = purchase(rng, side, LOCALES[number // len(STYLES) % len(LOCALES)], most)
        paper = print_out(rng, bought, side)
        photo = photograph(rng, paper.image, style)
        if max(photo.image.size) <= _MOST_PIXELS:
            break
        most = max(1, most - 3)
    about = {"locale": bought.locale, "style": style, "font": paper.font, "layout": paper.layout}
    return paper, photo, questions(rng, bought, paper), about


def _draw(folder: Path, side: Side, count: int) -> None:
    (folder / side).mkdir()
    rows: dict[str, list[Row]] = defaultdict(list)
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        Waiting(Console(stderr=True), f"drawing {count:,} receipts ({side})") as bar,
    ):
        for done, made in enumerate(pool.map(partial(_one, folder, side), range(count)), 1):
            bar.update(done, count)
            for kind, row in made:
                rows[kind].append(row)
    for kind, mine in rows.items():
        atomic.write_lines(folder / f"{kind}.jsonl", mine, ensure_ascii=False)


def _one(folder: Path, side: Side, number: int) -> list[tuple[str, Row]]:
    """Write a receipt's pictures; the rows of the data files that it is in."""
    paper, photo, asked, about = receipt(number, side)
    name = f"{side}/{number:05d}"
    photo.image.save(folder / f"{name}.jpg", quality=85)
    base = {"image": f"{name}.jpg", "locale": about["locale"], "style": about["style"]}
    rows: list[tuple[str, Row]] = []
    for n, one in enumerate(asked):
        box = None if one.box is None else list(photo.box(one.box))
        words = {"type": one.type, "question": one.question, "answer": one.answer, "box": box}
        rows.append((side, {"id": f"receipts-{side}-{number}-{n}", **base, **words}))
    if side == "test":
        return rows
    rng = random.Random(number)
    printed = [one for word in paper.words for one in word.characters()]
    objects = [{"label": character, "box": list(photo.box(box))} for character, box in printed]
    listed = {
        "type": "characters",
        "question": to_read(rng, about["locale"]),
        "answer": "<objects>",
        "objects": objects,
    }
    rows.append(("characters", {"id": f"receipts-characters-{number}", **base, **listed}))
    for kind, text, crop in _crops(rng, paper, photo):
        row = {"id": f"receipts-{kind}-{number}-{len(rows)}", **base}
        if crop is not None:
            row["image"] = f"{name}-{len(rows)}.jpg"
            photo.image.crop(crop).save(folder / row["image"], quality=85)
        rows.append((kind, {**row, "type": kind, "question": to_read(rng, about["locale"]), "answer": text}))
    return rows


def _crops(
    rng: random.Random, paper: Paper, photo: Photo
) -> Iterator[tuple[str, str, tuple[int, int, int, int] | None]]:
    """What there is to read: kind, text, and the part of the picture (None: all of it)."""
    printed = [(" ".join(text.split()), box, photo.box(box)) for text, box in paper.rows]
    # On a paper that lies askew, the upright box around a line holds its neighbours, too.
    upright = [box for _, flat, box in printed if box[3] - box[1] < 1.3 * (flat[3] - flat[1])]
    if len(upright) == len(printed):
        for n in rng.sample(range(len(printed)), min(_LINES, len(printed))):
            yield "lines", printed[n][0], _around(rng, [printed[n][2]])
        for _ in range(_REGIONS):
            first = rng.randrange(max(1, len(printed) - 2))
            some = printed[first : first + rng.randint(2, 5)]
            yield "regions", "\n".join(text for text, *_ in some), _around(rng, [box for *_, box in some])
    yield "whole", "\n".join(text for text, *_ in printed), None


def _around(rng: random.Random, boxes: list[Box]) -> tuple[int, int, int, int]:
    left, top, right, bottom = enclosing(boxes)
    wide, high = rng.uniform(2, 12), rng.uniform(1, 4)
    return max(0, int(left - wide)), max(0, int(top - high)), int(right + wide), int(bottom + high)
