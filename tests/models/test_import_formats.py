"""What is imported from formats that transformers does not read, and that all that is imported trains on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from test_import import edit, edit_weights, import_refused

import checkpoints
import tiny
from opticnerve import recipe as recipes
from opticnerve.common import drawing
from opticnerve.data.encode.tokenize import encode
from opticnerve.inference.generate import Answerer
from opticnerve.inference.load import load_model
from opticnerve.models.import_hf.run import import_checkpoint
from opticnerve.runs.pipeline import run_recipe
from opticnerve.types import Conversation, ImagePart, Message, TextPart, ask


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return checkpoints.save_llava_original(tmp_path / "llava")


def test_a_placeholder_beyond_the_table_and_llavas_own_words(original: Path, tmp_path: Path) -> None:
    """LLaVA's own tokenizers have no word for pictures, and its tables no row for one."""
    config = json.loads((original / "config.json").read_text())
    tokenizer = tiny.tokenizer("metaspace, legacy", bos="<s>", eos="</s>")
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(original)
    edit(original, lambda c: c.update(vocab_size=len(tokenizer)))
    rows = len(tokenizer)
    assert rows < config["vocab_size"]

    def cut(state: dict[str, Any]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            state[name] = state[name][:rows].clone()

    edit_weights(original, cut)
    made = import_checkpoint(original, tmp_path / "out")
    assert made.difference < 1e-5
    model, processor = load_model(made.folder, device="cpu")
    assert model.config.image_token_id == rows
    text = Answerer(model, processor).render(ask("what is this?", tiny.picture()))
    assert text.endswith("polite answers to the user's questions. USER: <image>\nwhat is this? ASSISTANT:")
    assert any("vicuna_v1" in note for note in made.notes)


def test_a_tower_that_is_not_in_the_checkpoint_is_read_from_its_own(original: Path, tmp_path: Path) -> None:
    whole = import_checkpoint(original, tmp_path / "whole")
    edit_weights(original, lambda state: [state.pop(n) for n in list(state) if "vision_tower" in n])
    made = import_checkpoint(original, tmp_path / "out")
    assert any("llava-tower" in note for note in made.notes)
    states = [load_file(m.folder / "model.safetensors") for m in (made, whole)]
    assert all(torch.equal(states[0][n], t) for n, t in states[1].items())


def test_pictures_are_padded_where_the_model_was_trained_so(tmp_path: Path) -> None:
    source = checkpoints.save_llava_original(tmp_path / "llava", image_aspect_ratio="pad")
    made = import_checkpoint(source, tmp_path / "out")
    assert made.towers["image"]["encoder"]["fit"] == "pad"


def test_phis_head_keeps_its_bias(tmp_path: Path) -> None:
    """transformers' LLaVA has none; TinyLLaVA's largest stands on Phi."""
    source = checkpoints.save_tinyllava(tmp_path / "tiny")
    torch.manual_seed(0)
    rows = json.loads((source / "config.json").read_text())["text_config"]["vocab_size"]
    phi = checkpoints.shake(tf.PhiForCausalLM(tiny.language_config("phi", rows)))
    edit(source, lambda c: c.update(text_config=phi.config.to_dict()))

    def put(state: dict[str, Any]) -> None:
        for name in [n for n in state if n.startswith("language_model.")]:
            del state[name]
        state |= {f"language_model.{n}": t.clone() for n, t in phi.state_dict().items()}

    edit_weights(source, put)
    made = import_checkpoint(source, tmp_path / "out")
    model, _ = load_model(made.folder, device="cpu")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(*tiny.words_of(model(input_ids=ids).logits, phi(input_ids=ids).logits))


CHANGES: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "projector": ({"mm_projector_type": "linear"}, ("linear", "mlp2x_gelu", "connector: {from: FILE}")),
    "features": ({"mm_vision_select_feature": "cls"}, ("cls", "patch", "cls_patch")),
    "merging": ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "flat"}, ("anyres", "flat", "spatial_unpad")),
    "onevision": ({"image_aspect_ratio": "anyres_max_9"}, ("anyres_max_9", "llava-hf/")),
    "words around": ({"mm_use_im_start_end": True}, ("mm_use_im_start_end",)),
    "scales": ({"s2": True}, ("several scales",)),
    "no tower": ({"mm_vision_tower": None, "vision_model_name_or_path": None}, ("vision tower",)),
}


@pytest.mark.parametrize("case", list(CHANGES))
def test_what_llavas_own_code_does_otherwise_is_refused(case: str, original: Path, tmp_path: Path) -> None:
    changes, facts = CHANGES[case]
    edit(original, lambda c: c.update(changes))
    import_refused(original, tmp_path / "out", "unsupported", *facts)


def test_all_reasons_of_the_original_are_named_at_once(original: Path, tmp_path: Path) -> None:
    edit(original, lambda c: c.update(mm_projector_type="linear", mm_vision_select_feature="cls"))
    import_refused(original, tmp_path / "out", "unsupported", "linear", "cls")


NANO_CHANGES: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "one vector": ({"vit_cls_flag": True}, ("unsupported", "vit_cls_flag")),
    "rotary": ({"lm_attn_scaling": 0.5}, ("unsupported", "lm_attn_scaling", 0.5)),
    "squares": ({"mp_pixel_shuffle_factor": 4}, ("unsupported", "6 × 6", 4)),
    "counts": ({"mp_image_token_length": 5}, ("unsupported", 5, 4)),
    "whole tiles": ({"max_img_size": 70}, ("unsupported", 70, 24)),
    "words of tiles": ({"max_img_size": 96}, ("unsupported", "<row_{row}_col_{column}>", 4)),
    "the whole alone": ({"vlm_extra_tokens": checkpoints.NANO_WHOLE}, ("unsupported", "whole picture")),
    "a gap": ({"lm_n_heads": None, "lm_tokenizer": None}, ("damaged", "lm_n_heads, lm_tokenizer")),
    "no configuration": ({"vit_n_heads": "two"}, ("damaged", "configuration")),
    "other tensors": ({"lm_n_blocks": 3}, ("mismatch", "decoder.model.layers.2.")),
    "other table": ({"lm_vocab_size": 300}, ("mismatch", 300, "words")),
}


@pytest.mark.parametrize("case", list(NANO_CHANGES))
def test_what_nanovlms_code_does_otherwise_is_refused(case: str, tmp_path: Path) -> None:
    changes, facts = NANO_CHANGES[case]
    import_refused(checkpoints.save_nanovlm(tmp_path / "nano", **changes), tmp_path / "out", *facts)


def test_nanovlms_tokenizer_may_lie_beside_its_weights(tmp_path: Path) -> None:
    """Out of reach of the hub, or where config.json names a folder of somebody else's machine."""
    source = checkpoints.save_nanovlm(tmp_path / "nano", lm_tokenizer=str(tmp_path / "nowhere"))
    import_refused(source, tmp_path / "out", "damaged", "nowhere")
    tiny.tokenizer("byte-level").save_pretrained(source)
    assert import_checkpoint(source, tmp_path / "out").difference < 1e-5


def test_pickles_of_the_original_are_not_opened(original: Path, tmp_path: Path) -> None:
    (original / "model.safetensors").rename(original / "pytorch_model.bin")
    import_refused(original, tmp_path / "out", "missing-file", "pytorch_model.bin", "safetensors", "docs/migrate.md")


def test_tensors_of_the_original_are_accounted_for(original: Path, tmp_path: Path) -> None:
    edit_weights(original, lambda s: s.update({"model.extra.weight": torch.zeros(2)}))
    import_refused(original, tmp_path / "out", "mismatch", "extra.weight")


def test_damaged_weights_of_the_original(original: Path, tmp_path: Path) -> None:
    (original / "model.safetensors").write_bytes(b"damaged")
    import_refused(original, tmp_path / "out", "damaged", "model.safetensors")


# -- pixel_shuffle's kin ----------------------------------------------------------------------------------------------


def test_oblong_tiles_and_other_layers_of_internvl_are_refused(tmp_path: Path) -> None:
    vision = {"image_size": [32, 64], "patch_size": [8, 8]}
    config = tf.InternVLConfig(
        vision_config=vision, vision_feature_layer=[1, 2], vision_feature_select_strategy="full", downsample_ratio=0.4
    )
    config.save_pretrained(tmp_path / "source")
    import_refused(tmp_path / "source", tmp_path / "out", "unsupported", "oblong", "0.4", "full", "[1, 2]")


def test_tiles_must_be_what_the_tower_takes(tmp_path: Path) -> None:
    source = checkpoints.save_idefics3(tmp_path / "idefics3")

    def larger(config: dict[str, Any]) -> None:
        config["image_processor"]["max_image_size"] = {"longest_edge": 48}

    edit(source, larger, "processor_config.json")
    import_refused(source, tmp_path / "out", "mismatch", 48, 32)


SPLIT: dict[str, Callable[[Path], Path]] = {
    "internvl": checkpoints.save_internvl,
    "idefics3": checkpoints.save_idefics3,
}


@pytest.mark.parametrize("kind", list(SPLIT))
def test_what_is_asked_is_what_their_processor_writes(kind: str, tmp_path: Path) -> None:
    """Words among the placeholders too, where a conversation is encoded for training."""
    source = SPLIT[kind](tmp_path / "source")
    _, processor = load_model(import_checkpoint(source, tmp_path / "out").folder, device="cpu")
    wide = tiny.picture(2, 90).resize((90, 30))
    chat = [{"role": "user", "content": [{"type": "image", "image": wide}, {"type": "text", "text": "what is this?"}]}]
    theirs = tf.AutoProcessor.from_pretrained(source).apply_chat_template(
        chat, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    asked = Conversation([Message("user", [ImagePart(wide), TextPart("what is this?")])])
    assert encode(asked, processor, learn=False).input_ids == theirs["input_ids"][0].tolist()
    learned = encode(ask("what is this?", wide, answer="a dog"), processor)
    answer = processor.tokenizer.decode([i for i in learned.labels if i >= 0])
    assert answer.strip().startswith("a dog")


# -- training on ------------------------------------------------------------------------------------------------------

MADE: dict[str, Callable[[Path], Path]] = {
    **SPLIT, "llava_onevision": checkpoints.save_llava_onevision, "llava's own": checkpoints.save_llava_original,
    "nanovlm": checkpoints.save_nanovlm,
}  # fmt: skip


@pytest.mark.usefixtures("private_cache")
@pytest.mark.parametrize("kind", list(MADE))
def test_a_step_of_training_from_an_import(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_DPI", 30)
    folder = import_checkpoint(MADE[kind](tmp_path / "source"), tmp_path / "out").folder
    stage = {
        "name": "instruct", "train": {"connector": 1e-2, "language.lora": 1e-2}, "lora": {"rank": 2}, "batch_size": 2,
        "steps": 1, "data": [{"path": str(tiny.save_captions(tmp_path / "data"))}],
    }  # fmt: skip
    recipe = recipes.load({"precision": "fp32", "forgetting": False, "model": {"from": str(folder)}, "stages": [stage]})
    run_recipe(recipe, tmp_path / "run")
    model, processor = load_model(tmp_path / "run", device="cpu")
    before = load_file(folder / "model.safetensors")
    moved = [
        n for n, t in model.image.connector.named_parameters() if not torch.equal(t, before[f"image.connector.{n}"])
    ]
    assert moved
    assert Answerer(model, processor).answer([ask("what is this?", tiny.picture(1, 70))], max_new_tokens=3)
