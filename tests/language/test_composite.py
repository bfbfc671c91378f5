"""A language model that sees or hears already gives its text model alone; what is no language model is refused in a
sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf

import opticnerve
import tiny
from errors import refused
from opticnerve.language.load import load_language, load_language_config
from opticnerve.language.lora import add_lora
from opticnerve.plan import plan
from opticnerve.recipe import Recipe
from opticnerve.types import OpticNerveError

pytestmark = pytest.mark.usefixtures("private_cache")

VOCABULARY = len(tiny.tokenizer()) + 8
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
# More layers than the text model, so that a longest list of layers would be the wrong one.
SIGHT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
QWEN_SIGHT: dict[str, Any] = {
    "depth": 5,
    "hidden_size": 16,
    "out_hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 16,
}
SOUND: dict[str, Any] = {
    "d_model": 16, "encoder_layers": 5, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "num_mel_bins": 8,
    "max_source_positions": 10,
}  # fmt: skip
M_ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}}


def seeing(kind: str, text: str, sight: str = "siglip_vision_model", **options: Any) -> Any:
    return tf.AutoConfig.for_model(
        kind, text_config={"model_type": text, **TEXT}, vision_config={"model_type": sight, **SIGHT}, **options
    )


COMPOSITES: dict[str, tuple[Callable[[], Any], str]] = {
    "Gemma 3": (lambda: tf.Gemma3Config(text_config=TEXT, vision_config=SIGHT, mm_tokens_per_image=4), "gemma3_text"),
    "Mistral 3": (lambda: seeing("mistral3", "mistral", "pixtral"), "mistral"),
    "LLaVA": (lambda: seeing("llava", "llama", "clip_vision_model"), "llama"),
    "LLaVA-OneVision": (lambda: seeing("llava_onevision", "qwen2"), "qwen2"),
    "PaliGemma": (lambda: seeing("paligemma", "gemma"), "gemma"),
    "Idefics3": (
        lambda: tf.Idefics3Config(text_config={"model_type": "llama", **TEXT}, vision_config=SIGHT, scale_factor=2), "llama"
    ),
    "InternVL": (
        lambda: tf.InternVLConfig(
            text_config={"model_type": "qwen2", **TEXT},
            vision_config={**SIGHT, "image_size": [32, 32], "patch_size": [8, 8]},
        ),
        "qwen2",
    ),
    "Qwen2.5-VL": (
        lambda: tf.Qwen2_5_VLConfig(text_config={**TEXT, **M_ROPE}, vision_config=QWEN_SIGHT), "qwen2"
    ),
    "Qwen3-VL": (
        lambda: tf.Qwen3VLConfig(
            text_config={**TEXT, **M_ROPE}, vision_config={**QWEN_SIGHT, "deepstack_visual_indexes": [0]}
        ),
        "qwen3",
    ),
    "Qwen2-Audio": (
        lambda: tf.Qwen2AudioConfig(text_config={"model_type": "qwen2", **TEXT}, audio_config=SOUND), "qwen2"
    ),
}  # fmt: skip


def save(folder: Path, config: Any) -> Any:
    torch.manual_seed(0)
    known = (tf.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, tf.MODEL_FOR_MULTIMODAL_LM_MAPPING)
    model = next(m[type(config)] for m in known if type(config) in m)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    words = tiny.tokenizer()
    words.pad_token = words.eos_token
    words.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", COMPOSITES)
def test_the_text_model_is_taken(name: str, tmp_path: Path) -> None:
    make, kind = COMPOSITES[name]
    whole = save(tmp_path, make())
    loaded = load_language(str(tmp_path))
    assert loaded.model.config.model_type == load_language_config(str(tmp_path)).model_type == kind
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        wanted = whole(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert float((loaded.model(input_ids=ids).logits - wanted).abs().max()) <= 1e-5
    whole_head, whole_words = whole.get_output_embeddings().weight, whole.get_input_embeddings().weight
    tied = loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight
    assert tied == (whole_head is whole_words)
    assert not any("vision" in n or "visual" in n or "audio" in n for n, _ in loaded.model.named_parameters())


def test_a_dock_on_a_composite_sees_and_adapts_the_right_layers(tmp_path: Path) -> None:
    save(tmp_path / "vlm", COMPOSITES["Gemma 3"][0]())
    vision = {"type": "hf_vision", "name": tiny.save_vision(tmp_path / "vision")}
    language = {"name": str(tmp_path / "vlm"), "chat_template": "chatml"}
    model, processor = opticnerve.dock(vision=vision, language=language, fusion={"type": "cross_attention", "every": 1})
    assert len(model.image.fusion.layers) == 2
    with torch.no_grad():
        for parameter in model.image.fusion.parameters():
            parameter.add_(torch.randn_like(parameter))
        one, other = (
            model(**processor(text="<image> a", images=tiny.picture(i), return_tensors="pt")).logits for i in (1, 2)
        )
    assert float((one - other).abs().max()) > 1e-3
    model.give_lora({"rank": 2})
    adapters = [n for n, _ in model.named_parameters() if "lora_" in n]
    assert adapters and all("language_model.model.layers." in n for n in adapters)
    model.save_pretrained(tmp_path / "saved")
    back: Any = type(model).from_pretrained(tmp_path / "saved")
    inputs = processor(text="<image> a", images=tiny.picture(1), return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(back(**inputs).logits, model(**inputs).logits)


def test_lora_on_a_whole_composite_stays_in_its_decoder(tmp_path: Path) -> None:
    whole = tf.Gemma3ForConditionalGeneration(COMPOSITES["Gemma 3"][0]())
    add_lora(whole.model.language_model, {"rank": 2})
    assert not any("lora_" in n for n, _ in whole.model.vision_tower.named_parameters())


def test_a_text_model_that_says_something_else_inside(tmp_path: Path) -> None:
    """Cohere's scale of the logits is left out by Aya Vision."""
    save(tmp_path, seeing("aya_vision", "cohere2"))
    with refused("unsupported", "aya_vision"):
        load_language(str(tmp_path))


def small(kind: str, **options: Any) -> Any:
    return tf.AutoConfig.for_model(
        kind, **{"vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
                 "num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **options},
    )  # fmt: skip


def no_language_model(what: str, folder: Path) -> str:
    """A folder that is none, with a tokenizer beside it unless that is what is wrong."""
    tower = {k: v for k, v in SIGHT.items() if k != "num_hidden_layers"} | {"num_hidden_layers": 2}
    match what:
        case "bert":
            tf.BertForMaskedLM(small("bert")).save_pretrained(folder)
        case "roberta":
            tf.RobertaForMaskedLM(small("roberta")).save_pretrained(folder)
        case "t5":
            config = tf.T5Config(vocab_size=VOCABULARY, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8)
            tf.T5ForConditionalGeneration(config).save_pretrained(folder)
        case "clip":
            tf.CLIPModel(
                tf.CLIPConfig(text_config=small("clip_text_model").to_dict(), vision_config=tower)
            ).save_pretrained(folder)
        case "vision":
            tiny.save_vision(folder)
        case "docked" | "run":
            vision = {"type": "hf_vision", "name": tiny.save_vision(folder / "v")}
            language = {"name": tiny.save_language(folder / "l"), "chat_template": "chatml"}
            made = opticnerve.dock(vision=vision, language=language)
            if what == "run":
                made.save(folder, [])
            else:
                made.model.save_pretrained(folder)
        case "dual encoder":
            (folder / "config.json").write_text(json.dumps({"model_type": "opticnerve_dual_encoder"}))
        case "no tokenizer":
            tiny.language_model("llama", VOCABULARY).save_pretrained(folder)
            return str(folder)
        case "damaged tokenizer":
            tiny.save_language(folder)
            (folder / "tokenizer.json").write_text("{")
            return str(folder)
        case "no weights":
            tiny.save_language(folder)
            (folder / "model.safetensors").unlink()
            return str(folder)
        case "damaged weights":
            tiny.save_language(folder)
            (folder / "model.safetensors").write_bytes(b"x" * 99)
            return str(folder)
        case "empty" | "nowhere":
            return str(folder if what == "empty" else folder / "nowhere")
        case "damaged configuration":
            (folder / "config.json").write_text("{")
        case "unknown":
            (folder / "config.json").write_text('{"model_type": "nonesuch"}')
        case "foreign code":
            (folder / "config.json").write_text('{"model_type": "nonesuch", "auto_map": {"AutoConfig": "c.C"}}')
        case "adapter":
            model = peft.get_peft_model(
                tiny.language_model("llama", VOCABULARY), peft.LoraConfig(target_modules=["q_proj"])
            )
            model.save_pretrained(str(folder))
        case "gguf":
            (folder / "m.gguf").write_bytes(b"GGUF" + bytes(40))
            return str(folder / "m.gguf")
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "what",
    ["bert", "roberta", "t5", "clip", "vision", "docked", "run", "dual encoder", "no tokenizer", "damaged tokenizer",
     "no weights", "damaged weights", "empty", "nowhere", "damaged configuration", "unknown", "foreign code", "adapter",
     "gguf"],
)  # fmt: skip
def test_what_is_no_language_model(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    language = {"name": no_language_model(what, folder), "chat_template": "chatml"}
    vision = {"type": "hf_vision", "name": tiny.save_vision(tmp_path / "vision")}
    with pytest.raises(OpticNerveError) as refused:
        opticnerve.dock(vision=vision, language=language)
    assert language["name"] in str(refused.value)
    assert len(str(refused.value)) < 700 + len(language["name"]) and "\n" not in str(refused.value)
    recipe = Recipe.model_validate({"name": "r", "model": {"language": language, "image": {"encoder": vision}}})
    if "weights" not in what:  # those, plan does not read
        with pytest.raises(OpticNerveError):
            plan.make(recipe)


@pytest.mark.parametrize("what", ["llama", "bert", "t5", "docked", "run", "empty", "nowhere", "damaged configuration",
                                  "unknown", "foreign code", "adapter"])  # fmt: skip
def test_what_is_no_vision_encoder(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    name = tiny.save_language(folder) if what == "llama" else no_language_model(what, folder)
    language = {"name": tiny.save_language(tmp_path / "language"), "chat_template": "chatml"}
    with pytest.raises(OpticNerveError) as refused:
        opticnerve.dock(vision={"type": "hf_vision", "name": name}, language=language)
    assert name in str(refused.value)


def test_embeddings_that_are_not_the_words(tmp_path: Path) -> None:
    """Falcon-H1 multiplies what it looks up itself, and not what it is given."""
    words = tiny.tokenizer()
    config = tf.FalconH1Config(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1,
        embedding_multiplier=5.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    tf.FalconH1ForCausalLM(config).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    with refused("unsupported", "falcon_h1"):
        load_language(str(tmp_path))
