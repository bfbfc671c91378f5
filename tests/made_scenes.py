"""Made clips and scenes whose truth is known: when a square turns red; where a coloured shape lies."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

BLUE, RED = (30, 60, 220), (230, 20, 20)
FRAMES, RATE = 6, 2  # of a clip, and how many a second it is shown by at most
LENGTHS = (500, 1000, 1500)  # milliseconds of a frame, all of a clip alike: its number alone does not tell the time


def save_clips(folder: Path, count: int, *, seed: int) -> Path:
    """Questions on clips of six frames in which a square is blue and for one of them red. (Were it another colour from
    then on, how many frames are blue would tell the time, in whatever order they came.)"""
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = random.Random(seed), []
    for number in range(count):
        turn, length = rng.randrange(FRAMES), rng.choice(LENGTHS)
        (folder / f"{number}.gif").write_bytes(film(FRAMES, length, turn))
        answer = f"{turn * length / 1000:.1f}"
        lines.append({"video": f"{number}.gif", "question": "when does the square turn red?", "answer": answer})
    return _written(folder / "clips.jsonl", lines)


def film(count: int, length: int, turn: int = 0) -> bytes:
    """A clip of so many frames of `length` milliseconds each, as a GIF."""
    frames, file = [], io.BytesIO()
    for k in range(count):
        frame = Image.new("RGB", (16, 16), "white")
        frame.paste(RED if k == turn else BLUE, (4, 4, 12, 12))
        frame.paste((0, 0, 0), (k, 15, k + 1, 16))  # GIF joins frames that are alike
        frames.append(frame)
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=length)
    return file.getvalue()


COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 70, 220)}
PARTS = 8  # of each side: edges lie on multiples of it, so that a tiny model has few numbers to learn
SAID = [f"[{a}, {b}, {a}, {b}]" for a in range(0, 1001, 125) for b in range(0, 1001, 125)]


def save_scenes(folder: Path, count: int, *, seed: int, size: tuple[int, int] = (96, 64)) -> Path:
    """Questions on pictures (width × height) of two shapes of different colours, side by side: where is the one of a
    colour?"""
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = random.Random(seed), []
    step = size[0] // PARTS, size[1] // PARTS
    for number in range(count):
        picture = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(picture)
        names = rng.sample(sorted(COLOURS), 2)
        boxes = []
        for half, name in enumerate(names):
            width, height = rng.randint(2, 3), rng.randint(3, 5)
            left = half * PARTS // 2 + rng.randint(0, PARTS // 2 - width)
            top = rng.randint(0, PARTS - height)
            box = [left * step[0], top * step[1], (left + width) * step[0], (top + height) * step[1]]
            (draw.rectangle if rng.random() < 0.5 else draw.ellipse)((*box[:2], box[2] - 1, box[3] - 1), COLOURS[name])
            boxes.append(box)
        picture.save(folder / f"{number}.png")
        for name, box in zip(names, boxes, strict=True):
            lines.append(
                {"image": f"{number}.png", "question": "where is the <ref-object> shape?", "answer": "<bbox>",
                 "objects": [{"box": box, "label": name}]}
            )  # fmt: skip
    return _written(folder / "scenes.jsonl", lines)


def _written(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
