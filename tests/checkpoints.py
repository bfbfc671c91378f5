"""Tiny random checkpoints of transformers' own vision-language models, with real processors, saved as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf

import tiny

SIDE, PATCH = 32, 8  # a grid of 4 × 4
LLAVA_CHAT = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)  # as llava-hf/llava-1.5-7b-hf writes it


def words(image_token: str = "<image>") -> Any:
    """A tokenizer with a word for pictures and a padding token."""
    made = tiny.tokenizer("metaspace, legacy", bos="<s>", eos="</s>")
    made.add_special_tokens({"additional_special_tokens": [image_token], "pad_token": "<unk>"})
    return made


def opt_words() -> Any:
    """OPT's kind: GPT-2's pieces, and every text begins with `</s>`."""
    model = json.loads(tiny.byte_level().to_str())["model"]
    made = tf.GPT2Tokenizer(
        vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]],  # type: ignore[misc]
        bos_token="</s>", eos_token="</s>",
        unk_token="</s>", pad_token="<pad>", add_bos_token=True,
    )  # fmt: skip
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return made


def shake(model: Any, seed: int = 0) -> Any:
    """Weights of which every one matters: norms, biases and zeros at the start, too."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _llava_parts(
    vision: str, text: str, *, image_token: str = "<image>", chat_template: str | None = LLAVA_CHAT, **options: Any
) -> tuple[Any, dict[str, Any]]:
    tokenizer = words(image_token)
    vocabulary = len(tokenizer) + 7  # padded to a round number, as the published checkpoints are
    prefix = {"clip_vision_model": 1, "vit": 1, "dinov2": 1, "siglip_vision_model": 0}.get(vision, 1)
    language = tiny.language_config(text.removesuffix(" untied"), vocabulary)
    if text.endswith(" untied"):
        language.tie_word_embeddings = False
    config = {
        "vision_config": tiny.vision_config(vision), "text_config": language,
        "image_token_index": tokenizer.convert_tokens_to_ids(image_token), "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default" if prefix else "full", **options,
    }  # fmt: skip
    processor = {
        "tokenizer": tokenizer, "patch_size": PATCH, "chat_template": chat_template, "num_additional_image_tokens": prefix, "image_token": image_token,
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
    }  # fmt: skip
    return config, processor


def _images(cls: Any, **options: Any) -> Any:
    return cls(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, **options)


def save_llava(
    folder: Path, *, vision: str = "clip_vision_model", text: str = "llama", dtype: Any = torch.float32, **options: Any
) -> Path:
    """LLaVA-1.5: CLIP at layer -2 without class token, mlp, Llama."""
    config, parts = _llava_parts(vision, text, **options)
    model = shake(tf.LlavaForConditionalGeneration(tf.LlavaConfig(**config)))
    model.generation_config.max_length = 77
    model.to(dtype).save_pretrained(folder)
    tf.LlavaProcessor(_images(tf.CLIPImageProcessor), **parts).save_pretrained(folder)
    return folder


def save_llava_next(folder: Path, *, vision: str = "clip_vision_model", pinpoints: Any = None, **options: Any) -> Path:
    """LLaVA-NeXT: the same with tiles."""
    config, parts = _llava_parts(vision, "mistral", **options)
    pinpoints = pinpoints or [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
    made = tf.LlavaNextConfig(**config, image_grid_pinpoints=pinpoints)
    shake(tf.LlavaNextForConditionalGeneration(made)).save_pretrained(folder)
    images = _images(tf.LlavaNextImageProcessor, image_grid_pinpoints=pinpoints)
    tf.LlavaNextProcessor(images, **parts).save_pretrained(folder)
    return folder


def _blip2_sizes(cls: Any, tokenizer: Any, text: Any, **options: Any) -> dict[str, Any]:
    vision, former = cls.sub_configs["vision_config"], cls.sub_configs["qformer_config"]
    return {
        "vision_config": vision(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                image_size=SIDE, patch_size=PATCH),
        "qformer_config": former(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
                                 vocab_size=500, max_position_embeddings=64),
        "text_config": text, "num_query_tokens": 5, "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        **options,
    }  # fmt: skip


def save_blip2(folder: Path, *, text: Any = None, **options: Any) -> Path:
    """BLIP-2 on OPT."""
    tokenizer = opt_words()
    text = text or tiny.language_config("opt", len(tokenizer) + 3)
    config = tf.Blip2Config(**_blip2_sizes(tf.Blip2Config, tokenizer, text, **options))
    shake(tf.Blip2ForConditionalGeneration(config)).save_pretrained(folder)
    images = tf.BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    tf.Blip2Processor(images, tokenizer, num_query_tokens=5).save_pretrained(folder)
    return folder


def save_instructblip(folder: Path) -> Path:
    """InstructBLIP on Llama: the Q-Former reads the question, too."""
    tokenizer, questions = words(), tiny.tokenizer()
    questions.add_special_tokens({"pad_token": "<unk>"})
    text = tiny.language_config("llama", len(tokenizer) + 3)
    config = tf.InstructBlipConfig(**_blip2_sizes(tf.InstructBlipConfig, tokenizer, text))
    shake(tf.InstructBlipForConditionalGeneration(config)).save_pretrained(folder)
    images = tf.BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    tf.InstructBlipProcessor(images, tokenizer, questions, num_query_tokens=5).save_pretrained(folder)
    return folder
