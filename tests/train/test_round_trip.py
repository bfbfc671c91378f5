"""There and back: what our stages saved is trained on by TRL, and what TRL or peft saved goes on in our stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import tiny
from opticnerve import recipe as recipes
from opticnerve.common import drawing
from opticnerve.inference.generate import Answerer
from opticnerve.language.lora import has_lora
from opticnerve.models import OpticNerveForConditionalGeneration, OpticNerveProcessor
from opticnerve.models.vlm.build import dock_recipe
from opticnerve.recipe import Recipe
from opticnerve.runs.pipeline import run_recipe
from opticnerve.types import ask

trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets")
# TRL and transformers tell each other of names that will go; a user of either cannot change that.
pytestmark = [pytest.mark.usefixtures("private_cache"), pytest.mark.slow, pytest.mark.filterwarnings("default")]
LORA = {"train": {"connector": 1e-2, "language.lora": 1e-2}, "lora": {"rank": 2}, "steps": 2}


def again(recipe: Recipe, name: Path, **stage: Any) -> Recipe:
    """The recipe's stage, on what is in a folder."""
    raw = recipe.model_dump(mode="json", exclude_none=True) | {"model": {"from": str(name)}, "forgetting": False}
    raw["stages"][0] |= stage
    return recipes.load(raw)


@torch.no_grad()
def logits(model: Any, processor: Any) -> torch.Tensor:
    out: torch.Tensor = model(**Answerer(model, processor).inputs([ask("what is it?", tiny.picture(3))])).logits
    return out


def sft(run: Path, out: Path, adapter: LoraConfig | None) -> Any:
    """Two steps of TRL's, saved as its users save."""
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    made = trl.SFTTrainer(
        OpticNerveForConditionalGeneration.from_pretrained(run),
        args=trl.SFTConfig(
            output_dir=str(out), per_device_train_batch_size=2, max_steps=2, learning_rate=1e-2, report_to="none",
            use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no", max_length=None,
        ),
        train_dataset=datasets.Dataset.from_list([{"images": [tiny.picture(i)], "messages": [asked, said]} for i in range(4)]),
        processing_class=OpticNerveProcessor.from_pretrained(run), peft_config=adapter,
    )  # fmt: skip
    made.train()
    made.save_model(str(out))
    return made.model.eval()


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "peft"])
def test_a_run_with_its_adapter_through_trl_and_back(
    make_recipe: Callable[..., Recipe], adapter: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "_DPI", 30)
    recipe = make_recipe(**LORA)
    run_recipe(recipe.model_copy(update={"forgetting": False}), tmp_path / "run")
    config = LoraConfig(r=2, target_modules="all-linear", exclude_modules=r".*(image|lm_head).*") if adapter else None
    theirs = sft(tmp_path / "run", tmp_path / "saved", config)
    processor = OpticNerveProcessor.from_pretrained(tmp_path / "run")
    if adapter:
        theirs = theirs.base_model.merge_and_unload(safe_merge=True, adapter_names=["default"])
    ours = dock_recipe(goes_on := again(recipe, tmp_path / "saved"))
    assert has_lora(ours.model.language_model)  # the run's own
    assert torch.equal(logits(ours.model, ours.processor), logits(theirs, processor))
    assert not torch.equal(
        logits(ours.model, processor),
        logits(OpticNerveForConditionalGeneration.from_pretrained(tmp_path / "run"), processor),
    )

    run_recipe(goes_on, tmp_path / "on")
    model = OpticNerveForConditionalGeneration.from_pretrained(tmp_path / "on")
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, ours.model.state_dict()[n])}
    assert moved
    assert all(n.startswith("image.connector.layers") or ".lora_" in n for n in moved)
