"""`hf-llava-next`: stock transformers' `LlavaNextForConditionalGeneration`, for docks that cut pictures into tiles.

As `hf-llava`, with the learnt end of a row; tiles, their order and the placeholders are those of the class's own image
processor and processor. Source: Liu et al. 2024, LLaVA-NeXT; transformers' `LlavaNextModel.pack_image_features`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers as tf
from torch import Tensor

from opticnerve.export.hf.llava import HFLlava, strategy_of
from opticnerve.models.vlm.tiling import TileLayout

if TYPE_CHECKING:
    from opticnerve.encoders.base import Encoder
    from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
    from opticnerve.models.vlm.processing import OpticNerveProcessor
    from opticnerve.models.vlm.splitting import SplitLayout
    from opticnerve.models.vlm.tiling import Tiling


class HFLlavaNext(HFLlava):
    """CLIP or SigLIP, tiling of type anyres × linear or two-layer mlp × splice, on a decoder with a plain head."""

    model_class = "LlavaNextForConditionalGeneration"
    config_class = tf.LlavaNextConfig
    engine = "LLaVA-NeXT's class"
    native = ""
    tiles = True
    _layout: TileLayout | SplitLayout

    def picture_refusals(self, model: OpticNerveForConditionalGeneration) -> list[str]:
        layout = _tiling(model).spec
        alike = isinstance(layout, TileLayout) and layout.thumbnail and layout.newline and layout.unpad
        if alike and layout.options.get("max_tiles") is None:
            return []
        how = {k: v for k, v in layout.options.items() if k != "pinpoints"}
        return [
            f"its tiling is {how}, LLaVA-NeXT's has a thumbnail, a learnt end of each row, nothing of the padding and "
            "all of its tiles; nearest: tiling {type: anyres}"
        ]

    def config_options(self, model: OpticNerveForConditionalGeneration) -> dict[str, Any]:
        return {"image_grid_pinpoints": _tiling(model).options["pinpoints"]}

    def state(self, model: OpticNerveForConditionalGeneration, rows: int) -> dict[str, Tensor]:
        row_end_D = _tiling(model).newline
        assert row_end_D is not None
        return {**super().state(model, rows), "image_newline": row_end_D}

    def stock_processor(self, model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor) -> Any:
        encoder: Encoder = model.image.encoder
        self._layout = _tiling(model).spec
        kept, own = tf.LlavaNextImageProcessor.valid_kwargs.__annotations__, processor.image_processor.to_dict()
        return tf.LlavaNextProcessor(
            tf.LlavaNextImageProcessor(**{k: v for k, v in own.items() if k in kept}), processor.tokenizer,
            patch_size=encoder.patch_size, vision_feature_select_strategy=strategy_of(encoder),
            chat_template=processor.chat_template, image_token=processor.image_token,
            num_additional_image_tokens=encoder.prefix_tokens,
        )  # fmt: skip

    def pixels(self, theirs: Tensor, sizes: Tensor | None) -> Tensor:
        if sizes is None:
            return theirs
        pictures = zip(theirs, sizes.tolist(), strict=True)  # each filled up with tiles of zeros
        return torch.cat([tiles_TCSS[: self._layout.num_pieces(*size)] for tiles_TCSS, size in pictures])


def _tiling(model: OpticNerveForConditionalGeneration) -> Tiling:
    """The tiles that `refuse` has seen to."""
    tiling = model.image.tiling
    assert tiling is not None
    return tiling
