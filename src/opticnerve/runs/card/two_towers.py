"""What the run card of a dual encoder or a fusion classifier says where it differs from a docked language model's."""

from __future__ import annotations

from typing import Any

from opticnerve.common.markdown import as_typed, percent, plain, table
from opticnerve.runs.folder import RunFolder

DIRECTIONS = {"image_to_text": "picture → text", "text_to_image": "text → picture"}


def of_two_towers(run: RunFolder) -> bool:
    """Whether the run's model is a vision encoder and a text encoder side by side, and no language model speaks."""
    return bool((run.results.get("model") or {}).get("kind"))


def summary(run: RunFolder) -> str:
    model = run.results["model"]
    line = f"**{plain(model['encoder'])}** and **{plain(model['text'])}** as a {plain(model['kind'])}, by opticnerve."
    return f"# {plain(run.path.resolve().name)}\n\n{line}"


def parts(run: RunFolder) -> str:
    model = run.results["model"]
    return (
        f"## What was joined\n\n```text\npicture → {model['encoder']} ┐\n{'':>{len(model['encoder']) + 10}} ├→ "
        f"{model['kind']}\ntext    → {model['text']:<{len(model['encoder'])}} ┘\n```"
    )


def retrieval_rows(tasks: list[dict[str, Any]], untrained: list[dict[str, Any]] | None = None) -> list[list[str]]:
    """data, direction, candidates, R@1, R@5, R@10 (each with its chance), and R@1 before training."""
    before = {t["name"]: t for t in untrained or []}
    rows = []
    for task in tasks:
        for key, name in DIRECTIONS.items():
            if key not in task:
                continue
            found, first = task[key], before.get(task["name"], {}).get(key, {})
            cells = [_recall(found[k]) if (k := f"R@{n}") in found else "–" for n in (1, 5, 10)]
            start = percent(first["R@1"]["accuracy"]) if "R@1" in first else "–"
            rows.append([plain(task["name"]), name, f"{found['n']:,} / {found['candidates']:,}", *cells, start])
    return rows


RETRIEVAL_HEAD = ["data", "direction", "queries / candidates", "R@1", "R@5", "R@10", "R@1 untrained"]


def tasks(run: RunFolder) -> str:
    """Retrieval, and zero-shot classification, against chance and against projections that learned nothing."""
    done, untrained = run.results.get("tasks") or [], run.results.get("untrained") or []
    if not done:
        return f"## Evaluation\n\nNot evaluated yet. Run `opticnerve eval {as_typed(run.path)}`."
    found = ["## Evaluation"]
    if rows := retrieval_rows(done, untrained):
        found += [table(RETRIEVAL_HEAD, rows, right=(2, 3, 4, 5, 6)), "In brackets what chance gives."]
    before = {t["name"]: t for t in untrained}
    rows = []
    for t in (t for t in done if "chance" in t and "accuracy" in t):
        low, high = t["ci95"]
        start = before.get(t["name"])
        rows.append([
            plain(t["name"]), f"{t['n']:,}", f"{t['classes']:,}", percent(t["accuracy"]),
            f"{percent(low)} – {percent(high)}", f"{t['chance']:.2%}", percent(start["accuracy"]) if start else "–",
        ])  # fmt: skip
    if rows:
        head = ["zero-shot", "n", "classes", "accuracy", "95 % interval", "chance", "untrained"]
        found.append(table(head, rows, right=(1, 2, 3, 4, 5, 6)))
    if untrained:
        found.append("*Untrained*: the same encoders with fresh projections, before the first step.")
    return "\n\n".join(found)


def use(run: RunFolder) -> str:
    where, dual = as_typed(run.path), run.results["model"]["kind"].startswith("dual")
    if dual:
        return f"""## How to use

```bash
opticnerve classify {where} --image picture.png --classes "a cat, a dog, a bird"
opticnerve embed {where} --data captions.jsonl --out vectors
```

```yaml
# its vision encoder, docked onto a language model
model:
  image:
    encoder: {{type: dual_encoder, name: {where}}}
```"""
    return f"""## How to use

```python
from opticnerve.inference.predictors import load_classifier
from opticnerve.types import ask

classifier = load_classifier("{where}")
print(classifier.answers([ask("what is in the picture?", "picture.png")]))
```"""


def _recall(entry: dict[str, Any]) -> str:
    return f"{percent(entry['accuracy'])} ({entry['chance']:.2%})"
