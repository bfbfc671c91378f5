"""The parts of a `FusionClassifier`: the three timings of fusion as heads over a vision encoder and a text encoder, and
what remembers texts.

Early: the raw inputs become one long vector, and one network reads it. Intermediate: each encoder's tokens look at the
other's in a transformer with cross-modal attention (Lu et al. 2019, ViLBERT, section 2.2: co-attention; Tan & Bansal
2019, LXMERT, section 2.2). Late: one predictor for each modality, and a rule that makes one answer of two (`combine`).
The taxonomy is that of Baltrušaitis et al. 2019, Multimodal Machine Learning, section 6.

Each head: (what is seen, what is read) → `Scores`.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opticnerve.common.private_names import times_written
from opticnerve.encoders.base import Encoder
from opticnerve.encoders.text import HFTextEncoder
from opticnerve.types import Features, OpticNerveError

Combination = Literal["mean", "vote", "product", "learned"]
COMBINATIONS = (*get_args(Combination), "image", "text")
LEAST = 1e-9  # a predictor that is sure must not silence all others in a product


@dataclass
class Read:
    """A question as the text encoder gives it: its tokens' states and one vector (B, D) for all of it."""

    states: Features
    vector_BD: Tensor


@dataclass
class Scores:
    """`logits_BA`: of the answers. `parts`: further logits that are trained on the same answers (late fusion's)."""

    logits_BA: Tensor
    parts: list[Tensor] = field(default_factory=list)

    def losses(self, targets_B: Tensor) -> Tensor:
        """Cross-entropy of each question (B,), summed over the parts, where there are some."""
        trained = self.parts or [self.logits_BA]
        return torch.stack([F.cross_entropy(x.float(), targets_B, reduction="none") for x in trained]).sum(0)

    def loss(self, targets_B: Tensor) -> Tensor:
        """The same, summed over questions."""
        return self.losses(targets_B).sum()


class EarlyHead(nn.Module):
    """Pixels and the question's vector, end to end in one vector, through a perceptron.

    Args:
        pixels: side of the square that pictures are shrunk to. width, depth: of the perceptron. dropout: on its
            hidden layers.
    """

    def __init__(
        self, text_size: int, answers: int, *, pixels: int = 64, width: int = 512, depth: int = 2, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.pixels = pixels
        self.norm = nn.LayerNorm(text_size)
        self.network = perceptron(3 * pixels**2 + text_size, width, depth, answers, dropout)

    def forward(self, pixel_values: Tensor, read: Read) -> Scores:
        """`pixel_values` (B, 3, pixels, pixels)."""
        if pixel_values.shape[1:] != (3, self.pixels, self.pixels):
            raise OpticNerveError(
                f"early fusion reads 3 × {self.pixels} × {self.pixels} pixels; got {tuple(pixel_values.shape[1:])}",
                kind="wrong-shape",
            )
        return Scores(self.network(torch.cat([pixel_values.flatten(1), self.norm(read.vector_BD)], dim=1)))


class IntermediateHead(nn.Module):
    """Two streams of `depth` layers: words attend to words and to places, places to places and to words.

    Args:
        eye_size, eye_tokens: of the vision encoder's features. text_size: of the text encoder's. width, heads, depth:
            of the layers. dropout: in them.
    """

    def __init__(
        self, vision_size: int, vision_tokens: int, text_size: int, answers: int, *, width: int = 256, heads: int = 4,
        depth: int = 2, dropout: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        if width % heads:
            raise OpticNerveError(
                f"a width of {width} cannot be shared by {heads} heads; make it a multiple", kind="wrong-shape"
            )
        self.see = nn.Sequential(nn.LayerNorm(vision_size), nn.Linear(vision_size, width))
        self.read = nn.Sequential(nn.LayerNorm(text_size), nn.Linear(text_size, width))
        self.places_ND = nn.Parameter(torch.randn(vision_tokens, width) * 0.02)

        def layers() -> nn.ModuleList:
            # A decoder layer is self-attention, attention to the other modality, and a feed-forward network.
            options = {"dim_feedforward": 4 * width, "dropout": dropout, "activation": "gelu", "norm_first": True}
            return nn.ModuleList(
                nn.TransformerDecoderLayer(width, heads, batch_first=True, **options)  # type: ignore[arg-type]
                for _ in range(depth)
            )

        self.words, self.sights = layers(), layers()
        self.answer = nn.Sequential(nn.LayerNorm(2 * width), perceptron(2 * width, width, 1, answers, dropout))

    def forward(self, seen: Features, read: Read) -> Scores:
        sight_BND = self.see(seen.tokens_BND) + self.places_ND
        word_BLD = self.read(read.states.tokens_BND)
        no_sight_BN, no_word_BL = ~seen.mask_BN, ~read.states.mask_BN
        for words, sights in zip(self.words, self.sights, strict=True):
            # Both look at what the other was before this layer.
            masks = {"tgt_key_padding_mask": no_word_BL, "memory_key_padding_mask": no_sight_BN}
            next_word_BLD = words(word_BLD, sight_BND, **masks)
            masks = {"tgt_key_padding_mask": no_sight_BN, "memory_key_padding_mask": no_word_BL}
            sight_BND = sights(sight_BND, word_BLD, **masks)
            word_BLD = next_word_BLD
        pooled = [mean_of(Features(word_BLD, read.states.mask_BN)), mean_of(Features(sight_BND, seen.mask_BN))]
        return Scores(self.answer(torch.cat(pooled, dim=1)))


class LateHead(nn.Module):
    """A predictor that only sees and one that only reads; each learns the answers for itself.

    Args:
        combine: "mean", "vote", "product", "learned" (see `combine`), or "image" or "text": one alone.
            May be set anew at any time: all of it is trained in one go.
    """

    def __init__(
        self, vision_size: int, text_size: int, answers: int, *, combine: str = "mean", width: int = 256,
        depth: int = 2,
        dropout: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        if combine not in COMBINATIONS:
            raise OpticNerveError(f"combine is one of {', '.join(COMBINATIONS)}, not {combine!r}", kind="unknown-name")
        self.combine = combine
        self.see = nn.Sequential(nn.LayerNorm(vision_size), nn.Linear(vision_size, width), nn.GELU())
        self.image = perceptron(2 * width, width, depth - 1, answers, dropout)
        self.text = nn.Sequential(nn.LayerNorm(text_size), perceptron(text_size, width, depth, answers, dropout))
        self.weights_2 = nn.Parameter(torch.full((2,), 0.5413))  # softplus of it is 1: a plain product at the start

    def forward(self, seen: Features, read: Read) -> Scores:
        sight_BND = self.see(seen.tokens_BND)
        most_BD = sight_BND.masked_fill(~seen.mask_BN[:, :, None], float("-inf")).amax(1)
        image_BA = self.image(torch.cat([mean_of(Features(sight_BND, seen.mask_BN)), most_BD], dim=1))
        text_BA = self.text(read.vector_BD)
        chances_2BA = torch.stack([image_BA, text_BA]).float().softmax(2)
        weights_2 = F.softplus(self.weights_2.float())
        learned_BA = combine(chances_2BA.detach(), "learned", weights_2).clamp_min(LEAST).log()
        if self.combine in ("image", "text"):
            logits_BA = image_BA if self.combine == "image" else text_BA
        elif self.combine == "learned":
            logits_BA = learned_BA
        else:
            logits_BA = combine(chances_2BA, self.combine).clamp_min(LEAST).log()  # type: ignore[arg-type]
        return Scores(logits_BA, [image_BA, text_BA, learned_BA])


def perceptron(in_size: int, width: int, depth: int, out_size: int, dropout: float) -> nn.Sequential:
    """`depth` hidden layers of `width`."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(in_size, width), nn.GELU(), nn.Dropout(dropout)]
        in_size = width
    return nn.Sequential(*layers, nn.Linear(in_size, out_size))


def mean_of(features: Features) -> Tensor:
    """The mean of the real tokens, (B, D)."""
    weight_BN1 = features.mask_BN[:, :, None].to(features.tokens_BND.dtype)
    return (features.tokens_BND * weight_BN1).sum(1) / weight_BN1.sum(1)


def make_head(
    timing: str, vision_encoder: Encoder | None, reader: HFTextEncoder, answers: int, options: dict[str, Any]
) -> nn.Module:
    """The head of a timing over a vision encoder (None for early) and a text encoder.

    Raises:
        OpticNerveError: an option that the head does not know, or a number that makes no network.
    """
    for name in ("width", "depth", "heads", "pixels"):
        if name in options and not (isinstance(options[name], int) and options[name] > 0):
            raise OpticNerveError(
                f"{timing} fusion: {name} is a whole number from 1; got {options[name]!r}", kind="out-of-range"
            )
    try:
        if vision_encoder is None:
            return EarlyHead(reader.hidden_size, answers, **options)
        width, tokens = vision_encoder.hidden_size, vision_encoder.num_tokens
        if timing == "late":
            return LateHead(width, reader.hidden_size, answers, **options)
        return IntermediateHead(width, tokens, reader.state_size, answers, **options)
    except TypeError as e:
        raise OpticNerveError(f"{timing} fusion: {e}", kind="unknown-key") from e


def combine(probabilities_MBC: Tensor, how: Combination, weights_M: Tensor | None = None) -> Tensor:
    """M predictors' probabilities of C choices for B questions → one row of probabilities for each, (B, C).

    - mean: their average.
    - vote: each predictor votes for its likeliest choice (of equal ones the first). The row is (votes + mean) /
      (M + 1): the mean breaks ties and never outweighs a vote.
    - product: what they say as if independent; the geometric mean, normalised.
    - learned: a product with weights, p ∝ Π p_m^(w_m), w ≥ 0.

    Raises:
        OpticNerveError: an unknown rule, or weights that do not fit.
    """
    if how not in get_args(Combination):
        raise OpticNerveError(f"combine is one of {', '.join(get_args(Combination))}, not {how!r}", kind="unknown-name")
    count = len(probabilities_MBC)
    if how == "mean":
        return probabilities_MBC.mean(0)
    if how == "vote":
        votes_BC = F.one_hot(probabilities_MBC.argmax(2), probabilities_MBC.shape[2]).sum(0)
        return (votes_BC + probabilities_MBC.mean(0)) / (count + 1)
    if how == "product":
        weights_M = probabilities_MBC.new_full((count,), 1 / count)
    elif weights_M is None:
        raise OpticNerveError(
            "combine: learned needs weights; fit them on held-out questions, or give them", kind="missing-field"
        )
    logs_MBC = probabilities_MBC.clamp_min(LEAST).log()
    return (weights_M[:, None, None] * logs_MBC).sum(0).softmax(1)


MOST = 4096
"""Texts that are remembered; the one not seen for longest goes first."""


class TextMemory:
    """Reads through a text encoder; on a CPU, while that stays as it is, each text only once.

    Each is read alone then: beside other texts its numbers would differ in their last bits, and so a run that goes on,
    or is looked at in between, would not be the run that reads them with others. (An accelerator reads a batch at
    once, each time anew: one text at a time would keep it waiting.)

    Nothing is remembered while the encoder trains or its dropout is at work, nor across a change of its weights, their
    precision, or their device. Not a module: what it remembers is no state of the model.
    """

    def __init__(self, encoder: HFTextEncoder) -> None:
        self.encoder = encoder
        self._known: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()
        self._weights: list[tuple[int, int]] = []

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Read:
        """Token ids and mask (B, L) → `Read`, padded on the right."""
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.encoder.parameters())
        if learns or input_ids.device.type != "cpu" or any(m.training for m in self.encoder.modules()):
            self._known.clear()
            return Read(*self.encoder.states_and_vector(input_ids, attention_mask))
        weights = [_mark(p) for p in self.encoder.parameters()]
        if weights != self._weights:
            self._known.clear()
            self._weights = weights
        real_BL = attention_mask.bool()
        texts = [ids[mask] for ids, mask in zip(input_ids, real_BL, strict=True)]
        keys = [text.numpy().tobytes() for text in texts]
        for key, row in {k: i for i, k in enumerate(keys) if k not in self._known}.items():
            text, length = texts[row], len(texts[row])
            given = text[None], torch.ones_like(text)[None]
            if self.encoder.padding == "max_length":  # SigLIP's attends to it
                given = input_ids[row : row + 1], attention_mask[row : row + 1]
            with torch.no_grad():
                states, vector_1D = self.encoder.states_and_vector(*given)
            # Copies: a view would keep the padding in memory.
            self._known[key] = states.tokens_BND[0, :length].clone(), vector_1D[0].clone()
        found = [self._known[k] for k in keys]
        for key in keys:
            self._known.move_to_end(key)
        while len(self._known) > max(MOST, len(keys)):
            self._known.popitem(last=False)
        states_BLD = torch.nn.utils.rnn.pad_sequence([s for s, _ in found], batch_first=True)
        real_BL = torch.arange(states_BLD.shape[1]) < torch.tensor([[len(s)] for s, _ in found])
        return Read(Features(states_BLD, real_BL), torch.stack([v for _, v in found]))


def _mark(weight: Tensor) -> tuple[int, int]:
    """Where a weight lies, and how often it has been written to there."""
    return weight.data_ptr(), times_written(weight)
