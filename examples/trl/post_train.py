"""Post-training of a dock by TRL: SFT, DPO, or GRPO with rewards that can be checked, on the starter's pictures.

    opticnerve train recipes/starter.yaml stages.1.steps=60 'evaluate=[]' --out runs/early
    python examples/trl/post_train.py grpo runs/early --out runs/grpo

Accuracy and image dependence are measured before and after: a model that is rewarded for right answers may learn to
give them blind, and accuracy alone would not notice. README.md beside this file has what came out.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from datasets import Image as ImageColumn
from rich.console import Console

from opticnerve.data.dataset.load import load_data
from opticnerve.evaluation.evaluate import evaluate_model
from opticnerve.evaluation.metrics import exact_match, normalise_answer
from opticnerve.inference.load import load_model
from opticnerve.recipe import DataSpec, EvaluateSpec
from opticnerve.types import Conversation

TRAINED = ("connector", "language.lora")  # as in the recipe's second stage; peft_config= would do as well
STEPS = {"sft": 100, "dpo": 60, "grpo": 60}
RATES = {"sft": 2e-3, "dpo": 2e-5, "grpo": 5e-5}


def main() -> None:
    """Measure, train, measure, save."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("method", choices=STEPS)
    asked.add_argument("model", help="a run's folder, or one of its stages")
    asked.add_argument("--out", type=Path, required=True)
    asked.add_argument("--steps", type=int)
    asked.add_argument("--learning-rate", type=float)
    asked.add_argument("--sample", type=int, default=500, help="test questions for the accuracy")
    given = asked.parse_args()

    model, processor = load_model(given.model)
    model.float()
    before = measure(model, processor, given.sample)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in {n for part in TRAINED for n in model.part_parameters(part)})
    questions = list(load_data(DataSpec(path="starter/easy-vqa/train-questions")))
    random.Random(0).shuffle(questions)
    options: dict[str, Any] = {
        "output_dir": str(given.out / "trainer"), "max_steps": given.steps or STEPS[given.method],
        "learning_rate": given.learning_rate or RATES[given.method], "lr_scheduler_type": "linear",
        "gradient_checkpointing": False, "report_to": "none", "logging_steps": 10, "use_cpu": True, "bf16": False,
        "save_strategy": "no",
    }  # fmt: skip
    trainer = TRAINERS[given.method](model, processor, questions, options)
    trainer.train()
    after, console = measure(model.eval(), processor, given.sample), Console()
    for words, found in (("before", before), ("after", after)):
        console.print(words, found, soft_wrap=True)
    model.save_pretrained(given.out)
    processor.save_pretrained(given.out)


def measure(model: Any, processor: Any, sample: int) -> str:
    """Accuracy on test questions, and on balanced ones with the right and with another picture."""
    spec = EvaluateSpec(
        name="easy-vqa test", data=DataSpec(path="starter/easy-vqa/test-questions"), sample=sample, image_dependence=200
    )
    found = evaluate_model(model, processor, [spec])
    [task], seen = found["tasks"], found["image_dependence"]
    low, high = task["ci95"]
    return (
        f"accuracy {task['accuracy']:.1%} ({low:.1%} to {high:.1%}, n {task['n']}); balanced questions, n {seen['n']}: "
        f"{seen['real']:.1%} with the picture, {seen['shuffled']:.1%} with another's"
    )


def records(questions: list[Conversation], count: int) -> Iterator[dict[str, Any]]:
    """As TRL wants them: pictures in a column, turns as messages."""
    for one in questions[:count]:
        [picture] = one.images
        words = one.prompt().messages[-1].text.strip()
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}
        yield {"images": [str(picture.source)], "prompt": [turn], "answer": one.answer}


def table(rows: Iterator[dict[str, Any]]) -> Dataset:
    """The rows with their pictures decoded when they are asked for."""
    return Dataset.from_list(list(rows)).cast_column("images", [ImageColumn()])


def said(answer: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def sft(model: Any, processor: Any, questions: list[Conversation], options: dict[str, Any]) -> Any:
    """Questions and answers; the answer alone is learned."""
    batch = 16
    rows = records(questions, batch * options["max_steps"])
    data = table({**{k: r[k] for k in ("images", "prompt")}, "completion": said(r["answer"])} for r in rows)
    config = trl.SFTConfig(**options, per_device_train_batch_size=batch, max_length=None)
    return trl.SFTTrainer(model, args=config, train_dataset=data, processing_class=processor)


def dpo(model: Any, processor: Any, questions: list[Conversation], options: dict[str, Any]) -> Any:
    """The right answer over another one that is given to the same kind of question."""
    batch, rng = 8, random.Random(0)
    answers = sorted({str(c.answer) for c in questions})

    def other(right: str) -> str:
        polar = right in ("yes", "no")
        return rng.choice([a for a in answers if a != right and (a in ("yes", "no")) == polar])

    rows = records(questions, batch * options["max_steps"])
    data = table(
        {**{k: r[k] for k in ("images", "prompt")}, "chosen": said(r["answer"]), "rejected": said(other(r["answer"]))}
        for r in rows
    )
    config = trl.DPOConfig(**options, per_device_train_batch_size=batch, max_length=None)
    return trl.DPOTrainer(model, args=config, train_dataset=data, processing_class=processor)


def exact(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 for the right answer."""
    return [float(exact_match(c[0]["content"], [a])) for c, a in zip(completions, answer, strict=True)]


def form(completions: list[Any], **_: Any) -> list[float]:
    """0.1 for a single word, which every answer here is."""
    return [0.1 * (len(normalise_answer(c[0]["content"]).split()) == 1) for c in completions]


def grpo(model: Any, processor: Any, questions: list[Conversation], options: dict[str, Any]) -> Any:
    """Answers drawn by the model itself, rewarded by rules."""
    batch, draws = 32, 8
    config = trl.GRPOConfig(
        **options, per_device_train_batch_size=batch, num_generations=draws, max_completion_length=6,
        temperature=1.0, beta=0.0, scale_rewards="group",
    )  # fmt: skip
    data = table(records(questions, batch // draws * options["max_steps"]))
    return trl.GRPOTrainer(
        model, reward_funcs=[exact, form], args=config, train_dataset=data, processing_class=processor
    )


TRAINERS = {"sft": sft, "dpo": dpo, "grpo": grpo}

if __name__ == "__main__":
    main()
