"""The short way from pictures to pixel values gives the image processors' own bits, or lets them do it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers as tf

from opticnerve.data.media.open import open_image
from opticnerve.data.media.transform import GAP, Bytes, open_for, pixels, steps
from opticnerve.encoders.base import make_image_processor
from opticnerve.encoders.patches import PatchesEncoder
from opticnerve.models.vlm.tiling import Tiling

SHAPES = [(48, 64), (65, 43), (32, 32), (9, 7), (6, 90), (100, 33), (31, 1)]
KNOWN = ["CLIPImageProcessor", "SiglipImageProcessor", "BitImageProcessor", "ViTImageProcessor", "BlipImageProcessor",
         "LlavaImageProcessor"]  # fmt: skip


def noise(height: int, width: int, seed: int = 0) -> PIL.Image.Image:
    random = np.random.default_rng((seed, height, width))
    return PIL.Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def own(processor: Any, pictures: list[PIL.Image.Image]) -> torch.Tensor:
    made: torch.Tensor = processor(pictures, return_tensors="pt")["pixel_values"]
    return made


def same(processor: Any) -> None:
    pictures = [noise(*shape) for shape in SHAPES]
    given = pixels(processor, pictures)
    assert list(given) == ["pixel_values"]
    assert given["pixel_values"].dtype == torch.float32
    assert torch.equal(given["pixel_values"], own(processor, pictures))
    compact = pixels(processor, pictures, compact=True)["pixel_values"]
    assert isinstance(compact, Bytes)
    assert compact.pixels_BCHW.dtype == torch.uint8
    assert torch.equal(compact.normalised("cpu"), given["pixel_values"])


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
def test_how_eyes_prepare_pictures(fit: str, resample: int) -> None:
    processor = make_image_processor(
        size=32, mean=[0.48, 0.45, 0.4], std=[0.26, 0.27, 0.28], fit=fit, resample=resample
    )
    assert steps(processor) is not None
    same(processor)


@pytest.mark.parametrize("name", KNOWN)
def test_transformers_own_processors(name: str) -> None:
    processor = getattr(tf, name)()
    assert steps(processor) is not None
    same(processor)


def test_registered_eyes(vision_folder: Any, timm_folder: Any) -> None:
    from opticnerve.encoders.hf_vision import HFVisionEncoder
    from opticnerve.encoders.timm import TimmEncoder

    vision_encoders = [HFVisionEncoder.from_pretrained(vision_folder(f)) for f in ("clip_vision_model", "dinov2")]
    for vision_encoder in [*vision_encoders, TimmEncoder.from_pretrained(timm_folder()), PatchesEncoder(image_size=60)]:
        assert steps(vision_encoder.image_processor()) is not None
        same(vision_encoder.image_processor())


class Odd(tf.CLIPImageProcessor):  # type: ignore[misc]
    def rescale_and_normalize(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        return super().rescale_and_normalize(255 - images, *args, **kwargs)


SMALL = {"height": 32, "width": 32}
LEFT = {
    "another resampling": lambda: tf.CLIPImageProcessor(resample=0),
    "no resizing": lambda: tf.SiglipImageProcessor(do_resize=False),
    "no normalising": lambda: tf.SiglipImageProcessor(do_normalize=False),
    "shapes that differ": lambda: tf.CLIPImageProcessor(do_center_crop=False),
    "a crop larger than the picture": lambda: tf.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=SMALL),
    "a longest edge": lambda: tf.CLIPImageProcessor(size={"shortest_edge": 24, "longest_edge": 32}, crop_size=SMALL),
    "a method of its own": lambda: Odd(),
    "patches of its own": lambda: tf.Siglip2ImageProcessor(),
    "another order": lambda: tf.ConvNextImageProcessor(),
    "Pillow": lambda: __import__("transformers.models.clip.image_processing_pil_clip", fromlist=["x"]).CLIPImageProcessorPil(),
    "tiles": lambda: tiling().image_processor(PatchesEncoder(image_size=60).image_processor()),
}  # fmt: skip


def tiling() -> Tiling:
    return Tiling.from_options({}, tile_size=60, grid=2, language_width=8)


@pytest.mark.parametrize("what", LEFT)
def test_a_processor_that_does_something_else_is_left_to_itself(what: str) -> None:
    assert steps(LEFT[what]()) is None


@pytest.mark.parametrize("what", ["a method of its own", "tiles"])
def test_left_to_itself_it_is_called(what: str) -> None:
    processor, pictures = LEFT[what](), [noise(48, 64), noise(70, 30)]
    given, wanted = pixels(processor, pictures, compact=True), processor(pictures, return_tensors="pt")
    assert set(given) == set(wanted) & {"pixel_values", "image_sizes"}
    assert all(torch.equal(given[k], torch.as_tensor(wanted[k])) for k in given)


def photo(folder: Path, width: int = 640, height: int = 480) -> Path:
    """1/f noise, as photos have."""
    random = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]) + 1 / width
    waves = np.exp(2j * np.pi * random.random((3, *frequency.shape))) / frequency
    grey_CHW = np.fft.irfft2(waves, (height, width))
    bytes_HWC = (grey_CHW / grey_CHW.std() * 45 + 120).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    PIL.Image.fromarray(bytes_HWC).save(folder / "photo.jpg", quality=90)
    return folder / "photo.jpg"


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
def test_a_photo_decoded_smaller_gives_nearly_the_same_pixels(fit: str, tmp_path: Path) -> None:
    processor = make_image_processor(size=64, mean=[0.5] * 3, std=[0.5] * 3, fit=fit)
    file = photo(tmp_path)
    small = open_for(processor, file)
    assert small.size == (320, 240)
    assert min(small.size) >= GAP * 64
    steps_BCHW = (own(processor, [small]) - own(processor, [PIL.Image.open(file)])).abs() * 127.5
    assert 0 < steps_BCHW.max() <= 8
    assert steps_BCHW.mean() < 1


@pytest.mark.parametrize("what", ["tiles", "patches of its own", "no resizing"])
def test_whoever_may_want_all_of_a_picture_gets_it(what: str, tmp_path: Path) -> None:
    assert open_for(LEFT[what](), photo(tmp_path)).size == (640, 480)


def test_a_picture_hardly_larger_than_the_eye_is_decoded_whole(tmp_path: Path) -> None:
    file = photo(tmp_path, 300, 200)
    processor = make_image_processor(size=64, mean=[0.5] * 3, std=[0.5] * 3)
    assert np.array_equal(open_for(processor, file), PIL.Image.open(file))
    buffer = io.BytesIO()
    noise(480, 640).save(buffer, "PNG")
    assert np.array_equal(open_for(processor, buffer.getvalue()), noise(480, 640))


def test_a_picture_is_opened_once_and_not_copied_again(tmp_path: Path) -> None:
    """The sampler opens a row's pictures, and the collator is given them."""
    file = tmp_path / "a.jpg"
    PIL.Image.effect_noise((64, 48), 50).convert("RGB").save(file, exif=turned())
    opened = open_for(None, file)
    assert open_for(None, opened) is opened
    assert open_image(opened) is not opened  # who may write to it gets one of their own
    clear = PIL.Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert open_for(None, clear).getpixel((0, 0)) == (255, 255, 255)


def turned() -> PIL.Image.Exif:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    return exif
