"""A recipe goes on from what exists: `model: {from: …}`, `connector: {from: …}`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from errors import refused
from opticnerve import recipe as recipes
from opticnerve.common import drawing
from opticnerve.common.markdown import plain
from opticnerve.inference.generate import Answerer
from opticnerve.language.lora import is_lora
from opticnerve.models import OpticNerveForConditionalGeneration
from opticnerve.models.vlm.build import Dock, dock_recipe, merge
from opticnerve.plan import plan
from opticnerve.recipe import Recipe
from opticnerve.runs import folder as run_folder
from opticnerve.runs.pipeline import run_recipe
from opticnerve.train import checkpoint
from opticnerve.types import RecipeError, ask

pytestmark = [
    pytest.mark.usefixtures("private_cache"),
    # Where a hub cannot be asked, older versions of peft guess that the vocabulary is the base's.
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time"),
]
Make = Callable[..., Dock]
ALIGN = {"name": "align", "train": {"connector": 1e-2}, "batch_size": 4, "steps": 3, "schedule": "constant"}
INSTRUCT = {**ALIGN, "name": "instruct", "train": {"language.lora": 1e-2}, "lora": {"rank": 2}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save_captions(tmp_path_factory.mktemp("data")))


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves on cards take longer than the steps that they show."""
    monkeypatch.setattr(drawing, "_DPI", 30)


@pytest.fixture
def recipe_of(
    language_folder: Callable[..., str], vision_folder: Callable[..., str], data: str
) -> Callable[..., Recipe]:
    """`model` (a fresh one by default) and its stages → a recipe."""

    def make(model: dict[str, Any] | None = None, *stages: dict[str, Any], **more: Any) -> Recipe:
        fresh = {
            "language": {"name": language_folder()},
            "image": {"encoder": {"type": "hf_vision", "name": vision_folder()}},
        }
        raw = [{"data": [{"path": data}], **stage} for stage in stages or (ALIGN,)]
        plain = {"precision": "fp32", "forgetting": False, "model": model or fresh, "stages": raw}
        return recipes.load({**plain, **more})

    return make


def stir(model: torch.nn.Module, which: Callable[[str], bool] = lambda name: True) -> None:
    """As if it had been trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if which(name):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def logits(model: Any, processor: Any) -> torch.Tensor:
    given = Answerer(model, processor).inputs([ask("what colour is it?", tiny.picture(3)), ask("a word")])
    out: torch.Tensor = model(**given).logits
    return out


@pytest.fixture
def found(request: pytest.FixtureRequest, docked: Make, recipe_of: Any, tmp_path: Path) -> tuple[str, torch.Tensor]:
    """A model that exists, by its kind: its name, and its logits."""
    kind, folder = request.param, tmp_path / "found"
    if kind == "run":
        run_recipe(recipe_of(None, ALIGN, INSTRUCT), folder)
    else:
        made = docked()
        made.lora = {"rank": 2, "alpha": None, "dropout": 0.0, "targets": "all-linear", "when": "media"}
        if kind == "saved, with our adapter":
            made.model.give_lora(made.lora)
        stir(made.model)
        base = tmp_path / "base" if kind == "peft's adapter" else folder
        made.model.save_pretrained(base)
        made.processor.save_pretrained(base)
        if kind == "peft's adapter":
            return str(folder), with_adapter(base, folder, made.processor)
    model = OpticNerveForConditionalGeneration.from_pretrained(folder)
    return str(folder), logits(model, type(docked().processor).from_pretrained(folder))


def with_adapter(base: Path, out: Path, processor: Any, **options: Any) -> torch.Tensor:
    """An adapter as TRL and peft save one; the logits of its model with it merged in."""
    from peft import LoraConfig, get_peft_model

    model = OpticNerveForConditionalGeneration.from_pretrained(base)
    theirs: Any = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **options)
    )
    theirs.save_pretrained(out)
    return logits(theirs.merge_and_unload(safe_merge=True), processor)


KINDS = ["run", "saved", "saved, with our adapter", "peft's adapter"]


class TestModels:
    @pytest.mark.parametrize("found", KINDS, indirect=True)
    def test_begins_as_it_was_and_goes_on(
        self, found: tuple[str, torch.Tensor], recipe_of: Any, tmp_path: Path
    ) -> None:
        name, before = found
        made = dock_recipe(recipe_of({"from": name}))
        assert torch.equal(logits(made.model, made.processor), before)
        weights = {n: t.clone() for n, t in made.model.state_dict().items()}

        run = tmp_path / "run"
        results = run_recipe(recipe_of({"from": name}), run)
        again = OpticNerveForConditionalGeneration.from_pretrained(run)
        moved = [n for n, t in again.state_dict().items() if not torch.equal(t, weights[n])]
        assert moved
        assert all(n.startswith("image.connector.layers") for n in moved)  # calibrated no more, either
        origin = {"model": {"name": name, "sha256": recipes.load(run / "recipe.yaml").model.sha256}}
        assert results["model"]["from"] == json.loads((run / "dock.json").read_text())["from"] == origin
        assert f"The model goes on from {plain(name)}" in (run / "card.md").read_text()

    @pytest.mark.parametrize("found", ["run", "saved"], indirect=True)
    def test_resumed_is_uninterrupted(
        self, found: tuple[str, torch.Tensor], recipe_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recipe = recipe_of({"from": found[0]}, {**INSTRUCT, "lora": None, "save_every": 1}, ALIGN)
        run_recipe(recipe, tmp_path / "whole")
        saved = checkpoint.save

        def stop(folder: Path, step: int, *args: Any, **options: Any) -> Path:
            saved(folder, step, *args, **options)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(checkpoint, "save", stop)
            run_recipe(recipe, tmp_path / "run")
        run_recipe(recipe, tmp_path / "run", resume=True)
        whole, resumed = (load_file(tmp_path / r / "trained.safetensors") for r in ("whole", "run"))
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(t, resumed[n]) for n, t in whole.items())

    @pytest.mark.parametrize("found", ["saved"], indirect=True)
    def test_another_source_is_refused(self, found: tuple[str, torch.Tensor], recipe_of: Any, tmp_path: Path) -> None:
        recipe = recipe_of({"from": found[0]})
        run_recipe(recipe, tmp_path / "run")
        file = Path(found[0]) / "model.safetensors"
        tensors = load_file(file)
        save_file({n: t + 1 for n, t in tensors.items()}, file, metadata={"format": "pt"})
        with refused("mismatch", found[0], "SHA-256"):
            run_recipe(recipe, tmp_path / "run", resume=True)
        with refused("mismatch", found[0], "SHA-256"):
            OpticNerveForConditionalGeneration.from_pretrained(tmp_path / "run")

    @pytest.mark.parametrize("found", ["run"], indirect=True)
    def test_a_run_of_a_run_needs_it_no_more(
        self, found: tuple[str, torch.Tensor], recipe_of: Any, tmp_path: Path
    ) -> None:
        """Its bases are the first run's, and what that trained goes along."""
        run_recipe(recipe_of({"from": found[0]}), tmp_path / "run")
        Path(found[0]).rename(tmp_path / "elsewhere")
        again = OpticNerveForConditionalGeneration.from_pretrained(tmp_path / "run")
        first = OpticNerveForConditionalGeneration.from_pretrained(tmp_path / "elsewhere")
        adapter = {n: t for n, t in first.state_dict().items() if is_lora(n)}
        assert adapter
        assert all(torch.equal(again.state_dict()[n], t) for n, t in adapter.items())
        merge(tmp_path / "run", tmp_path / "merged")
        dock_recipe(recipe_of({"from": str(tmp_path / "merged")}))

    @pytest.mark.parametrize("found", ["run", "peft's adapter"], indirect=True)
    def test_foreseen(self, found: tuple[str, torch.Tensor], recipe_of: Any) -> None:
        recipe = recipe_of({"from": found[0]}, ALIGN, INSTRUCT)
        made = plan.make(recipe)
        assert [s.trained for s in made.stages] == [
            sum(p.numel() for p in dock.model.part_parameters(part).values())
            for dock in [dock_recipe(recipe)]
            for part in ("connector", "language.lora")
            if part == "connector" or dock.lora or dock.model.give_lora({"rank": 2}) is None
        ]
        said = [r.text for r in made.remarks]
        assert f"the model goes on from {found[0]}" in said
        assert not any("random weights" in text for text in said)
        assert plan.weights_at_hand(recipe)
        assert plan.context_length(recipe) == made.context

    def test_what_no_recipe_can_say(self, recipe_of: Any) -> None:
        with refused("recipe", "runs/a", "language", "Qwen/x", error=RecipeError):
            recipe_of({"from": "runs/a", "language": {"name": "Qwen/x"}})
        with refused("recipe", "encoder", error=RecipeError):
            recipe_of({"from": "runs/a", "encoder": {}})
        with refused("recipe", "conector", "connector", error=RecipeError):
            recipe_of({"from": "runs/a"}, {**ALIGN, "train": {"conector": 1e-3}})

    def test_what_is_no_dock(self, recipe_of: Any, language_folder: Any, docked: Make, tmp_path: Path) -> None:
        def build(name: object, *stages: dict[str, Any]) -> None:
            dock_recipe(recipe_of({"from": str(name)}, *stages))

        with refused("unsupported", language_folder(), "llama"):
            build(language_folder())
        made = docked()
        made.model.save_pretrained(tmp_path / "bare")
        with refused("missing-file", "processor", tmp_path / "bare"):
            build(tmp_path / "bare")
        made.processor.save_pretrained(tmp_path / "bare")
        with refused("unknown-name", "audio", "image"):
            build(tmp_path / "bare", {**ALIGN, "train": {"audio.connector": 1e-3}})
        with refused("conflict", "'rank': 2", "'rank': 4"):
            run_recipe(recipe_of({"from": str(tmp_path / "bare")}, INSTRUCT), tmp_path / "run")
            run_recipe(recipe_of({"from": str(tmp_path / "run")}, {**INSTRUCT, "lora": {"rank": 4}}), tmp_path / "more")

    def test_an_adapter_that_stands_on_nothing(self, docked: Make, recipe_of: Any, tmp_path: Path) -> None:
        made = docked()
        made.model.save_pretrained(tmp_path / "base")
        made.processor.save_pretrained(tmp_path / "base")
        with_adapter(tmp_path / "base", tmp_path / "adapter", made.processor)
        (tmp_path / "base").rename(tmp_path / "gone")
        with refused("name", tmp_path / "adapter", tmp_path / "base"):
            dock_recipe(recipe_of({"from": str(tmp_path / "adapter")}))
        file = tmp_path / "adapter" / "adapter_config.json"
        for base, kind in ((None, "missing-field"), ("[", "damaged")):
            file.write_text(json.dumps({"base_model_name_or_path": base}) if base is None else base)
            with refused(kind, "adapter_config.json"):
                dock_recipe(recipe_of({"from": str(tmp_path / "adapter")}))


class TestConnectors:
    @pytest.fixture
    def run(self, recipe_of: Any, tmp_path: Path) -> Path:
        run_recipe(recipe_of(), tmp_path / "first")
        return tmp_path / "first"

    @pytest.fixture
    def with_connector(self, recipe_of: Any, language_folder: Any, vision_folder: Any) -> Callable[..., Recipe]:
        def make(connector: dict[str, Any], *stages: dict[str, Any], family: str = "llama") -> Recipe:
            encoder = {"type": "hf_vision", "name": vision_folder()}
            model = {
                "language": {"name": language_folder(family)},
                "image": {"encoder": encoder, "connector": connector},
            }
            made: Recipe = recipe_of(model, *stages)
            return made

        return make

    def test_a_stage_one_connector(self, run: Path, with_connector: Any, tmp_path: Path) -> None:
        trained = {n: t for n, t in load_file(run / "trained.safetensors").items() if ".connector." in n}
        recipe = with_connector({"from": str(run)}, INSTRUCT)
        run_recipe(recipe, tmp_path / "second")
        held = load_file(tmp_path / "second" / "trained.safetensors")
        assert all(torch.equal(held[n], t) for n, t in trained.items())
        reference = json.loads((tmp_path / "second" / "dock.json").read_text())
        assert reference["from"]["image.connector"]["name"] == str(run)
        assert f"The image.connector goes on from {plain(run)}" in (tmp_path / "second" / "card.md").read_text()
        assert plan.make(recipe).shapes[2].kind == "mlp"
        run_recipe(recipe, tmp_path / "second", resume=True)
        (run / "dock.json").write_text((run / "dock.json").read_text() + " ")
        with refused("mismatch", run, "SHA-256"):
            run_recipe(recipe, tmp_path / "second", resume=True)

    def test_what_does_not_fit(self, run: Path, with_connector: Any, vision_folder: Any, tmp_path: Path) -> None:
        with refused("conflict", "'linear' here", "'mlp' there"):
            dock_recipe(with_connector({"from": str(run), "type": "linear"}))
        with refused("conflict", "depth", "3 here", "2 there"):
            dock_recipe(with_connector({"from": str(run), "depth": 3}))
        tensors = load_file(run / "trained.safetensors")
        tensors["image.connector.layers.0.weight"] = torch.zeros(32, 20)
        save_file(tensors, run / "trained.safetensors")
        with refused("wrong-shape", "(32, 20) there", "(32, 24) here", "layers.0.weight"):
            dock_recipe(with_connector({"from": str(run)}))
        with refused("recipe", "connector", error=RecipeError):
            with_connector({"from": 3})

    @pytest.mark.parametrize("suffix", ["bin", "safetensors"])
    @pytest.mark.parametrize("layers", [[0, 2], [None]])
    def test_llavas_projector(self, with_connector: Any, tmp_path: Path, layers: list[Any], suffix: str) -> None:
        file = tmp_path / f"mm_projector.{suffix}"
        tensors: dict[str, torch.Tensor] = {}
        for number in layers:
            name = "model.mm_projector." + ("" if number is None else f"{number}.")
            tensors |= {
                f"{name}weight": torch.randn(32, 32 if number else 24).half(),
                f"{name}bias": torch.randn(32).half(),
            }
        save_file(tensors, file) if suffix == "safetensors" else torch.save(tensors, file)
        made = dock_recipe(with_connector({"from": str(file)}))
        held = [t for n, t in made.model.image.connector.state_dict().items() if n.startswith(("layers", "linear"))]
        assert all(torch.equal(a, b.float()) for a, b in zip(held, tensors.values(), strict=True))
        assert not made.model.image.connector.calibrate_allowed

    def test_what_is_no_projector(self, with_connector: Any, tmp_path: Path) -> None:
        for name, value, kind in (("a.bin", {"x": torch.zeros(1)}, "unsupported"), ("b.bin", Path("x"), "damaged")):
            torch.save(value, tmp_path / name)
            with refused(kind, name):
                dock_recipe(with_connector({"from": str(tmp_path / name)}))
        named: list[dict[Any, torch.Tensor]] = [
            {"mm_projector.bias": torch.zeros(3)}, {"mm_projector.0.bias": torch.zeros(3)},
            {"mm_projector.weight": torch.zeros(3)}, {0: torch.zeros(3)},
        ]  # fmt: skip
        for value in named:
            torch.save(value, tmp_path / "c.bin")
            with refused("unsupported", "c.bin"):
                dock_recipe(with_connector({"from": str(tmp_path / "c.bin")}))
        (tmp_path / "d.bin").write_text("hello world")
        with refused("damaged", "d.bin"):
            dock_recipe(with_connector({"from": str(tmp_path / "d.bin")}))


def test_a_kept_recipe_pins_what_it_goes_on_from(docked: Make, recipe_of: Any, tmp_path: Path) -> None:
    made = docked()
    for name in ("one", "two"):
        made.model.save_pretrained(tmp_path / name)
        made.processor.save_pretrained(tmp_path / name)
    recipe = recipe_of({"from": str(tmp_path / "one")})
    kept = run_folder.keep_recipe(recipe, tmp_path, False)
    assert kept.model.sha256
    assert run_folder.keep_recipe(recipe, tmp_path, True) == kept == recipes.load(tmp_path / "recipe.yaml")
    with refused("mismatch", "model.from", "one", "two"):
        run_folder.keep_recipe(recipe_of({"from": str(tmp_path / "two")}), tmp_path, True)
