"""Maps of where a model looks: rows that sum to 1, words of whole tokens, nothing left changed, and the right place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

import tiny
from errors import refused
from opticnerve.interpret import attention_maps, attribution
from opticnerve.interpret.attribution import cell_edges, occlusion
from opticnerve.interpret.teacher_forcing import TeacherForced, Word, split_words
from opticnerve.models.vlm.build import Dock
from opticnerve.types import ask

pytestmark = pytest.mark.usefixtures("private_cache")
ASKED = ask("what colour is the circle?", tiny.picture(1))


def awake(dock: Dock) -> Dock:
    """Random weights whose answer is words, and depends on the picture."""
    words = dock.processor.tokenizer
    nothing = [i for i in range(len(words)) if not words.decode([i], skip_special_tokens=True).strip()]
    dock.model.generation_config.suppress_tokens = nothing
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in dock.model.image.connector.parameters():
            parameter.mul_(5)
        for layer in getattr(dock.model.image.fusion, "layers", ()):
            layer.alpha_cross_attn.fill_(0.9)
            for parameter in layer.cross_attn.parameters():
                parameter.mul_(6)
    return dock


@pytest.fixture
def spliced(docked: Callable[..., Dock]) -> Dock:
    return awake(docked("llama"))


@pytest.fixture
def crossed(docked: Callable[..., Dock]) -> Dock:
    return awake(docked("llama", fusion={"type": "cross_attention", "every": 1, "heads": 4}))


def forced(dock: Dock) -> TeacherForced:
    return TeacherForced(dock.model, dock.processor, ASKED, max_new_tokens=5)


def attribute(dock: Dock, *methods: str, **options: Any) -> attribution.Attribution:
    options = {"grid": 4, "patch": 2, "max_new_tokens": 5, **options}
    return attribution.attribute(dock.model, dock.processor, ASKED, methods=methods or None, **options)


class TestArithmetic:
    def test_rollout_of_identity_is_identity(self) -> None:
        same = torch.eye(5).expand(3, 2, 5, 5)
        assert torch.allclose(attention_maps.rollout(same), torch.eye(5))

    def test_rollout_by_hand(self) -> None:
        first, second = torch.tensor([[1.0, 0], [0.4, 0.6]]), torch.tensor([[1.0, 0], [1, 0]])
        found = attention_maps.rollout(torch.stack([first, second])[:, None])
        wanted = torch.tensor([[1.0, 0], [0.5, 0.5]]) @ torch.tensor([[1.0, 0], [0.2, 0.8]])
        assert torch.allclose(found, wanted)
        assert torch.allclose(found.sum(1), torch.ones(2))

    def test_a_row_of_relevance_is_that_of_the_whole_matrix(self) -> None:
        torch.manual_seed(0)
        weights, slopes = torch.rand(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
        whole = torch.eye(4)
        for weighted in (weights * slopes).clamp_min(0).mean(1):
            whole = whole + weighted @ whole
        for position in range(4):
            assert torch.allclose(attention_maps.relevance_row(weights, slopes, position), whole[position])

    @pytest.mark.parametrize(
        ("layer", "head", "facts"),
        [(3, None, ("layer 3", "0 to 2")), (None, 2, ("head 2", "0 to 1")), (-1, None, ("layer -1", "0 to 2"))],
    )
    def test_no_such_layer_or_head(self, layer: int | None, head: int | None, facts: tuple[str, str]) -> None:
        with refused("out-of-range", *facts):
            attention_maps.pick(torch.rand(3, 2, 4, 4), layer, head)


class TestOcclusion:
    def test_a_model_that_ignores_the_picture(self) -> None:
        drop = occlusion(lambda x: torch.full((len(x), 3), -0.7), torch.rand(3, 16, 16), grid=4, patch=2)
        assert drop.shape == (3, 4, 4)
        assert not drop.any()

    @pytest.mark.parametrize("patch", [1, 2, 3])
    @pytest.mark.parametrize("batch_size", [1, 4, 100])
    def test_a_model_that_sees_one_place_only(self, patch: int, batch_size: int) -> None:
        picture = torch.zeros(3, 16, 16)
        picture[:, 4:8, 12:16] = 1  # row 1, column 3 of four
        drop = occlusion(
            lambda x: x[:, :1, 4:8, 12:16].mean((2, 3)), picture, grid=4, patch=patch, batch_size=batch_size
        )[0]
        assert float(drop[1, 3]) == pytest.approx(1 - 1 / 16)
        assert divmod(int(drop.argmax()), 4) == (1, 3)
        if patch == 1:
            assert int((drop != 0).sum()) == 1

    def test_the_picture_is_left_alone(self) -> None:
        picture = torch.rand(3, 10, 10)
        before = picture.clone()
        occlusion(lambda x: x.mean((1, 2, 3))[:, None], picture, grid=3, patch=1)
        assert torch.equal(picture, before)

    def test_cells_cover_every_pixel(self) -> None:
        assert cell_edges(10, 3) == [0, 3, 7, 10]

    @pytest.mark.parametrize(
        ("grid", "patch", "facts"),
        [(1, 1, ("1 × 1", "2 to 16")), (17, 2, ("17 × 17", "2 to 16")), (4, 0, ("1 to 3", "not 0")),
         (4, 4, ("1 to 3", "not 4"))],
    )  # fmt: skip
    def test_bad_grids(self, grid: int, patch: int, facts: tuple[str, str]) -> None:
        with refused("out-of-range", "occlusion", *facts):
            occlusion(lambda x: x.mean((1, 2, 3))[:, None], torch.rand(3, 16, 16), grid=grid, patch=patch)


class TestWords:
    @pytest.mark.parametrize("kind", list(tiny.TOKENIZERS))
    @pytest.mark.parametrize("text", ["the red circle", "yes", "it's a zyxquw, no", "赤い circle 丸", "naïve café"])
    def test_tokens_of_one_word_are_merged(self, kind: str, text: str) -> None:
        tokenizer = tiny.tokenizer(kind)
        ids = tokenizer.encode(text, add_special_tokens=False)
        found, words = split_words(ids, tokenizer)
        assert found == text
        assert [t for w in words for t in w.tokens] == list(range(len(ids)))
        assert "".join(w.text for w in words) == text.replace(" ", "")
        if text.isascii():
            assert [w.text for w in words] == text.split()

    def test_a_words_weights_are_the_mean_of_its_tokens(self) -> None:
        words = [Word("ab", (0, 1)), Word("c", (2,))]
        weight_THW = torch.tensor([[[0.0, 1.0]], [[0.5, 0.5]], [[1.0, 0.0]]])
        assert attribution._words(weight_THW, words, torch.mean).tolist() == [[[0.25, 0.75]], [[1.0, 0.0]]]

    def test_nothing(self) -> None:
        assert split_words([], tiny.tokenizer()) == ("", [])


class TestForced:
    @pytest.mark.parametrize("which", ["spliced", "crossed"])
    def test_the_answer_is_the_greedy_one_and_eager_agrees(self, which: str, request: pytest.FixtureRequest) -> None:
        dock = request.getfixturevalue(which)
        f = forced(dock)
        inputs = {"input_ids": f.ids_1L, "pixel_values": f.pixels_CHW[None]}
        with torch.no_grad():
            logits = dock.model(**inputs).logits[0, f.first :]
        allowed = logits.clone()
        barred = dock.model.generation_config.suppress_tokens
        allowed[:, [i for i in barred if i < allowed.shape[1]]] = float("-inf")
        assert torch.equal(allowed.argmax(-1), f.answer_T)
        log_p = logits.log_softmax(-1).gather(1, f.answer_T[:, None])[:, 0]
        assert torch.allclose(f.log_p(f.pixels_CHW[None])[0], log_p, atol=1e-5)
        assert torch.allclose(f.log_p(f.pixels_CHW.repeat(3, 1, 1, 1)), log_p.expand(3, -1), atol=1e-5)
        assert dock.model.language_model.config._attn_implementation == "sdpa"
        found = f.ids_1L[0, f.visual_V]
        assert (found == dock.model.config.image_token_id).all()
        assert len(found) == int((f.ids_1L == dock.model.config.image_token_id).sum())
        weights, eager = attention_maps.self_attention(f)
        assert torch.allclose(eager, log_p, atol=1e-5)
        assert torch.allclose(weights.sum(-1), torch.ones(weights.shape[:-1]), atol=1e-5)
        assert not weights.triu(1).any()

    @pytest.mark.parametrize("which", ["spliced", "crossed"])
    def test_all_is_put_back(self, which: str, request: pytest.FixtureRequest) -> None:
        dock = request.getfixturevalue(which)
        language = dock.model.language_model
        parameter = next(dock.model.image.connector.parameters())
        parameter.requires_grad_(True)
        asking = [p.requires_grad for p in dock.model.parameters()]
        weights = {k: v.clone() for k, v in dock.model.state_dict().items()}
        # transformers leaves hooks of its own on the language model, which catch nothing until they are asked.
        hooks = sum(len(m._forward_hooks) for m in dock.model.image.modules())
        methods = [
            m
            for m in attribution.METHODS
            if attribution.METHODS[m] in ("any", "splice" if which == "spliced" else "cross_attention")
        ]
        attribute(dock, *methods)
        assert language.config._attn_implementation == "sdpa"
        assert {m.config._attn_implementation for m in language.modules() if hasattr(m, "config")} == {"sdpa"}
        assert [p.requires_grad for p in dock.model.parameters()] == asking
        assert all(p.grad is None for p in dock.model.parameters())
        assert all(torch.equal(v, weights[k]) for k, v in dock.model.state_dict().items())
        assert sum(len(m._forward_hooks) for m in dock.model.image.modules()) == hooks

    def test_put_back_after_an_error(self, spliced: Dock) -> None:
        language = spliced.model.language_model
        with pytest.raises(RuntimeError), attention_maps.eager_attention(language):
            assert language.config._attn_implementation == "eager"
            raise RuntimeError
        assert language.config._attn_implementation == "sdpa"


class TestMaps:
    def test_of_a_spliced_model(self, spliced: Dock) -> None:
        found = attribute(spliced, "attention", "rollout", "relevance", "gradient")
        assert [m.method for m in found.maps] == ["attention", "rollout", "relevance", "gradient", "occlusion"]
        for each in found.maps:
            assert each.grid_WHH.shape == (len(found.words), 4, 4)
            assert np.isfinite(each.grid_WHH).all()
            assert float(np.ptp(each.grid_WHH)) > 0
        for each in found.maps[:-1]:
            assert (each.grid_WHH >= 0).all()
            assert np.allclose(each.grid_WHH.sum((1, 2)), 1, atol=1e-5)
        assert all(0 < share < 1 for share in found.maps[0].on_picture or [0])
        assert len(found.log_p) == len(found.words)

    def test_of_a_crossed_model(self, crossed: Dock) -> None:
        found = attribute(crossed)
        assert [m.method for m in found.maps] == ["cross_attention", "occlusion"]
        assert np.allclose(found.maps[0].grid_WHH.sum((1, 2)), 1, atol=1e-5)
        assert found.maps[1].grid_WHH.any()
        one = attribute(crossed, "cross_attention", layer=1, head=3).maps[0]
        assert one.note.startswith("layer 1, head 3")
        assert not np.allclose(one.grid_WHH, found.maps[0].grid_WHH)

    def test_cross_attention_weights_are_the_ones_used(self, crossed: Dock) -> None:
        """What the fused kernel gives is weights × values."""
        f, caught = forced(crossed), []
        layer = crossed.model.image.fusion.layers[1].cross_attn
        handle = layer.register_forward_hook(lambda m, a, out: caught.append((a, out)))
        weights = attention_maps.cross_weights(f)
        handle.remove()
        ((_, (_, value_BHKd), _), out), *_ = caught
        mixed = layer.o_proj((weights[1][None] @ value_BHKd).transpose(1, 2).flatten(2))
        assert torch.allclose(mixed[:, f.first :], out[:, f.first :], atol=1e-5)

    def test_layers_and_heads_average_to_the_whole(self, spliced: Dock) -> None:
        f = forced(spliced)
        single = [attention_maps.attention(f, layer, head) for layer in range(2) for head in range(4)]
        assert torch.allclose(torch.stack(single).mean(0), attention_maps.attention(f), atol=1e-6)

    def test_relevance_is_zero_where_nothing_depends_on_the_picture(self, spliced: Dock) -> None:
        with torch.no_grad():
            spliced.model.image.connector.output_scale.zero_()
        found = attribute(spliced, "gradient")
        assert np.allclose(found.maps[0].grid_WHH, 1 / 16)
        assert np.allclose(found.maps[1].grid_WHH, 0, atol=1e-5)

    def test_gradient_finds_the_one_token_that_matters(self, spliced: Dock) -> None:
        """A connector that passes on its ninth token alone."""
        connector = spliced.model.image.connector
        only = torch.zeros(1, connector.num_tokens, 1)
        only[:, 8] = 1
        plain = connector.project
        connector.project = lambda features: type(features)(plain(features).tokens_BND * only, features.mask_BN)  # type: ignore[method-assign]
        assert attribute(spliced, "gradient").maps[0].peak(0) == (0.125, 0.625)

    @pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_neox", "opt", "qwen3"])
    def test_families(self, family: str, docked: Callable[..., Dock]) -> None:
        dock = awake(docked(family))
        before = dock.model.language_model.config._attn_implementation
        found = attribute(dock, "attention", "relevance")
        assert np.allclose(found.maps[1].grid_WHH.sum((1, 2)), 1, atol=1e-4)
        assert dock.model.language_model.config._attn_implementation == before

    def test_an_adapter_that_works_on_pictures_only(self, spliced: Dock) -> None:
        spliced.model.give_lora({"rank": 2, "when": "media"})
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in spliced.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        f = forced(spliced)
        assert torch.allclose(attention_maps.self_attention(f)[1], f.log_p(f.pixels_CHW[None])[0], atol=1e-4)


class TestWhatAModelAllows:
    def test_soft_tokens_without_a_place(self, docked: Callable[..., Dock]) -> None:
        dock = awake(docked("llama", connector={"type": "resampler", "num_latents": 4}))
        for method in ("attention", "rollout", "relevance"):
            with refused("unsupported", "--method occlusion", "gradient"):
                attribute(dock, method)
        found = attribute(dock)
        assert [m.method for m in found.maps] == ["gradient", "occlusion"]

    @pytest.mark.parametrize("connector", ["linear", "pixel_shuffle", "abstractor"])
    def test_connectors_that_keep_a_map(self, connector: str, docked: Callable[..., Dock]) -> None:
        dock = awake(docked("llama", connector=connector))
        side = dock.model.image.num_tokens**0.5
        assert attribute(dock, "relevance").maps[0].grid_WHH.shape[1:] == (side, side)

    def test_class_tokens_spoil_the_map(self, docked: Callable[..., Dock], vision_folder: Callable[..., str]) -> None:
        vision_encoder = {"type": "hf_vision", "name": vision_folder(), "class_token": "keep"}
        with refused("unsupported", "17 soft tokens"):
            attribute(docked("llama", vision_encoder), "attention")
        with refused("unsupported", "17 tokens"):
            attribute(docked("llama", vision_encoder), "gradient")

    @pytest.mark.parametrize(
        ("which", "method", "kind", "remedy"),
        [("crossed", "rollout", "unsupported", "--method cross_attention"),
         ("spliced", "cross_attention", "unsupported", "--method relevance"),
         ("spliced", "intuition", "unknown-name", "attention, rollout, relevance")],
    )  # fmt: skip
    def test_methods_of_other_models(
        self, which: str, method: str, kind: str, remedy: str, request: pytest.FixtureRequest
    ) -> None:
        with refused(kind, remedy):
            attribute(request.getfixturevalue(which), method)

    def test_layer_and_head_of_a_method_without(self, spliced: Dock) -> None:
        with refused("conflict", "layer", "relevance"):
            attribute(spliced, "relevance", layer=0)
        with refused("out-of-range", "layer 2", "0 to 1"):
            attribute(spliced, "attention", layer=2)

    def test_not_one_picture(self, spliced: Dock) -> None:
        for asked, pictures in ((ask("text alone"), 0), (ask("two", tiny.picture(1), tiny.picture(2)), 2)):
            with refused("out-of-range", f"{pictures} pictures"):
                attribution.attribute(spliced.model, spliced.processor, asked)

    def test_tiles(self, docked: Callable[..., Dock]) -> None:
        with refused("unsupported", "tiling"):
            attribute(docked("llama", tiling={"type": "anyres"}))


class TestSeenBox:
    def test_squashed(self) -> None:
        assert attribution.seen_box(tf.SiglipImageProcessor(size={"height": 32, "width": 32}), 100, 60) == (
            0,
            0,
            100,
            60,
        )

    def test_cropped(self) -> None:
        size = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
        assert attribution.seen_box(tf.CLIPImageProcessor(**size), 100, 60) == (26, 6, 74, 54)

    def test_padded(self) -> None:
        size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        assert attribution.seen_box(tf.LlavaImageProcessor(do_pad=True, **size), 100, 60) == (0, -20, 100, 80)


def test_models_that_keep_their_kernel_are_refused(spliced: Dock, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers logs a warning where a model cannot be switched (Falcon); its weights would be wrong."""
    language_model = spliced.model.language_model
    monkeypatch.setattr(type(language_model), "set_attn_implementation", lambda self, name: None)
    with (
        refused("unsupported", type(language_model).__name__, "--method gradient"),
        attention_maps.eager_attention(language_model),
    ):
        pass
