"""What a reader of the card, and whoever watches the run, must not overlook."""

from __future__ import annotations

import math
from typing import Any

from opticnerve.common.markdown import percent, plain, points
from opticnerve.evaluation.metrics import wilson_interval
from opticnerve.runs.folder import RunFolder

LOOKS_AWAY = 0.05
"""A smaller difference in accuracy between the real and a blank picture gets the loud warning, however sure it is."""


def boxes(run: RunFolder) -> str:
    """The warnings as blocks that Markdown shows in colour, for the top of the card."""
    found = [f"> [!WARNING]\n> **{title}.** {text}" for title, text in warnings_of(run.results)]
    if unfinished := [s.name for s in run.stages if not s.finished]:
        found.append(
            f"> [!IMPORTANT]\n> No record says that these stages were finished: {plain(', '.join(unfinished))}. "
            "The numbers below are those of a run under way or interrupted."
        )
    return "\n\n".join(found)


def warnings_of(results: dict[str, Any]) -> list[tuple[str, str]]:
    """(title, text) of what is wrong with a run, from its results.json."""
    found = [_answers(results["image_dependence"])] if results.get("image_dependence") else []
    for stage in results.get("stages") or []:
        if use := stage.get("image_use"):
            found.append(_loss(str(stage.get("name")), use))
        if validation := stage.get("validation"):
            found.append(_rising(str(stage.get("name")), validation))
        if left_out := stage.get("left_out"):
            found.append(_left_out(str(stage.get("name")), left_out))
    return [warning for warning in found if warning is not None]


def gap_interval(dependence: dict[str, Any]) -> tuple[float, float]:
    """95 % interval of the accuracy with the real picture less that with a blank one.

    From the two Wilson intervals (Newcombe 1998, Interval Estimation for the Difference Between Independent
    Proportions, method 10). The questions are the same in both, so it is wider than it need be.
    """
    n, real, blank = int(dependence["n"]), float(dependence["real"]), float(dependence["blank"])
    (low_r, high_r), (low_b, high_b) = (wilson_interval(p * n, n) for p in (real, blank))
    gap = real - blank
    return gap - math.hypot(real - low_r, high_b - blank), gap + math.hypot(high_r - real, blank - low_b)


def _answers(dependence: dict[str, Any]) -> tuple[str, str] | None:
    gap = dependence["real"] - dependence["blank"]
    low, high = gap_interval(dependence)
    measured = (
        f"With a blank picture the model is right {percent(dependence['blank'])} of the time, with the real one "
        f"{percent(dependence['real'])} ({points(gap)})"
    )
    if gap < LOOKS_AWAY:
        words = "Whatever the accuracy below says, it comes from the questions' words."
        return "THE ANSWERS DO NOT DEPEND ON THE PICTURE", f"{measured}. {words}"
    if low > 0:
        return None
    return (
        "IT CANNOT BE TOLD WHETHER THE ANSWERS DEPEND ON THE PICTURE",
        f"{measured}; on {dependence['n']} questions the difference may as well be anything from {points(low)} to "
        f"{points(high)}. Ask more of them: `image_dependence` of `evaluate`.",
    )


def _loss(stage: str, use: dict[str, Any]) -> tuple[str, str] | None:
    low, high = use["ci95"]
    if low > 0:
        return None
    return (
        "THE LOSS DOES NOT DEPEND ON THE PICTURE",
        f"After stage {plain(stage)} the loss on {use['n']} of its own samples is {use['own']:.3f} with their "
        f"pictures and {use['other']:.3f} with one another's: {use['other_minus_own']:+.3f} nats a token, 95 % "
        f"interval {low:+.3f} to {high:+.3f}. Either the stage was too short, or the pictures do not reach the "
        f"language model, or its texts can be guessed without them.",
    )


def _rising(stage: str, validation: dict[str, Any]) -> tuple[str, str] | None:
    """Two looks or more since the lowest held-out loss, and the last one above it: no chance of a single look."""
    curve = [look for look in validation["curve"] if look.get("loss") is not None]
    if not curve:
        return None
    best = min(curve, key=lambda look: look["loss"])
    later = [look for look in curve if look["step"] > best["step"]]
    if len(later) < 2 or later[-1]["loss"] <= best["loss"]:
        return None
    kept = validation["best_step"] if validation["keep"] == "best" else None
    remedy = (
        f"The stage left the weights of step {kept} (`keep: best`)." if kept is not None
        else "Train shorter, on more data, or at a lower rate; or write `keep: best`, and `patience`."
    )  # fmt: skip
    return (
        "THE HELD-OUT LOSS ROSE",
        f"In stage {plain(stage)} it was lowest at step {best['step']} with {best['loss']:.3f}, and is "
        f"{later[-1]['loss']:.3f} at step {later[-1]['step']}, {len(later)} looks later. {remedy}",
    )


def _left_out(stage: str, steps: list[int]) -> tuple[str, str]:
    shown = ", ".join(map(str, steps[:12])) + (" …" if len(steps) > 12 else "")
    return (
        f"{len(steps)} STEP{'S WERE' if len(steps) > 1 else ' WAS'} LEFT OUT",
        f"Loss or gradient was no number in stage {plain(stage)}, step {shown}: these moved no weight "
        f"(`on_divergence: skip`). Their samples are in `diverged.jsonl` in the stage's folder.",
    )
