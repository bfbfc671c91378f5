"""Every part at work: one line of `recipes/starter.yaml` changed for each, trained on easy-VQA under one small budget.
Whisper alone, for which there is nothing to hear in easy-VQA, takes `recipes/starter-audio.yaml` as it is.

    python benchmarks/parts.py                      # the rows that have no result yet; then the table in docs/models.md
    python benchmarks/parts.py --rows mlp,qformer   # these, again
    python benchmarks/parts.py --quick --rows mlp   # a few steps, to see that it runs; no file is touched

Results stand in benchmarks/parts.json, written after each row, so that a run that was stopped goes on where it was. The
figures compare parts under a budget of minutes; what a part can do with hours, they do not say. Eyes whose weights are
on no package index start from random weights and train along ("from scratch"), as do small language models of each
family, with SmolLM2's tokenizer: those rows show that a part trains and answers, not what its pretrained form is worth.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCUMENT = ROOT / "benchmarks" / "parts.json", ROOT / "docs" / "models.md"
WORK = ROOT / "runs" / "parts"
BEGIN, END = "<!-- parts-table:begin -->", "<!-- parts-table:end -->"
PICTURE = 64  # easy-VQA's pictures are 64 px squares

BUDGET = {"align": (40, 8), "instruct": (90, 2), "questions": 200}  # steps × rows; a row of `instruct`: four questions
QUICK = {"align": (2, 4), "instruct": (2, 2), "questions": 12}
LORA = "language.lora: 2.0e-3"
EYE, BRAIN = "encoder: 5.0e-4", "language: 1.0e-3"


@dataclass(frozen=True)
class Row:
    """One line of the table. `change`: overrides of the starter recipe, `{random}` the folder of random weights.

    `also`: what trains beside the connector in both stages; `scratch`: which of its weights are random at the start;
    `base`: the recipe that is changed.
    """

    kind: str
    name: str
    title: str
    change: tuple[str, ...] = ()
    also: str = ""
    scratch: str = ""
    base: str = "starter"

    def overrides(self, budget: dict[str, Any]) -> list[str]:
        """The row as overrides of its base."""
        (align, captions), (instruct, pictures) = budget["align"], budget["instruct"]
        also = f", {self.also}" if self.also else ""
        adapter = "" if BRAIN in self.also else f", {LORA}"
        asked = f"sample: {budget['questions']}, image_dependence: 0, max_new_tokens: 6"
        return [
            f"name={self.name}", "trackers=[]", "forgetting=false",
            f"stages.0.steps={align}", f"stages.0.batch_size={captions}",
            f"stages.1.steps={instruct}", f"stages.1.batch_size={pictures}",
            f"stages.0.train={{connector: 2.0e-3{also}}}", f"stages.1.train={{connector: 2.0e-3{also}{adapter}}}",
            *(["stages.1.lora=null"] if not adapter else []),
            f"evaluate=[{{name: test, data: {{path: {QUESTIONS[self.base]}}}, {asked}}}]",
            *(change.replace("{random}", str(WORK / "random")) for change in self.change),
        ]  # fmt: skip


QUESTIONS = {"starter": "starter/easy-vqa/test-questions", "starter-audio": "starter/spoken-words/held-out-voices"}


def vision_encoder(name: str, title: str) -> Row:
    change = f"model.image.encoder={{type: hf_vision, name: '{{random}}/{name}'}}"
    return Row("encoder", name, title, (change,), EYE, "encoder")


def language_part(name: str, title: str) -> Row:
    change = f"model.language={{name: '{{random}}/{name}', chat_template: chatml}}"
    return Row("language model", name, title, (change,), BRAIN, "language model")


def connector(name: str, options: str, title: str) -> Row:
    return Row("connector", name, title, (f"model.image.connector={{{options}}}",))


SIGLIP, DINOV2 = ("{type: hf_vision, name: '{random}/" + name + "'}" for name in ("siglip", "dinov2"))
PAIR = f"{{type: pair, first: {SIGLIP}, second: {DINOV2}}}"
TIMM = "{type: timm, name: 'local-dir:{random}/timm-vit'}"
PATCHES = "{type: patches, image_size: 64, patch_size: 16}"
ROWS = [
    Row("encoder", "efficientnet", "timm CNN: EfficientNet-Lite0 with ImageNet weights (the starter's)"),
    Row("encoder", "timm-vit", "timm ViT", (f"model.image.encoder={TIMM}",), EYE, "encoder"),
    vision_encoder("clip", "CLIP-ViT"),
    vision_encoder("siglip", "SigLIP, and SigLIP 2 of fixed resolution"),
    vision_encoder("siglip2", "SigLIP 2 of flexible resolution"),
    vision_encoder("dinov2", "DINOv2"),
    vision_encoder("vit", "ViT"),
    Row("encoder", "pair", "SigLIP + DINOv2 side by side", (f"model.image.encoder={PAIR}",), EYE, "encoder"),
    Row("encoder", "tiling", "tiles and a thumbnail (LLaVA-NeXT)", ("model.image.tiling={type: anyres}",)),
    Row("encoder", "patches", "raw patches, no encoder (Fuyu)", (f"model.image.encoder={PATCHES}",)),
    Row("encoder", "whisper", "Whisper tiny.en, pretrained; words said by unheard voices", base="starter-audio"),
    connector("linear", "type: linear", "linear"),
    connector("mlp", "type: mlp", "mlp, 2 layers (the starter's)"),
    connector("mlp-3", "type: mlp, depth: 3", "mlp, 3 layers"),
    connector("pixel-shuffle", "type: pixel_shuffle, scale: 2, depth: 2", "pixel_shuffle, 2 × 2"),
    connector("qformer", "type: qformer, num_queries: 16, depth: 2", "qformer, 16 queries, 2 layers"),
    connector("resampler", "type: resampler, num_latents: 16, depth: 2, heads: 8, head_dim: 32", "resampler, 2 blocks"),
    connector("abstractor", "type: abstractor, out_tokens: 16, depth: 1", "abstractor, 16 tokens, 1 + 1 blocks"),
    Row("fusion", "splice", "splice (the starter's)"),
    Row(
        "fusion", "cross-attention", "gated cross-attention before every fifth layer",
        ("model.image.fusion={type: cross_attention, every: 5}",), "fusion: 2.0e-3",
    ),
    Row("language model", "smollm2", "SmolLM2-135M-Instruct, pretrained (the starter's)"),
    language_part("llama", "Llama 3, Vicuna (Llama)"),
    language_part("qwen2", "Qwen 2 and 2.5"),
    language_part("qwen3", "Qwen 3"),
    language_part("mistral", "Mistral"),
    language_part("gemma2", "Gemma 2"),
    language_part("phi", "Phi"),
    language_part("opt", "OPT"),
    language_part("gpt2", "GPT-2"),
]  # fmt: skip


# -- random weights ---------------------------------------------------------------------------------------------------


def make_random(name: str) -> None:
    """A folder of random weights under `WORK / "random"`, unless it is there."""
    folder = WORK / "random" / name
    if (folder / "done").is_file() or name not in (*VISION_ENCODERS, *BRAINS, "timm-vit"):
        return
    import torch

    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    (save_brain if name in BRAINS else save_timm if name == "timm-vit" else save_eye)(name, folder)
    (folder / "done").touch()


VISION_ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {  # type, and what it has of its own
    "clip": ("clip_vision_model", {"image_size": PICTURE}),
    "siglip": ("siglip_vision_model", {"image_size": PICTURE}),
    "siglip2": ("siglip2_vision_model", {"num_patches": 16}),
    "dinov2": ("dinov2", {"image_size": PICTURE, "mlp_ratio": 4}),
    "vit": ("vit", {"image_size": PICTURE}),
}
BRAINS = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi", "opt", "gpt2")


def save_eye(name: str, folder: Path) -> None:
    """A vision transformer of 4 layers for the pictures as they are: 4 × 4 patches of 16 px."""
    import transformers as tf

    kind, own = VISION_ENCODERS[name]
    size = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3}
    config = tf.AutoConfig.for_model(kind, **size, **own, patch_size=16)
    tf.MODEL_MAPPING[type(config)](config).save_pretrained(folder)
    square, half = {"height": PICTURE, "width": PICTURE}, [0.5] * 3
    tf.SiglipImageProcessor(size=square, image_mean=half, image_std=half).save_pretrained(folder)


def save_timm(_: str, folder: Path) -> None:
    """A small ViT in timm's `local-dir:` form."""
    import timm
    from safetensors.torch import save_file

    architecture, options = "vit_tiny_patch16_224", {"depth": 4}
    model = timm.create_model(architecture, pretrained=False, img_size=PICTURE, num_classes=0, **options)
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    settings = {"input_size": [3, PICTURE, PICTURE], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 0}
    config = {"architecture": architecture, "num_classes": 0, "pretrained_cfg": settings, "model_args": options}
    (folder / "config.json").write_text(json.dumps(config))


def save_brain(name: str, folder: Path) -> None:
    """A language model of 4 layers of width 256, in a folder with SmolLM2's tokenizer."""
    import transformers as tf

    from opticnerve.language.load import resolve

    tokenizer = tf.AutoTokenizer.from_pretrained(resolve("starter/smollm2-135m-instruct")[0])
    tokens = {
        "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    size: dict[str, Any] = {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 2048,
    }  # fmt: skip
    own: dict[str, dict[str, Any]] = {
        "llama": size,
        "qwen2": size,
        "qwen3": {**size, "head_dim": 64},
        "mistral": {**size, "sliding_window": None},
        "gemma2": {**size, "head_dim": 64, "query_pre_attn_scalar": 64},
        "phi": {**size, "num_key_value_heads": 4},
        "opt": {
            "hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 768, "num_hidden_layers": 4,
            "num_attention_heads": 4, "max_position_embeddings": 2048, "dropout": 0.0,
        },
        "gpt2": {"n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 2048},
    }  # fmt: skip
    config = tf.AutoConfig.for_model(name, **tokens, **own[name])
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# -- one row ----------------------------------------------------------------------------------------------------------


def run(row: Row, budget: dict[str, Any]) -> dict[str, Any]:
    """Train and ask; what the table shows of it."""
    import torch
    import transformers

    from opticnerve import recipe as recipes
    from opticnerve.plan import model as plan_model
    from opticnerve.runs.pipeline import run_recipe

    for name in re.findall(r"\{random\}/([\w-]+)", " ".join(row.change)):
        make_random(name)
    recipe = recipes.load(ROOT / "recipes" / f"{row.base}.yaml", row.overrides(budget))
    [tower] = plan_model.meta_model(recipe).towers.values()
    folder = WORK / row.name
    shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    done = run_recipe(recipe, folder)
    seconds = time.perf_counter() - started
    task, last = done["tasks"][0], recipe.stages[-1]
    frozen = json.loads((folder / "stages" / f"{len(recipe.stages) - 1}-{last.name}" / "freeze.json").read_text())
    return {
        "accuracy": task["accuracy"],
        "ci95": task["ci95"],
        "n": task["n"],
        "by_type": task["by_type"],
        "most_frequent_answer": task["most_frequent_answer"],
        "question_alone": question_alone(row, budget),
        "tokens": tower.num_tokens if tower.tiling is None else tower.tiling.count(PICTURE, PICTURE),
        "in_text": tower.num_placeholders,
        "connector": sum(p.numel() for half in (tower.connector, tower.fusion) for p in half.parameters()),
        "trained": frozen["trained"],
        "seconds": seconds,
        "machine": done["machine"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "example": {k: task["samples"][0][k] for k in ("question", "answer", "prediction") if k in task["samples"][0]},
    }


@cache
def _question_alone(base: str, questions: int) -> dict[str, Any]:
    from opticnerve import recipe as recipes
    from opticnerve.data.dataset.load import fixed_sample, load_data
    from opticnerve.evaluation.metrics import summarise
    from opticnerve.evaluation.tasks import score_answers, usual_answers

    row = next(r for r in ROWS if r.base == base and not r.change)
    recipe = recipes.load(ROOT / "recipes" / f"{base}.yaml", row.overrides({**BUDGET, "questions": questions}))
    [task] = recipe.evaluate
    asked = fixed_sample(load_data(task.data), task.sample)
    known = (c for spec in recipe.stages[-1].data for c in load_data(spec))
    right = score_answers(asked, usual_answers(known, asked, otherwise=""))
    return dict(summarise(right))


def question_alone(row: Row, budget: dict[str, Any]) -> dict[str, Any]:
    """The score of a reader who knows each question's most frequent answer in the training data and never looks.

    What a part must beat to have shown that it sees, or hears.
    """
    return _question_alone(row.base, int(budget["questions"]))


def blind(found: dict[str, Any]) -> bool:
    """Whether the interval of a row's accuracy reaches down to that score."""
    return bool(found["ci95"][0] <= found["question_alone"]["accuracy"])


def identity(row: Row, budget: dict[str, Any]) -> dict[str, Any]:
    """What a result belongs to: another change or budget makes it void."""
    return {"base": row.base, "change": list(row.change), "also": row.also, "budget": json.loads(json.dumps(budget))}


def run_all(
    rows: Sequence[Row], budget: dict[str, Any], results: dict[str, Any], keep: Callable[[dict[str, Any]], None]
) -> list[str]:
    """Run the rows one after the other; what fails is noted and named, and the next one runs."""
    failed = []
    for row in rows:
        print(f"{row.kind:<16}{row.name:<18}", end="", flush=True)
        same = next((r for r in results.values() if identity(row, budget).items() <= r.items()), None)
        try:
            # The starter's own parts stand in four rows and are one run.
            results[row.name] = {**identity(row, budget), **(same or run(row, budget))}
        except Exception as e:  # whatever it is, the other rows are worth their time
            results.pop(row.name, None)
            failed.append(f"{row.name}: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}")
            print("failed:", failed[-1])
        else:
            found = results[row.name]
            low, high = found["ci95"]
            print(f"{found['accuracy']:6.1%}  ({low:.1%} to {high:.1%})  {found['seconds']:.0f} s", flush=True)
        keep(results)
        shutil.rmtree(WORK / row.name, ignore_errors=True)
    return failed


# -- the table --------------------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """Markdown of the rows that have a result, with what a reader must know to judge them."""
    shown = [(row, results[row.name]) for row in ROWS if row.name in results]
    if not shown:
        return "No row has been measured yet.\n"
    first = next((found for row, found in shown if row.base == "starter"), shown[0][1])
    (align, captions), (instruct, pictures) = first["budget"]["align"], first["budget"]["instruct"]
    always, machine = first["most_frequent_answer"], first["machine"]
    lines = [
        f"Each row is `recipes/starter.yaml` with the change in its line: {align} steps of {captions} captions, then "
        f"{instruct} steps of {pictures} pictures with four questions each, then {first['n']} test questions, the same "
        "for all, with the 95 % interval of the accuracy. So little training compares beginnings, not what a part can "
        "do. † marks rows that are not surely above what the questions alone give away: they train and answer, but "
        "have not shown under this budget that they look. *From scratch*: the weights named there were random at the "
        "start and trained along; such a row says nothing of the part's pretrained form. Whisper has data of its own, "
        "those of `recipes/starter-audio.yaml`; frames of a video are pictures. "
        f"Measured with {first['threads']} of {machine['cores']} cores ({machine['cpu']}), torch {first['torch']}, "
        f"transformers {first['transformers']}, by `python benchmarks/parts.py`.",
        "",
        "| kind | part | change | accuracy | tokens a piece | connector and fusion | all that trains | seconds |",
        "|---|---|---|---|---|---|---|---|",
        f"| baseline | always “{always['answer']}”, the most frequent answer | | {percent(always)} | | | | |",
        "| baseline | the question alone: its most frequent answer in the training data, no look at the picture | | "
        f"{percent(first['question_alone'])} | | | | |",
    ]
    for row, found in shown:
        change = "; ".join(c.replace("'{random}/", "'…/").replace("{random}/", "…/") for c in row.change)
        scratch = f" *({row.scratch} from scratch)*" if row.scratch else ""
        rival = found["most_frequent_answer"]
        guess = percent(found["question_alone"])
        alone = (
            f"; always “{rival['answer']}” {percent(rival)}, the question alone {guess}"
            if row.base != "starter"
            else ""
        )
        tokens = str(found["tokens"]) + ("" if found["in_text"] > 1 else f", {found['in_text']} of them in the text")
        score = f"{percent(found)}{' †' if blind(found) else ''}{alone}"
        lines.append(
            f"| {row.kind} | {row.title}{scratch} | {f'`{change}`' if change else ''} | {score} | {tokens} | "
            f"{found['connector']:,} | {found['trained']:,} | {found['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def percent(found: dict[str, Any]) -> str:
    low, high = found["ci95"]
    return f"{found['accuracy']:.1%} ({low:.0%}–{high:.0%})"


def write_table(document: Path, results: dict[str, Any]) -> None:
    """Put the table between the markers.

    Raises:
        SystemExit: the document has no markers.
    """
    text = document.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{document} wants one {BEGIN} and one {END}")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    document.write_text(f"{before}{BEGIN}\n\n{table(results)}\n{END}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="names, with commas: these alone, also where there is a result")
    parser.add_argument("--quick", action="store_true", help="a few steps; prints, and writes no file")
    parser.add_argument("--table", action="store_true", help="run nothing: write the table from benchmarks/parts.json")
    asked = parser.parse_args(arguments)
    budget = QUICK if asked.quick else BUDGET
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() and not asked.quick else {}
    results = {r.name: results[r.name] for r in ROWS if r.name in results}
    for row in ROWS:
        if row.name in results and "question_alone" not in results[row.name]:  # kept by an earlier version
            results[row.name]["question_alone"] = question_alone(row, results[row.name]["budget"])
    wanted = asked.rows.split(",") if asked.rows else [r.name for r in ROWS]
    if unknown := sorted(set(wanted) - {r.name for r in ROWS}):
        parser.error(f"no such row: {', '.join(unknown)}; the rows: {', '.join(r.name for r in ROWS)}")

    def current(row: Row) -> bool:
        return row.name in results and identity(row, budget).items() <= results[row.name].items()

    rows = [r for r in ROWS if r.name in wanted and (asked.rows or not current(r))]

    def keep(found: dict[str, Any]) -> None:
        if not asked.quick:
            partial = RESULTS.with_suffix(".tmp")
            partial.write_text(json.dumps(found, indent=1, default=str) + "\n")
            partial.replace(RESULTS)

    failed = [] if asked.table else run_all(rows, budget, results, keep)
    if asked.table:
        keep(results)
    if asked.quick:
        print(table(results))
    else:
        write_table(DOCUMENT, results)
    for problem in failed:
        print(problem, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
