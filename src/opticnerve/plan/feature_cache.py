"""Whether a stage gains by seeing each picture once: the vision encoder's arithmetic that it saves against the disk it
takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from opticnerve.common.units import format_bytes, format_duration
from opticnerve.features.budget import default_budget, features_dir, folder_bytes, free_bytes
from opticnerve.models.vlm.tower import Tower, placed_like
from opticnerve.plan.cost import blank_features
from opticnerve.plan.data import StageData
from opticnerve.recipe import Stage

if TYPE_CHECKING:
    from opticnerve.models.family import FamilyModel

# Bytes a second to and from disk: that of a plain solid-state disk, and less than what its cache in memory gives.
_DISK = 500_000_000
_WORTH = 0.05  # of a stage's time: below it a folder full of features is not worth having


@dataclass(frozen=True)
class CachePlan:
    """What `cache_features` would do for a stage.

    `views`, `pictures`: how often a picture is seen in the stage, and how many different ones. `vision_encoder`: the
    image encoder's share of the stage's arithmetic. `saved`: the share of the stage's time that is saved, writing and
    reading paid for (negative: lost), and `seconds` how much that is. `disk`, `budget`, `free`: bytes needed, allowed,
    and there. `halves`: bfloat16 would take half.
    """

    on: bool
    views: int
    pictures: int
    vision_encoder: float
    saved: float
    seconds: float | None
    disk: int
    budget: int
    free: int
    halves: bool

    @property
    def pays(self) -> bool:
        return self.saved >= _WORTH

    @property
    def fits(self) -> bool:
        return self.disk <= min(self.budget, self.free)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        found = {**vars(self), "pays": self.pays, "fits": self.fits}
        return {{"views": "visits", "vision_encoder": "eye"}.get(k, k): v for k, v in found.items()}

    def remark(self) -> tuple[bool, str]:
        """Whether it wants a decision, and what to say."""
        time = f" ({format_duration(self.seconds)})" if self.seconds else ""
        wins = f"about {self.saved:.0%} of this stage's time{time}"
        costs = f"{format_bytes(self.disk)} of disk"
        if not self.fits:
            allowed = f"{format_bytes(self.budget)} are allowed, {format_bytes(self.free)} free"
            remedy = "raise cache_features.budget"
            if self.halves:
                remedy += f", store bfloat16 (cache_features: {{dtype: bfloat16}}, {format_bytes(self.disk // 2)})"
            if self.on:
                return True, f"cache_features needs {costs}; {allowed}: {remedy}, or leave it out"
            if self.pays:
                return False, f"cache_features would save {wins}, but needs {costs}; {allowed}: {remedy}"
        if self.pays:
            return False, f"cache_features {'saves' if self.on else 'would save'} {wins} for {costs}"
        why = f"the image encoder is {self.vision_encoder:.0%} of its arithmetic"
        if self.views < 1.1 * self.pictures:
            why += ", and hardly a picture is seen twice"
        else:
            why += f" ({self.views:,} views of {self.pictures:,} pictures, {costs})"
        return False, f"cache_features {'hardly pays' if self.on else 'does not pay'}: {why}"


def foresee(
    stage: Stage, model: FamilyModel, data: StageData, *, flops: int, seconds: float | None
) -> CachePlan | None:
    """What a cache does for a stage; None where there can be none, or where the stage's data are not known.

    Args:
        model: of `meta_model`. flops: a step's arithmetic, the vision encoder's included. seconds: the stage's.
    """
    tower = model.towers.get("image")
    trains = any(p.removeprefix("image.").startswith("encoder") for p in stage.train)
    if tower is None or tower.tiling is not None or trains or not (data.rows and data.steps and flops):
        return None
    if next(tower.encoder.parameters(), None) is None:
        return None  # patches: a vision encoder that computes nothing has nothing to keep
    views = round(data.steps * stage.batch_size * data.media("image"))
    # Where a stage is shorter than its data, only what it sees is cached.
    pictures = min(data.pictures, views)
    if not pictures:
        return None
    encoder_flops, shape, dtype = _look_once(tower)
    spec = stage.cache_features
    stored = torch.bfloat16 if getattr(spec, "dtype", None) == "bfloat16" else dtype
    each = shape[0] * (shape[1] * stored.itemsize + 1)
    vision_encoder = min(1.0, encoder_flops * views / (flops * data.steps))
    saved = vision_encoder * (1 - pictures / views)
    if seconds:
        saved -= (views + pictures) * each / _DISK / seconds
    root = features_dir()
    free = free_bytes(root) + folder_bytes(root)  # other vision encoders' features go first
    budget = getattr(spec, "budget", None) or default_budget(root)
    return CachePlan(
        on=bool(spec),
        views=views,
        pictures=pictures,
        vision_encoder=vision_encoder,
        saved=saved,
        seconds=saved * seconds if seconds else None,
        disk=pictures * each,
        budget=int(budget),
        free=free,
        halves=stored.itemsize > 2,
    )


def _look_once(tower: Tower) -> tuple[int, tuple[int, int], torch.dtype]:
    """Arithmetic of the vision encoder on one picture, the shape (N, D) of what it sees, and its dtype."""
    dtype = placed_like(tower.encoder).dtype
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        features = blank_features(tower, 1, dtype)
    _, count, width = features.tokens_BND.shape
    return counter.get_total_flops(), (count, width), features.tokens_BND.dtype
