"""timm's models as eyes: convolutional maps, transformers' tokens, and Swin's maps with channels last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch

import tiny
from opticnerve.encoders.base import last_blocks
from opticnerve.encoders.timm import TimmEncoder
from opticnerve.types import OpticNerveError

CNNS = ["test_efficientnet", "test_resnet", "test_convnext", "test_byobnet"]
VITS = ["test_vit", "test_vit2", "test_vit3"]
SWIN: dict[str, Any] = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}


def pixels(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


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
    # Row by row from the top left, as a reader's eye goes.
    torch.testing.assert_close(features.tokens_BND[0, 1], map_BCHW[0, :, 0, 1])
    assert features.mask_BN.all()


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
        with pytest.raises(OpticNerveError, match=r"encoder\.last\(99\): this encoder has \d+ blocks"):
            last_blocks(encoder, 99)


class TestRefusals:
    def test_name(self) -> None:
        with pytest.raises(OpticNerveError, match="timm knows no model 'test_efficientnett'"):
            TimmEncoder(name="test_efficientnett")

    def test_layer(self) -> None:
        with pytest.raises(OpticNerveError, match="gives no features at layer 40"):
            TimmEncoder(name="test_efficientnet", layer=40)
        with pytest.raises(OpticNerveError, match="'last' or a whole number"):
            TimmEncoder(name="test_efficientnet", layer="first")  # type: ignore[arg-type]

    def test_class_token(self) -> None:
        with pytest.raises(OpticNerveError, match="'drop' or 'keep'"):
            TimmEncoder(name="test_vit", class_token="cls")  # type: ignore[arg-type]

    def test_starter(self) -> None:
        with pytest.raises(OpticNerveError, match="unknown starter eye"):
            TimmEncoder.from_pretrained("starter/efficientnet-lite9")
