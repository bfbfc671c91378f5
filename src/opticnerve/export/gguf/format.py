"""`gguf`: two files for llama.cpp, the language model and the vision encoder (`mmproj`).

llama-server -m model-f16.gguf --mmproj mmproj-f16.gguf
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from gguf import MODEL_ARCH_NAMES, GGUFWriter

from opticnerve.data.encode.tokenize import end_of_turn
from opticnerve.export import parity
from opticnerve.export.formats import Format, Options, Proof, Trial
from opticnerve.export.gguf import language as gguf_language
from opticnerve.export.gguf import tokenizer as gguf_tokens
from opticnerve.export.gguf import vision as gguf_vision
from opticnerve.export.simplify import adapter_refusals, connector_matrices, fix_picture_size, fold_calibration
from opticnerve.types import OpticNerveError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
    from opticnerve.models.vlm.processing import OpticNerveProcessor

# Largest difference of a likely word's log-probability, in nats. llama.cpp rounds activations as it does weights, and
# takes GELU from a table of 16-bit floats. Seen on SmolLM2-135M: f16 0.014, bf16 0.08, q8_0 0.34.
TOLERANCE = {"float32": 0.01, "f16": 0.03, "bf16": 0.15, "q8_0": 0.5}

# Read by both sides beside the prompts: what tokenizers stumble over.
PROBES = (
    "aaaaaaaa  bb   cc\n\n\nd\te", "It's 3.14159, isn't it? 1234567890", "naïve café — 東京 на кухне 🦊",
    "x=[(1,2),{3}]; y->z != 0x1F", "UPPER lower CamelCase snake_case",
)  # fmt: skip


class Gguf(Format):
    """SigLIP × linear or two-layer mlp × splice, on Llama, Mistral, Qwen2 or Qwen3."""

    dtypes: ClassVar[tuple[str, ...]] = ("f16", "bf16", "q8_0", "float32")
    needs: ClassVar[str | None] = "pip install xllamacpp"
    program = "llama_cpp"

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.dtype = "f16" if options.dtype == "auto" else options.dtype

    def refuse(self, model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor) -> list[str]:
        reasons = [*gguf_vision.refusals(model), *gguf_language.refusals(model.language_model)]
        reasons += adapter_refusals(model, "lora {when: always}")
        if words := gguf_tokens.refusals(processor.tokenizer):
            return reasons + words
        try:
            gguf_tokens.beginning(processor)
        except OpticNerveError as e:
            reasons.append(str(e))
        return reasons

    def simplify(self, model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor) -> None:
        super().simplify(model, processor)
        fold_calibration(model.image.connector, *connector_matrices(model.image.connector))
        fix_picture_size(model.image.encoder)

    def files(self, folder: Path) -> tuple[Path, Path]:
        """The language model's file and the vision encoder's."""
        return folder / f"model-{self.dtype}.gguf", folder / f"mmproj-{self.dtype}.gguf"

    def write(
        self, model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor, folder: Path
    ) -> list[str]:
        language, vision_encoder = self.files(folder)
        config = model.language_model.config
        writer = GGUFWriter(language, MODEL_ARCH_NAMES[gguf_language.ARCHITECTURES[config.model_type]])
        writer.add_type("model")
        writer.add_name(folder.parent.name)
        gguf_language.write(writer, model.language_model, self.dtype)
        tokenizer = processor.tokenizer
        turn_end = tokenizer.convert_tokens_to_ids(end_of_turn(processor, processor.chat_template))
        gguf_tokens.write(
            writer, tokenizer, processor.chat_template, rows=config.vocab_size, turn_end=turn_end,
            begins=gguf_tokens.beginning(processor),
        )  # fmt: skip
        _finish(writer)
        writer = GGUFWriter(vision_encoder, "clip")
        writer.add_type("mmproj")
        gguf_vision.write(writer, model.image, self.dtype)
        _finish(writer)
        size = model.image.encoder.image_size
        return [
            f"llama.cpp pads and resizes pictures in its own way: compared are pictures of {size} × {size} px, which "
            "need neither; for others its answers may differ from those of the model"
        ]

    def picture_sizes(self, model: Any) -> list[tuple[int, int]]:
        side = model.image.encoder.image_size
        return [(side, side)]

    def job(self, folder: Path, trial: Trial) -> dict[str, Any]:
        language, vision_encoder = self.files(folder)
        tokenizer, begins = trial.processor.tokenizer, gguf_tokens.beginning(trial.processor)
        first = gguf_tokens.first_space(tokenizer)
        return {
            "model": str(language), "mmproj": str(vision_encoder), "greedy": parity.GREEDY,
            "samples": [s.messages() for s in trial.samples], "threads": torch.get_num_threads(),
            "texts": [*(begins + _unbegun(tokenizer, t) for t in _texts(trial)), *(first + t for t in PROBES)],
            "banned": gguf_tokens.half_letters(tokenizer, trial.model.language_model.config.vocab_size),
        }  # fmt: skip

    def check(self, folder: Path, trial: Trial) -> Proof:
        tokenizer, begins = trial.processor.tokenizer, gguf_tokens.beginning(trial.processor)
        job = self.job(folder, trial)
        assert self.options.check_python is not None
        said = parity.run(self.program, job, trial.scratch, python=self.options.check_python)
        for text, ids in zip([*_texts(trial), *PROBES], said["ids"], strict=True):
            if ids != (ours := _read(tokenizer, text)):
                raise OpticNerveError(f"{said['engine']} reads {text!r} as {ids}, not as {ours}", kind="mismatch")
        for sample, reference in zip(said["samples"], trial.wanted, strict=True):
            prompt = sample["prompt"].removeprefix(begins)
            if _unbegun(tokenizer, reference.text) != reference.text:
                prompt = tokenizer.bos_token + prompt.removeprefix(tokenizer.bos_token)
            sample["prompt"] = prompt
        allowed = TOLERANCE[self.dtype]
        difference = parity.compare_logprobs(
            trial.model, trial.processor, trial.samples, trial.wanted, said, job["banned"], allowed
        )
        return Proof(said["engine"], difference, allowed, "nats of a log-probability", len(trial.samples))


def _texts(trial: Trial) -> list[str]:
    """The prompts of words alone."""
    return [r.text for r, s in zip(trial.wanted, trial.samples, strict=True) if not s.pictures]


def _read(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Our token ids; a begin token is never written twice."""
    begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    ids: list[int] = tokenizer(text, add_special_tokens=not begun)["input_ids"]
    return ids


def _unbegun(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text without the begin token: where llama.cpp's tokeniser adds it by itself, its server takes it off."""
    adds = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return text.removeprefix(tokenizer.bos_token) if adds else text


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
