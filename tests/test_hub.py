"""By the names of a hub: what is fetched, and each failure as one sentence with a remedy and the exit code of a user.

The hub is on the loopback (`hub.py`), its repositories are tiny, and the commands run in processes of their own, for
`huggingface_hub` reads where its hub is once.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import yaml
from safetensors.torch import load_file

import checkpoints
import tiny
from hub import TOKEN, CommandLine, Done, Hub, Repository, oid, serving
from opticnerve.cli.guard import ERROR
from opticnerve.common.hub import HubError, explain, split_revision
from opticnerve.language.chat_template import CHATML
from opticnerve.recipe import load

pytestmark = pytest.mark.slow
LANGUAGE, EYE, EAR = "mill/words-0.5b", "mill/eye-1.5", "mill/ear"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, hub: Hub) -> Path:
    """Where commands run: a recipe and its data; the hub's repositories are made beside it."""
    place = tmp_path_factory.mktemp("work")
    kept = tmp_path_factory.mktemp("kept")
    hub.add(LANGUAGE, tiny.save_language(kept / "words", "llama", chat_template=CHATML))
    hub.add(EYE, tiny.save_vision(kept / "eye", "clip_vision_model"))
    hub.add(EAR, tiny.save_whisper(kept / "ear"))
    tiny.save_captions(place)
    tiny.save_questions(place)
    changed: dict[str, dict[str, Any]] = {"recipe": {}, "small": {"stages": []}}
    for name, changes in changed.items():
        (place / f"{name}.yaml").write_text(yaml.safe_dump(recipe(**changes)), encoding="utf-8")
    return place


def recipe(**changes: Any) -> dict[str, Any]:
    stage = {
        "name": "align",
        "train": {"connector": 1e-3},
        "data": [{"path": "captions.jsonl"}],
        "steps": 1,
        "batch_size": 2,
    }
    return {
        "precision": "fp32", "forgetting": False,
        "model": {"language": {"name": LANGUAGE}, "image": {"encoder": {"type": "hf_vision", "name": EYE}}},
        "stages": [stage], **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def opticnerve(hub: Hub, folder: Path, home: Path) -> Iterator[CommandLine]:
    line = CommandLine(hub, home, folder, OPTICNERVE_CACHE=str(home / "own"))
    yield line
    line.close()


@pytest.fixture(scope="module")
def offline(hub: Hub, folder: Path, home: Path) -> Iterator[CommandLine]:
    line = CommandLine(hub, home, folder, OPTICNERVE_CACHE=str(home / "own"), HF_HUB_OFFLINE="1")
    yield line
    line.close()


def copy(hub: Hub, tmp_path: Path, name: str, of: str = LANGUAGE, **options: Any) -> Repository:
    """Another repository, and the folder that it serves."""
    source = hub.repositories["models", of].revisions["main"]
    return hub.add(name, shutil.copytree(source, tmp_path / name), **options)


def main(repository: Repository) -> Path:
    return repository.revisions["main"]


def asked(hub: Hub, ending: str) -> int:
    return sum(line.startswith("GET") and line.endswith(ending) for line in hub.asked)


def refused(done: Done, *words: str) -> str:
    """The one sentence of a failure that a user can mend, and no more than it."""
    assert done.code == ERROR, done
    assert "Traceback" not in done.err
    [line] = [line for line in done.err.strip().splitlines() if line.startswith("error:")]
    assert done.err.strip() == line, done.err
    assert len(line) < 600
    for word in words:
        assert word in line
    return line


def with_language(name: str) -> list[str]:
    return ["plan", "recipe.yaml", f"model.language.name={name}"]


def loading(name: str) -> list[str]:
    """A command that reads the weights."""
    return ["plan", "recipe.yaml", "--calibrate", f"model.language.name={name}"]


# What works.


def test_a_run_by_names_of_the_hub(hub: Hub, opticnerve: CommandLine, offline: CommandLine, folder: Path) -> None:
    hub.asked.clear()
    assert opticnerve("plan", "recipe.yaml").code == 0
    assert asked(hub, "config.json") > 0
    assert asked(hub, ".safetensors") == 0
    assert opticnerve("data", "show", "recipe.yaml").code == 0
    assert asked(hub, ".safetensors") == 0
    trained = opticnerve("train", "recipe.yaml", "--out", "runs/one")
    assert trained.code == 0, trained.err
    assert asked(hub, ".safetensors") == 2
    [reference] = folder.glob("runs/one/stages/*/dock.json")
    bases = json.loads(reference.read_text())["bases"]
    assert {k: v["name"] for k, v in bases.items()} == {"language": LANGUAGE, "image": EYE}
    assert all(v["sha256"] for v in bases.values())
    for line in (opticnerve, offline):
        assert line("ask", "runs/one", "what colour?", "--image", "0.png", "--max-new-tokens", "2").code == 0
    assert asked(hub, ".safetensors") == 2  # what is there is not fetched again


def test_a_ready_recipe_is_planned_before_its_data_are_there(hub: Hub, opticnerve: CommandLine, tmp_path: Path) -> None:
    hub.add("lmsys/vicuna-7b-v1.5", main(hub.repositories["models", LANGUAGE]))
    hub.add("openai/clip-vit-large-patch14-336", main(hub.repositories["models", EYE]))
    done = opticnerve("plan", "llava-1.5-7b")
    assert done.code == 0, done.err
    assert "LLAVA_PRETRAIN" in done.out
    assert "set the environment variable LLAVA_PRETRAIN" in opticnerve("train", "llava-1.5-7b").err


def test_a_docked_model_and_a_llava_of_the_hub(hub: Hub, opticnerve: CommandLine, tmp_path: Path, folder: Path) -> None:
    checkpoints.save_llava(tmp_path / "llava")
    hub.add("mill/llava-1.5-7b-hf", tmp_path / "llava")
    done = opticnerve("import", "mill/llava-1.5-7b-hf", "imported")
    assert done.code == 0, done.err
    hub.add("mill/imported-1.5", folder / "imported")
    answers = [
        opticnerve("ask", name, "what colour?", "--image", "0.png", "--max-new-tokens", "3")
        for name in ("imported", "mill/imported-1.5")
    ]
    assert answers[0].code == answers[1].code == 0, answers[1].err
    assert answers[0].out == answers[1].out


def test_training_goes_on_from_a_model_of_the_hub(
    hub: Hub,
    opticnerve: CommandLine,
    offline: CommandLine,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pushed run, and a whole model; again without a net. A LLaVA of transformers is imported first."""
    monkeypatch.setattr(hub, "uploads", tmp_path / "pushed")
    checkpoints.save_llava(tmp_path / "llava")
    hub.add("mill/stock-llava", tmp_path / "llava")
    assert opticnerve("import", "mill/stock-llava", "whole").code == 0
    hub.add("mill/whole", folder / "whole")
    assert opticnerve("train", "recipe.yaml", "--out", "runs/first").code == 0
    assert opticnerve("push", "runs/first", "me/first", "--license", "apache-2.0", HF_TOKEN=TOKEN).code == 0
    (folder / "on.yaml").write_text(yaml.safe_dump(recipe(model={"from": "me/first"})), encoding="utf-8")
    for number, (line, name) in enumerate(
        [(opticnerve, "me/first"), (offline, "me/first"), (opticnerve, "mill/whole")]
    ):
        done = line("train", "on.yaml", f"model.from={name}", "--out", f"runs/on-{number}")
        assert done.code == 0, (name, done.err)
    assert opticnerve("ask", "runs/on-1", "what colour?", "--image", "0.png", "--max-new-tokens", "2").code == 0
    refused(opticnerve("plan", "on.yaml", "model.from=mill/stock-llava"), "mill/stock-llava", "opticnerve import")


def test_a_revision_is_pinned(hub: Hub, opticnerve: CommandLine, tmp_path: Path) -> None:
    repository = copy(hub, tmp_path, "mill/moved")
    other = shutil.copytree(main(repository), tmp_path / "older")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 77}))
    repository.revisions |= {"v1.0": other, "refs/pr/3": other}
    commit = repository.commit("v1.0")
    found = {
        name: json.loads(opticnerve(*with_language(name), "--json", "stages=[]").out)["context"]
        for name in ("mill/moved", "mill/moved@v1.0", "mill/moved@refs/pr/3", f"mill/moved@{commit}")
    }
    assert list(found.values()) == [512, 77, 77, 77]
    done = opticnerve(*with_language("mill/moved"), "model.language.revision=v1.0", "--json", "stages=[]")
    assert json.loads(done.out)["context"] == 77
    refused(opticnerve(*with_language("mill/moved@v2")), "'v2'", "revision")


def test_shards_are_fetched_and_nothing_beside_them(hub: Hub, opticnerve: CommandLine, tmp_path: Path) -> None:
    repository = copy(hub, tmp_path, "mill/shards")
    whole = main(repository)
    model = tf.AutoModelForCausalLM.from_pretrained(whole)
    (whole / "model.safetensors").unlink()
    model.save_pretrained(whole, max_shard_size="60KB")
    shards = sorted(whole.glob("model-*.safetensors"))
    assert len(shards) > 1
    shutil.copy(shards[0], whole / "consolidated.safetensors")
    (whole / "pytorch_model.bin").write_bytes(b"a pickle")
    hub.asked.clear()
    assert opticnerve(*loading("mill/shards")).code == 0
    assert sorted(line.rpartition("/")[2] for line in hub.asked if line.startswith("GET") and ".safetensors" in line
                  and "index" not in line) == [s.name for s in shards]  # fmt: skip
    assert asked(hub, ".bin") == 0
    shards[0].unlink()
    refused(opticnerve(*loading("mill/shards")), shards[0].name)


def test_a_broken_download_goes_on_where_it_stopped(
    hub: Hub, opticnerve: CommandLine, tmp_path: Path, home: Path
) -> None:
    repository = copy(hub, tmp_path, "mill/torn", breaks={"model.safetensors": 1})
    done = opticnerve(*loading("mill/torn"))
    assert done.code == 0, done.err
    [blob] = home.glob("hub/models--mill--torn/snapshots/*/model.safetensors")
    assert blob.resolve().name == oid(main(repository) / "model.safetensors")


def test_a_download_that_never_ends(hub: Hub, opticnerve: CommandLine, tmp_path: Path) -> None:
    source = main(hub.repositories["models", LANGUAGE]) / "model.safetensors"
    repository = copy(hub, tmp_path, "mill/short", lies={"model.safetensors": source.read_bytes()[:-100]})
    refused(opticnerve(*loading("mill/short")), "mill/short", "run the command again")
    repository.lies.clear()
    assert opticnerve(*loading("mill/short")).code == 0


def test_weights_under_anothers_hash(hub: Hub, opticnerve: CommandLine, tmp_path: Path, home: Path) -> None:
    content = bytearray((main(hub.repositories["models", LANGUAGE]) / "model.safetensors").read_bytes())
    content[-1] ^= 1
    repository = copy(hub, tmp_path, "mill/forged", lies={"model.safetensors": bytes(content)})
    said = refused(opticnerve(*loading("mill/forged")), "SHA-256", "delete")
    repository.lies.clear()
    Path(re.search(r"delete (\S+)", said)[1]).unlink()  # type: ignore[index]
    assert opticnerve(*loading("mill/forged")).code == 0


def test_a_model_is_pushed_and_asked(
    hub: Hub, opticnerve: CommandLine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "uploads", tmp_path)
    assert opticnerve("train", "recipe.yaml", "--out", "runs/pushed").code == 0
    refused(opticnerve("push", "runs/pushed", "me/mine-1.5"), "me/mine-1.5", "hf auth login")
    done = opticnerve("push", "runs/pushed", "me/mine-1.5", "--license", "apache-2.0", HF_TOKEN=TOKEN)
    assert done.code == 0, done.err
    answers = [
        opticnerve("ask", name, "what colour?", "--image", "0.png", "--max-new-tokens", "3")
        for name in ("runs/pushed", "me/mine-1.5")
    ]
    assert answers[1].code == 0, answers[1].err
    assert answers[0].out == answers[1].out


# What fails: the kind of part × what is wrong with it.


PARTS = {
    "language": (LANGUAGE, "model.language.name={}"),
    "eye": (EYE, "model.image.encoder.name={}"),
    "ear": (EAR, "model.audio={{encoder: {{type: whisper, name: {}}}}}"),
    "timm": (EYE, "model.image.encoder={{type: timm, name: 'hf-hub:{}'}}"),
    "dual vision encoder": (EYE, "model.image.encoder={{type: dual_encoder, name: {}}}"),
    "bert": (EYE, "model.image.connector={{type: qformer, bert: {}}}"),
}


@pytest.mark.parametrize("part", PARTS)
def test_what_cannot_be_had(part: str, hub: Hub, opticnerve: CommandLine, tmp_path: Path) -> None:
    (of, change), owner = PARTS[part], part.replace(" ", "-")
    gated, private = f"{owner}/gated", f"{owner}/private"
    copy(hub, tmp_path, gated, of, gated=True)
    copy(hub, tmp_path, private, of, private=True)
    empty = f"{owner}/empty"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("nothing")
    hub.add(empty, tmp_path / "empty")

    def plan(name: str, **environment: str) -> Done:
        return opticnerve("plan", "small.yaml", change.format(name), **environment)

    refused(plan(gated), gated, "gated", "licence", "hf auth login")
    refused(plan(gated, HF_TOKEN="hf_of_another"), gated, "gated", "licence")
    for name in (private, "nobody/nothing"):
        refused(plan(name), name, "check the name", "hf auth login")
        refused(plan(name, HF_TOKEN="hf_of_another"), name, "check the name")
    refused(plan(f"{of}@v9"), "'v9'", "revision")
    refused(plan(empty), empty, "config.json")
    refused(plan("a/b/c"), "a/b/c", "OWNER/NAME")
    refused(plan("./no-folder"), "no-folder")
    if part in ("language", "eye", "ear"):
        assert plan(gated, HF_TOKEN=TOKEN).code == 0
        assert plan(private, HF_TOKEN=TOKEN).code == 0


def test_offline(offline: CommandLine, opticnerve: CommandLine, hub: Hub, tmp_path: Path) -> None:
    copy(hub, tmp_path, "mill/never")
    copy(hub, tmp_path, "mill/half")
    hub.asked.clear()
    refused(offline(*with_language("mill/never")), "mill/never", "HF_HUB_OFFLINE")
    assert hub.asked == []
    assert opticnerve(*with_language("mill/half")).code == 0  # brings all but the weights
    assert offline(*with_language("mill/half")).code == 0
    refused(offline(*loading("mill/half")), "mill/half", "HF_HUB_OFFLINE")


def test_nobody_answers(folder: Path, home: Path, tmp_path: Path) -> None:
    """A hub that is gone: what is in the cache works, the rest says so."""
    with serving() as gone:
        pass
    line = CommandLine(gone, home, folder, OPTICNERVE_CACHE=str(home / "own"))
    try:
        refused(line(*with_language("mill/elsewhere")), "mill/elsewhere", gone.address, "network")
        data = '[{path: "mill/rows", streaming: true}]'
        refused(line("plan", "recipe.yaml", f"stages.0.data={data}", "model.language.name=mill/elsewhere"))
    finally:
        line.close()


def test_pickles_are_refused_and_their_conversion_is_named(hub: Hub, opticnerve: CommandLine, tmp_path: Path) -> None:
    repository = copy(hub, tmp_path, "mill/pickles")
    converted = shutil.copytree(main(repository), tmp_path / "converted")
    torch.save(load_file(main(repository) / "model.safetensors"), main(repository) / "pytorch_model.bin")
    (main(repository) / "model.safetensors").unlink()
    hub.asked.clear()
    assert opticnerve(*with_language("mill/pickles")).code == 0  # a plan reads no weights
    refused(opticnerve(*loading("mill/pickles")), "pytorch_model.bin", "safetensors", "@REVISION")
    repository.revisions["refs/pr/7"] = converted
    refused(opticnerve(*loading("mill/pickles")), "mill/pickles@refs/pr/7")
    assert opticnerve(*loading("mill/pickles@refs/pr/7")).code == 0
    assert asked(hub, ".bin") == 0


@pytest.mark.parametrize(
    ("missing", "said"),
    [("tokenizer.json", "tokenizer"), ("config.json", "config.json"), ("model.safetensors", "weights")],
)
def test_a_file_is_missing(missing: str, said: str, hub: Hub, opticnerve: CommandLine, tmp_path: Path) -> None:
    name = f"mill/without-{missing.partition('.')[0]}"
    repository = copy(hub, tmp_path, name)
    for file in main(repository).glob(f"{missing.partition('.')[0]}*"):
        file.unlink()
    refused(opticnerve(*loading(name)), name, said)


def test_another_kind_of_model(hub: Hub, opticnerve: CommandLine, tmp_path: Path) -> None:
    copy(hub, tmp_path, "mill/strange")
    config = {"model_type": "never-heard-of", "architectures": ["Never"]}
    (tmp_path / "mill/strange/config.json").write_text(json.dumps(config))
    refused(opticnerve(*with_language("mill/strange")), "mill/strange")
    refused(opticnerve("plan", "small.yaml", "model.image.encoder.name=mill/strange"), "mill/strange")
    for command in (["ask", LANGUAGE, "hello?"], ["eval", LANGUAGE, "--data", "questions.jsonl"]):
        refused(opticnerve(*command), "no model of opticnerve")
    refused(opticnerve("import", LANGUAGE, "never"), "can be imported")
    for command in (["ask", "nobody/x-1.5", "hello?"], ["import", "nobody/x-1.5", "never"],
                    ["data", "show", "captions.jsonl", "--model", "nobody/x-1.5"]):  # fmt: skip
        refused(opticnerve(*command), "nobody/x-1.5", "check the name")


def test_data_of_the_hub(hub: Hub, opticnerve: CommandLine, offline: CommandLine, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tiny.picture(0, size=8).save(tmp_path / "1.png")
    row = {"image": {"bytes": (tmp_path / "1.png").read_bytes(), "path": "1.png"}, "caption": "a red circle"}
    (tmp_path / "rows/data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([row] * 4), tmp_path / "rows/data/train-00000-of-00001.parquet")
    hub.add("mill/rows", tmp_path / "rows", kind="datasets")
    hub.add("mill/shut", tmp_path / "rows", kind="datasets", gated=True)

    def plan(name: str, more: str = "", line: CommandLine = opticnerve) -> Done:
        data = f"[{{path: {name}, streaming: true{more}}}]"
        return line("data", "check", "recipe.yaml") if not name else line(
            "train", "recipe.yaml", f"stages.0.data={data}", "--out", f"runs/{abs(hash((name, more, id(line))))}")  # fmt: skip

    done = plan("mill/rows")
    assert done.code == 0, done.err
    refused(plan("mill/no-rows"), "mill/no-rows", "check the name")
    refused(plan("mill/shut"), "mill/shut", "licence")
    refused(plan("mill/rows", ", revision: v9"), "v9")
    refused(plan("mill/rows", ", hub_split: other"), "other")
    refused(plan("mill/unseen", line=offline), "mill/unseen", "HF_HUB_OFFLINE")


# The parts of it, without a hub.


@pytest.mark.parametrize(
    ("name", "halves"),
    [("gpt2", ("gpt2", None)), ("a/b-1.5@v1", ("a/b-1.5", "v1")), ("a/b@refs/pr/2", ("a/b", "refs/pr/2"))],
)
def test_a_name_and_its_revision(name: str, halves: tuple[str, str | None]) -> None:
    assert split_revision(name) == halves


@pytest.mark.parametrize("name", ["/a/b", "a/b/c", "a/b@", "", "a b", "../a", "a--b/c", "写/真"])
def test_no_name_of_a_hub(name: str) -> None:
    with pytest.raises(HubError) as found:
        split_revision(name)
    assert found.value.kind == "name"


def test_what_is_no_fault_of_a_hub_passes() -> None:
    assert explain(ValueError("something else"), "a/b") is None
    assert explain(OSError(28, "No space left on device"), "a/b").kind == "disk"


def test_revision_stands_beside_a_name_or_in_it() -> None:
    given = recipe()
    given["model"]["language"]["revision"] = "v1"
    given["model"]["image"]["encoder"]["revision"] = "v2"
    read = load(given)
    assert read.docked.language.name == f"{LANGUAGE}@v1"
    assert read.docked.towers["image"].encoder.options == {"name": f"{EYE}@v2"}
