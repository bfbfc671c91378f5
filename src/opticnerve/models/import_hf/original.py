"""Checkpoints that LLaVA's own code wrote (github.com/haotian-liu/LLaVA), and TinyLLaVA Factory's
(github.com/TinyLLaVA/TinyLLaVA_Factory): the same tensors under other names. They are read as transformers' LLaVA
classes, from where everything goes as for those (`llava.py`), the proof included.

Both write the placeholder as a negative id; here it is the first id that the tokenizer has free.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from opticnerve.common import hub
from opticnerve.encoders.base import make_image_processor
from opticnerve.encoders.hf_vision import HFVisionEncoder
from opticnerve.encoders.preparation import preparation
from opticnerve.language.chat_template import IMAGE_TOKEN
from opticnerve.language.load import no_bars
from opticnerve.models.checkpoint.strict import list_problems, wrap_errors
from opticnerve.models.import_hf.source import Source, read_tensors
from opticnerve.types import OpticNerveError

TINY = "TinyLlavaForConditionalGeneration"
# The language model behind each of LLaVA's own classes.
_LANGUAGE = {"LlavaLlamaForCausalLM": "llama", "LlavaMistralForCausalLM": "mistral", "LlavaQwenForCausalLM": "qwen2"}
_SELECT = {"patch": "default", "cls_patch": "full"}
_PROJECTOR = "mlp2x_gelu"
# Names there and in transformers' classes. Rotary tables and numbered positions are computed.
_RENAMED: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"model\.mm_projector\.(0|2)\.", lambda m: f"model.multi_modal_projector.linear_{1 + int(m[1]) // 2}."),
    (r"connector\._connector\.(0|2)\.", lambda m: f"model.multi_modal_projector.linear_{1 + int(m[1]) // 2}."),
    (r"(?:model\.vision_tower\.vision_tower|vision_tower\._vision_tower)\.(?:vision_model\.)?", "model.vision_tower."),
    (r"model\.image_newline", "model.image_newline"),
    (r"language_model\.lm_head\.", "lm_head."),
    (r"language_model\.(?:model|transformer)\.", "model.language_model."),
    (r"model\.", "model.language_model."),
]
_COMPUTED = re.compile(r".*(rotary_emb\.inv_freq|embeddings\.position_ids)")

# LLaVA's `conv_vicuna_v1` and TinyLLaVA's templates, which differ in the word that ends an answer alone.
_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
CHAT = (
    "{%- if messages[0]['role'] != 'system' -%}{{ " + json.dumps(_SYSTEM + " ") + " }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ message['content'] + ' ' }}"
    "{%- elif message['role'] == 'user' -%}{{ 'USER: ' + message['content'] + ' ' }}"
    "{%- else -%}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)


def recognises(raw: dict[str, Any]) -> bool:
    """Whether a config.json is one of these."""
    return any(c in (*_LANGUAGE, TINY) for c in raw.get("architectures") or [])


def read_config(name: str, raw: dict[str, Any]) -> Any:
    """transformers' configuration of the same model.

    Raises:
        OpticNerveError: something that these classes do not do; all reasons are named.
    """
    tiny = TINY in raw["architectures"]
    projector = raw.get("connector_type") if tiny else raw.get("mm_projector_type", "linear")
    select = raw.get("vision_feature_select_strategy" if tiny else "mm_vision_select_feature") or "patch"
    layer = raw.get("vision_feature_layer" if tiny else "mm_vision_select_layer", -2)
    tower = str(raw.get("vision_model_name_or_path" if tiny else "mm_vision_tower") or "").split(":")[-1]
    ratio, merge = raw.get("image_aspect_ratio") or "square", raw.get("mm_patch_merge_type", "flat")
    reasons = []
    if projector != _PROJECTOR:
        reasons.append(
            f"its projector is {projector}, known is {_PROJECTOR} alone; a projector by itself goes between the parts "
            "that it was trained for by connector: {from: FILE}"
        )
    if select not in _SELECT:
        reasons.append(f"it selects {select} features; known: {', '.join(_SELECT)}")
    if ratio not in ("square", "pad", "anyres") or (ratio == "anyres" and merge != "spatial_unpad"):
        reasons.append(
            f"it shows pictures as {ratio} (merged: {merge}); known: square, pad, and anyres with spatial_unpad. Of "
            "LLaVA-OneVision take transformers' form, such as llava-hf/llava-onevision-qwen2-0.5b-ov-hf"
        )
    if raw.get("mm_use_im_start_end"):
        reasons.append("it writes words of its own around each picture (mm_use_im_start_end)")
    if raw.get("s2") or raw.get("vision_model_name_or_path2"):
        reasons.append("it looks at pictures at several scales, or with two encoders")
    if not tower:
        reasons.append("config.json names no vision tower")
    if reasons:
        raise OpticNerveError(f"{name} cannot be imported: {'; '.join(reasons)}", kind="unsupported")
    cls: Any = tf.LlavaNextConfig if ratio == "anyres" else tf.LlavaConfig
    grid = {"image_grid_pinpoints": [[h, w] for w, h in raw["image_grid_pinpoints"]]} if ratio == "anyres" else {}
    with wrap_errors("the configuration", name):
        vision, text = _vision_config(tower, raw), _text_config(raw)
        config = cls(
            vision_config=vision, text_config=text, vision_feature_layer=layer,
            vision_feature_select_strategy=_SELECT[select], projector_hidden_act="gelu",
            tie_word_embeddings=bool(text.tie_word_embeddings), **grid,
        )  # fmt: skip
    config.dtype = getattr(torch, str(raw.get("torch_dtype") or raw.get("dtype") or "float32"), torch.float32)
    return config


def read(name: str, raw: dict[str, Any], config: Any) -> Source:
    """Weights, in float32, and processor, in transformers' classes.

    Raises:
        OpticNerveError: pickles, or tensors that are missing, unexpected or of another shape.
    """
    folder = Path(hub.fetch(name))
    tower = str(raw.get("vision_model_name_or_path") or raw.get("mm_vision_tower")).split(":")[-1]
    with wrap_errors("the tokenizer", folder), hub.quiet():  # of the model type, which is none of transformers'
        tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    source = Source(name, None, None, [])
    state = renamed(read_tensors(name, folder))
    if not any(n.startswith("model.vision_tower.") for n in state):
        source.notes.append(f"the checkpoint holds no vision tower; {tower}'s own weights were taken")
        state |= {f"model.vision_tower.{n}": t for n, t in _tower_weights(tower).items()}
    source.model = _model(name, config, state)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT
        source.notes.append("the checkpoint has no chat template; LLaVA's own (its vicuna_v1) was put in")
    images = _image_processor(tower, raw, config)
    cls = tf.LlavaNextProcessor if config.model_type == "llava_next" else tf.LlavaProcessor
    source.processor = cls(
        images, tokenizer, patch_size=config.vision_config.patch_size, image_token=IMAGE_TOKEN,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(config.vision_config.model_type != "siglip_vision_model"),
    )  # fmt: skip
    return source


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names that transformers' LLaVA classes have for them."""
    found = {}
    for name, tensor in tensors.items():
        if _COMPUTED.fullmatch(name):
            continue
        for pattern, new in _RENAMED:
            if match := re.match(pattern, name):
                start = new(match) if callable(new) else new
                name = start + name[match.end() :]
                break
        found[name] = tensor
    return found


def _tower_weights(tower: str) -> dict[str, Tensor]:
    encoder = HFVisionEncoder.from_pretrained(tower)
    state: dict[str, Tensor] = encoder.model.state_dict()
    return state


def _model(name: str, config: Any, state: dict[str, Tensor]) -> Any:
    """transformers' LLaVA with these weights; Phi's head has a bias, which its own lacks."""
    stock: Any = getattr(tf, f"Llava{'Next' * (config.model_type == 'llava_next')}ForConditionalGeneration")

    class WithBias(stock):  # type: ignore[misc]
        lm_head: nn.Linear

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            head = self.lm_head
            self.lm_head = nn.Linear(head.in_features, head.out_features, bias=True)

    cls = WithBias if "lm_head.bias" in state else stock
    with no_bars(), wrap_errors("the weights", name):
        loaded: Any = cls.from_pretrained(
            None, config=copy.deepcopy(config), state_dict=state, dtype=torch.float32, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    model, report = loaded
    if listing := list_problems(report):
        raise OpticNerveError(f"the weights of {name} are not those of its config.json: {listing}", kind="mismatch")
    return model.eval()


def _vision_config(tower: str, raw: dict[str, Any]) -> Any:
    config = hub.read_config(tower) if not raw.get("vision_config") else None
    if config is not None:
        return getattr(config, "vision_config", config)
    given = dict(raw["vision_config"])
    return tf.AutoConfig.for_model(given.pop("model_type"), **given)


def _text_config(raw: dict[str, Any]) -> Any:
    if TINY in raw["architectures"]:
        given = dict(raw["text_config"])
        return tf.AutoConfig.for_model(given.pop("model_type"), **given)
    [kind] = [_LANGUAGE[c] for c in raw["architectures"] if c in _LANGUAGE][:1]
    foreign = ("mm_", "tune_", "freeze_", "unfreeze_", "image_", "use_mm", "vision_", "pretrain_mm")
    kept = {
        k: v for k, v in raw.items()
        if not k.startswith(foreign) and k not in ("model_type", "architectures", "torch_dtype", "dtype")
    }  # fmt: skip
    return tf.AutoConfig.for_model(kind, **kept)


def _image_processor(tower: str, raw: dict[str, Any], config: Any) -> Any:
    """The vision tower's own preparation, behind LLaVA's padding where the model was trained with it."""
    vision = config.vision_config
    how = preparation(tower, vision.model_type, {})
    size = int(how.get("image_size", vision.image_size))
    colours = {"mean": how["mean"], "std": how["std"], "resample": how["resample"]}
    if config.model_type == "llava_next":
        square = {"height": size, "width": size}
        return tf.LlavaNextImageProcessor(
            size={"shortest_edge": size}, crop_size=square, image_mean=how["mean"], image_std=how["std"],
            resample=how["resample"], image_grid_pinpoints=config.image_grid_pinpoints,
        )  # fmt: skip
    if raw.get("image_aspect_ratio") == "pad":
        return make_image_processor(size=size, fit="pad", **colours)
    return make_image_processor(size=size, fit=how["fit"], crop_pct=how.get("crop_pct", 1.0), **colours)
