"""Questions on a receipt with their exact answers, in the language that it is printed in.

What is asked for a fact is answered as it is written on the paper (`$12.34`, `2024年3月15日`), so that an answer can be
pointed at; yes and no, はい and いいえ, are as frequent as each other.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from opticnerve.starter.receipts.goods import Locale, Purchase, goods
from opticnerve.starter.receipts.paper import Box, Paper, enclosing

_ASK: dict[str, dict[Locale, list[str]]] = {
    "total": {
        "en": ["What is the total?", "What is the total on this receipt?", "How much was paid in all?"],
        "ja": ["合計金額はいくらですか", "このレシートの合計はいくらですか", "全部でいくらですか"],
    },
    "date": {
        "en": ["What is the date?", "On which day was this bought?", "What date is on this receipt?"],
        "ja": ["日付はいつですか", "いつ買いましたか", "このレシートの日付を教えてください"],
    },
    "shop": {
        "en": ["Which shop is this from?", "What is the name of the shop?", "Where was this bought?"],
        "ja": ["お店の名前は何ですか", "どこで買いましたか", "どのお店のレシートですか"],
    },
    "amount": {
        "en": ["How much was the {}?", "What did the {} cost?", "What amount is printed for {}?"],
        "ja": ["{}はいくらですか", "{}の金額はいくらですか", "{}の値段を教えてください"],
    },
    "bought": {
        "en": ["Was {} bought?", "Is there {} on this receipt?", "Does the receipt list {}?"],
        "ja": ["{}を買いましたか", "{}はありますか", "このレシートに{}はありますか"],
    },
    "count": {
        "en": ["How many different items were bought?", "How many kinds of item are listed?"],
        "ja": ["商品は何種類ですか", "何種類の商品を買いましたか"],
    },
    "pieces": {
        "en": ["What number of items is printed?", "How many pieces does the receipt count?"],
        "ja": ["点数はいくつですか", "お買上げは何点ですか"],
    },
    "time": {
        "en": ["At what time was it printed?", "What time is on this receipt?"],
        "ja": ["時刻は何時ですか", "何時に買いましたか"],
    },
    "change": {
        "en": ["How much change was given?", "What was the change?"],
        "ja": ["お釣りはいくらですか", "おつりの金額はいくらですか"],
    },
    "phone": {
        "en": ["What is the shop's telephone number?", "What number can one call?"],
        "ja": ["お店の電話番号は何ですか", "電話番号を教えてください"],
    },
}
_READ: dict[Locale, list[str]] = {
    "en": ["Read the text.", "What does it say?", "Transcribe this."],
    "ja": ["文字を読んでください", "何と書いてありますか", "書き起こしてください"],
}
YES_NO: dict[Locale, tuple[str, str]] = {"en": ("yes", "no"), "ja": ("はい", "いいえ")}


@dataclass(frozen=True)
class ReceiptQuestion:
    """`box`: where on the paper the answer stands, None where it is no words of it."""

    type: str
    question: str
    answer: str
    box: Box | None


def to_read(rng: random.Random, locale: Locale) -> str:
    """What asks for a transcription."""
    return rng.choice(_READ[locale])


def questions(rng: random.Random, bought: Purchase, paper: Paper, limit: int | None = None) -> list[ReceiptQuestion]:
    """The total first, then the others in random order, at most `limit` of all."""
    first, *others = _every(rng, bought, paper)
    rng.shuffle(others)
    return [first, *others][:limit]


def _every(rng: random.Random, bought: Purchase, paper: Paper) -> Iterator[ReceiptQuestion]:
    where = bought.locale

    def ask(kind: str, fact: str, *names: str) -> ReceiptQuestion:
        answer = paper.facts[fact].removeprefix("Tel ").removeprefix("TEL ")
        return ReceiptQuestion(kind, rng.choice(_ASK[kind][where]).format(*names), answer, _box(paper, fact, answer))

    yield ask("total", "total")
    for kind in ("date", "shop", "phone", "time", "change", "pieces"):
        if kind in paper.facts:
            yield ask(kind, kind)
    names = [item.name for item in bought.items]
    named = [name.lower() if where == "en" else name for name in names]
    for n in rng.sample(range(len(names)), min(2, len(names))):
        yield ask("amount", f"amount {n}", named[n])
    count = f"{len(names)}種類" if where == "ja" else str(len(names))
    yield ReceiptQuestion("count", rng.choice(_ASK["count"][where]), count, None)
    sold = {name for name, *_ in goods(bought.kind, where)}
    for there, name in ((True, rng.choice(named)), (False, rng.choice(sorted(sold - set(names))))):
        asked = rng.choice(_ASK["bought"][where]).format(name.lower() if where == "en" else name)
        answer = YES_NO[where][0 if there else 1]
        yield ReceiptQuestion("bought", asked, answer, _box(paper, f"item {named.index(name)}", "") if there else None)


def _box(paper: Paper, fact: str, answer: str) -> Box:
    """Around a fact's words, those that are part of the answer where it is some of them only."""
    mine = [w for w in paper.words if w.fact == fact]
    boxes = [w.box for w in mine if w.text in answer] or [w.box for w in mine]
    return enclosing(boxes)
