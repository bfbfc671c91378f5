"""transformers' vision models as eyes: what is declared is what comes, and it is the bare model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf

import tiny
from opticnerve.encoders.base import last_blocks
from opticnerve.encoders.hf_vision import HFVisionEncoder
from opticnerve.types import OpticNerveError

PREFIX = {"clip_vision_model": 1, "siglip_vision_model": 0, "dinov2": 1, "dinov2_with_registers": 4, "vit": 1}
LAYERS: list[Any] = ["last", -1, -2, 0, [-2, -1], [0, 1, 3]]


def pixels(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", tiny.VISION)
class TestEveryFamily:
    @pytest.mark.parametrize("layer", LAYERS, ids=str)
    @pytest.mark.parametrize("class_token", ["drop", "keep"])
    def test_tokens_are_the_bare_models(
        self, family: str, layer: Any, class_token: str, vision_folder: Callable[..., str]
    ) -> None:
        encoder = HFVisionEncoder.from_pretrained(vision_folder(family), layer=layer, class_token=class_token).eval()
        bare = tf.AutoModel.from_pretrained(vision_folder(family)).eval()
        with torch.no_grad():
            out = bare(pixels(), output_hidden_states=True)
            features = encoder(pixels())
        states = (
            [out.last_hidden_state]
            if layer == "last"
            else [out.hidden_states[i] for i in (layer if isinstance(layer, list) else [layer])]
        )
        wanted = torch.cat(states, -1)[:, PREFIX[family] if class_token == "drop" else 0 :]
        assert torch.equal(features.tokens_BND, wanted)
        assert features.tokens_BND.shape == (2, encoder.num_tokens, encoder.hidden_size)
        assert encoder.num_tokens == 16 + (PREFIX[family] if class_token == "keep" else 0)
        assert features.mask_BN.all()

    @pytest.mark.parametrize("size", [48, 16])
    def test_another_image_size_interpolates(self, family: str, size: int, vision_folder: Callable[..., str]) -> None:
        encoder = HFVisionEncoder.from_pretrained(vision_folder(family), image_size=size).eval()
        with torch.no_grad():
            tokens = encoder(pixels(size)).tokens_BND
        assert encoder.num_tokens == (size // 8) ** 2
        assert tokens.shape == (2, encoder.num_tokens, encoder.hidden_size)

    def test_the_image_processor_fits(self, family: str, vision_folder: Callable[..., str]) -> None:
        encoder = HFVisionEncoder.from_pretrained(vision_folder(family), image_size=48)
        out = encoder.image_processor()([tiny.picture(1, 70), tiny.picture(2, 33)], return_tensors="pt")["pixel_values"]
        assert out.shape == (2, 3, 48, 48)
        assert encoder(out).tokens_BND.shape[0] == 2

    def test_options_build_it_again(self, family: str, vision_folder: Callable[..., str]) -> None:
        encoder = HFVisionEncoder.from_pretrained(vision_folder(family), layer=-2, image_size=48).eval()
        again = HFVisionEncoder(**encoder.options).eval()
        again.load_state_dict(encoder.state_dict())
        with torch.no_grad():
            assert torch.equal(again(pixels(48)).tokens_BND, encoder(pixels(48)).tokens_BND)
        assert again.image_processor().to_dict() == encoder.image_processor().to_dict()

    def test_last_blocks(self, family: str, vision_folder: Callable[..., str]) -> None:
        encoder = HFVisionEncoder.from_pretrained(vision_folder(family))
        assert len(encoder.blocks()) == 3
        before = pixels()
        first = encoder(before).tokens_BND
        with torch.no_grad():
            for parameter in last_blocks(encoder, 1)[0].parameters():
                parameter.add_(1.0)
        assert not torch.allclose(encoder(before).tokens_BND, first)


def test_preparation_comes_from_the_checkpoint_or_the_options(vision_folder: Callable[..., str]) -> None:
    own = tf.CLIPImageProcessor.from_pretrained(vision_folder())
    encoder = HFVisionEncoder.from_pretrained(vision_folder())
    assert encoder.mean == list(own.image_mean)
    assert encoder.fit == "crop"
    picture = tiny.picture(3, 50)
    ours = encoder.image_processor()([picture], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, own([picture], return_tensors="pt")["pixel_values"])
    told = HFVisionEncoder.from_pretrained(vision_folder(), mean=[0.1] * 3, fit="pad")
    assert told.mean == [0.1] * 3
    assert told.fit == "pad"


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
def test_every_way_of_fitting_gives_a_square(vision_folder: Callable[..., str], fit: str) -> None:
    processor = HFVisionEncoder.from_pretrained(vision_folder(), fit=fit).image_processor()
    wide = tiny.picture(1).resize((90, 30))
    assert processor([wide], return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)


def test_the_vision_tower_of_a_two_tower_model(tmp_path: Any) -> None:
    both = tf.CLIPModel(
        tf.CLIPConfig(
            vision_config=tiny.vision_config("clip_vision_model").to_dict(),
            text_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "vocab_size": 40,
            },
        )
    )
    both.save_pretrained(tmp_path)
    encoder = HFVisionEncoder.from_pretrained(str(tmp_path)).eval()
    assert all(
        torch.equal(t, both.vision_model.state_dict()[n.removeprefix("model.").removeprefix("vision_model.")])
        for n, t in encoder.state_dict().items()
    )


class TestRefusals:
    def test_layer(self, vision_folder: Callable[..., str]) -> None:
        with pytest.raises(OpticNerveError, match="layer 9: this encoder has hidden states 0 to 3"):
            HFVisionEncoder.from_pretrained(vision_folder(), layer=9)

    def test_class_token(self, vision_folder: Callable[..., str]) -> None:
        with pytest.raises(OpticNerveError, match="'drop' or 'keep'"):
            HFVisionEncoder.from_pretrained(vision_folder(), class_token="cls")

    def test_no_eye(self, language_folder: Callable[..., str]) -> None:
        with pytest.raises(OpticNerveError, match="is no vision transformer; for CNNs use type: timm"):
            HFVisionEncoder.from_pretrained(language_folder())

    def test_no_model_type(self) -> None:
        with pytest.raises(OpticNerveError, match=r"architecture\.model_type"):
            HFVisionEncoder(architecture={"hidden_size": 3})

    def test_missing_weights(self, tmp_path: Any) -> None:
        from safetensors.torch import load_file, save_file

        folder = tiny.save_vision(tmp_path / "v")
        tensors = load_file(tmp_path / "v/model.safetensors")
        gone = next(n for n in tensors if "layers.1" in n and n.endswith("fc1.weight"))
        tensors.pop(gone)
        save_file(tensors, tmp_path / "v/model.safetensors", metadata={"format": "pt"})
        with pytest.raises(OpticNerveError, match=r"lacks weights of its vision tower.*fc1\.weight"):
            HFVisionEncoder.from_pretrained(folder)

    def test_fit(self, vision_folder: Callable[..., str]) -> None:
        with pytest.raises(OpticNerveError, match="unknown fit 'stretch'; known: squash, crop, pad"):
            HFVisionEncoder.from_pretrained(vision_folder(), fit="stretch").image_processor()
