"""Builders of tiny random models, tokenizers, pictures and data: real architectures, no weights to download."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import transformers as tf
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel as qwen2_vl_vision

from opticnerve import registry

CORPUS = [
    "USER: what colour is the circle in the picture?\nASSISTANT: the circle is red\n",
    "user\nassistant\nsystem\nmodel\nYou are a helpful assistant. Is there a blue square? yes no",
    "the quick brown fox jumps over the lazy dog, and a triangle is green; (it's 42!)\n\n",
    "A photo of a dog on a beach. Describe the image. How many? three of them",
] * 3
# Every special word that the chat templates under tests/templates write.
SPECIALS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>",
    "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<|system|>", "<|user|>",
    "<|assistant|>", "<|end|>", "<unk>", "<s>", "</s>",
]  # fmt: skip


def byte_level(*, trim_offsets: bool = False, corpus: list[str] = CORPUS, digits: bool = False) -> Tokenizer:
    """GPT-2's kind: bytes, a space belongs to the word behind it. `trim_offsets` leaves it out of the offsets.
    `digits`: each is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if digits:
        alone = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([alone, tokenizer.pre_tokenizer])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def metaspace(*, legacy: bool = False) -> Tokenizer:
    """SentencePiece's kind with byte fallback, as Llama 2 (`legacy`: a space before every piece) and Mistral have it.

    It begins every text with `<s>`.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train_from_iterator([line for text in CORPUS for line in text.split(" ")], trainer)
    state = json.loads(tokenizer.to_str())
    vocab = state["model"]["vocab"]
    for token in ["▁", *(f"<0x{b:02X}>" for b in range(256))]:
        vocab.setdefault(token, len(vocab))
    state["model"] |= {"byte_fallback": True, "fuse_unk": True}
    tokenizer = Tokenizer.from_str(json.dumps(state))
    if legacy:
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    return tokenizer


TOKENIZERS = {
    "byte-level": byte_level,
    "byte-level, trimmed offsets": lambda: byte_level(trim_offsets=True),
    "metaspace": metaspace,
    "metaspace, legacy": lambda: metaspace(legacy=True),
}


def tokenizer(
    kind: str = "byte-level", *, bos: str | None = None, eos: str = "<|im_end|>", chat_template: str | None = None
) -> Any:
    """A transformers tokenizer with every special word of the templates."""
    backend = TOKENIZERS[kind]()
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    made = tf.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )
    made.chat_template = chat_template
    return made


def language_config(family: str, vocabulary: int) -> Any:
    """A configuration of a real family, small enough for milliseconds."""
    common: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    tokens = {k: common[k] for k in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    match family:
        case "llama":
            return tf.LlamaConfig(**common, tie_word_embeddings=False)
        case "llama tied":
            return tf.LlamaConfig(**common, tie_word_embeddings=True)
        case "qwen2":
            return tf.Qwen2Config(**common, tie_word_embeddings=True)
        case "mistral":
            return tf.MistralConfig(**common, sliding_window=None)
        case "phi":
            return tf.PhiConfig(**{**common, "num_key_value_heads": 4})
        case "gemma2":
            return tf.Gemma2Config(**common, head_dim=8, query_pre_attn_scalar=8, sliding_window=256,  # type: ignore[call-arg]
                                   attn_implementation="eager", final_logit_softcapping=2.0)  # fmt: skip
        case "gpt2":
            return tf.GPT2Config(**tokens, n_embd=32, n_layer=2, n_head=4, n_positions=512)
        case "opt":
            return tf.OPTConfig(**tokens, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                                max_position_embeddings=512, word_embed_proj_dim=32)  # fmt: skip
        case "llama 3":
            scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 256, "rope_theta": 500_000.0}  # fmt: skip
            return tf.LlamaConfig(**common, rope_parameters=scaled, tie_word_embeddings=False)
        case "gpt_neox" | "falcon":
            own = {"num_key_value_heads": 4} if family == "gpt_neox" else {}
            return tf.AutoConfig.for_model(family, **{**common, **own})
        case "bloom" | "mpt":
            names = ("n_layer", "n_head") if family == "bloom" else ("n_layers", "n_heads")
            width = {"hidden_size": 32} if family == "bloom" else {"d_model": 32, "max_seq_len": 512}
            return tf.AutoConfig.for_model(family, **tokens, **width, **dict(zip(names, (2, 4), strict=True)))
        case "mamba":
            return tf.MambaConfig(**tokens, hidden_size=32, state_size=8, num_hidden_layers=2)
        case _ if family in MIXTURES:
            own = {"num_experts_per_tok": 2, "num_local_experts" if family == "mixtral" else "num_experts": 4}
            if family == "qwen3_moe":
                own |= {"moe_intermediate_size": 24, "head_dim": 8}
            return tf.AutoConfig.for_model(family, **common, **own)
        case "gemma" | "gemma3_text" | "qwen3":
            return tf.AutoConfig.for_model(family, **common, head_dim=8)
        case _ if family in MORE_FAMILIES:
            return tf.AutoConfig.for_model(family, **common)
    raise KeyError(family)


# Beside FAMILIES: tried where every family matters and one try is enough.
MORE_FAMILIES = (
    "llama 3", "qwen3", "gemma", "gemma3_text", "phi3", "smollm3", "gpt_neox", "falcon", "bloom", "mpt", "olmo2",
    "stablelm", "granite", "starcoder2", "cohere", "qwen3_moe", "mixtral", "olmoe",
)  # fmt: skip
MIXTURES = ("qwen3_moe", "mixtral", "olmoe")  # of experts
FAMILIES = ("llama", "llama tied", "qwen2", "mistral", "phi", "gemma2", "gpt2", "opt")


def language_model(family: str, vocabulary: int, *, seed: int = 0) -> Any:
    """A random language model whose answers depend on what it reads: weights five times the usual deviation."""
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(language_config(family, vocabulary))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name and "wte" not in name:
                parameter.mul_(5)
    model.generation_config.pad_token_id = None
    return model.eval()


def save_language(folder: Path, family: str = "llama", *, seed: int = 0, **tokenizer_args: Any) -> str:
    """A folder that `load_language` reads: model and tokenizer; returns its path as text."""
    words = tokenizer(**tokenizer_args)
    language_model(family, len(words), seed=seed).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def save_plain_language(folder: Path, *, width: int = 64, seed: int = 0, **tokenizer_args: Any) -> str:
    """A random Llama of two layers as it is drawn, to be trained from scratch, and its tokenizer."""
    words = tokenizer(**tokenizer_args)
    torch.manual_seed(seed)
    config = tf.LlamaConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=512, bos_token_id=None, eos_token_id=None, initializer_range=0.08,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config)
    model.generation_config.pad_token_id = None
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


_VISION: dict[str, dict[str, Any]] = {
    "clip_vision_model": {"projection_dim": 16},
    "siglip_vision_model": {},
    "dinov2": {},
    "dinov2_with_registers": {"num_register_tokens": 3},
    "vit": {},
}
VISION = tuple(_VISION)


def vision_config(family: str) -> Any:
    """32 px, patches of 8: a grid of 4 × 4."""
    return tf.AutoConfig.for_model(
        family, hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=32,
        patch_size=8, **_VISION[family],
    )  # fmt: skip


QWEN_VL = ("qwen2_vl_vision", "qwen2_5_vl_vision", "qwen3_vl_vision")
NATIVE = (
    *QWEN_VL, "siglip2_vision_model", "clip_vision_model", "dinov2_with_registers", "dinov3_vit", "pixtral",
    "smolvlm_vision", "internvl_vision",
)  # fmt: skip
_NAFLEX = {"num_patches": 16, "patch_size": 8}


def native_config(family: str) -> Any:
    """A vision transformer for pictures of any shape, in patches of 8 px."""
    common: dict[str, Any] = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    match family:
        case "siglip2_vision_model":
            return tf.AutoConfig.for_model(family, **common, **_NAFLEX)
        case "dinov3_vit" | "pixtral" | "smolvlm_vision" | "internvl_vision":
            more: dict[str, Any] = {"image_size": 32, "patch_size": 8}
            if family == "internvl_vision":
                more = {k: [v, v] for k, v in more.items()}
            if family == "pixtral":
                more["image_size"] = 80
            if family in ("dinov3_vit", "pixtral"):
                common["hidden_size"] = 32  # (a multiple of 8: rotary positions both ways)
            return tf.AutoConfig.for_model(family, **common, **more)
        case "qwen2_vl_vision":
            return tf.AutoConfig.for_model(
                family, depth=3, embed_dim=32, hidden_size=24, num_heads=2, mlp_ratio=2, patch_size=8
            )
        case "qwen2_5_vl_vision" | "qwen3_vl_vision":
            own: dict[str, Any] = {"window_size": 32, "fullatt_block_indexes": [1]}
            if family == "qwen3_vl_vision":
                own = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
            return tf.AutoConfig.for_model(
                family,
                depth=3,
                hidden_size=32,
                out_hidden_size=24,
                intermediate_size=48,
                num_heads=2,
                patch_size=8,
                **own,
            )
    return vision_config(family)


def native_vision(family: str = "siglip2_vision_model", **options: Any) -> dict[str, Any]:
    """A recipe's encoder with random weights, which shows pictures in their own shape."""
    kind = "qwen_vl" if family in QWEN_VL else "hf_vision"
    return {"type": kind, "name": save_native(family), "fit": "native", **options}


def load_native(family: str, **options: Any) -> Any:
    """The same as an encoder."""
    spec = native_vision(family, **options)
    return registry.encoders.get(spec.pop("type")).from_pretrained(spec.pop("name"), **spec).eval()


@cache
def save_native(family: str) -> str:
    """A folder that `HFVisionEncoder.from_pretrained` reads, its own image processor included; for this process."""
    folder = tempfile.TemporaryDirectory(prefix=family)
    _kept.append(folder)
    torch.manual_seed(3)
    config = native_config(family)
    model = tf.MODEL_MAPPING[type(config)](config) if family != QWEN_VL[0] else qwen2_vl_vision(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder.name)
    native_processor(family).save_pretrained(folder.name)
    return folder.name


def native_processor(family: str) -> Any:
    """The image processor of transformers that goes with `native_config`."""
    match family:
        case "siglip2_vision_model":
            return tf.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
        case "pixtral":
            return tf.PixtralImageProcessor(patch_size={"height": 8, "width": 8}, size={"longest_edge": 80})
        case _ if family in QWEN_VL:
            return tf.Qwen2VLImageProcessor(patch_size=8, size={"shortest_edge": 64 * 8, "longest_edge": 64 * 24})
    return tf.SiglipImageProcessor(size={"height": 32, "width": 32})


_kept: list[Any] = []


def save_vision(folder: Path, family: str = "clip_vision_model", *, seed: int = 1) -> str:
    """A folder that `HFVisionEncoder.from_pretrained` reads, its picture preparation included."""
    torch.manual_seed(seed)
    model = tf.MODEL_MAPPING[type(vision_config(family))](vision_config(family))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def save_timm(folder: Path, name: str = "test_efficientnet", *, seed: int = 2, **model_args: Any) -> str:
    """A folder in timm's `local-dir:` form; returns the name that timm loads it by."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    model = timm.create_model(name, pretrained=False, **model_args)
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    config = {k: v for k, v in model.pretrained_cfg.items() if isinstance(v, str | int | float | list | tuple)}
    (folder / "config.json").write_text(
        json.dumps(
            {"architecture": name, "num_classes": model.num_classes, "pretrained_cfg": config, "model_args": model_args}
        )
    )
    return f"local-dir:{folder}"


def save_whisper(folder: Path) -> str:
    """A Whisper of two seconds and its feature extractor."""
    config = tf.WhisperConfig(
        d_model=24, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=16, max_source_positions=100, vocab_size=50,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    torch.manual_seed(3)
    tf.WhisperModel(config).save_pretrained(folder)
    tf.WhisperFeatureExtractor(feature_size=16, chunk_length=2).save_pretrained(folder)
    return str(folder)


def save_bert(folder: Path, *, seed: int = 3) -> str:
    """A tiny BERT and its tokenizer."""
    words = tokenizer()
    torch.manual_seed(seed)
    config = tf.BertConfig(
        vocab_size=len(words), hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    tf.BertModel(config).save_pretrained(folder)
    words.pad_token = words.eos_token
    words.save_pretrained(folder)
    return str(folder)


def text_encoder(family: str = "bert", **options: Any) -> Any:
    """A tiny text encoder with random weights and its tokenizer: of `FAMILIES`, or a text model of transformers."""
    from opticnerve.encoders.text import HFTextEncoder

    words = tokenizer()
    torch.manual_seed(3)
    if family in FAMILIES:
        return HFTextEncoder.from_loaded(language_model(family, len(words)), words, **options)
    config = tf.AutoConfig.for_model(
        family, vocab_size=len(words), hidden_size=24, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    made = HFTextEncoder(architecture=config.to_dict(), **options)
    return HFTextEncoder.from_loaded(made.model, words, **options)


def picture(seed: int = 0, size: int = 40) -> PIL.Image.Image:
    """Noise: no two seeds look alike to any encoder."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def save_captions(folder: Path, count: int = 6) -> Path:
    """`captions.jsonl` beside its pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["a red circle", "a blue square", "the green dog", "three lazy foxes", "a photo of a beach", "no triangle"]
    lines = []
    for i in range(count):
        picture(i).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "caption": words[i % len(words)]}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "captions.jsonl"


def save_questions(folder: Path, pictures: int = 4, each: int = 3) -> Path:
    """`questions.jsonl`: several questions about each picture."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(pictures):
        picture(100 + i).save(folder / f"q{i}.png")
        lines += [
            json.dumps(
                {
                    "image": f"q{i}.png",
                    "question": f"is {k} in the picture?",
                    "answer": ["yes", "no", "red"][(i + k) % 3],
                }
            )
            for k in range(each)
        ]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "questions.jsonl"


def words_of(logits: torch.Tensor, bare: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A dock's logits and its bare language model's, both without the columns of placeholders."""
    from opticnerve.models.vlm.placeholders import sayable

    columns = sayable(logits)
    assert bare.shape[-1] - 2 <= len(columns) <= bare.shape[-1]
    return logits[..., columns], bare[..., columns]
