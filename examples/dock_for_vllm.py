"""A small docked model for trying vLLM: a random eye and a random connector on SmolLM2-135M; nothing is trained.

    python examples/dock_for_vllm.py run                       # SigLIP × mlp × splice: what hf-llava expresses
    python examples/dock_for_vllm.py run --eye dinov2          # DINOv2 × pixel_shuffle: for the plugin
    opticnerve export run exported --to hf-llava               # or merged
    python examples/serve_with_vllm.py exported --vllm-python vllm/bin/python

What it says about pictures is nonsense, which is no hindrance: two engines must say the same nonsense.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import transformers

from opticnerve.models.vlm.build import dock

VISION_ENCODERS = {
    "siglip": ("siglip_vision_model", {"layer": -2}, "mlp"),
    "dinov2": ("dinov2", {}, "pixel_shuffle"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("to", type=Path, help="the new folder")
    parser.add_argument("--eye", choices=VISION_ENCODERS, default="siglip")
    given = parser.parse_args()
    kind, options, connector = VISION_ENCODERS[given.vision_encoder]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, hidden_size=192, intermediate_size=384, num_hidden_layers=4, num_attention_heads=3, image_size=112,
        patch_size=14,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as vision_encoder:
        transformers.MODEL_MAPPING[type(config)](config).save_pretrained(vision_encoder)
        side = {"height": 112, "width": 112}
        transformers.SiglipImageProcessor(size=side).save_pretrained(vision_encoder)
        made = dock(
            {"type": "hf_vision", "name": vision_encoder, **options}, connector, "starter/smollm2-135m-instruct"
        )
        with torch.no_grad():
            made.model.image.connector.output_scale.fill_(0.1)  # about as large as a word's embedding
        made.model.save_pretrained(given.to)
        made.processor.save_pretrained(given.to)


if __name__ == "__main__":
    main()
