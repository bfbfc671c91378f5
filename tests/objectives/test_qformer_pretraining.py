"""BLIP-2's first stage: three masks, three losses, one batch however it is spread. (Its scores: tests/parity.)"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

import tiny
from errors import refused
from opticnerve.connectors.mlp import LinearConnector
from opticnerve.connectors.qformer import QFormerConnector
from opticnerve.data.collators.contrastive import CaptionBatch, CaptionCollator
from opticnerve.objectives.base import gather_padded
from opticnerve.objectives.qformer_pretraining import (
    QFormerPretraining,
    attention_mask,
    contrastive_loss,
    draw,
    similarity,
)
from opticnerve.types import DataError, Features, OpticNerveError, ask

if TYPE_CHECKING:  # the second process of a test imports this file, too, and has no need of it
    from opticnerve.models.vlm.build import Dock

CAPTIONS = ["a red circle", "a blue square", "the green dog", "three foxes", "a beach", "no triangle", "a cat", "snow"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({w for c in CAPTIONS for w in c.split()})]


def tokenizer() -> Any:
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=16, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]",
    )  # fmt: skip


class Tower(nn.Module):
    """A vision encoder of one matrix (a picture of 8 × 8 pixels is four patches) before a Q-Former."""

    tiling = None

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.vision_encoder = nn.Linear(3 * 4 * 4, 12)
        sizes: dict[str, Any] = {"num_queries": 3, "hidden_size": 32, "depth": 2, "heads": 2, "image_text_size": 16}
        self.connector = QFormerConnector(
            in_size=12, out_size=10, in_tokens=4, text=True, vocab_size=len(VOCABULARY) + 1, **sizes | options
        )

    def encode(self, pixel_values: Tensor) -> Features:
        patches = F.unfold(pixel_values, 4, stride=4).mT
        return Features(self.vision_encoder(patches), torch.ones(patches.shape[:2], dtype=torch.bool))


def objective(*, seed: int = 0, label_smoothing: float = 0.1, **options: Any) -> QFormerPretraining:
    torch.manual_seed(seed)
    model = nn.Module()
    model.image = Tower(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return QFormerPretraining(model, label_smoothing=label_smoothing)


def batch(captions: list[str] = CAPTIONS, pictures: list[int] | None = None) -> CaptionBatch:
    """Captions with pictures of noise; equal numbers in `pictures` are equal pictures."""
    pictures = list(range(len(captions))) if pictures is None else pictures
    pixels = [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(100 + p)) for p in pictures]
    token_logits = tokenizer()(captions, padding=True, return_tensors="pt")
    return CaptionBatch(
        torch.stack(pixels), token_logits["input_ids"], token_logits["attention_mask"].bool(), torch.tensor(pictures),
        [str(i) for i in range(len(captions))],
    )  # fmt: skip


def part(whole: CaptionBatch, rows: slice) -> CaptionBatch:
    """Some pairs of a batch, padded no further than they need, as another process would hold them."""
    length = int(whole.text_mask[rows].sum(1).max())
    return CaptionBatch(
        whole.pixel_values[rows], whole.text_ids[rows, :length], whole.text_mask[rows, :length],
        whole.image_keys[rows], whole.ids[rows],
    )  # fmt: skip


class TestMasks:
    """Figure 2 of the paper, for two queries and four words of which the last is padding."""

    token_logits = torch.tensor([[1, 1, 1, 0]])

    def test_bidirectional(self) -> None:
        row = [1, 1, 1, 1, 1, 0]
        assert attention_mask("bidirectional", 2, self.token_logits)[0].int().tolist() == [row] * 6

    def test_causal(self) -> None:
        assert attention_mask("causal", 2, self.token_logits)[0].int().tolist() == [
            [1, 1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 1, 1, 1, 0],
            [1, 1, 1, 1, 1, 0],
        ]

    def test_unimodal(self) -> None:
        queries, token_logits = [1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0]
        assert attention_mask("unimodal", 2, self.token_logits)[0].int().tolist() == [queries] * 2 + [token_logits] * 4

    def test_each_row_has_its_own_padding(self) -> None:
        masks = attention_mask("unimodal", 1, torch.tensor([[1, 0, 0], [1, 1, 1]]))
        assert masks.shape == (2, 4, 4)
        assert masks[:, 1].int().tolist() == [[0, 1, 0, 0], [0, 1, 1, 1]]


class TestGeneration:
    @torch.no_grad()
    def test_teacher_forcing_is_step_by_step(self) -> None:
        made, pairs = objective(), batch()
        seen = made.features(pairs.pixel_values)
        at_once = made.caption_logits(made.caption_states(seen, pairs.text_ids, pairs.text_mask))
        for length in range(1, pairs.text_ids.shape[1] + 1):
            ids, mask = pairs.text_ids[:, :length], pairs.text_mask[:, :length]
            last = made.caption_logits(made.caption_states(seen, ids, mask))[:, -1]
            real = mask[:, -1]
            torch.testing.assert_close(last[real], at_once[:, length - 1][real], rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def test_words_see_the_picture_and_queries_do_not_see_words(self) -> None:
        made, pairs = objective(), batch()
        seen = made.features(pairs.pixel_values)
        other = Features(seen.tokens_BND.flip(0), seen.mask_BN)
        states = made.caption_states(seen, pairs.text_ids, pairs.text_mask)
        assert (states[0] - made.caption_states(other, pairs.text_ids, pairs.text_mask)[0]).abs().max() > 1e-3
        queries, _ = made._attend("causal", seen, pairs.text_ids, pairs.text_mask)
        torch.testing.assert_close(queries, made.connector.attend(seen)[0], rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def test_the_caption_begins_with_dec(self) -> None:
        """What stands in [CLS]'s place does not matter; what stands in [DEC]'s row does."""
        made, pairs = objective(), batch()
        seen = made.features(pairs.pixel_values)
        states = made.caption_states(seen, pairs.text_ids, pairs.text_mask)
        changed = pairs.text_ids.clone()
        changed[:, 0] = 5
        assert torch.equal(states, made.caption_states(seen, changed, pairs.text_mask))
        made.connector.text_embeddings.word_embeddings.weight[made.connector.decoder_token_id] += 1.0
        assert not torch.allclose(states, made.caption_states(seen, pairs.text_ids, pairs.text_mask))

    @torch.no_grad()
    def test_the_loss_is_the_mean_over_each_captions_tokens(self) -> None:
        made, pairs = objective(label_smoothing=0.0), batch()
        seen = made.features(pairs.pixel_values)
        log_p = made.caption_logits(made.caption_states(seen, pairs.text_ids, pairs.text_mask)).log_softmax(-1)
        loss = made._generation(seen, pairs.text_ids, pairs.text_mask)
        for i, (ids, mask) in enumerate(zip(pairs.text_ids.tolist(), pairs.text_mask, strict=True)):
            said = ids[1 : int(mask.sum())]
            assert said[-1] == 3, "[SEP] ends it"
            expected = -sum(float(log_p[i, k, token]) for k, token in enumerate(said)) / len(said)
            assert float(loss[i]) == pytest.approx(expected, rel=1e-4)


class TestContrast:
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_without_twins_it_is_cross_entropy(self, smoothing: float) -> None:
        logits, own = torch.randn(3, 6), torch.tensor([2, 3, 4])
        loss = contrastive_loss(logits, own, torch.zeros(3, 6, dtype=torch.bool), smoothing)
        torch.testing.assert_close(loss, F.cross_entropy(logits, own, reduction="none", label_smoothing=smoothing))

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_twins_are_as_if_they_were_not_there(self, smoothing: float) -> None:
        logits, twin = torch.randn(1, 4, requires_grad=True), torch.tensor([[False, False, True, False]])
        loss = contrastive_loss(logits, torch.tensor([1]), twin, smoothing)
        rest = logits[:, [0, 1, 3]]
        torch.testing.assert_close(loss, F.cross_entropy(rest, torch.tensor([1]), label_smoothing=smoothing)[None])
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert gradient.isfinite().all()
        assert float(gradient[0, 2]) == 0.0

    def test_the_nearest_query_counts(self) -> None:
        queries = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.6, 0.8]]])
        token_logits = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, -1.0]])
        torch.testing.assert_close(similarity(queries, token_logits), torch.tensor([[1.0, 1.0, 0.0], [0.8, 0.6, 0.0]]))

    def test_the_temperature_starts_at_007_and_learns(self) -> None:
        made = objective(label_smoothing=0.0)
        made.heads.logit_scale.data.fill_(torch.tensor(1 / 0.07).log())
        with torch.no_grad():
            pairs = batch()
            image, text = made.contrast(made.features(pairs.pixel_values), pairs.text_ids, pairs.text_mask)
            logits, own = similarity(image, text) / 0.07, torch.arange(8)
            expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        made(pairs)[0].backward()
        assert float(made.metrics["itc"]) == pytest.approx(float(expected), rel=1e-5)
        assert float(made.heads.logit_scale.grad.abs()) > 0


class TestDraw:
    def test_the_more_alike_the_more_often(self) -> None:
        logits, allowed = torch.tensor([[0.0, 2.0, 1.0, 9.0]]), torch.tensor([[True, True, True, False]])
        chance = torch.linspace(0, 1, 10_001, dtype=torch.double)[:-1]
        found = draw(logits.expand(len(chance), -1), allowed.expand(len(chance), -1), chance)
        share = torch.bincount(found, minlength=4) / len(chance)
        torch.testing.assert_close(share[:3], logits[0, :3].softmax(0), rtol=0, atol=1e-3)
        assert share[3] == 0

    @pytest.mark.parametrize("chance", [0.0, 0.5, 1 - 2**-24])
    def test_never_what_is_not_allowed(self, chance: float) -> None:
        allowed = torch.tensor([[False, False, True, True, False], [False, True, False, False, False]])
        found = draw(torch.zeros(2, 5), allowed, torch.full((2,), chance, dtype=torch.double))
        assert allowed.gather(1, found[:, None]).all()

    def test_a_row_that_allows_none_gets_a_column_all_the_same(self) -> None:
        found = draw(torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.bool), torch.tensor([0.3], dtype=torch.double))
        assert 0 <= int(found) < 3


class TestTwins:
    """Pairs with the same picture or the same caption are no negatives of each other."""

    captions = ("a red circle", "a red circle", "the green dog", "a beach")
    pictures = (0, 1, 2, 2)  # 0 and 1 share their words, 2 and 3 their picture

    def drawn(self, seed: int) -> tuple[Tensor, Tensor]:
        """The pictures' keys and the captions' ids that went into matching, three blocks of four."""
        made, pairs = objective(), batch(list(self.captions), list(self.pictures))
        seen: list[Any] = []
        match = made.match_logits
        made.match_logits = lambda *args: seen.append(args) or match(*args)  # type: ignore
        torch.manual_seed(seed)
        made(pairs)
        own = made.features(pairs.pixel_values).tokens_BND
        distance = (seen[0][0].tokens_BND[:, None] - own[None]).abs().amax((2, 3))
        return pairs.image_keys[distance.argmin(1)].view(3, 4), seen[0][1].view(3, 4, -1)

    def test_they_are_not_drawn_for_matching(self) -> None:
        found = set()
        for seed in range(12):
            keys, ids = self.drawn(seed)
            own_key, own_ids = keys[0], ids[0]
            assert torch.equal(keys[2], own_key)
            assert torch.equal(ids[1], own_ids)
            for i, j in ((0, 1), (2, 3)):
                for negative_key in keys[1, [i, j]]:
                    assert int(negative_key) not in own_key[[i, j]].tolist()
                for negative_ids in ids[2, [i, j]]:
                    assert not any(torch.equal(negative_ids, own_ids[k]) for k in (i, j))
            found.add((tuple(keys[1].tolist()), tuple(ids[2].flatten().tolist())))
        assert len(found) > 1, "nothing was drawn at random"

    @torch.no_grad()
    def test_they_leave_the_contrast(self) -> None:
        made, pairs = objective(label_smoothing=0.0), batch(list(self.captions), list(self.pictures))
        made(pairs)
        image, text = made.contrast(made.features(pairs.pixel_values), pairs.text_ids, pairs.text_mask)
        logits = similarity(image, text) * made.heads.logit_scale.exp()
        kept = [[0, 2, 3], [1, 2, 3], [0, 1, 2], [0, 1, 3]]
        losses = []
        for i, columns in enumerate(kept):
            own = torch.tensor(columns.index(i))
            losses += [F.cross_entropy(m[i, columns], own) for m in (logits, logits.T)]
        assert float(made.metrics["itc"]) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)

    def test_a_pair_without_any_negative_is_matched_with_itself_alone(self) -> None:
        made, pairs = objective(), batch(["a cat", "a cat", "snow"], [0, 1, 0])
        loss, count = made(pairs)
        loss.backward()
        assert int(count) == 3
        assert loss.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in made.parameters())

    def test_nothing_to_contrast(self) -> None:
        with refused("conflict", "all 3 pairs"):
            objective()(batch(["a cat"] * 3))


def test_sum_and_count() -> None:
    made, pairs = objective(), batch()
    loss, count = made(pairs)
    assert int(count) == pairs.supervised == pairs.samples == 8
    assert pairs.tokens == int(pairs.text_mask.sum())
    assert set(made.metrics) == {"itc", "itm", "itg"}
    assert float(loss.detach()) == pytest.approx(float(8 * sum(made.metrics.values())), rel=1e-5)


def test_what_gets_a_gradient() -> None:
    made = objective()
    made(batch())[0].backward()
    without = {n for n, p in made.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {f"model.image.connector.language_projection.{n}" for n in ("weight", "bias")}


def test_it_learns_eight_pairs_by_heart() -> None:
    made, pairs = objective(label_smoothing=0.0, cross_attention_frequency=1), batch()
    adam = torch.optim.Adam(made.parameters(), lr=5e-3)
    torch.manual_seed(1)
    history = []
    for _ in range(160):
        loss, count = made(pairs)
        adam.zero_grad()
        (loss / count).backward()
        adam.step()
        history.append(made.metrics)
    with torch.no_grad():
        seen = made.features(pairs.pixel_values)
        scores = similarity(*made.contrast(seen, pairs.text_ids, pairs.text_mask))
        said = made.caption_logits(made.caption_states(seen, pairs.text_ids, pairs.text_mask)).argmax(-1)
        match = made.match_logits(seen, pairs.text_ids, pairs.text_mask).softmax(-1)[:, 1]
        wrong = made.match_logits(seen, pairs.text_ids.roll(1, 0), pairs.text_mask.roll(1, 0)).softmax(-1)[:, 1]
    assert scores.argmax(0).tolist() == scores.argmax(1).tolist() == list(range(8))
    learned = pairs.text_mask[:, 1:]
    assert torch.equal(said[:, :-1][learned], pairs.text_ids[:, 1:][learned])
    assert match.min() > 0.5 > wrong.mean()
    for name in ("itc", "itm", "itg"):
        assert history[-1][name] < 0.2 * history[0][name], name


class TestCollator:
    def collator(self, **options: Any) -> CaptionCollator:
        processor = SimpleNamespace(
            image_processor=tf.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8),
            qformer_tokenizer=tokenizer(),
        )
        return QFormerPretraining.collator(processor, SimpleNamespace(max_length=None, **options), 0)

    def test_pairs(self) -> None:
        rows = [[ask("describe", tiny.picture(i), answer=c)] for i, c in enumerate(CAPTIONS)]
        made = pickle.loads(pickle.dumps(self.collator()))(rows)
        assert made.pixel_values.shape == (8, 3, 8, 8)
        assert made.text_ids.shape == made.text_mask.shape == (8, 5)
        assert tokenizer().batch_decode(made.text_ids, skip_special_tokens=True) == CAPTIONS
        assert made.text_ids[:, 0].tolist() == [2] * 8
        assert len(set(made.image_keys.tolist())) == 8
        loss, _ = objective()(made.to("cpu"))
        assert loss.isfinite()

    def test_the_same_picture_from_elsewhere_has_the_same_key(self) -> None:
        file = io.BytesIO()
        tiny.picture(0).save(file, format="png")
        rows = [[ask("", p, answer="x")] for p in (tiny.picture(0), file.getvalue(), tiny.picture(1))]
        keys = self.collator()(rows).image_keys.tolist()
        assert keys[0] == keys[1] != keys[2]

    def test_long_captions_end_with_sep(self) -> None:
        short = CaptionCollator(self.collator().image_processor, tokenizer(), max_length=4)
        ids = short([[ask("", tiny.picture(0), answer="a red circle a red circle")]]).text_ids
        assert tokenizer().decode(ids[0]) == "[CLS] a red [SEP]"

    @pytest.mark.parametrize(
        ("rows", "error", "refusal"),
        [
            ([[ask("who?", answer="a cat")]], DataError, ("no-image", "qformer_pretraining")),
            ([[ask("who?", tiny.picture(0))]], DataError, ("no-assistant-turn",)),
            ([[ask("who?", tiny.picture(0), answer=" ")]], DataError, ("no-assistant-turn",)),
            ([[ask("", b"no picture", answer="a cat")]], DataError, ("unreadable-image", 10)),
            ([[ask("", tiny.picture(0), answer="a cat")] * 3], OpticNerveError, ("conflict", 3, "share_prefix")),
        ],
    )
    def test_what_it_refuses(self, rows: Any, error: type[Exception], refusal: tuple[Any, ...]) -> None:
        with refused(*refusal, error=error):
            self.collator()(rows)

    def test_a_processor_without_the_tokenizer(self) -> None:
        with refused("missing-field", "text_tokenizer", "bert"):
            QFormerPretraining.collator(SimpleNamespace(image_processor=None), SimpleNamespace(max_length=9), 0)


def test_refusals() -> None:
    made = objective()
    with refused("out-of-range", 1, "batch_size"):
        made(batch(["a cat"]))
    pairs = batch()
    pairs.text_ids[3, 1] = made.connector.decoder_token_id
    with refused("out-of-range", len(VOCABULARY)):
        made(pairs)
    model: Any = nn.Module()
    with refused("unsupported", "type: qformer"):
        QFormerPretraining(model)
    model.image = Tower()
    model.image.connector = LinearConnector(in_size=12, out_size=10, in_tokens=4)
    with refused("unsupported", "type: qformer"):
        QFormerPretraining(model)
    model.image.connector = QFormerConnector(in_size=12, out_size=10, in_tokens=4, instruct=True, vocab_size=9)
    with refused("unsupported", "text: true"):
        QFormerPretraining(model)
    model.image = Tower()
    model.image.layout = "anyres"
    with refused("conflict", "tiling"):
        QFormerPretraining(model)


def test_on_a_docked_model(docked: Callable[..., Dock]) -> None:
    options = {"num_queries": 3, "hidden_size": 16, "depth": 2, "heads": 2, "vocab_size": len(VOCABULARY) + 1}
    made = docked(connector={"type": "qformer", "text": True, **options})
    pairs = batch()
    pairs.pixel_values = torch.randn(8, 3, 32, 32)
    before = {n: p.clone() for n, p in made.model.language_model.state_dict().items()}
    trained = QFormerPretraining(made.model)
    loss, count = trained(pairs)
    (loss / count).backward()
    assert all(p.grad is None for p in made.model.language_model.parameters())
    assert all(torch.equal(p, before[n]) for n, p in made.model.language_model.state_dict().items())
    assert trained.heads.itm_head.weight.grad.any()


# -- two processes -----------------------------------------------------------------------------------------------------

# 1 and 5 share their words across processes, 2 and 6 their picture; the first half's longest caption is shorter.
SPREAD_CAPTIONS = ["a cat", "snow", "a beach", "no triangle", "a red circle", "snow", "the green dog", "a blue square"]
SPREAD_PICTURES = [0, 1, 2, 3, 4, 5, 2, 7]


def gradients(made: QFormerPretraining) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}


def one_of_two(rank: int, folder: str) -> None:
    """A process's half: once with its gradients summed by hand, once under DistributedDataParallel."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mine = part(batch(SPREAD_CAPTIONS, SPREAD_PICTURES), slice(4 * rank, 4 * rank + 4))
    made = objective()
    torch.manual_seed(11 + rank)  # only the first process draws
    loss, count = made(mine)
    (loss / 8).backward()
    found = gradients(made)
    for gradient in found.values():
        torch.distributed.all_reduce(gradient)
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)

    wrapped = nn.parallel.DistributedDataParallel(objective(), find_unused_parameters=True)
    torch.manual_seed(11 + rank)
    again, _ = wrapped(mine)
    (again * 2 / 8).backward()
    result = {"loss": total, "count": count, "summed": found, "ddp": gradients(wrapped.module)}

    try:
        gather_padded(*(t[: 2 + rank] for t in (mine.text_ids, mine.text_mask)))
    except OpticNerveError as e:
        result["uneven"] = str(e)
    torch.save(result, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_find_the_gradient_of_one_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_of_two, args=(str(tmp_path),), nprocs=2)
    made = objective()
    torch.manual_seed(11)
    loss, _ = made(batch(SPREAD_CAPTIONS, SPREAD_PICTURES))
    (loss / 8).backward()
    expected = gradients(made)
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt")
        assert int(result["count"]) == 4
        torch.testing.assert_close(result["loss"], loss.detach(), rtol=1e-5, atol=1e-5)
        for way in ("summed", "ddp"):
            assert expected.keys() <= result[way].keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(
                    result[way][name],
                    gradient,
                    rtol=1e-4,
                    atol=1e-6,
                    msg=lambda m, n=name, w=way: f"{w} {n}: {m}",  # type: ignore[misc]
                )
        assert result["uneven"] == (
            "the processes hold [2, 3] samples; in-batch negatives want the same number on each"
        )
