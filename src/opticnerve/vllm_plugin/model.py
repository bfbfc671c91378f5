"""A docked model in vLLM: our towers before vLLM's own class of the language model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from opticnerve.language.chat_template import AUDIO_TOKEN, IMAGE_TOKEN
from opticnerve.models.vlm.tower import Tower, build_tower
from opticnerve.vllm_plugin.processing import DummyInputs, Info, Processor
from opticnerve.vllm_plugin.towers import check, check_tower, language_sizes, load_towers


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=DummyInputs)
class OpticNerveInVLLM(nn.Module, SupportsMultiModal):
    """`language_model` is vLLM's; `image` and `audio` are the same `Tower`s as in `OpticNerveForConditionalGeneration`.

    Tensors keep the names that `save_pretrained` gave them. Towers stand whole on every device.
    """

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return {"image": IMAGE_TOKEN, "audio": AUDIO_TOKEN}.get(modality)

    def __init__(self: Any, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        self.config = model_config.hf_config
        check(self.config, model_config.model)
        text = self.config.text_config
        trusted = model_config.trust_remote_code
        self._how = {"dtype": model_config.dtype, "trust_remote_code": trusted}
        modalities = list(self.config.towers)
        tokens = [self.config.token_id(m) for m in modalities]
        # Placeholders may lie beyond the language model's table: vLLM then looks up another row, to be overwritten.
        self.configure_mm_token_handling(vocab_size=text.vocab_size, mm_token_ids=tokens)
        sizes = language_sizes(text)
        for modality in modalities:
            with self._mark_tower_model(vllm_config, modality):
                tower = build_tower(self.config.towers[modality], sizes, trust_remote_code=trusted)
                check_tower(modality, tower)
                setattr(self, modality, tower.requires_grad_(False))
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config, hf_config=text, prefix=maybe_prefix(prefix, "language_model")
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, **kwargs: object) -> list[Tensor]:
        """Soft tokens of each picture or sound: (tokens, language width), in the order in which they came.

        Args:
            kwargs: what `Processor` made, of one modality at a time: `pixel_values` (tiles, 3, H, W) and perhaps
                `image_sizes` (images, 2), or `input_features` (windows, mels, frames) and `audio_windows` (sounds,).
        """
        found: list[Tensor] = []
        if kwargs.get("pixel_values") is not None:
            sizes: Any = kwargs.get("image_sizes")
            sizes = None if sizes is None else _joined(sizes).reshape(-1, 2)
            found += self._soft("image", kwargs["pixel_values"], sizes)
        if kwargs.get("input_features") is not None:
            windows = self._soft("audio", kwargs["input_features"], None)
            counts: Any = kwargs["audio_windows"]
            for count in _joined(counts).reshape(-1).tolist():
                found.append(torch.cat(windows[:count]))
                windows = windows[count:]
        return found

    def _soft(self, modality: str, media: object, sizes: Tensor | None) -> list[Tensor]:
        soft = getattr(self, modality)(_joined(media), sizes)
        return [tokens_ND[mask_N] for tokens_ND, mask_N in zip(soft.tokens_BND, soft.mask_BN, strict=True)]

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None, **kwargs: object,
    ) -> Tensor | IntermediateTensors:  # fmt: skip
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        logits_BLV: Tensor | None = self.language_model.compute_logits(hidden_states)
        return logits_BLV

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Every tensor of the folder to its place; the towers' must all be there, in their shapes, and no other."""
        # A modality whose limit is 0 has no tower: vLLM was told to leave it out.
        here = {m for m in self.config.towers if isinstance(getattr(self, m), Tower)}
        state: dict[str, Tensor] = {}

        def others() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                first = name.partition(".")[0]
                if first in here:
                    state[name] = tensor
                elif first not in self.config.towers:
                    yield name, tensor

        loaded = set(AutoWeightsLoader(self).load_weights(others()))
        device = next(self.language_model.parameters()).device
        for modality, tower in load_towers(self.config, state, here, **self._how).items():
            setattr(self, modality, tower.to(device))
            loaded |= {f"{modality}.{name}" for name, _ in tower.named_parameters()}
        return loaded


def _joined(given: Any) -> Tensor:
    """vLLM hands a batch over as one tensor where shapes agree, else as a list of them."""
    return given if isinstance(given, Tensor) else torch.cat(list(given))
