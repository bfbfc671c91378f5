"""The model's own greedy answer to one question about one picture, fed back to it word for word (teacher forcing).

A map of where a model looks is always a map for some text. Asking about the answer that the model itself gives explains
what it does; asking about the reference would explain something it may never say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from opticnerve.encoders.native import NativeLayout, cut_patches, join_patches
from opticnerve.inference.generate import Answerer
from opticnerve.models.vlm.prompt import Prompt
from opticnerve.types import Conversation, OpticNerveError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
    from opticnerve.models.vlm.processing import OpticNerveProcessor

# Chinese, Japanese and Korean are written without spaces: there each character is a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\s\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_HALF = "\ufffd"  # what a tokenizer writes for a character whose last bytes are still to come


@dataclass(frozen=True, slots=True)
class Word:
    """A word of the answer: its text, and which of the answer's tokens spell it."""

    text: str
    tokens: tuple[int, ...]


class TeacherForced:
    """A model reading a prompt and the answer it gave.

    `answer_T`: the answer's token ids without its end. `ids_1L`: prompt and answer but for the last token: the position
    `first + t` foretells answer token t. `pixels_CHW`: the picture as the vision encoder gets it.

    Args:
        conversation: one question about one picture, no sound. max_new_tokens: the longest answer.

    Raises:
        OpticNerveError: not one picture, no vision encoder, tiles, or an empty answer.
    """

    def __init__(
        self,
        model: OpticNerveForConditionalGeneration,
        processor: OpticNerveProcessor,
        conversation: Conversation,
        *,
        max_new_tokens: int = 24,
    ) -> None:
        check(model, conversation)
        self.model, self.tower = model, model.image
        answerer = Answerer(model, processor)
        inputs = answerer.inputs([conversation])
        stops = answerer.stops()
        with torch.inference_mode():
            out_1L = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **stops)
        prompt_1P = inputs["input_ids"]
        answer = out_1L[0, prompt_1P.shape[1] :].tolist()
        while answer and answer[-1] in stops["eos_token_id"]:
            answer.pop()
        self.text, self.words = split_words(answer, processor.tokenizer)
        if not self.words:
            raise OpticNerveError(
                "the model's answer to this question is empty: there is no word to explain", kind="empty"
            )
        self.answer_T = torch.tensor(answer, device=prompt_1P.device)
        self.ids_1L = torch.cat([prompt_1P, self.answer_T[None, :-1]], dim=1)
        self.first = prompt_1P.shape[1] - 1
        self.pixels_CHW: Tensor = inputs["pixel_values"][0]
        self.sizes_12: Tensor | None = inputs.get("image_sizes")
        if (native := self.tower.encoder.native) is not None:
            (grid,) = self.tower.grids(self.sizes_12)[0]
            self.pixels_CHW = join_patches(inputs["pixel_values"][None], grid, native.patch_size)[0]
        self.question = {k: v for k, v in inputs.items() if k.startswith("qformer_")}

    @property
    def positions(self) -> range:
        """Where in `ids_1L` each token of the answer is foretold."""
        return range(self.first, self.first + len(self.answer_T))

    @property
    def visual_V(self) -> Tensor:
        """Positions of the soft tokens in `ids_1L` (one, if the model cross-attends)."""
        number = self.model.config.image_token_id
        assert number is not None
        found: Tensor = (self.ids_1L[0] == number).nonzero()[:, 0]
        return found

    def map_shape(self, count: int, *, encoder: bool = False) -> tuple[int, int]:
        """Rows and columns of the map that so many tokens of the picture make: soft tokens, or the encoder's."""
        native, layout = self.tower.encoder.native, self.tower.layout
        if native is None or not isinstance(layout, NativeLayout):
            return isqrt(count), isqrt(count)
        rows, columns = native.pool if encoder else layout.pool
        height, width = (n // native.patch_size for n in self.pixels_CHW.shape[1:])
        return -(-height // rows), -(-width // columns)

    def media(self, pixels_NCHW: Tensor) -> dict[str, Tensor]:
        """Pictures of this one's shape as the model's inputs."""
        if (native := self.tower.encoder.native) is None or self.sizes_12 is None:
            return {"pixel_values": pixels_NCHW}
        patches = cut_patches(pixels_NCHW, native.patch_size).flatten(0, 1)
        return {"pixel_values": patches, "image_sizes": self.sizes_12.expand(len(pixels_NCHW), -1)}

    def log_p(self, pixels_NCHW: Tensor) -> Tensor:
        """Log-probability of each answer token were the picture another one: (N, C, H, W) → (N, T)."""
        count = len(pixels_NCHW)
        question = {k: v.expand(count, -1) for k, v in self.question.items()}
        with torch.inference_mode():
            logits_NTV = self.model(
                input_ids=self.ids_1L.expand(count, -1), use_cache=False, logits_to_keep=len(self.answer_T),
                **self.media(pixels_NCHW), **question,
            ).logits  # fmt: skip
        return self._pick(logits_NTV)

    @contextmanager
    def traced(self) -> Iterator[ForcedTrace]:
        """A pass with gradients: nothing of the model's own requires one afterwards that did not before."""
        with torch.enable_grad(), frozen(self.model):
            seen = self.tower.encode(*self.media(self.pixels_CHW[None]).values())
            tokens_1ND = seen.tokens_BND.detach().requires_grad_()
            prompt = self.model.read(
                self.ids_1L, image_features=replace(seen, tokens_BND=tokens_1ND), **self.question
            )  # fmt: skip
            yield ForcedTrace(self, tokens_1ND, prompt)

    def _pick(self, logits_NTV: Tensor) -> Tensor:
        log_p_NTV = logits_NTV[:, -len(self.answer_T) :].float().log_softmax(-1)
        index_NT1 = self.answer_T[None, :, None].expand(len(log_p_NTV), -1, 1)
        return log_p_NTV.gather(2, index_NT1)[..., 0]


@dataclass
class ForcedTrace:
    """What a pass with gradients starts from: the encoder's tokens (1, N, D), and the prompt that was made of them."""

    forced: TeacherForced
    tokens_1ND: Tensor
    prompt: Prompt

    def run(self, **options: Any) -> tuple[Tensor, Any]:
        """Log-probability of each answer token (T,), and all that the language model gave."""
        model = self.forced.model
        with model.multimodal_context(self.prompt):
            out = model.language_model(
                inputs_embeds=self.prompt.embeds_BLD, use_cache=False, return_dict=True, **options
            )
        return self.forced._pick(out.logits)[0], out


def check(model: OpticNerveForConditionalGeneration, conversation: Conversation) -> None:
    """What can be looked into: one picture, whole, before a model with a vision encoder."""
    if "image" not in getattr(model, "towers", {}):
        raise OpticNerveError(
            "this model has no vision encoder; `look` shows where in a picture a model looks", kind="unsupported"
        )
    if len(conversation.images) != 1 or conversation.audios:
        raise OpticNerveError(
            f"`look` explains an answer about one picture; this question comes with {len(conversation.images)} "
            f"pictures and {len(conversation.audios)} sounds",
            kind="out-of-range",
        )
    if model.image.tiling is not None:
        raise OpticNerveError(
            "this model sees a picture in tiles (tiling), and `look` knows no place for their soft tokens; ask a model "
            "without tiling",
            kind="unsupported",
        )


@contextmanager
def frozen(model: OpticNerveForConditionalGeneration) -> Iterator[None]:
    """Within it no weight asks for a gradient: what is differentiated are attention weights and tokens."""
    asking = nn.ParameterList(p for p in model.parameters() if p.requires_grad)
    asking.requires_grad_(False)
    try:
        yield
    finally:
        asking.requires_grad_(True)


def split_words(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[Word]]:
    """The text of an answer, and its words with the tokens that spell each.

    A token begins a word if the text so far has one more word with it. A token that spells the end of a word and the
    beginning of the next joins the two.
    """
    text = str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    found: list[str] = _WORD.findall(text)
    groups: list[list[int]] = []  # tokens
    ends: list[int] = []  # how many words of the text each group reaches to
    waiting: list[int] = []  # spaces and half characters: they belong to the word behind them
    for t in range(len(ids)):
        sofar = str(tokenizer.decode(ids[: t + 1], skip_special_tokens=True, clean_up_tokenization_spaces=False))
        count = len(_WORD.findall(sofar if t + 1 == len(ids) else sofar.rstrip(_HALF)))
        if count > (ends[-1] if ends else 0):
            groups.append([*waiting, t])
            ends.append(count)
            waiting = []
        elif not groups or sofar != sofar.rstrip() or sofar.endswith(_HALF):
            waiting.append(t)
        else:
            groups[-1] += [*waiting, t]
            waiting = []
    if not groups:
        return text.strip(), []
    groups[-1] += waiting
    joined = ["".join(found[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    return text.strip(), [Word(w, tuple(g)) for w, g in zip(joined, groups, strict=True)]
