"""What the documents show is done: a page's Python and its commands run in order, in a folder with what they name.

Names of a hub are those of tiny models on a hub on the loopback, `starter` is a run of two steps. Names of several
pages, such as `recipe.yaml`, are the folder's own; that a page's recipes load, and its data are read, test_docs.py sees
to. A block that is not run has `<!-- not run: why -->` before it; `NOT_RUN` has single lines of the others, none of them
ours, and `STOPS` the few commands of ours that do not go to their end. Commands within sentences are looked up.
"""

from __future__ import annotations

import io
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import typer
from pages import DOCS, TWINS, Block, blocks, prose
from workshop import PUBLIC, furnish, served, stock

from hub import serving
from opticnerve import recipe
from opticnerve.cli.guard import show_tracebacks
from opticnerve.cli.main import app, main
from opticnerve.starter.demo import recipe_path

pytestmark = pytest.mark.slow
PAGES = [p for p in DOCS if p not in TWINS]  # whose code is another page's: test_docs.py

# How a line begins that is not run, whatever is set before it, and why.
NOT_RUN = {
    "make ": "the checkout's own targets: CI is made of them",
    "uv ": "installs",
    "uvx ": "installs",
    "pip install": "installs",
    "pytest ": "CI runs the tests",
    "scripts/versions.sh": "installs whole environments; tests/test_first_commands.py does so for two",
    "python benchmarks/": "tests/benchmarks runs their quick form",
    "accelerate launch": "several processes; tests/train/test_accelerate_launch.py runs them",
    "torchrun": "several processes; tests/train/test_two_processes.py runs them",
    "llama-server": "another program",
    "vllm ": "another program; tests/export/test_vllm.py runs it",
    "printf ": "versions for another program",
}
# What a command would take long, or another program, for: it goes as far as there, which reads its whole command line,
# its recipe and its changes. How the line begins → where it stops, and why.
STOPS = {
    "opticnerve ui": ("opticnerve.ui.app.listen_and_serve", "does not end; tests/ui runs it"),
    "opticnerve export runs/photos exported-gguf": (
        "opticnerve.export.export.export", "wants llama.cpp; tests/export/test_gguf.py runs it"),
    "opticnerve compare": ("opticnerve.compare.experiment.run", "trains many models; tests/compare runs it"),
    "opticnerve train starter-contrastive": ("opticnerve.runs.pipeline.run_recipe", "a quarter of an hour"),
    "opticnerve train recipe.yaml model.image.encoder.layer=-2": (
        "opticnerve.runs.pipeline.run_recipe", "the line above it trains"),
    "opticnerve train recipe.yaml 'stages.0.train=": ("opticnerve.runs.pipeline.run_recipe", "a line above it trains"),
    "opticnerve embed runs/contrastive --data starter/": ("opticnerve.inference.embeddings.Embedder.images", "minutes"),
}  # fmt: skip
ADDRESS = "127.0.0.1:8000"  # of the server that pages ask
ran: list[str] = []
left_out: dict[str, str] = {}
stopped: dict[str, str] = {}
pages_done: set[str] = set()


class Stop(BaseException):
    """A command has come as far as it is to go."""


def stop(*args: Any, **kwargs: Any) -> None:
    raise Stop


def opticnerve(*words: str, stops: bool = False) -> None:
    """`opticnerve …` in this process, with nothing typed to it."""
    out, err = io.StringIO(), io.StringIO()
    before, code = (sys.stdin, sys.stdout, sys.stderr), 0
    sys.stdin, sys.stdout, sys.stderr = io.StringIO(""), out, err
    try:
        main(list(words))
        assert not stops, f"opticnerve {shlex.join(words)} does not come to where it should stop"
    except SystemExit as left:
        code = int(left.code or 0)
    except Stop:
        assert stops
    finally:
        sys.stdin, sys.stdout, sys.stderr = before
        show_tracebacks(False)
    assert code == 0, f"opticnerve {shlex.join(words)} ended with {code}:\n{out.getvalue()}{err.getvalue()}"


@pytest.fixture(scope="module")
def furnished(
    tmp_path_factory: pytest.TempPathFactory, language_folder: Callable[..., str], vision_folder: Callable[..., str],
    bert_folder: str, private_cache: Path,
) -> Iterator[Path]:  # fmt: skip
    folder = tmp_path_factory.mktemp("workshop")
    with pytest.MonkeyPatch.context() as patch, serving() as hub:
        stock(hub, tmp_path_factory.mktemp("hub"), language_folder, vision_folder)
        hub.point_here(patch, tmp_path_factory.mktemp("home"))
        patch.chdir(folder)
        yield furnish(folder, language_folder(), vision_folder, bert_folder, opticnerve)


@pytest.fixture
def workshop(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy for each page, which may write and register what it likes."""
    import opticnerve.models.checkpoint.source
    from opticnerve import registry

    for parts in (r for r in vars(registry).values() if isinstance(r, registry.Registry)):
        parts.names()  # entry points are read once
        monkeypatch.setattr(parts, "_targets", dict(parts._targets))
    folder = tmp_path / "workshop"
    shutil.copytree(furnished, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("COLUMNS", "200")
    for variable, name in PUBLIC.items():
        monkeypatch.setenv(variable, str(folder / "data" / name))
    monkeypatch.setattr(opticnerve.models.checkpoint.source, "shipped_model", lambda name: folder / "runs/demo")
    yield folder
    for name in [n for n in sys.modules if n.partition(".")[0] == "my_parts"]:
        del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_what_a_page_shows_is_done(page: Path, workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    asks = [b for b in blocks(page) if ADDRESS in b.text and (b.language == "python" or b.text.startswith("curl"))]
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ExitStack() as stack:
        address = stack.enter_context(served("runs/demo", "starter")) if asks else ADDRESS
        for block in blocks(page):
            if block.left_out:
                left_out[block.where] = block.left_out
            elif block.file and block.language in ("python", "yaml", "toml"):
                path = workshop / block.file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text + "\n", encoding="utf-8")
            elif block.language == "python":
                text = block.text.replace(ADDRESS, address).replace('"/data/', f'"{workshop}/data/')
                exec(compile(text, block.where, "exec"), names)
                ran.append(block.where)
            elif block in asks:
                curl(block, address)
            elif block.language in ("sh", "bash"):
                shell(block, monkeypatch, workshop)
    pages_done.add(page.name)


def curl(block: Block, address: str) -> None:
    if shutil.which("curl") is None:
        left_out[block.where] = "curl is not installed"
        return
    text = block.text.replace(ADDRESS, address).replace("curl ", "curl --silent --fail --max-time 60 ")
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{block.where}: {done.stdout}{done.stderr}"
    ran.append(block.where)


def shell(block: Block, monkeypatch: pytest.MonkeyPatch, workshop: Path) -> None:
    """Each line of the block that `NOT_RUN` does not name."""
    from opticnerve.serve.server import Server

    for line in filter(str.strip, block.text.replace("\\\n", " ").splitlines()):
        command = re.sub(r"^(\w+=\S* )+", "", line)
        if why := next((why for begin, why in NOT_RUN.items() if command.startswith(begin)), None):
            left_out[f"{block.where} {command}"] = why
            continue
        words = shlex.split(line.replace("=/data/", f"={workshop}/data/"), comments=True)
        place, why = next((stop for begin, stop in STOPS.items() if command.startswith(begin)), ("", ""))
        with monkeypatch.context() as patch:
            if place:
                patch.setattr(place, stop)
                stopped[f"{block.where} {command}"] = why
                words = [f"{w}-new" if before == "--out" else w for before, w in zip(["", *words], words, strict=False)]
            while "=" in words[0]:
                patch.setenv(*words.pop(0).split("=", 1))
            assert words[0] == "opticnerve", f"{block.where}: nobody runs {line!r}; say why, or how"
            if words[1] == "serve":  # it would take the port, and not end
                patch.setattr(Server, "run", lambda *a, **k: None)
                words += ["--port", "0"]
            if words[1] == "export":  # a page may show several ways into one folder
                shutil.rmtree("exported", ignore_errors=True)
            if words[1] == "train" and not {"--out", "--resume"} & set(words):  # the run that other pages have already
                shutil.rmtree(Path("runs", recipe.load(recipe_path(words[2])).name), ignore_errors=True)
            opticnerve(*words[1:], stops=bool(place))
        ran.append(f"{block.where} {line}")


def test_what_is_left_out_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    """The count, for people; and `NOT_RUN` names nothing that no page shows."""
    if pages_done != {p.name for p in PAGES}:
        pytest.skip("not all pages ran")
    with capsys.disabled():
        print(
            f"\ndocuments: {len(ran)} blocks and commands ran, {len(stopped)} of them in part; {len(left_out)} did not"
        )
        print(*(f"  {where}: {why}" for where, why in (*stopped.items(), *left_out.items())), sep="\n")
    assert len(ran) > 40
    unused = [b for b in NOT_RUN if not any(f" {b}" in where for where in left_out)]
    unused += [b for b in STOPS if not any(f" {b}" in where for where in stopped)]
    assert unused == []
    assert not any("opticnerve" in b for b in NOT_RUN)


@pytest.mark.parametrize("page", DOCS, ids=lambda p: p.name)
def test_commands_within_sentences_are_there(page: Path) -> None:
    """`opticnerve COMMAND --option` between backquotes: command and options exist."""
    for text in re.findall(r"`(opticnerve [^`]+)`", prose(page)):
        found: Any = typer.main.get_command(app)
        words = text.split()[1:]
        while words and hasattr(found, "commands"):
            if not re.fullmatch(r"[a-z]+", words[0]):  # `opticnerve …`, `opticnerve --debug`
                break
            assert words[0] in found.commands, f"{page.name}: {text}"
            found = found.commands[words.pop(0)]
        known = {name for p in found.params for name in (*p.opts, *p.secondary_opts)} | {"--help", "-h", "--debug"}
        options = {w.partition("=")[0].rstrip(",.;)") for w in words if re.match(r"--?[a-z]", w)}
        assert options <= known, f"{page.name}: {text}"
