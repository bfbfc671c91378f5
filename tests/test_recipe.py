"""A recipe is checked before any weight is read; each refusal names the key and the remedy."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

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
    "a typo": (stage(steps_=5), r"stages\.0\.steps_: unknown key; did you mean 'steps'\?"),
    "a typo at the top": ({**GOOD, "sed": 1}, r"sed: unknown key; did you mean 'seed'\?"),
    "a typo in data": (stage(data=[{"path": "x", "formt": "chat"}]), r"stages\.0\.data\.0\.formt: unknown key; did you mean 'format'"),
    "an unknown key like none": (stage(zzzz=1), r"stages\.0\.zzzz: unknown key; known here: name, objective"),
    "no model": ({"stages": []}, r"model: is missing"),
    "no data key": ({**GOOD, "stages": [{"name": "a", "train": {"connector": 1}}]}, r"stages\.0\.data: is missing"),
    "no data": (stage(data=[]), r"stages\.0\.data: no data; add at least one entry"),
    "nothing to train": (stage(train={}), r"stages\.0\.train: a stage with nothing to train; name at least one part: connector"),
    "an unknown part": (stage(train={"conector": 1e-3}), r"no part 'conector'; did you mean 'connector'"),
    "an unknown language part": (stage(train={"language.loar": 1e-3}), r"no part 'language\.loar'; did you mean 'language\.lora'"),
    "an audio encoder that is not there": (stage(train={"audio.connector": 1e-3}), r"stages\.0\.train\.audio\.connector: the model has no audio tower; it has image"),
    "a modality before language": (stage(train={"image.language": 1e-3}), r"no part 'image\.language'"),
    "lora and all": (stage(train={"language": 1e-5, "language.lora": 1e-4}), r"language and language\.lora both change the same weights; keep one"),
    "lora and the last": (stage(train={"language.last(2)": 1e-5, "language.lora": 1e-4}), r"both change the same weights; keep one"),
    "all and a part of it": (stage(train={"language": 1e-5, "language.embeddings": 1e-4}), r"language already holds every part of it; remove"),
    "encoder and its last": (stage(train={"encoder": 1e-5, "encoder.last(2)": 1e-4}), r"encoder already holds its last blocks; remove"),
    "encoder and its last, one with its tower": (stage(train={"encoder": 1e-5, "image.encoder.last(2)": 1e-4}), r"encoder already holds"),
    "one part twice": (stage(train={"connector": 1e-5, "image.connector": 1e-4}), r"image\.connector is named twice"),
    "lora options without lora": (stage(lora={"rank": 4}), r"lora options are given, but train names no language\.lora"),
    "steps and epochs": (stage(steps=5, epochs=1), r"give steps or epochs, not both"),
    "an uneven split": (stage(batch_size=8, accumulate=3), r"batch_size 8 cannot be split into 3 equal parts; change accumulate"),
    "draws without sharing": (stage(data=[{"path": "x", "per_image": 2}]), r"share_prefix"),
    "no steps": (stage(steps=0), r"stages\.0\.steps: .*greater than 0"),
    "a negative rate": (stage(train={"connector": -1.0}), r"stages\.0\.train\.connector"),
    "a rate that is none": (stage(train={"connector": "fast"}), r"stages\.0\.train\.connector: .*'fast'"),
    "an unknown schedule": (stage(schedule="cosin"), r"stages\.0\.schedule: .*'cosine'.*'cosin'"),
    "a stage name for no folder": (stage(name="../up"), r"stages\.0\.name"),
    "an unknown precision": ({**GOOD, "precision": "fp64"}, r"precision: "),
    "two stages of one name": ({**GOOD, "stages": [GOOD["stages"][0]] * 2}, r"two stages have the same name"),
    "an unknown encoder": (
        {**GOOD, "model": {**GOOD["model"], "image": {"encoder": {"type": "hf_visoin", "name": "x"}}}},
        r"model\.image: unknown encoder 'hf_visoin'; did you mean 'hf_vision'\? Known: dual_encoder, hf_vision, pair, patches, timm, whisper",
    ),
    "an unknown connector": (
        {**GOOD, "model": {**GOOD["model"], "image": {**GOOD["model"]["image"], "connector": {"type": "mpl"}}}},
        r"unknown connector 'mpl'; did you mean 'mlp'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    raw, message = REFUSED[case]
    with pytest.raises(RecipeError, match=message) as e:
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
        ("override", "message"),
        [
            ("stages.0.step=5", r"stages\.0\.step: unknown key; did you mean 'steps'"),
            ("steps", "is not key=value, such as stages.0.steps=50"),
            ("=5", "is not key=value"),
            ("stages.7.steps=5", r"stages\.7 is a list of 2|stages.* a list of 2; use a number from 0 to 1"),
            ("stages.first.steps=5", "use a number from 0 to 1"),
            ("seed.deep=5", "holds a single value|seed"),
            ("stages.0.data=[1", "stages.0.data"),
        ],
    )
    def test_refusals(self, override: str, message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            load(GOOD, [override])

    def test_the_mapping_is_not_changed(self) -> None:
        before = copy.deepcopy(GOOD)
        load(GOOD, ["stages.0.steps=5", "model.image.connector.depth=2"])
        assert before == GOOD


class TestFiles:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="there is no recipe"):
            load(tmp_path / "none.yaml")

    @pytest.mark.parametrize("content", [b"model: [", b"\xff\xfe\x00", b"- a\n- b", b"", b"just words"])
    def test_unreadable(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "bad.yaml"
        path.write_bytes(content)
        with pytest.raises(RecipeError, match=r"bad\.yaml"):
            load(path)

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="not readable"):
            load(tmp_path)

    def test_variables(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MY_PHOTOS", raising=False)
        with pytest.raises(RecipeError, match="set the environment variable MY_PHOTOS"):
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
