"""The processor alone counts placeholders, and never lets one be cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from errors import refused
from opticnerve.models import OpticNerveProcessor
from opticnerve.models.vlm.build import Dock

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture
def processor(docked: Callable[..., Dock]) -> Any:
    return docked().processor


def test_one_block_for_each_picture(processor: Any) -> None:
    out = processor(images=[tiny.picture(1), tiny.picture(2)], text="a <image> b <image> c", return_tensors="pt")
    assert int((out["input_ids"] == processor.image_token_id).sum()) == 2 * 16
    assert out["pixel_values"].shape == (2, 3, 32, 32)
    words = processor.tokenizer.decode(out["input_ids"][0])
    assert words == "a " + "<image>" * 16 + " b " + "<image>" * 16 + " c"


def test_batches_are_padded_on_the_left(processor: Any) -> None:
    out = processor(images=[tiny.picture()], text=["<image> what is in this picture?", "q"], return_tensors="pt")
    mask = out["attention_mask"]
    assert mask[0].all()
    assert mask[1].tolist() == sorted(mask[1].tolist())
    assert not mask[1].all()
    right = processor(text=["a longer one", "q"], return_tensors="pt", padding=True, padding_side="right")
    assert right["attention_mask"][1, 0] == 1


def test_truncation_never_cuts_through_a_picture(processor: Any) -> None:
    text = "<image>" + "word " * 30
    whole = processor(images=[tiny.picture()], text=text, return_tensors="pt")["input_ids"]
    cut = processor(images=[tiny.picture()], text=text, return_tensors="pt", truncation=True, max_length=24)[
        "input_ids"
    ]
    assert torch.equal(cut, whole[:, :24])
    with refused("too-long", 10, 16):
        processor(images=[tiny.picture()], text=text, return_tensors="pt", truncation=True, max_length=10)
    # A picture that is cut away whole leaves its features behind: an error too.
    with refused("too-long", 0, 16):
        processor(
            images=[tiny.picture()], text="word " * 30 + "<image>", return_tensors="pt", truncation=True, max_length=10
        )


def test_the_vocabulary_of_the_language_model_is_untouched(docked: Callable[..., Dock]) -> None:
    made = docked("gpt2")
    assert made.processor.image_token_id >= made.model.config.text_config.vocab_size
    assert made.processor.tokenizer("<|im_end|>")["input_ids"] == [made.processor.tokenizer.eos_token_id]


def test_round_trip(processor: Any, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = OpticNerveProcessor.from_pretrained(tmp_path)
    for name in ("num_image_tokens", "image_token", "image_token_id", "chat_template"):
        assert getattr(again, name) == getattr(processor, name)
    one, other = (p(images=[tiny.picture()], text="<image> 🦊 what?", return_tensors="pt") for p in (processor, again))
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("tiling", [None, {"type": "anyres", "pinpoints": [[32, 64], [64, 32]]}])
def test_what_is_loaded_says_what_was_saved(docked: Callable[..., Dock], tiling: Any, tmp_path: Path) -> None:
    """A processor of transformers that is loaded and one that was made are told apart by nothing."""
    made = docked("llama", tiling=tiling).processor
    made.save_pretrained(tmp_path)
    assert OpticNerveProcessor.from_pretrained(tmp_path).to_dict() == made.to_dict()


def test_chat_in_transformers_own_form(processor: Any) -> None:
    chat = [
        {"role": "user", "content": [{"type": "image", "image": tiny.picture()}, {"type": "text", "text": "what?"}]}
    ]
    out = processor.apply_chat_template(
        chat, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    assert int((out["input_ids"] == processor.image_token_id).sum()) == 16
    assert out["pixel_values"].shape[0] == 1
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text == "<|im_start|>user\n<image>\nwhat?<|im_end|>\n<|im_start|>assistant\n"
