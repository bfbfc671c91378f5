"""InternVL (Chen et al. 2024; Zhu et al. 2025), Idefics3 (Laurençon et al. 2024) and SmolVLM (Marafioti et al. 2025)
of transformers: a vision transformer × pixel_shuffle × splice, with tiles that are read one by one, words among them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import BaseImageProcessor, PerceptionLMImageProcessor, PreTrainedConfig

from opticnerve.connectors.mlp import PixelShuffleConnector
from opticnerve.encoders.base import make_image_processor
from opticnerve.encoders.hf_vision import HFVisionEncoder, Layer
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
from opticnerve.models.vlm.splitting import PictureWords
from opticnerve.models.vlm.tiling import Tiling
from opticnerve.models.vlm.tower import Tower, language_sizes
from opticnerve.types import OpticNerveError


def refuse(config: PreTrainedConfig) -> list[str]:
    """What of these models cannot be imported, by its configuration."""
    reasons, vision = [], config.vision_config
    sides = {*_pair(vision.image_size)}, {*_pair(vision.patch_size)}
    if any(len(s) != 1 for s in sides):
        reasons.append(f"its vision tower takes oblong pictures ({vision.image_size}) or patches ({vision.patch_size})")
    if config.model_type == "internvl":
        if abs(1 / config.downsample_ratio - round(1 / config.downsample_ratio)) > 1e-6:
            reasons.append(f"its downsample_ratio is {config.downsample_ratio}, no whole number's part")
        if config.vision_feature_select_strategy != "default":
            reasons.append(
                f"its vision_feature_select_strategy is {config.vision_feature_select_strategy}: a class token has no "
                "place in a square map"
            )
        if isinstance(config.vision_feature_layer, list):
            reasons.append(f"it joins layers {config.vision_feature_layer}, which transformers' class cannot run")
    return reasons


def convert(source: Source) -> tuple[Any, Tower, OpticNerveProcessor]:
    """Language model, tower and processor."""
    config, theirs = source.config, source.model.model
    internvl = config.model_type == "internvl"
    language = make_language_model(
        theirs.language_model if internvl else theirs.text_model, source.model.lm_head, config.text_config,
        tied=bool(config.tie_word_embeddings),
    )  # fmt: skip
    language.generation_config = source.model.generation_config
    if internvl:
        layer: Layer = "last" if config.vision_feature_layer == -1 else config.vision_feature_layer
        encoder = make_encoder(source, theirs.vision_tower, layer=layer, class_token="drop")
    else:
        encoder = make_encoder(
            source, theirs.vision_model, layer="last", class_token="drop", images=_whole_pictures(source)
        )
    sizes = language_sizes(language)
    connector = _connector(source, encoder, sizes["language_size"])
    tokenizer, template = copy.deepcopy(source.processor.tokenizer), source.processor.chat_template
    if (images := _whole_pictures(source)) is not None:
        tower = Tower(encoder, connector, Splice(**sizes))
        made = make_processor(source, tower, tokenizer, chat_template=template, image_processor=images)
        return language, tower, made
    tiling = _tiling(source, encoder, connector, sizes["language_size"])
    tower = Tower(encoder, connector, Splice(**sizes), tiling)
    made = make_processor(
        source, tower, tokenizer, chat_template=template, picture_words=asdict(_words(source)),
        image_processor=tiling.image_processor(source.processor.image_processor),
    )  # fmt: skip
    return language, tower, made


def _whole_pictures(source: Source) -> BaseImageProcessor | None:
    """The image processor of a folder that `opticnerve export --to hf-idefics3` wrote, where pictures are squares and
    no words stand around them; None for Idefics3's own."""
    images = source.processor.image_processor
    if not isinstance(images, PerceptionLMImageProcessor):
        return None
    made: BaseImageProcessor = make_image_processor(
        size=images.tile_size, mean=list(images.image_mean), std=list(images.image_std), resample=int(images.resample)
    )
    return made


def _connector(source: Source, encoder: HFVisionEncoder, width: int) -> PixelShuffleConnector:
    config, theirs = source.config, source.model.model
    ends: dict[str, Any] = {"in_size": encoder.hidden_size, "in_tokens": encoder.num_tokens, "out_size": width}
    if config.model_type == "internvl":
        connector = PixelShuffleConnector(
            **ends, scale=round(1 / config.downsample_ratio), depth=2, activation=config.projector_hidden_act,
            calibrate=False,
        )  # fmt: skip
        mlp = theirs.multi_modal_projector
        places = {"layers.0": mlp.layer_norm, "layers.1": mlp.linear_1, "layers.3": mlp.linear_2}
    else:
        connector = PixelShuffleConnector(**ends, scale=config.scale_factor, depth=1, calibrate=False)
        places = {"layers.0": theirs.connector.modality_projection.proj}
    adopt(connector, {name: p for place, module in places.items() for name, p in prefixed(module, place).items()})
    return connector


def _tiling(source: Source, encoder: HFVisionEncoder, connector: PixelShuffleConnector, width: int) -> Tiling:
    images = source.processor.image_processor
    options: dict[str, Any]
    if source.config.model_type == "internvl":
        options = {"type": "internvl", "min_tiles": int(images.min_patches), "max_tiles": int(images.max_patches)}
        side = _pair(images.size.height)[0]
    else:
        longest = images.size.longest_edge if images.do_resize else None
        options = {"type": "idefics3", "longest_side": longest, "split": bool(images.do_image_splitting)}
        if images.do_resize and longest is None:
            raise OpticNerveError(
                f"{source.name} resizes pictures to {dict(images.size)}; known is longest_edge alone",
                kind="unsupported",
            )
        side = dict(images.max_image_size)["longest_edge"]
    if side != encoder.image_size:
        raise OpticNerveError(
            f"{source.name}: its image processor makes tiles of {side} px, its vision tower takes {encoder.image_size}",
            kind="mismatch",
        )
    return Tiling.from_options(
        options, tile_size=encoder.image_size, tile_tokens=connector.num_tokens, grid=None, language_width=width
    )


def _words(source: Source) -> PictureWords:
    """What their processor writes among the placeholders."""
    theirs = source.processor
    if source.config.model_type == "internvl":
        return PictureWords(before=theirs.start_image_token, after=theirs.end_image_token)
    mark, whole = theirs.fake_image_token, theirs.global_image_tag
    return PictureWords(
        tile=f"{mark}<row_{{row}}_col_{{column}}>", row_end="\n", thumbnail=f"\n{mark}{whole}", alone=f"{mark}{whole}",
        after=mark,
    )  # fmt: skip


def prompts(source: Source, processor: OpticNerveProcessor, question: str, pictures: int) -> tuple[str, str]:
    """One question in their form and in ours, which are the same."""
    text = f"User: {source.image_token * pictures}{question}\nAssistant:"
    return text, text


def ready(source: Source) -> None:
    """Theirs know all that they need."""


def _pair(sides: int | Sequence[int]) -> tuple[int, ...]:
    return (sides, sides) if isinstance(sides, int) else tuple(sides)
