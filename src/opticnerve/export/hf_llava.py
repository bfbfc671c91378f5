"""`hf-llava`: stock transformers' `LlavaForConditionalGeneration`, which vLLM and many others serve, too.

Tensors go under the classic names of the published LLaVA-1.5 checkpoints (`vision_tower.vision_model…`,
`language_model.model…`, `multi_modal_projector…`): transformers 5 and vLLM both load them.
Sources: Liu et al. 2024, Improved Baselines with Visual Instruction Tuning; transformers' `LlavaMultiModalProjector`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers as tf
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from opticnerve.export import parity, probe
from opticnerve.export.clip_like import connector_matrices, eye_refusals
from opticnerve.export.formats import Format, Proof
from opticnerve.export.parity import Reference
from opticnerve.export.samples import Sample, as_job
from opticnerve.export.simplify import fix_picture_size, fold_calibration
from opticnerve.inference.generate import Answerer
from opticnerve.models.merge import is_gated, merge_adapter

# What scales or bends logits behind the head of a causal model: LLaVA's class has nothing of it.
_BENDS = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0}


class HFLlava(Format):
    """CLIP or SigLIP × linear or two-layer mlp × splice, on a decoder with a plain head."""

    def refuse(self, model: Any, processor: Any) -> list[str]:
        return [*eye_refusals(model, "LLaVA's class"), *_connector_refusals(model), *_language_refusals(model)]

    def simplify(self, model: Any, processor: Any) -> None:
        merge_adapter(model)
        tower = model.image
        first, last = connector_matrices(tower.connector)
        fold_calibration(tower.connector, first, last)
        fix_picture_size(tower.encoder)

    def write(self, model: Any, processor: Any, folder: Path) -> list[str]:
        config = _config(model, processor)
        state = _state(model, rows=config.text_config.vocab_size)
        save_torch_state_dict(state, folder, metadata={"format": "pt"})
        config.save_pretrained(folder)
        _processor(model, processor).save_pretrained(folder)
        _generation(model, processor, config).save_pretrained(folder)
        notes = []
        if config.projector_hidden_act == "linear":
            notes.append("the one matrix of `linear` stands as two (the second is the identity) without activation")
        if getattr(config.vision_config, "tie_last_hidden_states", False):
            notes.append("the eye's last layer is read behind its final norm: config.json says so to transformers 5")
        return notes

    def check(
        self, folder: Path, model: Any, processor: Any, samples: Sequence[Sample], wanted: Sequence[Reference],
        scratch: Path,
    ) -> Proof:  # fmt: skip
        job = {
            "folder": str(folder), "model_class": "LlavaForConditionalGeneration", "samples": as_job(samples),
            "last": parity.LAST, "greedy": parity.GREEDY,
        }  # fmt: skip
        said = probe.run("stock_transformers", job, scratch)
        parity.check_loaded(said)
        difference = parity.compare_logits(wanted, probe.samples_of(said), said["engine"])
        return Proof(said["engine"], difference, parity.TOLERANCE, "of the largest logit", len(samples))


def _connector_refusals(model: Any) -> list[str]:
    options = model.config.towers.get("image", {}).get("connector", {})
    match options.get("type"):
        case "linear":
            return []
        case "mlp" if options["depth"] == 2:
            return []
        case "mlp":
            return [f"its mlp has {options['depth']} layers, LLaVA's projector two; nearest: connector {{type: mlp}}"]
        case None:
            return []
        case other:
            return [f"its connector is {other}, LLaVA's projector an mlp; nearest: connector {{type: mlp}}"]


def _language_refusals(model: Any) -> list[str]:
    language, reasons = model.language_model, []
    kind = language.config.model_type
    if is_gated(model):
        reasons.append(
            "its adapter works beside pictures alone (lora.when: media), and such a gate cannot be added into weights; "
            "nearest: lora {when: always}, or the format merged"
        )
    names = {n.partition(".")[0] for n in language.state_dict() if ".lora_" not in n}
    head = language.get_output_embeddings()
    if not names <= {"model", "lm_head"} or head is None or getattr(head, "bias", None) is not None:
        reasons.append(
            f"its language model ({kind}) is no plain decoder with a head without bias, which is what LLaVA holds; "
            "nearest: one of the Llama, Qwen2, Qwen3 or Mistral families"
        )
    for key, plain in _BENDS.items():
        if getattr(language.config, key, plain) not in (plain, None):
            reasons.append(
                f"its language model ({kind}) has {key} {getattr(language.config, key)}, which LLaVA's class leaves "
                "out; nearest: one of the Llama, Qwen2, Qwen3 or Mistral families"
            )
    return reasons


def _config(model: Any, processor: Any) -> Any:
    encoder, language = model.image.encoder, model.language_model
    text, vision = copy.deepcopy(language.config), copy.deepcopy(encoder.model.config)
    layer = encoder.layer
    if layer == "last":
        layer = -1
        if vision.model_type == "siglip_vision_model":
            vision.tie_last_hidden_states = True  # hidden_states[-1] is then what stands behind the final norm
    # LLaVA looks the placeholder up before it overwrites it: its table must have a row for it.
    text.vocab_size = max(text.vocab_size, len(processor.tokenizer), model.config.image_token_id + 1)
    text.architectures = vision.architectures = None
    connector = model.image.connector
    config: Any = tf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=model.config.image_token_id,
        image_seq_length=processor.num_image_tokens, vision_feature_layer=layer,
        projector_hidden_act=connector.options.get("activation", "linear"), multimodal_projector_bias=True,
        vision_feature_select_strategy=_strategy(encoder), tie_word_embeddings=bool(text.tie_word_embeddings),
    )  # fmt: skip
    config.bos_token_id, config.eos_token_id = text.bos_token_id, text.eos_token_id
    config.pad_token_id = processor.tokenizer.pad_token_id
    config.architectures = ["LlavaForConditionalGeneration"]
    for part in (config, config.text_config, config.vision_config):
        part.dtype = language.dtype
        part._name_or_path = ""
    return config


def _strategy(encoder: Any) -> Literal["default", "full"]:
    return "default" if encoder.prefix_tokens and encoder.class_token == "drop" else "full"


def _state(model: Any, *, rows: int) -> dict[str, Tensor]:
    """Every tensor under its classic name."""
    language, encoder = model.language_model, model.image.encoder
    state = {f"language_model.{n}": t for n, t in language.state_dict().items()}
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        state[name] = _lengthened(state[name], rows)
    if language.config.tie_word_embeddings:
        del state["language_model.lm_head.weight"]
    state |= {f"vision_tower.vision_model.{n}": t for n, t in encoder.model.state_dict().items()}
    first, last = connector_matrices(model.image.connector)
    second: tuple[Any, Any] = (last.weight, last.bias) if last is not first else (torch.eye(first.out_features), None)
    for name, (weight, given) in {"linear_1": (first.weight, first.bias), "linear_2": second}.items():
        bias = torch.zeros(len(weight)) if given is None else given
        state |= {f"multi_modal_projector.{name}.weight": weight, f"multi_modal_projector.{name}.bias": bias}
    dtype = language.dtype
    return {n: (t.to(dtype) if t.is_floating_point() else t).detach().contiguous() for n, t in state.items()}


def _lengthened(table_VD: Tensor, rows: int) -> Tensor:
    """The table with mean rows behind its own: such a row's logit is the mean of all logits, so never the largest."""
    more = rows - len(table_VD)
    if more <= 0:
        return table_VD
    return torch.cat([table_VD, table_VD.float().mean(0, keepdim=True).to(table_VD.dtype).expand(more, -1)])


def _processor(model: Any, processor: Any) -> Any:
    encoder = model.image.encoder
    return tf.LlavaProcessor(
        processor.image_processor, processor.tokenizer, patch_size=encoder.patch_size,
        vision_feature_select_strategy=_strategy(encoder), chat_template=processor.chat_template,
        image_token=processor.image_token, num_additional_image_tokens=encoder.prefix_tokens,
    )  # fmt: skip


def _generation(model: Any, processor: Any, config: Any) -> Any:
    """As the model has it, with the ends of a turn that training taught, and never a placeholder as a word."""
    generation = copy.deepcopy(model.generation_config)
    stops = Answerer(model, processor).stops()
    generation.eos_token_id, generation.pad_token_id = stops["eos_token_id"], stops["pad_token_id"]
    own = model.language_model.config.vocab_size
    if config.text_config.vocab_size > own:
        generation.suppress_tokens = list(range(own, config.text_config.vocab_size))
    return generation
