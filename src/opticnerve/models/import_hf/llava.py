"""LLaVA-1.5 (Liu et al. 2024, Improved Baselines with Visual Instruction Tuning), LLaVA-NeXT and LLaVA-OneVision (Li et
al. 2024) of transformers: a vision transformer cut at a hidden layer × mlp × splice, the latter two with tiling."""

from __future__ import annotations

import copy
import re
from typing import Any

from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel

from opticnerve.connectors.mlp import MLPConnector
from opticnerve.encoders.hf_vision import HFVisionEncoder
from opticnerve.fusion.base import Splice
from opticnerve.models.import_hf.source import (
    Source,
    adopt,
    make_encoder,
    make_language_model,
    make_processor,
    prefixed,
)
from opticnerve.models.vlm.processing import OpticNerveProcessor
from opticnerve.models.vlm.tiling import Tiling, TilingImageProcessor
from opticnerve.models.vlm.tower import Tower, language_sizes
from opticnerve.types import OpticNerveError

# Vision transformers that take square pictures of one size. (Pixtral, Qwen2-VL's and SigLIP 2 NaFlex take any.)
VISION = ("clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers", "vit")
TILED = ("llava_next", "llava_onevision")
_BUDGET = re.compile(r"anyres_max_(\d+)")  # LLaVA-OneVision's `vision_aspect_ratio`


def refuse(config: PreTrainedConfig) -> list[str]:
    """What of a LLaVA cannot be imported, by its configuration."""
    reasons, vision = [], config.vision_config
    if vision.model_type not in VISION:
        reasons.append(
            f"its vision tower is {vision.model_type}, for which there is no encoder of fixed, square pictures here; "
            f"known: {', '.join(VISION)}"
        )
    elif not isinstance(vision.image_size, int) or not isinstance(vision.patch_size, int):
        reasons.append(f"its vision tower takes oblong pictures ({vision.image_size}) or patches ({vision.patch_size})")
    if config.model_type == "llava_onevision" and not _BUDGET.fullmatch(config.vision_aspect_ratio):
        reasons.append(f"its vision_aspect_ratio is {config.vision_aspect_ratio}; known is anyres_max_N alone")
    return reasons


def convert(source: Source) -> tuple[Any, Tower, OpticNerveProcessor]:
    """Language model, tower and processor."""
    config, theirs = source.config, source.model.model
    language = make_language_model(
        theirs.language_model, source.model.lm_head, config.text_config, tied=bool(config.tie_word_embeddings)
    )
    language.generation_config = source.model.generation_config
    encoder = _encoder(source, theirs.vision_tower)
    sizes = language_sizes(language)
    connector = MLPConnector(
        in_size=encoder.hidden_size, in_tokens=encoder.num_tokens, out_size=sizes["language_size"], depth=2,
        activation=config.projector_hidden_act, bias=config.multimodal_projector_bias, calibrate=False,
    )  # fmt: skip
    mlp = theirs.multi_modal_projector
    adopt(connector, {**prefixed(mlp.linear_1, "layers.0"), **prefixed(mlp.linear_2, "layers.2")})
    tiling = _tiling(source, encoder, sizes["language_size"]) if config.model_type in TILED else None
    tower = Tower(encoder, connector, Splice(**sizes), tiling)
    images = copy.deepcopy(source.processor.image_processor)
    tokenizer = copy.deepcopy(source.processor.tokenizer)
    template = source.processor.chat_template
    if template is None and tokenizer.chat_template is None:
        source.notes.append("the checkpoint has no chat template; a plain one (USER: … ASSISTANT: …) was put in")
    if config.model_type == "llava_onevision":
        source.notes.append(
            "of several pictures in one conversation each is cut into tiles, as alone; transformers' chat template "
            "makes one padded square of each there (its processor, given a flat list, does as here)"
        )
    made = make_processor(
        source, tower, tokenizer, chat_template=template,
        image_processor=images if tiling is None else _tile_images(images),
    )  # fmt: skip
    return language, tower, made


def prompts(source: Source, processor: OpticNerveProcessor, question: str, pictures: int) -> tuple[str, str]:
    """One question in their form and in ours, which are the same."""
    text = f"USER: {source.image_token * pictures}\n{question} ASSISTANT:"
    return text, text


def ready(source: Source) -> None:
    """Old checkpoints leave it to the model's configuration how many placeholders the processor writes."""
    processor, config = source.processor, source.config
    if config.model_type == "llava_onevision":
        if processor.num_image_tokens is None:
            processor.num_image_tokens = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    elif processor.patch_size is None:
        processor.patch_size = config.vision_config.patch_size
    if processor.vision_feature_select_strategy is None:
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = 1


def _encoder(source: Source, vision: PreTrainedModel) -> HFVisionEncoder:
    """The vision tower, with LLaVA's `vision_feature_layer` and `vision_feature_select_strategy`."""
    config = source.config
    strategy, layer = config.vision_feature_select_strategy, config.vision_feature_layer
    encoder = make_encoder(source, vision, layer=layer, class_token="keep" if strategy == "full" else "drop_first")
    if strategy == "default" and encoder.prefix_tokens == 1:
        encoder = make_encoder(source, vision, layer=layer, class_token="drop")
    elif strategy == "default" and config.model_type in TILED:
        raise OpticNerveError(
            f"{source.name}: vision_feature_select_strategy 'default' leaves out the first token, and its vision tower "
            f"({vision.config.model_type}) has {encoder.prefix_tokens} class and register tokens, not 1; "
            "what is left is no map of the picture, and tiles are put side by side",
            kind="unsupported",
        )
    if config.model_type in TILED and strategy == "full" and encoder.prefix_tokens:
        raise OpticNerveError(
            f"{source.name}: vision_feature_select_strategy 'full' keeps {encoder.prefix_tokens} tokens that belong to "
            f"no place in the picture, and {config.model_type} puts the tokens of its tiles side by side",
            kind="unsupported",
        )
    return encoder


def _tiling(source: Source, encoder: HFVisionEncoder, width: int) -> Tiling:
    """LLaVA-NeXT's tiles, with its learnt row end; LLaVA-OneVision's within its budget."""
    config, processor = source.config, source.processor
    pinpoints = [list(map(int, p)) for p in config.image_grid_pinpoints]
    theirs = [list(map(int, p)) for p in processor.image_processor.image_grid_pinpoints]
    if pinpoints != theirs:
        raise OpticNerveError(
            f"{source.name}: config.json cuts pictures by image_grid_pinpoints {pinpoints}, its image processor by "
            f"{theirs}; make them the same",
            kind="mismatch",
        )
    options: dict[str, Any] = {"pinpoints": pinpoints}
    if config.model_type == "llava_onevision":
        if config.vision_aspect_ratio != processor.vision_aspect_ratio:
            raise OpticNerveError(
                f"{source.name}: config.json says vision_aspect_ratio {config.vision_aspect_ratio}, its processor "
                f"{processor.vision_aspect_ratio}; make them the same",
                kind="mismatch",
            )
        budget = _BUDGET.fullmatch(config.vision_aspect_ratio)
        assert budget is not None  # `refuse` has seen to it
        options["max_tiles"] = int(budget[1])
    tiling = Tiling.from_options(
        options, tile_size=encoder.image_size, language_width=width,
        grid=encoder.image_size // int(config.vision_config.patch_size),
    )  # fmt: skip
    adopt(tiling, {"newline": source.model.model.image_newline})
    return tiling


def _tile_images(images: BaseImageProcessor) -> TilingImageProcessor:
    options = {k: v for k, v in images.to_dict().items() if k in TilingImageProcessor.valid_kwargs.__annotations__}
    if options.get("crop_size") is None:  # LLaVA-OneVision's, whose tile is its `size`
        options |= {"crop_size": options["size"], "do_center_crop": False}
    return TilingImageProcessor(**options)
