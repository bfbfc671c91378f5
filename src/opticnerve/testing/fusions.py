"""What a fusion promises (`opticnerve.fusion.base.Fusion`), shown on a tiny language model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from opticnerve.common.private_names import CACHE, remove_hooks
from opticnerve.fusion.base import Fusion
from opticnerve.testing.contract import (
    SAME,
    Broken,
    apply,
    compiles,
    difference,
    expect,
    gradients_flow,
    is_deterministic,
    moves_to_another_device,
    moves_to_bfloat16,
    options_are_json,
    saves_and_loads,
    stir,
    through_json,
)  # fmt: skip
from opticnerve.types import Features

SOFT, WIDTH, LAYERS = 3, 32, 4  # soft tokens of a picture; the language model's width and layers
# Pictures of each row of the batch in hand: one, two, none. Each is followed by a word.
PICTURES = (1, 2, 0)


@dataclass
class Docked:
    """A fusion wired into a tiny language model of its own; for the rules that it shares, a `Subject`."""

    part: Any
    language: Any
    unused: tuple[str, ...]
    rebuild: Callable[[], Fusion]
    fullgraph: bool = False  # counting placeholders may break the graph
    chooses: bool = False
    same: float = 0.0

    def inputs(self, count: int) -> tuple[Tensor, ...]:
        ids_BL, placeholder_BL, features = self.prompt()
        return features.tokens_BND, features.mask_BN, ids_BL, placeholder_BL

    def out(self, tokens_BND: Tensor, mask_BN: Tensor, ids_BL: Tensor, placeholder_BL: Tensor) -> Features:
        """The hidden states of a prompt, all of them real."""
        hidden_BLD = self.hidden(ids_BL, placeholder_BL, Features(tokens_BND, mask_BN))
        return Features(hidden_BLD, torch.ones_like(ids_BL, dtype=torch.bool))

    def again(self) -> Docked:
        """Another of the same options, with other weights."""
        return dock(self.rebuild(), self.rebuild, self.unused)

    def elsewhere(self, to: torch.device | torch.dtype | str) -> Docked:
        """The same weights elsewhere, wired anew."""
        made = self.again()
        made.part.load_state_dict(self.part.state_dict())
        made.part.to(to)
        made.language.to(to)
        return made

    @property
    def length(self) -> int:
        """Of every row: room for two pictures, and three words behind them."""
        count: int = 4 + 2 * (self.part.placeholders(SOFT) + 1)
        return count

    def prompt(self, pictures: Sequence[int] = PICTURES) -> tuple[Tensor, Tensor, Features]:
        """Word ids (B, L), the mask of placeholders (B, L) and soft tokens, one row for each picture."""
        ids_BL = torch.randint(1, 50, (len(pictures), self.length))
        placeholder_BL = torch.zeros(len(pictures), self.length, dtype=torch.bool)
        each = self.part.placeholders(SOFT)
        for row, count in enumerate(pictures):
            for k in range(count):
                start = 1 + k * (each + 1)
                placeholder_BL[row, start : start + each] = True
        shown = sum(pictures)
        features = Features(torch.randn(shown, SOFT, WIDTH), torch.ones(shown, SOFT, dtype=torch.bool))
        return ids_BL, placeholder_BL, features

    def embed(self, ids_BL: Tensor, placeholder_BL: Tensor, features: Features) -> Tensor:
        out: Tensor = self.part.embed(self.language.get_input_embeddings()(ids_BL), placeholder_BL, features)
        return out

    def hidden(self, ids_BL: Tensor, placeholder_BL: Tensor, features: Features) -> Tensor:
        """The language model's last hidden states (B, L, D), as the docked model computes them."""
        embeds_BLD = self.embed(ids_BL, placeholder_BL, features)
        with self.part.seeing(self.part.see(placeholder_BL, features)):
            out: Tensor = self.language.model(inputs_embeds=embeds_BLD, use_cache=False).last_hidden_state
            return out


def dock(fusion: Fusion, rebuild: Callable[[], Fusion], unused: tuple[str, ...]) -> Docked:
    """The same language model for every fusion, frozen as in training."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = tf.LlamaConfig(
            vocab_size=50, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64,
        )  # fmt: skip
        language = tf.LlamaForCausalLM(config).eval()
        stir(language)
    language.requires_grad_(False)
    fusion.eval().start(language.get_input_embeddings())
    fusion.wire(language)
    return Docked(fusion, language, unused, rebuild)


def check_fusion(make: Callable[..., Fusion], *, unused: tuple[str, ...] = ()) -> None:
    """Run a fusion through its contract.

    Args:
        make: the class, or a function that calls it with further options: `partial(MyFusion, every=2)`. It is called
            with `language_size` and `language_layers`.
        unused: beginnings of names of parameters that take no part in the forward pass.

    Raises:
        ContractError: the message lists every broken promise.
    """
    sizes = {"language_size": WIDTH, "language_layers": LAYERS}
    fusion = make(**sizes)
    docked = dock(fusion, lambda: type(fusion)(**sizes, **through_json(fusion.options)), unused)
    stir(fusion)
    rules = (
        is_a_fusion, options_are_json, saves_and_loads, is_deterministic, embeds_in_the_placeholders,
        refuses_a_wrong_count, leaves_text_alone, sees_the_picture, ignores_masked_tokens, does_not_mix_the_batch,
        generates_with_a_cache, gradients_flow, passes_a_dummy, moves_to_bfloat16, moves_to_another_device, compiles,
    )  # fmt: skip
    apply(rules, docked, type(fusion).__name__)


def is_a_fusion(d: Docked) -> None:
    """A fusion is an `opticnerve.fusion.base.Fusion`. The language model's sizes come from the language model, so
    `options` leaves them out; `placeholders(n)` is a whole number, at least 1."""
    expect(isinstance(d.part, Fusion), f"{type(d.part).__name__} is no Fusion")
    twice = {"language_size", "language_layers"} & set(d.part.options)
    expect(not twice, f"options hold {', '.join(sorted(twice))}")
    for n in (1, SOFT, 576):
        count = d.part.placeholders(n)
        expect(isinstance(count, int) and count >= 1, f"placeholders({n}) is {count!r}")


def embeds_in_the_placeholders(d: Docked) -> None:
    """`embed` keeps shape and dtype, and changes embeddings in the places of the placeholders alone."""
    ids_BL, placeholder_BL, features = d.prompt()
    words_BLD = d.language.get_input_embeddings()(ids_BL)
    out_BLD = d.part.embed(words_BLD, placeholder_BL, features)
    expect(out_BLD.shape == words_BLD.shape, f"{tuple(words_BLD.shape)} became {tuple(out_BLD.shape)}")
    expect(out_BLD.dtype == words_BLD.dtype, f"{words_BLD.dtype} became {out_BLD.dtype}")
    expect(torch.equal(out_BLD[~placeholder_BL], words_BLD[~placeholder_BL]), "words beside the placeholders changed")
    expect(not torch.equal(out_BLD[placeholder_BL], words_BLD[placeholder_BL]), "the placeholders are as they were")


def refuses_a_wrong_count(d: Docked) -> None:
    """Placeholders that are fewer or more than the pictures need are a ValueError with both numbers."""
    ids_BL, placeholder_BL, features = d.prompt()
    more = placeholder_BL.clone()
    more[2, 5] = True
    fewer = placeholder_BL & (placeholder_BL.long().cumsum(1) > 1)
    for wrong in (more, fewer):
        try:
            d.embed(ids_BL, wrong, features)
        except ValueError as e:
            expect(str(int(wrong.sum())) in str(e), f"the message lacks the {int(wrong.sum())} placeholders: {e}")
        else:
            raise Broken(f"{int(wrong.sum())} placeholders were taken where {int(placeholder_BL.sum())} are needed")


def leaves_text_alone(d: Docked) -> None:
    """Wired, but with no picture in hand, the language model computes what it computes bare, bit for bit. So do the
    rows without a picture that share a batch with others (to 1e-5)."""
    bare = copy.deepcopy(d.language)
    remove_hooks(bare)
    ids_BL, placeholder_BL, features = d.prompt()
    wanted = bare.model(input_ids=ids_BL, use_cache=False).last_hidden_state
    wired = d.language.model(input_ids=ids_BL, use_cache=False).last_hidden_state
    expect(torch.equal(wired, wanted), f"text alone differs by {difference(wired, wanted):.1e}")
    gap = difference(d.hidden(ids_BL, placeholder_BL, features)[2], wanted[2])
    expect(gap <= SAME, f"a row without a picture, beside rows that have one, differs by {gap:.1e}")
    expect(d.part.seen is None, "after the forward pass, `seen` is not None")


def sees_the_picture(d: Docked) -> None:
    """With open gates, words behind a picture depend on it; words before it and other rows do not."""
    ids_BL, placeholder_BL, features = d.prompt()
    one = d.hidden(ids_BL, placeholder_BL, features)
    changed = features.tokens_BND.clone()
    changed[0] = torch.randn_like(changed[0])  # the picture of row 0
    other = d.hidden(ids_BL, placeholder_BL, Features(changed, features.mask_BN))
    behind = int(placeholder_BL[0].nonzero().max()) + 1
    expect(
        difference(one[0, behind:], other[0, behind:]) > SAME, "another picture, and the words behind it are the same"
    )
    expect(difference(one[0, :1], other[0, :1]) <= SAME, "the words before a picture depend on it")
    expect(difference(one[1:], other[1:]) <= SAME, "the picture of a row changes other rows")


def ignores_masked_tokens(d: Docked) -> None:
    """Soft tokens that are not real change nothing, whatever they hold; `placeholders` then counts the real ones."""
    each, fewer = d.part.placeholders(SOFT), d.part.placeholders(SOFT - 1)
    ids_BL, placeholder_BL, features = d.prompt((1, 1))
    mask_BN = features.mask_BN.clone()
    mask_BN[0, -1] = False
    placeholder_BL[0, 1 + fewer : 1 + each] = False
    one = d.hidden(ids_BL, placeholder_BL, Features(features.tokens_BND, mask_BN))
    spoiled = torch.where(mask_BN.unsqueeze(-1), features.tokens_BND, 100.0)
    gap = difference(d.hidden(ids_BL, placeholder_BL, Features(spoiled, mask_BN)), one)
    expect(gap <= SAME, f"other numbers in masked tokens change the hidden states by {gap:.1e}")


def does_not_mix_the_batch(d: Docked) -> None:
    """A row alone gives what it gives within a batch (to 1e-5), whatever pictures the others show."""
    ids_BL, placeholder_BL, features = d.prompt()
    together = d.hidden(ids_BL, placeholder_BL, features)
    first = 0
    for row, count in enumerate(PICTURES):
        own = Features(features.tokens_BND[first : first + count], features.mask_BN[first : first + count])
        first += count
        if not count:  # a prompt without a picture does not come through the fusion at all
            continue
        alone = d.hidden(ids_BL[row : row + 1], placeholder_BL[row : row + 1], own)
        gap = difference(alone[0], together[row])
        expect(gap <= SAME, f"row {row} alone and in a batch differ by {gap:.1e}")


def generates_with_a_cache(d: Docked) -> None:
    """A word at a time, with the language model's cache and `later(seen, …)`, gives the hidden states of one pass over
    the whole (to 1e-5)."""
    ids_BL, placeholder_BL, features = d.prompt()
    whole = d.hidden(ids_BL, placeholder_BL, features)
    with torch.no_grad():
        embeds_BLD, start = d.embed(ids_BL, placeholder_BL, features), d.length - 2
        seen = d.part.see(placeholder_BL[:, :start], features)
        with d.part.seeing(seen):
            out = d.language.model(inputs_embeds=embeds_BLD[:, :start], use_cache=True)
        for at in range(start, d.length):
            with d.part.seeing(d.part.later(seen, 1)):
                step = embeds_BLD[:, at : at + 1]
                out = d.language.model(inputs_embeds=step, use_cache=True, **{CACHE: out[CACHE]})
            gap = difference(out.last_hidden_state[:, 0], whole[:, at])
            expect(gap <= SAME, f"word {at}, generated with a cache, differs by {gap:.1e}")


def passes_a_dummy(d: Docked) -> None:
    """`dummy_pass` gives the embeddings back bit for bit, and makes them depend on every weight of the fusion and on
    the features, so that a process without a picture keeps step with the others."""
    ids_BL, _, features = d.prompt()
    features.tokens_BND.requires_grad_(True)
    words_BLD = d.language.get_input_embeddings()(ids_BL)
    out_BLD = d.part.dummy_pass(words_BLD, features)
    expect(torch.equal(out_BLD, words_BLD), "dummy_pass changed the embeddings")
    d.part.zero_grad()
    out_BLD.sum().backward()
    without = [n for n, p in d.part.named_parameters() if p.grad is None]
    d.part.zero_grad()
    expect(not without, f"dummy_pass does not depend on {', '.join(without[:5])}")
    expect(features.tokens_BND.grad is not None, "dummy_pass does not depend on the features")
