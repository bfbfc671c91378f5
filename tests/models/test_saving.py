"""Invariant 6 for self-contained folders: save and load by transformers' conventions, the Auto classes, the pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline

import opticnerve
import tiny
from errors import refused
from opticnerve.encoders.base import make_image_processor
from opticnerve.inference.generate import Answerer
from opticnerve.models import OpticNerveConfig, OpticNerveForConditionalGeneration, OpticNerveProcessor
from opticnerve.models.vlm.build import Dock, merge
from opticnerve.types import OpticNerveError, ask

pytestmark = pytest.mark.usefixtures("private_cache")

# timm models whose tables are computed, not stored, come last: rotary positions, relative positions.
TIMM = ["test_efficientnet", "test_resnet", "test_vit", "test_vit3", "test_vit_relpos", "test_vit4"]
ROPE = {"name": "vit_small_patch16_rope_224", "model_args": {"embed_dim": 32, "depth": 2, "num_heads": 2}}
SWIN = {
    "name": "swin_tiny_patch4_window7_224", "image_size": 32,
    "model_args": {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
}  # fmt: skip


def encoder_spec(name: str, vision_folder: Callable[..., str], timm_folder: Callable[..., str]) -> Any:
    return vision_folder(name) if name in tiny.VISION else {"type": "timm", "name": timm_folder(name), "image_size": 96}


def some_inputs(made: Any) -> Any:
    return Answerer(*made).inputs([ask("q", tiny.picture(1)), ask("longer", tiny.picture(2), tiny.picture(3))])


@pytest.mark.parametrize("name", [*tiny.VISION, *TIMM])
def test_save_and_load_every_encoder(
    name: str,
    docked: Callable[..., Dock],
    vision_folder: Callable[..., str],
    timm_folder: Callable[..., str],
    tmp_path: Path,
) -> None:
    spec = encoder_spec(name, vision_folder, timm_folder)
    made = docked("llama", {"type": "hf_vision", "name": spec} if isinstance(spec, str) else spec)
    batch = some_inputs(made)
    made.model.save_pretrained(tmp_path)
    made.processor.save_pretrained(tmp_path)
    model = OpticNerveForConditionalGeneration.from_pretrained(tmp_path)
    processor = OpticNerveProcessor.from_pretrained(tmp_path)
    again = some_inputs((model, processor))
    assert all(torch.equal(batch[k], again[k]) for k in batch)
    with torch.no_grad():
        # (Not bit for bit: how a loaded tensor lies in memory may choose another kernel of a convolution.)
        torch.testing.assert_close(model(**again).logits, made.model(**batch).logits, rtol=1e-5, atol=1e-6)
    ours, theirs = made.model.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    for (n, one), (m, other) in zip(made.model.named_buffers(), model.named_buffers(), strict=True):
        assert n == m
        assert torch.equal(one, other), n


@pytest.mark.parametrize("options", [ROPE, SWIN], ids=["rope", "swin"])
def test_tables_that_no_file_holds_are_computed_again(
    options: dict[str, Any], docked: Callable[..., Dock], tmp_path: Path
) -> None:
    from opticnerve.encoders.timm import TimmEncoder
    from opticnerve.models.vlm.tower import join

    base = docked("llama")
    torch.manual_seed(0)
    vision_encoder = TimmEncoder(**options).eval()
    hidden = set(dict(vision_encoder.named_buffers())) - set(vision_encoder.state_dict())
    spec = {"connector": {"type": "linear"}, "fusion": {"type": "splice"}}
    tower = join(vision_encoder, spec, {"language_size": 32, "language_layers": 2})
    model = OpticNerveForConditionalGeneration.from_parts(
        base.model.language_model, {"image": tower}, image_token_id=base.processor.image_token_id
    )
    pixels = torch.randn(2, 3, vision_encoder.image_size, vision_encoder.image_size)
    model.save_pretrained(tmp_path)
    again = OpticNerveForConditionalGeneration.from_pretrained(tmp_path)
    assert hidden or options is SWIN
    for n in hidden:
        assert torch.equal(again.image.encoder.get_buffer(n), vision_encoder.get_buffer(n)), n
    seen = [m.get_image_features(pixels).pooler_output for m in (again, model)]
    assert torch.equal(*seen)


@pytest.mark.parametrize("family", ["llama tied", "gpt2", "gemma2", "opt"])
def test_save_and_load_every_family(family: str, docked: Callable[..., Dock], tmp_path: Path) -> None:
    made = docked(family)
    made.model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    batch = some_inputs(made)
    assert torch.equal(again(**batch).logits, made.model(**batch).logits)
    tied = made.model.get_output_embeddings().weight is made.model.get_input_embeddings().weight
    assert tied == (again.get_output_embeddings().weight is again.get_input_embeddings().weight)
    assert again.language_model.config._attn_implementation == made.model.language_model.config._attn_implementation


@pytest.fixture
def saved(docked: Callable[..., Dock], tmp_path: Path) -> Path:
    made = docked("llama")
    made.model.save_pretrained(tmp_path / "saved")
    made.processor.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_the_auto_classes_know_it(saved: Path) -> None:
    assert type(AutoConfig.from_pretrained(saved)) is opticnerve.OpticNerveConfig is OpticNerveConfig
    assert type(AutoProcessor.from_pretrained(saved)) is OpticNerveProcessor
    assert type(AutoModelForImageTextToText.from_pretrained(saved)) is OpticNerveForConditionalGeneration


def test_bf16_comes_back_as_bf16(saved: Path, tmp_path: Path) -> None:
    model = OpticNerveForConditionalGeneration.from_pretrained(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "half")
    assert {p.dtype for p in AutoModelForImageTextToText.from_pretrained(tmp_path / "half").parameters()} == {
        torch.bfloat16
    }


def test_the_pipeline_answers(saved: Path) -> None:
    pipe = pipeline("image-text-to-text", model=str(saved), device="cpu")
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": tiny.picture(1)}, {"type": "text", "text": "what is it?"}],
        }
    ]
    said = pipe(text=chat, max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
    made = (AutoModelForImageTextToText.from_pretrained(saved), AutoProcessor.from_pretrained(saved))
    (answer,) = Answerer(*made).answer([ask("what is it?", tiny.picture(1))], max_new_tokens=6)
    assert said.strip() == answer


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


class TestTensorsAreAccountedFor:
    def test_missing(self, saved: Path) -> None:
        edit(saved, lambda t: t.pop("image.connector.layers.0.weight"))
        with refused("mismatch", "image.connector.layers.0.weight"):
            OpticNerveForConditionalGeneration.from_pretrained(saved)

    def test_unexpected(self, saved: Path) -> None:
        edit(saved, lambda t: t.update(stray=torch.ones(1)))
        with refused("mismatch", "stray"):
            AutoModelForImageTextToText.from_pretrained(saved)

    def test_mismatched(self, saved: Path) -> None:
        edit(saved, lambda t: t.update({"image.connector.layers.0.bias": torch.ones(3)}))
        with refused("mismatch", "image.connector.layers.0.bias"):
            OpticNerveForConditionalGeneration.from_pretrained(saved)

    def test_a_missing_calibration(self, saved: Path) -> None:
        edit(saved, lambda t: t.pop("image.connector.output_scale"))
        with refused("mismatch", "output_scale"):
            OpticNerveForConditionalGeneration.from_pretrained(saved)


def test_a_saved_folder_names_no_other_folder(
    timm_folder: Callable[..., str], docked: Callable[..., Dock], tmp_path: Path
) -> None:
    """Self-contained: it loads where the encoder's own folder is gone."""
    made = docked("llama", {"type": "timm", "name": timm_folder(), "image_size": 96})
    made.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["towers"]["image"]["encoder"]["name"] == "test_efficientnet"


def test_every_folder_carries_the_ends_of_answers(docked: Callable[..., Dock], tmp_path: Path) -> None:
    """A base model that knows its own end alone, trained with ChatML: `generate` of every folder stops at `<|im_end|>`."""
    made = docked()
    end = made.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in made.model.generation_config.eos_token_id
    made.save(tmp_path / "run", [])
    merge(tmp_path / "run", tmp_path / "merged")
    for folder in ("run", "merged"):
        model = OpticNerveForConditionalGeneration.from_pretrained(tmp_path / folder)
        assert model.generation_config.eos_token_id == made.model.generation_config.eos_token_id


def test_a_tokenizer_that_would_come_back_as_another(tmp_path: Path) -> None:
    """Llama 2's says `legacy` by a constructor's argument that transformers does not save."""
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "▁a": 5}, [("▁", "a")])
    )
    made.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    words = AutoTokenizer.from_pretrained(tmp_path)
    processor = OpticNerveProcessor(make_image_processor(size=32, mean=[0.5] * 3, std=[0.5] * 3), words)
    processor.save_pretrained(tmp_path / "saved")
    again = OpticNerveProcessor.from_pretrained(tmp_path / "saved")
    assert words("</s>a")["input_ids"] == again.tokenizer("</s>a")["input_ids"] == [2, 5]
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("</s>a")["input_ids"] == [2, 5]
    # Whatever else a class forgets is refused.
    words.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    with pytest.raises(OpticNerveError):
        processor.save_pretrained(tmp_path / "other")
