"""`opticnerve eval`: questions with known answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from opticnerve.cli.ask import MODEL_HELP
from opticnerve.cli.output import JsonFlag, TrustFlag, console_for, examples, print_json, quiet_libraries, read_recipe
from opticnerve.types import OpticNerveError

EPILOG = examples(
    "opticnerve eval runs/demo --data starter/easy-vqa/test-questions --sample 500",
    "opticnerve eval runs/demo --data questions.jsonl --media pictures/ --image-dependence 200 --out results.json",
    "opticnerve eval runs/demo --recipe recipe.yaml --json",
    "opticnerve eval runs/demo --suite suite.yaml --out scores.json",
)


def evaluate(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP + " A suite may name models itself.")] = None,
    data: Annotated[str | None, typer.Option(help="Questions with their answers, or captions.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Use the `evaluate:` list of this recipe instead.")] = None,
    suite: Annotated[
        Path | None,
        typer.Option(help="A file with `evaluate:` and perhaps `models:`; all are asked, one table is made."),
    ] = None,
    data_format: Annotated[str, typer.Option("--format", help="auto, vqa, captions, llava, chat or hf.")] = "auto",
    metric: Annotated[
        str,
        typer.Option(
            help="vqa (right answers), yes_no (POPE: precision and recall), ocr (ANLS), captions (CIDEr, BLEU-4, "
            "ROUGE-L), choice (the true caption among ten) or multiple_choice (the likeliest of a question's choices)."
        ),
    ] = "vqa",
    media: Annotated[Path | None, typer.Option(help="The folder that pictures' paths start from.")] = None,
    sample: Annotated[int | None, typer.Option(min=1, help="A fixed random sample of so many questions.")] = None,
    image_dependence: Annotated[
        int, typer.Option(min=0, help="Ask so many questions again, with blank and with exchanged pictures.")
    ] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the results, with sample questions, to this file.")] = None,
    trust_remote_code: TrustFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Measure a model: the share of right answers with its interval, and whether they depend on the picture."""
    if sum(given is not None for given in (data, recipe, suite)) != 1:
        raise OpticNerveError("say what to evaluate on: --data PATH, --recipe RECIPE or --suite FILE, one of the three")
    if suite is not None:
        _suite(suite, model, out, trust_remote_code, as_json)
        return
    if model is None:
        raise OpticNerveError("name a model: opticnerve eval MODEL …")
    if recipe is not None:
        specs = read_recipe(recipe).evaluate
        if not specs:
            raise OpticNerveError(f"{recipe} has no `evaluate:` list; add one, or give --data")
    else:
        specs = [_spec(str(data), data_format, metric, media, sample, image_dependence)]
    if out is not None and out.is_dir():
        raise OpticNerveError(f"--out {out} is a folder; name a file such as {out / 'results.json'}")

    from opticnerve.evaluation.evaluate import evaluate_model
    from opticnerve.inference.load import load_any

    quiet_libraries()
    console = console_for(as_json)
    results: dict[str, Any] = evaluate_model(
        *load_any(model, trust_remote_code=trust_remote_code), specs, console=console
    )
    if out is not None:
        import json

        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    if as_json:
        print_json({"evaluated": model, **results})
        return
    from opticnerve.cli.results import show_results

    show_results(results, console)
    if out is not None:
        console.print(f"wrote {out}", soft_wrap=True)


def _suite(path: Path, model: str | None, out: Path | None, trust_remote_code: bool, as_json: bool) -> None:
    from opticnerve.evaluation.suite import read_suite, run_suite, suite_table

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
        raise OpticNerveError(f"{found['failed']} of the tasks failed; {out.with_suffix('.md')} says why")


def _spec(
    path: str, data_format: str, metric: str, media: Path | None, sample: int | None, image_dependence: int
) -> Any:
    from pydantic import ValidationError

    from opticnerve.recipe import EvaluateSpec

    entry = {
        "name": Path(path).name,
        "data": {"path": path, "format": data_format, "media": str(media) if media else None},
        "metric": metric,
        "sample": sample,
        "image_dependence": image_dependence,
    }
    try:
        return EvaluateSpec.model_validate(entry)
    except ValidationError as e:
        wrong = "; ".join(f"--{found['loc'][-1]}: {found['msg'].removeprefix('Value error, ')}" for found in e.errors())
        raise OpticNerveError(wrong) from None
