"""The documents tell the truth: their recipes load, their data is read, their commands, options, targets and links exist.

What needs opticnerve runs in one process of its own, as the command line does: without torch.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import DOCS, ROOT, TWINS, Block, blocks, every_block, prose

KEYS = {  # heading in docs/recipes.md → model in opticnerve.recipe
    "The recipe": "Recipe", "model.language": "LanguageSpec", "model.image": "TowerSpec", "stages": "Stage",
    "stages.lora": "LoraSpec", "stages.data": "DataSpec", "evaluate": "EvaluateSpec", "A dual encoder": "DualSpec", "Its vision encoder": "VisionSpec", "Its text encoder": "TextSpec",
    "A fusion classifier": "ClassifierSpec", "Go on from a model": "ContinuedSpec",
}  # fmt: skip

# Reads {"recipes": {where: text}, "data": {where: [file name, text]}, "values": {model: {key: value}}} from stdin.
WITHOUT_TORCH = """
import json, os, sys, tempfile, pathlib
import opticnerve_launch, typer, yaml
from PIL import Image
from pydantic import TypeAdapter
from typing import Annotated
from opticnerve import recipe
from opticnerve.cli.main import app
from opticnerve.data.media.open import open_image
from opticnerve.data.dataset.read import read

asked, found = json.load(sys.stdin), {"recipes": {}, "data": {}, "keys": {}, "values": {}, "commands": {}}

def attempt(work):
    try:
        return work() or ""
    except Exception as e:
        return f"{type(e).__name__}: {e}"

os.environ["PHOTOS"] = "/photos"
for where, text in asked["recipes"].items():
    found["recipes"][where] = attempt(lambda: recipe.load(yaml.safe_load(text)) and "")

def conversations(name, text):
    with tempfile.TemporaryDirectory() as folder:
        for picture in ("1.jpg", "2.jpg"):
            Image.new("RGB", (8, 8)).save(pathlib.Path(folder, picture))
        path = pathlib.Path(folder, name)
        path.write_text(text, encoding="utf-8")
        made = list(read(path))
        assert made and any(c.images for c in made), "no picture in it"
        for c in made:
            for image in c.images:
                open_image(image.source)

for where, (name, text) in asked["data"].items():
    found["data"][where] = attempt(lambda: conversations(name, text))

for model, values in asked["values"].items():
    fields = {f.alias or k: f for k, f in getattr(recipe, model).model_fields.items()}
    found["keys"][model] = {
        k: "required" if f.is_required() else TypeAdapter(f.annotation).dump_python(f.default, mode="json")
        for k, f in fields.items()
    }
    found["values"][model] = {
        k: attempt(lambda: TypeAdapter(Annotated[(fields[k].annotation, "", *fields[k].metadata)]).validate_python(v) and "")
        for k, v in values.items() if k in fields
    }

def walk(command, words):
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            walk(inner, [*words, name])
    options = [o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("-")]
    found["commands"][" ".join(words)] = options

walk(typer.main.get_command(app), [])
assert "torch" not in sys.modules, "this must not need torch"
print(json.dumps(found))
"""


def code_words() -> list[tuple[str, str]]:
    """(where, text) of shell lines and of code spans."""
    lines = [(b.where, line.split("#")[0]) for b in every_block("sh", "bash") for line in b.text.splitlines()]
    return lines + [(path.name, span) for path in DOCS for span in re.findall(r"`([^`\n]+)`", prose(path))]


def key_tables() -> dict[str, dict[str, dict[str, str]]]:
    """docs/recipes.md: model → key → the row's cells by column."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for section in re.split(r"^#+ ", text, flags=re.MULTILINE):
        title, _, body = section.partition("\n")
        if title in KEYS and "| key |" in body:
            table = body[body.index("| key |") :].split("\n\n")[0].splitlines()
            columns = [c.strip() for c in table[0].strip("|").split("|")]
            rows = [[c.strip() for c in line.strip("|").split("|")] for line in table[2:]]
            found[KEYS[title]] = {r[0].strip("`"): dict(zip(columns, r, strict=True)) for r in rows}
    return found


@pytest.fixture(scope="module")
def without_torch() -> dict[str, Any]:
    """What opticnerve itself says to all of it."""
    recipes = {b.where: b.text for b in every_block("yaml") if "model" in (yaml.safe_load(b.text) or {})}
    assert recipes, "no document shows a recipe"
    data = {b.where: (b.file, b.text + "\n") for b in every_block("jsonl", "json", "csv") if b.file}
    values = {
        m: {k: yaml.safe_load(r["example"].strip("`")) for k, r in rows.items()} for m, rows in key_tables().items()
    }
    given = json.dumps({"recipes": recipes, "data": data, "values": values}, default=str)  # YAML knows dates
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], input=given, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_recipes_load(without_torch: dict[str, Any]) -> None:
    assert {w: problem for w, problem in without_torch["recipes"].items() if problem} == {}


def test_example_data_is_read(without_torch: dict[str, Any]) -> None:
    assert len(without_torch["data"]) >= 4
    assert {w: problem for w, problem in without_torch["data"].items() if problem} == {}


def test_every_key_of_a_recipe_stands_in_the_documents_with_its_default(without_torch: dict[str, Any]) -> None:
    tables = key_tables()
    assert set(tables) == set(KEYS.values())
    for model, defaults in without_torch["keys"].items():
        shown = {k: row["default"].strip("`") for k, row in tables[model].items()}
        shown = {k: v if v == "required" else yaml.safe_load(v) for k, v in shown.items()}
        assert shown == defaults, f"the table of {model} in docs/recipes.md"


def test_examples_of_keys_are_valid(without_torch: dict[str, Any]) -> None:
    assert {(m, k): p for m, ks in without_torch["values"].items() for k, p in ks.items() if p} == {}


def test_commands_and_their_options_exist(without_torch: dict[str, Any]) -> None:
    commands, seen = without_torch["commands"], set()
    for where, text in code_words():
        for call in re.findall(r"(?:^|\s)opticnerve ([a-z][^|&;]*)", text):
            words = call.split()
            name = " ".join(words[:2]) if words[0] in ("data", "compare") else words[0]
            assert name in commands, f"{where}: there is no command `opticnerve {name}`"
            seen.add(name)
            for option in re.findall(r"(?<=\s)--[a-z][a-z-]*", call):
                known = [*commands[name], *commands[""], "--help"]
                assert option in known, f"{where}: `opticnerve {name}` takes no {option}"
    assert {"demo", "plan", "train", "ask", "eval", "merge", "data check", "data show"} <= seen


def test_options_named_alone_exist(without_torch: dict[str, Any]) -> None:
    known = {o for options in without_torch["commands"].values() for o in options} | {"--help"}
    for where, span in code_words():
        for option in re.findall(r"^--[a-z][a-z-]*", span):
            assert option in known, f"{where}: no command takes {option}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    named = {(where, t) for where, text in code_words() for t in re.findall(r"(?:^|\s)make ([a-z]+)", text)}
    assert {t for _, t in named} >= {"demo", "test"}
    assert {n for n in named if n[1] not in targets} == set()


@pytest.mark.parametrize("path", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_compiles(path: Path) -> None:
    for block in blocks(path):
        if block.language == "python":
            ast.parse(block.text, filename=block.where)


@pytest.mark.parametrize("path", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{path.name} links to {file}, which is not there"
        if anchor:
            assert anchor in anchors(there), f"{path.name} links to {target}, which has no such heading"


def anchors(path: Path) -> set[str]:
    """GitHub's: lower case, punctuation dropped, spaces to hyphens."""
    headings = re.findall(r"^#+ (.+)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", TWINS, ids=lambda p: p.name)
def test_both_languages_show_the_same_code(page: Path) -> None:
    """But for comments, and for text within quotation marks that is not English."""
    english, japanese = blocks(page.with_name(page.name.replace(".ja", ""))), blocks(page)
    assert [b.info for b in english] == [b.info for b in japanese]
    for ours, theirs in zip(english, japanese, strict=True):
        for one, other in zip(uncommented(ours), uncommented(theirs), strict=True):
            own = re.split(r'("[^"]*[^\x00-\x7f][^"]*")', other)
            translated = '"[^"]*"'.join(map(re.escape, own[::2]))
            assert re.fullmatch(translated, one), f"{ours.where} and {theirs.where} differ: {other}"


def uncommented(block: Block) -> list[str]:
    return [re.sub(r"(^|\s+)#.*$", "", line) for line in block.text.splitlines()]


def test_the_readmes_begin_with_the_two_commands() -> None:
    for name in ("README.md", "README.ja.md"):
        first = blocks(ROOT / name)[0]
        assert [line.strip() for line in uncommented(first)] == ["make demo", "make test"]


def test_every_kind_of_bad_sample_is_explained() -> None:
    kinds = {"two-assistant-turns", "two-user-turns"}
    for path in (ROOT / "src/opticnerve/data").rglob("*.py"):
        calls = (n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call))
        for call in calls:
            if ast.unparse(call.func) != "OpticNerveError":  # that one ends what is being done
                named = "".join(ast.unparse(k) for k in call.keywords if k.arg == "kind")
                kinds |= set(re.findall(r"'([a-z-]+)'", named))
    kinds -= {"stable"}  # numpy's word for a kind of sorting
    assert len(kinds) > 20
    explained = set(re.findall(r"`([a-z-]+)`", (ROOT / "docs/data.md").read_text(encoding="utf-8")))
    assert kinds - explained == set()
