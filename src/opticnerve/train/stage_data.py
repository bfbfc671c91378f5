"""From a stage's data entries to its visits: indexed, or streamed; bad samples told before the first step."""

from __future__ import annotations

from typing import Any

from opticnerve.data.dataset.bad_samples import BadSampleCounter
from opticnerve.data.dataset.dataset import NO_MEDIA
from opticnerve.data.dataset.load import load_examples, load_streams
from opticnerve.recipe import Stage
from opticnerve.train.precheck import precheck, samples_to_check
from opticnerve.train.sampler import Collate, StageSampler
from opticnerve.train.streaming_sampler import StreamingSampler

_LOOKED_AT = 32  # rows of a stream


def make_sampler(
    stage: Stage, processor: Any, *, seed: int, rank: int, world: int, template: str | None,
    collate: Collate | None, skipped: BadSampleCounter, console: Any = None,
) -> StageSampler:  # fmt: skip
    """The samples of a stage, the first samples of its data looked at.

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
        sampler = StreamingSampler(load_streams(stage, seed=seed), stage, processor, **shares)
        if stage.data[0].limit is not None and len(stage.data) == 1:
            skipped.of(stage.data[0].limit)
        sampler.check(samples_to_check(stage))
        _warn_if_blind(stage, any(c.pieces for v in range(_LOOKED_AT) for c in sampler.drawn(v)), console)
        return sampler
    loaded = load_examples(stage.data, on_error=on_error)
    _warn_if_blind(stage, loaded.with_media() > 0, console)
    skipped.of(loaded.samples() + len(skipped))
    examples = precheck(
        loaded, processor, stage, template=template, on_error=on_error, collate=collate, check=samples_to_check(stage)
    )
    return StageSampler(examples, stage, processor, **shares)


def _warn_if_blind(stage: Stage, has_media: bool, console: Any) -> None:
    if console is not None and not has_media:
        console.print(f"[bold red]warning:[/] stage {stage.name}: {NO_MEDIA}", soft_wrap=True, highlight=False)
