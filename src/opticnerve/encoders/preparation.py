"""How a checkpoint prepares pictures, as an encoder's options: `image_size`, `fit`, `crop_pct`, `mean`, `std`,
`resample`; for pictures in their own shape `max_patches`.

Everything that transformers' image processor says is honoured, or refused by name. A scale other than 1/255 is put into
mean and deviation: (x · scale − mean) / std = (x / 255 − mean / (255 · scale)) / (std / (255 · scale)).
"""

from __future__ import annotations

from typing import Any

import transformers as tf
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from opticnerve.common import hub
from opticnerve.common.hub import UNREADABLE, says_how, unreadable
from opticnerve.types import OpticNerveError

COLOURS = ("mean", "std")
SETTLE = ("fit", *COLOURS)
_REMEDY = "give the encoder `fit`, `mean` and `std` yourself, or name a checkpoint that says"

# What the published checkpoints of a family hold, for folders that hold none: the defaults of transformers' class,
# which for DINOv2 are another model's.
_PUBLISHED: dict[str, Any] = {
    "clip_vision_model": lambda: tf.CLIPImageProcessor(),
    "siglip_vision_model": lambda: tf.SiglipImageProcessor(),
    "siglip2_vision_model": lambda: tf.Siglip2ImageProcessor(),
    "vit": lambda: tf.ViTImageProcessor(),
    "blip_2_vision_model": lambda: tf.BlipImageProcessor(),
    "instructblip_vision_model": lambda: tf.BlipImageProcessor(),
    "qwen2_vl_vision": lambda: tf.Qwen2VLImageProcessor(),
    "qwen2_5_vl_vision": lambda: tf.Qwen2VLImageProcessor(),
    "qwen3_vl_vision": lambda: tf.Qwen2VLImageProcessor(
        patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        size={"shortest_edge": 1 << 16, "longest_edge": 1 << 24},
    ),
    "pixtral": lambda: tf.PixtralImageProcessor(),
    "idefics2_vision": lambda: tf.Idefics2ImageProcessor(),
    "idefics3_vision": lambda: tf.Idefics3ImageProcessor(),
    "smolvlm_vision": lambda: tf.SmolVLMImageProcessor(),
    "dinov3_vit": lambda: tf.DINOv3ViTImageProcessor(),
    "dinov3_convnext": lambda: tf.DINOv3ViTImageProcessor(),
} | dict.fromkeys(
    ("dinov2", "dinov2_with_registers"),
    lambda: tf.BitImageProcessor(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224},
        image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD,
    ),
)  # fmt: skip

# These cut a picture into squares, or keep its proportions, before they resize and normalise as the others do. The
# encoder gets a square of the model's own size; cutting is `tiling`'s business here.
_PIECES = (
    "Siglip2ImageProcessor", "Idefics2ImageProcessor", "Idefics3ImageProcessor", "SmolVLMImageProcessor",
    "LlavaNextImageProcessor", "LlavaOnevisionImageProcessor", "GotOcr2ImageProcessor", "Gemma3ImageProcessor",
)  # fmt: skip
# Switches that are read below, or that change no pixel of one RGB picture.
_KNOWN = (
    "do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad", "do_convert_rgb", "do_reduce_labels",
    "do_image_splitting", "do_pan_and_scan", "do_sample_frames",
)  # fmt: skip


def preparation(name: str, family: str, given: dict[str, Any]) -> dict[str, Any]:
    """How the checkpoint `name` prepares pictures, as options of an encoder of that `family` (a `model_type`).

    Where the checkpoint holds no file for it, what the family's published checkpoints hold. `given`: options that the
    user chose; what these settle need not be there, and is not refused.

    Raises:
        OpticNerveError: the file cannot be read, is missing where the family has no habit, or asks for something that
            cannot be honoured.
    """
    if all(key in given for key in (*SETTLE, "image_size", "crop_pct", "resample")):
        return {}
    try:
        own, written = _own(name, family)
        found = as_options(own, name, given)
    except OpticNerveError:
        if all(key in given for key in SETTLE):
            return {}
        raise
    if not written:
        found.pop("image_size", None)  # the class's, not this model's
    return found


def _own(name: str, family: str) -> tuple[Any, bool]:
    """Its image processor, and whether the checkpoint holds one."""
    if says_how(name, "image_processor"):
        try:
            return tf.AutoImageProcessor.from_pretrained(hub.fetch(name, weights=False), trust_remote_code=False), True
        except UNREADABLE as e:
            raise unreadable(f"how {name!r} prepares pictures", e, _REMEDY) from e
    if family not in _PUBLISHED:
        raise OpticNerveError(
            f"{name!r} does not say how it prepares pictures (no preprocessor_config.json), and {family} has no one "
            f"way; {_REMEDY}",
            kind="missing-file",
        )
    return _PUBLISHED[family](), False


def as_options(own: Any, name: str, given: dict[str, Any] | None = None) -> dict[str, Any]:
    """What an image processor of transformers does, as an encoder's options.

    Raises:
        OpticNerveError: it does something that these options cannot say, and `given` does not say otherwise.
    """
    given = given or {}
    colours, problems = ({}, []) if all(k in given for k in COLOURS) else _colours(own)
    geometry, refused = _geometry(own)
    if given.get("fit") == "native":
        geometry = _budget(own)
    elif "fit" in given:  # its own crop belongs to its own way of fitting
        geometry = {k: v for k, v in geometry.items() if k == "image_size"}
    else:
        problems += refused
        if geometry.get("fit") == "squash_float" and not own.do_rescale:
            problems.append("do_rescale: false")
        if geometry.get("fit") == "pad" and not (own.do_normalize and _scale(own) == 1):
            problems.append("do_pad, which pads with the mean, without a plain normalisation")
        problems += [
            f"{k}: true" for k in dir(own) if k.startswith("do_") and k not in _KNOWN and getattr(own, k) is True
        ]
    if problems:
        raise OpticNerveError(
            f"{name!r} prepares pictures as an encoder here cannot ({type(own).__name__}: {'; '.join(problems)}); "
            f"{_REMEDY}",
            kind="unsupported",
        )
    resample = getattr(own, "resample", None)
    return {**geometry, **colours, "resample": 2 if resample is None else int(resample)}


def _budget(own: Any) -> dict[str, int]:
    """The budget of patches that it has of its own, where pictures keep their shape."""
    if (most := getattr(own, "max_num_patches", None)) is not None:
        return {"max_patches": int(most)}
    if isinstance(own, Qwen2VLImageProcessor):
        size: Any = own.size
        least, most = (n // own.patch_size**2 for n in (size.shortest_edge, size.longest_edge))
        return {"min_patches": least, "max_patches": most}
    return {}


def _scale(own: Any) -> float:
    """What pixels of 0 to 255 are multiplied by, in units of 1/255; exactly 1 as a rule."""
    scale = 255 * float(own.rescale_factor) if getattr(own, "do_rescale", False) else 255.0
    return 1.0 if abs(scale - 1) < 1e-6 else scale


def _colours(own: Any) -> tuple[dict[str, Any], list[str]]:
    mean, std = [0.0] * 3, [1.0] * 3
    if getattr(own, "do_normalize", False):
        try:
            mean, std = ([float(v) for v in getattr(own, f"image_{key}")] for key in COLOURS)
        except (TypeError, ValueError):
            return {}, ["image_mean, image_std: no lists of numbers"]
    scale = _scale(own)
    if len(mean) != 3 or len(std) != 3 or not scale or not all(std):
        return {}, ["image_mean, image_std, rescale_factor: not three channels, or a division by zero"]
    return {"mean": [v / scale for v in mean], "std": [v / scale for v in std]}, []


def _geometry(own: Any) -> tuple[dict[str, Any], list[str]]:
    kind = type(own).__name__.removesuffix("Fast").removesuffix("Pil")
    if not getattr(own, "do_resize", False):
        return {}, ["do_resize: false"]
    size, crop = own.size, own.crop_size if getattr(own, "do_center_crop", False) else None
    if kind in _PIECES:
        return {"fit": "crop" if crop else "squash", "crop_pct": 1.0}, []
    pads = kind == "LlavaImageProcessor" and bool(own.do_pad)
    exact = kind == "DINOv3ViTImageProcessor"
    inherits = getattr(type(own), "_preprocess", None) is TorchvisionBackend._preprocess
    if not (inherits or kind in ("LlavaImageProcessor", "DINOv3ViTImageProcessor")):
        return {}, ["code of its own"]
    if own.do_pad and not pads:
        return {}, ["do_pad: true"]
    shortest = size.shortest_edge if not size.longest_edge else None
    sides = {size.height, size.width} if size.height and size.width else {shortest}
    if crop is not None:
        out = {crop.height, crop.width}
    else:
        out = sides if pads or not shortest else {None}
    if len(sides) != 1 or len(out) != 1 or None in sides | out:
        return {}, [f"size: {dict(size)}" + (f", crop_size: {dict(crop)}" if crop is not None else "")]
    [side], [square] = sides, out
    if (exact and crop is not None) or (pads and side != square):
        return {}, [f"do_center_crop: true, crop_size: {square}"]
    fit = "pad" if pads else "squash_float" if exact else "crop" if shortest else "squash"
    return {"image_size": square, "fit": fit, "crop_pct": square / side}, []
