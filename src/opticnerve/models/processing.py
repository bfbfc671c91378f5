"""`OpticNerveProcessor`: words and pictures to tensors. It alone counts placeholders."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from opticnerve.language.chat_template import IMAGE_TOKEN, with_parts
from opticnerve.types import OpticNerveError


class OpticNerveProcessor(ProcessorMixin):
    """An image processor and a tokenizer, by transformers' conventions.

    Args:
        image_processor: turns a picture into `pixel_values` as the encoder wants them.
        tokenizer: the language model's; `image_token` is added to it if it has none, without touching the vocabulary
        that
            the language model knows.
        num_image_tokens: placeholders written for one picture: the connector's `num_tokens`.
        image_token: the word that stands for a picture in a prompt.
        chat_template: Jinja; the tokenizer's own, made to take pictures, by default.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        num_image_tokens: int = 1,
        image_token: str = IMAGE_TOKEN,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        assert tokenizer is not None
        if tokenizer.convert_tokens_to_ids(image_token) in (None, tokenizer.unk_token_id):
            tokenizer.add_special_tokens(
                {"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False
            )
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        template = chat_template or with_parts(tokenizer.chat_template)
        super().__init__(image_processor, tokenizer, chat_template=template)

    def replace_image_token(self, image_inputs: Any = None, image_idx: int = 0, **kwargs: Any) -> str:
        """The placeholders of one picture."""
        return self.image_token * self.num_image_tokens

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """Pictures and prompts to `input_ids`, `attention_mask` and `pixel_values`.

        Prompts of a batch are padded on the left, as generation needs, unless `padding_side` says otherwise.
        `truncation=True` with `max_length` cuts text from the end, but never through a picture: that is an error.
        """
        batched = isinstance(text, list | tuple) and len(text) > 1
        if batched or kwargs.get("padding"):
            kwargs.setdefault("padding", True)
            kwargs.setdefault("padding_side", "left")
        return super().__call__(images=images, text=text, **kwargs)

    def _check_special_mm_tokens(self, text: list[str], text_inputs: Any, modalities: list[str]) -> None:
        """transformers' hook after tokenisation; `text` has its placeholders written out."""
        rows = text_inputs["input_ids"]
        for prompt, row in zip(text, rows.tolist() if hasattr(rows, "tolist") else rows, strict=True):
            wanted = prompt.count(self.image_token)
            found = sum(token == self.image_token_id for token in row)
            if wanted != found:
                raise OpticNerveError(
                    f"truncation would cut through a picture: {found} of its {wanted} placeholders are left; "
                    f"raise max_length, or shorten the text before the picture"
                )
