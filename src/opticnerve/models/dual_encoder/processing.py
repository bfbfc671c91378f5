"""`DualEncoderProcessor`: captions and pictures to tensors for a `DualEncoder`."""

from __future__ import annotations

from typing import Any, Literal

from transformers import BaseImageProcessor, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_utils import ImageInput

from opticnerve.encoders.text import HFTextEncoder


class DualEncoderProcessor(ProcessorMixin):
    """An image processor and a tokenizer, by transformers' conventions.

    Args:
        image_processor: turns pictures into `pixel_values` as the vision encoder wants them.
        tokenizer: the text encoder's.
        max_length: tokens of a caption that are read; longer ones are cut.
        padding: "longest" of the batch, or "max_length" always, as SigLIP was trained.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int = 77,
        padding: Literal["longest", "max_length"] = "longest",
        **kwargs: Any,
    ) -> None:
        self.max_length, self.padding = max_length, padding
        super().__init__(image_processor, tokenizer)  # type: ignore[no-untyped-call]

    @classmethod
    def of(cls, image_processor: BaseImageProcessor, text_encoder: HFTextEncoder, **options: Any) -> Any:
        """The processor that an image processor and a text encoder (with its tokenizer) make."""
        reader = text_encoder
        return cls(image_processor, reader.tokenizer, reader.max_length, reader.padding, **options)

    def __call__(self, images: ImageInput | None = None, text: str | list[str] | None = None, **kwargs: Any) -> Any:
        """Pictures to `pixel_values`, captions to `input_ids` and `attention_mask`; either may be left out."""
        if text is not None:
            kwargs = {"padding": self.padding, "max_length": self.max_length, "truncation": True, **kwargs}
        return super().__call__(images=images, text=text, **kwargs)
