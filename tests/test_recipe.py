"""A recipe is checked before any weight is read; each refusal names the key and the remedy."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from errors import refused
from opticnerve import recipe as recipes
from opticnerve.recipe import Recipe, load, split_part
from opticnerve.types import RecipeError

GOOD: dict[str, Any] = {
    "model": {
        "language": {"name": "org/brain"},
        "image": {"encoder": {"type": "hf_vision", "name": "org/eye"}, "connector": {"type": "mlp", "depth": 3}},
    },
    "stages": [
        {"name": "align", "train": {"connector": 1e-3}, "data": [{"path": "captions.json"}]},
        {"name": "instruct", "train": {"connector": 2e-5, "language.lora": 2e-4}, "data": [{"path": "talk.jsonl"}]},
    ],
}


def stage(**changes: Any) -> dict[str, Any]:
    raw = copy.deepcopy(GOOD)
    raw["stages"] = [{**raw["stages"][0], **changes}]
    return raw


def test_a_good_recipe_and_its_defaults() -> None:
    read = load(GOOD)
    assert read.stages[0].batch_size == 8
    assert read.model.image.connector.options == {"depth": 3}
    assert read.model.image.fusion.type == "splice"
    assert read.precision == "bf16"


def test_dumped_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.dump(load(GOOD)))
    assert load(path) == load(GOOD)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml")), ids=lambda p: p.name
)
def test_every_ready_recipe_loads(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in set(re.findall(r"\$\{(\w+)\}", path.read_text())):
        monkeypatch.setenv(variable, str(tmp_path))
    read = load(path)
    assert read.stages
    assert load(yaml.safe_load(recipes.dump(read))) == read


REFUSED = {
    "a typo": (stage(steps_=5), ("recipe", "stages.0.steps_", "'steps'")),
    "a typo at the top": ({**GOOD, "sed": 1}, ("recipe", "sed:", "'seed'")),
    "a typo in data": (stage(data=[{"path": "x", "formt": "chat"}]), ("recipe", "stages.0.data.0.formt", "'format'")),
    "an unknown key like none": (stage(zzzz=1), ("recipe", "stages.0.zzzz", "name, objective")),
    "no model": ({"stages": []}, ("recipe", "model:")),
    "no data key": ({**GOOD, "stages": [{"name": "a", "train": {"connector": 1}}]}, ("recipe", "stages.0.data")),
    "no data": (stage(data=[]), ("recipe", "stages.0.data")),
    "nothing to train": (stage(train={}), ("recipe", "stages.0.train", "connector")),
    "an unknown part": (stage(train={"conector": 1e-3}), ("recipe", "'conector'", "'connector'")),
    "an unknown language part": (stage(train={"language.loar": 1e-3}), ("recipe", "'language.loar'", "'language.lora'")),
    "an audio encoder that is not there": (stage(train={"audio.connector": 1e-3}), ("recipe", "stages.0.train.audio.connector", "image")),
    "a modality before language": (stage(train={"image.language": 1e-3}), ("recipe", "'image.language'")),
    "lora and all": (stage(train={"language": 1e-5, "language.lora": 1e-4}), ("recipe", "stages.0", "language and language.lora")),
    "lora and the last": (stage(train={"language.last(2)": 1e-5, "language.lora": 1e-4}), ("recipe", "stages.0", "language.last(N) and language.lora")),
    "all and a part of it": (stage(train={"language": 1e-5, "language.embeddings": 1e-4}), ("recipe", "stages.0: train: language ")),
    "encoder and its last": (stage(train={"encoder": 1e-5, "encoder.last(2)": 1e-4}), ("recipe", "stages.0", "encoder.last(N)")),
    "encoder and its last, one with its tower": (stage(train={"encoder": 1e-5, "image.encoder.last(2)": 1e-4}), ("recipe", "stages.0", "encoder.last(N)")),
    "one part twice": (stage(train={"connector": 1e-5, "image.connector": 1e-4}), ("recipe", "image.connector")),
    "lora options without lora": (stage(lora={"rank": 4}), ("recipe", "language.lora")),
    "steps and epochs": (stage(steps=5, epochs=1), ("recipe", "stages.0", "steps", "epochs")),
    "an uneven split": (stage(batch_size=8, accumulate=3), ("recipe", "batch_size 8", 3, "accumulate")),
    "draws without sharing": (stage(data=[{"path": "x", "per_image": 2}]), ("recipe", "share_prefix")),
    "no steps": (stage(steps=0), ("recipe", "stages.0.steps", 0)),
    "a negative rate": (stage(train={"connector": -1.0}), ("recipe", "stages.0.train.connector")),
    "a rate that is none": (stage(train={"connector": "fast"}), ("recipe", "stages.0.train.connector", "'fast'")),
    "an unknown schedule": (stage(schedule="cosin"), ("recipe", "stages.0.schedule", "'cosine'", "'cosin'")),
    "a stage name for no folder": (stage(name="../up"), ("recipe", "stages.0.name")),
    "an unknown precision": ({**GOOD, "precision": "fp64"}, ("recipe", "precision:", "'fp64'")),
    "two stages of one name": ({**GOOD, "stages": [GOOD["stages"][0]] * 2}, ("recipe", "align, align")),
    "an unknown encoder": (
        {**GOOD, "model": {**GOOD["model"], "image": {"encoder": {"type": "hf_visoin", "name": "x"}}}},
        ("recipe", "model.image", "'hf_visoin'", "'hf_vision'", "dual_encoder, hf_vision, pair, patches, qwen_vl, timm, whisper"),
    ),
    "an unknown connector": (
        {**GOOD, "model": {**GOOD["model"], "image": {**GOOD["model"]["image"], "connector": {"type": "mpl"}}}},
        ("recipe", "'mpl'", "'mlp'"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    raw, refusal = REFUSED[case]
    with refused(*refusal, error=RecipeError) as e:
        load(raw)
    assert "validation error" not in str(e.value)


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(RecipeError) as e:
        load({**stage(stepz=5), "sed": 1})
    assert len(str(e.value).splitlines()) == 2


class TestOverrides:
    @pytest.mark.parametrize(
        ("override", "where", "value"),
        [
            ("stages.0.steps=50", lambda r: r.stages[0].steps, 50),
            ("seed=3", lambda r: r.seed, 3),
            ("precision=fp32", lambda r: r.precision, "fp32"),
            (
                "stages.1.train.language.lora=1e-4",
                lambda r: r.stages[1].train,
                {"connector": 2e-5, "language.lora": 1e-4},
            ),
            ("stages.0.train.connector=5e-4", lambda r: r.stages[0].train, {"connector": 5e-4}),
            ("stages.0.train.encoder.last(2)=1e-5", lambda r: r.stages[0].train["encoder.last(2)"], 1e-5),
            ("stages.0.train.image.encoder.last(2)=1e-5", lambda r: r.stages[0].train["image.encoder.last(2)"], 1e-5),
            ("stages.0.train={connector: 1.0e-4}", lambda r: r.stages[0].train, {"connector": 1e-4}),
            ("stages.1.lora.rank=4", lambda r: r.stages[1].lora.rank, 4),
            ("stages.0.data.0.path=other.json", lambda r: r.stages[0].data[0].path, "other.json"),
            ("stages.0.data.0.prompt=[a, b]", lambda r: r.stages[0].data[0].prompt, ["a", "b"]),
            ("model.image.connector.depth=2", lambda r: r.model.image.connector.options["depth"], 2),
            ("forgetting=false", lambda r: r.forgetting, False),
            ("stages.0.clip=null", lambda r: r.stages[0].clip, None),
            ("stages.0.data.0.path=a=b", lambda r: r.stages[0].data[0].path, "a=b"),
        ],
    )
    def test_values(self, override: str, where: Any, value: Any) -> None:
        assert where(load(GOOD, [override])) == value

    @pytest.mark.parametrize(
        ("override", "refusal"),
        [
            ("stages.0.step=5", ("recipe", "stages.0.step", "'steps'")),
            ("steps", ("recipe", "key=value", "stages.0.steps=50")),
            ("=5", ("recipe", "key=value")),
            ("stages.7.steps=5", ("recipe", "stages", 2, 0, 1)),
            ("stages.first.steps=5", ("recipe", "stages", 0, 1)),
            ("seed.deep=5", ("recipe", "seed")),
            ("stages.0.data=[1", ("recipe", "stages.0.data")),
        ],
    )
    def test_refusals(self, override: str, refusal: tuple[Any, ...]) -> None:
        with refused(*refusal, error=RecipeError):
            load(GOOD, [override])

    def test_the_mapping_is_not_changed(self) -> None:
        before = copy.deepcopy(GOOD)
        load(GOOD, ["stages.0.steps=5", "model.image.connector.depth=2"])
        assert before == GOOD


class TestFiles:
    def test_missing(self, tmp_path: Path) -> None:
        with refused("recipe", "none.yaml", error=RecipeError):
            load(tmp_path / "none.yaml")

    @pytest.mark.parametrize("content", [b"model: [", b"\xff\xfe\x00", b"- a\n- b", b"", b"just words"])
    def test_unreadable(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "bad.yaml"
        path.write_bytes(content)
        with refused("recipe", "bad.yaml", error=RecipeError):
            load(path)

    def test_a_folder(self, tmp_path: Path) -> None:
        with refused("recipe", tmp_path, error=RecipeError):
            load(tmp_path)

    def test_variables(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MY_PHOTOS", raising=False)
        with refused("recipe", "MY_PHOTOS", error=RecipeError):
            load(stage(data=[{"path": "${MY_PHOTOS}/x.jsonl"}]))
        monkeypatch.setenv("MY_PHOTOS", "/photos")
        assert load(stage(data=[{"path": "${MY_PHOTOS}/x.jsonl"}])).stages[0].data[0].path.endswith("/x.jsonl")


@pytest.mark.parametrize(
    ("part", "split"),
    [
        ("connector", (None, "connector")),
        ("image.encoder.last(2)", ("image", "encoder.last(2)")),
        ("language.lora", (None, "language.lora")),
        ("audio.connector", ("audio", "connector")),
    ],
)
def test_split_part(part: str, split: tuple[str | None, str]) -> None:
    assert split_part(part) == split


@pytest.mark.parametrize(
    "part", ["", "connectors", "encoder.last", "encoder.last()", "encoder.last(-1)", "image", "language.lora.x"]
)
def test_no_such_part(part: str) -> None:
    with pytest.raises(ValueError, match="there is no part"):
        split_part(part)


def test_a_recipe_is_frozen() -> None:
    read: Recipe = load(GOOD)
    with pytest.raises(ValueError, match="frozen"):
        read.seed = 5  # type: ignore[misc]
