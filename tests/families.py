"""Language model families as their users meet them: a real tokenizer and the chat template that comes with it.

Where a family's own tokenizer is in no package, `stands_for` says so: its real template then stands with a real tokenizer
of the same kind, to which the special tokens that the template writes are added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import real_tokenizers
from opticnerve.encoders.base import make_image_processor
from opticnerve.models import OpticNerveProcessor


@dataclass(frozen=True)
class Family:
    """What is known of a family from its template and its model card, and not from opticnerve's code.

    tokenizer: of `real_tokenizers`.
    template: of `real_tokenizers.template`, or "own": the one in the tokenizer's package.
    ends: the tokens that end an assistant's turn; the first is the one that ends the last turn.
    bos: the token that begins every sequence, once.
    openings: what the template may write between the cue and the words, without white space.
    system: "kept" (its words are found in the prompt), "refused" (by an exception of the template), "dropped" (in
        training or in asking).
    thinking: what becomes of `<think>…</think>` in an answer. "words": nothing; "last": the last turn keeps it, earlier
        ones lose it; "dropped": every turn loses it; "opened": as "last", and the cue opens the block, so that an answer
        without one does not continue it; "opened, dropped": the cue opens it and every turn loses it, so that no answer
        continues it.
    add: special tokens of the template that the tokenizer lacks; `rstrip`: they take white space behind them along.
    eos: the tokenizer's end token, where the family's is another than the package's.
    count: conversations that are tried: fewer where the tokenizer only stands for the family's own.
    refused: why no conversation at all can be trained on with this template, or "".
    stands_for: the tokenizer that is in no package, or "".
    """

    tokenizer: str
    template: str
    ends: tuple[str, ...]
    bos: str | None = None
    openings: tuple[str, ...] = ("",)
    system: Literal["kept", "refused", "dropped"] = "kept"
    thinking: Literal["words", "last", "dropped", "opened", "opened, dropped"] = "words"
    add: tuple[str, ...] = ()
    rstrip: bool = False
    eos: str | None = None
    refused: str = ""
    stands_for: str = ""

    @property
    def count(self) -> int:
        return 100 if self.stands_for else 400


_EOT = ("<|eot_id|>",)
_IM = ("<|im_end|>",)
_LLAMA3 = "<|begin_of_text|>"
_DEEPSEEK = "<｜begin▁of▁sentence｜>"
_DEEPSEEK_END = ("<｜end▁of▁sentence｜>",)
_CHATML = ("<|im_start|>", "<|im_end|>")
_PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
_COMMAND = (
    "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
)  # fmt: skip
_GRANITE = ("<|start_of_role|>", "<|end_of_role|>")

FAMILIES = {
    # -- SentencePiece, Llama 2's ---------------------------------------------------------------------------------
    "llama-2": Family("llama2", "gguf:llama2:7b", ("</s>",), "<s>"),
    "tinyllama": Family("llama2", "gguf:tinyllama:1.1b", ("</s>",), "<s>"),
    "phi-3": Family("llama2", "trl:phi3", ("<|end|>",), "<s>", add=_PHI, rstrip=True, eos="<|endoftext|>"),
    "phi-3-medium": Family(
        "llama2", "gguf:phi3:14b", ("<|end|>",), "<s>", system="dropped", add=_PHI, rstrip=True, eos="<|endoftext|>"
    ),
    "phi-3.5": Family("llama2", "trl:phi3_5", ("<|end|>",), "<s>", add=_PHI, rstrip=True, eos="<|endoftext|>"),
    "yi": Family(
        "llama2", "gguf:yi:6b", _IM, "<s>", add=_CHATML, eos="<|im_end|>", stands_for="Yi's SentencePiece model"
    ),
    "internlm2": Family(
        "llama2", "gguf:internlm2:1.8b", _IM, "<s>", add=_CHATML, stands_for="InternLM 2's SentencePiece model"
    ),
    # -- SentencePiece, Mistral's ---------------------------------------------------------------------------------
    "mistral-v0.1": Family("mistral-v1", "gguf:mistral:7b-instruct-fp16", ("</s>",), "<s>", system="refused"),
    "mixtral": Family("mistral-v1", "gguf:mixtral:8x7b", ("</s>",), "<s>"),
    "zephyr": Family("mistral-v1", "file:zephyr", ("</s>",), "<s>"),
    "openchat": Family(
        "mistral-v1", "gguf:openchat:7b", ("<|end_of_turn|>",), "<s>", add=("<|end_of_turn|>",), eos="<|end_of_turn|>"
    ),
    "nous-hermes-2": Family(
        "mistral-v1", "gguf:nous-hermes2-mixtral:8x7b", _IM, "<s>", add=_CHATML, eos="<|im_end|>"
    ),
    "llava-1.6-mistral": Family("mistral-v1", "gguf:llava:7b", ("</s>",), "<s>", system="refused"),
    "mixtral-8x22b": Family("mistral-v3", "gguf:mixtral:8x22b", ("</s>",), "<s>", system="dropped"),
    "mistral-v0.3": Family("mistral-v3", "file:mistral-v0.3", ("</s>",), "<s>", system="dropped"),
    "mistral-large-v7": Family("mistral-v7", "gguf:mistral-large:123b", ("</s>",), "<s>"),
    # -- tekken ---------------------------------------------------------------------------------------------------
    "mistral-nemo": Family("tekken", "file:mistral-nemo", ("</s>",), "<s>", system="dropped"),
    "mistral-small-v7": Family("tekken", "gguf:mistral-small:24b", ("</s>",), "<s>"),
    "devstral": Family("tekken", "gguf:devstral:latest", ("</s>",), "<s>"),
    # -- tiktoken's kind: Llama 3 ---------------------------------------------------------------------------------
    "llama-3": Family("llama3", "own", _EOT, _LLAMA3),
    "llama-3 (a cue where asked for)": Family("llama3", "trl:llama3", _EOT, _LLAMA3),
    "llama-3.1": Family("llama3.1", "gguf:llama3.1:8b", _EOT, _LLAMA3),
    "llama-3.1 (short)": Family("llama3.1", "own", _EOT, _LLAMA3),
    "llama-3.2": Family("llama3.1", "trl:llama3_2", _EOT, _LLAMA3),
    "hermes-3": Family("llama3.1", "gguf:hermes3:70b", _IM, _LLAMA3, add=_CHATML, eos="<|im_end|>"),
    "tulu-3": Family("llama3.1", "gguf:tulu3:70b", ("<|end_of_text|>",), _LLAMA3, eos="<|end_of_text|>"),
    "command-r": Family(
        "llama3", "gguf:command-r:35b", ("<|END_OF_TURN_TOKEN|>",), _LLAMA3, add=_COMMAND, eos="<|END_OF_TURN_TOKEN|>",
        stands_for="Cohere's",
    ),
    "aya-expanse": Family(
        "llama3.1", "gguf:aya-expanse:8b", ("<|END_OF_TURN_TOKEN|>",), _LLAMA3, add=_COMMAND,
        eos="<|END_OF_TURN_TOKEN|>", stands_for="Cohere's",
    ),
    # -- Qwen -----------------------------------------------------------------------------------------------------
    "qwen-2": Family("qwen2.5", "gguf:qwen2:0.5b", _IM),
    "qwen-2.5": Family("qwen2.5", "own", _IM),
    "qwen-3": Family("qwen3", "own", _IM, openings=("", "<think></think>"), thinking="last"),
    "qwen-3-instruct-2507": Family("qwen3", "trl:qwen3_instruct_2507", _IM, thinking="words"),
    "qwq": Family("qwen2.5", "gguf:qwq:32b", _IM, thinking="opened"),
    "marco-o1": Family("qwen2.5", "gguf:marco-o1:7b", _IM),
    "cogito": Family("qwen2.5", "gguf:cogito:14b", _IM),
    "opencoder": Family("qwen2.5", "gguf:opencoder:8b", _IM, stands_for="OpenCoder's"),
    "stable-code": Family("qwen2.5", "gguf:stable-code:3b", _IM, stands_for="GPT-NeoX's"),
    "lfm2": Family(
        "qwen2.5", "trl:lfm2", _IM, "<|startoftext|>", add=("<|startoftext|>",), stands_for="LFM 2's"
    ),
    "exaone-3.5": Family(
        "qwen2.5", "gguf:exaone3.5:7.8b", ("[|endofturn|]",), eos="[|endofturn|]", stands_for="EXAONE's",
        add=("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]"),
    ),
    "granite-3": Family(
        "qwen2.5", "gguf:granite3-dense:2b", ("<|end_of_text|>",), add=(*_GRANITE, "<|end_of_text|>"),
        eos="<|end_of_text|>", stands_for="Granite's",
    ),
    "smollm2": Family("smollm2", "gguf:smollm2:135m", _IM),
    # -- DeepSeek -------------------------------------------------------------------------------------------------
    "deepseek-v2.5": Family("deepseek-v3", "gguf:deepseek-v2.5:236b", _DEEPSEEK_END, _DEEPSEEK),
    "deepseek-v3": Family("deepseek-v3", "own", _DEEPSEEK_END, _DEEPSEEK),
    "deepseek-v3.1": Family("deepseek-v3", "gguf:deepseek-v3.1:latest", _DEEPSEEK_END, _DEEPSEEK, thinking="dropped"),
    "deepseek-r1-0528": Family(
        "deepseek-v3", "gguf:deepseek-r1:latest", _DEEPSEEK_END, _DEEPSEEK, thinking="dropped"
    ),
    "deepseek-r1-distill": Family(
        "deepseek-v3", "trl:deepseek_r1_distill", _DEEPSEEK_END, _DEEPSEEK, thinking="opened, dropped",
        stands_for="Llama 3's and Qwen 2.5's with DeepSeek's special tokens",
    ),
    # -- Gemma ----------------------------------------------------------------------------------------------------
    "gemma-2": Family("gemma2", "gguf:gemma2:2b", ("<end_of_turn>",), "<bos>", system="refused"),
    "gemma-3": Family("gemma3", "own", ("<end_of_turn>",), "<bos>"),
    # -- o200k ----------------------------------------------------------------------------------------------------
    "gpt-oss": Family(
        "gpt-oss", "trl:gptoss", ("<|return|>", "<|end|>"), openings=("<|channel|>final<|message|>",),
    ),
    "phi-4-mini": Family(
        "gpt-oss", "gguf:phi4-mini:3.8b", ("<|end|>",), add=_PHI, eos="<|endoftext|>",
        stands_for="Phi-4-mini's, o200k with its own special tokens",
    ),
    # -- cl100k ---------------------------------------------------------------------------------------------------
    "phi-4": Family(
        "cl100k", "gguf:phi4:14b", _IM, add=("<|im_start|>", "<|im_sep|>", "<|im_end|>"), eos="<|im_end|>"
    ),
    "olmo-2": Family("cl100k", "gguf:olmo2:7b", ("<|endoftext|>",), "<|endoftext|>"),
    "dbrx": Family("cl100k", "gguf:dbrx:132b", _IM, add=_CHATML, eos="<|im_end|>"),
    # -- templates that cannot be trained on as they are ----------------------------------------------------------
    "qwen-1.5": Family("qwen2.5", "gguf:qwen:0.5b", _IM, refused="ends no last turn"),
    "falcon-2": Family("llama3", "gguf:falcon2:11b", (), refused="ends no turn", stands_for="Falcon's"),
    "nemotron-mini": Family(
        "gemma2", "gguf:nemotron-mini:4b", (), refused="ends no turn with a special token", stands_for="Nemotron's"
    ),
}  # fmt: skip


def tokenizer(family: Family) -> Any:
    """A fresh tokenizer with the family's template and special tokens; padding as opticnerve's loader sets it."""
    from tokenizers import AddedToken

    made = real_tokenizers.tokenizer(family.tokenizer)
    if family.add:
        tokens = [AddedToken(t, special=True, normalized=False, rstrip=family.rstrip) for t in family.add]
        made.add_tokens(tokens, special_tokens=True)
    if family.bos in family.add or (family.bos and made.bos_token != family.bos):
        made.bos_token = family.bos
    if family.eos is not None:
        made.eos_token = family.eos
    if family.template != "own":
        made.chat_template = real_tokenizers.template(family.template)
    assert made.chat_template, "a family without a template"
    if made.pad_token_id is None:
        made.pad_token = made.eos_token
    return made


def processor(family: Family, words: Any = None, **options: Any) -> OpticNerveProcessor:
    """The processor of a dock on that language model, with a tiny vision encoder; `words`: its tokenizer, where it is
    there already."""
    pictures = make_image_processor(size=8, mean=[0.5] * 3, std=[0.5] * 3)
    return OpticNerveProcessor(pictures, words or tokenizer(family), num_image_tokens=2, **options)
