"""What it changes that a connector is scaled to what Gemma's embedding module gives, not to its table.

    python benchmarks/embedding_scale.py [--widths 32,256] [--seeds 5]

A Gemma 2 of two layers and random weights learns with its connector, from the first step, to name the colours of made
pictures; counted are the steps until the loss is under 0.1, with soft tokens as the module gives words, and √width
smaller, as the table has them. One core, no GPU: about a minute.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import PIL.Image
import torch
import transformers as tf

from opticnerve.data.collators.next_token import Collator
from opticnerve.data.encode.packing import pack
from opticnerve.data.encode.tokenize import encode
from opticnerve.fusion.base import words_of
from opticnerve.language.load import resolve
from opticnerve.models.vlm.build import dock
from opticnerve.objectives.next_token import batch_logits
from opticnerve.types import ask

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 70, 210), "yellow": (230, 210, 50)}
LOSS, MOST = 0.1, 1000


def language(folder: Path, width: int) -> str:
    words = tf.AutoTokenizer.from_pretrained(resolve("starter/smollm2-135m-instruct")[0])
    config = tf.Gemma2Config(
        vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=max(8, width // 4), eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id, bos_token_id=words.bos_token_id,
    )  # fmt: skip
    tf.Gemma2ForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def steps(folder: Path, width: int, seed: int, *, table: bool) -> int:
    torch.manual_seed(seed)
    spec = {"name": language(folder / f"{width}-{seed}", width), "chat_template": "chatml"}
    vision = {"type": "patches", "image_size": 32, "patch_size": 8}
    model, processor = dock(vision=vision, language=spec, seed=seed)
    samples = [ask("which colour?", PIL.Image.new("RGB", (32, 32), rgb), answer=name) for name, rgb in COLOURS.items()]
    batch = Collator(processor)([pack([[encode(s, processor)]]) for s in samples])
    embeddings = model.get_input_embeddings()
    _, scale = words_of(embeddings)
    if table:
        scale = float(embeddings.weight.float().std())
    with torch.no_grad():
        model.image.connector.calibrate(model.image.encode(batch.media["pixel_values"]), scale)
        tokens_BND = model.get_image_features(batch.media["pixel_values"])
        print(f"  soft tokens at {float(tokens_BND.std()) / words_of(embeddings)[1]:.3f} of the words' deviation")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    targets_M = batch.targets.flatten()[batch.learned_M]
    for step in range(1, MOST + 1):
        loss = torch.nn.functional.cross_entropy(batch_logits(model, batch), targets_M)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < LOSS:
            return step
    return MOST


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", default="32,256")
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    for width in map(int, given.widths.split(",")):
        ratios = []
        for seed in range(given.seeds):
            with tempfile.TemporaryDirectory() as folder:
                module, table = (steps(Path(folder), width, seed, table=t) for t in (False, True))
            print(f"width {width}, seed {seed}: {module} steps, with the table's scale {table}", flush=True)
            ratios.append(module / table)
        print(f"width {width}: {statistics.median(ratios):.2f} of the steps (median of {given.seeds} seeds)")


if __name__ == "__main__":
    main()
