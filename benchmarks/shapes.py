"""Models of public sizes with random weights, ours and transformers' with the same ones, and what a step of them needs.

What a step costs depends on shapes alone, so no benchmark of speed needs a hub: the sizes are those of the public
configurations, the weights are drawn. `ours` and `llava` draw them in the same order from the same seed, so that both
sides compute the same loss and the same tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Trains = Literal["connector", "lora", "full"]
LORA = {"rank": 128, "alpha": 256}  # LLaVA-1.5's script finetune_lora.sh


@dataclass(frozen=True)
class Eye:
    """A vision transformer; `layer` is the entry of `hidden_states` that the connector gets. A `siglip2_vision_model`
    (NaFlex) shows pictures in their own shape, with as many patches as a square of `image` pixels has."""

    family: Literal["clip_vision_model", "siglip_vision_model", "siglip2_vision_model"]
    width: int
    mlp: int
    layers: int
    heads: int
    image: int
    patch: int
    layer: int

    @property
    def tokens(self) -> int:
        """Patches of a picture: the soft tokens."""
        return (self.image // self.patch) ** 2

    @property
    def class_token(self) -> bool:
        return self.family == "clip_vision_model"

    @property
    def native(self) -> bool:
        return self.family == "siglip2_vision_model"

    def config(self) -> Any:
        import transformers as tf

        own = {} if self.class_token else {"vision_use_head": False}  # the pooling head feeds no soft token
        size = {"num_patches": self.tokens} if self.native else {"image_size": self.image}
        return tf.AutoConfig.for_model(
            self.family, hidden_size=self.width, intermediate_size=self.mlp, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, patch_size=self.patch, **size, **own,
        )  # fmt: skip


@dataclass(frozen=True)
class Brain:
    """A decoder with gated MLPs and grouped-query attention."""

    family: Literal["llama", "qwen2", "qwen3"]
    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    positions: int
    rope_theta: float
    head: int | None = None  # numbers of a head, where they are not width / heads

    @property
    def image_token_id(self) -> int:
        """The placeholder: the last word, for transformers looks every id up in the table."""
        return self.vocabulary - 1

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(in, out) of each linear map of a layer: q, k, v, o, gate, up, down."""
        d, f, head = self.width, self.mlp, self.head or self.width // self.heads
        q, kv = head * self.heads, head * self.kv_heads
        return [(d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d)]

    def config(self) -> Any:
        import transformers as tf

        return tf.AutoConfig.for_model(
            self.family, hidden_size=self.width, intermediate_size=self.mlp, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied, max_position_embeddings=self.positions,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            bos_token_id=None, eos_token_id=None, pad_token_id=None, **({"head_dim": self.head} if self.head else {}),
        )  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """An eye, a brain, and between them LLaVA-1.5's two-layer MLP."""

    vision_encoder: Eye
    language_part: Brain


_CLIP_B = Eye("clip_vision_model", 768, 3072, 12, 12, 224, 16, layer=-2)
_CLIP_L = Eye("clip_vision_model", 1024, 4096, 24, 16, 336, 14, layer=-2)
_SIGLIP_B = Eye("siglip_vision_model", 768, 3072, 12, 12, 224, 16, layer=-1)
_SIGLIP2_SO = Eye("siglip2_vision_model", 1152, 4304, 27, 16, 256, 16, layer=-1)
_SMOLLM2 = {"vocabulary": 49152, "tied": True, "positions": 8192}
_SMOLLM2_135M = Brain("llama", 576, 1536, 30, 9, 3, **_SMOLLM2, rope_theta=1e5)
_SMOLLM2_360M = Brain("llama", 960, 2560, 32, 15, 5, **_SMOLLM2, rope_theta=1e5)
_SMOLLM2_1700M = Brain("llama", 2048, 8192, 24, 32, 32, **_SMOLLM2, rope_theta=1.3e5)
_VICUNA_7B = Brain("llama", 4096, 11008, 32, 32, 32, 32064, tied=False, positions=4096, rope_theta=1e4)
_QWEN_500M = Brain("qwen2", 896, 4864, 24, 14, 2, 151936, tied=True, positions=32768, rope_theta=1e6)
_QWEN3_600M = Brain("qwen3", 1024, 3072, 28, 16, 8, 151936, tied=True, positions=40960, rope_theta=1e6, head=128)
_TINY_CLIP = Eye("clip_vision_model", 32, 64, 3, 4, 32, 8, layer=-2)
_TINY_SIGLIP = Eye("siglip_vision_model", 32, 64, 2, 4, 32, 8, layer=-1)
_TINY_NAFLEX = Eye("siglip2_vision_model", 32, 64, 2, 4, 32, 8, layer=-1)
_TINY_LLAMA = Brain("llama", 48, 96, 2, 4, 2, 320, tied=True, positions=8192, rope_theta=1e4)
_TINY_QWEN = Brain("qwen2", 48, 96, 2, 4, 2, 320, tied=False, positions=8192, rope_theta=1e4)

SHAPES = {
    "smollm2-135m": Shape(_CLIP_B, _SMOLLM2_135M),
    "smollm2-360m": Shape(_CLIP_B, _SMOLLM2_360M),
    "smollm2-1.7b": Shape(_CLIP_B, _SMOLLM2_1700M),
    "llava-1.5-7b": Shape(_CLIP_L, _VICUNA_7B),
    "siglip-qwen2.5-0.5b": Shape(_SIGLIP_B, _QWEN_500M),
    "siglip2-qwen3-0.6b": Shape(_SIGLIP2_SO, _QWEN3_600M),
    "tiny-siglip2": Shape(_TINY_NAFLEX, replace(_TINY_QWEN, family="qwen3", head=16)),
    "tiny": Shape(_TINY_CLIP, _TINY_LLAMA),
    "tiny-siglip": Shape(_TINY_SIGLIP, _TINY_QWEN),
}


# -- models -----------------------------------------------------------------------------------------------------------


def ours(shape: Shape, dtype: Any = None, device: Any = "cpu", *, seed: int = 0, calibrate: bool = False) -> Any:
    """The docked model. `dtype`: bfloat16 by default. `calibrate`: let a stage measure the connector's scales, which
    transformers' LLaVA has no place for."""
    from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
    from opticnerve.models.vlm.tower import Tower

    encoder, connector, fusion, language = _parts(shape, dtype, device, seed, calibrate)
    return OpticNerveForConditionalGeneration.from_parts(
        language, {"image": Tower(encoder, connector, fusion)}, image_token_id=shape.language_part.image_token_id
    )


def llava(shape: Shape, dtype: Any = None, device: Any = "cpu", *, seed: int = 0) -> Any:
    """transformers' `LlavaForConditionalGeneration` with the weights of `ours`, everything in `dtype`."""
    import torch
    import transformers as tf

    encoder, connector, _, language = _parts(shape, dtype, device, seed, False)
    config = tf.LlavaConfig(
        vision_config=shape.vision_encoder.config(), text_config=shape.language_part.config(),
        image_token_index=shape.language_part.image_token_id, image_seq_length=shape.vision_encoder.tokens,
        vision_feature_layer=shape.vision_encoder.layer,
        vision_feature_select_strategy="default" if shape.vision_encoder.class_token else "full",
    )  # fmt: skip
    with torch.device("meta"):
        model = tf.LlavaForConditionalGeneration(config)
    inner = model.model
    inner.vision_tower, inner.language_model, model.lm_head = encoder.model, language.model, language.lm_head
    inner.multi_modal_projector.linear_1, _, inner.multi_modal_projector.linear_2 = connector.layers
    model.config.dtype = language.dtype
    return model.eval()


def _parts(shape: Shape, dtype: Any, device: Any, seed: int, calibrate: bool) -> tuple[Any, Any, Any, Any]:
    import torch
    import transformers as tf

    from opticnerve.connectors.mlp import MLPConnector
    from opticnerve.encoders.hf_vision import HFVisionEncoder
    from opticnerve.fusion.base import Splice

    dtype = dtype or torch.bfloat16
    vision_encoder, language_part = shape.vision_encoder, shape.language_part
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        language = tf.AutoModelForCausalLM.from_config(language_part.config(), dtype=dtype)
        vision = tf.AutoModel.from_config(vision_encoder.config(), dtype=dtype)
        connector = MLPConnector(
            in_size=vision_encoder.width,
            out_size=language_part.width,
            in_tokens=vision_encoder.tokens,
            calibrate=calibrate,
        ).to(dtype)
    shown = {"fit": "native", "max_patches": vision_encoder.tokens} if vision_encoder.native else {}
    encoder = HFVisionEncoder(
        architecture=vision_encoder.config().to_dict(), layer=vision_encoder.layer, _model=vision, **shown
    )
    fusion = Splice(language_size=language_part.width, language_layers=language_part.layers)
    return encoder.eval(), connector, fusion, language.eval()


def open_llava(model: Any, trains: Trains, *, lora: dict[str, int] = LORA) -> Any:
    """Of transformers' model, let train what `trains` says, the connector always; returns it (wrapped, for LoRA)."""
    model.requires_grad_(False)
    if trains == "lora":
        from peft import LoraConfig, get_peft_model

        layers = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
        config = LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], lora_dropout=0.0, target_modules=layers)
        # peft's float32 adapters beside bf16 weights cast every activation: slower, so not its best settings.
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
        model.to(next(p.dtype for p in model.parameters()))
        inner = model.base_model.model
    else:
        inner = model
    inner.model.multi_modal_projector.requires_grad_(True)
    if trains == "full":
        inner.model.language_model.requires_grad_(True)
        inner.lm_head.requires_grad_(True)
    return model


def stage(trains: Trains) -> dict[str, float]:
    """The same for `opticnerve.models.freeze.freeze`, at LLaVA-1.5's learning rates."""
    return {
        "connector": {"connector": 1e-3},
        "lora": {"connector": 2e-5, "language.lora": 2e-4},
        "full": {"connector": 2e-5, "language": 2e-5},
    }[trains]  # type: ignore[return-value]


# -- what a step needs ------------------------------------------------------------------------------------------------


def flops(
    shape: Shape,
    *,
    lengths: Sequence[int],
    supervised: int,
    images: int,
    trains: Trains = "connector",
    rank: int = LORA["rank"],
    live_encoder: bool = True,
    causal: bool = True,
) -> int:
    """The fewest floating-point operations of a training step, a multiply and an add being two.

    The language model forward and the gradient of its activations; the gradient of weights for those that train alone;
    the LM head at supervised positions alone; the eye forward, no further than the layer that
    is used. Padding, what is computed again (checkpointing, flash attention's backward pass), norms and activations
    count nothing.

    Args:
        lengths: tokens of each sample, soft tokens included: whom attention may join.
        supervised: positions with a label. images: pictures that the eye sees.
        trains: beside the connector, LoRA of `rank` on all linear layers, or the whole language model.
        live_eye: False where features come from a cache.
        causal: False counts the whole square of attention, as torch's flop counter does.
    """
    language_part, vision_encoder = shape.language_part, shape.vision_encoder
    tokens = sum(lengths)
    pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    ways = 3 if trains == "full" else 2  # forward, gradient of activations, gradient of weights

    def linear(positions: int, matrices: Sequence[tuple[int, int]]) -> int:
        adapter = 3 * rank * sum(i + o for i, o in matrices) if trains == "lora" else 0
        return 2 * positions * (ways * sum(i * o for i, o in matrices) + adapter)

    attention = 4 * pairs * language_part.width  # q·k and p·v; backward, each is two products
    layer = linear(tokens, language_part.matrices) + 3 * attention
    head = ways * 2 * supervised * language_part.width * language_part.vocabulary

    soft = images * vision_encoder.tokens
    # The first layer's input is frozen: nothing asks for its gradient.
    connector = (
        2 * soft * (2 * vision_encoder.width * language_part.width + 3 * language_part.width * language_part.width)
    )
    return (
        language_part.layers * layer + head + connector + (encoder_flops(vision_encoder, images) if live_encoder else 0)
    )


def encoder_flops(vision_encoder: Eye, images: int) -> int:
    """The eye's forward pass over so many pictures, up to the layer that the connector gets."""
    tokens = vision_encoder.tokens + vision_encoder.class_token
    used = vision_encoder.layers + 1 + vision_encoder.layer if vision_encoder.layer < 0 else vision_encoder.layer
    layer = (
        2 * tokens * (4 * vision_encoder.width**2 + 2 * vision_encoder.width * vision_encoder.mlp)
        + 4 * tokens**2 * vision_encoder.width
    )
    return images * (used * layer + 2 * vision_encoder.tokens * 3 * vision_encoder.patch**2 * vision_encoder.width)


def matmul_rate(
    sizes: Sequence[tuple[int, int, int]], *, device: str = "cpu", dtype: Any = None, seconds: float = 0.5
) -> float:
    """The best rate, in floating-point operations a second, of bare products (m, k) × (k, n) of random numbers."""
    import torch

    def finish() -> None:
        if device != "cpu":
            torch.accelerator.synchronize()

    best = 0.0
    for m, k, n in sizes:
        a, b = torch.randn(m, k, device=device), torch.randn(k, n, device=device)
        a, b = a.to(dtype or torch.bfloat16), b.to(dtype or torch.bfloat16)
        out = a @ b
        for _ in range(2):
            torch.mm(a, b, out=out)
        finish()
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        finish()
        times = max(3, int(seconds / max(time.perf_counter() - started, 1e-6)))
        started = time.perf_counter()
        for _ in range(times):
            torch.mm(a, b, out=out)
        finish()
        best = max(best, 2 * m * k * n * times / (time.perf_counter() - started))
    return best
