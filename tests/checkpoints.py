"""Tiny random checkpoints of transformers' own vision-language models, with real processors, saved as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import save_file

import tiny

SIDE, PATCH = 32, 8  # a grid of 4 × 4
LLAVA_CHAT = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)  # as llava-hf/llava-1.5-7b-hf writes it


def words(image_token: str = "<image>") -> Any:
    """A tokenizer with a word for pictures and a padding token."""
    made = tiny.tokenizer("metaspace, legacy", bos="<s>", eos="</s>")
    made.add_special_tokens({"additional_special_tokens": [image_token], "pad_token": "<unk>"})
    return made


def opt_words() -> Any:
    """OPT's kind: GPT-2's pieces, and every text begins with `</s>`."""
    model = json.loads(tiny.byte_level().to_str())["model"]
    made = tf.GPT2Tokenizer(
        vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]],  # type: ignore[misc]
        bos_token="</s>", eos_token="</s>",
        unk_token="</s>", pad_token="<pad>", add_bos_token=True,
    )  # fmt: skip
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return made


def shake(model: Any, seed: int = 0) -> Any:
    """Weights of which every one matters: norms, biases and zeros at the start, too."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _llava_parts(
    vision: str, text: str, *, image_token: str = "<image>", chat_template: str | None = LLAVA_CHAT, **options: Any
) -> tuple[Any, dict[str, Any]]:
    tokenizer = words(image_token)
    vocabulary = len(tokenizer) + 7  # padded to a round number, as the published checkpoints are
    prefix = {"clip_vision_model": 1, "vit": 1, "dinov2": 1, "siglip_vision_model": 0}.get(vision, 1)
    language = tiny.language_config(text.removesuffix(" untied"), vocabulary)
    if text.endswith(" untied"):
        language.tie_word_embeddings = False
    config = {
        "vision_config": tiny.vision_config(vision), "text_config": language,
        "image_token_index": tokenizer.convert_tokens_to_ids(image_token), "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default" if prefix else "full", **options,
    }  # fmt: skip
    processor = {
        "tokenizer": tokenizer, "patch_size": PATCH, "chat_template": chat_template, "num_additional_image_tokens": prefix, "image_token": image_token,
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
    }  # fmt: skip
    return config, processor


def _images(cls: Any, **options: Any) -> Any:
    return cls(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, **options)


def save_llava(
    folder: Path, *, vision: str = "clip_vision_model", text: str = "llama", dtype: Any = torch.float32, **options: Any
) -> Path:
    """LLaVA-1.5: CLIP at layer -2 without class token, mlp, Llama."""
    config, parts = _llava_parts(vision, text, **options)
    model = shake(tf.LlavaForConditionalGeneration(tf.LlavaConfig(**config)))
    model.generation_config.max_length = 77
    model.to(dtype).save_pretrained(folder)
    tf.LlavaProcessor(_images(tf.CLIPImageProcessor), **parts).save_pretrained(folder)
    return folder


def save_llava_next(folder: Path, *, vision: str = "clip_vision_model", pinpoints: Any = None, **options: Any) -> Path:
    """LLaVA-NeXT: the same with tiles."""
    config, parts = _llava_parts(vision, "mistral", **options)
    pinpoints = pinpoints or [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
    made = tf.LlavaNextConfig(**config, image_grid_pinpoints=pinpoints)
    shake(tf.LlavaNextForConditionalGeneration(made)).save_pretrained(folder)
    images = _images(tf.LlavaNextImageProcessor, image_grid_pinpoints=pinpoints)
    tf.LlavaNextProcessor(images, **parts).save_pretrained(folder)
    return folder


def save_llava_onevision(folder: Path, *, pinpoints: Any = None, **options: Any) -> Path:
    """LLaVA-OneVision: SigLIP, Qwen2, tiles within a budget of three."""
    options = {"vision_feature_layer": -1, "vision_aspect_ratio": "anyres_max_3", **options}
    config, parts = _llava_parts("siglip_vision_model", "qwen2", **options)
    tokenizer, strategy = parts["tokenizer"], parts["vision_feature_select_strategy"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]}, replace_extra_special_tokens=False)
    config["video_token_index"] = tokenizer.convert_tokens_to_ids("<video>")
    pinpoints = pinpoints or [[32 * rows, 32 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
    made = tf.LlavaOnevisionConfig(**config, image_grid_pinpoints=pinpoints)
    shake(tf.LlavaOnevisionForConditionalGeneration(made)).save_pretrained(folder)
    images = tf.LlavaOnevisionImageProcessor(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=pinpoints)
    tf.LlavaOnevisionProcessor(
        images, tokenizer, tf.LlavaOnevisionVideoProcessor(), num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy=strategy, chat_template=parts["chat_template"],
        vision_aspect_ratio=made.vision_aspect_ratio,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_renamed(stock: Path, folder: Path, names: dict[str, str], config: dict[str, Any]) -> Path:
    """A LLaVA of transformers as other code saves it: another config.json, tensors under other names (each begins with
    the first of `names` that it begins with), and the vision tower a folder of its own beside it."""
    made = tf.AutoModelForImageTextToText.from_pretrained(stock)
    made.model.vision_tower.save_pretrained(tower := folder.parent / f"{folder.name}-tower")
    processor = tf.AutoProcessor.from_pretrained(stock)
    sizes = {k: dict(getattr(processor.image_processor, k)) for k in ("size", "crop_size")}
    tf.CLIPImageProcessor(**sizes).save_pretrained(tower)
    processor.tokenizer.chat_template = None
    processor.tokenizer.save_pretrained(folder)
    config |= {"mm_vision_tower": str(tower), "vision_model_name_or_path": f"clip:{tower}", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    state = {}
    for name, tensor in made.state_dict().items():
        old, new = next(pair for pair in names.items() if name.startswith(pair[0]))
        state[new + name.removeprefix(old)] = tensor.clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_llava_original(folder: Path, *, anyres: bool = False, **changes: Any) -> Path:
    """LLaVA as its own code saves it; as transformers has it, it stands in `stock` beside it."""
    stock = (save_llava_next if anyres else save_llava)(folder.with_name("stock"))
    config = tf.AutoConfig.from_pretrained(stock)
    kind = "LlavaMistralForCausalLM" if anyres else "LlavaLlamaForCausalLM"
    options: dict[str, Any] = {"image_aspect_ratio": None}
    if anyres:
        pinpoints = [[w, h] for h, w in config.image_grid_pinpoints]  # turned, there
        options = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
        options["image_grid_pinpoints"] = pinpoints
    written = {
        **config.text_config.to_dict(), "architectures": [kind], "model_type": "llava_llama",
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_hidden_size": 24, "use_mm_proj": True, **options, **changes,
    }  # fmt: skip
    projector = "model.multi_modal_projector.linear_"
    names = {
        f"{projector}1": "model.mm_projector.0", f"{projector}2": "model.mm_projector.2",
        "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.", "model.language_model.": "model.",
        "": "",
    }  # fmt: skip
    return save_renamed(stock, folder, names, written)


def save_tinyllava(folder: Path) -> Path:
    """TinyLLaVA behind a SigLIP without its first token; as transformers has it, it stands in `stock` beside it."""
    options: dict[str, Any] = {"vision": "siglip_vision_model", "vision_feature_select_strategy": "default"}
    stock = save_llava(folder.with_name("stock"), **options)
    config = tf.AutoConfig.from_pretrained(stock)
    written = {
        "architectures": ["TinyLlavaForConditionalGeneration"], "model_type": "tinyllava",
        "connector_type": "mlp2x_gelu", "text_config": config.text_config.to_dict(),
        "vision_config": config.vision_config.to_dict(), "image_aspect_ratio": "square", "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch",
    }  # fmt: skip
    projector = "model.multi_modal_projector.linear_"
    names = {
        f"{projector}1": "connector._connector.0", f"{projector}2": "connector._connector.2",
        "model.vision_tower.": "vision_tower._vision_tower.vision_model.",
        "model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.",
    }  # fmt: skip
    return save_renamed(stock, folder, names, written)


IDEFICS_CHAT = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)  # as SmolVLM-256M-Instruct writes it


def save_idefics3(folder: Path, *, kind: str = "Idefics3", longest: int = 96, split: bool = True) -> Path:
    """Idefics3 or SmolVLM: tiles of 32 px, 2 × 2 patches as a token."""
    tokenizer = tiny.tokenizer("byte-level")
    names = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    special = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *names]
    tokenizer.add_special_tokens({"additional_special_tokens": special, "pad_token": "<unk>"})
    vision = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": SIDE, "patch_size": PATCH,
    }  # fmt: skip
    language = tiny.language_config("llama", len(tokenizer) + 3)
    config = getattr(tf, f"{kind}Config")(
        vision_config=vision,
        text_config=language.to_dict(),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    shake(getattr(tf, f"{kind}ForConditionalGeneration")(config)).save_pretrained(folder)
    images = getattr(tf, f"{kind}ImageProcessor")(
        size={"longest_edge": longest}, max_image_size={"longest_edge": SIDE}, do_image_splitting=split
    )
    tf.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=IDEFICS_CHAT).save_pretrained(folder)
    return folder


INTERNVL_CHAT = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)  # as InternVL3-1B-hf writes it


def save_internvl(folder: Path, *, layer: int = -1, most: int = 6, **vision: Any) -> Path:
    """InternVL: InternViT, tiles of 32 px, 2 × 2 patches as a token, Qwen2."""
    tokenizer = tiny.tokenizer("byte-level")
    names = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": list(names.values()), "pad_token": "<unk>"})
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder, extra_special_tokens=names)
    config = tf.InternVLConfig(
        vision_config={
            "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
            "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH], **vision,
        },
        text_config=tiny.language_config("qwen2", len(tokenizer) + 3).to_dict(), vision_feature_layer=layer,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4,
    )  # fmt: skip
    shake(tf.InternVLForConditionalGeneration(config)).save_pretrained(folder)
    images = tf.GotOcr2ImageProcessor(size={"height": SIDE, "width": SIDE}, max_patches=most)
    tf.InternVLProcessor(
        images, tokenizer, tf.InternVLVideoProcessor(), image_seq_length=4, chat_template=INTERNVL_CHAT
    ).save_pretrained(folder)
    return folder


def _blip2_sizes(cls: Any, tokenizer: Any, text: Any, **options: Any) -> dict[str, Any]:
    vision, former = cls.sub_configs["vision_config"], cls.sub_configs["qformer_config"]
    return {
        "vision_config": vision(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                image_size=SIDE, patch_size=PATCH),
        "qformer_config": former(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
                                 vocab_size=500, max_position_embeddings=64),
        "text_config": text, "num_query_tokens": 5, "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        **options,
    }  # fmt: skip


def save_blip2(folder: Path, *, text: Any = None, **options: Any) -> Path:
    """BLIP-2 on OPT."""
    tokenizer = opt_words()
    text = text or tiny.language_config("opt", len(tokenizer) + 3)
    config = tf.Blip2Config(**_blip2_sizes(tf.Blip2Config, tokenizer, text, **options))
    shake(tf.Blip2ForConditionalGeneration(config)).save_pretrained(folder)
    images = tf.BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    tf.Blip2Processor(images, tokenizer, num_query_tokens=5).save_pretrained(folder)
    return folder


def save_instructblip(folder: Path) -> Path:
    """InstructBLIP on Llama: the Q-Former reads the question, too."""
    tokenizer, questions = words(), tiny.tokenizer()
    questions.add_special_tokens({"pad_token": "<unk>"})
    text = tiny.language_config("llama", len(tokenizer) + 3)
    config = tf.InstructBlipConfig(**_blip2_sizes(tf.InstructBlipConfig, tokenizer, text))
    shake(tf.InstructBlipForConditionalGeneration(config)).save_pretrained(folder)
    images = tf.BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    tf.InstructBlipProcessor(images, tokenizer, questions, num_query_tokens=5).save_pretrained(folder)
    return folder


NANO_TILES = {f"r{row}c{column}": f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)}
NANO_WHOLE = {"image_token": "<|image|>", "global_image_token": "<|global_image|>"}
NANOVLM: dict[str, dict[str, Any]] = {
    "222M: a square before the prompt": {},
    "a square": {"vlm_extra_tokens": {"image_token": "<|image|>"}, "mp_image_token_length": 4},
    "tiles": {"vlm_extra_tokens": {"image_token": "<|image|>", **NANO_TILES}, "mp_image_token_length": 4},
    "tiles behind the whole": {
        "vlm_extra_tokens": {**NANO_WHOLE, **NANO_TILES}, "mp_image_token_length": 4, "resize_to_max_side_len": True,
        "lm_tie_weights": False,
    },
}  # fmt: skip


def save_nanovlm(folder: Path, *, form: str = "tiles behind the whole", **changes: Any) -> Path:
    """nanoVLM as its own code saves it, in the forms that its configurations have had; its tokenizer, which config.json
    names, is a folder beside it. Tiles of 24 px, patches of 4, squares of 3 × 3 patches as a token."""
    own = NANOVLM[form]
    tokenizer = tiny.tokenizer("byte-level")
    tokenizer.save_pretrained(words := folder.with_name(f"{folder.name}-words"))
    rows = len(tokenizer) + len(own.get("vlm_extra_tokens", {}))
    config = {
        "vit_hidden_dim": 24, "vit_inter_dim": 40, "vit_patch_size": 4, "vit_img_size": 24, "vit_n_heads": 2,
        "vit_n_blocks": 3, "vit_ln_eps": 1e-6, "vit_cls_flag": False, "lm_hidden_dim": 32, "lm_inter_dim": 48,
        "lm_rms_eps": 1e-5, "lm_re_base": 5000, "lm_max_position_embeddings": 512, "lm_vocab_size": rows,
        "lm_n_heads": 4, "lm_n_kv_heads": 2, "lm_n_blocks": 2, "lm_attn_scaling": 1.0, "lm_tie_weights": True,
        "lm_tokenizer": str(words), "mp_pixel_shuffle_factor": 3, **own,
    }  # fmt: skip
    if own:
        config["lm_chat_template"] = (
            "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
            "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        )
    if "tiles" in form:
        config["max_img_size"] = 72
    shapes: dict[str, tuple[int, ...]] = {
        "vision_encoder.patch_embedding.conv.weight": (24, 3, 4, 4), "vision_encoder.patch_embedding.conv.bias": (24,),
        "vision_encoder.patch_embedding.position_embedding": (1, 36, 24), "MP.proj.weight": (32, 9 * 24),
        "vision_encoder.layer_norm.weight": (24,), "vision_encoder.layer_norm.bias": (24,),
        "decoder.token_embedding.weight": (rows, 32), "decoder.norm.weight": (32,),
        "decoder.rotary_embd.inv_freq": (4,),
    }  # fmt: skip
    if not config["lm_tie_weights"]:
        shapes["decoder.head.weight"] = (rows, 32)
    vision = {"attn.qkv_proj": (72, 24), "attn.out_proj": (24, 24), "mlp.fc1": (40, 24), "mlp.fc2": (24, 40)}
    for i in range(3):
        for name, shape in {"ln1": (24,), "ln2": (24,), **vision}.items():
            shapes[f"vision_encoder.blocks.{i}.{name}.weight"] = shape
            shapes[f"vision_encoder.blocks.{i}.{name}.bias"] = shape[:1]
    decoder = {
        "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48), "attn.q_proj": (32, 32),
        "attn.k_proj": (16, 32), "attn.v_proj": (16, 32), "attn.out_proj": (32, 32), "norm1": (32,), "norm2": (32,),
    }  # fmt: skip
    shapes |= {f"decoder.blocks.{i}.{n}.weight": s for i in range(2) for n, s in decoder.items()}
    random = torch.Generator().manual_seed(0)
    state = {n: (len(s) == 1) + 0.2 * torch.randn(s, generator=random) for n, s in shapes.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | changes))
    save_file(state, folder / "model.safetensors")
    return folder
