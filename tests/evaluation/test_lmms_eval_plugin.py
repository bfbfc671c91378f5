"""The plugin for lmms-eval, against its interface; test_lmms_eval_itself.py runs lmms-eval, where it is installed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import tiny
from errors import refused
from opticnerve.inference.generate import Answerer
from opticnerve.models.vlm.build import Dock
from opticnerve.types import AudioPart, ImagePart, TextPart, ask


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The plugin, with lmms-eval's two classes as its version 0.7.3 has them."""

    @dataclass(frozen=True)
    class ModelManifest:
        model_id: str
        simple_class_path: str | None = None
        chat_class_path: str | None = None
        aliases: tuple[str, ...] = ()

    @dataclass
    class GenerationResult:
        text: Any
        token_counts: Any = None

    class lmms:
        is_simple = True

        def __init__(self) -> None:
            self.task_dict: dict[str, Any] = {}

    for name, held in {
        "lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.api.model": {"lmms": lmms}, "lmms_eval.models": {},
        "lmms_eval.api.instance": {"GenerationResult": GenerationResult},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }.items():  # fmt: skip
        module = ModuleType(name)
        vars(module).update(held)  # type: ignore[call-overload]
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "opticnerve.evaluation.lmms_eval_plugin", raising=False)
    yield importlib.import_module("opticnerve.evaluation.lmms_eval_plugin")
    sys.modules.pop("opticnerve.evaluation.lmms_eval_plugin", None)


def messages(document: dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": document["picture"]}, {"type": "text", "text": document["question"]}]
    return [{"role": "user", "content": content}]


def test_it_is_found_by_its_entry_point(plugin: Any) -> None:
    [found] = [e for e in entry_points(group="lmms_eval.models") if e.name == "opticnerve"]
    manifest = found.load()()
    paths = manifest.chat_class_path, manifest.simple_class_path
    assert manifest.model_id == "opticnerve"
    assert paths == (f"{plugin.__name__}.OpticNerve", f"{plugin.__name__}.SimpleOpticNerve")
    assert (plugin.OpticNerve.is_simple, plugin.SimpleOpticNerve.is_simple) == (False, True)


def test_it_answers_as_the_model_does(plugin: Any, docked: Callable[..., Dock], tmp_path: Path) -> None:
    dock = docked("llama")
    documents = [
        {"picture": tiny.picture(i), "question": q} for i, q in enumerate(["what is it?", "is it a dog?", "?"])
    ]
    dock.model.save_pretrained(tmp_path / "model")
    dock.processor.save_pretrained(tmp_path / "model")
    evaluated = plugin.OpticNerve(str(tmp_path / "model"), device="cpu", batch_size="2", max_batch_size=None)
    evaluated.task_dict = {"task": {"test": documents}}
    options = [
        {"max_new_tokens": 6},
        {"max_new_tokens": 3, "temperature": 0, "do_sample": False},
        {"max_new_tokens": 6},
    ]
    requests = [SimpleNamespace(args=("", messages, o, i, "task", "test")) for i, o in enumerate(options)]
    expected = [
        Answerer(dock.model, dock.processor).answer(
            [ask(d["question"], d["picture"])], max_new_tokens=o["max_new_tokens"]
        )[0]
        for d, o in zip(documents, options, strict=True)
    ]
    assert evaluated.generate_until(requests) == expected


def test_what_it_does_not_do_is_refused(plugin: Any, tmp_path: Path) -> None:
    assert plugin.generation({"until": "\n"}) == (64, ["\n"])
    assert plugin.cut("yes\nno", ["\n", ""]) == "yes"
    with refused("unsupported", "sampling"):
        plugin.generation({"do_sample": True, "temperature": 0.7})
    with refused("unsupported", "beams"):
        plugin.generation({"num_beams": 3})
    with refused("unsupported", "task 3", "video"):
        plugin.conversation([{"role": "user", "content": [{"type": "video", "url": "x"}]}], "task 3")
    with refused("unsupported", "task 3", "44100 Hz"):
        sound = {"array": [0.0], "sampling_rate": 44100}
        plugin.conversation([{"role": "user", "content": [{"type": "audio", "url": sound}]}], "task 3")
    with refused("unknown-key", "flash"):
        plugin.OpticNerve("x", flash=True)
    with refused("wrong-type", "batch_size auto"):
        plugin.OpticNerve("x", batch_size="auto")


def test_pictures_stand_where_the_text_says(plugin: Any) -> None:
    first, second = tiny.picture(0), tiny.picture(1)
    pictures, words = [ImagePart(first), ImagePart(second)], TextPart("is <image> larger than <image>?")
    placed = plugin.placed([*pictures, words])
    assert placed == (TextPart("is "), pictures[0], TextPart(" larger than "), pictures[1], TextPart("?"))
    # Said once for two pictures, or never: they stand where they stood.
    for text in ("<image>?", "what?"):
        assert plugin.placed([*pictures, TextPart(text)]) == (*pictures, TextPart(text))


def test_media_come_as_tasks_give_them(plugin: Any) -> None:
    sound = {"array": [0.0], "sampling_rate": 16000}
    content = [
        {"type": "image", "url": "a.png"},
        {"type": "video", "url": sound},  # what lmms-eval takes a decoded sound for
        {"type": "audio", "url": "b.wav"},
    ]
    parts = plugin.conversation([{"role": "user", "content": content}], "task 3").messages[0].parts
    assert parts == (ImagePart(Path("a.png")), AudioPart([0.0]), AudioPart(Path("b.wav")))
