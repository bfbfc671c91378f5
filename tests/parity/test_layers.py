"""What `layer` means, in every family: -1 is what the last block gives, "last" is behind the final norm where there is
one; and what half precision on disk does to an encoder (nothing)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import opticnerve
import tiny
from opticnerve.encoders.hf_vision import HFVisionEncoder

SHARED = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "clip": (tf.CLIPVisionModel, {}),
    "siglip": (tf.SiglipVisionModel, {}),
    "siglip 2": (tf.Siglip2VisionModel, {"num_patches": 16}),
    "dinov2": (tf.Dinov2Model, {}),
    "dinov2 with registers": (tf.Dinov2WithRegistersModel, {"num_register_tokens": 3}),
    "dinov3": (tf.DINOv3ViTModel, {"num_register_tokens": 4}),
    "vit": (tf.ViTModel, {}),
    "blip-2": (tf.Blip2VisionModel, {}),
    "instructblip": (tf.InstructBlipVisionModel, {}),
    "deit": (tf.DeiTModel, {}),
    "ijepa": (tf.IJepaModel, {}),
}
# The norm behind the last block; CLIP has none there (its post_layernorm is for the pooled vector alone).
NORM = {
    "clip": None, "siglip": "post_layernorm", "siglip 2": "post_layernorm", "dinov3": "norm", "blip-2": "post_layernorm",
    "instructblip": "post_layernorm",
}  # fmt: skip


def save(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> str:
    cls, options = FAMILIES[name]
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**SHARED, "patch_size": 8, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    tf.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def from_last_block(encoder: Any, pixels: Tensor) -> Tensor:
    """By a hook of the test's own."""
    found: list[Tensor] = []

    def keep(_: nn.Module, __: Any, out: Any) -> None:
        found.append(out[0] if isinstance(out, tuple) else out)

    handle = encoder.blocks()[-1].register_forward_hook(keep)
    encoder(pixels)
    handle.remove()
    return found[0][:, encoder.prefix_tokens :]


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_minus_one_is_before_the_final_norm_and_last_is_behind_it(name: str, tmp_path: Path) -> None:
    folder, pixels = save(tmp_path, name), torch.randn(2, 3, 32, 32)
    last = HFVisionEncoder.from_pretrained(folder, layer="last").eval()
    minus_one = HFVisionEncoder.from_pretrained(folder, layer=-1).eval()
    raw = from_last_block(last, pixels)
    for _ in range(2):  # the first pass and those behind it go different ways
        torch.testing.assert_close(minus_one(pixels).tokens_BND, raw)
    norm = NORM.get(name, "layernorm")
    normed = raw if norm is None else last.model.get_submodule(norm)(raw)
    torch.testing.assert_close(last(pixels).tokens_BND, normed)
    assert torch.equal(normed, raw) == (name == "clip")


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "dinov3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_in_half_precision(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """It computes in the dock's dtype, everywhere; a saved dock is the same again, tables included."""
    halves = save(tmp_path / "vision", name, torch.float16)
    language_part = tiny.save_language(tmp_path / "language")
    tf.AutoModelForCausalLM.from_pretrained(language_part).half().save_pretrained(language_part)
    model, processor = opticnerve.dock(
        vision={"type": "hf_vision", "name": halves},
        language={"name": language_part, "chat_template": "chatml"},
        dtype=dtype,
    )
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert "float16" not in str(model.config.to_dict()).replace("bfloat16", "")
    inputs = processor(text="<image> a", images=tiny.picture(1), return_tensors="pt")
    logits = model(**inputs).logits
    assert logits.dtype == dtype and bool(logits.isfinite().all())
    model.save_pretrained(tmp_path / "saved")
    back: Any = type(model).from_pretrained(tmp_path / "saved")
    assert {n: b.dtype for n, b in back.named_buffers()} == {n: b.dtype for n, b in model.named_buffers()}
    assert torch.equal(back(**inputs).logits, logits)


@torch.no_grad()
def test_rotary_tables_keep_their_precision(tmp_path: Path) -> None:
    folder, pixels = save(tmp_path, "dinov3"), torch.randn(1, 3, 32, 32).bfloat16()
    ours = HFVisionEncoder.from_pretrained(folder).to(torch.bfloat16).eval()
    theirs = tf.DINOv3ViTModel.from_pretrained(folder, dtype=torch.bfloat16).eval()
    assert torch.equal(ours(pixels).tokens_BND, theirs(pixels).last_hidden_state[:, 5:])


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("connector", ["mlp", "linear", "resampler"])
def test_a_quantised_dock_answers(connector: str, tmp_path: Path) -> None:
    """Dynamically quantised layers hold no parameter that says what they compute in."""
    model, processor = opticnerve.dock(
        vision={"type": "hf_vision", "name": save(tmp_path / "vision", "clip")}, connector=connector,
        language={"name": tiny.save_language(tmp_path / "language"), "chat_template": "chatml"},
    )  # fmt: skip
    small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    inputs = processor(text="<image> a", images=tiny.picture(1), return_tensors="pt")
    assert small.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
    apart = (small(**inputs).logits - model(**inputs).logits).abs().max()
    assert 0 < float(apart) < float(model(**inputs).logits.std())
