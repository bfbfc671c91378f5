"""Invariant 4: same weights, same logits and same words as transformers' own LLaVA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf

import tiny
from opticnerve.inference.generate import Answerer
from opticnerve.models.vlm.build import Dock
from opticnerve.types import ask

pytestmark = pytest.mark.usefixtures("private_cache")


def llava_of(made: Dock) -> Any:
    """transformers' LLaVA with the dock's weights: CLIP-ViT at layer -2 without its class token, mlp, Llama."""
    tower, language = made.model.image, made.model.language_model
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**{k: v for k, v in tower.encoder.options["architecture"].items() if k != "model_type"}),
        text_config=copy.deepcopy(language.config), image_token_index=made.processor.image_token_id, projector_hidden_act="gelu",
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    theirs = tf.LlavaForConditionalGeneration(config).eval()
    # LLaVA looks placeholders up before it overwrites them: its table must hold their id.
    words = language.get_input_embeddings().weight
    theirs.resize_token_embeddings(made.processor.image_token_id + 1)
    with torch.no_grad():
        theirs.model.language_model.load_state_dict(
            {n: t for n, t in language.model.state_dict().items() if "embed_tokens" not in n}, strict=False
        )
        theirs.model.language_model.embed_tokens.weight[: len(words)].copy_(words)
        theirs.lm_head.weight[: len(words)].copy_(language.lm_head.weight)
    theirs.model.vision_tower.load_state_dict(tower.encoder.model.state_dict())
    mlp = tower.connector.layers
    theirs.model.multi_modal_projector.linear_1.load_state_dict(mlp[0].state_dict())
    theirs.model.multi_modal_projector.linear_2.load_state_dict(mlp[2].state_dict())
    return theirs


def test_logits_and_greedy_words_are_llavas(docked: Callable[..., Dock], vision_folder: Callable[..., str]) -> None:
    made = docked(
        "llama",
        {"type": "hf_vision", "name": vision_folder("clip_vision_model"), "layer": -2, "class_token": "drop"},
        connector={"type": "mlp", "depth": 2, "activation": "gelu"},
    )
    with torch.no_grad():
        for parameter in made.model.image.connector.parameters():
            parameter.mul_(5)
    theirs, size = llava_of(made), made.model.config.text_config.vocab_size
    batch = Answerer(made.model, made.processor).inputs(
        [ask("what is this?", tiny.picture(1)), ask("compare", tiny.picture(2), tiny.picture(3))]
    )
    with torch.no_grad():
        ours = made.model(**batch)
        logits = theirs(**batch).logits[..., :size]
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(*tiny.words_of(ours.logits[real], logits[real]), rtol=1e-5, atol=1e-5)
    soft = theirs.get_image_features(batch["pixel_values"])
    soft = getattr(soft, "pooler_output", soft)
    torch.testing.assert_close(ours.image_hidden_states, torch.stack(list(soft)), rtol=1e-5, atol=1e-6)
    # Words beyond the language model's vocabulary (the placeholder) are LLaVA's alone to say.
    beyond = list(range(size, made.processor.image_token_id + 1))
    how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    words = theirs.generate(**batch, suppress_tokens=beyond, **how)
    assert made.model.generate(**batch, **how).tolist() == words.tolist()
