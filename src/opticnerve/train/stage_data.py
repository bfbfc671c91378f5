"""From a stage's data entries to its visits: indexed, or streamed; bad samples told before the first step."""

from __future__ import annotations

from typing import Any

from opticnerve.data.dataset.bad_samples import Tally
from opticnerve.data.dataset.dataset import NO_MEDIA
from opticnerve.data.dataset.load import load_streams, load_units
from opticnerve.recipe import Stage
from opticnerve.train.precheck import samples_to_check, usable_units
from opticnerve.train.sampler import Collate, Visits
from opticnerve.train.streaming_sampler import StreamedVisits

_LOOKED_AT = 32  # rows of a stream


def visits_of(
    stage: Stage, processor: Any, *, seed: int, rank: int, world: int, template: str | None,
    collate: Collate | None, skipped: Tally, console: Any = None,
) -> Visits:  # fmt: skip
    """The visits of a stage, the first samples of its data looked at.

    Args:
        console: gets a warning where no sample has a picture or a sound.
        skipped: is told bad samples, where the stage's `bad_samples` does not refuse them.

    Raises:
        DataError: a sample is bad and the stage refuses it, or data cannot be read at all.
    """
    on_error = skipped if stage.bad_samples != "refuse" else None
    shares: dict[str, Any] = {
        "seed": seed, "rank": rank, "world": world, "template": template, "collate": collate, "on_error": on_error,
    }  # fmt: skip
    if stage.data[0].streaming:
        visits = StreamedVisits(load_streams(stage, seed=seed), stage, processor, **shares)
        if stage.data[0].limit is not None and len(stage.data) == 1:
            skipped.of(stage.data[0].limit)
        visits.check(samples_to_check(stage))
        _warn_if_blind(stage, any(c.pieces for v in range(_LOOKED_AT) for c in visits.drawn(v)), console)
        return visits
    loaded = load_units(stage.data, on_error=on_error)
    _warn_if_blind(stage, loaded.with_media() > 0, console)
    skipped.of(loaded.samples() + len(skipped))
    units = usable_units(
        loaded, processor, stage, template=template, on_error=on_error, collate=collate, check=samples_to_check(stage)
    )
    return Visits(units, stage, processor, **shares)


def _warn_if_blind(stage: Stage, has_media: bool, console: Any) -> None:
    if console is not None and not has_media:
        console.print(f"[bold red]warning:[/] stage {stage.name}: {NO_MEDIA}", soft_wrap=True, highlight=False)
