"""The tab for training in a browser: a tiny recipe, really trained."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from browsing import chromium
from run_folders import apart, served, words

import tiny
from opticnerve.ui.runs import lives, open_run, read_job
from opticnerve.ui.train_tab import train_tab

pytestmark = pytest.mark.slow
# The page proposes a name once it knows the recipe.
NAMED_MINE = "document.querySelector('#train-name textarea, #train-name input').value == 'mine'"


@pytest.fixture
def root(
    tmp_path: Path, language_folder: Callable[..., str], vision_folder: Callable[..., str], private_cache: Path
) -> Iterator[Path]:
    """A folder of runs with one recipe of tiny parts in it."""
    folder = tmp_path / "runs"
    folder.mkdir()
    recipe = {
        "precision": "fp32", "forgetting": False,
        "model": {"language": {"name": language_folder()},
                  "image": {"encoder": {"type": "hf_vision", "name": vision_folder()}}},
        "stages": [{"name": "align", "train": {"connector": 1e-3}, "steps": 100_000, "batch_size": 2,
                    "data": [{"path": str(tiny.save_captions(tmp_path / "data"))}]}],
    }  # fmt: skip
    (folder / "mine.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    yield folder
    if (job := read_job(folder)) is not None and lives(job):
        os.kill(job.pid, 9)


def test_a_recipe_is_started_watched_stopped_and_gone_on_with(root: Path) -> None:
    def attribute() -> None:
        with served(lambda: train_tab(words(), root)) as address, chromium() as browser:
            page = browser.new_page(viewport={"width": 390, "height": 844})
            page.set_default_timeout(120_000)
            page.goto(address)
            page.get_by_text("No training has been started").wait_for()
            _choose(page, "#train-recipe", "mine.yaml")
            page.wait_for_function(NAMED_MINE)
            page.get_by_label("Name of the run").fill("../elsewhere")
            page.locator("#train-start").click()
            page.locator("#train-message").get_by_text("is no name for a run").wait_for()
            page.get_by_label("Name of the run").fill("first")
            page.get_by_label("Changes").fill("seed=3")
            page.locator("#train-start").focus()
            page.keyboard.press("Enter")
            page.locator("#train-message").get_by_text("Started first").wait_for()
            state = page.locator("#train-state")
            state.get_by_text("Stage 1 of 1: align").wait_for()
            state.get_by_text("tokens/s").wait_for()
            state.get_by_text("Left in this stage").wait_for()
            assert page.locator("#train-curve svg polyline").count() == 2
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            page.reload()  # nothing of it is in the page's memory
            state.get_by_text("Stage 1 of 1: align").wait_for()
            assert page.locator("#train-start").is_disabled()
            page.locator("#train-stop").click()
            page.locator("#train-message").get_by_text("asked to save and stop").wait_for()
            state.get_by_text("Stopped", exact=True).wait_for()
            done = open_run(root, "first").stages[0].steps
            assert list((root / "first/stages/0-align").glob("checkpoint-*"))
            assert page.locator("#train-stop").is_disabled()
            _choose(page, "#train-unfinished", "first")
            page.get_by_role("button", name="Go on with it").click()
            page.locator("#train-message").get_by_text("first goes on").wait_for()
            page.wait_for_function(
                "done => +(document.querySelector('#train-state progress')?.value ?? 0) > done", arg=done + 1
            )
            page.locator("#train-stop").click()
            state.get_by_text("Stopped", exact=True).wait_for()
            assert "seed: 3" in (root / "first/recipe.yaml").read_text()

    apart(attribute)


def test_a_short_recipe_ends_as_finished(root: Path) -> None:
    def attribute() -> None:
        with served(lambda: train_tab(words("ja"), root)) as address, chromium() as browser:
            page = browser.new_page()
            page.set_default_timeout(120_000)
            page.goto(address)
            page.get_by_text("このページから始めた学習はありません").wait_for()
            _choose(page, "#train-recipe", "mine.yaml")
            page.wait_for_function(NAMED_MINE)
            page.get_by_label("変更").fill("stages.0.steps=3")
            page.locator("#train-start").click()
            page.locator("#train-state").get_by_text("完了", exact=True).wait_for()
            assert page.locator("#train-start").is_enabled()
            assert open_run(root, "mine").state == "finished"

    apart(attribute)


def _choose(page: Any, where: str, what: str) -> None:
    """By keyboard: what is typed narrows the list, Enter takes it."""
    box = page.locator(f"{where} input")
    box.focus()
    box.fill(what)
    page.get_by_role("option", name=what).wait_for()  # Enter takes what is listed when it is pressed
    page.keyboard.press("Enter")
