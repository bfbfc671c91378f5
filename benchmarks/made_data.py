"""Data from nowhere: random conversations, pictures of noise, and a tokenizer in which a word is a token."""

from __future__ import annotations

import math
import random
from typing import Any

from shapes import Shape


def samples(
    shape: Shape, count: int, *, question: tuple[int, int], answer: tuple[int, int], seed: int = 0, images: int = 1
) -> list[Any]:
    """Random conversations as `Encoded`: the pictures' placeholders, a question, an answer that
    is learned. `question`, `answer`: least and most tokens, drawn log-uniformly, as captions and chats are skewed."""
    from opticnerve.data.encode.tokenize import IGNORE, Encoded

    rng = random.Random(seed)

    def words(least: int, most: int) -> list[int]:
        length = round(math.exp(rng.uniform(math.log(least), math.log(most))))
        return [rng.randrange(8, shape.language_part.vocabulary - 1) for _ in range(length)]

    made = []
    for number in range(count):
        soft = [shape.language_part.image_token_id] * (shape.vision_encoder.tokens * images)
        asked, said = words(*question), words(*answer)
        labels = [IGNORE] * len(soft + asked) + said
        made.append(Encoded([*soft, *asked, *said], labels, [], id=str(number), media_end=len(soft)))
    return made


def pixels(shape: Shape, count: int, dtype: Any, *, seed: int = 0) -> Any:
    """Noise (count, 3, H, W): what pictures are when they come out of an image processor."""
    import torch

    return torch.randn(
        count, 3, shape.vision_encoder.image, shape.vision_encoder.image, generator=torch.Generator().manual_seed(seed)
    ).to(dtype)  # fmt: skip


def pictures(shape: Shape, count: int) -> list[Any]:
    """Pictures of noise, of the size that the eye wants."""
    import numpy as np
    import PIL.Image

    side = (shape.vision_encoder.image, shape.vision_encoder.image, 3)
    return [PIL.Image.fromarray(np.random.default_rng(i).integers(0, 256, side, dtype=np.uint8)) for i in range(count)]


def tokenizer(vocabulary: int) -> Any:
    """A word a token: `w8`, `w9`, …; the last one is the picture's placeholder."""
    import transformers as tf
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    special = ["<pad>", "</s>", "<unk>"]
    known = [*special, "USER", "ASSISTANT", ":"]
    known += [f"w{i}" for i in range(len(known), vocabulary - 1)]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*known, "<image>"])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in [*special, "<image>"]])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def processor(shape: Shape) -> Any:
    """Pictures and words for either side, Vicuna's form of chat."""
    from opticnerve.encoders.base import make_image_processor
    from opticnerve.models.vlm.processing import OpticNerveProcessor

    prepared = make_image_processor(size=shape.vision_encoder.image, mean=[0.5] * 3, std=[0.5] * 3)
    words = tokenizer(shape.language_part.vocabulary)
    return OpticNerveProcessor(image_processor=prepared, tokenizer=words, num_image_tokens=shape.vision_encoder.tokens)
