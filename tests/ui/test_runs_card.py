"""A card as HTML: its words and pictures, and nothing that acts or fetches. Curves as drawings."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from run_folders import EVIL, line, make_run

from errors import refused
from opticnerve.ui.runs import open_run
from opticnerve.ui.runs_content import card_html, render
from opticnerve.ui.runs_html import MOST_POINTS, curve_of, curve_svg, pace


def test_a_card_is_shown_whole_with_its_pictures(tmp_path: Path) -> None:
    make_run(tmp_path, "run", card=True)
    shown = card_html(open_run(tmp_path, "run"))
    assert shown.count('<img class="plot" src="data:image/webp;base64,') == 3  # loss, image dependence, samples
    assert 'alt="Loss and learning rate of stage align"' in shown
    assert "<h2>What was docked</h2>" in shown
    assert "<table>" in shown
    assert "library_name" not in shown  # the front matter
    assert "details" not in shown
    assert "⚠" in render(open_run(tmp_path, "run"), "> [!WARNING]\n> **LOOK**")


@pytest.mark.parametrize("text", [
    EVIL, f"**{EVIL}**", f"`{EVIL}`", f"```\n{EVIL}\n```", f"![{EVIL}](plots/gone.png)", f"| {EVIL} | a |\n|--|--|\n| b | c |",
    f"<details><summary>{EVIL}</summary>", "<svg onload=alert(1)>", "[a](javascript:alert(1))", "<javascript:alert(1)>",
    "[a](data:text/html,<script>1</script>)", "![a](data:image/svg+xml,<svg/onload=1>)", '[a](x "onmouseover=1")',
    "![a](http://elsewhere/x.png)", "![a](//elsewhere/x.png)", "![a](file:///etc/hostname)", "[a](vbscript:x)",
    '[a](https://x/"onmouseover="1)', "[a]: javascript:x\n\n[a]",
])  # fmt: skip
def test_a_hostile_card_neither_acts_nor_fetches(tmp_path: Path, text: str) -> None:
    make_run(tmp_path, "run", done=1)
    shown = render(open_run(tmp_path, "run"), text)
    allowed = "a|span|p|em|strong|code|pre|div|table|thead|tbody|tr|th|td|blockquote"
    for name, attributes in re.findall(r"<\s*/?\s*([^\s>/]+)([^>]*)", shown):
        assert re.fullmatch(allowed, name), shown
        for attribute in re.findall(r'\s([\w-]+)="[^"]*"', attributes):
            assert attribute in {"href", "rel", "target", "class", "role", "tabindex"}, shown
        assert "src" not in re.sub(r'"[^"]*"', "", attributes)
    assert all(re.match("https?:", target) for target in re.findall(r'href="([^"]*)"', shown)), shown


def test_links_to_the_web_stay_and_those_to_files_do_not(tmp_path: Path) -> None:
    make_run(tmp_path, "run", done=1)
    shown = render(open_run(tmp_path, "run"), "[web](https://example.com) and [file](../x) and [web *two*](http://a.b)")
    assert shown.count("<a ") == shown.count("</a>") == 2
    assert shown.count("<span>") == shown.count("</span>") == 1
    assert shown.index("</span>") < shown.index("http://a.b")


def test_pictures_outside_and_too_many_are_named_instead(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", card=True)
    (tmp_path / "other.png").write_bytes((run / "plots/loss-align.png").read_bytes())
    read = open_run(tmp_path, "run")
    assert "<img" not in render(read, "![x](../other.png)")
    assert render(read, "![x](plots/loss-align.png)\n\n" * 30).count("<img") == 24
    (run / "card.md").write_bytes(b"\xff\xfe")
    with refused("damaged", "card.md"):
        card_html(read)


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    curve = curve_of([line(s) for s in range(1, 5001)])
    assert len(curve.steps) == MOST_POINTS
    assert (curve.steps[0], curve.steps[-1]) == (1, 5000)
    assert curve_of([]).steps == []


def test_a_step_without_a_number_breaks_the_line() -> None:
    curve = curve_of([line(s, **({"loss": None} if s in (4, 5) else {})) for s in range(1, 10)])
    assert [math.isnan(v) for v in curve.loss] == [s in (4, 5) for s in range(1, 10)]
    drawn = curve_svg(curve, title="<b>", x_label="step", planned=20)
    assert drawn.count('class="raw"') == 2
    assert "<b>" not in drawn
    assert curve_svg(curve_of([line(1, loss=None)]), title="", x_label="") == ""
    assert "nan" not in curve_svg(curve_of([line(1)]), title="", x_label="")


def test_the_pace_is_that_of_the_last_steps() -> None:
    slow = [line(s, elapsed_s=10.0 * s) for s in range(1, 101)]
    fast = [line(s, elapsed_s=1000 + 0.5 * (s - 100)) for s in range(101, 201)]
    assert pace([*slow, *fast]) == (pytest.approx(0.5), pytest.approx(200.0))
    assert all(math.isnan(v) for v in pace(slow[:1]))
