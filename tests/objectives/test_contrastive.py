"""One big batch is what counts: split over processes or micro-batches, the loss and its gradients stay the same."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from errors import refused
from opticnerve.objectives.contrastive import MAX_SCALE, Contrastive, Negatives, clip_loss, siglip_loss
from opticnerve.types import OpticNerveError

PAIRS = 8


@dataclass
class Pairs:
    """What the objective asks of a batch."""

    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: Tensor
    caption_keys: Tensor
    image_keys: Tensor
    ids: list[str]
    captions: list[str]
    image_features: None = None
    sources: None = None

    def part(self, start: int, stop: int) -> Pairs:
        return Pairs(*(v[start:stop] for v in list(vars(self).values())[:7]))


def pairs(count: int = PAIRS) -> Pairs:
    """Distinct pictures and captions, as vectors."""
    g = torch.Generator().manual_seed(1)
    words, pixels = torch.randn(count, 5, generator=g), torch.randn(count, 7, generator=g)
    names = [f"s{i}" for i in range(count)]
    keys = torch.arange(count)  # (a caption and a picture may have the same number: they are not compared)
    return Pairs(words, torch.ones(count, 1), pixels, keys, keys.clone(), names, [f"caption {i}" for i in range(count)])


class TwoTowers(nn.Module):
    """The least that the objective asks of a model; dropout, so that replays have something to get wrong."""

    def __init__(self, loss: str, *, dropout: float = 0.3, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(loss=loss)
        self.image = nn.Sequential(
            nn.Linear(7, 6), nn.BatchNorm1d(6) if norm else nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 4)
        )
        self.text = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 4))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.logit_bias = nn.Parameter(torch.tensor(-3.0)) if loss == "siglip" else None

    def embed(self, batch: Any) -> tuple[Tensor, Tensor]:
        return F.normalize(self.image(batch.pixel_values), dim=1), F.normalize(self.text(batch.input_ids), dim=1)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def big_batch(loss: str, duplicates: Any = "refuse", batch: Pairs | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss and gradients of everything at once, without dropout."""
    model = TwoTowers(loss, dropout=0.0)
    total, count = Contrastive(model, duplicates=duplicates)(batch or pairs())
    (total / count).backward()
    return (total / count).detach(), gradients(model)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")  # type: ignore[misc]


# -- the losses -----------------------------------------------------------------------------------------------------


def test_clip_loss_is_the_mean_of_two_cross_entropies() -> None:
    image, text = (F.normalize(torch.randn(5, 4), dim=1) for _ in range(2))
    logits, own = 7.0 * image @ text.T, torch.arange(5)
    wanted = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(clip_loss(image, text, torch.tensor(7.0)) / 5, wanted)


def test_siglip_loss_asks_every_pair() -> None:
    image, text = (F.normalize(torch.randn(3, 4), dim=1) for _ in range(2))
    total = sum(
        math.log1p(math.exp(-(1 if i == j else -1) * (7.0 * float(image[i] @ text[j]) - 2.0)))
        for i in range(3)
        for j in range(3)
    )
    torch.testing.assert_close(siglip_loss(image, text, torch.tensor(7.0), torch.tensor(-2.0)), torch.tensor(total))


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_twins_count_as_if_they_were_not_there(loss: str) -> None:
    """A masked pair leaves no trace: any embedding of it gives the same loss for the others."""
    image, text = (F.normalize(torch.randn(4, 4), dim=1) for _ in range(2))
    twin = torch.zeros(4, 4, dtype=torch.bool)
    twin[0, 3] = twin[3, 0] = True
    scale, bias = torch.tensor(5.0), torch.tensor(-1.0)

    def first_row(text_3: Tensor, masked: bool) -> Tensor:
        others = torch.cat([text[:3], text_3[None]])
        negatives = Negatives(image, others, twin_BN=twin[:1] if masked else None)
        if loss == "clip":
            return clip_loss(image[:1], others[:1], scale, replace(negatives, image_ND=others))
        return siglip_loss(image[:1], others[:1], scale, bias, negatives)

    a, b = text[3], F.normalize(torch.ones(4), dim=0)
    assert torch.equal(first_row(a, True), first_row(b, True))
    assert not torch.equal(first_row(a, False), first_row(b, False))
    three = Negatives(text[:3], text[:3])
    if loss == "clip":
        without = clip_loss(image[:1], text[:1], scale, three)
    else:
        without = siglip_loss(image[:1], text[:1], scale, bias, three)
    torch.testing.assert_close(first_row(a, True), without)


# -- bad input ------------------------------------------------------------------------------------------------------


def test_unequal_pair_counts_name_both_numbers() -> None:
    with refused("wrong-shape", "3 pictures", "2 captions"):
        clip_loss(torch.randn(3, 4), torch.randn(2, 4), torch.tensor(1.0))
    with refused("wrong-shape", "3 pictures", "2 captions"):
        siglip_loss(torch.randn(3, 4), torch.randn(2, 4), torch.tensor(1.0), torch.tensor(0.0))


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_one_pair_teaches_nothing(loss: str) -> None:
    with refused("out-of-range", "1 pair", "batch_size"):
        Contrastive(TwoTowers(loss))(pairs(1))


@pytest.mark.parametrize("keys", ["caption_keys", "image_keys"])
def test_duplicates_are_refused_by_name_or_masked(keys: str) -> None:
    batch = pairs()
    getattr(batch, keys)[5] = getattr(batch, keys)[2]
    same = keys.removesuffix("_keys").replace("image", "picture")
    with refused("conflict", 2, 8, same, "s2", "'caption 2'", "s5", "duplicates: mask"):
        Contrastive(TwoTowers("clip"))(batch)
    masked, _ = big_batch("clip", "mask", batch)
    plain, _ = big_batch("clip")
    assert masked < plain  # two pairs of wrong negatives less to lose by


def test_an_unknown_rule_for_duplicates() -> None:
    with refused("unknown-name", "'refuse'", "'mask'"):
        Contrastive(TwoTowers("clip"), duplicates="drop")


# -- temperature ----------------------------------------------------------------------------------------------------


def test_clips_temperature_is_bounded_and_siglips_is_not() -> None:
    for loss, trains, bounded in (("clip", True, True), ("clip", False, False), ("siglip", True, False)):
        model = TwoTowers(loss)
        with torch.no_grad():
            model.logit_scale.fill_(6.0)
        model.logit_scale.requires_grad_(trains)
        Contrastive(model)(pairs())
        assert (float(model.logit_scale.detach().exp()) <= MAX_SCALE * 1.0001) == bounded


# -- GradCache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize("cuts", [(8,), (4, 8), (3, 4, 8)])
def test_micro_batches_give_the_big_batchs_gradients(loss: str, cuts: tuple[int, ...]) -> None:
    wanted_loss, wanted = big_batch(loss)
    model = TwoTowers(loss, dropout=0.0)
    batches = [pairs().part(a, b) for a, b in zip((0, *cuts), cuts, strict=False)]
    total = Contrastive(model).backward(batches, 1 / PAIRS)
    torch.testing.assert_close(total / PAIRS, wanted_loss)
    assert_same(gradients(model), wanted)


def test_masked_twins_in_different_micro_batches() -> None:
    batch = pairs()
    batch.caption_keys[6] = batch.caption_keys[1]
    _, wanted = big_batch("clip", "mask", batch)
    model = TwoTowers("clip", dropout=0.0)
    Contrastive(model, duplicates="mask").backward([batch.part(0, 4), batch.part(4, 8)], 1 / PAIRS)
    assert_same(gradients(model), wanted)
    with refused("conflict", "s1"):
        Contrastive(model).backward([batch.part(0, 4), batch.part(4, 8)], 1 / PAIRS)


def test_replays_repeat_dropout_and_leave_the_generator_as_one_pass_does() -> None:
    """With dropout, the gradients are those of the embeddings of the first pass: a finite difference says so."""
    batches = [pairs().part(0, 4), pairs().part(4, 8)]

    def loss_of(model: TwoTowers) -> Tensor:
        torch.manual_seed(5)
        image, text = (torch.cat(p) for p in zip(*(model.embed(b) for b in batches), strict=True))
        return clip_loss(image, text, model.logit_scale.exp()) / PAIRS

    model = TwoTowers("clip").train()
    reference = TwoTowers("clip").train()
    loss_of(reference).backward()
    after_one_pass = torch.get_rng_state()
    torch.manual_seed(5)
    Contrastive(model).backward(batches, 1 / PAIRS)
    assert_same(gradients(model), gradients(reference))
    assert torch.equal(torch.get_rng_state(), after_one_pass)


def test_gradients_are_handed_over_after_each_replay() -> None:
    model, seen = TwoTowers("clip", dropout=0.0), []
    Contrastive(model).backward(
        [pairs().part(0, 4), pairs().part(4, 8)], 1 / PAIRS, after_each=lambda: seen.append(len(gradients(model)))
    )
    assert len(seen) >= 2
    assert min(seen) == len(list(model.parameters()))


def test_a_frozen_tower_takes_no_gradient_and_the_other_is_right() -> None:
    _, wanted = big_batch("clip")
    model = TwoTowers("clip", dropout=0.0)
    model.image.requires_grad_(False)
    Contrastive(model).backward([pairs().part(0, 4), pairs().part(4, 8)], 1 / PAIRS)
    assert_same(gradients(model), {n: g for n, g in wanted.items() if not n.startswith("image.")})


def test_batch_norm_in_training_is_refused_with_micro_batches_alone() -> None:
    objective = Contrastive(TwoTowers("clip", norm=True))
    objective.backward([pairs()], 1.0)
    with refused("conflict", "image.1"):
        objective.backward([pairs().part(0, 4), pairs().part(4, 8)], 1.0)
    objective.eval()
    objective.backward([pairs().part(0, 4), pairs().part(4, 8)], 1.0)


# -- several processes ----------------------------------------------------------------------------------------------


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    found = {loss: _measure(rank, loss) for loss in ("clip", "siglip")}
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def _measure(rank: int, loss: str) -> dict[str, Any]:
    batch = pairs()
    batch.caption_keys[6] = batch.caption_keys[1]  # a twin on the other process
    mine = batch.part(rank * 4, rank * 4 + 4)
    # As the training loop does it: gradients averaged over processes, so the loss is multiplied by their number.
    model = TwoTowers(loss, dropout=0.0)
    wrapped = nn.parallel.DistributedDataParallel(Contrastive(model, duplicates="mask"))  # its hooks live as long as it
    total, _ = wrapped(mine)
    (total * (2 / PAIRS)).backward()
    one_pass = gradients(model)
    # GradCache, which sums by itself.
    model = TwoTowers(loss, dropout=0.0)
    again = Contrastive(model, duplicates="mask").backward([mine.part(0, 1), mine.part(1, 4)], 1 / PAIRS)
    errors = []
    for bad in (mine.part(0, 4 - rank), mine):
        try:
            Contrastive(model)(bad)
        except OpticNerveError as e:
            errors.append(str(e))
    return {
        "loss": total.detach(), "cached_loss": again, "one_pass": one_pass, "cached": gradients(model),
        "errors": errors,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_processes_give_one_processs_gradients(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    batch = pairs()
    batch.caption_keys[6] = batch.caption_keys[1]
    for loss in ("clip", "siglip"):
        wanted_loss, wanted = big_batch(loss, "mask", batch)
        found = [f[loss] for f in both]
        torch.testing.assert_close(sum(f["loss"] for f in found) / PAIRS, wanted_loss)
        torch.testing.assert_close(sum(f["cached_loss"] for f in found) / PAIRS, wanted_loss)
        for f in found:
            assert_same(f["one_pass"], wanted)
            assert_same(f["cached"], wanted)
            # Both processes learn of what only one of them can see, and none waits for the other.
            assert "different numbers of pairs (4, 3)" in f["errors"][0]
            assert "2 of the batch's 8 pairs" in f["errors"][1]
