"""Docked models by transformers' conventions; importing this registers them with the Auto classes."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from opticnerve.models.configuration import OpticNerveConfig
from opticnerve.models.modeling import OpticNerveForConditionalGeneration
from opticnerve.models.processing import OpticNerveProcessor

AutoConfig.register("opticnerve", OpticNerveConfig, exist_ok=True)
AutoModelForImageTextToText.register(OpticNerveConfig, OpticNerveForConditionalGeneration, exist_ok=True)
AutoProcessor.register(OpticNerveConfig, OpticNerveProcessor, exist_ok=True)

__all__ = ["OpticNerveConfig", "OpticNerveForConditionalGeneration", "OpticNerveProcessor"]
