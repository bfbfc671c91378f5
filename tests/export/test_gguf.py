"""`gguf`: the files' contents, what is refused, and the comparison; llama.cpp itself where OPTICNERVE_LLAMA_PYTHON names
an interpreter that has `xllamacpp`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers as tf
from tokenizers import Regex, pre_tokenizers

import tiny
from errors import refused
from opticnerve.export import parity, samples
from opticnerve.export.export import export
from opticnerve.export.formats import Options
from opticnerve.export.gguf import format as gguf_format
from opticnerve.export.gguf import tokenizer as gguf_tokens
from opticnerve.inference.load import load_model
from opticnerve.language.chat_template import CHATML, PLAIN_CHAT, with_parts

pytestmark = pytest.mark.usefixtures("private_cache")
Make = Callable[..., Path]
ENGINE = os.environ.get("OPTICNERVE_LLAMA_PYTHON")


def metadata(file: Path) -> dict[str, Any]:
    return {k: f.contents() for k, f in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_language_file_is_read_back_by_transformers_with_the_same_logits(
    family: str, saved: Make, tmp_path: Path
) -> None:
    source = saved(family, "siglip_vision_model", layer="last", lora={"rank": 4})
    made = export(source, "gguf", tmp_path / "out", options=Options(dtype="float32", unchecked=True))
    assert made.notes[-1].startswith("UNCHECKED")
    assert "UNCHECKED" in (tmp_path / "out/README.md").read_text()
    theirs = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model-float32.gguf", quantization_config=tf.GgufConfig(dequantize=True)
    )  # fmt: skip
    ours, _ = load_model(source, device="cpu")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        words = tiny.words_of(ours(ids).logits, theirs(ids).logits)
        torch.testing.assert_close(*words, rtol=1e-4, atol=1e-4)


def test_the_eye_s_file_says_what_llama_cpp_must_know(saved: Make, tmp_path: Path) -> None:
    source = saved("llama", "siglip_vision_model", layer=-2, connector="linear")
    export(source, "gguf", tmp_path / "out", options=Options(dtype="q8_0", unchecked=True))
    said = metadata(tmp_path / "out/mmproj-q8_0.gguf")
    assert said["clip.projector_type"] == "mlp"
    assert said["clip.vision.feature_layer"] == [2]
    assert said["clip.vision.block_count"] == 2  # of three: the last is never run
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "out/mmproj-q8_0.gguf").tensors}
    assert list(tensors["mm.0.weight"].shape) == [24, 64]  # x = GELU(x) - GELU(-x): twice the width
    assert not any(n.startswith(("v.blk.2.", "v.post_ln", "v.head")) for n in tensors)
    assert tensors["v.blk.0.ffn_down.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    words = metadata(tmp_path / "out/model-q8_0.gguf")
    assert words["tokenizer.ggml.pre"] == "gpt-2"
    assert words["tokenizer.ggml.tokens"][words["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"
    assert words["tokenizer.chat_template"].endswith(CHATML)


def test_without_an_engine_there_is_no_export(saved: Make, tmp_path: Path) -> None:
    with refused("not-installed", "pip install xllamacpp"):
        export(saved("llama", "siglip_vision_model"), "gguf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"vision_encoder": "clip_vision_model"}, "CLIP's class token behind the patches"),
        ({"connector": {"type": "pixel_shuffle"}}, "<fake_token_around_image>"),
        ({"connector": {"type": "mlp", "activation": "silu"}}, "llama.cpp's two and gelu"),
        ({"kind": "metaspace"}, "not its way of joining"),
        ({"family": "gpt2"}, "its language model is a gpt2"),
        ({"lora": {"rank": 2, "when": "media"}}, "lora.when: media"),
    ],
)
def test_what_llama_cpp_cannot_hold_is_refused(
    options: dict[str, Any], reason: str, saved: Make, tmp_path: Path
) -> None:
    options = {"vision_encoder": "siglip_vision_model", **options}
    with refused("unsupported", reason):
        export(saved(**options), "gguf", tmp_path / "out", options=Options(unchecked=True))
    assert list(tmp_path.iterdir()) == []


def cut_by(*steps: Any) -> Any:
    words = tiny.tokenizer()
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return words


def test_cutting_rules_are_known_by_their_letters() -> None:
    plain, merged = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel(False, use_regex=False)
    digits = pre_tokenizers.Digits(individual_digits=True)

    def split(pattern: str) -> Any:
        return pre_tokenizers.Split(Regex(pattern), "isolated")

    assert gguf_tokens.pre_tokenizer(cut_by(plain)) == "gpt-2"
    assert gguf_tokens.pre_tokenizer(cut_by(digits, plain)) == "smollm"
    assert gguf_tokens.pre_tokenizer(cut_by(split(gguf_tokens._QWEN2), merged)) == "qwen2"
    assert gguf_tokens.pre_tokenizer(cut_by(split(gguf_tokens._LLAMA3), merged)) == "llama-bpe"
    assert gguf_tokens.pre_tokenizer(cut_by(split(r"\p{L}+"), merged)) is None
    assert gguf_tokens.pre_tokenizer(cut_by(pre_tokenizers.ByteLevel(add_prefix_space=True))) is None


def test_a_template_of_its_own_is_left_alone() -> None:
    own = "{% for m in messages %}{{ m }}{% endfor %}"
    assert gguf_tokens.own_template(own) == own
    assert gguf_tokens.own_template(with_parts(CHATML)).endswith(CHATML)


@pytest.fixture
def pretended(saved: Make, tmp_path: Path) -> Any:
    """Our own model in the engine's place."""
    model, processor = load_model(saved("llama", "siglip_vision_model"), device="cpu")
    chosen = samples.make(tmp_path, picture_sizes=[(32, 32)], sees=True, hears=False)[:2]
    wanted = parity.record(model, processor, chosen)
    said: dict[str, Any] = {"engine": "it", "samples": []}
    for reference in wanted:
        prompt = reference.text.replace(processor.image_token, "<__media_x__>")
        first = reference.greedy[0]
        top = reference.logits_KV[-1].log_softmax(-1)
        said["samples"].append(
            {
                "prompt": prompt,
                "prompt_tokens": len(reference.ids),
                "greedy": [first],
                "top": [[[first, float(top[first])]]],
            }
        )
    return (model, processor, chosen, wanted), said


def test_log_probabilities_are_compared_word_for_word(pretended: Any) -> None:
    ours, said = pretended
    assert parity.compare_logprobs(*ours, said, [], 0.01) < 1e-4  # type: ignore[call-arg]
    sample = said["samples"][1]
    kept = dict(sample)
    for change, problem in (
        ({"prompt": "USER:"}, "the chat template writes 'USER:'"),
        ({"prompt_tokens": 3}, "the prompt has 3 tokens"),
        ({"greedy": []}, "no word came back"),
        ({"top": [[[kept["greedy"][0], -9.0]]]}, "log-probabilities differ by up to"),
        ({"greedy": [kept["greedy"][0] - 1]}, f"it says {kept['greedy'][0] - 1}, we {kept['greedy'][0]}"),
    ):
        said["samples"][1] = {**kept, **change}
        with refused("mismatch", problem):
            parity.compare_logprobs(*ours, said, [], 0.01)  # type: ignore[call-arg]


@pytest.mark.skipif(ENGINE is None, reason="OPTICNERVE_LLAMA_PYTHON names no interpreter with xllamacpp")
@pytest.mark.parametrize("dtype", ["float32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize(
    "options",
    [
        {"family": "llama", "layer": -2},
        {"family": "qwen2", "layer": "last", "connector": "linear", "lora": {"rank": 4}},
        {"family": "llama tied", "layer": [1, -1], "image_size": 48},
        {"family": "llama 3"},
    ],
)
def test_llama_cpp_gives_the_same_answers(dtype: str, options: dict[str, Any], saved: Make, tmp_path: Path) -> None:
    source = saved(vision_encoder="siglip_vision_model", **options)
    made = export(source, "gguf", tmp_path / "out", options=Options(dtype=dtype, check_python=ENGINE))
    assert made.proof is not None
    assert made.proof.difference <= gguf_format.TOLERANCE[dtype]


@pytest.mark.skipif(ENGINE is None, reason="OPTICNERVE_LLAMA_PYTHON names no interpreter with xllamacpp")
@pytest.mark.parametrize("chat", [CHATML, PLAIN_CHAT, "{{ bos_token }}" + PLAIN_CHAT], ids=["chatml", "vicuna", "bos"])
@pytest.mark.parametrize("spaces", ["prepend", "always", "first", "never"])
def test_llama_cpp_reads_sentencepieces_words_alike(spaces: str, chat: str, saved: Make, tmp_path: Path) -> None:
    source = saved(vision_encoder="siglip_vision_model", kind=f"sentencepiece, {spaces}", bos="<s>", chat=chat)
    made = export(source, "gguf", tmp_path / "out", options=Options(dtype="float32", check_python=ENGINE))
    assert made.proof is not None
    assert made.proof.difference <= gguf_format.TOLERANCE["float32"]


@pytest.mark.skipif(ENGINE is None, reason="OPTICNERVE_LLAMA_PYTHON names no interpreter with xllamacpp")
def test_one_scaled_tensor_is_caught_by_llama_cpp(saved: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from opticnerve.export.gguf import vision as gguf_vision

    honest = gguf_vision.add

    def scaled(writer: Any, name: str, values: Any, dtype: str) -> None:
        honest(writer, name, values * 3 if name == "mm.2.weight" else values, dtype)

    monkeypatch.setattr(gguf_vision, "add", scaled)
    with refused("mismatch", "log-probabilities"):
        export(
            saved("llama", "siglip_vision_model"), "gguf", tmp_path / "out",
            options=Options(dtype="float32", check_python=ENGINE),
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []
