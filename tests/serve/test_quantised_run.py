"""A run over weights in 4 or 8 bits, loaded as it was trained or in fewer bits by the caller, asked and served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from served import chat, image, serving

import tiny
from opticnerve.cli.main import main
from opticnerve.inference.generate import Answerer
from opticnerve.inference.load import load_model
from opticnerve.language.lora import is_lora
from opticnerve.language.quantization import quantized_layers
from opticnerve.models import OpticNerveForConditionalGeneration
from opticnerve.models.vlm.build import dock
from opticnerve.types import ask

pytestmark = pytest.mark.usefixtures("private_cache")
CONFIGS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "int8": {"load_in_8bit": True},
}  # fmt: skip


@pytest.mark.parametrize("trained", [True, False], ids=["trained so", "loaded so"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_asked_and_served(
    kind: str, trained: bool, language_folder: Callable[..., str], vision_folder: Callable[..., str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip("bitsandbytes")
    vision = {"type": "hf_vision", "name": vision_folder(), **({"quantize": "int8"} if trained else {})}
    made = dock(vision, "mlp", {"name": language_folder(), **({"quantize": kind} if trained else {})})
    made.lora = {"rank": 4}
    made.model.give_lora(made.lora)
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if is_lora(name) or ".connector." in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    made.save(tmp_path / "run", [n for n, _ in made.model.named_parameters() if is_lora(n)])
    config = None if trained else CONFIGS[kind]
    model = OpticNerveForConditionalGeneration.from_pretrained(tmp_path / "run", quantization_config=config)
    assert {layer.kind for layer in quantized_layers(model.language_model).values()} == {kind}
    picture = tiny.picture(0, 40)
    wanted = "".join(Answerer(model, made.processor).stream(ask("what is it?", picture), max_new_tokens=8))
    with serving(model, made.processor) as live:
        reply = live.post(**chat("what is it?", image(0)), max_tokens=8, temperature=0).json()
    assert reply["choices"][0]["message"]["content"] == wanted
    if not trained:
        return
    loaded, _ = load_model(tmp_path / "run", device="cpu")
    assert quantized_layers(loaded).keys() == quantized_layers(made.model).keys()
    assert quantized_layers(loaded.image)
    picture.save(tmp_path / "picture.png")
    with pytest.raises(SystemExit) as left:
        main(
            [
                "ask",
                str(tmp_path / "run"),
                "what is it?",
                "--image",
                str(tmp_path / "picture.png"),
                "--max-new-tokens",
                "8",
            ]
        )
    assert not left.value.code
    assert wanted.strip() in capsys.readouterr().out
