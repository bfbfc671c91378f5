"""`opticnerve eval`: questions with known answers; and the results of a run or an evaluation as tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from opticnerve.cli.options import MODEL_HELP, JsonFlag, MediaOption, TrustFlag
from opticnerve.cli.output import console_for, examples, print_json, quiet_libraries, read_recipe, table_of
from opticnerve.common import atomic
from opticnerve.common.units import format_duration
from opticnerve.types import OpticNerveError

if TYPE_CHECKING:
    from rich.console import Console

EPILOG = examples(
    "opticnerve eval runs/demo --data starter/easy-vqa/test-questions --sample 500",
    "opticnerve eval runs/demo --data questions.jsonl --media pictures/ --image-dependence 200 --out results.json",
    "opticnerve eval runs/demo --recipe recipe.yaml --json",
    "opticnerve eval runs/demo --suite suite.yaml --out scores.json",
)


def evaluate(
    model: Annotated[str | None, Argument(help=MODEL_HELP + " A suite may name models itself.")] = None,
    data: Annotated[str | None, Option(help="Questions with their answers, or captions.")] = None,
    recipe: Annotated[str | None, Option(help="Use the `evaluate:` list of this recipe instead.")] = None,
    suite: Annotated[
        Path | None,
        Option(help="A file with `evaluate:` and perhaps `models:`; all are asked, one table is made."),
    ] = None,
    data_format: Annotated[str, Option("--format", help="auto, vqa, captions, llava, chat or hf.")] = "auto",
    metric: Annotated[
        str,
        Option(
            help="vqa (right answers), yes_no (POPE: precision and recall), ocr (ANLS), boxes (IoU 0.5), points, "
            "captions (CIDEr, BLEU-4, ROUGE-L), choice (the true caption among ten) or multiple_choice (the likeliest "
            "of a question's choices)."
        ),
    ] = "vqa",
    media: MediaOption = None,
    sample: Annotated[int | None, Option(min=1, help="A fixed random sample of so many questions.")] = None,
    image_dependence: Annotated[
        int, Option(min=0, help="Ask so many questions again, with blank and with exchanged pictures.")
    ] = 0,
    out: Annotated[Path | None, Option(help="Write the results, with sample questions, to this file.")] = None,
    trust_remote_code: TrustFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Measure a model: the share of right answers with its interval, and whether they depend on the picture."""
    if sum(given is not None for given in (data, recipe, suite)) != 1:
        raise OpticNerveError(
            "say what to evaluate on: --data PATH, --recipe RECIPE or --suite FILE, one of the three",
            kind="missing-field",
        )
    if suite is not None:
        _suite(suite, model, out, trust_remote_code, as_json)
        return
    if model is None:
        raise OpticNerveError("name a model: opticnerve eval MODEL …", kind="missing-field")
    if recipe is not None:
        specs = read_recipe(recipe).evaluate
        if not specs:
            raise OpticNerveError(f"{recipe} has no `evaluate:` list; add one, or give --data", kind="missing-field")
    else:
        specs = [_spec(str(data), data_format, metric, media, sample, image_dependence)]
    if out is not None and out.is_dir():
        raise OpticNerveError(f"--out {out} is a folder; name a file such as {out / 'results.json'}", kind="wrong-type")

    from opticnerve.evaluation.evaluate import evaluate_model
    from opticnerve.inference.load import load_any

    quiet_libraries()
    console = console_for(as_json)
    model_and_processor = load_any(model, trust_remote_code=trust_remote_code)
    results: dict[str, Any] = evaluate_model(*model_and_processor, specs, console=console)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_json(out, results, ensure_ascii=False, default=str)
    if as_json:
        print_json({"evaluated": model, **results})
        return
    show_results(results, console)
    if out is not None:
        console.print(f"wrote {out}", soft_wrap=True)


def _suite(path: Path, model: str | None, out: Path | None, trust_remote_code: bool, as_json: bool) -> None:
    from opticnerve.evaluation.evaluate import read_suite, run_suite, suite_table

    suite = read_suite(path)
    quiet_libraries()
    console = console_for(as_json)
    out = out or path.with_suffix(".scores.json")
    found = run_suite(suite, [model] if model else [], out, trust_remote_code=trust_remote_code, console=console)
    if as_json:
        print_json(found)
    else:
        console.print(suite_table(found, suite), markup=False, soft_wrap=True)
        console.print(f"wrote {out} and {out.with_suffix('.md')}", soft_wrap=True)
    if found["failed"]:
        raise OpticNerveError(
            f"{found['failed']} of the tasks failed; {out.with_suffix('.md')} says why", kind="refused"
        )


def _spec(
    path: str, data_format: str, metric: str, media: Path | None, sample: int | None, image_dependence: int
) -> Any:
    from pydantic import ValidationError

    from opticnerve.recipe import EvaluateSpec

    entry = {
        "name": Path(path).name, "data": {"path": path, "format": data_format, "media": str(media) if media else None},
        "metric": metric, "sample": sample, "image_dependence": image_dependence,
    }  # fmt: skip
    try:
        return EvaluateSpec.model_validate(entry)
    except ValidationError as e:
        wrong = "; ".join(f"--{found['loc'][-1]}: {found['msg'].removeprefix('Value error, ')}" for found in e.errors())
        raise OpticNerveError(wrong, kind="recipe") from None


def show_results(results: dict[str, Any], console: Console) -> None:
    """Whatever `results` holds of tasks, image dependence, forgetting and stages, one table each."""
    if stages := results.get("stages"):
        table = table_of("Trained", "stage", ">steps", ">samples", ">loss at the end", ">time")
        for s in stages:
            loss, time = _number(s.get("final_loss"), 4), format_duration(s["seconds"])
            table.add_row(s["name"], f"{s['steps']:,}", f"{s['samples']:,}", loss, time)
        console.print(table)
    tasks = results.get("tasks") or []
    if ranked := [t for t in tasks if "image_to_text" in t]:
        from opticnerve.runs.card.scores import RETRIEVAL_HEAD, retrieval_rows

        table = table_of("Retrieval (in brackets: chance)", RETRIEVAL_HEAD[0], *(f">{h}" for h in RETRIEVAL_HEAD[1:]))
        for row in retrieval_rows(ranked, results.get("untrained")):
            table.add_row(*row)
        console.print(table)
    if answered := [t for t in tasks if "image_to_text" not in t]:
        console.print(_tasks(answered))
    for title, found in _dependences(results):
        table = table_of(
            title, "questions", ">real picture", ">blank picture", ">another's picture", ">real minus blank"
        )
        for sampling, one in {found.get("sampling", ""): found, **(found.get("other_samples") or {})}.items():
            shares = [f"{one[k]:.1%}" for k in ("real", "blank", "shuffled")]
            if "shuffled_frames" in one:
                shares[-1] += f"; its own frames in another order {one['shuffled_frames']:.1%}"
            table.add_row(sampling, *shares, f"{100 * (one['real'] - one['blank']):+.1f} points")
        console.print(table)
    if forgetting := results.get("forgetting"):
        table = table_of("What the language model kept", "after", ">perplexity", ">text-only logits unchanged")
        for row in forgetting:
            same = {None: "", True: "yes", False: "no"}[row.get("logits_identical")]
            table.add_row(row["after"], _number(row.get("perplexity"), 2), same)
        console.print(table)


def without_samples(results: dict[str, Any]) -> dict[str, Any]:
    """The results without the single questions: what a script compares."""
    tasks = [{k: v for k, v in t.items() if k != "samples"} for t in results.get("tasks", [])]
    forgetting = [{k: v for k, v in f.items() if k != "answers"} for f in results.get("forgetting", []) or []]
    return {**results, **({"tasks": tasks} if tasks else {}), **({"forgetting": forgetting} if forgetting else {})}


def _tasks(tasks: list[dict[str, Any]]) -> Any:
    table = table_of("Evaluation", "data", ">questions", ">right", ">95 % interval")
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


def _number(value: object, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else ""
