"""A folder in which what the documents show can be done: their names stand for tiny parts, pictures and runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import yaml

import checkpoints
import tiny
from hub import Hub
from opticnerve.models.dual_encoder.build import dual
from ready_data import data_folders

RUNS = ("demo", "run", "plates", "photos", "mine")
RECIPES = ("recipe.yaml", "plates.yaml", "mine.yaml")
# Public data of the ready recipes: a variable of theirs → where a page has it.
PUBLIC = {"LLAVA_PRETRAIN": "LLaVA-Pretrain", "LLAVA_INSTRUCT": "llava-instruct", "VQAV2": "VQAv2"}


def stock(hub: Hub, folder: Path, language: Callable[..., str], vision_encoders: Callable[[str], str]) -> None:
    """What the documents fetch from a hub: tiny models under those names."""
    for name, kind in (("google/siglip-base-patch16-224", "siglip_vision_model"),
                       ("openai/clip-vit-large-patch14-336", "clip_vision_model")):  # fmt: skip
        hub.add(name, vision_encoders(kind))
    hub.add("Qwen/Qwen2.5-0.5B-Instruct", language())
    hub.add(
        "lmsys/vicuna-7b-v1.5", tiny.save_language(folder / "vicuna", "llama", kind="metaspace", bos="<s>", eos="</s>")
    )
    hub.add("llava-hf/llava-1.5-7b-hf", checkpoints.save_llava(folder / "llava"))
    hub.uploads = folder / "uploads"
    hub.uploads.mkdir()


def furnish(
    folder: Path, language: str, vision_encoders: Callable[[str], str], bert: str, opticnerve: Callable[..., str]
) -> Path:
    """Everything that pages name, in `folder`, which is the working directory.

    Args:
        language, vision encoders, bert: folders of tiny parts. opticnerve: runs a command here.
    """
    pictures(folder)
    made = data_folders(folder / "public")
    (folder / "data").mkdir(exist_ok=True)
    for variable, name in PUBLIC.items():
        Path(made[variable]).rename(folder / "data" / name)
    shutil.rmtree(folder / "public")
    recipe: dict[str, Any] = {
        "precision": "fp32", "forgetting": False,
        "model": {
            "language": {"name": language},
            "image": {"encoder": {"type": "hf_vision", "name": vision_encoders("clip_vision_model")}},
        },
        "stages": [
            {"name": "align", "train": {"connector": 1e-3}, "data": [{"path": "captions.jsonl"}], "steps": 2,
             "batch_size": 2},
            {"name": "instruct", "train": {"connector": 1e-3, "language.lora": 1e-3}, "steps": 2, "batch_size": 2,
             "data": [{"path": "questions.jsonl"}]},
        ],
        "evaluate": [{"name": "questions", "data": {"path": "questions.jsonl"}, "max_new_tokens": 2}],
    }  # fmt: skip
    for name in RECIPES:
        named = {"name": Path(name).stem.replace("recipe", "run"), **recipe}
        (folder / name).write_text(yaml.safe_dump(named), encoding="utf-8")
    suite = {"models": ["runs/run"], "evaluate": [{**recipe["evaluate"][0], "image_dependence": 0}]}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")
    opticnerve("train", "recipe.yaml", "--out", "runs/demo")
    for run in RUNS[1:]:
        shutil.copytree("runs/demo", f"runs/{run}")
    model, processor = dual(
        {"type": "hf_vision", "name": vision_encoders("clip_vision_model")}, bert, projection_dim=16
    )
    model.save_pretrained("runs/contrastive")
    processor.save_pretrained("runs/contrastive")
    return folder


def pictures(folder: Path) -> None:
    """Pictures under the names that pages have, and the data about them."""
    (folder / "docs/images").mkdir(parents=True)
    for seed, name in enumerate(
        ("picture.png", "1.jpg", "2.jpg", "docs/images/example.png", "docs/images/receipt.jpg")
    ):
        tiny.picture(seed).save(folder / name)
    tiny.save_questions(folder)
    tiny.save_captions(folder)
    asked = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    written = {
        "yes-no.jsonl": [line for line in asked if line["answer"] in ("yes", "no")],
        "train.jsonl": asked[:6], "test.jsonl": asked[6:],
        "pairs.jsonl": [line | {"score": number / len(asked)} for number, line in enumerate(asked)],
    }  # fmt: skip
    for name, lines in written.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    charts = [
        {"image": "1.jpg", "query": "how many bars?", "label": "3"},
        {"image": "2.jpg", "query": "when?", "label": "1997"},
    ]
    (folder / "charts.json").write_text(json.dumps(charts), encoding="utf-8")
    spoken = folder / "data/LibriSpeech/test-clean/1/2"  # /data of a page
    spoken.mkdir(parents=True)
    (spoken / "1-2.trans.txt").write_text("1-2-0000 HE SPOKE\n1-2-0001 AND WENT\n", encoding="utf-8")
    (folder / "pictures").mkdir()
    for picture in folder.glob("*.png"):
        shutil.copy(picture, folder / "pictures")


@contextmanager
def served(model: str, name: str) -> Iterator[str]:
    """A live server with `model` under `name`; its address."""
    from opticnerve.inference.load import load_model
    from opticnerve.serve.server import Server, Service
    from opticnerve.web.listen import listen

    socket = listen("127.0.0.1", 0)
    loaded: tuple[Any, Any] = load_model(model)
    server = Server(Service(model=loaded[0], processor=loaded[1], name=name))
    thread = Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.stop()
        thread.join(timeout=30)
