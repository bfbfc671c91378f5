"""The tab for runs in a browser: by keyboard, on a phone, in Japanese, and with a run that means harm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from browsing import chromium
from run_folders import EVIL, apart, make_run, served, words

from opticnerve.ui.runs_tab import runs_tab

pytestmark = pytest.mark.slow


@pytest.fixture
def root(tmp_path: Path) -> Path:
    run = make_run(tmp_path, "demo", answers=40, card=True)
    results = json.loads((run / "results.json").read_text())
    results["tasks"][0]["samples"][1]["question"] = EVIL
    (run / "results.json").write_text(json.dumps(results))
    card = run / "card.md"
    card.write_text(f"{card.read_text()}\n{EVIL}\n\n![x](http://127.0.0.1:9/beacon.png)\n")
    return tmp_path


def test_a_run_is_browsed(root: Path) -> None:
    def attribute() -> None:
        with served(lambda: runs_tab(words(), root)) as address, chromium() as browser:
            page = browser.new_page(viewport={"width": 1100, "height": 900})
            asked: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            page.goto(address)
            page.get_by_role("heading", name="demo finished").wait_for()
            card = page.locator("#runs-card")
            assert card.locator("img").count() == 3
            assert card.locator("img").first.evaluate("i => i.complete && i.naturalWidth") > 500
            page.get_by_role("tab", name="Curves").click()
            assert page.locator("#runs-curves svg[role=img] polyline").count() == 2
            page.get_by_role("tab", name="Answers").click()
            cards = page.locator("#runs-answers .answer")
            cards.first.wait_for()
            assert (cards.count(), cards.locator("img").count()) == (12, 12)
            _by_keyboard(page)
            assert page.evaluate("window.hit") is None  # nothing of a run is run
            assert "onerror" in page.locator("#runs-card").inner_text()
            assert not [url for url in asked if "beacon" in url]
            make_run(root, "later")
            page.get_by_role("button", name="Look again").click()
            page.get_by_role("button", name="All runs in a table").click()
            page.locator("#runs-table").get_by_text("later").wait_for()
            page.get_by_role("heading", name="demo finished").wait_for()  # the chosen one stays

    apart(attribute)


def _by_keyboard(page: Any) -> None:
    """Only the wrong answers, then the next page, without a mouse."""
    page.get_by_role("radio", name="all").focus()
    page.keyboard.press("Tab")  # gradio makes every choice a stop of its own
    page.keyboard.press("Space")
    page.locator("#runs-counted").get_by_text("1 to 12 of 14 answers").wait_for()
    marks = page.locator("#runs-answers .mark").all_inner_texts()
    assert {m.split()[-1] for m in marks} == {"wrong"}
    for _ in range(8):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "runs-next":
            break
    page.keyboard.press("Enter")
    page.locator("#runs-counted").get_by_text("13 to 14 of 14 answers").wait_for()
    page.keyboard.press("Enter")  # there is no further one
    page.wait_for_timeout(500)
    assert page.locator("#runs-answers .answer").count() == 2


def test_on_a_phone_in_japanese_nothing_is_cut_off(root: Path) -> None:
    def attribute() -> None:
        with served(lambda: runs_tab(words("ja"), root)) as address, chromium() as browser:
            page = browser.new_page(viewport={"width": 360, "height": 740})
            page.goto(address)
            page.get_by_role("heading", name="demo 完了").wait_for()
            for tab in ("カード", "曲線", "回答"):
                page.get_by_role("tab", name=tab).click()
                page.wait_for_timeout(300)
                assert page.evaluate("document.documentElement.scrollWidth") <= 360, tab
            assert page.locator("#runs-answers .answer").first.bounding_box()["width"] > 250

    apart(attribute)


def test_an_empty_folder_says_how_to_begin(tmp_path: Path) -> None:
    def attribute() -> None:
        with served(lambda: runs_tab(words(), tmp_path)) as address, chromium() as browser:
            page = browser.new_page()
            page.goto(address)
            page.locator("#runs-summary").get_by_text("opticnerve train").wait_for()

    apart(attribute)
