"""Pictures in their own shape: the patches and features of transformers' own processor and model, nothing squashed."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from errors import refused
from opticnerve.connectors.mlp import PixelShuffleConnector
from opticnerve.data.media.open import image_size, open_image
from opticnerve.encoders.base import Encoder
from opticnerve.encoders.hf_vision import HFVisionEncoder
from opticnerve.encoders.native import Grid, NativeLayout, cut_patches, join_patches
from opticnerve.encoders.patches import PatchesEncoder
from opticnerve.encoders.qwen_vl import QwenVLEncoder
from opticnerve.encoders.timm import TimmEncoder
from opticnerve.models.vlm.build import Dock, dock
from opticnerve.types import Features

SIDES = [(30, 90), (100, 40), (33, 31), (8, 300), (64, 64)]


def picture(height: int, width: int, seed: int = 0) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


PICTURES = [picture(*size, seed) for seed, size in enumerate(SIDES)]


@pytest.fixture(params=tiny.NATIVE)
def encoder(request: pytest.FixtureRequest) -> Encoder:
    found: Encoder = tiny.load_native(request.param, max_patches=24)
    return found


def prepared(encoder: Encoder, pictures: list[PIL.Image.Image]) -> tuple[torch.Tensor, list[Grid]]:
    made = encoder.image_processor()(pictures, return_tensors="pt")
    assert encoder.native is not None
    return made["pixel_values"], [encoder.native.grid(*size) for size in made["image_sizes"].tolist()]


def test_a_batch_is_each_picture_alone(encoder: Encoder) -> None:
    seen = encoder(*prepared(encoder, PICTURES))
    assert seen.grids is not None
    for i, one in enumerate(PICTURES):
        alone = encoder(*prepared(encoder, [one]))
        assert alone.grids == (seen.grids[i],)
        count = seen.grids[i][0] * seen.grids[i][1]
        assert seen.mask_BN[i].sum() == count == alone.tokens_BND.shape[1]
        torch.testing.assert_close(seen.tokens_BND[i, :count], alone.tokens_BND[0], rtol=1e-5, atol=1e-5)


def test_gradients_reach_an_opened_encoder_from_every_picture(encoder: Encoder) -> None:
    patches, grids = prepared(encoder, PICTURES)
    patches.requires_grad_(True)
    seen = encoder(patches, grids)
    seen.tokens_BND[seen.mask_BN].square().sum().backward()
    pieces = patches.grad.split([r * c for r, c in grids])  # type: ignore[union-attr]
    assert all(g.isfinite().all() and g.any() for g in pieces)
    assert any(p.grad is not None and p.grad.any() for p in encoder.blocks()[0].parameters())


class TestSiglip2:
    """NaFlex, by transformers' own processor and model."""

    @pytest.fixture
    def flexible(self) -> HFVisionEncoder:
        return HFVisionEncoder.from_pretrained(tiny.save_native("siglip2_vision_model"), fit="native").eval()

    def test_patches_and_features_are_transformers_own(self, flexible: HFVisionEncoder) -> None:
        own = tiny.native_processor("siglip2_vision_model")(PICTURES, return_tensors="pt")
        patches, grids = prepared(flexible, PICTURES)
        assert grids == [tuple(shape) for shape in own["spatial_shapes"].tolist()]
        torch.testing.assert_close(patches, own["pixel_values"][own["pixel_attention_mask"].bool()], rtol=0, atol=0)
        with torch.no_grad():
            seen, theirs = flexible(patches, grids), flexible.model(**own).last_hidden_state
        kept = own["pixel_attention_mask"].bool()[:, : seen.mask_BN.shape[1]]
        assert torch.equal(seen.mask_BN, kept)
        wanted = theirs[:, : seen.mask_BN.shape[1]][kept]
        torch.testing.assert_close(seen.tokens_BND[seen.mask_BN], wanted, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("layer", [-2, [-1, -2]])
    def test_a_hidden_layer(self, layer: Any, flexible: HFVisionEncoder) -> None:
        cut = HFVisionEncoder.from_pretrained(
            tiny.save_native("siglip2_vision_model"), fit="native", layer=layer
        ).eval()
        own = tiny.native_processor("siglip2_vision_model")(PICTURES, return_tensors="pt")
        with torch.no_grad():
            states = flexible.model(**own, output_hidden_states=True).hidden_states
            for _ in range(2):  # from the second pass on it goes no further than what is read
                seen = cut(*prepared(cut, PICTURES))
                wanted = torch.cat([states[i] for i in ([layer] if isinstance(layer, int) else layer)], -1)
                wanted = wanted[own["pixel_attention_mask"].bool()]
                torch.testing.assert_close(seen.tokens_BND[seen.mask_BN], wanted, rtol=1e-5, atol=1e-5)

    def test_small_pictures_keep_their_size_where_the_budget_lets_them(self) -> None:
        made = HFVisionEncoder.from_pretrained(
            tiny.save_native("siglip2_vision_model"), fit="native", min_patches=4, max_patches=40
        )
        _, grids = prepared(made, [picture(17, 30), picture(8, 8), picture(400, 100)])
        assert grids == [(3, 4), (2, 2), (12, 3)]

    def test_its_options_build_it_again(self, flexible: HFVisionEncoder) -> None:
        again = HFVisionEncoder(**flexible.options)
        assert (again.native, again.options) == (flexible.native, flexible.options)


FULL = [picture(*size, seed) for seed, size in enumerate([(30, 90), (100, 40), (33, 31), (64, 64), (9, 12)])]


class TestQwenVL:
    """By transformers' own processor and model; the latter's window order and squares undone where nothing merges."""

    @pytest.fixture(params=tiny.QWEN_VL)
    def family(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    def test_counts_and_features_are_transformers_own(self, family: str) -> None:
        encoder = tiny.load_native(family)
        own = tiny.native_processor(family)(FULL, return_tensors="pt")
        patches, grids = prepared(encoder, FULL)
        assert grids == [(h, w) for _, h, w in own["image_grid_thw"].tolist()]
        with torch.no_grad():
            theirs = encoder.model(own["pixel_values"], grid_thw=own["image_grid_thw"])
            seen = encoder(patches, grids)
        assert seen.grids == tuple((h // 2, w // 2) for h, w in grids)
        torch.testing.assert_close(seen.tokens_BND[seen.mask_BN], theirs.pooler_output, rtol=1e-5, atol=1e-5)

    def test_unmerged_it_is_a_map_that_pixel_shuffle_merges(self, family: str) -> None:
        """The merger behind the unmerged map gives what the tower merges itself."""
        encoder, unmerged = tiny.load_native(family), tiny.load_native(family, merge=False)
        given = prepared(encoder, PICTURES)
        with torch.no_grad():
            whole, parts = encoder(*given), unmerged(*given)
            assert parts.grids == tuple(given[1])
            for i, (height, width) in enumerate(given[1]):
                map_HWD = parts.tokens_BND[i][parts.mask_BN[i]].view(height // 2, 2, width // 2, 2, -1)
                merged = encoder.model.merger(map_HWD.transpose(1, 2).flatten(0, 3))
                torch.testing.assert_close(whole.tokens_BND[i][whole.mask_BN[i]], merged, rtol=1e-5, atol=1e-5)

    def test_deepstack_is_joined_behind_the_last_layer(self) -> None:
        encoder, joined = (tiny.load_native("qwen3_vl_vision", deepstack=deep) for deep in (False, True))
        given = prepared(encoder, FULL)
        own = tiny.native_processor("qwen3_vl_vision")(FULL, return_tensors="pt")
        with torch.no_grad():
            theirs = encoder.model(own["pixel_values"], grid_thw=own["image_grid_thw"])
            seen, wide = encoder(*given), joined(*given)
        assert joined.hidden_size == 3 * encoder.hidden_size
        wanted = torch.cat([seen.tokens_BND[seen.mask_BN], *theirs.deepstack_features], -1)
        torch.testing.assert_close(wide.tokens_BND[wide.mask_BN], wanted, rtol=1e-5, atol=1e-5)

    def test_what_does_not_go_together(self) -> None:
        with refused("conflict", "deepstack", "qwen2_vl_vision"):
            tiny.load_native("qwen2_vl_vision", deepstack=True)
        with refused("conflict", "squash"):
            tiny.load_native("qwen2_vl_vision", fit="squash")
        with refused("unsupported", "qwen2_vl_vision", "hf_vision"):
            QwenVLEncoder.from_pretrained(tiny.save_native("dinov2"))
        with refused("out-of-range", 2, 3, 4):  # squares of 2 × 2
            tiny.load_native("qwen2_vl_vision", min_patches=2, max_patches=3)


class TestOneShapeAtATime:
    """Models of whole pictures: what comes out is what the bare model gives for that picture, at its shape."""

    @pytest.mark.parametrize("family", [f for f in tiny.NATIVE if f not in (*tiny.QWEN_VL, "siglip2_vision_model")])
    def test_features_are_the_bare_model_s(self, family: str) -> None:
        encoder = tiny.load_native(family, max_patches=40)
        patches, grids = prepared(encoder, PICTURES)
        asks = {} if family.startswith(("dino", "pixtral", "smolvlm")) else {"interpolate_pos_encoding": True}
        asks = {} if family == "internvl_vision" else asks
        with torch.no_grad():
            seen = encoder(patches, grids)
            for i, (rows, columns) in enumerate(grids):
                one = patches[sum(r * c for r, c in grids[:i]) :][: rows * columns]
                bare = encoder.model(join_patches(one[None], (rows, columns), 8), **asks).last_hidden_state[0]
                wanted = bare[len(bare) - rows * columns :]
                torch.testing.assert_close(seen.tokens_BND[i, : rows * columns], wanted, rtol=1e-5, atol=1e-5)

    def test_pixtral_counts_and_sees_as_its_own_processor_and_model(self) -> None:
        encoder = tiny.load_native("pixtral")
        pictures = [*PICTURES, picture(200, 70), picture(9, 400)]  # longer than its longest edge
        own = tiny.native_processor("pixtral")(pictures, return_tensors="pt")
        patches, grids = prepared(encoder, pictures)
        assert [(8 * r, 8 * c) for r, c in grids] == [tuple(map(int, size)) for size in own["image_sizes"]]
        with torch.no_grad():
            theirs = encoder.model(own["pixel_values"], image_sizes=own["image_sizes"]).last_hidden_state[0]
            seen = encoder(patches, grids)
        torch.testing.assert_close(seen.tokens_BND[seen.mask_BN], theirs, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        ("name", "how", "layer"),
        [
            ("test_vit", {"dynamic_img_size": True}, "last"),
            ("test_efficientnet", {}, -2),
            ("naflexvit_base_patch16_gap", {"embed_dim": 32, "depth": 2, "num_heads": 2}, "last"),
        ],
    )
    def test_timm(self, name: str, how: dict[str, Any], layer: Any) -> None:
        """ViTs with interpolated positions, NaFlex ViTs, and the maps of convolutional networks."""
        own = {k: v for k, v in how.items() if k != "dynamic_img_size"}
        encoder = TimmEncoder(name=name, fit="native", layer=layer, max_patches=30, model_args=own).eval()
        bare = timm.create_model(name, pretrained=False, **how).eval()
        bare.load_state_dict(encoder.model.state_dict())
        patches, grids = prepared(encoder, PICTURES)
        side = encoder.native.patch_size  # type: ignore[union-attr]
        with torch.no_grad():
            seen = encoder(patches, grids)
            for i, (rows, columns) in enumerate(grids):
                one = patches[sum(r * c for r, c in grids[:i]) :][: rows * columns]
                pixels = join_patches(one[None], (rows, columns), side)
                if layer == "last":
                    wanted = bare.forward_features(pixels)[0, bare.num_prefix_tokens :]
                else:
                    wanted = bare.forward_intermediates(pixels, intermediates_only=True)[layer][0].flatten(1).T
                torch.testing.assert_close(seen.tokens_BND[i, : rows * columns], wanted, rtol=1e-5, atol=1e-5)

    def test_one_that_takes_squares_alone_is_refused_by_name(self) -> None:
        with refused("unsupported", "mixer_s32_224", "fit: native"):
            TimmEncoder(name="mixer_s32_224", fit="native")
        config = {"model_type": "vit_mae", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1,
                  "num_attention_heads": 2, "image_size": 32, "patch_size": 8}  # fmt: skip
        with refused("unsupported", "vit_mae", "fit: native"):
            HFVisionEncoder(architecture=config, fit="native")
        with refused("conflict", "min_patches", "squash"):
            TimmEncoder(name="test_vit", fit="squash", min_patches=3)


class TestLayout:
    @given(st.integers(1, 5000), st.integers(1, 5000), st.integers(4, 60), st.integers(0, 300))
    def test_thin_pictures_keep_the_budget_whatever_the_rounding(
        self, height: int, width: int, least: int, more: int
    ) -> None:
        layout = NativeLayout(14, least, least + more, multiple=2, rounding="nearest", pool=2)
        rows, columns = layout.grid(height, width)
        assert rows % 2 == columns % 2 == 0
        assert 4 <= rows * columns <= layout.max_patches

    @given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 60), st.integers(0, 300))
    def test_within_the_budget_and_in_shape_to_a_patch(self, height: int, width: int, least: int, more: int) -> None:
        layout = NativeLayout(14, least, least + more)
        rows, columns = layout.grid(height, width)
        assert 1 <= rows * columns <= layout.max_patches
        if rows * columns < layout.max_patches or min(rows, columns) > 1:
            scale = max((rows - 1) / height, (columns - 1) / width)  # each side was rounded up to a patch, no more
            assert scale * height <= rows + 1e-6
            assert scale * width <= columns + 1e-6

    @pytest.mark.parametrize("pool", [1, 2, 3])
    def test_the_most_tokens_are_the_most(self, pool: int) -> None:
        layout = NativeLayout(8, 1, 30, pool=pool)
        sizes = [(8 * r, 8 * c) for r in range(1, 31) for c in range(1, 31) if r * c <= 30]
        assert layout.max_tokens == max(layout.num_tokens(*size) for size in sizes)

    @pytest.mark.parametrize("budget", [(0, 10), (1, 0), (20, 10)])
    def test_a_budget_that_no_picture_can_keep(self, budget: tuple[int, int]) -> None:
        with refused("out-of-range", *budget):
            NativeLayout(8, *budget)
        with refused("out-of-range", 3, 4):
            NativeLayout(8, 1, 3, multiple=2)

    def test_patches_come_together_again(self) -> None:
        pixels = torch.randn(2, 3, 24, 16)
        assert torch.equal(join_patches(cut_patches(pixels, 8), (3, 2), 8), pixels)


class TestConnectors:
    def test_pixel_shuffle_on_maps_of_any_shape(self) -> None:
        """An even map comes out as that of a square picture's connector; an odd one as the map filled up."""
        grids = ((4, 2), (3, 3), (1, 5))
        square = PixelShuffleConnector(in_size=6, out_size=5, in_tokens=16)
        shuffle = PixelShuffleConnector(in_size=6, out_size=5, in_tokens=11, maps=True)
        shuffle.load_state_dict(square.state_dict())
        tokens = torch.randn(3, 9, 6)
        mask = torch.arange(9)[None] < torch.tensor([[8], [9], [5]])
        out = shuffle(Features(tokens, mask, grids))
        assert out.grids == ((2, 1), (2, 2), (1, 3))
        assert out.mask_BN.sum(1).tolist() == [2, 4, 3]
        for i, (rows, columns) in enumerate(grids):
            whole = torch.zeros(4, -(-columns // 4) * 4, 6)
            whole[:rows, :columns] = tokens[i, : rows * columns].view(rows, columns, 6)
            for x in range(0, whole.shape[1], 4):
                piece = whole[:, x : x + 4].reshape(1, 16, 6)
                wanted = square(Features(piece, torch.ones(1, 16, dtype=torch.bool))).tokens_BND.view(2, 2, 5)
                mine = out.tokens_BND[i][out.mask_BN[i]].view(*out.grids[i], 5)[:, x // 2 : x // 2 + 2]
                torch.testing.assert_close(mine, wanted[: mine.shape[0], : mine.shape[1]])

    def test_rectangles_lie_where_they_lie_in_the_map(self) -> None:
        shuffle = PixelShuffleConnector(in_size=1, out_size=2, in_tokens=30, scale=[1, 2], maps=True)
        shuffle.layers = torch.nn.Sequential(torch.nn.Identity())
        numbers = torch.arange(1.0, 16.0).view(1, 15, 1)
        out = shuffle(Features(numbers, torch.ones(1, 15, dtype=torch.bool), ((3, 5),)))
        assert out.grids == ((3, 3),) and shuffle.pool == (1, 2)
        rows = out.tokens_BND[0].view(3, 3, 2)
        assert rows[0].tolist() == [[1, 2], [3, 4], [5, 0]] and rows[2].tolist() == [[11, 12], [13, 14], [15, 0]]
        for scale in ([1, 1], [2], [1, 2, 3], "wide"):
            with refused("wrong-type" if scale != [1, 1] else "out-of-range"):
                PixelShuffleConnector(in_size=1, out_size=2, in_tokens=30, scale=scale, maps=True)  # type: ignore[arg-type]
        with refused("wrong-shape", "native"):
            PixelShuffleConnector(in_size=1, out_size=2, in_tokens=16, scale=[1, 2])

    def test_positions_tell_rows_from_columns_and_pictures_by_themselves(self) -> None:
        torch.manual_seed(0)
        shuffle = PixelShuffleConnector(in_size=2, out_size=6, in_tokens=30, scale=2, maps=True, positions=True)
        grids, tokens = ((4, 6), (6, 2)), torch.ones(2, 24, 2)
        mask = torch.arange(24)[None] < torch.tensor([[24], [12]])
        out = shuffle(Features(tokens, mask, grids))
        first_ND = out.tokens_BND[0][out.mask_BN[0]]
        assert len({tuple(row) for row in first_ND.round(decimals=4).tolist()}) == 6  # one kind of patch, six places
        alone = shuffle(Features(tokens[1:], mask[1:], grids[1:]))
        torch.testing.assert_close(out.tokens_BND[1][out.mask_BN[1]], alone.tokens_BND[0][alone.mask_BN[0]])
        with refused("conflict", "native"):
            PixelShuffleConnector(in_size=2, out_size=6, in_tokens=16, positions=True)

    def test_one_that_takes_maps_of_one_shape_is_refused_by_name(self, docked: Callable[..., Dock]) -> None:
        with refused("unsupported", "AbstractorConnector", "fit: native", "pixel_shuffle"):
            docked("llama", tiny.native_vision(), connector="abstractor")


@pytest.mark.parametrize(
    ("kind", "options", "facts"),
    [
        ("conflict", {"fit": "squash", "max_patches": 9}, ("max_patches", "native")),
        ("conflict", {"fit": "native", "class_token": "keep"}, ("class_token",)),
        ("conflict", {"fit": "native", "image_size": 64}, ("image_size",)),
        ("conflict", {"fit": "native", "crop_pct": 0.9}, ("crop_pct",)),
        ("out-of-range", {"fit": "native", "max_patches": 2, "min_patches": 3}, (2, 3)),
    ],
)
def test_what_does_not_go_together(kind: str, options: dict[str, Any], facts: tuple[Any, ...]) -> None:
    with refused(kind, *facts):
        HFVisionEncoder.from_pretrained(tiny.save_native("siglip2_vision_model"), **options)


def test_tiles_and_native_exclude_each_other(docked: Callable[..., Dock]) -> None:
    with refused("conflict", "tiling", "native"):
        docked("llama", tiny.native_vision(), tiling={"type": "anyres"})


def test_patches_go_to_the_language_model_as_they_are() -> None:
    encoder = PatchesEncoder(fit="native", patch_size=8, max_patches=20)
    patches, grids = prepared(encoder, PICTURES)
    seen = encoder(patches, grids)
    assert torch.equal(seen.tokens_BND[seen.mask_BN], patches)


@pytest.mark.photos
@pytest.mark.parametrize("family", tiny.NATIVE)
def test_long_and_wide_photographs_keep_their_shape_to_a_patch(family: str) -> None:
    folder = Path(os.environ.get("PHOTOS", "")) / "coco_captions" / "images"
    files = sorted(folder.glob("*.jpg")) if os.environ.get("PHOTOS") else []
    if not files:
        pytest.skip("no photographs: PHOTOS names no folder that holds coco_captions/images")
    by_shape = sorted(files, key=lambda f: (lambda height, width: width / height)(*image_size(f)))
    chosen = [open_image(f) for f in (*by_shape[:6], *by_shape[-6:])]
    encoder = tiny.load_native(family, max_patches=200)
    _, grids = prepared(encoder, chosen)
    step = encoder.native.multiple  # type: ignore[union-attr]
    for photo, (rows, columns) in zip(chosen, grids, strict=True):
        assert photo.width / photo.height > 1.5 or photo.height / photo.width > 1.4
        low, high = (columns - step) / (rows + step), (columns + step) / max(rows - step, step)
        assert low <= photo.width / photo.height <= high
    with torch.no_grad():
        seen = encoder(*prepared(encoder, chosen))
    assert seen.tokens_BND.isfinite().all()


def test_the_same_through_dock(language_folder: Callable[..., str], private_cache: Path) -> None:
    """What the tower gives is what the encoder gives, and the processor counts it."""
    made = dock(tiny.native_vision(max_patches=20), "linear", language_folder())
    assert made.processor.image_placeholders(30, 90) == 2 * 6
    assert made.processor.image_pieces(30, 90) == 12
    count = partial(made.processor.image_placeholders)
    out = made.processor._get_num_multimodal_tokens(image_sizes=SIDES)
    assert out.num_image_tokens == [count(*s) for s in SIDES]


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "1"])
def test_turned_and_grey_pictures_are_seen_upright_and_in_three_channels(mode: str, tmp_path: Path) -> None:
    """A camera's note that a picture lies on its side counts in its size, its patches and its tokens alike."""
    encoder = PatchesEncoder(patch_size=8, fit="native", max_patches=200)
    upright = picture(24, 56).convert(mode)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    upright.transpose(PIL.Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert image_size(tmp_path / "turned.png") == (24, 56)
    seen, expected = (
        prepared(encoder, [opened]) for opened in (open_image(tmp_path / "turned.png"), upright.convert("RGB"))
    )
    assert seen[1] == expected[1] == [(3, 7)]
    torch.testing.assert_close(encoder(*seen).tokens_BND, encoder(*expected).tokens_BND, rtol=0, atol=0)


def test_no_side_is_longer_than_the_longest() -> None:
    """Not even of a thin picture that is made larger to fill a budget."""
    layout = NativeLayout(8, min_patches=100, max_patches=200, max_side=20)
    for size in ((8, 160), (1, 3000), (160, 8), (8, 8)):
        assert max(layout.grid(*size)) <= 20
