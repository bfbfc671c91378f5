"""BLIP-2's first stage: the Q-Former learns from image–caption pairs what of a picture can be said, without any
language model (Li et al. 2023, section 3.2; the losses' details as in its reference implementation, LAVIS)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from opticnerve.common.on_host import on_host, sent
from opticnerve.connectors.qformer import QFormerConnector
from opticnerve.data.collators.contrastive import CaptionBatch, CaptionCollator
from opticnerve.objectives.base import Objective, gather, gather_padded, processes, shared_uniform
from opticnerve.types import Features, MediaProcessor, OpticNerveError

if TYPE_CHECKING:
    from opticnerve.recipe import Stage

Sees = Literal["bidirectional", "causal", "unimodal"]


def attention_mask(kind: Sees, num_queries: int, text_mask_BL: Tensor) -> Tensor:
    """The three masks of the paper's figure 2: (B, Q + L, Q + L) bool, True where row i attends to column j.

    - `bidirectional` (matching): queries and words all see each other.
    - `causal` (generation): queries see queries; a word sees the queries and the words up to itself.
    - `unimodal` (contrast): queries see queries, words see words.

    Nothing sees padding, where `text_mask_BL` is False.
    """
    length, device = text_mask_BL.shape[1], text_mask_BL.device
    word_T = torch.arange(num_queries + length, device=device) >= num_queries
    row_is_word, column_is_word = word_T[:, None], word_T[None, :]
    match kind:
        case "bidirectional":
            sees_TT = torch.ones_like(row_is_word & column_is_word)
        case "causal":
            earlier_TT = torch.ones(len(word_T), len(word_T), dtype=torch.bool, device=device).tril()
            sees_TT = ~column_is_word | (row_is_word & earlier_TT)
        case "unimodal":
            sees_TT = row_is_word == column_is_word
    return sees_TT[None] & F.pad(text_mask_BL.bool(), (num_queries, 0), value=True)[:, None]


class QFormerPretraining(Objective):
    """Three losses on the Q-Former, one for each mask: image–text contrast (ITC), image–text matching (ITM) with hard
    negatives, image-grounded text generation (ITG).

    Args:
        model: a docked model whose image connector is a `qformer` with `text: true`. The language model is not run.
        label_smoothing: in ITC and ITG (LAVIS: 0.1).

    In-batch negatives come from all processes, so several processes find the gradient of one with the whole batch.
    (With gradient accumulation each micro-batch is its own pool of negatives: that is not the same as one batch.)

    Pairs that share a picture or a caption are no negatives of each other: ITC leaves them out of the softmax, ITM does
    not draw them. A pair without any negative left adds nothing to ITC and its own match alone to ITM.
    """

    in_batch = True

    def __init__(self, model: Any, *, label_smoothing: float = 0.1) -> None:
        super().__init__(model)
        tower = getattr(model, "image", None)
        connector = getattr(tower, "connector", None)
        if not isinstance(connector, QFormerConnector) or connector.pretraining is None:
            raise OpticNerveError(
                "qformer_pretraining wants an image tower with connector: {type: qformer, text: true, bert: …}",
                kind="unsupported",
            )
        if getattr(tower, "layout", None) is not None:
            raise OpticNerveError(
                "qformer_pretraining takes pictures of one shape, as one piece; leave out tiling and fit: native",
                kind="conflict",
            )
        self.label_smoothing = label_smoothing

    @classmethod
    def collator(cls, processor: MediaProcessor, stage: Stage, seed: int) -> CaptionCollator:
        """What makes batches: captions are read by the processor's `qformer_tokenizer`."""
        tokenizer = getattr(processor, "qformer_tokenizer", None)
        if tokenizer is None:
            raise OpticNerveError(
                "qformer_pretraining wants the tokenizer of a BERT: give the qformer connector bert or text_tokenizer",
                kind="missing-field",
            )
        longest = min(stage.max_length or tokenizer.model_max_length, tokenizer.model_max_length)
        return CaptionCollator(processor.image_processor, tokenizer, max_length=longest)

    @property
    def connector(self) -> QFormerConnector:
        connector: QFormerConnector = self.model.image.connector
        return connector

    @property
    def heads(self) -> Any:
        return self.connector.pretraining

    def forward(self, batch: CaptionBatch) -> tuple[Tensor, Tensor]:
        """(loss sum over this process's pairs, their number). `metrics` holds the three means.

        Raises:
            OpticNerveError: fewer than two pairs, none that is another's negative, or a token id that is [DEC]'s.
        """
        features = self.features(batch.pixel_values)
        world_ids, world_mask = gather_padded(batch.text_ids, batch.text_mask)
        self._check(world_ids)
        # One process knows its own pairs on the host, where looking costs no wait.
        words_ML = on_host(world_ids).masked_fill(~on_host(world_mask), -1)
        twin_MM = _twins(on_host(gather(batch.image_keys)), words_ML)
        if bool(twin_MM.all()):
            raise OpticNerveError(
                f"all {len(twin_MM)} pairs of a batch share their picture or caption: nothing to contrast",
                kind="conflict",
            )
        if twin_MM.device != world_ids.device:
            twin_MM = sent(twin_MM, world_ids.device)
        rank, world = processes()
        count = batch.samples
        own_B = torch.arange(rank * count, (rank + 1) * count, device=world_ids.device)
        negative_BM = ~twin_MM[own_B]
        twin_BM = twin_MM[own_B].scatter(1, own_B[:, None], False)

        queries_BQE, words_BE = self.contrast(features, batch.text_ids, batch.text_mask)
        scale = self.heads.logit_scale.float().exp().clamp(max=100.0)
        image_to_text_BM = similarity(queries_BQE, gather(words_BE)) * scale
        text_to_image_BM = similarity(gather(queries_BQE), words_BE).T * scale
        itc_B = 0.5 * (
            contrastive_loss(image_to_text_BM, own_B, twin_BM, self.label_smoothing)
            + contrastive_loss(text_to_image_BM, own_B, twin_BM, self.label_smoothing)
        )

        # Two numbers a pair for the whole batch, so that the draw does not depend on how it is spread.
        chance_BB = shared_uniform(2 * world * count, own_B.device).view(2, -1)[:, own_B]
        itm_B = self._matching(
            features, (world_ids, world_mask), own_B, negative_BM.any(1),
            image_B=draw(text_to_image_BM.detach(), negative_BM, chance_BB[0]),
            text_B=draw(image_to_text_BM.detach(), negative_BM, chance_BB[1]),
        )  # fmt: skip
        itg_B = self._generation(features, batch.text_ids, batch.text_mask)
        losses = {"itc": itc_B, "itm": itm_B, "itg": itg_B}
        self.metrics = {name: loss_B.detach().mean() for name, loss_B in losses.items()}
        return (itc_B + itm_B + itg_B).sum(), own_B.new_full((), count)

    # -- the three views of a pair, one for each mask ---------------------------------------------------------------

    def features(self, pixel_values: Tensor) -> Features:
        """Pictures as the Q-Former reads them: (B, N, in_size)."""
        features = self.model.image.encode(pixel_values)
        tokens_BND = features.tokens_BND.to(self.connector.query_tokens.dtype)
        return self.connector.standardise(Features(tokens_BND, features.mask_BN))

    def contrast(self, features: Features, text_ids: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of each picture's queries (B, Q, E) and of each caption (B, E), blind to each other."""
        queries_BQD, words_BLD = self._attend("unimodal", features, text_ids, text_mask)
        return (
            F.normalize(self.heads.vision_projection(queries_BQD).float(), dim=-1),
            F.normalize(self.heads.text_projection(words_BLD[:, 0]).float(), dim=-1),
        )

    def match_logits(self, features: Features, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """(B, 2): [do not belong together, belong together], the mean over the queries."""
        queries_BQD, _ = self._attend("bidirectional", features, text_ids, text_mask)
        out: Tensor = self.heads.itm_head(queries_BQD).float().mean(1)
        return out

    def caption_states(self, features: Features, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """(B, L, D): word i's state, from the picture and the words up to i, after [DEC] in the first one's place."""
        decoder_ids = text_ids.clone()
        decoder_ids[:, 0] = self.connector.decoder_token_id
        return self._attend("causal", features, decoder_ids, text_mask)[1]

    def caption_logits(self, states_MD: Tensor) -> Tensor:
        """Logits (…, V) of the word after each state."""
        embeddings = self.connector.text_embeddings
        assert embeddings is not None
        out: Tensor = self.heads.token_logits(states_MD, embeddings.word_embeddings.weight).float()
        return out

    def _attend(self, kind: Sees, features: Features, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.connector.attend(features, ids, mask, attention_mask(kind, self.connector.num_tokens, mask))

    # -- the losses ------------------------------------------------------------------------------------------------

    def _matching(
        self, features: Features, world_text: tuple[Tensor, Tensor], own_B: Tensor, has_negative_B: Tensor, *,
        image_B: Tensor, text_B: Tensor,
    ) -> Tensor:  # fmt: skip
        """(B,): the mean of three two-way cross-entropies: the pair, a wrong picture for its caption, a wrong caption
        for its picture."""
        ids, mask = world_text
        tokens_MND, real_MN = gather(features.tokens_BND), gather(features.mask_BN)
        pictures = Features(
            torch.cat([features.tokens_BND, tokens_MND[image_B], features.tokens_BND]),
            torch.cat([features.mask_BN, real_MN[image_B], features.mask_BN]),
        )
        text_3B = torch.cat([own_B, own_B, text_B])
        logits = self.match_logits(pictures, ids[text_3B], mask[text_3B])
        count = len(own_B)
        label = torch.cat([torch.ones_like(own_B), torch.zeros_like(text_3B[count:])])
        loss_3B = F.cross_entropy(logits, label, reduction="none").view(3, count)
        weight_3B = torch.stack([torch.ones_like(has_negative_B), has_negative_B, has_negative_B]).float()
        return (loss_3B * weight_3B).sum(0) / weight_3B.sum(0)

    def _generation(self, features: Features, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """(B,): the mean over a caption's tokens, [SEP] included, of the cross-entropy of each after those before."""
        # Which positions have a word behind them is known on the host.
        learned_M = F.pad(on_host(text_mask)[:, 1:], (0, 1)).flatten().nonzero().squeeze(1)
        if learned_M.device != text_ids.device:
            learned_M = sent(learned_M, text_ids.device)
        states_MD = self.caption_states(features, text_ids, text_mask).flatten(0, 1)[learned_M]
        loss_M = F.cross_entropy(
            self.caption_logits(states_MD), text_ids.flatten()[learned_M + 1], reduction="none",
            label_smoothing=self.label_smoothing,
        )  # fmt: skip
        per_token_BL = loss_M.new_zeros(text_ids.numel()).index_copy(0, learned_M, loss_M).view(text_ids.shape)
        return per_token_BL.sum(1) / text_mask[:, 1:].sum(1)

    def _check(self, world_ids: Tensor) -> None:
        """Of the whole batch, so that all processes stop and none waits for the others."""
        if len(world_ids) < 2:
            raise OpticNerveError(
                "a batch of 1 pair has no negatives; batch_size / accumulate must be 2 or more", kind="out-of-range"
            )
        largest, last = int(on_host(world_ids).max()), self.connector.decoder_token_id
        if largest >= last:
            raise OpticNerveError(
                f"a caption holds token {largest}, but the word table's last row, {last}, is [DEC]'s: vocab_size must "
                f"be the tokenizer's size and one more",
                kind="out-of-range",
            )


def similarity(queries_BQE: Tensor, words_ME: Tensor) -> Tensor:
    """(B, M): the cosine of each caption and the query of each picture that is nearest to it."""
    return torch.einsum("bqe,me->bqm", queries_BQE, words_ME).amax(1)


def contrastive_loss(logits_BM: Tensor, own_B: Tensor, twin_BM: Tensor, label_smoothing: float) -> Tensor:
    """(B,): cross-entropy of each row with its own column; columns of `twin_BM`, false negatives, leave the softmax."""
    log_p_BM = logits_BM.masked_fill(twin_BM, -torch.inf).log_softmax(1)
    own = -log_p_BM.gather(1, own_B[:, None]).squeeze(1)
    spread = -log_p_BM.masked_fill(twin_BM, 0.0).sum(1) / (~twin_BM).sum(1)
    return (1 - label_smoothing) * own + label_smoothing * spread


def draw(logits_BM: Tensor, allowed_BM: Tensor, chance_B: Tensor) -> Tensor:
    """(B,): a column of each row, likelier the greater its softmax among those allowed, by inverting the cumulative
    distribution at `chance_B` in [0, 1). Rows that allow none get some column."""
    weight_BM = logits_BM.double().masked_fill(~allowed_BM, -torch.inf).softmax(1).nan_to_num(0.0)
    cumulative_BM = weight_BM.cumsum(1)
    reached_B = chance_B * cumulative_BM[:, -1]
    # "<=" steps over columns of no weight, the first ones included.
    return (cumulative_BM <= reached_B[:, None]).sum(1).clamp(max=logits_BM.shape[1] - 1)


def _twins(image_keys_M: Tensor, text_ids_ML: Tensor) -> Tensor:
    """(M, M) bool: pairs with the same picture or the same words, each with itself included."""
    same_image = image_keys_M[:, None] == image_keys_M[None]
    same_text = (text_ids_ML[:, None] == text_ids_ML[None]).all(-1)
    return same_image | same_text
