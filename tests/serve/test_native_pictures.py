"""Pictures in their own shape, served: several shapes at once, each answered as the model alone answers it."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from served import chat, serving

import tiny
from opticnerve.inference.generate import Answerer
from opticnerve.inference.load import load_model
from opticnerve.models.vlm.build import dock
from opticnerve.types import ask

pytestmark = pytest.mark.usefixtures("private_cache")
SHAPES = [(30, 90), (100, 40), (33, 31), (16, 200)]


def picture(height: int, width: int) -> PIL.Image.Image:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def sent(given: PIL.Image.Image) -> dict[str, Any]:
    data = io.BytesIO()
    given.save(data, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"},
    }


@pytest.mark.parametrize("family", ["siglip2_vision_model", "qwen2_5_vl_vision", "pixtral"])
def test_a_run_is_served_as_it_was_trained(family: str, language_folder: Callable[..., str], tmp_path: Path) -> None:
    made = dock(tiny.native_vision(family, max_patches=24), "pixel_shuffle", language_folder())
    with torch.no_grad():
        made.model.image.connector.layers[0].weight.mul_(5)
    (tmp_path / "run").mkdir()
    made.save(tmp_path / "run", [n for n, _ in made.model.named_parameters() if n.startswith("image.connector")])
    model, processor = load_model(str(tmp_path / "run"))
    asked = [ask("what is it?", picture(*shape)) for shape in SHAPES] + [ask("how many?", picture(*SHAPES[0]))]
    answerer = Answerer(made.model, made.processor)
    wanted = ["".join(answerer.stream(c, max_new_tokens=8)) for c in asked]
    assert len(set(wanted)) > 2
    bodies = [chat(c.messages[0].text, sent(c.images[0].source)) for c in asked]  # type: ignore[arg-type]
    with serving(model, processor) as live, ThreadPoolExecutor(len(bodies)) as pool:
        replies = list(pool.map(lambda body: live.post(**body, max_tokens=8, temperature=0).json(), bodies))
    assert [reply["choices"][0]["message"]["content"] for reply in replies] == wanted
