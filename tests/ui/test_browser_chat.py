"""The page in a real browser: a picture in, an answer out, maps, two models, and what is said when something is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from browsing import visit

import tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
GREW = """() => {
  window.seen = [];
  new MutationObserver(() => {
    const bot = document.querySelector('#conversation .bot .message-content, #conversation .bot');
    const text = bot ? bot.innerText.trim() : '';
    if (text && window.seen.at(-1) !== text) window.seen.push(text);
  }).observe(document.querySelector('#conversation'), {subtree: true, childList: true, characterData: true});
}"""


def show(page: Any, picture: Path | str, place: str = "picture") -> None:
    page.set_input_files(f"#{place} input[type=file]", str(picture))


def ask(page: Any, question: str) -> None:
    page.fill("#question textarea", question)
    page.press("#question textarea", "Enter")


def text_in(page: Any, selector: str) -> str:
    """What is to be read there, once anything is."""
    page.wait_for_function("s => document.querySelector(s)?.innerText.trim()", arg=selector)
    return str(page.inner_text(selector)).strip()


def settled(page: Any, selector: str) -> str:
    """What is to be read there once it has not changed for a second."""
    before = ""
    while (now := text_in(page, selector)) != before:
        before = now
        page.wait_for_timeout(1000)
    return now


def test_a_picture_a_question_an_answer_as_it_grows_and_where_the_model_looked(
    ui_url: str, browser: Any, picture_file: Path
) -> None:
    with visit(browser, ui_url) as page:
        show(page, picture_file)
        page.wait_for_selector("#picture img")
        page.evaluate(GREW)
        ask(page, "what colour is the circle?")
        answer = settled(page, "#conversation .bot")
        seen = page.evaluate("window.seen")
        assert len(seen) > 1, "the answer came at once, not as it was written"
        assert all(len(a) < len(b) for a, b in zip(seen, seen[1:], strict=False))
        assert "what colour is the circle?" in page.locator("#conversation .user").last.inner_text()
        assert page.input_value("#question textarea") == ""

        page.click("#look")
        for number in (0, 1):  # the default method, and occlusion beside it
            page.wait_for_selector(f"#look-drawing-{number} img")
            width = page.eval_on_selector(f"#look-drawing-{number} img", "i => i.decode().then(() => i.naturalWidth)")
            assert width > 300
        explained = page.locator("#look-word label").first.inner_text().strip()
        assert explained
        assert answer.startswith(explained)
        assert "occlusion at" in text_in(page, "#look-told")
        assert page.foreign == [], "the page asked another host for something"
        assert page.errors == []


def test_a_video_and_an_answer(ui_url: str, browser: Any, tmp_path: Path) -> None:
    first, *rest = (tiny.picture(i, 30) for i in range(12))
    first.save(tmp_path / "clip.gif", save_all=True, append_images=rest, duration=100)
    with visit(browser, ui_url) as page:
        page.click("#video-part button")
        show(page, tmp_path / "clip.gif", "video")
        page.wait_for_selector("#video >> text=clip")
        ask(page, "what moves?")
        assert settled(page, "#conversation .bot")
        assert "what moves?" in page.locator("#conversation .user").last.inner_text()
        assert page.locator("#conversation [src*='clip.gif']").count() == 1
        assert page.errors == []


def test_another_word_has_another_map(ui_url: str, browser: Any, picture_file: Path) -> None:
    with visit(browser, ui_url) as page:
        show(page, picture_file)
        page.wait_for_selector("#picture img")
        ask(page, "is there a blue square?")
        settled(page, "#conversation .bot")
        page.click("#look")
        page.wait_for_selector("#look-drawing-0 img")
        words = page.locator("#look-word input[type=radio]")
        assert words.count() > 1
        first = page.get_attribute("#look-drawing-0 img", "src")
        words.first.focus()
        words.first.focus()
        page.keyboard.press("Tab")  # the keyboard alone: gradio's radios are reached one by one
        page.keyboard.press("Space")
        page.wait_for_function(
            "src => document.querySelector('#look-drawing-0 img')?.getAttribute('src') !== src", arg=first
        )


def test_a_file_that_is_no_picture_is_said_in_words_and_taken_away(
    ui_url: str, browser: Any, picture_file: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture_file.read_bytes()[:200])
    with visit(browser, ui_url) as page:
        show(page, broken)
        page.wait_for_selector("#chat-error .alert")
        assert "cannot be read as a picture" in text_in(page, "#chat-error .alert")
        page.wait_for_selector("#picture img", state="detached")
        show(page, picture_file)  # a good one makes it well again
        page.wait_for_selector("#picture img")
        page.wait_for_selector("#chat-error .alert", state="detached")


def test_a_picture_with_too_many_pixels_is_refused_with_both_numbers(ui_url: str, browser: Any, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    PIL.Image.new("RGB", (400, 300)).save(large)
    with visit(browser, ui_url) as page:
        show(page, large)
        said = text_in(page, "#chat-error .alert")
        assert "400 × 300" in said
        assert "90,000" in said


def test_a_file_that_is_too_large_never_arrives(ui_url: str, browser: Any, tmp_path: Path) -> None:
    heavy = tmp_path / "heavy.png"
    tiny.picture(0, 390).save(heavy)
    assert heavy.stat().st_size > 300_000
    with visit(browser, ui_url) as page:
        show(page, heavy)
        assert page.wait_for_selector(".toast-body, [role=alert]").inner_text()
        assert page.locator("#picture img").count() == 0


def test_no_question_is_said_in_words(ui_url: str, browser: Any) -> None:
    with visit(browser, ui_url) as page:
        page.click("#send")
        assert text_in(page, "#chat-error .alert") == "Write a question first."


def test_the_first_thing_that_tab_reaches_is_within_the_page_and_send_is_on_the_way(ui_url: str, browser: Any) -> None:
    with visit(browser, ui_url) as page:
        page.focus("#question textarea")
        reached = []
        for _ in range(4):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id"))
        assert reached == ["send", "stop", "new", "look"]
        nameless = page.evaluate(
            """() => [...document.querySelectorAll('button, input, textarea, select')]
              .filter(e => e.offsetParent && !e.innerText?.trim() && !e.ariaLabel && !e.title && !e.labels?.length
                && !e.closest('label'))
              .map(e => e.outerHTML.slice(0, 200))"""
        )
        assert nameless == []


def test_two_models_answer_the_same_question(
    ui_url: str, browser: Any, picture_file: Path, two_models: list[str]
) -> None:
    with visit(browser, ui_url) as page:
        page.click("[role=tab]:has-text('Compare')")
        show(page, picture_file, "compare-picture")
        page.wait_for_selector("#compare-picture img")
        page.fill("#compare-question textarea", "what colour is the circle?")
        page.press("#compare-question textarea", "Enter")
        for side, model in zip("ab", two_models, strict=True):
            page.wait_for_function(f"/ s$/.test(document.querySelector('#doing-{side}').innerText.trim())")
            assert page.input_value(f"#model-{side} input") == model
        a, b = (page.input_value(f"#answer-{side} textarea") for side in "ab")
        assert a
        assert b
        assert a != b


def test_a_japanese_browser_gets_japanese_and_errors_in_it(ui_url: str, browser: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8 not a picture")
    with visit(browser, ui_url, locale="ja-JP") as page:
        assert page.url.endswith("/ja/")
        assert page.evaluate("document.documentElement.lang") == "ja"
        assert page.inner_text("#send").strip() == "送信"
        show(page, broken)
        assert "画像として読めません" in text_in(page, "#chat-error .alert")
        page.click("header a[lang=en]")
        page.wait_for_selector("#send:has-text('Send')")


def test_on_a_phone_nothing_sticks_out(ui_url: str, browser: Any) -> None:
    with visit(browser, ui_url, viewport={"width": 390, "height": 844}, has_touch=True) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        low = page.evaluate("['send', 'stop', 'new', 'look'].filter(i => document.getElementById(i).offsetHeight < 44)")
        assert low == []


def test_a_new_chat_forgets_the_old_one(ui_url: str, browser: Any) -> None:
    with visit(browser, ui_url) as page:
        ask(page, "yes?")
        settled(page, "#conversation .bot")
        page.click("#new")
        page.wait_for_selector("#conversation .bot", state="detached")


def test_stop_keeps_what_was_said_and_frees_the_model(ui_url: str, browser: Any) -> None:
    with visit(browser, ui_url) as page:
        ask(page, "yes?")
        text_in(page, "#conversation .bot")
        page.click("#stop")
        page.wait_for_timeout(500)
        ask(page, "no?")
        page.wait_for_function("document.querySelectorAll('#conversation .bot').length >= 2")
