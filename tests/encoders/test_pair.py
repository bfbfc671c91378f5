"""Two encoders on one picture: names, sizes, blocks, and a whole model around them that comes back from its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from errors import refused
from opticnerve.encoders.base import last_blocks
from opticnerve.encoders.nested import PairEncoder
from opticnerve.inference.generate import Answerer
from opticnerve.models import OpticNerveForConditionalGeneration
from opticnerve.models.checkpoint import delta
from opticnerve.models.vlm.build import Dock
from opticnerve.types import ask

Folder = Callable[..., str]


def hf(name: str, **options: Any) -> dict[str, Any]:
    return {"type": "hf_vision", "name": name, **options}


def pair(first: dict[str, Any], second: dict[str, Any], **options: Any) -> PairEncoder:
    """As a recipe builds it."""
    names, rest = PairEncoder.take_name({"first": first, "second": second, **options})
    return PairEncoder.from_pretrained(names, **rest).eval()


def pixels(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


class TestJoining:
    def test_channels_stand_place_by_place(self, vision_folder: Folder) -> None:
        encoder = pair(hf(vision_folder("siglip_vision_model")), hf(vision_folder("dinov2")))
        assert (encoder.num_tokens, encoder.hidden_size, encoder.image_size) == (16, 48, 32)
        with torch.no_grad():
            found = encoder(pixels()).tokens_BND
            first, second = encoder.first(pixels()).tokens_BND, encoder.second(pixels()).tokens_BND
        assert torch.equal(found, torch.cat([first, second], 2))  # (both were prepared alike)

    def test_tokens_stand_in_a_row(self, vision_folder: Folder) -> None:
        encoder = pair(
            hf(vision_folder("siglip_vision_model")), hf(vision_folder("dinov2"), class_token="keep"), join="tokens"
        )
        assert (encoder.num_tokens, encoder.hidden_size) == (33, 24)
        with torch.no_grad():
            features = encoder(pixels())
            assert torch.equal(features.tokens_BND[:, 16:], encoder.second(pixels()).tokens_BND)
        assert features.mask_BN.shape == (2, 33) and features.mask_BN.all()

    def test_each_sees_the_pixels_as_it_was_trained_on_them(self, vision_folder: Folder) -> None:
        """By hand: grey 0.2 is (0.2 − 0.5) / 0.5 to the first and (0.2 − 0.1) / 0.25 to the second."""
        first = hf(vision_folder("vit"), mean=[0.5] * 3, std=[0.5] * 3)
        encoder = pair(first, hf(vision_folder("vit"), mean=[0.1] * 3, std=[0.25] * 3))
        assert list(encoder.image_processor().image_mean) == [0.5] * 3
        grey = torch.full((1, 3, 32, 32), 0.2)
        with torch.no_grad():
            found = encoder((grey - 0.5) / 0.5).tokens_BND
            wanted = encoder.second((grey - 0.1) / 0.25).tokens_BND
        torch.testing.assert_close(found[..., 24:], wanted, atol=1e-5, rtol=0)

    def test_any_encoders(self, vision_folder: Folder) -> None:
        encoder = PairEncoder(
            first={"type": "timm", "name": "test_vit", "image_size": 64},
            second={"type": "timm", "name": "test_vit3", "image_size": 64},
        ).eval()
        assert (encoder.num_tokens, encoder.hidden_size) == (16, 64 + 96)
        raw = pair(hf(vision_folder("dinov2")), {"type": "patches", "image_size": 32, "patch_size": 8})
        assert (raw.num_tokens, raw.hidden_size) == (16, 24 + 192)


class TestNames:
    def test_taken_apart_and_put_together(self, vision_folder: Folder) -> None:
        one, other = vision_folder("siglip_vision_model"), vision_folder("dinov2")
        options = {"first": hf(one), "second": hf(other, layer=-2), "join": "channels"}
        before = json.dumps(options)
        names, rest = PairEncoder.take_name(options)
        assert names == {"first": one, "second": other}
        assert rest == {
            "first": {"type": "hf_vision"}, "second": {"type": "hf_vision", "layer": -2}, "join": "channels"
        }  # fmt: skip
        assert json.dumps(options) == before

    def test_a_configuration_loads_the_same_weights(self, vision_folder: Folder) -> None:
        encoder = pair(hf(vision_folder("siglip_vision_model"), layer=-2), hf(vision_folder("dinov2")))
        options = json.loads(json.dumps(encoder.options))
        assert options == encoder.options
        names = {"first": vision_folder("siglip_vision_model"), "second": vision_folder("dinov2")}
        again = PairEncoder.from_pretrained(names, **PairEncoder.loading_options(options)).eval()
        fresh = PairEncoder(**options).eval()
        with torch.no_grad():
            assert torch.equal(again(pixels()).tokens_BND, encoder(pixels()).tokens_BND)
            assert not torch.allclose(fresh(pixels()).tokens_BND, encoder(pixels()).tokens_BND)
        assert again.options == fresh.options == encoder.options

    def test_files_of_both(self, vision_folder: Folder) -> None:
        folders = vision_folder("siglip_vision_model"), vision_folder("dinov2")
        encoder = pair(hf(folders[0]), hf(folders[1]))
        assert [str(Path(f).parent) for f in encoder.weight_files()] == list(folders)

    def test_planned_on_the_meta_device(self, vision_folder: Folder) -> None:
        options = {"first": hf(vision_folder("siglip_vision_model")), "second": hf(vision_folder("dinov2"))}
        names, rest = PairEncoder.take_name(options)
        with torch.device("meta"):
            planned = PairEncoder.planned(names, **rest)
            out = planned(torch.empty(2, 3, 32, 32)).tokens_BND
        assert out.is_meta and out.shape == (2, 16, 48)
        assert all(t.is_meta for t in [*planned.parameters(), *planned.buffers()])


def test_blocks_are_counted_pairwise_from_the_end(vision_folder: Folder) -> None:
    encoder = pair(hf(vision_folder("siglip_vision_model")), hf(vision_folder("dinov2")))
    one, other = encoder.first.blocks(), encoder.second.blocks()
    chosen = {id(p) for block in last_blocks(encoder, 2) for p in block.parameters()}
    assert chosen == {id(p) for block in [*one[-2:], *other[-2:]] for p in block.parameters()}
    uneven = PairEncoder(
        first={"type": "timm", "name": "test_vit", "image_size": 64},  # 6 blocks
        second={"type": "timm", "name": "test_vit3", "image_size": 64},  # 9
    )
    counts = [len(list(block.children())) for block in uneven.blocks()]
    assert counts == [1, 1, 1, 2, 2, 2, 2, 2, 2]


class TestAWholeModel:
    @pytest.fixture
    def made(self, docked: Callable[..., Dock], vision_folder: Folder, timm_folder: Folder) -> Dock:
        """With tables that no file holds on both sides: CLIP's position numbers, timm's relative positions."""
        first = hf(vision_folder("clip_vision_model"), image_size=64, layer=[-1, -2, -3, -4])
        second = {"type": "timm", "name": timm_folder("test_vit_relpos"), "image_size": 64}
        return docked("llama", {"type": "pair", "first": first, "second": second, "join": "tokens"})

    def test_saved_and_loaded(self, made: Dock, tmp_path: Path) -> None:
        batch = Answerer(made.model, made.processor).inputs([ask("q", tiny.picture(1))])
        made.model.save_pretrained(tmp_path)
        model = OpticNerveForConditionalGeneration.from_pretrained(tmp_path)
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, made.model(**batch).logits, rtol=1e-5, atol=1e-6)
        hidden = [n for n, _ in model.image.encoder.named_buffers() if n not in model.image.encoder.state_dict()]
        assert len(hidden) > 2
        for name in hidden:
            assert torch.equal(model.image.encoder.get_buffer(name), made.model.image.encoder.get_buffer(name)), name

    def test_a_run_names_both_bases(self, made: Dock, tmp_path: Path) -> None:
        names = set(made.model.part_parameters("encoder.last(1)"))
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in made.model.part_parameters("encoder.last(1)").values():
                parameter.add_(0.1 * torch.randn_like(parameter))
        delta.save(made.model, tmp_path, bases=made.bases, lora=None, trained=names)
        batch = Answerer(made.model, made.processor).inputs([ask("q", tiny.picture(1))])
        model = OpticNerveForConditionalGeneration.from_pretrained(tmp_path)
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, made.model(**batch).logits, rtol=1e-5, atol=1e-6)
        assert set(made.bases["image"]["name"]) == {"first", "second"}


class TestRefusals:
    def test_sizes(self, vision_folder: Folder) -> None:
        with refused("conflict", 48, 32, "image_size"):
            pair(hf(vision_folder("vit"), image_size=48), hf(vision_folder("dinov2")))

    def test_tokens(self, vision_folder: Folder) -> None:
        with refused("wrong-shape", "tokens", 17, 16):
            pair(hf(vision_folder("vit"), class_token="keep"), hf(vision_folder("dinov2")))

    def test_width(self, vision_folder: Folder) -> None:
        with refused("wrong-shape", "channels", 48, 24):
            pair(hf(vision_folder("vit"), layer=[-1, -2]), hf(vision_folder("dinov2")), join="tokens")

    def test_join(self, vision_folder: Folder) -> None:
        with refused("unknown-name", "'channels'", "'tokens'", "'sum'"):
            pair(hf(vision_folder("vit")), hf(vision_folder("dinov2")), join="sum")

    def test_no_name(self, vision_folder: Folder) -> None:
        with refused("missing-field", "encoder.second"):
            PairEncoder.take_name({"first": hf(vision_folder("vit")), "second": {"type": "hf_vision"}})

    @pytest.mark.parametrize("second", [None, "dinov2", {"name": "dinov2"}])
    def test_no_type(self, second: Any, vision_folder: Folder) -> None:
        with refused("wrong-type", "encoder.second", "type"):
            PairEncoder.take_name({"first": hf(vision_folder("vit")), "second": second})

    def test_an_unknown_option(self, vision_folder: Folder) -> None:
        with refused("unknown-key", "encoder.first", "'hf_vision'", "layers", "layer"):
            pair(hf(vision_folder("vit"), layers=-2), hf(vision_folder("dinov2")))

    def test_an_unknown_type(self, vision_folder: Folder) -> None:
        with refused("unknown-name", "'hf_visoin'", "'hf_vision'"):
            pair({"type": "hf_visoin", "name": "x"}, hf(vision_folder("dinov2")))

    def test_an_ear(self, vision_folder: Folder) -> None:
        with refused("unsupported", "encoder.second", "'whisper'", "audio"):
            pair(hf(vision_folder("vit")), {"type": "whisper", "name": "x"})

    def test_a_dotted_path_runs_nothing(self, vision_folder: Folder, tmp_path: Path, monkeypatch: Any) -> None:
        """A configuration from elsewhere could name any module there."""
        (tmp_path / "evil_eye.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Eye: ...\n")
        monkeypatch.syspath_prepend(tmp_path)
        with refused("unsupported", "'evil_eye:Eye'"):
            PairEncoder(first={"type": "evil_eye:Eye"}, second=hf(vision_folder("vit")))
        assert not (tmp_path / "ran").exists()
