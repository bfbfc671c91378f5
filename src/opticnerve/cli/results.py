"""The results of a run or an evaluation as tables."""

from __future__ import annotations

from typing import Any

from opticnerve.cli.output import duration


def show_results(results: dict[str, Any], console: Any) -> None:
    """Whatever `results` holds of tasks, image dependence, forgetting and stages, one table each."""
    from rich.table import Table

    if stages := results.get("stages"):
        table = _table("Trained", "stage", "steps", "samples", "loss at the end", "time")
        for s in stages:
            table.add_row(
                s["name"],
                f"{s['steps']:,}",
                f"{s['samples']:,}",
                _number(s.get("final_loss"), 4),
                duration(s["seconds"]),
            )
        console.print(table)
    tasks = results.get("tasks") or []
    if ranked := [t for t in tasks if "image_to_text" in t]:
        console.print(_retrieval(ranked, results.get("untrained")))
    if answered := [t for t in tasks if "image_to_text" not in t]:
        console.print(_tasks(answered))
    for title, found in _dependences(results):
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("questions")
        for name in ("real picture", "blank picture", "another's picture", "real minus blank"):
            table.add_column(name, justify="right")
        for sampling, one in {found.get("sampling", ""): found, **(found.get("other_samples") or {})}.items():
            difference = one["real"] - one["blank"]
            shares = (f"{one[k]:.1%}" for k in ("real", "blank", "shuffled"))
            table.add_row(sampling, *shares, f"{100 * difference:+.1f} points")
        console.print(table)
    if forgetting := results.get("forgetting"):
        table = _table("What the language model kept", "after", "perplexity", "text-only logits unchanged")
        for row in forgetting:
            same = row.get("logits_identical")
            table.add_row(
                row["after"], _number(row.get("perplexity"), 2), "" if same is None else "yes" if same else "no"
            )
        console.print(table)


def without_samples(results: dict[str, Any]) -> dict[str, Any]:
    """The results without the single questions: what a script compares."""
    tasks = [{k: v for k, v in t.items() if k != "samples"} for t in results.get("tasks", [])]
    forgetting = [{k: v for k, v in f.items() if k != "answers"} for f in results.get("forgetting", []) or []]
    return {**results, **({"tasks": tasks} if tasks else {}), **({"forgetting": forgetting} if forgetting else {})}


def _tasks(tasks: list[dict[str, Any]]) -> Any:
    table = _table("Evaluation", "data", "questions", "right", "95 % interval")
    for task in tasks:
        low, high = task.get("ci95") or (None, None)
        interval = f"{low:.1%} to {high:.1%}" if low is not None and high is not None else ""
        if task.get("accuracy") is not None:
            name = task["name"] + (f" ({task['classes']:,} classes)" if "classes" in task else "")
            table.add_row(name, f"{task['n']:,}", f"{task['accuracy']:.1%}", interval, style="bold")
            if "chance" in task:
                table.add_row("  chance", "", f"{task['chance']:.2%}", "")
        else:
            scores = ", ".join(f"{k} {v:.3f}" for k, v in task.items() if isinstance(v, float))
            table.add_row(task["name"], f"{task['n']:,}", scores, "", style="bold")
        for kind, part in (task.get("by_type") or {}).items():
            table.add_row(f"  {kind}", f"{part['n']:,}", f"{part['accuracy']:.1%}", "")
    return table


def _retrieval(tasks: list[dict[str, Any]], untrained: list[dict[str, Any]] | None) -> Any:
    from opticnerve.runs.card.scores import RETRIEVAL_HEAD, retrieval_rows

    table = _table("Retrieval (in brackets: chance)", *RETRIEVAL_HEAD)
    for row in retrieval_rows(tasks, untrained):
        table.add_row(*row)
    return table


def _dependences(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Image dependence of the run, or of each task."""
    found = results.get("image_dependence")
    title = "Does it look at the picture?"
    both = [(title, found)] if isinstance(found, dict) and "real" in found else []
    if isinstance(found, list):
        both += [(title, f) for f in found]
    for task in results.get("tasks", []):
        inner = task.get("image_dependence")
        if isinstance(inner, dict) and "real" in inner and not both:
            both.append((f"{title} ({task['name']})", inner))
    return both


def _table(title: str, first: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _number(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else ""
