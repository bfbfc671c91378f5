"""What an encoder promises (`opticnerve.encoders.base.Encoder`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opticnerve.encoders.base import Encoder
from opticnerve.encoders.native import cut_patches
from opticnerve.testing.contract import COMMON, SAME, Broken, Subject, apply, difference, expect, stir, through_json
from opticnerve.types import Features, OpticNerveError


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

    native = part.native
    # Pictures that keep their shape are upright here, and take all of the budget.
    grid = (native.max_patches // native.multiple, native.multiple) if native is not None else (0, 0)
    shape = (3, *(n * native.patch_size for n in grid)) if native is not None else part.media_shape

    def inputs(count: int) -> tuple[Tensor, ...]:
        return (torch.randn(count, *shape, generator=torch.Generator().manual_seed(count)),)

    def run(encoder: Encoder, media: Tensor) -> Features:
        if native is None:
            return encoder(media)  # type: ignore[no-any-return]
        patches_PE = cut_patches(media, native.patch_size).flatten(0, 1)
        return encoder(patches_PE, [grid] * len(media))  # type: ignore[no-any-return]

    subject = Subject(
        part=part,
        rebuild=lambda: type(part)(**through_json(part.options)),
        inputs=inputs,
        run=run,
        size=part.hidden_size,
        unused=unused,
        fullgraph=fullgraph,
    )
    prepares = prepares_its_media if native is None else keeps_shapes
    rules = (is_an_encoder, *COMMON, prepares, names_its_weights, lists_its_blocks)
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


def keeps_shapes(s: Subject) -> None:
    """With `native`, `image_processor()` gives the patches of pictures of any shape and their sizes, as many as the
    layout counts; `forward` gives each picture as many real tokens as its grid has, whatever stands beside it."""
    encoder, pictures = s.part, [_picture(50, 30), _picture(40, 70)]
    made = encoder.image_processor()(pictures, return_tensors="pt")
    sizes = made["image_sizes"].tolist()
    expect(sizes == [[30, 50], [70, 40]], f"image_sizes are {sizes}, not each picture's height and width")
    grids = [encoder.native.grid(*size) for size in sizes]
    counts = [rows * columns for rows, columns in grids]
    wanted = (sum(counts), *encoder.media_shape)
    expect(tuple(made["pixel_values"].shape) == wanted, f"patches of {tuple(made['pixel_values'].shape)}, not {wanted}")
    with torch.no_grad():
        out = encoder(made["pixel_values"], grids)
        expect(out.grids is not None, "features without grids")
        for i, patches_PE in enumerate(made["pixel_values"].split(counts)):
            tokens_ND, (rows, columns) = out.tokens_BND[i][out.mask_BN[i]], out.grids[i]
            expect(len(tokens_ND) == rows * columns, f"{len(tokens_ND)} real tokens in a grid of {rows} × {columns}")
            gap = difference(encoder(patches_PE, [grids[i]]).tokens_BND[0], tokens_ND)
            expect(gap <= SAME, f"picture {i} alone and beside one of another shape differ by {gap:.1e}")


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
