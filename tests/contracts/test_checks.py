"""The checks themselves: a sound part passes, and each way of breaking a promise is found and named."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opticnerve.connectors.base import Connector
from opticnerve.encoders.base import Encoder, make_image_processor
from opticnerve.fusion.base import Splice, check_count
from opticnerve.fusion.gated_cross_attention import GatedCrossAttention
from opticnerve.testing import (
    ContractError,
    check_connector,
    check_encoder,
    check_fusion,
    connectors,
    contract,
    encoders,
    fusions,
)
from opticnerve.types import Features


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling is most of a check's time; where it is not the point, it is left out."""
    rules = tuple(r for r in contract.COMMON if r is not contract.compiles)
    for kind in (connectors, encoders):
        monkeypatch.setattr(kind, "COMMON", rules)
    monkeypatch.setattr(fusions, "compiles", fusions.is_a_fusion)


class Sound(Connector):
    """Two neighbours are averaged, then a matrix."""

    keeps_grid = False

    def __init__(
        self, *, in_size: int, out_size: int, in_tokens: int, bias: bool = True, calibrate: bool = True
    ) -> None:
        super().__init__(in_size=in_size, out_size=out_size, in_tokens=in_tokens, calibrate=calibrate)
        self.linear = nn.Linear(in_size, out_size, bias=bias)
        self.options |= {"bias": bias}

    @property
    def num_tokens(self) -> int:
        return self.in_tokens // 2

    def project(self, features: Features) -> Features:
        tokens_BND = features.tokens_BND.unflatten(1, (-1, 2)).mean(2)
        return Features(self.linear(tokens_BND), features.mask_BN.unflatten(1, (-1, 2)).all(2))


class MiscountsTokens(Sound):
    @property
    def num_tokens(self) -> int:
        return self.in_tokens


class FloatMask(Sound):
    def project(self, features: Features) -> Features:
        out = super().project(features)
        return Features(out.tokens_BND, out.mask_BN.float())


class KeepsADtypeInItsOptions(Sound):
    def __init__(self, **sizes: Any) -> None:
        sizes.pop("dtype", None)
        super().__init__(**sizes)
        self.options["dtype"] = torch.float32


class InventsAnOption(Sound):
    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.options["hidden"] = True  # a word that the constructor does not know


class ForgetsAnOption(Sound):
    def __init__(self, *, slope: float = 0.5, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.slope = slope

    def project(self, features: Features) -> Features:
        out = super().project(features)
        return Features(out.tokens_BND * self.slope, out.mask_BN)


class KeepsAWeightToItself(Sound):
    """Not a parameter: no file holds it, and no `.to` moves it."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.weight = torch.randn(self.out_size)

    def project(self, features: Features) -> Features:
        out = super().project(features)
        return Features(out.tokens_BND * self.weight.to(out.tokens_BND.dtype), out.mask_BN)


class IsNoisy(Sound):
    def project(self, features: Features) -> Features:
        out = super().project(features)
        return Features(out.tokens_BND + 1e-3 * torch.randn_like(out.tokens_BND), out.mask_BN)


class CountsItsCalls(Sound):
    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.register_buffer("calls", torch.zeros(()))

    def project(self, features: Features) -> Features:
        self.calls += 1
        return super().project(features)


class CentresTheBatch(Sound):
    def project(self, features: Features) -> Features:
        out = super().project(features)
        return Features(out.tokens_BND - out.tokens_BND.mean((0, 1)), out.mask_BN)


class FreezesItself(Sound):
    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.linear.requires_grad_(False)


class CutsTheGradient(Sound):
    def project(self, features: Features) -> Features:
        return super().project(Features(features.tokens_BND.detach(), features.mask_BN))


class HasAnIdleWeight(Sound):
    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.idle = nn.Parameter(torch.zeros(3))


class StaysInFloat32(Sound):
    def project(self, features: Features) -> Features:
        out = super().project(features)
        return Features(out.tokens_BND.float(), out.mask_BN)


class MakesItsMaskOnTheCPU(Sound):
    def project(self, features: Features) -> Features:
        out = super().project(features)
        return Features(out.tokens_BND, torch.ones(out.mask_BN.shape, dtype=torch.bool, device="cpu"))


class BranchesOnNumbers(Sound):
    def project(self, features: Features) -> Features:
        out = super().project(features)
        return Features(out.tokens_BND + 1, out.mask_BN) if float(out.tokens_BND.detach().mean()) > 1e9 else out


class TakesAnyWidth(Sound):
    def forward(self, features: Features, *text: Tensor) -> Features:
        return super().forward(Features(features.tokens_BND[..., : self.in_size], features.mask_BN))


class LooksAtMaskedTokens(Sound):
    def project(self, features: Features) -> Features:
        out = super().project(features)
        return Features(out.tokens_BND + features.tokens_BND.mean((1, 2), keepdim=True), out.mask_BN)


class CalibratesAlways(Sound):
    def calibrate(self, features: Features, embedding_std: float, *text: Tensor) -> None:
        self.calibrated.fill_(False)
        super().calibrate(features, embedding_std)


class PromisesAGrid(Sound):
    keeps_grid = True


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("broken", "rule", "says"),
    [
        (MiscountsTokens, "declared shapes", r"tokens of \(1, 8, 32\), declared are \(1, 16, 32\)"),
        (FloatMask, "declared shapes", "the mask is torch.float32, not bool"),
        (KeepsADtypeInItsOptions, "options are json", "options are no JSON"),
        (InventsAnOption, "saves and loads", "unexpected keyword argument 'hidden'"),
        (KeepsAWeightToItself, "saves and loads", "numbers differ by"),
        (KeepsAWeightToItself, "moves to another device", "FakeTensor"),
        (IsNoisy, "is deterministic", "two passes differ by"),
        (CountsItsCalls, "is deterministic", "a forward pass in eval.. changed calls"),
        (CentresTheBatch, "does not mix the batch", "piece 0 alone and in a batch of 3 differ"),
        (FreezesItself, "gradients flow", "frozen from the start: linear.weight"),
        (CutsTheGradient, "gradients flow", "no gradient reaches the input"),
        (HasAnIdleWeight, "gradients flow", "no gradient reaches idle"),
        (StaysInFloat32, "moves to bfloat16", "tokens come out as torch.float32"),
        (MakesItsMaskOnTheCPU, "moves to another device", "tokens and mask come on cpu and cuda"),
        (TakesAnyWidth, "refuses another width", "built for width 24, it took 25"),
        (LooksAtMaskedTokens, "ignores masked tokens", "other numbers in masked tokens change real ones"),
        (CalibratesAlways, "calibrates", "a second calibration changed the numbers"),
        (PromisesAGrid, "keeps the grid", "8 tokens make no square map"),
    ],
)
def test_a_broken_connector(broken: type[Connector], rule: str, says: str) -> None:
    with pytest.raises(
        ContractError, match=rf"{broken.__name__} breaks [\s\S]*- {rule}: .*{says}[\s\S]*The contract: "
    ):
        check_connector(broken)


def test_a_sound_connector_and_its_declared_exceptions() -> None:
    check_connector(Sound)
    check_connector(HasAnIdleWeight, unused=("idle",))
    check_connector(BranchesOnNumbers, fullgraph=False)
    with pytest.raises(ContractError, match="compiles: .*data-dependent"):
        check_connector(BranchesOnNumbers)


@pytest.mark.usefixtures("uncompiled")
def test_options_beside_the_defaults() -> None:
    check_connector(partial(Sound, bias=False))
    check_connector(ForgetsAnOption)  # at its default, what it forgets makes no difference
    with pytest.raises(ContractError, match="saves and loads: after saving and loading, numbers differ"):
        check_connector(partial(ForgetsAnOption, slope=2.0))


@pytest.mark.usefixtures("uncompiled")
def test_all_broken_promises_are_told_at_once() -> None:
    class Hopeless(StaysInFloat32, HasAnIdleWeight, PromisesAGrid):
        pass

    with pytest.raises(ContractError, match="Hopeless breaks 3 of its promises"):
        check_connector(Hopeless)


class Eye(Encoder):
    """Means of quarters of the picture, times a matrix."""

    needs_name = False

    def __init__(self, *, width: int = 6, image_size: int = 8) -> None:
        super().__init__()
        self.image_size, self.hidden_size, self.num_tokens = image_size, width, 4
        self.layers = nn.ModuleList([nn.Linear(3, width), nn.Linear(width, width)])
        self.options = {"width": width, "image_size": image_size}

    @classmethod
    def from_pretrained(cls, name: Any = None, **options: Any) -> Eye:
        return cls(**options)

    def forward(self, media: Tensor) -> Features:
        means_B3HW = nn.functional.adaptive_avg_pool2d(media, 2)
        tokens_BND = self.layers[1](self.layers[0](means_B3HW.flatten(2).mT).tanh())
        return Features(tokens_BND, torch.ones(tokens_BND.shape[:2], dtype=torch.bool, device=media.device))

    def image_processor(self) -> Any:
        return make_image_processor(size=self.image_size, mean=[0.5] * 3, std=[0.5] * 3)

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)


class PreparesAnotherSize(Eye):
    def image_processor(self) -> Any:
        return make_image_processor(size=self.image_size + 1, mean=[0.5] * 3, std=[0.5] * 3)


class HasNoProcessor(Eye):
    def image_processor(self) -> Any:
        return Encoder.image_processor(self)


class ListsABlockTwice(Eye):
    def blocks(self) -> list[nn.Module]:
        return [*self.layers, self.layers[0]]


class ListsStrangers(Eye):
    def blocks(self) -> list[nn.Module]:
        return [nn.Linear(2, 2)]


class ListsNothing(Eye):
    def blocks(self) -> list[nn.Module]:
        return []


class TakesNoName(Eye):
    needs_name = True

    @classmethod
    def take_name(cls, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return options.get("name"), options


class Smells(Eye):
    modality = "smell"  # type: ignore[assignment]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("broken", "rule", "says"),
    [
        (PreparesAnotherSize, "prepares its media", r"two pieces were made \(2, 3, 9, 9\)"),
        (HasNoProcessor, "prepares its media", "HasNoProcessor sees no pictures"),
        (ListsABlockTwice, "lists its blocks", "two blocks share a weight"),
        (ListsStrangers, "lists its blocks", "weights that are not the encoder's"),
        (ListsNothing, "lists its blocks", "4 weights and 0 blocks"),
        (TakesNoName, "names its weights", "options without a name are taken"),
        (Smells, "is an encoder", "modality is 'smell'"),
    ],
)
def test_a_broken_encoder(broken: type[Encoder], rule: str, says: str) -> None:
    check_encoder(Eye)
    with pytest.raises(ContractError, match=rf"{broken.__name__} breaks [\s\S]*- {rule}: .*{says}"):
        check_encoder(broken)


class ForgetsToCount(Splice):
    def embed(self, embeds_BLD: Tensor, placeholder_BL: Tensor, features: Features) -> Tensor:
        soft_MD = features.tokens_BND[features.mask_BN]
        missing = max(0, int(placeholder_BL.sum()) - len(soft_MD))
        soft_MD = torch.cat([soft_MD, soft_MD.new_zeros(missing, soft_MD.shape[1])])
        return embeds_BLD.masked_scatter(placeholder_BL.unsqueeze(-1), soft_MD)


class TouchesTheWords(Splice):
    def embed(self, embeds_BLD: Tensor, placeholder_BL: Tensor, features: Features) -> Tensor:
        return super().embed(embeds_BLD * 1.01, placeholder_BL, features)


class SplicesMaskedTokens(Splice):
    def embed(self, embeds_BLD: Tensor, placeholder_BL: Tensor, features: Features) -> Tensor:
        check_count(int(placeholder_BL.sum()), int(features.mask_BN.sum()))
        mean_1D = features.tokens_BND.flatten(0, 1).mean(0)
        return torch.where(placeholder_BL.unsqueeze(-1), mean_1D, embeds_BLD)


class ForgetsTheCache(GatedCrossAttention):
    def later(self, seen: Any, length: int) -> Any:
        return None


class LeaksBetweenRows(GatedCrossAttention):
    def see(self, placeholder_BL: Tensor, features: Features, group_BL: Tensor | None = None) -> Any:
        seen = super().see(placeholder_BL, features, group_BL)
        seen.media_BKD = seen.media_BKD.mean(0, keepdim=True).expand_as(seen.media_BKD)
        return seen


class ScalesTheWords(GatedCrossAttention):
    def wire(self, language_model: nn.Module) -> None:
        language_model.get_input_embeddings().register_forward_hook(lambda *a: a[2] * 1.01)  # type: ignore[operator]
        super().wire(language_model)


class IdlesLoudly(GatedCrossAttention):
    def dummy_pass(self, embeds_BLD: Tensor, features: Features) -> Tensor:
        return embeds_BLD + features.tokens_BND.sum()


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("broken", "rule", "says"),
    [
        (ForgetsToCount, "refuses a wrong count", "10 placeholders were taken where 9 are needed"),
        (TouchesTheWords, "embeds in the placeholders", "words beside the placeholders changed"),
        (SplicesMaskedTokens, "ignores masked tokens", "other numbers in masked tokens"),
        (SplicesMaskedTokens, "does not mix the batch", "row 0 alone and in a batch differ"),
        (ForgetsTheCache, "generates with a cache", "word 6, generated with a cache, differs"),
        (LeaksBetweenRows, "sees the picture", "the picture of a row changes other rows"),
        (ScalesTheWords, "leaves text alone", "text alone differs"),
        (IdlesLoudly, "passes a dummy", "dummy_pass changed the embeddings"),
    ],
)
def test_a_broken_fusion(broken: type[Any], rule: str, says: str) -> None:
    with pytest.raises(ContractError, match=rf"{broken.__name__} breaks [\s\S]*- {rule}: .*{says}"):
        check_fusion(broken)
