"""What a language model's weights take in memory in bf16, in int8 and in nf4: bytes of the tensors, and of the process.

    python benchmarks/quantized.py
    python benchmarks/quantized.py --quick     # tiny, to see that it runs

Llama's shape with random weights, of 0.5B parameters; what a layer takes depends on its shape alone. The head and the
embeddings stay in bf16, so the larger the vocabulary beside the layers, the less the whole shrinks.
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

import psutil
import torch
import transformers as tf
from side_by_side import machine

from opticnerve.language.layers import decoder_layers
from opticnerve.language.quantization import quantize, quantized_layers
from opticnerve.recipe import Quantize
from opticnerve.train.setup import give_memory_back

SHAPE = {"hidden_size": 1280, "intermediate_size": 3456, "num_hidden_layers": 24, "vocab_size": 32_000}
TINY = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 500}


def build(shape: dict[str, int]) -> Any:
    """A model in bf16."""
    config = tf.LlamaConfig(**shape, num_attention_heads=shape["hidden_size"] // 64, tie_word_embeddings=True)
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu").tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model


def measure(shape: dict[str, int], kind: Quantize | None) -> dict[str, Any]:
    """Bytes of the decoder's linear layers, of all weights, and by which the process has grown."""
    before = resident()
    model = build(shape)
    start = f"{decoder_layers(model)[0]}."
    if kind is not None:
        quantize(model, kind, "language", start)
    layers = [m for n, m in model.named_modules() if n.startswith(start) and isinstance(m, torch.nn.Linear)]
    assert kind is None or len(layers) == len(quantized_layers(model))
    inside = sum(t.nbytes for layer in layers for t in (*layer.parameters(), *layer.buffers()))
    whole = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for layer in layers for b in layer.buffers())
    return {"layers": inside, "all": whole, "process": resident() - before}


def resident() -> int:
    """Bytes of this process, without what it has let go of."""
    gc.collect()
    give_memory_back()
    return int(psutil.Process().memory_info().rss)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true")
    shape = TINY if parser.parse_args(arguments).quick else SHAPE
    kinds: tuple[Quantize | None, ...] = (None, "int8", "nf4")
    found = {kind or "bf16": measure(shape, kind) for kind in kinds}
    print(f"{machine()}\n\n| weights | linear layers | all weights | the process |\n|---|---:|---:|---:|")
    for name, sizes in found.items():
        shares = (f"{size / 1e6:,.0f} MB ({size / found['bf16'][what]:.2f})" for what, size in sizes.items())
        print(f"| {name} | {' | '.join(shares)} |")
    return found


if __name__ == "__main__":
    main()
