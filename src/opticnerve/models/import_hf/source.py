"""A checkpoint of transformers: what is read, the reasons to refuse it, and how its tensors move from transformers'
modules into ours. Nothing is copied, nothing is computed."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from opticnerve.common import hub
from opticnerve.data.encode.chat_layout import form_of
from opticnerve.encoders.hf_vision import ClassToken, HFVisionEncoder, Layer
from opticnerve.encoders.preparation import as_options
from opticnerve.language.chat_template import IMAGE_TOKEN, ended, with_parts
from opticnerve.language.load import no_bars
from opticnerve.models.checkpoint.strict import list_problems
from opticnerve.models.vlm.processing import OpticNerveProcessor
from opticnerve.models.vlm.tower import Tower
from opticnerve.types import OpticNerveError

# What transformers has, and no dock can say: why, and what to do instead.
_PARTS = "its parts can be docked by name: its vision encoder under `image`, its text model under `language`"
_BOTH_WAYS = f"its prompts are attended to in both directions, and a dock's language model reads forwards; {_PARTS}"
_ROTARY = (
    "its language model counts positions in three dimensions (M-RoPE: time, row and column of a picture's tokens), "
    f"which its own class alone does, and a dock's positions are a text's; {_PARTS} (type: qwen_vl)"
)
UNLIKE = {
    "paligemma": _BOTH_WAYS,
    "gemma3": _BOTH_WAYS,
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), _ROTARY),
    "mllama": "its language model has layers of its own that look at pictures, trained as a part of it",
    "idefics2": "its perceiver, between encoder and language model, has no connector of its kind here",
}


@dataclass
class Source:
    """What was read: `name` as the user wrote it, transformers' model and processor, and `notes` for the user."""

    name: str
    model: Any
    processor: Any
    notes: list[str]

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def image_token(self) -> str:
        """The word that stands for a picture in their prompts."""
        return str(self.processor.image_token)


def read_config(name: str, known: list[str]) -> Any:
    """The configuration alone.

    Raises:
        OpticNerveError: nothing there, or a kind of model that is not `known`; the message lists those that are.
    """
    folder = hub.fetch(name, weights=False)
    try:
        config = tf.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as e:
        raise OpticNerveError(
            f"{name} has no configuration that transformers can read: {hub.brief(e)}", kind="damaged"
        ) from e
    if config.model_type == "opticnerve":
        raise OpticNerveError(f"{name} is a model of opticnerve already; nothing to import", kind="unsupported")
    if config.model_type in UNLIKE:
        raise OpticNerveError(
            f"{name} is a {config.model_type}, which cannot be imported: {UNLIKE[config.model_type]}",
            kind="unsupported",
        )
    if config.model_type not in known:
        raise OpticNerveError(
            f"{name} is a {config.model_type}; what can be imported: {', '.join(known)}", kind="unsupported"
        )
    return config


def common_refusals(config: tf.PreTrainedConfig, model_class: str) -> list[str]:
    """Reasons that do not depend on the family."""
    reasons = []
    written = [a for a in (config.architectures or []) if a != model_class]
    if written:
        reasons.append(
            f"its weights are for {', '.join(written)}, not for transformers' {model_class}; take the same "
            "model's transformers form, such as llava-hf/…"
        )
    for part in (config, config.vision_config, config.text_config):
        if getattr(part, "quantization_config", None):
            reasons.append(f"the weights of {part.model_type} are quantised; import the unquantised checkpoint")
    if config.text_config.is_encoder_decoder:
        reasons.append(
            f"its language model is {config.text_config.model_type}, an encoder-decoder; opticnerve docks onto causal "
            "language models only"
        )
    return reasons


def read(name: str, model_class: str) -> Source:
    """Weights, in float32 so that no digit is lost, and processor.

    Raises:
        OpticNerveError: tensors are missing, unexpected or of another shape, or there is no processor.
    """
    cls, folder = getattr(tf, model_class), hub.fetch(name)
    with no_bars():
        loaded: Any = cls.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
        model, report = loaded
        if listing := list_problems(report):
            raise OpticNerveError(f"the weights of {name} are not those of its config.json: {listing}", kind="mismatch")
        try:
            # SmolVLM's own wants a package for numbers in words, with which it announces videos; pictures it takes as
            # Idefics3's does.
            reader: Any = tf.Idefics3Processor if model.config.model_type == "smolvlm" else tf.AutoProcessor
            processor = reader.from_pretrained(folder)
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise OpticNerveError(
                f"{name} has no processor that transformers can read: {hub.brief(e)}", kind="damaged"
            ) from e
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise OpticNerveError(
            f"{name} has no processor, only a {type(processor).__name__}; save the tokenizer and the image processor "
            "beside the weights",
            kind="missing-file",
        )
    return Source(name, model.eval(), processor, [])


def read_tensors(name: str, folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, of a format that transformers does not read.

    Raises:
        OpticNerveError: there are none, pickles alone, or they cannot be read.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(f.name for f in folder.glob("*.bin"))
        raise OpticNerveError(
            f"the weights of {name} are {f'pickles ({pickles[0]})' if pickles else 'missing'}, and opticnerve reads "
            "safetensors alone; convert them once (docs/migrate.md shows how), or take the model's transformers form "
            "(llava-hf/…)",
            kind="missing-file",
        )
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            found |= load_file(file)
        except (OSError, SafetensorError) as e:
            raise OpticNerveError(f"{file} cannot be read: {str(e)[:200]}", kind="damaged") from e
    return found


def check_image_token(source: Source) -> int:
    """The placeholder's id, on which configuration and tokenizer must agree."""
    wanted = source.config.image_token_id
    found = source.processor.tokenizer.convert_tokens_to_ids(source.image_token)
    if wanted is None or wanted != found:
        raise OpticNerveError(
            f"{source.name}: config.json says that token {wanted} stands for a picture, the tokenizer's "
            f"{source.image_token} is {found}; save it again with a version of transformers that writes both alike",
            kind="mismatch",
        )
    return int(wanted)


def adopt(module: nn.Module, tensors: dict[str, nn.Parameter]) -> None:
    """Put parameters into `module` under the given names, in place of those that stand there.

    Raises:
        OpticNerveError: there is no such place, or one of another shape.
    """
    try:
        odd = module.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
    except RuntimeError as e:
        raise OpticNerveError(str(e), kind="wrong-shape") from e
    if odd:
        raise OpticNerveError(f"{type(module).__name__} has no place for the tensors {', '.join(odd)}", kind="mismatch")


def prefixed(tensors: nn.Module, prefix: str) -> dict[str, nn.Parameter]:
    """A module's parameters under `prefix`."""
    return {f"{prefix}.{n}": p for n, p in tensors.named_parameters()}


def make_language_model(base: nn.Module, head: nn.Module, config: tf.PreTrainedConfig, *, tied: bool) -> Any:
    """A causal language model of a decoder without head and a head, as LLaVA keeps them.

    Raises:
        OpticNerveError: transformers' causal model of this family has other tensors than these.
    """
    config = copy.deepcopy(config)
    config.tie_word_embeddings = tied
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config)
    wanted = {n: t.shape for n, t in model.state_dict().items()}
    setattr(model, model.base_model_prefix, base)
    model.set_output_embeddings(head)
    found = {n: t.shape for n, t in model.state_dict().items()}
    if odd := sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n)):
        raise OpticNerveError(
            f"{type(model).__name__} has other tensors than this checkpoint's language model: {', '.join(odd[:12])}",
            kind="mismatch",
        )
    # Rotary tables and the like belong to the base; whatever else the head's class computes would be empty.
    if empty := [n for n, t in model.named_buffers() if t.is_meta]:
        raise OpticNerveError(
            f"{type(model).__name__} computes tables that this import does not know: {empty}", kind="unsupported"
        )
    return model.eval()


def make_encoder(
    source: Source, model: tf.PreTrainedModel, *, layer: Layer, class_token: ClassToken,
    images: tf.BaseImageProcessor | None = None,
) -> HFVisionEncoder:  # fmt: skip
    """Their vision model as an encoder, with what their image processor (or `images`) says of pictures."""
    options = as_options(images or source.processor.image_processor, source.name)
    if options.get("image_size") == model.config.image_size:
        options.pop("image_size")
    return HFVisionEncoder(
        architecture=model.config.to_dict(), layer=layer, class_token=class_token, **options, _model=model
    )


def make_processor(
    source: Source,
    tower: Tower,
    tokenizer: tf.PreTrainedTokenizerBase,
    *,
    image_processor: tf.BaseImageProcessor,
    chat_template: str | None,
    **options: Any,
) -> OpticNerveProcessor:
    """Their tokenizer and picture preparation, our counting.

    `chat_template`: theirs; None for one made of the tokenizer's own, or a plain one.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise OpticNerveError(
                f"the tokenizer of {source.name} has neither padding nor end token; set one first", kind="unsupported"
            )
        tokenizer.pad_token = tokenizer.eos_token
        source.notes.append(f"the tokenizer has no padding token; {tokenizer.eos_token} serves as one")
    if chat_template is None and source.image_token != IMAGE_TOKEN:
        chat_template = with_parts(tokenizer.chat_template).replace(IMAGE_TOKEN, source.image_token)
    made = OpticNerveProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        num_image_tokens=tower.num_placeholders,
        image_token=source.image_token,
        tiling=None if tower.tiling is None else asdict(tower.tiling.spec),
        chat_template=chat_template,
        **options,
    )
    if tokenizer.eos_token is not None and form_of(made).end is None:
        written = ended(made.chat_template)
        if form_of(made, written).end is not None:
            made.chat_template = written
            source.notes.append(
                f"its chat template ends no answer; {tokenizer.eos_token} is written behind each, so that it can be "
                "trained on"
            )
    return made
