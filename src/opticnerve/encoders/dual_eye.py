"""The vision encoder of a trained `DualEncoder`, to be docked onto a language model: CLIP's way to LLaVA, with one's
own vision encoder.

In a recipe: `encoder: {type: dual_encoder, name: FOLDER}`. Only the encoder is taken; the projection into the space
shared with words stays behind, for the connector takes its place.
Source: Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision; Liu et al. 2023,
Visual Instruction Tuning, section 4.1, where such a vision encoder meets a language model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from opticnerve import registry
from opticnerve.common import hub
from opticnerve.common.cache import weight_files
from opticnerve.encoders.base import Encoder
from opticnerve.types import Features, OpticNerveError

_PREFIX = "image.encoder."


class DualEncoderVision(Encoder):
    """The encoder inside, with the weights that contrastive training gave it.

    Args:
        encoder: `{"type": …, options}` of the encoder inside. In a recipe, beside `name`, what shall differ from how it
            was trained, such as `{layer: -2}`.
    """

    def __init__(self, *, encoder: dict[str, Any], _encoder: Encoder | None = None) -> None:
        super().__init__()
        self.inner = _encoder if _encoder is not None else _build(encoder)
        self.hidden_size, self.num_tokens = self.inner.hidden_size, self.inner.num_tokens
        self.image_size = self.inner.image_size
        self.options = {"encoder": {"type": encoder["type"], **self.inner.options}}
        self.files = []

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> DualEncoderVision:
        """`name`: a folder that `DualEncoder.save_pretrained` wrote, or its hub name. options: `encoder`, as above.

        Raises:
            OpticNerveError: there is no `DualEncoder`, or weights of its vision encoder are missing or left over.
        """
        folder = Path(hub.fetch(name))
        spec = _spec(folder, options.get("encoder"))
        inner = _build(spec)
        files = weight_files(folder)
        state: dict[str, Tensor] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                state |= {k.removeprefix(_PREFIX): opened.get_tensor(k) for k in opened.keys() if k.startswith(_PREFIX)}  # noqa: SIM118
        problems = [f"missing {n}" for n in inner.state_dict() if n not in state]
        problems += [f"left over {n}" for n in state if n not in inner.state_dict()]
        problems += [
            f"{n} is {tuple(state[n].shape)}, not {tuple(t.shape)}"
            for n, t in inner.state_dict().items()
            if n in state and state[n].shape != t.shape
        ]
        if problems:
            raise OpticNerveError(
                f"the vision encoder in {name} does not fit its config.json: {'; '.join(problems[:8])}"
            )
        inner.load_state_dict(state)
        vision_encoder = cls(encoder=spec, _encoder=inner)
        vision_encoder.files = files
        return vision_encoder.eval()

    @classmethod
    def planned(cls, name: str, **options: Any) -> DualEncoderVision:
        """The same shapes from the configuration alone."""
        with torch.device("cpu"):
            spec = _spec(Path(hub.fetch(name, weights=False)), options.get("encoder"))
        return cls(encoder=spec)

    def forward(self, media: Tensor) -> Features:
        return self.inner(media)

    def image_processor(self) -> Any:
        return self.inner.image_processor()

    def blocks(self) -> list[nn.Module]:
        return self.inner.blocks()


def _build(spec: dict[str, Any]) -> Encoder:
    options = {k: v for k, v in spec.items() if k != "type"}
    encoder: Encoder = registry.encoders.get(spec["type"], allow_dotted=False)(**options)
    return encoder


def _spec(folder: Path, changes: dict[str, Any] | None) -> dict[str, Any]:
    """How the encoder inside is built: as it was saved, with what a recipe changes."""
    try:
        saved: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))["image"]["encoder"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise OpticNerveError(f"{folder} holds no DualEncoder (its config.json names no image encoder): {e!r}") from e
    changes = changes or {}
    if changes.get("type", saved["type"]) != saved["type"]:
        raise OpticNerveError(f"the vision encoder in {folder} is of type {saved['type']!r}, not {changes['type']!r}")
    if unknown := sorted(set(changes) - set(saved)):
        raise OpticNerveError(f"encoder {saved['type']!r} takes no {', '.join(unknown)}; it takes {', '.join(saved)}")
    return {**saved, **changes}
