"""A stage of training: invariants 2 (frozen stays) and 5 (resumed = unbroken), the loss goes down, bad input is told."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from errors import refused
from opticnerve.data.dataset.load import load_data
from opticnerve.inference.generate import Answerer
from opticnerve.language.lora import is_lora
from opticnerve.models import OpticNerveForConditionalGeneration
from opticnerve.models.vlm.build import Dock, dock_recipe
from opticnerve.ops import enabled
from opticnerve.recipe import PartSpec, Recipe
from opticnerve.train import checkpoint
from opticnerve.train import setup as prepare
from opticnerve.types import DataError, ask

pytestmark = pytest.mark.usefixtures("private_cache")
Train = Callable[..., Any]
Make = Callable[..., Recipe]


def stage_folder(tmp_path: Path, run: str = "run") -> Path:
    return tmp_path / run / "stages" / "0-align"


def lines(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock says."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = {"elapsed_s", "waited_s", "tokens_per_second", "samples_per_second", "waiting", "peak_memory_bytes", "mfu"}
    return [{k: v for k, v in line.items() if k not in clock} for line in read]


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [n for n in one if not torch.equal(one[n], other[n])]


class TestFrozenStays:
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    @pytest.mark.parametrize("vision_encoder", ["clip_vision_model", "test_efficientnet"])
    def test_connector_alone(self, make_recipe: Make, train: Train, vision_encoder: str, precision: str) -> None:
        """Every other tensor is bit-equal, a CNN's batch-norm statistics too; text alone gives bit-identical logits."""
        recipe = make_recipe(vision_encoder=vision_encoder, precision=precision)
        made = dock_recipe(recipe)
        words = made.processor(text="what colour is the circle?", return_tensors="pt")
        with torch.no_grad():
            before, logits = snapshot(made.model), made.model(**words).logits
        train(recipe, dock=made)
        changed = same(before, made.model.state_dict())
        assert {n for n in changed if "input_" not in n and "output_scale" not in n and "calibrated" not in n} == set(
            made.model.part_parameters("connector")
        )
        assert all(".connector." in n for n in changed)
        with torch.no_grad():
            assert torch.equal(made.model(**words).logits, logits)

    @pytest.mark.parametrize(
        "parts",
        [{"encoder.last(1)": 1e-3}, {"language.last(1)": 1e-3}, {"language.embeddings": 1e-3}, {"language": 1e-3}],
    )
    def test_any_part_alone(self, make_recipe: Make, train: Train, parts: dict[str, float]) -> None:
        recipe = make_recipe(train=parts, language_part="llama tied")
        made = dock_recipe(recipe)
        before = snapshot(made.model)
        train(recipe, dock=made)
        (part,) = parts
        opened = set(made.model.part_parameters(part))
        # The calibration is measured whatever trains; tied weights stand in the state under both names.
        changed = {n for n in same(before, made.model.state_dict()) if ".connector." not in n and "lm_head" not in n}
        assert changed <= opened
        assert len(changed) > 0.7 * len(opened)

    def test_lora_leaves_its_base(self, make_recipe: Make, train: Train) -> None:
        recipe = make_recipe(train={"connector": 1e-2, "language.lora": 1e-2}, lora={"rank": 2, "dropout": 0.1})
        made = dock_recipe(recipe)
        before = snapshot(made.model.language_model)
        train(recipe, dock=made)
        after = {
            n.replace(".base_layer", ""): t for n, t in made.model.language_model.state_dict().items() if not is_lora(n)
        }
        assert not same(before, after)
        assert all(float(t.abs().max()) > 0 for n, t in made.model.state_dict().items() if "lora_B" in n)

    def test_a_trained_cnns_statistics_move(self, make_recipe: Make, train: Train, tmp_path: Path) -> None:
        recipe = make_recipe(vision_encoder="test_efficientnet", train={"connector": 1e-2, "encoder": 1e-4})
        made = dock_recipe(recipe)
        before = snapshot(made.model)
        train(recipe, dock=made)
        assert any("running_mean" in n for n in same(before, made.model.state_dict()))
        again = OpticNerveForConditionalGeneration.from_pretrained(stage_folder(tmp_path))
        assert not same(made.model.state_dict(), again.state_dict())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_goes_down(make_recipe: Make, train: Train, tmp_path: Path, precision: str) -> None:
    recipe = make_recipe(precision=precision, steps=40, train={"connector": 1e-2, "language": 3e-3}, batch_size=6)
    _, result = train(recipe)
    losses = [line["loss"] for line in lines(stage_folder(tmp_path))]
    assert result.final_loss == losses[-1] < 0.3 * losses[0]
    assert result.steps == len(losses) == 40
    assert result.samples == 240


def test_the_connector_alone_learns_to_tell_pictures_apart(make_recipe: Make, train: Train, tmp_path: Path) -> None:
    recipe = make_recipe(steps=60, train={"connector": 3e-2}, batch_size=6, template="caption")
    train(recipe)
    losses = [line["loss"] for line in lines(stage_folder(tmp_path))]
    assert losses[-1] < 0.75 * losses[0]


def test_what_a_stage_leaves(make_recipe: Make, train: Train, tmp_path: Path) -> None:
    recipe = make_recipe(accumulate=2)
    made, _ = train(recipe)
    folder = stage_folder(tmp_path)
    (first, *_) = lines(folder)
    assert {"step", "loss", "tokens", "supervised_tokens", "samples", "grad_norm", "learning_rate"} <= first.keys()
    assert first["step"] == 1
    assert first["learning_rate"].keys() == {"image.connector"}
    table = json.loads((folder / "freeze.json").read_text())
    assert (
        sum(r["parameters"] for r in table["rows"]) == table["total"] == sum(p.numel() for p in made.model.parameters())
    )
    again = OpticNerveForConditionalGeneration.from_pretrained(folder)
    assert not same(made.model.state_dict(), again.state_dict())
    conversation = load_data(recipe.stages[0].data[0])[0]
    assert Answerer(again, made.processor).answer([conversation], max_new_tokens=4)


def test_accumulated_steps_draw_the_same_curve(make_recipe: Make, train: Train, tmp_path: Path) -> None:
    for accumulate in (1, 2, 4):
        train(make_recipe(accumulate=accumulate, steps=5), f"by{accumulate}")
    curves = [
        [(x["loss"], x["grad_norm"], x["tokens"]) for x in lines(stage_folder(tmp_path, f"by{a}"))] for a in (1, 2, 4)
    ]
    for curve in curves[1:]:
        assert list(curve) == [pytest.approx(c, rel=2e-5) for c in curves[0]]


RESUMED: dict[str, dict[str, Any]] = {
    "connector": {},
    "lora with dropout, accumulated": {
        "train": {"connector": 1e-2, "language.lora": 1e-2}, "lora": {"rank": 2, "dropout": 0.3}, "accumulate": 2,
    },
    "bf16": {"precision": "bf16", "train": {"connector": 1e-2, "language.lora": 1e-2}},
    "a cnn with its batch norms": {"vision_encoder": "test_efficientnet", "train": {"connector": 1e-2, "encoder": 1e-3}},
    "several epochs": {"batch_size": 2, "steps": 8},
}  # fmt: skip


class TestResume:
    """Stopped by a signal after any step, and resumed in a fresh process, a run draws the unbroken run's curve."""

    @pytest.mark.parametrize("stop_at", [1, 3])
    @pytest.mark.parametrize("kind", RESUMED)
    def test_bit_for_bit(self, make_recipe: Make, train: Train, tmp_path: Path, kind: str, stop_at: int) -> None:
        recipe = make_recipe(**{"steps": 5, **RESUMED[kind]})
        whole, result = train(recipe, "whole")
        _, nothing = train(recipe, "broken", stop_at=stop_at)
        assert nothing is None
        assert len(lines(stage_folder(tmp_path, "broken"))) == stop_at
        torch.manual_seed(99)  # a fresh process has another generator
        again, resumed = train(recipe, "broken", resume=True)
        assert lines(stage_folder(tmp_path, "broken")) == lines(stage_folder(tmp_path, "whole"))
        assert not same(whole.model.state_dict(), again.model.state_dict())
        assert {k: v for k, v in result.to_dict().items() if k != "seconds"} == {
            k: v for k, v in resumed.to_dict().items() if k != "seconds"
        }

    def test_stopped_twice(self, make_recipe: Make, train: Train, tmp_path: Path) -> None:
        recipe = make_recipe(steps=6)
        whole, _ = train(recipe, "whole")
        train(recipe, "broken", stop_at=2)
        train(recipe, "broken", resume=True, stop_at=4)
        again, _ = train(recipe, "broken", resume=True)
        assert lines(stage_folder(tmp_path, "broken")) == lines(stage_folder(tmp_path, "whole"))
        assert not same(whole.model.state_dict(), again.model.state_dict())

    def test_a_torn_checkpoint_is_passed_over(
        self, make_recipe: Make, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The one before it serves; where none is whole, nothing begins anew in silence."""
        recipe = make_recipe(steps=5, save_every=1)
        whole, _ = train(recipe, "whole")
        train(recipe, "broken", stop_at=3)
        folder = stage_folder(tmp_path, "broken")
        _, last = checkpoint.checkpoints(folder)
        os.truncate(last / checkpoint.STATE, 50)
        again, _ = train(recipe, "broken", resume=True)
        assert capsys.readouterr().out.count("passing over the checkpoint") == 1
        assert lines(folder) == lines(stage_folder(tmp_path, "whole"))
        assert not same(whole.model.state_dict(), again.model.state_dict())
        for path in checkpoint.checkpoints(folder):
            os.truncate(path / checkpoint.STATE, 50)
        with refused("damaged", "checkpoint-", "0-align"):
            train(recipe, "broken", resume=True)

    def test_nothing_to_resume_begins_anew(self, make_recipe: Make, train: Train, tmp_path: Path) -> None:
        recipe = make_recipe()
        train(recipe, "whole")
        train(recipe, "fresh", resume=True)
        assert lines(stage_folder(tmp_path, "fresh")) == lines(stage_folder(tmp_path, "whole"))

    def test_the_same_run_twice(self, make_recipe: Make, train: Train, tmp_path: Path) -> None:
        recipe = make_recipe(train={"connector": 1e-2, "language.lora": 1e-2}, lora={"rank": 2, "dropout": 0.3})
        for name in ("one", "two"):
            torch.manual_seed(len(name) + ord(name[0]))
            train(recipe, name)
        assert lines(stage_folder(tmp_path, "one")) == lines(stage_folder(tmp_path, "two"))
        train(make_recipe(**{**recipe.stages[0].model_dump(exclude_unset=True), "seed": 1}), "other")
        assert lines(stage_folder(tmp_path, "other")) != lines(stage_folder(tmp_path, "one"))


class TestBadInput:
    @pytest.fixture
    def spoiled(self, tmp_path: Path) -> Path:
        """Six captions, one of whose pictures is torn and another's words are missing."""
        path = tiny.save_captions(tmp_path / "spoiled")
        (path.parent / "2.png").write_bytes((path.parent / "2.png").read_bytes()[:200])
        return path

    def test_refused_before_the_first_step(
        self, make_recipe: Make, train: Train, spoiled: Path, tmp_path: Path
    ) -> None:
        with refused("unreadable-image", "captions.jsonl:3", "2.png", error=DataError):
            train(make_recipe(data=[{"path": str(spoiled)}]))
        assert not (stage_folder(tmp_path) / "metrics.jsonl").exists()

    def test_skipped(self, make_recipe: Make, train: Train, spoiled: Path) -> None:
        _, result = train(
            make_recipe(data=[{"path": str(spoiled)}], bad_samples="skip", epochs=1, steps=None, batch_size=5)
        )
        assert len(result.skipped) == 1
        assert "2.png" in result.skipped[0]
        assert result.samples == 5

    def test_a_line_that_cannot_be_read_is_skipped_too(self, make_recipe: Make, train: Train, tmp_path: Path) -> None:
        """Also the very first bad sample that is met: a counter that has counted nothing is still asked."""
        path = tiny.save_captions(tmp_path / "torn")
        path.write_text("{oops\n" + path.read_text())
        _, result = train(make_recipe(data=[{"path": str(path)}], bad_samples="skip", steps=1))
        assert len(result.skipped) == 1
        assert "captions.jsonl:1" in result.skipped[0]

    def test_a_picture_that_goes_missing_keeps_finished_work(
        self, make_recipe: Make, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tiny.save_captions(tmp_path / "mine")
        recipe = make_recipe(data=[{"path": str(path)}], steps=4)
        from opticnerve.common.progress import Progress

        def lose(self: Progress, line: dict[str, Any]) -> None:
            if line["step"] == 2:
                for picture in path.parent.glob("*.png"):
                    picture.unlink()

        with monkeypatch.context() as patch:
            patch.setattr(Progress, "update", lose)
            with refused("missing-image", "captions.jsonl:", ".png", error=DataError):
                train(recipe)
        assert [p.name for p in checkpoint.checkpoints(stage_folder(tmp_path))] == ["checkpoint-00000002"]
        whole, _ = train(make_recipe(steps=4), "whole")
        tiny.save_captions(tmp_path / "mine")
        again, _ = train(recipe, resume=True)
        assert not same(whole.model.state_dict(), again.model.state_dict())


def test_questions_about_one_picture_share_it(make_recipe: Make, train: Train, data: Path, tmp_path: Path) -> None:
    questions = {"path": str(data / "questions.jsonl"), "share_prefix": True, "per_image": 2}
    _, result = train(make_recipe(data=[questions], batch_size=2, steps=3))
    assert result.samples == 3 * 2 * 2
    _, apart = train(make_recipe(data=[{"path": str(data / "questions.jsonl")}], batch_size=4, steps=3), "apart")
    assert apart.samples == result.samples
    assert result.tokens < 0.7 * apart.tokens


def test_two_stages_add_up(make_recipe: Make, train: Train, tmp_path: Path, data: Path) -> None:
    """The second stage's delta holds what the first has trained, too."""
    from opticnerve.train.loop import run_stage

    first = make_recipe()
    second = make_recipe(train={"language.lora": 1e-2}, name="instruct", lora={"rank": 2})
    made: Dock = dock_recipe(first)
    trained: set[str] = set()
    for i, recipe in enumerate((first, second)):
        run_stage(made, recipe, recipe.stages[0], tmp_path / "stages" / f"{i}", trained_before=trained)
    again = OpticNerveForConditionalGeneration.from_pretrained(tmp_path / "stages" / "1")
    assert not same(made.model.state_dict(), again.state_dict())
    batch = Answerer(*made).inputs([ask("q", tiny.picture(3))])
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, made.model.eval()(**batch).logits)


def test_a_later_stage_may_not_reshape_the_adapter(make_recipe: Make, train: Train, tmp_path: Path) -> None:
    recipe = make_recipe(train={"language.lora": 1e-2}, lora={"rank": 2})
    made, _ = train(recipe, "one")
    with refused("conflict", "lora", "'rank': 3"):
        train(make_recipe(train={"language.lora": 1e-2}, lora={"rank": 3}), "two", dock=made)


class TestGradientCheckpointing:
    """Activations are computed again, also in a frozen language model, and nothing else changes."""

    @pytest.mark.skipif(not enabled(), reason="OPTICNERVE_PLAIN switches off what counts")
    def test_same_run_but_layers_run_twice(
        self, make_recipe: Make, train: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from opticnerve.ops import fused_layers
        from opticnerve.train import loop

        monkeypatch.setattr(loop, "image_use", lambda *_: None)  # it reads some samples again
        calls = {"now": 0}
        forward = fused_layers._mlp_forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls["now"] += 1
            return forward(*args, **kwargs)

        monkeypatch.setattr(fused_layers, "_mlp_forward", counted)
        plain, _ = train(make_recipe(), "plain")
        once, calls["now"] = calls["now"], 0
        again, _ = train(make_recipe(gradient_checkpointing=True), "again")
        assert calls["now"] == 2 * once > 0
        assert same(plain.model.state_dict(), again.model.state_dict()) == []
        assert not any(m.training for m in again.model.modules())


def test_compiled_layers_learn_the_same(
    make_recipe: Callable[..., Recipe], train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the way through torch.compile, each layer as one graph; which code it makes is its own business."""
    torch._dynamo.reset()  # type: ignore[no-untyped-call]
    breaks = torch._dynamo.utils.counters["graph_break"]
    breaks.clear()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(prepare, "BACKEND", backend)
    recipe = make_recipe(train={"connector": 1e-3, "language.lora": 1e-3}, pack=200)
    plain, _ = train(recipe, "plain")
    stage = recipe.stages[0].model_copy(update={"compile": True})
    compiled, _ = train(recipe.model_copy(update={"stages": [stage]}), "compiled")
    assert graphs
    assert not breaks
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(compiled.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    assert not any(getattr(m, "_compiled_call_impl", None) for m in compiled.model.modules())


@pytest.mark.parametrize("fusion", ["splice", "cross_attention"])
def test_packed_steps_are_padded_steps(
    fusion: str, make_recipe: Callable[..., Recipe], train: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    """The same samples, the same loss and gradients, less padding."""

    def run(name: str, **stage: Any) -> list[dict[str, Any]]:
        recipe = make_recipe(batch_size=6, data=[{"path": str(data / "questions.jsonl")}], **stage)
        assert recipe.docked.image is not None
        tower = recipe.docked.image.model_copy(update={"fusion": PartSpec(type=fusion)})
        train(recipe.model_copy(update={"model": recipe.docked.model_copy(update={"image": tower})}), name)
        lines = (tmp_path / name / "stages" / "0-align" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    padded, packed = run("padded"), run("packed", pack=200)
    for a, b in zip(padded, packed, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert (b["samples"], b["tokens"], b["supervised_tokens"]) == (
            a["samples"],
            a["tokens"],
            a["supervised_tokens"],
        )
    assert sum(b["fill"] for b in packed) >= sum(a["fill"] for a in padded)
