"""Which token comes next: one row's scores, and the choice among them."""

from __future__ import annotations

import secrets
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opticnerve.common.private_names import generation_config, generation_rules
from opticnerve.inference.decoding import plain
from opticnerve.serve.grammar import AnswerGrammar
from opticnerve.serve.schema import SampledRequest
from opticnerve.types import OpticNerveError

if TYPE_CHECKING:
    from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration

GREEDY = 1e-4  # below this temperature only the likeliest token is drawn anyway, and scores divided by it overflow


class TokenSampler:
    """Chooses one row's tokens, with a generator of its own.

    With none of temperature, top_p, top_k and min_p the model's generation_config decides (greedy, unless it samples);
    temperature 0 (or next to it) is greedy; one of the others alone counts as temperature 1. `seed` is of the first
    choice; the next ones take the numbers behind it.

    Scores go through the frequency and presence penalties (OpenAI's formula: each counts the tokens of the answer, not
    of the prompt), and then through all that transformers' `generate` would do to them: logit_bias (its
    `sequence_bias`), repetition_penalty, temperature, top_k, top_p, min_p.

    Args:
        model: whose generation_config says what the request leaves open. prompt: token ids. number: which choice of the
            request this row is. grammar: what the answer must fit, for this row alone.
    """

    def __init__(
        self,
        model: OpticNerveForConditionalGeneration,
        asked: SampledRequest,
        prompt: list[int],
        number: int,
        grammar: AnswerGrammar | None = None,
    ) -> None:
        config = generation_config(model, max_new_tokens=1, **self._options(model, asked))
        device = model.device
        self.ids: list[int] = list(prompt)
        self.change = generation_rules(model, config, torch.tensor([prompt], device=device))
        self.frequency, self.presence = asked.frequency_penalty or 0.0, asked.presence_penalty or 0.0
        self.counts, self.grammar = Counter[int](), grammar
        seed = secrets.randbits(62) if asked.seed is None else asked.seed + number
        self.generator = torch.Generator(device).manual_seed(seed) if config.do_sample else None

    @staticmethod
    def _options(model: OpticNerveForConditionalGeneration, asked: SampledRequest) -> dict[str, Any]:
        """As transformers' `generate` is told."""
        rules: dict[str, Any] = {}
        if asked.repetition_penalty is not None:
            rules["repetition_penalty"] = float(asked.repetition_penalty)
        if asked.logit_bias:
            rules["sequence_bias"] = {(int(token),): float(bias) for token, bias in asked.logit_bias.items()}
        temperature, top_p = asked.temperature, asked.top_p
        top_k, min_p = max(asked.top_k or 0, 0), asked.min_p or 0.0
        open_ = temperature is None and top_p is None and not top_k and not min_p
        if (open_ and not model.generation_config.do_sample) or (temperature is not None and temperature < GREEDY):
            return rules | {"do_sample": False}
        if asked.top_k is None:
            # transformers' own default, the 50 likeliest tokens, is nobody's wish here.
            top_k = model.generation_config.top_k or 0
        if open_:
            return rules | {"top_k": top_k}
        one = 1.0
        return rules | {
            "do_sample": True, "temperature": one if temperature is None else temperature,
            "top_p": one if top_p is None else top_p, "top_k": top_k, "min_p": min_p or None,
        }  # fmt: skip

    def choose(self, logits_V: Tensor) -> int:
        scores_1V = logits_V[None]
        if self.grammar is not None:
            barred_V = ~self.grammar.allowed(len(logits_V), logits_V.device)
            scores_1V = scores_1V.float().masked_fill(barred_V, -torch.inf)
        if self.counts and (self.frequency or self.presence):
            tokens = torch.tensor(list(self.counts), device=logits_V.device)
            times = torch.tensor(list(self.counts.values()), device=logits_V.device)
            scores_1V = scores_1V.float().clone()
            scores_1V[0, tokens] -= self.frequency * times + self.presence
        if self.change:
            scores_1V = self.change(torch.tensor([self.ids], device=logits_V.device), scores_1V.float())
        if self.generator is not None:
            token = int(torch.multinomial(scores_1V.float().softmax(-1), 1, generator=self.generator))
        else:
            token = int(scores_1V.argmax(-1))
        if self.grammar is not None:
            self.grammar.take(token)
        self.ids.append(token)
        self.counts[token] += 1
        return token

    @property
    def finished(self) -> bool:
        """Whether the answer's grammar lets nothing more come."""
        return self.grammar is not None and self.grammar.finished


def check_plain(model: OpticNerveForConditionalGeneration) -> None:
    """Refuse a model whose generation_config wants more than a step per token. Raises OpticNerveError: beams,
    contrastive search, and the like."""
    config = generation_config(model, max_new_tokens=1)
    if not plain(config):
        raise OpticNerveError(
            "this model's generation_config asks for more than one step per token (beams, guidance, …), which the "
            "server does not do; edit generation_config.json, or serve it with transformers",
            kind="unsupported",
        )
