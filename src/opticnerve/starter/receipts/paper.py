"""A receipt as the printer gives it: a purchase laid out in rows, drawn in one of many fonts, with each word's box.

A layout is five choices (how items, heads, dates, rules and totals are arranged), each with values that are kept for
testing; of the fonts, too, some families are never trained on. Fonts come from packages with free licences.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Literal

import matplotlib as mpl
from PIL import Image, ImageChops, ImageDraw, ImageFont

from opticnerve.starter.receipts.goods import Locale, Purchase, Side
from opticnerve.starter.weights import PackagedFile

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""
Align = Literal["left", "centre", "right"] | float

# Family: package, version, path of the regular cut, path of the bold one.
_FONTS: dict[Side, dict[Locale, dict[str, tuple[str, str, str, str]]]] = {
    "train": {
        "en": {
            "DejaVuSansMono": ("matplotlib", "", "DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf"),
            "DejaVuSans": ("matplotlib", "", "DejaVuSans.ttf", "DejaVuSans-Bold.ttf"),
            "DejaVuSerif": ("matplotlib", "", "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf"),
            "STIXGeneral": ("matplotlib", "", "STIXGeneral.ttf", "STIXGeneralBol.ttf"),
            "Lato": ("font-lato", "0.1.0", "Lato-Regular.ttf", "Lato-Bold.ttf"),
            "SourceSansPro": ("font-source-sans-pro", "0.0.1", "SourceSansPro-Regular.ttf", "SourceSansPro-Bold.ttf"),
            "Manrope": ("font-manrope", "0.0.2", "Manrope-Medium.ttf", "Manrope-Bold.ttf"),
            "RedHatDisplay": ("font-rhd", "0.1.3", "RedHatDisplay-Regular.ttf", "RedHatDisplay-Bold.ttf"),
            "Caladea": ("font-caladea", "0.0.2", "Caladea-Regular.ttf", "Caladea-Bold.ttf"),
            "Roboto": ("font-roboto", "0.0.1", "Roboto-Regular.ttf", "Roboto-Bold.ttf"),
            "RobotoLight": ("font-roboto", "0.0.1", "Roboto-Light.ttf", "Roboto-Black.ttf"),
            "LatoLight": ("font-lato", "0.1.0", "Lato-Light.ttf", "Lato-Black.ttf"),
            "SourceSansLight": ("font-source-sans-pro", "0.0.1", "SourceSansPro-Light.ttf", "SourceSansPro-Black.ttf"),
            "ManropeLight": ("font-manrope", "0.0.2", "Manrope-ExtraLight.ttf", "Manrope-ExtraBold.ttf"),
        },
        "ja": {
            "IPAexGothic": ("matplotlib-fontja", "1.1.0", "ipaexg.ttf", "ipaexg.ttf"),
            "NotoSansJP": ("pylopdf-fonts-cjk", "0.1.0", "NotoSansJP-Regular.otf", "NotoSansJP-Regular.otf"),
        },
    },
    "test": {
        "en": {
            "SourceSerifPro": (
                "font-source-serif-pro", "0.0.1", "SourceSerifPro-Regular.ttf", "SourceSerifPro-Bold.ttf"
            ),
            "HankenGrotesk": (
                "font-hanken-grotesk", "0.0.2", "HankenGrotesk-Regular.otf", "HankenGrotesk-Bold.otf"
            ),
        },
        "ja": {"NotoSerifJP": ("pylopdf-fonts-cjk", "0.1.0", "NotoSerifJP-Regular.otf", "NotoSerifJP-Regular.otf")},
    },
}  # fmt: skip
LAYOUTS: dict[Side, dict[str, list[str]]] = {
    "train": {
        "items": ["one line", "two lines", "quantity first"],
        "head": ["centred", "left"],
        "date": ["above", "below"],
        "rule": ["-", "=", "line", "", "+", "#", "_", "·", ":"],
        "total": ["large", "bold", "plain"],
    },
    "test": {
        "items": ["leaders", "columns"],
        "head": ["right", "underlined"],
        "date": ["with number"],
        "rule": ["*", "~"],
        "total": ["boxed", "between"],
    },
}
_DATES = {
    "en": ["%Y-%m-%d", "%m/%d/%Y", "%d %b %Y", "%b %d, %Y", "%d.%m.%Y"],
    "ja": ["%Y年%m月%d日", "%Y/%m/%d", "%Y-%m-%d", "%Y.%m.%d"],
}
_LABELS: dict[str, dict[Locale, list[str]]] = {
    "total": {
        "en": ["TOTAL", "Total", "Total due", "TOTAL DUE", "Amount due", "Grand total"],
        "ja": ["合計", "合計金額", "お会計", "お買上げ合計", "ご請求額"],
    },
    "subtotal": {"en": ["Subtotal", "SUBTOTAL", "Sub-total"], "ja": ["小計", "お買上小計"]},
    "discount": {"en": ["Discount", "DISCOUNT", "Coupon", "You saved"], "ja": ["値引", "割引", "クーポン"]},
    "cash": {"en": ["Cash", "CASH", "Tendered"], "ja": ["お預り", "現金", "お預かり金額"]},
    "change": {"en": ["Change", "CHANGE", "Change due"], "ja": ["お釣り", "釣銭", "おつり"]},
    "card": {
        "en": ["VISA **** 4417", "CARD **** 2093", "Mastercard"],
        "ja": ["クレジット", "カード支払", "電子マネー"],
    },
    "pieces": {"en": ["Items", "ITEMS SOLD", "No. of items"], "ja": ["点数", "お買上点数"]},
    "thanks": {
        "en": ["Thank you!", "THANK YOU", "Please come again", "Have a nice day"],
        "ja": ["ありがとうございました", "またのご来店をお待ちしております", "毎度ありがとうございます"],
    },
    "number": {"en": ["Receipt", "No.", "Invoice"], "ja": ["伝票", "No.", "レシート"]},
}


@dataclass(frozen=True)
class PrintedWord:
    """A word on the paper, its box, and which fact of the purchase it belongs to (`total`, `item 2`, `amount 2`, …).

    `edges`: where each character begins and the last one ends, from left to right.
    """

    text: str
    box: Box
    fact: str
    edges: tuple[float, ...]

    def characters(self) -> Iterator[tuple[str, Box]]:
        """Each character and its box."""
        for n, character in enumerate(self.text):
            yield character, (self.edges[n], self.box[1], self.edges[n + 1], self.box[3])


@dataclass(frozen=True)
class Cell:
    text: str
    align: Align = "left"
    """A number: where its right end is, of the width."""
    fact: str = ""


@dataclass(frozen=True)
class PrintedRow:
    """Cells of one line. `size`: of the usual font size; `rule`: a line to draw instead; `frame`: a box around it."""

    cells: tuple[Cell, ...] = ()
    size: float = 1.0
    bold: bool = False
    rule: str = ""
    frame: bool = False


@dataclass
class Paper:
    """`image`: ink on white, mode L; `facts`: what each fact reads on the paper, as written there."""

    image: Image.Image
    words: list[PrintedWord]
    facts: dict[str, str]
    layout: dict[str, str]
    font: str
    rows: list[tuple[str, Box]] = field(default_factory=list)
    """Each printed line: its text, cells joined by a space, and its box."""


def enclosing(boxes: Sequence[Box]) -> Box:
    """The smallest box around all of them."""
    return min(b[0] for b in boxes), min(b[1] for b in boxes), max(b[2] for b in boxes), max(b[3] for b in boxes)


@cache
def font_file(side: Side, locale: Locale, family: str, bold: bool) -> Path:
    """Where a font lies; its package is fetched once if it is not installed."""
    package, version, regular, heavy = _FONTS[side][locale][family]
    name = heavy if bold else regular
    if package == "matplotlib":
        return Path(mpl.get_data_path()) / "fonts" / "ttf" / name
    return PackagedFile(package, version, name).locate()


def families(side: Side, locale: Locale) -> list[str]:
    return list(_FONTS[side][locale])


def layout(rng: random.Random, side: Side) -> dict[str, str]:
    return {choice: rng.choice(values) for choice, values in LAYOUTS[side].items()}


def print_out(rng: random.Random, bought: Purchase, side: Side) -> Paper:
    """Print a purchase: 300 to 480 pixels wide, as long as it needs. To train on, letters are also stretched and
    squeezed, and in Japanese now and then of another family than kanji and kana."""
    how, family = layout(rng, side), rng.choice(families(side, bought.locale))
    rows = list(_rows(rng, bought, how))
    width, size = rng.randint(300, 480), rng.uniform(13, 18)
    stretch, latin = 1.0, (bought.locale, family)
    if side == "train":
        stretch = rng.uniform(0.85, 1.2)
        width = round(width / stretch)
        if bought.locale == "ja" and rng.random() < 0.5:
            latin = ("en", rng.choice(families(side, "en")))
    widest = max(sum(len(c.text) * (2 if bought.locale == "ja" else 1) for c in r.cells) * r.size for r in rows)
    size = max(11.0, min(size, 1.75 * width / max(widest, 1)))  # nothing runs over its neighbour

    @cache
    def font(scale: float, bold: bool, ascii: bool) -> ImageFont.FreeTypeFont:
        locale, chosen = latin if ascii else (bought.locale, family)
        return ImageFont.truetype(font_file(side, locale, chosen, bold), round(size * scale))

    paper = _draw(rng, rows, width, font, how, family)
    if side == "train":
        paper.image = _strokes(rng, paper.image)
    return _stretched(paper, stretch)


def _strokes(rng: random.Random, image: Image.Image) -> Image.Image:
    """Strokes across made thinner, or strokes down made thicker, by part of a pixel: more typefaces than there are."""
    if rng.random() < 0.5:
        thin = ImageChops.lighter(image, ImageChops.offset(image, 0, 1))
        image = Image.blend(image, thin, rng.uniform(0, 0.75))
    if rng.random() < 0.4:
        thick = ImageChops.darker(image, ImageChops.offset(image, 1, 0))
        image = Image.blend(image, thick, rng.uniform(0, 0.7))
    return image


def _stretched(paper: Paper, by: float) -> Paper:
    """All of it `by` times as wide."""
    if by == 1:
        return paper

    def wide(box: Box) -> Box:
        return box[0] * by, box[1], box[2] * by, box[3]

    width, height = paper.image.size
    image = paper.image.resize((round(width * by), height), Image.Resampling.BICUBIC)
    words = [replace(w, box=wide(w.box), edges=tuple(x * by for x in w.edges)) for w in paper.words]
    return replace(paper, image=image, words=words, rows=[(text, wide(box)) for text, box in paper.rows])


def _rows(rng: random.Random, bought: Purchase, how: dict[str, str]) -> Iterator[PrintedRow]:
    label = {name: rng.choice(words[bought.locale]) for name, words in _LABELS.items()}
    day = bought.when.strftime(rng.choice(_DATES[bought.locale]))
    date = PrintedRow((Cell(day, "left", "date"), Cell(bought.when.strftime("%H:%M"), "right", "time")))
    number = PrintedRow((Cell(f"{label['number']} {bought.number:05d}", "left", "number"),))
    yield from _head(bought, how["head"])
    if how["date"] == "above":
        yield date
    if how["date"] == "with number":
        yield PrintedRow((*number.cells, Cell(day, "right", "date")))
    else:
        yield number
    yield PrintedRow(rule=how["rule"])
    yield from _items(bought, how["items"])
    yield PrintedRow(rule=how["rule"])

    def line(name: str, amount: int, sign: str = "") -> PrintedRow:
        return PrintedRow((Cell(label[name]), Cell(sign + bought.written(amount), "right", name)))

    if bought.discount or any(not t.inside for t in bought.taxes) or rng.random() < 0.4:
        yield line("subtotal", bought.subtotal)
    if bought.discount:
        yield line("discount", bought.discount, "-")
    taxes = [
        PrintedRow((Cell(_tax(bought, t.rate, t.inside)), Cell(bought.written(t.amount), "right", f"tax {t.rate}")))
        for t in bought.taxes
    ]
    if not (bought.taxes and bought.taxes[0].inside):
        yield from taxes
    yield from _total(Cell(label["total"]), Cell(bought.written(bought.total), "right", "total"), how)
    if bought.taxes and bought.taxes[0].inside:
        yield from taxes
    if rng.random() < 0.5:
        count = f"{bought.pieces}点" if bought.locale == "ja" else f"{bought.pieces}"
        yield PrintedRow((Cell(label["pieces"]), Cell(count, "right", "pieces")))
    if bought.paid is None:
        yield line("card", bought.total)
    else:
        yield line("cash", bought.paid)
        yield line("change", bought.paid - bought.total)
    if how["date"] == "below":
        yield PrintedRow(rule=how["rule"])
        yield date
    yield PrintedRow((Cell(label["thanks"], "centre"),))


def _head(bought: Purchase, head: str) -> Iterator[PrintedRow]:
    align: Align = "left" if head == "left" else "right" if head == "right" else "centre"
    yield PrintedRow((Cell(bought.shop, align, "shop"),), size=1.45, bold=True)
    if head == "underlined":
        yield PrintedRow(rule="line")
    yield PrintedRow((Cell(bought.address, align, "address"),), size=0.9)
    yield PrintedRow((Cell(f"{'TEL' if bought.locale == 'ja' else 'Tel'} {bought.phone}", align, "phone"),), size=0.9)


def _items(bought: Purchase, items: str) -> Iterator[PrintedRow]:
    ja = bought.locale == "ja"
    if items == "columns":
        names = ("品名", "数", "単価", "金額") if ja else ("Item", "Qty", "Price", "Amount")
        ends: tuple[Align, ...] = ("left", 0.5, 0.74, "right")
        yield PrintedRow(tuple(Cell(n, a) for n, a in zip(names, ends, strict=True)), bold=True)
    for n, item in enumerate(bought.items):
        mark = "※" if item.reduced else ""
        name, amount = (
            Cell(item.name + mark, "left", f"item {n}"),
            Cell(bought.written(item.amount), "right", f"amount {n}"),
        )
        each, times = bought.written(item.price), f"{item.quantity}個" if ja else f"{item.quantity} x"
        if items == "columns":
            yield PrintedRow(
                (name, Cell(str(item.quantity), 0.5, f"quantity {n}"), Cell(each, 0.74, f"price {n}"), amount)
            )
        elif items == "leaders":
            titled = Cell(
                f"{item.name}{mark}" + (f" x{item.quantity}" if item.quantity > 1 else ""), "left", f"item {n}"
            )
            yield PrintedRow((titled, amount), rule=".")
        elif items == "quantity first":
            yield PrintedRow((Cell(f"{item.quantity}  {item.name}{mark}", "left", f"item {n}"), amount))
        elif items == "two lines" or item.quantity > 1:
            yield PrintedRow((name,))
            yield PrintedRow((Cell(f"   {times} {each}", "left", f"price {n}"), amount))
        else:
            yield PrintedRow((name, amount))


def _tax(bought: Purchase, rate: int, inside: bool) -> str:
    percent = f"{rate // 10}%" if rate % 10 == 0 else f"{rate / 10}%"
    if bought.locale == "ja":
        return f"{'内' if inside else '外'}税 {percent}"
    return f"{'incl. VAT' if inside else 'Tax'} {percent}"


def _total(label: Cell, amount: Cell, how: dict[str, str]) -> Iterator[PrintedRow]:
    if how["total"] == "between":
        yield PrintedRow(rule="line")
    yield PrintedRow(
        (label, amount), size=1.4 if how["total"] == "large" else 1.0, bold=how["total"] != "plain",
        frame=how["total"] == "boxed",
    )  # fmt: skip
    if how["total"] == "between":
        yield PrintedRow(rule="line")


def _draw(
    rng: random.Random, rows: list[PrintedRow], width: int, font: Callable[[float, bool, bool], ImageFont.FreeTypeFont],
    how: dict[str, str], family: str,
) -> Paper:  # fmt: skip
    margin, leading, y = rng.randint(10, 28), rng.uniform(1.25, 1.6), float(rng.randint(10, 30))
    image = Image.new("L", (width, 4000), 255)
    paper, pen = Paper(image, [], {}, how, family), ImageDraw.Draw(image)
    right = width - margin
    for row in rows:
        face, latin = font(row.size, row.bold, False), font(row.size, row.bold, True)
        height = leading * face.size
        if not row.cells:
            _rule(pen, row.rule, face, (margin, y, right, y + height))
            y += height if row.rule else height / 2
            continue
        ends = [_cell(pen, paper, cell, latin if cell.text.isascii() else face, margin, right, y) for cell in row.cells]
        if row.rule and len(ends) == 2:
            dots = int((ends[1][0] - ends[0][2]) / face.getlength(".") - 2)
            pen.text((ends[0][2] + face.getlength("."), y), "." * max(0, dots), font=face, fill=0)
        if row.frame:
            pen.rectangle((margin - 5, y - 3, right + 5, y + height), outline=0, width=2)
        line = enclosing(ends)
        paper.rows.append((" ".join(c.text for c in row.cells), line))
        y += height
    paper.image = image.crop((0, 0, width, int(y) + rng.randint(10, 30)))
    return paper


def _cell(
    pen: ImageDraw.ImageDraw, paper: Paper, cell: Cell, face: ImageFont.FreeTypeFont, left: int, right: int, y: float
) -> Box:
    """Draw a cell, note its words; its box."""
    length = face.getlength(cell.text)
    free = right - left - length
    x = left + (
        0.0 if cell.align == "left" else free if cell.align == "right" else free / 2 if cell.align == "centre"
        else cell.align * (right - left) - length
    )  # fmt: skip
    boxes: list[Box] = []
    start = 0
    for word in cell.text.split():
        start = cell.text.index(word, start)
        at = x + face.getlength(cell.text[:start])
        pen.text((at, y), word, font=face, fill=0)
        boxes.append(pen.textbbox((at, y), word, font=face))
        edges = tuple(at + face.getlength(word[:n]) for n in range(len(word) + 1))
        paper.words.append(PrintedWord(word, boxes[-1], cell.fact, edges))
        start += len(word)
    if cell.fact:
        paper.facts[cell.fact] = cell.text
    return enclosing(boxes)


def _rule(pen: ImageDraw.ImageDraw, rule: str, face: ImageFont.FreeTypeFont, box: Box) -> None:
    left, top, right, bottom = box
    if rule == "line":
        pen.line((left, (top + bottom) / 2, right, (top + bottom) / 2), fill=0, width=2)
    elif rule:
        pen.text((left, top), rule * int((right - left) / face.getlength(rule)), font=face, fill=0)
