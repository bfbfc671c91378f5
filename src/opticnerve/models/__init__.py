"""Docked models by transformers' conventions; importing this registers them with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)

from opticnerve.encoders.native import NativeImageProcessor, NativeLayout
from opticnerve.models.classifier.configuration import FusionClassifierConfig
from opticnerve.models.classifier.modeling import FusionClassifier
from opticnerve.models.classifier.processing import FusionClassifierProcessor
from opticnerve.models.dual_encoder.configuration import DualEncoderConfig
from opticnerve.models.dual_encoder.modeling import DualEncoder
from opticnerve.models.dual_encoder.processing import DualEncoderProcessor
from opticnerve.models.vlm.backbone import OpticNerveModel
from opticnerve.models.vlm.configuration import OpticNerveConfig
from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
from opticnerve.models.vlm.processing import OpticNerveProcessor
from opticnerve.models.vlm.splitting import SplitImageProcessor, SplitLayout
from opticnerve.models.vlm.tiling import TilingImageProcessor

for config in (OpticNerveConfig, DualEncoderConfig, FusionClassifierConfig):
    AutoConfig.register(config.model_type, config, exist_ok=True)
AutoModelForImageTextToText.register(OpticNerveConfig, OpticNerveForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(OpticNerveConfig, OpticNerveForConditionalGeneration, exist_ok=True)
AutoModel.register(OpticNerveConfig, OpticNerveModel, exist_ok=True)
AutoModelForZeroShotImageClassification.register(DualEncoderConfig, DualEncoder, exist_ok=True)
AutoModel.register(DualEncoderConfig, DualEncoder, exist_ok=True)
AutoModel.register(FusionClassifierConfig, FusionClassifier, exist_ok=True)
AutoImageProcessor.register(
    OpticNerveConfig, image_processor_classes={"torchvision": TilingImageProcessor}, exist_ok=True
)
# Found by its name; beside another of the same configuration it would be taken for that one on another backend.
AutoImageProcessor.register(NativeLayout, image_processor_classes={"torchvision": NativeImageProcessor}, exist_ok=True)
AutoImageProcessor.register(SplitLayout, image_processor_classes={"torchvision": SplitImageProcessor}, exist_ok=True)
AutoProcessor.register(OpticNerveConfig, OpticNerveProcessor, exist_ok=True)
AutoProcessor.register(DualEncoderConfig, DualEncoderProcessor, exist_ok=True)
AutoProcessor.register(FusionClassifierConfig, FusionClassifierProcessor, exist_ok=True)

__all__ = [
    "DualEncoder", "DualEncoderConfig", "DualEncoderProcessor", "FusionClassifier", "FusionClassifierConfig",
    "FusionClassifierProcessor", "OpticNerveConfig", "OpticNerveForConditionalGeneration", "OpticNerveModel",
    "OpticNerveProcessor",
]  # fmt: skip
