"""Small hurts: what turns a good file into a hostile one. All draw from a `random.Random`, so that a seed repeats them."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Sequence
from typing import Any

NUMBERS = (0, 1, -1, 2, 7, 127, 128, 255, 256, 32_767, 65_535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
STRINGS = (
    "", " ", "\0", "a\0b", "\n", "\ud800", "é", "\u202e", "💥" * 40, "x" * 5_000, "../../etc/passwd", "/dev/zero",
    "file:///etc/passwd", "http://example.org/x.png", "data:image/png;base64,!!!!", "data:,", "<image>", "<video>",
    "{{ 7 * 7 }}", "{% for i in range(10**9) %}x{% endfor %}", "${HOME}", "$(id)", "os:system", "NaN", "1e999", "auto",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 10**6, 2**31, 2**63, 10**30, -0.5, 1e308, float("nan"), float("inf"), [], {}, [[]],
    [None], {"": {}}, [0] * 300, {"type": "mlp"}, {"type": None}, {"bytes": "x"}, {"path": "/etc/passwd"}, *STRINGS,
)  # fmt: skip


def bytes_hurt(rng: random.Random, good: bytes, *, others: Sequence[bytes] = (), most: int = 6) -> bytes:
    """A few of: bits flipped, numbers overwritten, slices cut out, repeated, inserted or exchanged with another file."""
    data = bytearray(good)
    for _ in range(rng.randint(1, most)):
        # Headers stand at the beginning: half of all hurts go there.
        end = min(len(data), 64) if rng.random() < 0.5 else len(data)
        at = rng.randrange(end) if end else 0
        match rng.randrange(9):
            case 0 if data:
                data[at] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x20, 0x0A, rng.randrange(256)))
            case 2:
                data[at : at + rng.randint(1, 1 + len(data) // 3)] = b""
            case 3:
                data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 16)))
            case 4:
                piece = data[at : at + rng.randint(1, 64)]
                data[at:at] = piece * rng.randint(1, 20)
            case 5:
                del data[rng.randrange(len(data) + 1) :]
            case 6 | 7:
                size, form = rng.choice(((1, "B"), (2, "H"), (4, "I"), (8, "Q")))
                number = rng.choice(NUMBERS) & (256**size - 1)
                data[at : at + size] = struct.pack(rng.choice("<>") + form, number)
            case 8 if others:
                other = rng.choice(others)
                here = rng.randrange(len(other)) if other else 0
                data[at:] = other[here:]
    return bytes(data)


def nested(rng: random.Random) -> Any:
    """A list (or a mapping) in a list in a list …"""
    made: Any = rng.choice(VALUES)
    for _ in range(rng.choice((3, 40, 400))):
        made = [made] if rng.random() < 0.7 else {"a": made}
    return made


def value(rng: random.Random) -> Any:
    return nested(rng) if rng.random() < 0.05 else copy.deepcopy(rng.choice(VALUES))


def json_hurt(rng: random.Random, good: Any, *, most: int = 3) -> Any:
    """The tree with a few of its values exchanged, taken away, doubled, renamed or wrapped."""
    tree = copy.deepcopy(good)
    for _ in range(rng.randint(1, most)):
        place, key = _place(rng, tree)
        if place is None:
            return value(rng)
        match rng.randrange(8):
            case 0:
                del place[key]
            case 1 if isinstance(place, dict):
                place[rng.choice((*STRINGS[:6], "type", "name", str(key) + "s", str(key).upper()))] = place.pop(key)
            case 2:
                place[key] = [place[key]] * rng.choice((1, 2, 50))
            case 3 if isinstance(place, list):
                place.insert(key, value(rng))
            case 4:
                _, other = _place(rng, tree)
                place[key] = other
            case _:
                place[key] = value(rng)
    return tree


def _place(rng: random.Random, tree: Any) -> tuple[Any, Any]:
    """A container somewhere in the tree, and one of its keys; (None, None) where there is none."""
    here: Any = None
    key: Any = None
    while isinstance(tree, dict | list) and tree:
        if here is not None and rng.random() < 0.25:
            break
        here, key = tree, rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
        tree = here[key]
    return here, key


def json_bytes(rng: random.Random, tree: Any) -> bytes:
    """As JSON, now and then with hurt bytes, a key that comes twice, or so deep that a parser's stack ends."""
    try:
        text = json.dumps(tree)
    except (RecursionError, ValueError, TypeError):
        text = "[" * 50_000
    made = text.encode("utf-8", "surrogatepass")
    match rng.randrange(20):
        case 0:
            return bytes_hurt(rng, made, most=3)
        case 1:
            return made.replace(b"{", b'{"type": 1, "type": [], ', 1)
        case 2:
            return rng.choice(
                (b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5_000, b"", b"\xff\xfe", b"null", b"1" + b"0" * 400)
            )
    return made
