"""Prompts, pictures and sounds, as vLLM's processing wants them: `OpticNerveProcessor` does the work.

vLLM tokenises the prompt itself and replaces each placeholder by as many as its picture or sound takes; the processor
is asked for tensors alone, item by item, so that vLLM may keep them in a cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from opticnerve.encoders.native import NativeLayout
from opticnerve.models.vlm.configuration import OpticNerveConfig
from opticnerve.models.vlm.processing import OpticNerveProcessor

# The side of a profiling picture where its size changes nothing: the processor resizes it anyway.
ANY_SIDE = 224


class Info(BaseProcessingInfo):
    """What a docked model takes, and how many tokens it makes of it."""

    def get_hf_config(self) -> OpticNerveConfig:
        config: OpticNerveConfig = self.ctx.get_hf_config(OpticNerveConfig)
        return config

    def get_hf_processor(self, **kwargs: object) -> OpticNerveProcessor:
        processor: OpticNerveProcessor = self.ctx.get_hf_processor(OpticNerveProcessor, **kwargs)
        return processor

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return dict.fromkeys(self.get_hf_config().towers)

    def get_data_parser(self) -> MultiModalDataParser:
        extractor = self.get_hf_processor().feature_extractor
        rate = None if extractor is None else extractor.sampling_rate
        return MultiModalDataParser(target_sr=rate, target_channels=None if rate is None else 1)


class DummyInputs(BaseDummyInputsBuilder[Info]):
    """The largest inputs of a kind, with which vLLM measures memory before it serves."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return _placeholders(self.info.get_hf_processor(), mm_counts.get("image", 0), mm_counts.get("audio", 0))

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        """Of pictures that which takes the most tokens; of sounds one window, for only the context bounds how many."""
        data: dict[str, Any] = {}
        processor = self.info.get_hf_processor()
        if pictures := mm_counts.get("image", 0):
            sizes = (processor.tiling or {}).get("pinpoints") or [(ANY_SIDE, ANY_SIDE)]
            if processor.native is not None:
                sizes = [NativeLayout(**processor.native).costliest]
            height, width = map(int, max(sizes, key=lambda size: processor.image_placeholders(*size)))
            data["image"] = self._get_dummy_images(
                width=width, height=height, num_images=pictures, overrides=mm_options.get("image")
            )
        if sounds := mm_counts.get("audio", 0):
            length = int(processor.feature_extractor.n_samples)
            data["audio"] = self._get_dummy_audios(length=length, num_audios=sounds, overrides=mm_options.get("audio"))
        return data


def _placeholders(processor: OpticNerveProcessor, pictures: int, sounds: int) -> str:
    return str(processor.image_token) * pictures + str(processor.audio_token) * sounds


class Processor(BaseMultiModalProcessor[Info]):
    """Items to tensors, and placeholders to as many as each item takes."""

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        """`pixel_values` (and `image_sizes`, where sizes count), `input_features` and how many of their windows
        are each sound's."""
        processor = self.info.get_hf_processor(**hf_kwargs)
        sounds: Any = hf_data.get("audio")
        data = {k: v for k, v in hf_data.items() if k in ("images", "audio")}
        pictures: Any = data.get("images")
        text = _placeholders(processor, len(pictures or ()), len(sounds or ()))
        made = self.info.ctx.call_hf_processor(processor, {"text": text, **data}, hf_kwargs)
        kept = {k: v for k, v in made.items() if k in ("pixel_values", "image_sizes", "input_features")}
        if sounds is not None:
            kept["audio_windows"] = torch.tensor([processor.audio_windows(len(np.asarray(s))) for s in sounds])
        return BatchFeature(kept)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        processor = self.info.get_hf_processor(**hf_processor_mm_kwargs)
        fields = {}
        if "pixel_values" in hf_inputs:
            fields["pixel_values"] = MultiModalFieldConfig.batched("image")
        if "image_sizes" in hf_inputs and processor.counts_by_size:
            tiles = torch.tensor([processor.image_pieces(*size) for size in hf_inputs["image_sizes"].tolist()])
            fields["pixel_values"] = MultiModalFieldConfig.flat_from_sizes("image", tiles)
            fields["image_sizes"] = MultiModalFieldConfig.batched("image")
        if "input_features" in hf_inputs:
            fields["input_features"] = MultiModalFieldConfig.flat_from_sizes("audio", hf_inputs["audio_windows"])
            fields["audio_windows"] = MultiModalFieldConfig.batched("audio")
        return fields

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        processor = self.info.get_hf_processor(**hf_processor_mm_kwargs)

        def picture(item: int) -> list[int]:
            size = out_mm_kwargs["image"][item]["image_sizes"].data.tolist() if processor.counts_by_size else (0, 0)
            return [processor.image_token_id] * processor.image_placeholders(*size)

        def sound(item: int) -> list[int]:
            windows = int(out_mm_kwargs["audio"][item]["audio_windows"].data)
            return [processor.audio_token_id] * (int(processor.num_audio_tokens or 0) * windows)

        takes = {"image": (processor.image_token_id, picture), "audio": (processor.audio_token_id, sound)}
        return [
            PromptReplacement(modality=modality, target=[token], replacement=replacement)
            for modality, (token, replacement) in takes.items()
            if token is not None
        ]
