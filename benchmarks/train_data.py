"""Drawn pictures and words for benchmarks/train.py, the same for every side."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import shapes

# Least and most tokens of a question and of its answer, drawn log-uniformly, as captions and chats are skewed; turns.
WORDS = {"align": ((0, 0), (8, 48), 1), "instruct": ((8, 40), (4, 160), 4)}
_WORDS = """a the small red blue green dog cat house tree on under near with and man woman child stands sits runs
over field street table window light dark old new two three white black sky water mountain road car boat plays holds
looks large wooden round bright quiet open morning evening happy yellow bird horse train bridge garden kitchen"""
VOCABULARY = _WORDS.split()


def tokenizer(size: int) -> Any:
    """A byte-level BPE tokenizer of at most `size` tokens over the words above, ChatML for its template: no hub."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from opticnerve.language.chat_template import CHATML

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=min(size, 2000), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special,
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator([" ".join(VOCABULARY), "user\nassistant\n"], trainer)
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=CHATML, **ends)


def processor(shape: shapes.Shape) -> Any:
    """Words and pictures to tensors, for the shape's eye; no weight is built."""
    from transformers import CLIPImageProcessor

    from opticnerve.models.vlm.processing import OpticNerveProcessor

    side = shape.vision_encoder.image
    pictures = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    words = tokenizer(shape.language_part.vocabulary - 4)
    return OpticNerveProcessor(image_processor=pictures, tokenizer=words, num_image_tokens=shape.vision_encoder.tokens)


def write(folder: Path, stage: str, count: int) -> Path:
    """JPEG files and a data file about them; returns the data file."""
    import numpy as np
    import PIL.Image

    rng = random.Random(0)
    asked, said, most_turns = WORDS[stage]

    def speak(bounds: tuple[int, int]) -> str:
        length = round(math.exp(rng.uniform(math.log(bounds[0]), math.log(bounds[1]))))
        return " ".join(rng.choice(VOCABULARY) for _ in range(length))

    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        noise_HWC = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        PIL.Image.fromarray(noise_HWC).resize((320, 240)).save(folder / f"{number}.jpg", quality=90)
        picture = {"type": "image", "path": f"{number}.jpg"}
        if stage == "align":
            turns = [([picture], speak(said))]
        else:
            turns = [
                ([*([picture] if k == 0 else []), {"type": "text", "text": speak(asked)}], speak(said))
                for k in range(rng.randint(1, most_turns))
            ]
        messages = [
            m
            for ask, answer in turns
            for m in ({"role": "user", "content": ask}, {"role": "assistant", "content": answer})
        ]
        lines.append(json.dumps({"messages": messages}))
    file = folder / "data.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def template(stage: str) -> str | None:
    from opticnerve.language.chat_template import CAPTION_ONLY, with_parts

    return with_parts(CAPTION_ONLY) if stage == "align" else None


def encoded(file: Path, stage: str, processor: Any) -> list[Any]:
    """The samples, tokenised, with their labels: `opticnerve.data.encode.tokenize.Encoded`."""
    from opticnerve.data.dataset.load import load_examples
    from opticnerve.data.encode.tokenize import encode
    from opticnerve.recipe import DataSpec

    units = load_examples([DataSpec(path=str(file))])
    return [encode(c, processor, template=template(stage)) for conversations, _ in units for c in conversations]
