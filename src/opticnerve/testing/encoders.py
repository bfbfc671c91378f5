"""What an encoder promises (`opticnerve.encoders.base.Encoder`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opticnerve.encoders.base import Encoder
from opticnerve.testing.contract import COMMON, Broken, Subject, apply, expect, stir, through_json
from opticnerve.types import OpticNerveError


def check_encoder(make: Callable[[], Encoder], *, unused: tuple[str, ...] = (), fullgraph: bool = True) -> None:
    """Run an encoder through its contract.

    Args:
        make: builds a small one with random weights: `lambda: MyEncoder(width=16, image_size=32)`.
        unused: beginnings of names of parameters that take no part in the forward pass (a pooling head; the layers
            behind the one that is read), or are no weights (a table of sinusoids).
        fullgraph: False where the forward pass depends on numbers that it computes (`.item()`): `torch.compile` then
            may need several graphs, and a device without numbers is not tried.

    Raises:
        ContractError: the message lists every broken promise.
    """
    part = make().eval()
    stir(part)

    def inputs(count: int) -> tuple[Tensor, ...]:
        return (torch.randn(count, *part.media_shape, generator=torch.Generator().manual_seed(count)),)

    subject = Subject(
        part=part,
        rebuild=lambda: type(part)(**through_json(part.options)),
        inputs=inputs,
        run=lambda encoder, media: encoder(media),
        size=part.hidden_size,
        unused=unused,
        fullgraph=fullgraph,
    )
    rules = (is_an_encoder, *COMMON, prepares_its_media, names_its_weights, lists_its_blocks)
    apply(rules, subject, type(part).__name__)


def is_an_encoder(s: Subject) -> None:
    """An encoder is an `opticnerve.encoders.base.Encoder` with `modality` image or audio, whole numbers `hidden_size`
    and `num_tokens`, and a `media_shape` of whole numbers: one piece of media without the batch."""
    e = s.part
    expect(isinstance(e, Encoder), f"{type(e).__name__} is no Encoder")
    expect(e.modality in ("image", "audio"), f"modality is {e.modality!r}")
    for name in ("hidden_size", "num_tokens"):
        value = getattr(e, name, None)
        expect(isinstance(value, int) and value > 0, f"{name} is {value!r}")
    shape = e.media_shape
    expect(all(isinstance(n, int) and n > 0 for n in shape), f"media_shape is {shape!r}")


def prepares_its_media(s: Subject) -> None:
    """`image_processor()` turns a picture of any size into `pixel_values` of `media_shape`; for sound,
    `feature_extractor()` turns a wave at its `sampling_rate` into `input_features` of `media_shape`."""
    if s.part.modality == "image":
        pictures = [_picture(50, 30), _picture(40, 70)]
        made = s.part.image_processor()(pictures, return_tensors="pt")["pixel_values"]
    else:
        extractor = s.part.feature_extractor()
        waves = [torch.randn(n).numpy() for n in (extractor.sampling_rate, extractor.sampling_rate // 2)]
        made = extractor(waves, sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_features"]
    expect(tuple(made.shape) == (2, *s.part.media_shape), f"two pieces were made {tuple(made.shape)}")
    expect(bool(s.out(made).tokens_BND.isfinite().all()), "of prepared media, tokens are not finite")


def _picture(width: int, height: int) -> object:
    import PIL.Image

    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)
    return PIL.Image.fromarray(pixels.numpy())


def names_its_weights(s: Subject) -> None:
    """`take_name` splits a recipe's options into what names the weights and the rest; where `needs_name`, options
    without a name are an OpticNerveError. What `loading_options` keeps of `options` is plain keywords."""
    cls = type(s.part)
    if cls.needs_name:
        try:
            cls.take_name({})
        except OpticNerveError:
            pass
        else:
            raise Broken("needs_name is True, and options without a name are taken")
    kept = cls.loading_options(s.part.options)
    strange = set(kept) - set(s.part.options)
    expect(not strange, f"loading_options invents {', '.join(sorted(strange))}")


def lists_its_blocks(s: Subject) -> None:
    """`blocks()` lists the encoder's blocks from input to output, modules that share no weight (`encoder.last(N)`
    trains the last N). Without weights the list is empty; where there are weights and no blocks, it is an
    OpticNerveError."""
    own = {id(p) for p in s.part.parameters()}
    try:
        blocks = s.part.blocks()
    except OpticNerveError:
        expect(bool(own), "blocks() raises, and there are no weights: give an empty list")
        return
    expect(bool(blocks) == bool(own), f"{len(own)} weights and {len(blocks)} blocks")
    inside = [id(p) for block in blocks for p in block.parameters()]
    expect(set(inside) <= own, "blocks() lists weights that are not the encoder's")
    expect(len(set(inside)) == len(inside), "two blocks share a weight")
    expect(all(any(True for _ in block.parameters()) for block in blocks), "a block has no weights")
