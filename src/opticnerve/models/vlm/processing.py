"""`OpticNerveProcessor`: words, pictures and sound to tensors. It alone counts placeholders."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import (
    BaseImageProcessor,
    GenerationConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    SequenceFeatureExtractor,
)
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData

from opticnerve.common.private_names import saved_parts
from opticnerve.data.encode.chat_layout import form_of
from opticnerve.encoders.native import NativeLayout, pooled_layout
from opticnerve.language.chat_template import AUDIO_TOKEN, IMAGE_TOKEN, settled
from opticnerve.language.load import check_saved, keep_arguments
from opticnerve.models.vlm.splitting import PictureWords, SplitLayout
from opticnerve.models.vlm.tiling import TileLayout, layout_of
from opticnerve.types import OpticNerveError, Thinking


class _Attributes:
    """`get_attributes` of a processor that has some of its parts and not others: an audio encoder, say, and no vision
    encoder."""

    names = ("image_processor", "tokenizer", "feature_extractor", "qformer_tokenizer")

    def __get__(self, instance: Any, owner: type) -> Callable[[], list[str]]:
        has = vars(instance) if instance is not None else {}
        return lambda: [n for n in self.names if has.get(n, n) is not None]


class OpticNerveProcessor(ProcessorMixin):
    """A tokenizer, and an image processor and a feature extractor as needed, by transformers' conventions.

    Args:
        image_processor: turns a picture into `pixel_values` as the encoder wants them.
        tokenizer: the language model's; `image_token` and `audio_token` are added to it if it has none, without
            touching the vocabulary that the language model knows.
        feature_extractor: turns sound into `input_features`, a window of fixed length at a time.
        qformer_tokenizer: of the Q-Former that reads the question, too (InstructBLIP).
        num_image_tokens: placeholders written for one picture; None where there is no vision encoder.
        image_token: the word that stands for a picture in a prompt.
        image_grid: side of the square map that a picture's placeholders form; None where they form none, or where
            sizes count.
        num_audio_tokens: placeholders written for one window of sound; None where there is no audio encoder.
        audio_token: the word that stands for a sound in a prompt.
        tiling, native: a `TileLayout` or `SplitLayout`, or a `NativeLayout`, as a dict, where the number of
            placeholders depends on a picture's size.
        picture_words: `PictureWords` as a dict, where words stand among a picture's placeholders.
        qformer_words: what the `qformer_tokenizer` is for: "questions" beside each picture (InstructBLIP), or
            "captions" in BLIP-2's first stage alone; None where there is none.
        thinking: what becomes of think blocks, in training and in asking; see `opticnerve.language.thinking`.
        sanitize_control_tokens: whether words that spell a special token (`<|im_end|>`) stay words when conversations
            are encoded, as `apply_chat_template(sanitize_control_tokens=True)` of transformers has it.
        date: the day that a template with today's date writes (ISO 8601); today by default.
        frames: which frames of a video training showed, as a data entry's `frames` says it: those that are asked about.
        chat_template: Jinja; the tokenizer's own, made to take pictures and sound, by default.
    """

    get_attributes = _Attributes()
    qformer_tokenizer: Any
    chat_template: str

    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        feature_extractor: SequenceFeatureExtractor | None = None,
        qformer_tokenizer: PreTrainedTokenizerBase | None = None,
        num_image_tokens: int | None = 1,
        image_token: str = IMAGE_TOKEN,
        image_grid: int | None = None,
        num_audio_tokens: int | None = None,
        audio_token: str = AUDIO_TOKEN,
        tiling: dict[str, Any] | None = None,
        native: dict[str, Any] | None = None,
        picture_words: dict[str, str] | None = None,
        qformer_words: Literal["questions", "captions"] | None = None,
        thinking: Thinking | None = None,
        sanitize_control_tokens: bool = False,
        date: str | None = None,
        frames: int | dict[str, Any] = 8,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        assert tokenizer is not None
        keep_arguments(tokenizer)
        self.thinking = thinking
        self.sanitize_control_tokens = sanitize_control_tokens
        self.date = date or datetime.date.today().isoformat()
        self.frames = frames
        self.num_image_tokens = num_image_tokens if image_processor is not None else None
        self.num_audio_tokens = num_audio_tokens if feature_extractor is not None else None
        self.image_token = image_token if self.num_image_tokens else None
        self.audio_token = audio_token if self.num_audio_tokens else None
        self.image_token_id = _token_id(tokenizer, self.image_token)
        self.audio_token_id = _token_id(tokenizer, self.audio_token)
        self.tiling, self.native, self.image_grid = tiling, native, image_grid
        self.qformer_words = qformer_words if qformer_tokenizer is not None else None
        self._spec: TileLayout | SplitLayout | NativeLayout | None = None
        if native is not None or tiling is not None:
            self._spec = NativeLayout(**native) if native is not None else layout_of(tiling or {})
        self.picture_words = picture_words
        self._words = PictureWords(**picture_words) if picture_words else None
        parts = {
            "image_processor": image_processor, "tokenizer": tokenizer,
            "feature_extractor": feature_extractor, "qformer_tokenizer": qformer_tokenizer,
        }  # fmt: skip
        for name, part in parts.items():
            if part is None:
                setattr(self, name, None)
        template = chat_template or settled(tokenizer, thinking=thinking, date=datetime.date.fromisoformat(self.date))
        super().__init__(**{k: v for k, v in parts.items() if v is not None}, chat_template=template)  # type: ignore[no-untyped-call]

    @classmethod
    def from_tower(
        cls, towers: dict[str, Any], tokenizer: PreTrainedTokenizerBase, **options: Any
    ) -> OpticNerveProcessor:
        """The processor of a docked model: what its towers say of themselves."""
        image, audio = towers.get("image"), towers.get("audio")
        if image is not None:
            own = image.encoder.image_processor()
            tiled = image.tiling is not None and image.num_placeholders > 1
            layout = image.layout if image.encoder.native is not None else None
            if layout is not None and image.num_placeholders != image.num_tokens:  # one, whatever it shows
                layout = replace(layout, tokens=image.num_placeholders)
            options |= {
                "image_processor": own if image.tiling is None else image.tiling.image_processor(own),
                "num_image_tokens": image.num_placeholders,
                "tiling": {**asdict(image.tiling.spec), **image.tiling.options} if tiled else None,
                "native": None if layout is None else asdict(layout),
                "image_grid": image.grid if image.num_placeholders == image.num_tokens else None,
            }
            if image.reads_words:
                options["qformer_tokenizer"] = image.connector.text_tokenizer()
                options["qformer_words"] = "questions" if image.wants_text else "captions"
        if audio is not None:
            options |= {
                "feature_extractor": audio.encoder.feature_extractor(),
                "num_audio_tokens": audio.num_placeholders,
            }
        return cls(tokenizer=tokenizer, **options)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        """As for any processor of transformers.

        Raises:
            OpticNerveError: another tokenizer would come back from the folder.
        """
        made = super().save_pretrained(save_directory, *args, **kwargs)
        check_saved(self.tokenizer, Path(save_directory))
        return made

    # -- counting -------------------------------------------------------------------------------------------------

    @property
    def reads_questions(self) -> bool:
        """Whether a Q-Former reads the question beside each picture."""
        return self.qformer_words == "questions"

    @property
    def counts_by_size(self) -> bool:
        """Whether a picture's placeholders depend on its height and width."""
        return self._spec is not None

    def image_placeholders(self, height: int = 0, width: int = 0, pool: int = 1) -> int:
        """Placeholders of a picture of that size in pixels, of whose soft tokens squares of side `pool` become one.

        Raises:
            OpticNerveError: the soft tokens form no map that could be pooled.
        """
        if pool > 1:
            if isinstance(self._spec, NativeLayout) and self._spec.tokens is None:
                return pooled_layout(self._spec, pool).num_tokens(height, width)
            if self._spec is not None or self.image_grid is None:
                raise OpticNerveError(
                    f"frames.pool: {pool} takes the mean of squares of a frame's soft tokens, and this model's form no "
                    "map among the words; leave it out, or take a connector that keeps the map (mlp, linear, "
                    "pixel_shuffle, abstractor), fusion: splice and no tiling",
                    kind="unsupported",
                )
            return int((-(-self.image_grid // pool)) ** 2)
        return self._spec.num_tokens(height, width) if self._spec is not None else int(self.num_image_tokens or 0)

    def write_picture(self, height: int = 0, width: int = 0, pool: int = 1) -> str:
        """A picture of that size in a prompt: its placeholders, and the words among them."""
        count, token = self.image_placeholders(height, width, pool), str(self.image_token)
        return token * count if self._words is None else self._words.write(token, self._spec, height, width, count)

    def image_ids(self, height: int = 0, width: int = 0, pool: int = 1) -> list[int]:
        """`write_picture` as tokens."""
        if self._words is None:
            return [int(self.image_token_id or 0)] * self.image_placeholders(height, width, pool)
        ids: list[int] = self.tokenizer(
            self.write_picture(height, width, pool), add_special_tokens=False, verbose=False
        )["input_ids"]  # fmt: skip
        return ids

    def image_pieces(self, height: int, width: int) -> int:
        """Rows of `pixel_values` that a picture of that size in pixels becomes: its tiles, its patches, or itself."""
        return self._spec.num_pieces(height, width) if self._spec is not None else 1

    def audio_windows(self, samples: int) -> int:
        """Windows that a sound of so many samples (at the feature extractor's rate) is cut into."""
        count: int = max(1, math.ceil(samples / self.feature_extractor.n_samples))
        return count

    def audio_placeholders(self, samples: int) -> int:
        """Placeholders of a sound of so many samples."""
        return self.audio_windows(samples) * int(self.num_audio_tokens or 0)

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """As transformers' own processors have it, for engines that plan ahead: placeholders and rows of `pixel_values`
        by each picture's (height, width)."""
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.image_placeholders(*size) for size in image_sizes],
            num_image_patches=[self.image_pieces(*size) for size in image_sizes],
        )

    # -- transformers' hooks --------------------------------------------------------------------------------------

    def replace_image_token(self, image_inputs: Any = None, image_idx: int = 0, **kwargs: Any) -> str:
        """The placeholders of one picture, and the words among them."""
        size = [int(n) for n in image_inputs["image_sizes"][image_idx]] if self.counts_by_size else (0, 0)
        return self.write_picture(*size)

    def replace_audio_token(self, audio_inputs: Any = None, audio_idx: int = 0, **kwargs: Any) -> str:
        """The placeholders of one sound."""
        words: str = str(self.audio_token) * int(self.num_audio_tokens or 0) * audio_inputs["windows"][audio_idx]
        return words

    @property
    def unused_input_names(self) -> list[str]:
        return ["windows"]

    def _process_audio(self, audio: Sequence[Any], **kwargs: Any) -> Any:  # type: ignore[override]
        """Each sound as consecutive windows, all of them in one tensor."""
        features, windows = self.extract(audio, return_tensors=kwargs.get("return_tensors"))
        inputs = {"input_features": features, "windows": windows}
        return inputs, [self.replace_audio_token(inputs, i) for i in range(len(audio))]

    def extract(self, sounds: Sequence[Any], *, return_tensors: str | None = "pt") -> tuple[Any, list[int]]:
        """`input_features` (windows of all sounds, mels, frames), and how many windows each sound has.

        `sounds`: float arrays, mono, at the feature extractor's rate.
        """
        extractor = self.feature_extractor
        length, pieces, windows = extractor.n_samples, [], []
        for sound in sounds:
            sound = np.asarray(sound, dtype=np.float32)
            windows.append(self.audio_windows(len(sound)))
            pieces += [sound[i * length : (i + 1) * length] for i in range(windows[-1])]
        made = extractor(pieces, sampling_rate=extractor.sampling_rate, return_tensors=return_tensors)
        return made["input_features"], windows

    def __call__(
        self, images: ImageInput | None = None, text: str | list[str] | None = None, videos: object = None,
        audio: Sequence[Any] | None = None, *, questions: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Pictures, sounds and prompts to `input_ids`, `attention_mask`, `pixel_values` and `input_features`.

        Prompts of a batch are padded on the left, as generation needs, unless `padding_side` says otherwise.
        `truncation=True` with `max_length` cuts text from the end, but never through a picture: that is an error.
        `questions`: one text for each picture, for a Q-Former that reads it; the prompts' words by default.
        """
        if videos is not None:
            raise OpticNerveError(
                "a video is shown as frames: give them as images, in order (opticnerve.data.media.video.frames)",
                kind="unsupported",
            )
        for kind, given, part in (("pictures", images, self.image_processor), ("sound", audio, self.feature_extractor)):
            if given is not None and part is None:
                raise OpticNerveError(f"this model takes no {kind}", kind="unsupported")
        batched = isinstance(text, list | tuple) and len(text) > 1
        if batched or kwargs.get("padding"):
            kwargs.setdefault("padding", True)
            kwargs.setdefault("padding_side", "left")
        # Whether a prompt is too long, the language model's context says, not what a tokenizer was once made for.
        kwargs.setdefault("verbose", False)
        prompts = [text] if isinstance(text, str) else list(text or [])
        made = super().__call__(images=images, text=text, audio=audio, **kwargs)
        if self.reads_questions and "pixel_values" in made:
            if questions is None:
                questions = self._questions(prompts)
            made.update(self.read_questions(questions))
        return made

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As for any processor of transformers; a Q-Former that reads questions gets each picture's turn."""
        if kwargs.get("tokenize") and self.reads_questions:
            chats = [conversation] if conversation and isinstance(conversation[0], dict) else conversation
            questions = [q for chat in chats for message in chat for q in _questions_of(message)]
            kwargs["processor_kwargs"] = {"questions": questions, **(kwargs.get("processor_kwargs") or {})}
        return super().apply_chat_template(conversation, *args, **kwargs)

    def read_questions(self, questions: Sequence[str]) -> dict[str, Any]:
        """`qformer_input_ids` and `qformer_attention_mask`, one row for each picture."""
        limit = min(self.qformer_tokenizer.model_max_length, 512)
        out = self.qformer_tokenizer(
            list(questions), padding=True, truncation=True, max_length=limit, return_tensors="pt"
        )
        return {"qformer_input_ids": out["input_ids"], "qformer_attention_mask": out["attention_mask"]}

    def _questions(self, prompts: Sequence[str]) -> list[str]:
        """For each picture its prompt's words, without placeholders and the tokenizer's special tokens."""
        special = [str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        found = []
        for prompt in prompts:
            pictures = prompt.count(str(self.image_token))
            for word in special:
                prompt = prompt.replace(word, " ")
            found += [" ".join(prompt.split())] * pictures
        return found

    def _check_special_mm_tokens(self, text: list[str], text_inputs: Any, modalities: list[str]) -> None:
        """transformers' hook after tokenisation; `text` has its placeholders written out."""
        rows = text_inputs["input_ids"]
        for token, number, kind in (
            (self.image_token, self.image_token_id, "picture"),
            (self.audio_token, self.audio_token_id, "sound"),
        ):
            if token is None:
                continue
            for prompt, row in zip(text, rows.tolist() if hasattr(rows, "tolist") else rows, strict=True):
                wanted, found = prompt.count(token), sum(t == number for t in row)
                if wanted != found:
                    raise OpticNerveError(
                        f"truncation would cut through a {kind}: {found} of its {wanted} placeholders are left; "
                        f"raise max_length, or shorten the text before the {kind}",
                        kind="too-long",
                    )

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: Any = None, **kwargs: Any
    ) -> list[Any]:
        """transformers' hook: parts that the saved processor has none of are None."""
        saved = processor_dict or {}
        there = {"tokenizer": True, "qformer_tokenizer": saved.get("qformer_words") is not None}
        names = [n for n in _Attributes.names if there.get(n, saved.get(n) is not None)]
        parts = saved_parts(cls, names, pretrained_model_name_or_path, processor_dict, **kwargs)
        found = dict(zip(names, parts, strict=True))
        return [found.get(n) for n in _Attributes.names]


def stops(generation_config: GenerationConfig, processor: OpticNerveProcessor) -> dict[str, Any]:
    """What `generate` is told of ends: the tokens that end an answer, and the one that pads.

    What training teaches to end a turn is the template's word, which need not be the tokenizer's end token; a template
    without one still answers, up to the longest answer.
    """
    tokenizer = processor.tokenizer
    known = generation_config.eos_token_id
    ends = {*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id}
    ends |= {tokenizer.convert_tokens_to_ids(word) for word in form_of(processor).ends_of_turns()}
    return {"eos_token_id": sorted(ends - {None}), "pad_token_id": tokenizer.pad_token_id}


def _questions_of(message: dict[str, Any]) -> list[str]:
    """A turn's words, once for each of its pictures."""
    parts = message["content"] if isinstance(message["content"], list) else []
    words = "".join(p["text"] for p in parts if p["type"] == "text").strip()
    return [words for p in parts if p["type"] == "image"]


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str | None) -> int | None:
    if token is None:
        return None
    if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
    return int(tokenizer.convert_tokens_to_ids(token))  # type: ignore[arg-type]
