"""What our model says to the samples, what an engine says in a process of its own, and how far apart they may be."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from opticnerve.common import atomic
from opticnerve.export.samples import ExportSample
from opticnerve.export.samples import make as make_samples
from opticnerve.inference.generate import Answerer
from opticnerve.models.vlm.placeholders import sayable
from opticnerve.types import OpticNerveError

if TYPE_CHECKING:
    from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
    from opticnerve.models.vlm.processing import OpticNerveProcessor

CHECKS = Path(__file__).parent / "checks"
SECONDS = 3600.0
# Positions from the end of a prompt whose logits are kept: each of them depends on everything before it.
LAST = 32
GREEDY = 12
# Both sides compute in float32 on the same weights: only the order of sums may differ. (Of the largest logit.)
TOLERANCE = 1e-4
# Words that neither side gives one chance in a hundred are left out where an engine rounds: their logarithms are noise.
LIKELY = math.log(0.01)
# What an adapter added into weights of few digits, or a calibration folded into them, may move. (Of the largest logit.)
ROUNDING = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Reference:
    """What our model makes of one sample: prompt, ids (L,), pixels, the last logits (K, V), greedy tokens (T,)."""

    text: str
    ids: list[int]
    pixels: Tensor | None
    logits_KV: Tensor
    greedy: list[int]


@torch.no_grad()
def record(model: Any, processor: OpticNerveProcessor, samples: Sequence[ExportSample]) -> list[Reference]:
    """Our model, in float32 on the CPU, on every sample."""
    dtype = model.language_model.dtype
    cast(model.to("cpu").eval(), torch.float32)
    answerer, found = Answerer(model, processor), []
    for sample in samples:
        inputs = answerer.inputs([sample.conversation])
        logits_KV = model(**inputs, logits_to_keep=LAST).logits[0]
        said = model.generate(**inputs, max_new_tokens=GREEDY, do_sample=False, **answerer.stops())
        ids = inputs["input_ids"][0].tolist()
        pixels = inputs.get("pixel_values")
        greedy = said[0, len(ids) :].tolist()
        found.append(Reference(answerer.render(sample.conversation), ids, pixels, logits_KV, greedy))
    cast(model, dtype)
    return found


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Weights to `dtype`, in place. Tables that no checkpoint holds (rotary frequencies) keep all their digits."""
    kept = model.state_dict().keys()
    for parameter in model.parameters():
        if parameter.is_floating_point():  # quantised weights are dequantised into what they are multiplied with
            parameter.data = parameter.data.to(dtype)
    for name, buffer in model.named_buffers():
        if name in kept and buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)


def distance(found_KV: Tensor, wanted_KV: Tensor) -> float:
    """The largest difference of two logits, in units of the largest logit, placeholders left out. NaN counts as
    infinitely far."""
    words = sayable(wanted_KV)
    found_KV, wanted_KV = found_KV[..., words], wanted_KV[..., words]
    difference = (found_KV - wanted_KV).abs().max() / wanted_KV.abs().max().clamp_min(1e-6)
    return float(difference.nan_to_num(nan=math.inf))


def check_rounding(before: Sequence[Reference], after: Sequence[Reference], dtype: torch.dtype) -> float:
    """How far merging and folding moved the logits; an error where it is further than the digits of `dtype` explain."""
    moved = max(distance(a.logits_KV, b.logits_KV) for a, b in zip(after, before, strict=True))
    if not moved <= ROUNDING[dtype]:
        raise OpticNerveError(
            f"adding the adapter and the calibration into weights of {dtype} moves the logits by {moved:.3g} of the "
            f"largest one ({ROUNDING[dtype]:g} is allowed): export with --dtype float32",
            kind="mismatch",
        )
    return moved


# -- the engine -------------------------------------------------------------------------------------------------------


def run(check: str, job: dict[str, Any], scratch: Path, *, python: str | Path = sys.executable) -> dict[str, Any]:
    """Run `checks/CHECK.py JOB ANSWER` and read its answer; whatever it says on stderr is shown if it fails.

    Args:
        job: plain JSON. scratch: a folder for job and answer. python: the interpreter that has the engine.

    Returns: the check's JSON; arrays that it left in `arrays.npz` beside it are under "arrays".
    """
    asked, answer = scratch / "job.json", scratch / "answer.json"
    atomic.write_json(asked, job)
    answer.unlink(missing_ok=True)
    # -P: the folder of the checks is not searched for modules. Threads as many as here, so that sums agree.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    command = [str(python), "-P", str(CHECKS / f"{check}.py"), str(asked), str(answer)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS, check=False)
    except OSError as e:
        raise OpticNerveError(
            f"{python} does not run: {e}; --check-python names an interpreter", kind="missing-file"
        ) from e
    except subprocess.TimeoutExpired as e:
        raise OpticNerveError(
            f"the check {check} has not ended after {SECONDS:.0f} s; nothing was exported", kind="refused"
        ) from e
    if done.returncode or not answer.is_file():
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise OpticNerveError(
            f"the exported model does not run in its engine (exit code {done.returncode}); nothing was exported:\n"
            + "\n".join(lines[-12:]),
            kind="refused",
        )
    return read(scratch)


def read(scratch: Path) -> dict[str, Any]:
    """What a check has left in `scratch`."""
    said: dict[str, Any] = json.loads((scratch / "answer.json").read_text(encoding="utf-8"))
    arrays = scratch / "arrays.npz"
    if arrays.is_file():
        with np.load(arrays) as kept:
            said["arrays"] = {name: torch.from_numpy(kept[name]) for name in kept.files}
    return said


def tell(model: Any, processor: OpticNerveProcessor, job: dict[str, Any], answer: Path, engine: str) -> None:
    """The other side of `read`: what a docked model says to the samples of a job (`pictures`, `picture_sizes`)."""
    chosen = make_samples(
        Path(job["pictures"]), picture_sizes=[tuple(s) for s in job["picture_sizes"]],
        sees="image" in model.towers, hears="audio" in model.towers,
    )  # fmt: skip
    arrays: dict[str, Any] = {}
    said: dict[str, Any] = {"engine": engine, "torch": torch.__version__, "samples": []}
    for number, found in enumerate(record(model, processor, chosen)):
        arrays[f"logits_{number}"] = found.logits_KV.numpy()
        if found.pixels is not None:
            arrays[f"pixels_{number}"] = found.pixels.numpy()
        said["samples"].append({"text": found.text, "ids": found.ids, "greedy": found.greedy})
    np.savez(answer.parent / "arrays.npz", **arrays)
    atomic.write_json(answer, said)


def samples_of(said: dict[str, Any]) -> list[dict[str, Any]]:
    """A check's samples with their arrays: as `compare_logits` takes them."""
    arrays = said.get("arrays", {})
    return [
        {**sample, **{k: arrays.get(f"{k}_{i}") for k in ("pixels", "sizes")}, "logits_KV": arrays[f"logits_{i}"]}
        for i, sample in enumerate(said["samples"])
    ]


def check_loaded(said: dict[str, Any]) -> None:
    """Every tensor of the folder found its place, and every place its tensor; an error lists those that did not."""
    if problems := said.get("problems"):
        listing = "; ".join(f"{k.replace('_', ' ')}: {', '.join(v[:12])}" for k, v in problems.items())
        raise OpticNerveError(f"{said['engine']} does not find every tensor in its place: {listing}", kind="mismatch")


def compare_logits(wanted: Sequence[Reference], found: Sequence[dict[str, Any]], engine: str) -> float:
    """The largest distance of an engine's logits from ours, all samples considered. Another prompt, other tokens, other
    pixels, logits beyond `TOLERANCE` and other greedy tokens are errors.

    `found`, for each sample: `text`, `ids`, `logits_KV` (its vocabulary may be longer), `greedy`, perhaps `pixels`.
    """
    worst = 0.0
    for number, (ours, theirs) in enumerate(zip(wanted, found, strict=True), start=1):
        where = f"sample {number} in {engine}"
        if theirs["text"] != ours.text:
            raise OpticNerveError(
                f"{where}: the chat template writes {theirs['text']!r}, not {ours.text!r}", kind="mismatch"
            )
        if theirs["ids"] != ours.ids:
            raise OpticNerveError(
                f"{where}: the processor writes {len(theirs['ids'])} tokens for our {len(ours.ids)}, or others: "
                f"{theirs['ids'][-8:]} at the end, not {ours.ids[-8:]}",
                kind="mismatch",
            )
        if ours.pixels is not None and (pixels := theirs.get("pixels")) is not None:
            alike = pixels.shape == ours.pixels.shape
            moved = float((pixels - ours.pixels).abs().max()) if alike else math.inf
            if not moved < 1e-5:
                raise OpticNerveError(
                    f"{where}: pictures are prepared otherwise; pixels differ by up to {moved:.3g}", kind="mismatch"
                )
        far = distance(theirs["logits_KV"], ours.logits_KV)
        if not far <= TOLERANCE:
            raise OpticNerveError(
                f"{where}: logits differ by up to {far:.3g} of the largest one (in float32, {TOLERANCE:g} is allowed)",
                kind="mismatch",
            )
        worst = max(worst, far)
        if theirs["greedy"] != ours.greedy:
            raise OpticNerveError(
                f"{where}: the greedy answer is {theirs['greedy']}, ours {ours.greedy} (token ids)", kind="mismatch"
            )
    return worst


@torch.no_grad()
def compare_logprobs(
    model: OpticNerveForConditionalGeneration,
    processor: OpticNerveProcessor,
    samples: Sequence[ExportSample],
    wanted: Sequence[Reference],
    said: dict[str, Any],
    banned: Sequence[int],
    tolerance: float,
) -> float:
    """The largest difference between an engine's log-probabilities (nats) of likely next words (see `LIKELY`) and ours.

    Our model is shown the engine's own words, so that a near tie that falls the other way ends nothing. What the engine
    chose must be our choice, too, or as good as that within twice the tolerance. `banned`: what it was told not to say.
    """
    dtype = model.language_model.dtype
    cast(model, torch.float32)
    answerer, worst = Answerer(model, processor), 0.0
    for number, (sample, ours, theirs) in enumerate(zip(samples, wanted, said["samples"], strict=True), start=1):
        where = f"sample {number} in {said['engine']}"
        prompt = re.sub(r"<__media[^>]*>", str(processor.image_token), theirs["prompt"])
        if prompt != ours.text:
            raise OpticNerveError(f"{where}: the chat template writes {prompt!r}, not {ours.text!r}", kind="mismatch")
        if theirs["prompt_tokens"] != len(ours.ids):
            raise OpticNerveError(
                f"{where}: the prompt has {theirs['prompt_tokens']} tokens, ours {len(ours.ids)}", kind="mismatch"
            )
        if not theirs["greedy"]:
            raise OpticNerveError(f"{where}: no word came back, ours are {ours.greedy} (token ids)", kind="mismatch")
        inputs = answerer.inputs([sample.conversation])
        words = torch.tensor([theirs["greedy"]])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], words], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        logits_TV = model(**inputs, logits_to_keep=words.shape[1] + 1).logits[0, :-1]
        logprobs_TV = logits_TV.log_softmax(-1)
        for step, (row_V, top, word) in enumerate(zip(logprobs_TV, theirs["top"], theirs["greedy"], strict=True)):
            pairs = [(float(row_V[i]), logprob) for i, logprob in top]
            far = max((abs(a - b) for a, b in pairs if not max(a, b) < LIKELY), default=0.0)
            far = far if bool(row_V.isfinite().all()) else math.inf
            if not far <= tolerance:
                raise OpticNerveError(
                    f"{where}, word {step + 1}: log-probabilities differ by up to {far:.3g} ({tolerance:g} is allowed)",
                    kind="mismatch",
                )
            row_V[list(banned)] = -torch.inf
            if float(row_V.max() - row_V[word]) > 2 * tolerance:
                raise OpticNerveError(
                    f"{where}, word {step + 1}: it says {word}, we {int(row_V.argmax())} (token ids)", kind="mismatch"
                )
            worst = max(worst, far)
    cast(model, dtype)
    return worst
