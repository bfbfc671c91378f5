"""Made clips whose truth is known: when a square turns red."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

from PIL import Image

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


def _written(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
