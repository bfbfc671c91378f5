"""Which token comes next: each row by its own wishes and its own dice."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opticnerve.common.private_names import generation_config, generation_rules
from opticnerve.inference.decoding import plain
from opticnerve.types import OpticNerveError

GREEDY = 1e-4  # below this temperature only the likeliest token is drawn anyway, and scores divided by it overflow


@dataclass(frozen=True, slots=True)
class Wishes:
    """How a request wants its tokens chosen.

    `temperature`, `top_p`: with neither, the model's generation_config decides (greedy, unless it samples); temperature
    0 (or next to it) is greedy; top_p alone counts as temperature 1.
    `seed`: of the first choice; the next ones take the numbers behind it. `top_logprobs`: None for none
    at all.
    """

    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    top_logprobs: int | None = None

    def options(self, model: Any) -> dict[str, Any]:
        """As transformers' `generate` is told."""
        if self.temperature is not None and self.temperature < GREEDY:
            return {"do_sample": False}
        # transformers' own default, the 50 likeliest tokens, is nobody's wish here.
        top_k = {"top_k": model.generation_config.top_k or 0}
        if self.temperature is None and self.top_p is None:
            return top_k if model.generation_config.do_sample else {"do_sample": False}
        one = 1.0
        return {
            "do_sample": True, "temperature": one if self.temperature is None else self.temperature,
            "top_p": one if self.top_p is None else self.top_p, **top_k,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Chosen:
    """A token; its log-probability and the likeliest tokens with theirs, where asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class TokenSampler:
    """Chooses one row's tokens.

    Args:
        model: whose generation_config says what the wishes leave open. prompt: token ids. number: which choice of the
            request this row is.

    The log-probabilities are the model's own, before temperature and top_p.
    """

    def __init__(self, model: Any, wishes: Wishes, prompt: list[int], number: int) -> None:
        config = generation_config(model, max_new_tokens=1, **wishes.options(model))
        device = model.device
        self.ids: list[int] = list(prompt)
        self.change = generation_rules(model, config, torch.tensor([prompt], device=device))
        self.samples, self.wishes = bool(config.do_sample), wishes
        seed = secrets.randbits(62) if wishes.seed is None else wishes.seed + number
        self.generator = torch.Generator(device).manual_seed(seed) if self.samples else None

    def choose(self, logits_V: Tensor) -> Chosen:
        scores_1V = logits_V[None]
        if self.change:
            scores_1V = self.change(torch.tensor([self.ids], device=logits_V.device), scores_1V.float())
        if self.samples:
            token = int(torch.multinomial(scores_1V.float().softmax(-1), 1, generator=self.generator))
        else:
            token = int(scores_1V.argmax(-1))
        self.ids.append(token)
        if self.wishes.top_logprobs is None:
            return Chosen(token)
        log_p_V = logits_V.float().log_softmax(-1)
        best = log_p_V.topk(min(self.wishes.top_logprobs, len(log_p_V)))
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Chosen(token, float(log_p_V[token]), top)


def check_plain(model: Any) -> None:
    """Refuse a model whose generation_config wants more than a step per token.

    Raises:
        OpticNerveError: beams, contrastive search, and the like.
    """
    config = generation_config(model, max_new_tokens=1)
    if not plain(config):
        raise OpticNerveError(
            "this model's generation_config asks for more than one step per token (beams, guidance, …), which the "
            "server does not do; edit generation_config.json, or serve it with transformers"
        )
