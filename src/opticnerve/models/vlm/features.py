"""What becomes of media before the language model reads them: soft tokens, by transformers' conventions.

transformers' `generate` computes them once, before the prompt is read, and hands them to `forward` as
`mm_encoder_outputs`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from opticnerve.encoders.native import real
from opticnerve.models.vlm.tower import MEDIA_INPUT, Tower
from opticnerve.types import Features, OpticNerveError

_STATES = ("output_hidden_states", "output_attentions")


@dataclass
class SoftTokens(BaseModelOutputWithPooling):
    """What `get_image_features` and `get_audio_features` give. For one version it can still be asked what the tensor
    that they gave before could be (`.float()`, `.std()`, `.shape`): its `pooler_output` answers."""

    def __getattr__(self, name: str) -> Any:
        pooled = vars(self).get("pooler_output")
        # accelerate calls `to` on whatever has it, and would be left with the tensor.
        if name.startswith("_") or name == "to" or not hasattr(pooled, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        warnings.warn(f"soft tokens are in `pooler_output` now: ask it for {name}", DeprecationWarning, stacklevel=2)
        return getattr(pooled, name)


class MediaFeatures:
    """`get_image_features` and `get_audio_features` of a model with `towers`."""

    towers: Any
    config: Any

    @can_return_tuple  # type: ignore[untyped-decorator]
    def get_image_features(
        self, pixel_values: Tensor, image_sizes: Tensor | None = None, qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None, image_pools: Tensor | None = None, **kwargs: Any,
    ) -> SoftTokens:  # fmt: skip
        """(images, 3, H, W) → `pooler_output`, the soft tokens of each picture: (images, N, language width), where
        sizes count a list of (N, language width); `last_hidden_state`: what the encoder saw. The arguments: as for
        `forward`.

        Raises:
            OpticNerveError: a keyword that would change the answer of transformers' own models and that no encoder here
                takes.
        """
        given = {"pixel_values": pixel_values, "image_sizes": image_sizes, "qformer_input_ids": qformer_input_ids}
        given["image_pools"] = image_pools
        return self._features("image", {**given, "qformer_attention_mask": qformer_attention_mask}, kwargs)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def get_audio_features(self, input_features: Tensor, **kwargs: Any) -> SoftTokens:
        """(windows, mels, frames) → `pooler_output`, the soft tokens: (windows, N, language width), and
        `last_hidden_state`, what the encoder heard."""
        return self._features("audio", {"input_features": input_features}, kwargs)

    def _features(self, modality: str, media: dict[str, Any], kwargs: dict[str, Any]) -> SoftTokens:
        tower = self.towers.get(modality)
        if tower is None:
            raise OpticNerveError(f"the model has no {modality} encoder", kind="unsupported")
        asked = {k: bool(kwargs.pop(k, getattr(self.config, k, False))) for k in _STATES}
        _check_keywords(kwargs)
        given = media[MEDIA_INPUT[modality]]
        sizes = media.get("image_sizes")
        encoded = tower.encode(given, sizes)
        soft = self._soft(modality, tower, {**media, f"{modality}_features": encoded})
        assert soft is not None
        states = tower.encoder.states(tower.placed(given), **asked) if any(asked.values()) else {}
        # A list where sizes differ, as transformers' own models give it.
        pooled: Any = pooled_of(tower, soft, media.get("image_pools"))
        return SoftTokens(last_hidden_state=encoded.tokens_BND, pooler_output=pooled, **states)

    def _soft(self, modality: str, tower: Tower, media: dict[str, Any]) -> Features | None:
        features, given = media.get(f"{modality}_features"), media.get(MEDIA_INPUT[modality])
        known = (media.get("mm_encoder_outputs") or {}).get(modality)
        pools = media.get("image_pools") if modality == "image" else None
        if known is not None:
            return pooled_features(tower, known.pooler_output)
        sizes = media.get("image_sizes") if modality == "image" else None
        if features is None:
            if given is None:
                return None
            features = tower.encode(given, sizes)
        ids, mask = media.get("qformer_input_ids"), media.get("qformer_attention_mask")
        text = None if ids is None else (ids, torch.ones_like(ids) if mask is None else mask)
        return tower.connect(features, sizes, text, pools)


def pooled_of(tower: Tower, soft: Features, pools: Tensor | None = None) -> Tensor | list[Tensor]:
    """Soft tokens as `pooler_output` holds them: (pieces, N, D), or a list of (N, D) where a piece's size counts, or
    some are pooled."""
    if tower.layout is None and pools is None:
        return soft.tokens_BND
    return [tokens_ND[mask_N] for tokens_ND, mask_N in zip(soft.tokens_BND, soft.mask_BN, strict=True)]


def pooled_features(tower: Tower, pooled: Tensor | list[Tensor]) -> Features:
    """What `pooled_of` was made of, also where transformers has cut or repeated it meanwhile.

    Raises:
        OpticNerveError: pieces of a picture, for a fusion whose layers see a picture whole (`prefill_chunk_size` with
            cross-attention).
    """
    rows = [*pooled]
    seen_whole = tower.layout is None and tower.num_placeholders != tower.num_tokens
    if seen_whole and (wrong := {len(r) for r in rows} - {tower.num_tokens}):
        raise OpticNerveError(
            f"a picture has {tower.num_tokens} soft tokens, and {min(wrong)} were given: layers that see pictures "
            "whole cannot be given them in pieces; leave out prefill_chunk_size",
            kind="wrong-shape",
        )
    return Features(pad_sequence(rows, batch_first=True), real([len(r) for r in rows], rows[0]))


def _check_keywords(kwargs: dict[str, Any]) -> None:
    """Refuse what transformers' own models would honour and no encoder here does."""
    if asked := [k for k, v in kwargs.items() if v not in (None, False) and k not in ("return_dict",)]:
        raise OpticNerveError(
            f"{', '.join(asked)}: the encoders of a docked model take no such keyword; their layer and class token are "
            "set where the model is docked (`layer`, `class_token`)",
            kind="unknown-key",
        )
