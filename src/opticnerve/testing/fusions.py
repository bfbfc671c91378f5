"""What a fusion promises (`opticnerve.fusion.base.Fusion`), shown on a tiny language model."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opticnerve.common.private_names import CACHE, remove_hooks
from opticnerve.fusion.base import Fusion
from opticnerve.testing.contract import (
    SAME,
    Broken,
    apply,
    difference,
    expect,
    expect_gradients,
    expect_options,
    moved,
    options_are_json,
    stir,
    through_json,
)
from opticnerve.testing.docked import LAYERS, PICTURES, SOFT, WIDTH, Docked, dock, elsewhere
from opticnerve.types import Features


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


def saves_and_loads(d: Docked) -> None:
    """`options` build the same module again, and its state dict carries all else that it learned: written to a
    safetensors file, read into a rebuilt module and wired, it gives the same numbers, bit for bit."""
    again = dock(d.rebuild(), d.rebuild, d.unused)
    expect_options(again.part, d.part)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "part.safetensors"
        save_file({k: v.contiguous().clone() for k, v in d.part.state_dict().items()}, file)
        again.part.load_state_dict(load_file(file))
    prompt = d.prompt()
    expect(torch.equal(again.hidden(*prompt), d.hidden(*prompt)), "after saving and loading, numbers differ")


def is_deterministic(d: Docked) -> None:
    """In `eval()` the same prompt gives the same hidden states, bit for bit."""
    prompt = d.prompt()
    gap = difference(d.hidden(*prompt), d.hidden(*prompt))
    expect(gap == 0, f"two passes differ by {gap:.1e}")


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


def gradients_flow(d: Docked) -> None:
    """The fusion freezes nothing by itself (training says what trains): with open gates, finite gradients reach every
    parameter of the fusion and every picture."""
    ids_BL, placeholder_BL, features = d.prompt()
    features.tokens_BND.requires_grad_(True)
    d.part.zero_grad()
    out = d.hidden(ids_BL, placeholder_BL, features)
    (out * torch.randn_like(out)).sum().backward()
    expect_gradients(d.part, d.unused)
    d.part.zero_grad()
    grad = features.tokens_BND.grad
    expect(grad is not None, "no gradient reaches the soft tokens")
    blind = [i for i, g in enumerate(grad) if not g.isfinite().all() or not g.any()]  # type: ignore[arg-type]
    expect(not blind, f"the gradient of the soft tokens is zero or not finite for pictures {blind}")


def passes_a_dummy(d: Docked) -> None:
    """`idle` gives the embeddings back bit for bit, and makes them depend on every weight of the fusion and on the
    features, so that a process without a picture keeps step with the others."""
    ids_BL, _, features = d.prompt()
    features.tokens_BND.requires_grad_(True)
    words_BLD = d.language.get_input_embeddings()(ids_BL)
    out_BLD = d.part.dummy_pass(words_BLD, features)
    expect(torch.equal(out_BLD, words_BLD), "idle changed the embeddings")
    d.part.zero_grad()
    out_BLD.sum().backward()
    without = [n for n, p in d.part.named_parameters() if p.grad is None]
    d.part.zero_grad()
    expect(not without, f"idle does not depend on {', '.join(without[:5])}")
    expect(features.tokens_BND.grad is not None, "idle does not depend on the features")


def moves_to_bfloat16(d: Docked) -> None:
    """`.to(torch.bfloat16)` is all it takes, for the fusion as for the language model: the numbers are float32's within
    the rounding."""
    ids_BL, placeholder_BL, features = d.prompt()
    wanted = d.hidden(ids_BL, placeholder_BL, features).detach()
    half = elsewhere(d, torch.bfloat16)
    (tokens_BND,) = moved((features.tokens_BND,), torch.bfloat16)
    out = half.hidden(ids_BL, placeholder_BL, Features(tokens_BND, features.mask_BN)).detach()
    expect(out.dtype == torch.bfloat16, f"hidden states come out as {out.dtype}")
    gap = float((out.float() - wanted).norm() / wanted.norm())
    expect(gap <= 0.1, f"the numbers are {gap:.0%} away from float32's")


def moves_to_another_device(d: Docked) -> None:
    """`.to(device)` is all it takes; the fusion also builds on the meta device (`opticnerve plan` counts there)."""
    with torch.device("meta"):
        built = d.rebuild()
    real = [n for n, t in [*built.named_parameters(), *built.named_buffers()] if not t.is_meta]
    expect(not real, f"built under torch.device('meta'), {', '.join(real[:5])} lie elsewhere")
    if torch.cuda.is_available():
        ids_BL, placeholder_BL, features = d.prompt()
        wanted = d.hidden(ids_BL, placeholder_BL, features).detach()
        ids, places, tokens, mask = moved((ids_BL, placeholder_BL, features.tokens_BND, features.mask_BN), "cuda")
        out = elsewhere(d, "cuda").hidden(ids, places, Features(tokens, mask)).detach()
        gap = float((out.cpu() - wanted).norm() / wanted.norm())
        expect(gap <= 1e-2, f"on cuda, the numbers are {gap:.1%} away")


def compiles(d: Docked) -> None:
    """Under `torch.compile` a prompt gives the same hidden states (to 1e-5). Counting placeholders may break the
    graph."""
    ids_BL, placeholder_BL, features = d.prompt()
    wanted = d.hidden(ids_BL, placeholder_BL, features)

    def run(ids: Tensor, places: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        return d.hidden(ids, places, Features(tokens, mask))

    torch.compiler.reset()
    try:
        out = torch.compile(run, backend="eager")(ids_BL, placeholder_BL, features.tokens_BND, features.mask_BN)
    finally:
        torch.compiler.reset()
    gap = difference(out, wanted)
    expect(gap <= SAME, f"compiled, hidden states differ by {gap:.1e}")
