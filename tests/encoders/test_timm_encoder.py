"""timm's models as vision encoders: convolutional maps, transformers' tokens, and Swin's maps with channels last."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import tiny
from errors import refused
from opticnerve.encoders.base import last_blocks
from opticnerve.encoders.native import cut_patches
from opticnerve.encoders.timm import TimmEncoder

CNNS = ["test_efficientnet", "test_resnet", "test_convnext", "test_byobnet"]
VITS = ["test_vit", "test_vit2", "test_vit3"]
SWIN: dict[str, Any] = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}


def pixels(size: int) -> torch.Tensor:
    """Channels together, as the encoder lays them: in another layout timm's convolutions round differently."""
    made = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return made.contiguous(memory_format=torch.channels_last)


def bare(name: str, size: int) -> Any:
    model = timm.create_model(name, pretrained=False, **({"img_size": size} if "vit" in name else {}))
    return model.eval()


def encoder_of(name: str, **options: Any) -> tuple[TimmEncoder, Any]:
    """An encoder and the bare timm model with the same weights."""
    encoder = TimmEncoder(name=name, **options).eval()
    model = bare(name, encoder.image_size)
    model.load_state_dict(encoder.model.state_dict())
    return encoder, model


@pytest.mark.parametrize("name", CNNS)
@pytest.mark.parametrize("layer", ["last", -1, 0, 1])
def test_a_map_becomes_rows(name: str, layer: Any) -> None:
    encoder, model = encoder_of(name, layer=layer, image_size=96)
    with torch.no_grad():
        features = encoder(pixels(96))
        if layer == "last":
            map_BCHW = model.forward_features(pixels(96))
        else:
            (map_BCHW,) = model.forward_intermediates(pixels(96), indices=[layer], intermediates_only=True)
    assert torch.equal(features.tokens_BND, map_BCHW.flatten(2).transpose(1, 2))
    assert features.tokens_BND.shape == (2, encoder.num_tokens, encoder.hidden_size)
    # Row by row from the top left, as a reader's vision encoder goes.
    torch.testing.assert_close(features.tokens_BND[0, 1], map_BCHW[0, :, 0, 1])
    assert features.mask_BN.all()


@pytest.mark.parametrize("name", CNNS)
def test_the_layout_of_pixels_changes_rounding_alone(name: str) -> None:
    encoder, model = encoder_of(name, layer="last", image_size=96)
    given = pixels(96).contiguous()
    with torch.no_grad():
        wanted = model.forward_features(given).flatten(2).transpose(1, 2)
        assert torch.equal(encoder(given).tokens_BND, encoder(pixels(96)).tokens_BND)
        assert float((encoder(given).tokens_BND - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_several_layers_are_joined_at_the_coarsest() -> None:
    encoder, model = encoder_of("test_resnet", layer=[1, 2], image_size=64)
    with torch.inference_mode():
        fine_BCHW, coarse_BCHW = model.forward_intermediates(pixels(64), indices=[1, 2], intermediates_only=True)
        tokens_BND = encoder(pixels(64)).tokens_BND
    ratio, columns = fine_BCHW.shape[-1] // coarse_BCHW.shape[-1], coarse_BCHW.shape[-1]
    assert ratio == 2
    for row in range(columns):
        for column in range(columns):
            inside = fine_BCHW[:, :, ratio * row : ratio * (row + 1), ratio * column : ratio * (column + 1)]
            wanted = torch.cat([inside.flatten(1), coarse_BCHW[:, :, row, column]], dim=1)
            assert torch.equal(tokens_BND[:, row * columns + column], wanted)
    with refused("conflict", "keep"):
        TimmEncoder(name="test_vit", layer=[0, 1], class_token="keep")


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("layer", ["last", -1, 1])
@pytest.mark.parametrize("class_token", ["drop", "keep"])
def test_tokens_of_a_vit(name: str, layer: Any, class_token: str) -> None:
    encoder, model = encoder_of(name, layer=layer, class_token=class_token, image_size=64)
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        features = encoder(pixels(64))
        if layer == "last":
            wanted = model.forward_features(pixels(64))[:, prefix if class_token == "drop" else 0 :]
        else:
            ((tokens, first),) = (
                model.forward_intermediates(
                    pixels(64), indices=[layer], intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True
                )
                if prefix
                else [
                    (
                        model.forward_intermediates(
                            pixels(64), indices=[layer], intermediates_only=True, output_fmt="NLC"
                        )[0],
                        None,
                    )
                ]
            )
            wanted = tokens if class_token == "drop" or first is None else torch.cat([first, tokens], 1)
    assert torch.equal(features.tokens_BND, wanted)
    assert features.tokens_BND.shape == (2, encoder.num_tokens, encoder.hidden_size)


def test_swins_map_has_its_channels_last() -> None:
    encoder = TimmEncoder(name="swin_tiny_patch4_window7_224", image_size=32, model_args=SWIN).eval()
    with torch.no_grad():
        map_BHWC = encoder.model.forward_features(pixels(32))
        tokens = encoder(pixels(32)).tokens_BND
    assert encoder.hidden_size == map_BHWC.shape[-1] == 32
    assert encoder.num_tokens == 16
    assert torch.equal(tokens, map_BHWC.flatten(1, 2))
    inner = TimmEncoder(name="swin_tiny_patch4_window7_224", image_size=32, model_args=SWIN, layer=0).eval()
    assert inner(pixels(32)).tokens_BND.shape == (2, inner.num_tokens, inner.hidden_size) == (2, 64, 16)


@pytest.mark.parametrize("name", [*CNNS, *VITS])
def test_image_processor_and_options(name: str) -> None:
    encoder = TimmEncoder(name=name, image_size=64).eval()
    out = encoder.image_processor()([tiny.picture(1, 70), tiny.picture(2).resize((90, 30))], return_tensors="pt")[
        "pixel_values"
    ]
    assert out.shape == (2, 3, 64, 64)
    assert encoder(out).tokens_BND.shape == (2, encoder.num_tokens, encoder.hidden_size)
    again = TimmEncoder(**encoder.options).eval()
    again.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        assert torch.equal(again(out).tokens_BND, encoder(out).tokens_BND)
    data = timm.data.resolve_model_data_config(bare(name, 64))
    assert encoder.mean == list(data["mean"])
    assert encoder.std == list(data["std"])


# Families by what is special about them, each as small as timm or its keywords make it.
SPREAD: dict[str, dict[str, Any]] = {
    "test_byobnet": {}, "test_convnext": {}, "test_convnext2": {}, "test_convnext3": {}, "test_efficientnet": {},
    "test_efficientnet_gn": {}, "test_efficientnet_ln": {}, "test_efficientnet_evos": {}, "test_nfnet": {},
    "test_resnet": {}, "resnet10t": {}, "regnetx_002": {}, "mobilenetv3_small_050": {}, "mobilenetv4_conv_small_035": {},
    "fastvit_t8": {},  # reparametrised convolutions
    "test_mambaout": {}, "pvt_v2_b0": {}, "edgenext_xx_small": {},
    "test_maxvit": {}, "test_coatnet": {},  # convolution and attention, tables for one size
    "test_vit": {}, "test_vit2": {}, "test_vit3": {}, "test_vit4": {}, "test_vit_relpos": {},
    "vit_tiny_patch16_224": {"model_args": {"depth": 2}},
    "vit_small_patch14_reg4_dinov2": {"image_size": 56, "model_args": {"embed_dim": 32, "depth": 2, "num_heads": 2}},
    "vit_base_patch16_siglip_224": {"model_args": {"embed_dim": 32, "depth": 2, "num_heads": 2}},
    "eva02_tiny_patch14_224": {"image_size": 56, "model_args": {"embed_dim": 32, "depth": 2, "num_heads": 2}},
    "deit_tiny_distilled_patch16_224": {"model_args": {"depth": 2}},  # two class tokens
    "beit_base_patch16_224": {"model_args": {"embed_dim": 32, "depth": 2, "num_heads": 2}},
    "cait_xxs24_224": {"model_args": {"depth": 2}},
    "swin_tiny_patch4_window7_224": {"model_args": SWIN},
    "swinv2_tiny_window8_256": {"model_args": SWIN},
    "naflexvit_base_patch16_gap": {"model_args": {"embed_dim": 32, "depth": 2, "num_heads": 2}},
    "hiera_tiny_224": {"image_size": 224, "model_args": {"embed_dim": 16, "num_heads": 1, "stages": [1, 1, 1, 1]}},
}  # fmt: skip


@pytest.mark.parametrize("name", SPREAD)
def test_families(name: str) -> None:
    """What is declared is what comes, and it is what timm's own `forward_features` and `forward_intermediates` give."""
    options = {"image_size": 64, **SPREAD[name]}
    encoder = TimmEncoder(name=name, **options).eval()
    size = encoder.image_size
    keywords = {**options.get("model_args", {}), **({"img_size": size} if takes_size(encoder.model) else {})}
    model = timm.create_model(name, pretrained=False, **keywords).eval()
    model.load_state_dict(encoder.model.state_dict())
    inner = TimmEncoder(name=name, layer=-1, **options).eval()
    inner.model.load_state_dict(encoder.model.state_dict())
    with torch.no_grad():
        out, features = model.forward_features(pixels(size)), encoder(pixels(size))
        last = model.forward_intermediates(pixels(size), indices=[-1], intermediates_only=True)[0]
        found = inner(pixels(size)).tokens_BND
    assert features.tokens_BND.shape == (2, encoder.num_tokens, encoder.hidden_size)
    assert torch.equal(features.tokens_BND, rows_of(out, model))
    assert torch.equal(found, last.flatten(2).transpose(1, 2))
    assert found.shape == (2, inner.num_tokens, inner.hidden_size)
    assert encoder.blocks()
    again = TimmEncoder(**encoder.options).eval()
    again.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        assert torch.equal(again(pixels(size)).tokens_BND, features.tokens_BND)


def takes_size(model: Any) -> bool:
    return any("img_size" in inspect.signature(c.__init__).parameters for c in type(model).__mro__)  # type: ignore[misc]


def rows_of(out: torch.Tensor, model: Any) -> torch.Tensor:
    """By the shape alone: a map with its channels first, or last where the width says so; or tokens."""
    if out.ndim == 3:
        return out[:, getattr(model, "num_prefix_tokens", 0) :]
    return out.flatten(2).transpose(1, 2) if out.shape[1] == model.num_features else out.flatten(1, 2)


@pytest.mark.parametrize("name", ["coat_tiny", "crossvit_tiny_240"])
def test_several_maps_are_refused_where_one_can_be_asked_for(name: str) -> None:
    with refused("unsupported", f"'{name}'", "forward_features", "layer: -1"):
        TimmEncoder(name=name)


def test_tokens_of_which_timm_does_not_say_what_they_are() -> None:
    with torch.device("meta"):
        with refused("unsupported", 197):
            TimmEncoder(name="volo_d1_224")
        assert TimmEncoder(name="volo_d1_224", layer=-1).num_tokens == 196


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_planned(timm_folder: Callable[..., str], name: str) -> None:
    """From the configuration alone, on the meta device; the folder's weights are not read."""
    place = Path(timm_folder(name).removeprefix("local-dir:"))
    with torch.device("meta"):
        planned = TimmEncoder.planned(f"local-dir:{place}", image_size=64, layer=-1)
        out = planned.eval()(torch.empty(2, 3, 64, 64)).tokens_BND
    loaded = TimmEncoder.from_pretrained(f"local-dir:{place}", image_size=64, layer=-1)
    assert planned.options == loaded.options
    assert out.is_meta and out.shape == (2, loaded.num_tokens, loaded.hidden_size)
    assert TimmEncoder.planned(name).options["name"] == name
    starter = TimmEncoder.planned("starter/efficientnet-lite0", image_size=64)
    assert starter.options["name"] == "tf_efficientnet_lite0"
    assert list(starter.mean) == [0.5, 0.5, 0.5]  # (FACTS of the starter's own weights, not timm's)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
def test_weights_from_a_local_folder(timm_folder: Callable[..., str], name: str) -> None:
    encoder = TimmEncoder.from_pretrained(timm_folder(name), image_size=64).eval()
    assert encoder.options["name"] == name
    assert [f.rsplit("/", 1)[-1] for f in encoder.weight_files()] == ["model.safetensors"]
    torch.manual_seed(2)
    fresh = timm.create_model(name, pretrained=False)
    weights = encoder.model.state_dict()
    # Position tables are resampled to the size that was asked for; all else is the folder's.
    assert all(torch.equal(t, weights[n]) for n, t in fresh.state_dict().items() if "pos_embed" not in n)


def test_a_folder_with_another_head(tmp_path: Any) -> None:
    """A fine-tuned model's classes come with its configuration, or its weights would not fit."""
    name = tiny.save_timm(tmp_path / "m", "test_resnet", num_classes=7)
    encoder = TimmEncoder.from_pretrained(name)
    again = TimmEncoder(**encoder.options)
    again.load_state_dict(encoder.state_dict())
    assert encoder.model.num_classes == 7


def test_blocks_change_what_comes_out() -> None:
    for name in (*CNNS, *VITS):
        encoder = TimmEncoder(name=name, image_size=64).eval()
        before = encoder(pixels(64)).tokens_BND
        with torch.no_grad():
            for parameter in last_blocks(encoder, 1)[0].parameters():
                parameter.add_(torch.randn_like(parameter))
        assert not torch.allclose(encoder(pixels(64)).tokens_BND, before), name
        with refused("out-of-range", "encoder.last(99)"):
            last_blocks(encoder, 99)


class TestRefusals:
    def test_name(self) -> None:
        with refused("unknown-name", "'test_efficientnett'"):
            TimmEncoder(name="test_efficientnett")

    def test_model_args(self) -> None:
        with refused("unknown-key", "model_args", "'depht'"):
            TimmEncoder(name="test_vit", model_args={"depht": 2})

    def test_layer(self) -> None:
        with refused("unsupported", "layer 40"):
            TimmEncoder(name="test_efficientnet", layer=40)
        with refused("wrong-type", "'last'"):
            TimmEncoder(name="test_efficientnet", layer="first")

    def test_class_token(self) -> None:
        with refused("unknown-name", "'drop'", "'keep'"):
            TimmEncoder(name="test_vit", class_token="cls")

    def test_starter(self) -> None:
        with refused("unknown-name", "starter/efficientnet-lite9", "starter/efficientnet-lite0"):
            TimmEncoder.from_pretrained("starter/efficientnet-lite9")


@pytest.mark.parametrize("fit", ["squash", "native"])
def test_a_lone_picture_has_the_gradient_that_it_has_among_others(fit: str) -> None:
    """torch's batch norm gets it wrong where a lone picture's gradient is a view of rows."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"image_size": 64}
    if fit == "native":
        options = {"fit": "native", "min_patches": 1, "max_patches": 64}
    encoder = TimmEncoder(name="test_efficientnet", layer=-2, **options).eval()
    several, weight_ND, found = torch.randn(2, 3, 64, 64), None, []
    for count in (1, 2):
        encoder.zero_grad()
        if (layout := encoder.native) is not None:
            grid = (64 // layout.patch_size, 64 // layout.patch_size)
            patches_PE = cut_patches(several[:count], layout.patch_size).flatten(0, 1)
            seen = encoder(patches_PE.contiguous(), [grid] * count)
        else:
            seen = encoder(several[:count])
        weight_ND = torch.randn_like(seen.tokens_BND[0]) if weight_ND is None else weight_ND
        (seen.tokens_BND[0] * weight_ND).sum().backward()
        found.append([p.grad for p in encoder.parameters() if p.grad is not None])
    assert found[0]
    for alone, among in zip(*found, strict=True):
        torch.testing.assert_close(alone, among, rtol=1e-3, atol=1e-4)
