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
from opticnerve.common.markdown import as_typed, percent, plain, slug, table
from opticnerve.common.units import format_duration
from opticnerve.runs.card import scores
from opticnerve.runs.card.plots import loss_plot
from opticnerve.runs.card.warnings import boxes
from opticnerve.runs.folder import RunFolder, StageRecord, finite, read_run


def write_card(run_dir: Path) -> Path:
    """Write `card.md` and `plots/*.png` from what the run folder holds, finished or not; returns the card's path.

    Raises:
        OpticNerveError: there is no such folder, or a record in it is broken.
    """
    run = read_run(run_dir)
    # Whether a vision encoder and a text encoder stand side by side, and no language model speaks; and answers, or not.
    two_towers = bool((run.results.get("model") or {}).get("kind"))
    answering = not two_towers or any("by_type" in t for t in run.results.get("tasks") or [])
    asked = [scores.answers, scores.image_dependence, *([] if two_towers else [scores.forgetting]), scores.samples]
    sections: list[Callable[[RunFolder], str]] = [
        _summary, *([boxes] if answering else []), _joined if two_towers else _docked, _freeze, _curves,
        *(asked if answering else [scores.matches]), _cost, _reproduce, _use, _limits,
    ]  # fmt: skip
    body = "\n\n".join(text.strip() for section in sections if (text := section(run)))
    card = run.path / "card.md"
    atomic.write(card, f"---\n{_front_matter(run)}---\n\n{body}\n")
    return card


def _front_matter(run: RunFolder) -> str:
    model = run.results.get("model") or {}
    named = [str(model[k]) for k in ("language", "text", "encoder") if model.get(k)]
    kind = str(model.get("kind", ""))
    pipeline = "zero-shot-image-classification" if kind.startswith("dual") else "visual-question-answering"
    pipeline = pipeline if kind else "image-text-to-text"
    front: dict[str, Any] = {
        # Which licence applies follows from the docked parts; only the recipe's author can say.
        "license": model.get("license", "other"),
        "library_name": "opticnerve",
        "pipeline_tag": pipeline,
        "tags": ["opticnerve", "vision-language-model", pipeline, *named],
    }
    if bases := [n for n in named if re.fullmatch(r"[\w.-]+/[\w.-]+", n)]:
        front["base_model"] = bases
    if scored := _scored(run):
        results = [
            {
                "task": {"type": "visual-question-answering"},
                "dataset": {"name": t["name"], "type": slug(t["name"])},
                "metrics": [
                    {"type": "accuracy", "name": t.get("harness", "accuracy"), "value": round(t["accuracy"], 4)}
                ],
            }
            for t in scored
        ]
        front["model-index"] = [{"name": run.path.resolve().name, "results": results}]
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True)


def _scored(run: RunFolder) -> list[dict[str, Any]]:
    return [t for t in run.results.get("tasks") or [] if t.get("accuracy") is not None]


def _summary(run: RunFolder) -> str:
    model, scored = run.results.get("model") or {}, _scored(run)
    encoder = plain(model.get("encoder", "an encoder"))
    if kind := model.get("kind"):
        line = f"**{encoder}** and **{plain(model['text'])}** as a {plain(kind)}, by opticnerve."
    else:
        line = f"**{encoder}** docked onto **{plain(model.get('language', 'a language model'))}** by opticnerve"
        line += (
            f": {percent(scored[0]['accuracy'])} on {plain(scored[0]['name'])}." if scored else "; not evaluated yet."
        )
    return f"# {plain(run.path.resolve().name)}\n\n{line}"


def _docked(run: RunFolder) -> str:
    model = run.results.get("model") or {}
    if not model:
        return "## What was docked\n\nNot recorded yet (`results.json` has no `model`)."
    # Shapes are shown as far as the run noted them.
    shape = {k: model.get(k, "?") for k in ("image_size", "encoder_tokens", "encoder_width", "visual_tokens", "width")}
    side = shape["image_size"]
    rows = [
        ("picture", str(model.get("picture", f"3 × {side} × {side}"))),
        (f"encoder    {model.get('encoder', '?')}", f"{shape['encoder_tokens']} × {shape['encoder_width']}"),
        (f"connector  {model.get('connector', '?')}", f"{shape['visual_tokens']} × {shape['width']}"),
        (f"fusion     {model.get('fusion', '?')}: {shape['visual_tokens']} visual tokens among the words", ""),
        (f"language   {model.get('language', '?')}", "text"),
    ]
    wide = max(len(name) for name, _ in rows)
    drawn = "\n    ↓\n".join(f"{name:<{wide}}  →  {out}" if out else name for name, out in rows)
    goes_on = [
        f"The {plain(part)} goes on from {plain(origin['name'])} (SHA-256 {plain(origin['sha256'])[:16]}…)."
        for part, origin in (model.get("from") or {}).items()
    ]
    return "\n\n".join([f"## What was docked\n\n```text\n{drawn}\n```", *goes_on])


def _joined(run: RunFolder) -> str:
    model = run.results["model"]
    wide = len(model["encoder"])
    drawn = f"picture → {model['encoder']} ┐\n{'':>{wide + 10}} ├→ {model['kind']}\ntext    → {model['text']:<{wide}} ┘"
    return f"## What was joined\n\n```text\n{drawn}\n```"


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
        head = ["part", "parameters", "", "learning rate", "dtype"]
        parts.append(table(head, [_freeze_row(r) for r in rows], right=(1, 3)))
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
    parts = []
    for stage in run.stages:
        if not stage.metrics:
            parts.append(f"Stage `{stage.name}` has no steps yet.")
            continue
        file = f"plots/loss-{slug(stage.name)}.png"
        if not _is_newer(run.path / file, stage.folder / "metrics.jsonl"):  # or it was drawn as an earlier stage ended
            loss_plot(stage.metrics, run.path / file, title=f"Stage “{stage.name}”")
        parts += [f"![Loss and learning rate of stage {plain(stage.name)}]({file})", _stage_line(stage)]
        parts += [by_source] if (by_source := _by_source(stage.metrics)) else []
    return "\n\n".join(["## Curves", *(parts or ["No stage has begun."])])


def _is_newer(plot: Path, of: Path) -> bool:
    return plot.is_file() and plot.stat().st_mtime_ns > of.stat().st_mtime_ns


_UNITS = ("tokens", "samples")  # what an objective's loss is a mean over


def _by_source(metrics: list[dict[str, Any]]) -> str:
    """What each data entry's tokens, or samples, cost in the first and in the last tenth of a stage, where there are
    several."""
    tenth = max(1, len(metrics) // 10)
    names = dict.fromkeys(name for m in metrics for name in m.get("by_source") or {})
    unit = next((u for m in metrics for s in (m.get("by_source") or {}).values() for u in _UNITS if u in s), "tokens")
    everything = sum(_count_of(metrics, name) for name in names)
    rows = [
        [plain(name), percent(_count_of(metrics, name) / everything), _loss_of(metrics[:tenth], name),
         _loss_of(metrics[-tenth:], name)]
        for name in names
    ]  # fmt: skip
    head = ["source", f"share of the trained {unit}", "loss, first tenth", "loss, last tenth"]
    return table(head, rows, right=(1, 2, 3)) if rows else ""


def _count_of(metrics: list[dict[str, Any]], name: str) -> int:
    return sum(_count(s) for m in metrics if (s := (m.get("by_source") or {}).get(name)))


def _count(entry: dict[str, Any]) -> int:
    return sum(entry.get(unit, 0) for unit in _UNITS)


def _loss_of(metrics: list[dict[str, Any]], name: str) -> str:
    """The mean over its tokens, or samples."""
    tokens = _count_of(metrics, name)
    loss = sum(s["loss"] * _count(s) for m in metrics if (s := (m.get("by_source") or {}).get(name)))
    return f"{loss / tokens:.3f}" if tokens else "–"


def _stage_line(stage: StageRecord) -> str:
    s = stage.summary
    if not s:
        loss = finite(stage.metrics[-1].get("loss"))
        return f"Unfinished: {len(stage.metrics):,} steps so far, last loss {loss:.3g}."
    facts = [f"{s[k]:,} {k}" for k in ("steps", "samples", "tokens") if k in s]
    facts += [format_duration(s["seconds"])] if "seconds" in s else []
    facts += [f"final loss {finite(s['final_loss']):.3g}"] if "final_loss" in s else []
    facts += [_held_out(v)] if (v := s.get("validation")) else []
    return "; ".join(facts) + "."


def _held_out(validation: dict[str, Any]) -> str:
    """The best and the last look at held-out data, and what became of them."""
    name, key = ("held-out loss", "loss") if validation["metric"] == "loss" else (plain(validation["metric"]), "score")
    last = validation["curve"][-1]
    text = f"{name} {finite(last.get(key)):.3g}, at its best {finite(validation['best']):.3g} in step"
    text += f" {validation['best_step']}{', whose weights were kept' if validation['keep'] == 'best' else ''}"
    return text + ("; patience ended, and the stage stopped" if validation["stopped"] else "")


def _cost(run: RunFolder) -> str:
    r = run.results
    seconds = (r.get("seconds") or {}).items()
    rows = [[plain(name), format_duration(s)] for name, s in seconds if isinstance(s, (int, float))]
    if r.get("peak_memory_bytes"):
        rows.append(["peak memory", f"{r['peak_memory_bytes'] / 2**30:.2f} GiB"])
    tables = [table(["", ""], rows, right=(1,))] if rows else []
    tables += [_speeds(timed)] if (timed := [s for s in run.stages if s.metrics and "waiting" in s.metrics[-1]]) else []
    return "\n\n".join(["## Time and memory", *(tables or ["Not recorded yet."])])


def _speeds(stages: list[StageRecord]) -> str:
    """How fast each stage was, by its last line."""
    rows = []
    for stage in stages:
        last = stage.metrics[-1]
        speeds = (f"{finite(last.get(k)):,.3g}" for k in ("samples_per_second", "tokens_per_second"))
        shares = (percent(last[k]) if k in last else "–" for k in ("waiting", "mfu"))
        rows.append([plain(stage.name), *speeds, *shares, f"{last['peak_memory_bytes'] / 2**30:.2f} GiB"])
    head = ["stage", "samples/s", "tokens/s", "waited for data", "MFU", "peak memory"]
    return table(head, rows, right=(1, 2, 3, 4, 5))


def _reproduce(run: RunFolder) -> str:
    r, machine = run.results, run.results.get("machine") or {}
    parts = ["## How to reproduce"]
    if r.get("command"):
        parts.append(f"```bash\n{r['command']}\n```")
    versions = {k: machine.get(k) or r.get(k) for k in ("opticnerve", "torch", "transformers")}
    facts = [f"seed {r['seed']}" if r.get("seed") is not None else ""]
    facts += [f"{k} {version}" for k, version in versions.items() if version]
    facts += [f"{machine['cores']} cores" if machine.get("cores") else "", str(machine.get("cpu") or "")]
    facts += [f"{machine['memory_bytes'] / 2**30:.0f} GiB memory" if machine.get("memory_bytes") else ""]
    facts += [f"device {machine['device']}" if machine.get("device") else ""]
    known = ", ".join(filter(None, facts))
    parts.append(
        plain(known[0].upper() + known[1:]) + "." if known else "Seed, versions and machine were not recorded."
    )
    if run.recipe:
        parts.append(f"<details><summary>recipe.yaml</summary>\n\n```yaml\n{run.recipe.strip()}\n```\n\n</details>")
    return "\n\n".join(parts)


def _use(run: RunFolder) -> str:
    kind = str((run.results.get("model") or {}).get("kind", ""))
    text = _USE_DUAL if kind.startswith("dual") else _USE_CLASSIFIER if kind else _USE_DOCKED
    return "## How to use\n\n" + text.replace("WHERE", as_typed(run.path))


_USE_DOCKED = """```bash
opticnerve ask WHERE "what is in the picture?" --image picture.png
```

```python
import opticnerve  # makes the model known to transformers
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("WHERE")
processor = AutoProcessor.from_pretrained("WHERE")
question = [{"type": "image", "image": "picture.png"}, {"type": "text", "text": "what is in the picture?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": question}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=32)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""
_USE_DUAL = """```bash
opticnerve classify WHERE --image picture.png --classes "a cat, a dog, a bird"
opticnerve embed WHERE --data captions.jsonl --out vectors
```

```yaml
# its vision encoder, docked onto a language model
model:
  image:
    encoder: {type: dual_encoder, name: WHERE}
```"""
_USE_CLASSIFIER = """```python
from opticnerve.inference.predictors import load_classifier
from opticnerve.types import ask

classifier = load_classifier("WHERE")
print(classifier.answers([ask("what is in the picture?", "picture.png")]))
```"""


def _limits(run: RunFolder) -> str:
    names = [str(t["name"]) for t in run.results.get("tasks") or []]
    tested = f"It was tested on {', '.join(names)} and on nothing else" if names else "It has not been tested"
    return (
        f"## Limits\n\n- {plain(tested)}: on other pictures and questions expect less.\n"
        "- It may state falsehoods with confidence, and inherits what its parts learned, biases included.\n"
        "- The licence follows from the docked parts and the data: check theirs before you pass the model on."
    )
