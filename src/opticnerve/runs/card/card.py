"""The run card: one page on what was docked, how it learned, what it can do, and what it lost.

Laid out as a Hugging Face model card (YAML front matter, then Markdown), so that it can be uploaded beside the weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from opticnerve.common import atomic
from opticnerve.common.markdown import as_typed, duration, percent, plain, points, slug, table
from opticnerve.runs.card import two_towers
from opticnerve.runs.card.forgetting import forgetting
from opticnerve.runs.card.plots import image_dependence_plot, loss_plot, samples_plot
from opticnerve.runs.card.tasks import tasks
from opticnerve.runs.card.warnings import boxes
from opticnerve.runs.folder import RunFolder, StageRecord, finite, read_run


def write_card(run_dir: Path) -> Path:
    """Write `card.md` and `plots/*.png` from what the run folder holds, finished or not; returns the card's path.

    Raises:
        OpticNerveError: there is no such folder, or a record in it is broken.
    """
    run = read_run(run_dir)
    sections: list[Callable[[RunFolder], str]] = [
        _summary, boxes, _docked, _freeze, _curves, tasks, _image_dependence, forgetting, _samples, _cost,
        _reproduce, _use, _limits,
    ]  # fmt: skip
    if two_towers.of_two_towers(run):
        vqa = any("by_type" in t for t in run.results.get("tasks") or [])
        sections = [
            two_towers.summary, *([boxes] if vqa else []), two_towers.parts, _freeze, _curves,
            *([tasks, _image_dependence, _samples] if vqa else [two_towers.tasks]), _cost, _reproduce, two_towers.use,
            _limits,
        ]  # fmt: skip
    body = "\n\n".join(text.strip() for section in sections if (text := section(run)))
    card = run.path / "card.md"
    atomic.write(card, f"---\n{_front_matter(run)}---\n\n{body}\n")
    return card


def _front_matter(run: RunFolder) -> str:
    model = run.results.get("model") or {}
    named = [str(model[k]) for k in ("language", "text", "encoder") if model.get(k)]
    front: dict[str, Any] = {
        # Which licence applies follows from the docked parts; only the recipe's author can say.
        "license": model.get("license", "other"),
        "library_name": "opticnerve",
        "pipeline_tag": _pipeline(model),
        "tags": ["opticnerve", "vision-language-model", _pipeline(model), *named],
    }
    if bases := [n for n in named if re.fullmatch(r"[\w.-]+/[\w.-]+", n)]:
        front["base_model"] = bases
    if results := [_model_index(t) for t in run.results.get("tasks") or [] if t.get("accuracy") is not None]:
        front["model-index"] = [{"name": run.path.resolve().name, "results": results}]
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True)


def _pipeline(model: dict[str, Any]) -> str:
    kind = str(model.get("kind", ""))
    if kind.startswith("dual"):
        return "zero-shot-image-classification"
    return "visual-question-answering" if kind else "image-text-to-text"


def _model_index(task: dict[str, Any]) -> dict[str, Any]:
    return {
        "task": {"type": "visual-question-answering"},
        "dataset": {"name": task["name"], "type": slug(task["name"])},
        "metrics": [{"type": "accuracy", "name": task.get("harness", "accuracy"), "value": round(task["accuracy"], 4)}],
    }


def _summary(run: RunFolder) -> str:
    model = run.results.get("model") or {}
    vision_encoder, language_part = (model.get("encoder", "an encoder"), model.get("language", "a language model"))
    line = f"**{plain(vision_encoder)}** docked onto **{plain(language_part)}** by opticnerve"
    scored = [t for t in run.results.get("tasks") or [] if t.get("accuracy") is not None]
    line += f": {percent(scored[0]['accuracy'])} on {plain(scored[0]['name'])}." if scored else "; not evaluated yet."
    return f"# {plain(run.path.resolve().name)}\n\n{line}"


def _docked(run: RunFolder) -> str:
    model = run.results.get("model") or {}
    if not model:
        return "## What was docked\n\nNot recorded yet (`results.json` has no `model`)."
    # Shapes are shown as far as the run noted them.
    shape = {k: model.get(k, "?") for k in ("image_size", "encoder_tokens", "encoder_width", "visual_tokens", "width")}
    side = shape["image_size"]
    rows = [
        ("picture", f"3 × {side} × {side}"),
        (f"encoder    {model.get('encoder', '?')}", f"{shape['encoder_tokens']} × {shape['encoder_width']}"),
        (f"connector  {model.get('connector', '?')}", f"{shape['visual_tokens']} × {shape['width']}"),
        (f"fusion     {model.get('fusion', '?')}: {shape['visual_tokens']} visual tokens among the words", ""),
        (f"language   {model.get('language', '?')}", "text"),
    ]
    wide = max(len(name) for name, _ in rows)
    drawn = "\n    ↓\n".join(f"{name:<{wide}}  →  {out}" if out else name for name, out in rows)
    return f"## What was docked\n\n```text\n{drawn}\n```"


def _freeze(run: RunFolder) -> str:
    parts = ["## What trained"]
    if not run.stages:
        parts.append("No stage has begun.")
    for stage in run.stages:
        parts.append(f"### Stage `{stage.name}`{'' if stage.finished else ' (unfinished)'}")
        rows = stage.freeze.get("rows") or []
        if not rows:
            parts.append("No table of what trains was recorded.")
            continue
        parts.append(
            table(["part", "parameters", "", "learning rate", "dtype"], [_freeze_row(r) for r in rows], right=(1, 3))
        )
        trained, total = stage.freeze.get("trained"), stage.freeze.get("total")
        if trained is not None and total:
            parts.append(f"{trained:,} of {total:,} parameters trained ({trained / total:.2%}).")
    return "\n\n".join(parts)


def _freeze_row(row: dict[str, Any]) -> list[str]:
    trained = bool(row.get("trained"))
    rate = f"{row['learning_rate']:g}" if trained and row.get("learning_rate") is not None else "–"
    state = "**trained**" if trained else "frozen"
    return [f"`{row.get('part', '?')}`", f"{row.get('parameters', 0):,}", state, rate, plain(row.get("dtype", ""))]


def _curves(run: RunFolder) -> str:
    parts = ["## Curves"]
    for stage in run.stages:
        if not stage.metrics:
            parts.append(f"Stage `{stage.name}` has no steps yet.")
            continue
        file = f"plots/loss-{slug(stage.name)}.png"
        loss_plot(stage.metrics, run.path / file, title=f"Stage “{stage.name}”")
        parts += [f"![Loss and learning rate of stage {plain(stage.name)}]({file})", _stage_line(stage)]
    return "\n\n".join(parts if len(parts) > 1 else [*parts, "No stage has begun."])


def _stage_line(stage: StageRecord) -> str:
    s = stage.summary
    if not s:
        return (
            f"Unfinished: {len(stage.metrics):,} steps so far, last loss {finite(stage.metrics[-1].get('loss')):.3g}."
        )
    facts = [f"{s['steps']:,} steps" if "steps" in s else "", f"{s['samples']:,} samples" if "samples" in s else ""]
    facts += [f"{s['tokens']:,} tokens" if "tokens" in s else "", duration(s["seconds"]) if "seconds" in s else ""]
    facts += [f"final loss {finite(s['final_loss']):.3g}" if "final_loss" in s else ""]
    return "; ".join(f for f in facts if f) + "."


def _image_dependence(run: RunFolder) -> str:
    title = "## Image dependence"
    d = run.results.get("image_dependence")
    if not d:
        return f"{title}\n\nNot measured yet."
    image_dependence_plot(d, run.path / "plots/image-dependence.png")
    return (
        f"{title}\n\n![Accuracy with the real, a blank and another sample's picture](plots/image-dependence.png)\n\n"
        f"The same {d['n']:,} questions: {percent(d['real'])} right with the real picture, {percent(d['blank'])} with "
        f"a blank one, {percent(d['shuffled'])} with another sample's. "
        f"**Real minus blank: {points(d['real'] - d['blank'])}.**{_samplings(d)}"
    )


def _samplings(d: dict[str, Any]) -> str:
    """How the questions were chosen, and what another choice gives."""
    text = ""
    if d.get("sampling") == "balanced":
        text = (
            "\n\nThe questions are balanced: each comes with each of its answers equally often, about different "
            "pictures, so that its words alone give no clue."
        )
    for sampling, other in (d.get("other_samples") or {}).items():
        text += (
            f" On {other['n']:,} questions {sampling}, words alone give clues: {percent(other['real'])} real, "
            f"{percent(other['blank'])} blank, {percent(other['shuffled'])} another's "
            f"({points(other['real'] - other['blank'])})."
        )
    return text


def _samples(run: RunFolder) -> str:
    parts = ["## Samples"]
    for i, task in enumerate(t for t in run.results.get("tasks") or [] if t.get("samples")):
        file = "plots/samples.png" if i == 0 else f"plots/samples-{slug(task['name'])}.png"
        samples_plot(task["samples"], run.path / file, folder=run.path, title=str(task["name"]))
        note = ""
        if task.get("accuracy") is not None:
            note = f" Chosen to show right (✓) and wrong (✗) answers; overall {percent(task['accuracy'])} are right."
        parts += [f"![Pictures with question, answer and reference]({file})", f"From {plain(task['name'])}.{note}"]
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _cost(run: RunFolder) -> str:
    r = run.results
    rows = [[plain(name), duration(s)] for name, s in (r.get("seconds") or {}).items() if isinstance(s, (int, float))]
    if r.get("peak_memory_bytes"):
        rows.append(["peak memory", f"{r['peak_memory_bytes'] / 2**30:.2f} GiB"])
    return "## Time and memory\n\n" + (table(["", ""], rows, right=(1,)) if rows else "Not recorded yet.")


def _reproduce(run: RunFolder) -> str:
    r, machine = run.results, run.results.get("machine") or {}
    parts = ["## How to reproduce"]
    if r.get("command"):
        parts.append(f"```bash\n{r['command']}\n```")
    facts = [f"seed {r['seed']}" if r.get("seed") is not None else ""]
    facts += [
        f"{k} {machine.get(k) or r.get(k)}"
        for k in ("opticnerve", "torch", "transformers")
        if machine.get(k) or r.get(k)
    ]
    facts += [f"{machine['cores']} cores" if machine.get("cores") else "", str(machine.get("cpu") or "")]
    facts += [f"{machine['memory_bytes'] / 2**30:.0f} GiB memory" if machine.get("memory_bytes") else ""]
    facts += [f"device {machine['device']}" if machine.get("device") else ""]
    known = ", ".join(f for f in facts if f)
    parts.append(
        plain(known[0].upper() + known[1:]) + "." if known else "Seed, versions and machine were not recorded."
    )
    if run.recipe:
        parts.append(f"<details><summary>recipe.yaml</summary>\n\n```yaml\n{run.recipe.strip()}\n```\n\n</details>")
    return "\n\n".join(parts)


def _use(run: RunFolder) -> str:
    where = as_typed(run.path)
    return f"""## How to use

```bash
opticnerve ask {where} "what is in the picture?" --image picture.png
```

```python
import opticnerve  # makes the model known to transformers
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{where}")
processor = AutoProcessor.from_pretrained("{where}")
question = [{{"type": "image", "image": "picture.png"}}, {{"type": "text", "text": "what is in the picture?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": question}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=32)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""


def _limits(run: RunFolder) -> str:
    names = [str(t["name"]) for t in run.results.get("tasks") or []]
    tested = f"It was tested on {', '.join(names)} and on nothing else" if names else "It has not been tested"
    return (
        f"## Limits\n\n- {plain(tested)}: on other pictures and questions expect less.\n"
        "- It may state falsehoods with confidence, and inherits what its parts learned, biases included.\n"
        "- The licence follows from the docked parts and the data: check theirs before you pass the model on."
    )
