"""What a user types first, with the wheel, outside the checkout: on the newest versions of all, and on the lowest.

These are the smoke tests of versions beside the locked ones; `scripts/versions.sh` runs the suite's core on them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import tiny
import versions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

EXTRAS = "starter,tensorboard,captions,audio,video,serve,ui,liger"
RECIPE = """
model:
  language: {name: starter/smollm2-135m-instruct, chat_template: chatml}
  image:
    encoder: {type: timm, name: starter/efficientnet-lite0, layer: -1, image_size: 128}
    connector: {type: mlp}
stages:
  - {name: align, train: {connector: 1.0e-3}, data: [{path: captions.jsonl}], template: caption, batch_size: 2, steps: 2}
"""
# Of each extra, what is asked first where it is missing.
EXTRAS_AT_WORK = """
import io
import numpy as np, soundfile, av
from opticnerve.data.media.audio import open_audio
from opticnerve.data.media.video import frames
from opticnerve.evaluation import metrics
import opticnerve.serve.app, opticnerve.ui.app, opticnerve.ops.kernels
import liger_kernel.transformers, prometheus_client, sacrebleu, pycocoevalcap.cider.cider, tensorboard
from torch.utils.tensorboard import SummaryWriter

sound = io.BytesIO()
soundfile.write(sound, np.zeros(24_000, np.float32) + 0.1, 24_000, format="WAV")
assert len(open_audio(sound.getvalue())) == 16_000
with av.open("film.mp4", "w") as film:
    stream = film.add_stream("mpeg4", rate=4)
    stream.width = stream.height = 32
    for _ in range(4):
        film.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
    film.mux(stream.encode())
from pathlib import Path
assert len(frames(Path("film.mp4"), 2)) == 2
print("extras at work")
"""


@dataclass(frozen=True)
class Place:
    """A folder outside the checkout, and the programs of an environment."""

    folder: Path
    python: Path

    def opticnerve(self, *arguments: str) -> str:
        return versions.run(self.python.parent / "opticnerve", *arguments, cwd=self.folder)

    def version(self, package: str) -> str:
        return versions.run(self.python, "-c", f"import importlib.metadata as m; print(m.version('{package}'))").strip()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty cache, so that weights are fetched as on the first day."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(versions, "outside", lambda before=versions.outside: before() | {"OPTICNERVE_CACHE": str(folder)})
        yield folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not versions.index_is_reached():
        pytest.skip("no package index is reached")
    return versions.build_wheel(tmp_path_factory.mktemp("wheel"))


def place(folder: Path, wheel: Path, extras: str, *, lowest: bool) -> Place:
    work = folder / "work"
    (work / "docs" / "images").mkdir(parents=True)
    shutil.copy(versions.CHECKOUT / "docs" / "images" / "example.png", work / "docs" / "images")
    tiny.save_captions(work)
    (work / "recipe.yaml").write_text(RECIPE)
    return Place(work, versions.install(folder / "env", wheel, extras, lowest=lowest))


@pytest.fixture(scope="module")
def newest(tmp_path_factory: pytest.TempPathFactory, wheel: Path, cache: Path) -> Place:
    return place(tmp_path_factory.mktemp("newest"), wheel, EXTRAS, lowest=False)


@pytest.fixture(scope="module")
def lowest(tmp_path_factory: pytest.TempPathFactory, wheel: Path, cache: Path) -> Place:
    if versions.uv() is None:
        pytest.skip("pip cannot choose the lowest versions, and there is no uv")
    return place(tmp_path_factory.mktemp("lowest"), wheel, "starter,serve", lowest=True)


def quiet(printed: str) -> None:
    """No library's warning, and no word of what the libraries are about to change. (opticnerve's own remarks, which a
    user can do something about, begin with `warning: ` or `WARNING: `.)"""
    found = [x for x in printed.splitlines() if re.search(r"Warning\b|[Dd]eprecat|Traceback|WARNING:\S|\.warn\b", x)]
    assert not found, "\n".join(found)


def readme_example() -> str:
    """The first Python block of the README."""
    text = (versions.CHECKOUT / "README.md").read_text(encoding="utf-8")
    return text.split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize("which", ["newest", "lowest"])
def test_ask_train_save_load(which: str, request: pytest.FixtureRequest) -> None:
    here: Place = request.getfixturevalue(which)
    assert "from transformers" in readme_example()
    assert "Usage" in here.opticnerve("--help")
    asked = here.opticnerve("ask", "starter", "what shape is in the image?", "--image", "docs/images/example.png")
    assert asked.strip().splitlines()[-1].strip(), asked
    planned = here.opticnerve("plan", "recipe.yaml")
    trained = here.opticnerve("train", "recipe.yaml", "--out", "runs/demo")
    (here.folder / "example.py").write_text(readme_example())
    said = versions.run(here.python, "example.py", cwd=here.folder)
    for printed in (asked, planned, trained, said):
        quiet(printed)
    kept = [json.loads(x) for x in next(here.folder.glob("runs/demo/**/metrics.jsonl")).read_text().splitlines()]
    assert [line["step"] for line in kept] == [1, 2]
    print(f"{which}: transformers {here.version('transformers')}, torch {here.version('torch')}")


def test_the_wheel_holds_what_it_promises(newest: Place) -> None:
    code = "import opticnerve, sys; print(opticnerve.__file__); print('uv' in sys.modules)"
    assert str(versions.CHECKOUT) not in versions.run(newest.python, "-c", code, cwd=newest.folder)
    shown = newest.opticnerve("parts")
    assert "qformer" in shown


def test_what_the_demo_reads_is_fetched(newest: Place) -> None:
    versions.run(newest.python, "-m", "pip", "uninstall", "--quiet", "--yes", "easy-vqa", cwd=newest.folder)
    code = "from opticnerve.starter import easy_vqa; print(len(list(easy_vqa.locate().glob('test/images/*.png'))))"
    assert versions.run(newest.python, "-c", code, cwd=newest.folder).split()[-1] == "1000"


def test_serve(newest: Place) -> None:
    command = [str(newest.python.parent / "opticnerve"), "serve", "starter", "--port", "0"]
    with subprocess.Popen(
        command, cwd=newest.folder, env=versions.outside(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as server:
        assert server.stdout is not None
        try:
            said = ""
            for line in server.stdout:
                said += line
                if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                    break
            else:
                pytest.fail(said)
            with urllib.request.urlopen(f"{found[0]}/v1/models", timeout=120) as answer:
                assert json.load(answer)["data"]
        finally:
            os.kill(server.pid, signal.SIGTERM)
        said += server.stdout.read()
        quiet(said)
        assert server.wait(60) == 0


def test_every_extra(newest: Place, wheel: Path) -> None:
    assert "extras at work" in versions.run(newest.python, "-c", EXTRAS_AT_WORK, cwd=newest.folder)
    # Last: on a machine without a GPU deepspeed says so whenever it is imported.
    versions.run(newest.python, "-m", "pip", "install", "--quiet", f"{wheel}[deepspeed]", cwd=newest.folder)
    assert "0." in versions.run(newest.python, "-c", "import deepspeed; print(deepspeed.__version__)")
