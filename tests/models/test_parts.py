"""Each word for a part opens exactly its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import tiny
from errors import refused
from opticnerve.language.lora import add_lora, is_lora
from opticnerve.models.vlm.build import Dock, dock

pytestmark = pytest.mark.usefixtures("private_cache")


def names(made: Dock, part: str) -> set[str]:
    return set(made.model.part_parameters(part))


def all_names(made: Dock, prefix: str = "") -> set[str]:
    return {n for n, _ in made.model.named_parameters() if n.startswith(prefix)}


@pytest.fixture(scope="module")
def llama(language_folder: Callable[..., str], vision_folder: Callable[..., str], private_cache: Any) -> Dock:
    made = dock(vision_folder(), "mlp", language_folder("llama"))
    add_lora(made.model.language_model, {"rank": 2})
    return made


def test_connector_and_encoder(llama: Dock) -> None:
    assert names(llama, "connector") == all_names(llama, "image.connector.")
    assert names(llama, "encoder") == all_names(llama, "image.encoder.")
    assert names(llama, "image.connector") == names(llama, "connector")
    assert names(llama, "image.encoder.last(1)") == names(llama, "encoder.last(1)")


def test_last_blocks(llama: Dock) -> None:
    assert names(llama, "encoder.last(1)") == all_names(llama, "image.encoder.model.encoder.layers.2.")
    two = names(llama, "encoder.last(2)")
    assert two == names(llama, "encoder.last(1)") | all_names(llama, "image.encoder.model.encoder.layers.1.")
    assert names(llama, "language.last(1)") == {
        n for n in all_names(llama, "language_model.model.layers.1.") if not is_lora(n)
    }
    for part, have in (("encoder.last(4)", 3), ("language.last(3)", 2), ("language.last(0)", 2)):
        with refused("out-of-range", have):
            names(llama, part)


def test_language(llama: Dock) -> None:
    everything = all_names(llama, "language_model.")
    assert names(llama, "language.lora") == {n for n in everything if is_lora(n)}
    assert names(llama, "language") == {n for n in everything if not is_lora(n)}
    assert names(llama, "language.embeddings") == {
        "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
    }
    # Two matrices for each of seven linear layers in two blocks; the LM head has none.
    assert len(names(llama, "language.lora")) == 2 * 7 * 2


@pytest.mark.parametrize("family", ["llama tied", "gpt2"])
def test_tied_embeddings_are_one(docked: Callable[..., Dock], family: str) -> None:
    assert len(names(docked(family), "language.embeddings")) == 1


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_has_its_parts(docked: Callable[..., Dock], family: str) -> None:
    made = docked(family)
    add_lora(made.model.language_model, {"rank": 2})
    assert names(made, "language") | names(made, "language.lora") == all_names(made, "language_model.")
    inner = names(made, "language.last(2)") | names(made, "language.embeddings")
    assert inner < names(made, "language")
    assert not names(made, "language.last(1)") & names(made, "language.embeddings")
    assert len(names(made, "language.last(2)")) == 2 * len(names(made, "language.last(1)"))


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_vit", "test_convnext"])
def test_blocks_of_timm_models(docked: Callable[..., Dock], timm_folder: Callable[..., str], name: str) -> None:
    made = docked("llama", {"type": "timm", "name": timm_folder(name), "image_size": 96})
    count = len(made.model.image.encoder.blocks())
    assert count > 1
    one, every = names(made, "encoder.last(1)"), names(made, f"encoder.last({count})")
    assert one < every <= names(made, "encoder")
    with refused("out-of-range", count):
        names(made, f"encoder.last({count + 1})")


def test_unknown_and_absent_parts(docked: Callable[..., Dock], llama: Dock) -> None:
    with pytest.raises(ValueError, match=r"there is no part 'conector'.*'connector'"):
        names(llama, "conector")
    with refused("unknown-name", "audio.connector"):
        names(llama, "audio.connector")
    with refused("unknown-name", "language.lora"):
        names(docked(), "language.lora")


def test_full_names(llama: Dock) -> None:
    words = ["connector", "image.connector", "encoder.last(2)", "language.lora"]
    assert [llama.model.full_name(p) for p in words] == [
        "image.connector", "image.connector", "image.encoder.last(2)", "language.lora"
    ]  # fmt: skip
