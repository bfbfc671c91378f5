"""transformers' vision models as vision encoders: what is declared is what comes, and it is the bare model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import tiny
from errors import refused
from opticnerve.encoders.base import last_blocks
from opticnerve.encoders.hf_vision import HFVisionEncoder

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
        # From the second picture on it goes no further than it must, for the same bits.
        ran: list[int] = []
        for number, block in enumerate(encoder.blocks()):
            block.register_forward_hook(lambda *_, n=number: ran.append(n))
        with torch.no_grad():
            assert torch.equal(encoder(pixels()).tokens_BND, wanted)
        count = len(encoder.blocks())
        asked = [
            count if i in ("last", -1) else i % (count + 1) for i in (layer if isinstance(layer, list) else [layer])
        ]
        assert ran == list(range(max(asked)))

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


SMALL: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8,
}  # fmt: skip
WORDS: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40,
}  # fmt: skip


def whole_model(kind: str, folder: Path) -> Any:
    """A small model with a vision encoder and more, saved; returns the vision encoder."""
    seen = {**SMALL, "image_size": 32}
    llama = {"model_type": "llama", **WORDS}
    opt = {
        "model_type": "opt", "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "vocab_size": 40, "word_embed_proj_dim": 16,
    }  # fmt: skip
    queries: dict[str, Any] = {"qformer_config": {**WORDS, "encoder_hidden_size": 24}, "num_query_tokens": 4}
    made: Any
    match kind:
        case "llava":
            clip = {"model_type": "clip_vision_model", **seen}
            config: Any = tf.LlavaConfig(vision_config=clip, text_config=llama, image_token_index=39)
            made = tf.LlavaForConditionalGeneration(config)
            vision_encoder = made.model.vision_tower
        case "blip-2":
            made = tf.Blip2ForConditionalGeneration(tf.Blip2Config(vision_config=seen, text_config=opt, **queries))
            vision_encoder = made.vision_model
        case "instructblip":
            made = tf.InstructBlipForConditionalGeneration(
                tf.InstructBlipConfig(vision_config=seen, text_config=opt, **queries)
            )
            vision_encoder = made.vision_model
        case "siglip 2":
            flexible = {**SMALL, "num_patches": 16}
            made = tf.Siglip2Model(tf.Siglip2Config(vision_config=flexible, text_config=WORDS))
            vision_encoder = made.vision_model
        case "smolvlm":
            made = tf.SmolVLMForConditionalGeneration(
                tf.SmolVLMConfig(vision_config=seen, text_config=llama, scale_factor=2)
            )
            vision_encoder = made.model.vision_model
    made.save_pretrained(folder)
    return vision_encoder.eval()


@pytest.mark.parametrize("kind", ["llava", "blip-2", "instructblip", "siglip 2", "smolvlm"])
def test_the_eye_of_a_whole_model(kind: str, tmp_path: Path) -> None:
    vision_encoder = whole_model(kind, tmp_path).state_dict()
    encoder = HFVisionEncoder.from_pretrained(str(tmp_path))
    found = encoder.model.state_dict()
    assert found.keys() == vision_encoder.keys()
    assert all(torch.equal(found[n], vision_encoder[n]) for n in vision_encoder)
    assert encoder.native_size == 32 and encoder.num_tokens == 16


def test_llava_s_own_names(tmp_path: Path) -> None:
    """Checkpoints from before transformers 5 call the vision encoder `vision_tower.vision_model.…`."""
    from safetensors.torch import load_file, save_file

    vision_encoder = whole_model("llava", tmp_path).state_dict()
    old = {n.replace("vision_tower.", "vision_tower.vision_model."): t
           for n, t in load_file(tmp_path / "model.safetensors").items()}  # fmt: skip
    assert any(n.startswith("vision_tower.vision_model.encoder.") for n in old)
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = HFVisionEncoder.from_pretrained(str(tmp_path)).model.state_dict()
    assert all(torch.equal(found[n], vision_encoder[n]) for n in vision_encoder)


def test_loading_an_eye_alone_says_nothing_of_the_rest(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    whole_model("llava", tmp_path)
    before = logging.get_verbosity()
    capfd.readouterr()
    HFVisionEncoder.from_pretrained(str(tmp_path))
    assert "language_model" not in "".join(capfd.readouterr())
    assert logging.get_verbosity() == before


@pytest.mark.parametrize("kind", [*tiny.VISION, "blip-2", "siglip 2", "smolvlm"])
@pytest.mark.parametrize("size", [None, 48])
def test_planned_from_the_configuration_alone(
    kind: str, size: int | None, tmp_path: Path, vision_folder: Callable[..., str]
) -> None:
    """On the meta device, and with a forward pass there: `plan` counts one."""
    if kind in tiny.VISION:
        tmp_path = Path(vision_folder(kind))
    else:
        whole_model(kind, tmp_path)
        (tmp_path / "model.safetensors").unlink()
    with torch.device("meta"):
        planned = HFVisionEncoder.planned(str(tmp_path), image_size=size)
        out = planned.eval()(torch.empty(3, 3, planned.image_size, planned.image_size)).tokens_BND
    assert out.is_meta and out.shape == (3, planned.num_tokens, planned.hidden_size)
    assert all(t.is_meta for t in [*planned.parameters(), *planned.buffers()])
    assert planned.num_tokens == (size or 32) ** 2 // 64


@pytest.mark.parametrize("kind", ["dinov3_vit", "siglip2_vision_model", "idefics3_vision", "blip_2_vision_model"])
def test_a_whole_model_around_it_comes_back(kind: str, docked: Callable[..., Any], tmp_path: Path) -> None:
    """`from_pretrained` builds without memory; what no file holds (rotary frequencies) must be right afterwards."""
    config = tf.AutoConfig.for_model(
        kind, **SMALL, **({"num_patches": 16} if "siglip2" in kind else {"image_size": 32})
    )
    if kind == "blip_2_vision_model":
        config.initializer_range = 0.1  # its own leaves nothing to see
    torch.manual_seed(0)
    HFVisionEncoder(architecture=config.to_dict()).model.save_pretrained(tmp_path / "eye")
    model = docked("llama", {"type": "hf_vision", "name": str(tmp_path / "eye")}).model
    model.save_pretrained(tmp_path / "whole")
    again = type(model).from_pretrained(tmp_path / "whole")
    with torch.no_grad():
        torch.testing.assert_close(again.image(pixels()).tokens_BND, model.image(pixels()).tokens_BND)
    assert not torch.allclose(model.image(pixels()).tokens_BND[0], model.image(pixels()).tokens_BND[1])


class TestRefusals:
    def test_layer(self, vision_folder: Callable[..., str]) -> None:
        with refused("out-of-range", "layer 9", 0, 3):
            HFVisionEncoder.from_pretrained(vision_folder(), layer=9)

    def test_class_token(self, vision_folder: Callable[..., str]) -> None:
        with refused("unknown-name", "'drop'", "'keep'"):
            HFVisionEncoder.from_pretrained(vision_folder(), class_token="cls")

    def test_no_eye(self, language_folder: Callable[..., str]) -> None:
        with refused("unsupported", "CNNs", "type: timm"):
            HFVisionEncoder.from_pretrained(language_folder())

    def test_no_model_type(self) -> None:
        with refused("missing-field", "architecture.model_type"):
            HFVisionEncoder(architecture={"hidden_size": 3})

    def test_missing_weights(self, tmp_path: Any) -> None:
        from safetensors.torch import load_file, save_file

        folder = tiny.save_vision(tmp_path / "v")
        tensors = load_file(tmp_path / "v/model.safetensors")
        gone = next(n for n in tensors if "layers.1" in n and n.endswith("fc1.weight"))
        tensors.pop(gone)
        save_file(tensors, tmp_path / "v/model.safetensors", metadata={"format": "pt"})
        with refused("mismatch", "fc1.weight"):
            HFVisionEncoder.from_pretrained(folder)

    @pytest.mark.parametrize(
        ("kind", "options", "refusal"),
        [
            ("vit_mae", {}, ("unsupported", 5, 16, "type: timm")),  # it hides three quarters of them
            (
                "swin",
                {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2},
                ("unsupported", "swin", "type: timm"),
            ),
            ("videomae", {}, ("wrong-shape", "videomae", 32)),
        ],
    )
    def test_models_that_are_no_plain_vision_transformer(
        self, kind: str, options: Any, refusal: tuple[Any, ...]
    ) -> None:
        sizes = {**SMALL, **options} if kind != "swin" else {"patch_size": 4, **options}
        config = tf.AutoConfig.for_model(kind, image_size=32, **sizes)
        with refused(*refusal):
            HFVisionEncoder(architecture=config.to_dict())

    def test_a_size_that_cannot_be_interpolated(self) -> None:
        config = tf.AutoConfig.for_model("aimv2_vision_model", image_size=32, **SMALL)
        with refused("wrong-shape", 48, 32):
            HFVisionEncoder(architecture=config.to_dict(), image_size=48)

    def test_pictures_that_are_not_square(self) -> None:
        config = tiny.vision_config("vit").to_dict() | {"image_size": [32, 48]}
        with refused("unsupported", "image_size", "[32, 48]"):
            HFVisionEncoder(architecture=config)

    def test_missing_weights_of_a_whole_model(self, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        whole_model("blip-2", tmp_path)
        kept = {n: t for n, t in load_file(tmp_path / "model.safetensors").items() if "vision_model" not in n}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with refused("mismatch", "vision tower", "embeddings.class_embedding"):
            HFVisionEncoder.from_pretrained(str(tmp_path))

    def test_fit(self, vision_folder: Callable[..., str]) -> None:
        with refused("unknown-name", "'stretch'", "squash_float"):
            HFVisionEncoder.from_pretrained(vision_folder(), fit="stretch").image_processor()


@pytest.mark.parametrize("layer", ["last", -1])
@pytest.mark.parametrize("kind", ["siglip_vision_model", "siglip2_vision_model"])
def test_siglips_pooling_head_is_kept_and_not_run(kind: str, layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tf.AutoConfig.for_model(
        kind, **SMALL, **({"num_patches": 16} if "siglip2" in kind else {"image_size": 32})
    )
    encoder: Any = HFVisionEncoder(architecture=config.to_dict(), layer=layer)
    assert any(name.startswith("model.head.") for name in encoder.state_dict())
    encoder.model.head.register_forward_hook(lambda *_: pytest.fail("nobody asked for the pooled token"))
    encoder(pixels())
    encoder(pixels())
