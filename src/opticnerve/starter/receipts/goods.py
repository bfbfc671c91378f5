"""What a made-up receipt says: a shop, what was bought, discount, tax, total and payment, in English and in Japanese.

Amounts are whole numbers of the smallest coin (cents, yen), so that every sum on the paper is exact. Shops' names are
joined of two parts; a tenth of the pairs, chosen by hash, is kept for testing.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, Literal

Locale = Literal["en", "ja"]
Side = Literal["train", "test"]
LOCALES: tuple[Locale, ...] = ("en", "ja")


@dataclass(frozen=True)
class Item:
    """A line of a receipt. `price`: of one, `quantity` of which were bought; `reduced`: taxed at Japan's lower rate."""

    name: str
    price: int
    quantity: int = 1
    reduced: bool = False

    @property
    def amount(self) -> int:
        return self.price * self.quantity


@dataclass(frozen=True)
class Tax:
    """`rate` in tenths of a percent; `inside`: prices hold it already."""

    rate: int
    amount: int
    inside: bool


@dataclass(frozen=True)
class Purchase:
    """All that a receipt says. `paid`: cash handed over, None by card; `currency` stands before an amount, or behind it
    where it is 円."""

    locale: Locale
    shop: str
    kind: str
    address: str
    phone: str
    when: datetime
    number: int
    items: tuple[Item, ...]
    discount: int
    taxes: tuple[Tax, ...]
    paid: int | None
    currency: str

    @property
    def subtotal(self) -> int:
        return sum(i.amount for i in self.items)

    @property
    def total(self) -> int:
        return self.subtotal - self.discount + sum(t.amount for t in self.taxes if not t.inside)

    @property
    def pieces(self) -> int:
        return sum(i.quantity for i in self.items)

    def written(self, amount: int) -> str:
        """An amount as the paper writes it: `$1,234.50`, `¥1,234`, `1,234円`."""
        digits = f"{amount:,}" if self.locale == "ja" else f"{amount / 100:,.2f}"
        return f"{digits}円" if self.currency == "円" else f"{self.currency}{digits}"


def for_testing(name: str) -> bool:
    """Whether a name (of a shop) is one of the tenth that is never trained on."""
    return hashlib.sha256(name.encode()).digest()[0] % 10 == 0


def shop(rng: random.Random, locale: Locale, side: Side) -> tuple[str, str]:
    """A kind of shop and a shop's name of one side."""
    words = _words()
    while True:
        kind = rng.choice(list(words["second"]))
        parts = rng.choice(words["first"][locale]), rng.choice(words["second"][kind][locale])
        name = (" " if locale == "en" else "").join(parts)
        if for_testing(name) == (side == "test"):
            return kind, name


def goods(kind: str, locale: Locale) -> list[tuple[str, int, int, bool]]:
    """Name, least and most price, and whether taxed at the lower rate, of what a kind of shop sells."""
    return [(name, least, most, bool(reduced)) for name, least, most, *reduced in _words()["goods"][kind][locale]]


@cache
def _words() -> dict[str, Any]:
    """goods.json: parts of shops' names, `[name, least, most price, taxed at the lower rate]` of goods, and places."""
    table: dict[str, Any] = json.loads((Path(__file__).parent / "goods.json").read_text(encoding="utf-8"))
    return table


def purchase(rng: random.Random, side: Side, locale: Locale, most_items: int = 18) -> Purchase:
    """A purchase drawn from `rng`: one item up to `most_items`, each name once."""
    kind, name = shop(rng, locale, side)
    count = min(most_items, 1 + int(rng.triangular(0, 18, 3)))
    items = []
    for title, least, most, reduced in rng.sample(goods(kind, locale), count):
        quantity = rng.choice([1, 1, 1, 1, 2, 2, 3, 4])
        items.append(Item(title, rng.randint(least, most), quantity, reduced))
    whole = sum(i.amount for i in items)
    discount = 0 if rng.random() < 0.7 else max(1, whole * rng.choice([5, 10, 15, 20]) // 100)
    made = Purchase(
        locale=locale, shop=name, kind=kind, address=_address(rng, locale), phone=_phone(rng, locale),
        when=datetime(2019, 1, 1) + timedelta(minutes=rng.randrange(60 * 24 * 365 * 8)), number=rng.randint(1, 99999),
        items=tuple(items), discount=discount, taxes=_taxes(rng, locale, kind, items, discount), paid=None,
        currency=rng.choice(["$", "$", "£", "€", ""] if locale == "en" else ["¥", "¥", "円", ""]),
    )  # fmt: skip
    return replace(made, paid=_handed_over(rng, made.total, locale)) if rng.random() < 0.55 else made


def _taxes(rng: random.Random, locale: Locale, kind: str, items: list[Item], discount: int) -> tuple[Tax, ...]:
    whole = sum(i.amount for i in items) - discount
    if locale == "en":
        rate, inside = rng.choice([(0, False), (60, False), (72, False), (88, False), (200, True), (190, True)])
        return (Tax(rate, _part(whole, rate, inside), inside),) if rate else ()
    inside = rng.random() < 0.5
    # A discount is taken off what is taxed at the usual rate first; what is taken home from a food shop has the lower.
    low = sum(i.amount for i in items if i.reduced)
    high = whole - low
    if high < 0:
        low, high = low + high, 0
    return tuple(Tax(rate, _part(base, rate, inside), inside) for rate, base in ((80, low), (100, high)) if base)


def _part(base: int, rate: int, inside: bool) -> int:
    return base * rate // (1000 + rate) if inside else base * rate // 1000


def _handed_over(rng: random.Random, total: int, locale: Locale) -> int:
    step = rng.choice([100, 500, 1000, 2000] if locale == "en" else [100, 500, 1000, 5000, 10000])
    return -(-total // step) * step


def _address(rng: random.Random, locale: Locale) -> str:
    words = _words()
    if locale == "en":
        return f"{rng.randint(1, 999)} {rng.choice(words['streets'])}, {rng.choice(words['towns'])}"
    numbers = f"{rng.randint(1, 9)}-{rng.randint(1, 30)}-{rng.randint(1, 20)}"
    return f"{rng.choice(words['wards'])}{rng.choice(words['blocks'])}{numbers}"


def _phone(rng: random.Random, locale: Locale) -> str:
    if locale == "en":
        return f"({rng.randint(200, 989)}) 555-{rng.randint(100, 9999):04d}"
    return f"0{rng.choice([3, 6, 45, 52, 75, 92])}-{rng.randint(100, 9999):04d}-{rng.randint(0, 9999):04d}"
