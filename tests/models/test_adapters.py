"""Adapters of others beside ours: nothing that peft adds, switches or takes away touches the dock's own."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from errors import refused
from opticnerve.common import atomic
from opticnerve.inference.generate import Answerer
from opticnerve.language.adapters import ADAPTER, current_name, our_layers
from opticnerve.language.lora import add_lora, has_lora, is_lora, linear_layers, merge_lora
from opticnerve.models import OpticNerveForConditionalGeneration
from opticnerve.models.checkpoint import delta
from opticnerve.models.vlm.build import Dock
from opticnerve.train.state import TrainState
from opticnerve.types import ask

pytestmark = [
    pytest.mark.usefixtures("private_cache"),
    # Where a hub cannot be asked, older versions of peft guess that the vocabulary is the base's.
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
    # peft says so of each model that has an adapter already.
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft asks for it
]
Make = Callable[..., Dock]
RED = PIL.Image.new("RGB", (40, 40), "red")
THEIRS: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}


def own(docked: Make, **options: Any) -> Dock:
    """A dock whose adapter was trained."""
    made = docked("llama")
    made.lora = {"rank": 2, **options}
    made.model.give_lora(made.lora)
    stir(made.model, is_lora)
    return made


def stir(model: torch.nn.Module, which: Callable[[str], bool]) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if which(name):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def logits(model: Any, made: Dock, *pictures: Any) -> torch.Tensor:
    given = Answerer(made.model, made.processor).inputs([ask("what colour is it?", *pictures)])
    with torch.no_grad():
        out: torch.Tensor = model(**given).logits
    return out


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def with_theirs(made: Dock, **options: Any) -> Any:
    """A `PeftModel` on the dock, whose adapter does something."""
    return get_peft_model(made.model, LoraConfig(**{**THEIRS, **options}))


@pytest.mark.parametrize("when", ["always", "media"])
def test_a_second_adapter_changes_nothing_and_trains_alone(docked: Make, when: str) -> None:
    made = own(docked, when=when)
    before = [logits(made.model, made, *p) for p in ((), (RED,))]
    weights = {n: p.clone() for n, p in made.model.named_parameters() if is_lora(n)}
    theirs = with_theirs(made, init_lora_weights=True)
    for pictures, wanted in zip(((), (RED,)), before, strict=True):
        assert torch.equal(logits(theirs, made, *pictures), wanted)
    assert all(torch.equal(p, weights[n]) for n, p in made.model.named_parameters() if is_lora(n))
    trained = [n for n, p in theirs.named_parameters() if p.requires_grad]
    assert trained
    assert all(".default." in n for n in trained)


def test_switching_theirs_leaves_ours_on(docked: Make) -> None:
    made = own(docked, targets=["q_proj", "v_proj"])  # theirs: q_proj, too, and down_proj alone
    bare, alone = logits(docked("llama").model, made, RED), logits(made.model, made, RED)
    assert not torch.allclose(bare, alone, atol=1e-3)
    theirs = with_theirs(made)
    theirs.add_adapter("second", LoraConfig(**THEIRS))
    first = logits(theirs, made, RED)
    theirs.set_adapter("second")
    second = logits(theirs, made, RED)
    for one, other in ((first, second), (first, alone), (second, alone), (second, bare)):
        assert not torch.allclose(one, other, atol=1e-3)
    with theirs.disable_adapter():
        assert torch.equal(logits(theirs, made, RED), alone)
    assert torch.equal(logits(theirs, made, RED), second)
    theirs.set_adapter("default")
    assert torch.equal(logits(theirs, made, RED), first)
    theirs.merge_adapter()
    close(logits(theirs, made, RED), first)
    with theirs.disable_adapter():
        close(logits(theirs, made, RED), alone)
    theirs.delete_adapter("second")
    close(logits(theirs, made, RED), first)
    assert not any(p.requires_grad for n, p in made.model.named_parameters() if is_lora(n))


def test_a_gate_is_for_ours_alone(docked: Make) -> None:
    made, bare = own(docked, when="media"), docked("llama")
    theirs = with_theirs(made)
    text = logits(theirs, made)
    assert not torch.allclose(text, logits(bare.model, bare), atol=1e-3)
    for picture in ((), (RED,)):
        with theirs.disable_adapter():
            alone = logits(theirs, made, *picture)
        assert torch.equal(alone, logits(bare.model, bare)) == (picture == ())


def test_merged_together(docked: Make, tmp_path: Path) -> None:
    made = own(docked)
    theirs = with_theirs(made)
    wanted = logits(theirs, made, RED)
    merged = theirs.merge_and_unload()
    assert merged is made.model
    assert not has_lora(merged)
    close(logits(merged, made, RED), wanted)
    merged.save_pretrained(tmp_path)
    assert merged.config.lora is None
    again = OpticNerveForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits(again, made, RED), logits(merged, made, RED))


def test_a_gate_is_no_sum(docked: Make) -> None:
    made = own(docked, when="media")
    theirs = with_theirs(made)
    for merge in (theirs.merge_and_unload, theirs.merge_adapter):
        with refused("unsupported", "lora.when: media", "adapter_names"):
            merge()
    with refused("unsupported", "media"):
        merge_lora(made.model.language_model)
    with refused("conflict", "default", "merge_and_unload"):
        theirs.merge_adapter(["default"])
    wanted = [logits(theirs, made, *p) for p in ((), (RED,))]
    merged = theirs.merge_and_unload(adapter_names=["default"])
    assert merged.config.lora == made.lora
    assert not any("default" in n for n in merged.state_dict())
    for pictures, before in zip(((), (RED,)), wanted, strict=True):
        close(logits(merged, made, *pictures), before)


def test_unloaded(docked: Make) -> None:
    made = own(docked)
    names, alone = set(made.model.state_dict()), logits(made.model, made, RED)
    again = with_theirs(made).unload()
    assert set(again.state_dict()) == names
    assert torch.equal(logits(again, made, RED), alone)
    assert again.config.lora == made.lora


@pytest.mark.parametrize("when", ["always", "media"])
def test_saved_beside_each_other(docked: Make, tmp_path: Path, when: str) -> None:
    made = own(docked, when=when, targets=["q_proj"])
    theirs = with_theirs(made)
    wanted = [logits(theirs, made, *p) for p in ((), (RED,))]
    with theirs.disable_adapter():
        alone = logits(theirs, made, RED)
    theirs.save_pretrained(tmp_path / "theirs")
    held = load_file(tmp_path / "theirs/adapter_model.safetensors")
    assert {n.split(".")[-3] for n in held} == {"q_proj", "down_proj"}
    assert not any(ADAPTER in n or "base_layer" in n for n in held)
    made.model.save_pretrained(tmp_path / "dock")
    dock = OpticNerveForConditionalGeneration.from_pretrained(tmp_path / "dock")
    assert torch.equal(logits(dock, made, RED), alone)
    both = PeftModel.from_pretrained(dock, tmp_path / "theirs")
    for pictures, before in zip(((), (RED,)), wanted, strict=True):
        assert torch.equal(logits(both, made, *pictures), before)


def test_transformers_own_way(docked: Make, tmp_path: Path) -> None:
    """`add_adapter` and its like, without a `PeftModel`: `save_pretrained` saves the adapter alone."""
    made = own(docked)
    alone = logits(made.model, made, RED)
    try:
        made.model.add_adapter(LoraConfig(**THEIRS))
    except ValueError as e:
        if "version of PEFT" not in str(e):
            raise
        pytest.skip(str(e))
    wanted = logits(made.model, made, RED)
    assert not torch.allclose(wanted, alone, atol=1e-3)
    assert made.model.active_adapters() == ["default"]
    made.model.disable_adapters()
    assert torch.equal(logits(made.model, made, RED), alone)
    made.model.enable_adapters()
    assert torch.equal(logits(made.model, made, RED), wanted)
    made.model.save_pretrained(tmp_path)
    assert {n for n in load_file(tmp_path / "adapter_model.safetensors") if ADAPTER in n} == set()
    again = own(docked)
    again.model.load_adapter(str(tmp_path))
    assert torch.equal(logits(again.model, made, RED), wanted)


def test_merging_ours_leaves_theirs(docked: Make) -> None:
    made = own(docked)
    theirs = with_theirs(made, target_modules=["q_proj"])
    wanted = logits(theirs, made, RED)
    opened = {n: p.requires_grad for n, p in made.model.named_parameters() if ".default." in n}
    merge_lora(made.model.language_model)
    assert not has_lora(made.model)
    close(logits(theirs, made, RED), wanted)
    assert {n: p.requires_grad for n, p in made.model.named_parameters() if ".default." in n} == opened
    with theirs.disable_adapter():
        assert not torch.allclose(logits(theirs, made, RED), wanted, atol=1e-3)


def test_ours_comes_to_theirs(docked: Make) -> None:
    made = docked("llama")
    plain = linear_layers(made.model.language_model)
    theirs = with_theirs(made)
    assert linear_layers(made.model.language_model) == plain
    wanted = logits(theirs, made, RED)
    opened = {id(p): p.requires_grad for p in made.model.parameters()}
    add_lora(made.model.language_model, {"rank": 2})
    assert {p.requires_grad for n, p in made.model.named_parameters() if is_lora(n)} == {False}
    assert all(p.requires_grad == opened.get(id(p), False) for p in made.model.parameters())
    assert torch.equal(logits(theirs, made, RED), wanted)
    stir(made.model, is_lora)
    assert not torch.allclose(logits(theirs, made, RED), wanted, atol=1e-3)
    assert len(list(our_layers(made.model))) == len(plain)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(docked: Make, copied: Callable[[Any], Any]) -> None:
    made = own(docked, when="media")
    again = copied(made.model)
    assert torch.equal(logits(again, made, RED), logits(made.model, made, RED))
    theirs = get_peft_model(again, LoraConfig(**THEIRS))
    with theirs.disable_adapter():
        assert torch.equal(logits(theirs, made, RED), logits(made.model, made, RED))


def test_what_cannot_stand_beside_it(docked: Make) -> None:
    with refused("unsupported", "IA3"):
        get_peft_model(own(docked).model, IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with refused("exists-already", ADAPTER):
        get_peft_model(own(docked).model, LoraConfig(**THEIRS), adapter_name=ADAPTER)


class TestOldNames:
    """Ours was called `default` once; files that say so are read."""

    def rename(self, file: Path) -> None:
        tensors = {n.replace(f".{ADAPTER}.", ".default."): t for n, t in load_file(file).items()}
        assert any(".default." in n for n in tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    def test_one_function(self) -> None:
        name = "language_model.model.layers.0.q_proj.lora_A.{}.weight"
        assert current_name(name.format("default")) == current_name(name.format(ADAPTER)) == name.format(ADAPTER)
        assert current_name("image.default.weight") == "image.default.weight"

    def test_a_whole_folder(self, docked: Make, tmp_path: Path) -> None:
        made = own(docked, when="media")
        made.model.save_pretrained(tmp_path / "old")
        self.rename(tmp_path / "old/model.safetensors")
        again = OpticNerveForConditionalGeneration.from_pretrained(tmp_path / "old")
        assert torch.equal(logits(again, made, RED), logits(made.model, made, RED))
        again.save_pretrained(tmp_path / "new")
        assert not any(".default." in n for n in load_file(tmp_path / "new/model.safetensors"))

    def test_a_run(self, docked: Make, tmp_path: Path) -> None:
        made = own(docked)
        trained = made.model.part_parameters("language.lora")
        delta.save(made.model, tmp_path, bases=made.bases, lora=made.lora, trained=trained)
        self.rename(tmp_path / delta.TENSORS)
        reference = json.loads((tmp_path / delta.REFERENCE).read_text().replace(f".{ADAPTER}.", ".default."))
        (tmp_path / delta.REFERENCE).write_text(
            json.dumps({**reference, "sha256": atomic.sha256(tmp_path / delta.TENSORS)})
        )
        again = delta.load(OpticNerveForConditionalGeneration, tmp_path)
        assert torch.equal(logits(again, made, RED), logits(made.model, made, RED))
        fresh = docked("llama")
        assert set(trained) <= fresh.load_stage(tmp_path)
        assert torch.equal(logits(fresh.model, made, RED), logits(made.model, made, RED))

    def test_a_training_checkpoint(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """(The names of the optimizer's tensors alone; the rest of a checkpoint is not here.)"""
        kept: dict[str, Any] = {}
        state: Any = TrainState.__new__(TrainState)
        state._strategy = SimpleNamespace(optimizer=SimpleNamespace(load_state_dict=kept.update))
        state._data = state._folder = None
        state._sampler = SimpleNamespace(plan=None, steps=2, stage=None)
        for name in ("check_same", "of_length"):
            monkeypatch.setattr(f"opticnerve.train.precheck.{name}", lambda *args: None)
        old = "language_model.model.layers.0.q_proj.lora_A.default.weight"
        with pytest.raises(KeyError, match="buffers"):
            state.load_state_dict({"data": {"steps": 2}, "optimizer": {"masters": {old: torch.ones(1)}, "adam": {}}})
        assert list(kept["masters"]) == [old.replace("default", ADAPTER)]


def test_quantised_weights_take_no_sum(docked: Make) -> None:
    made = own(docked, targets=["q_proj"])
    theirs = with_theirs(made, target_modules=["q_proj"])
    for _, layer in our_layers(made.model):
        base = layer.get_base_layer()
        base.weight = torch.nn.Parameter(base.weight.data.to(torch.int8), requires_grad=False)
    with refused("unsupported", "quantised", "opticnerve merge"):
        merge_lora(made.model.language_model)
    with refused("unsupported", "quantised", "opticnerve merge"):
        theirs.merge_and_unload()
    assert has_lora(made.model)
