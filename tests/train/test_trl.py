"""TRL's trainers on a docked model, as its users call them: the first loss is ours, and it falls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from opticnerve.data.collators.next_token import Collator
from opticnerve.data.encode.packing import pack
from opticnerve.data.encode.tokenize import encode
from opticnerve.language.chat_template import CHATML
from opticnerve.models import OpticNerveForConditionalGeneration, OpticNerveProcessor
from opticnerve.models.vlm.build import dock
from opticnerve.objectives.next_token import NextToken
from opticnerve.types import Conversation, ImagePart, Message, TextPart

trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets")
# TRL and transformers tell each other of names that will go; a user of either cannot change that.
pytestmark = [
    pytest.mark.usefixtures("private_cache"), pytest.mark.slow, pytest.mark.filterwarnings("default"),
]  # fmt: skip
P = [tiny.picture(i) for i in range(8)]
WORDS = ["red", "blue", "yes", "no"]


@pytest.fixture(params=["splice", "cross_attention"])
def saved(request: pytest.FixtureRequest, vision_folder: Callable[..., str], tmp_path: Path) -> Path:
    """A self-contained folder, as users have one."""
    language = tiny.save_language(tmp_path / "language", "llama", chat_template=CHATML)
    made = dock(vision_folder("clip_vision_model"), "mlp", str(language), fusion=request.param)
    made.model.save_pretrained(tmp_path / "dock")
    made.processor.save_pretrained(tmp_path / "dock")
    return tmp_path / "dock"


def user(i: int, picture: bool = True) -> dict[str, Any]:
    shown = [{"type": "image"}] if picture else []
    return {"role": "user", "content": [*shown, {"type": "text", "text": f"what is it {i}?"}]}


def said(word: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": word}]}


RECORDS: dict[str, Callable[[int], dict[str, Any]]] = {
    "messages": lambda i: {"images": [P[i]], "messages": [user(i), said(WORDS[i % 4])]},
    "prompt and completion": lambda i: {"images": [P[i]], "prompt": [user(i)], "completion": [said(WORDS[i % 4])]},
    "text alone": lambda i: {
        "messages": [{"role": "user", "content": f"what is {i}?"}, {"role": "assistant", "content": WORDS[i % 4]}]
    },
    "preferences": lambda i: {
        "images": [P[i]], "prompt": [user(i)], "chosen": [said(WORDS[i % 4])], "rejected": [said(WORDS[(i + 1) % 4])],
    },
}  # fmt: skip


def trainer(cls: str, folder: Path, records: str, out: Path, *, adapter: bool = False, **options: Any) -> Any:
    """One of TRL's trainers on six steps of two records."""
    from peft import LoraConfig

    config = {
        "output_dir": str(out), "per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 1e-2,
        "report_to": "none", "logging_steps": 1, "use_cpu": True, "bf16": False, "disable_tqdm": True,
        "save_strategy": "no", "max_length": None, "shuffle_dataset": False, **options,
    }  # fmt: skip
    taken = {k: v for k, v in config.items() if k in getattr(trl, f"{cls}Config").__dataclass_fields__}
    lora = LoraConfig(r=4, target_modules="all-linear", exclude_modules=r".*(image|lm_head).*") if adapter else None
    return getattr(trl, f"{cls}Trainer")(
        OpticNerveForConditionalGeneration.from_pretrained(folder),
        args=getattr(trl, f"{cls}Config")(**taken),
        train_dataset=datasets.Dataset.from_list([RECORDS[records](i) for i in range(8)]),
        processing_class=OpticNerveProcessor.from_pretrained(folder), peft_config=lora,
    )  # fmt: skip


def losses(made: Any) -> list[float]:
    made.train()
    return [line["loss"] for line in made.state.log_history if "loss" in line]


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "peft"])
@pytest.mark.parametrize("records", ["messages", "prompt and completion", "text alone"])
def test_sft(saved: Path, records: str, adapter: bool, tmp_path: Path) -> None:
    seen = losses(trainer("SFT", saved, records, tmp_path / "out", adapter=adapter))
    assert seen[-1] < seen[0]


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "peft"])
def test_dpo(saved: Path, adapter: bool, tmp_path: Path) -> None:
    """The first loss is log 2, for model and reference are the same: also where the adapter is switched off for it."""
    seen = losses(trainer("DPO", saved, "preferences", tmp_path / "out", adapter=adapter, learning_rate=1e-3))
    assert seen[0] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-5)
    assert len(seen) == 6


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "peft"])
def test_grpo(saved: Path, adapter: bool, tmp_path: Path) -> None:
    """A reward that any sample of a random model gets more or less of: the weights move, and no answer has `<image>`."""
    from peft import LoraConfig

    answers: list[str] = []

    def reward(completions: list[Any], **_: Any) -> list[float]:
        answers.extend(c[0]["content"] for c in completions)
        return [float(len(set(c[0]["content"]))) for c in completions]

    model = OpticNerveForConditionalGeneration.from_pretrained(saved)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    made = trl.GRPOTrainer(
        model, reward_funcs=reward,
        args=trl.GRPOConfig(
            output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, num_generations=4, max_completion_length=6,
            max_steps=2, learning_rate=1e-2, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=datasets.Dataset.from_list([{"image": P[i], "prompt": [user(i)]} for i in range(4)]),
        processing_class=OpticNerveProcessor.from_pretrained(saved),
        peft_config=LoraConfig(r=4, target_modules="all-linear", exclude_modules=r".*(image|lm_head).*") if adapter else None,
    )  # fmt: skip
    made.train()
    assert len(answers) == 8
    assert not any("<image>" in a for a in answers)
    moved = [n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])]
    assert bool(moved) != adapter  # with peft's adapter, nothing of the dock itself
    assert made.model.training


def test_the_first_loss_is_ours(saved: Path, tmp_path: Path) -> None:
    """Our batch through TRL's loss, and through ours."""
    processor = OpticNerveProcessor.from_pretrained(saved)
    asked = [
        Conversation((Message("user", (ImagePart(P[i]), TextPart(f"what is it {i}?"))), Message("assistant", (TextPart(w),))))
        for i, w in enumerate(WORDS[:2])
    ]  # fmt: skip
    batch = Collator(processor)([pack([[encode(a, processor)]]) for a in asked])
    made = trainer("SFT", saved, "messages", tmp_path / "out")
    made.model.eval()
    with torch.no_grad():
        total, count = NextToken(made.model)(batch)
        # Ours names the token that follows; transformers' labels stand where the token itself does.
        labels = torch.cat([torch.full_like(batch.targets[:, :1], -100), batch.targets[:, :-1]], 1)
        inputs = {
            "input_ids": batch.input_ids, "labels": labels, "pixel_values": batch.media["pixel_values"],
            "attention_mask": (batch.group >= 0).long(),
        }  # fmt: skip
        theirs = made.compute_loss(made.model, inputs)
        plain = made.model(**inputs).loss
    assert float(theirs) == pytest.approx(float(total / count), abs=1e-5)
    assert float(plain) == pytest.approx(float(total / count), abs=1e-5)
