"""What one process of `gpu.py` measures: our training step, transformers' `Trainer`, and both ways to generate.

Both sides get the same samples as tensors that are there already: reading and decoding have a benchmark of their own
(`data.py`).
"""

from __future__ import annotations

import gc
import inspect
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import made_data
import shapes
import torch
from shapes import Shape, Trains
from side_by_side import Trial, profiled

POOL = 16
"""Pictures that the samples take in turn."""


@dataclass(frozen=True)
class Training:
    """A stage in small.

    Attributes:
        batch: samples of a step, in `accumulate` micro-batches. count: samples of the measured part.
        question, answer: least and most tokens of a sample's text beside the picture.
        pack: tokens of a packed row on our side; None for a sample a row.
        masters: what trains steps in float32: our masters; `Trainer` with float32 weights under bf16 autocast. Without,
            plain AdamW on bf16 weights, on both sides (our connectors and adapters have their masters always).
        layers: of the language model, where not all fit.
        checkpointing: of activations, on both sides.
        nf4: the language model's linear layers in 4 bits, by bitsandbytes on both sides.
        cached: the encoder's features are there already.
    """

    shape: str
    trains: Trains
    batch: int
    accumulate: int
    count: int
    question: tuple[int, int]
    answer: tuple[int, int]
    pack: int | None = None
    masters: bool = True
    layers: int | None = None
    checkpointing: bool = False
    nf4: bool = False
    cached: bool = False

    @property
    def sides(self) -> list[str]:
        """transformers has no feature cache, and no class for pictures in their own shape before a Qwen3."""
        ours_alone = self.cached or shapes.SHAPES[self.shape].vision_encoder.native
        return ["opticnerve"] if ours_alone else ["transformers", "opticnerve"]

    def shaped(self) -> Shape:
        shape = shapes.SHAPES[self.shape]
        return (
            shape
            if self.layers is None
            else replace(shape, language_part=replace(shape.language_part, layers=self.layers))
        )

    def samples(self) -> tuple[list[Any], list[Any]]:
        """For warming up, and for the measured part."""
        total = 2 * self.batch + self.count
        made = made_data.samples(self.shaped(), total, question=self.question, answer=self.answer)
        return made[: 2 * self.batch], made[2 * self.batch :]

    def flops(self, samples: Sequence[Any]) -> int:
        """What the measured part needs at least."""
        return shapes.flops(
            self.shaped(), lengths=[len(s.input_ids) for s in samples], supervised=sum(s.supervised for s in samples),
            images=len(samples), trains=self.trains, live_encoder=not self.cached,
        )  # fmt: skip


@dataclass(frozen=True)
class Generation:
    """`questions` greedy answers of `tokens` tokens, about a picture each, or all about one."""

    shape: str
    questions: int
    tokens: int
    one_picture: bool = False
    sides = ("transformers", "opticnerve")


def trial(
    side: str, work: Training | Generation, device: str, *, compiled: bool = False, profile: bool = False
) -> Trial:
    """One side's run of one row; `profile`: of ours one more training step, kernel by kernel."""
    if isinstance(work, Training):
        if side == "opticnerve":
            return _train_ours(work, device, compiled, profile)
        return _train_transformers(work, device, compiled)
    return _generate(side, work, device)


# -- training ---------------------------------------------------------------------------------------------------------


def _train_ours(work: Training, device: str, compiled: bool, profile: bool) -> Trial:
    from opticnerve.language.layers import decoder_layers
    from opticnerve.language.quantization import quantize
    from opticnerve.models.freeze import freeze
    from opticnerve.objectives.next_token import NextToken
    from opticnerve.ops.fused_layers import fuse_layers
    from opticnerve.train.optim import MasterAdamW
    from opticnerve.train.setup import checkpoint_layers

    shape = work.shaped()
    model = shapes.ours(shape, device=device)
    if work.nf4:
        quantize(model.language_model, "nf4", "language", f"{decoder_layers(model.language_model)[0]}.")
    if work.trains == "lora":
        model.give_lora(shapes.LORA)
    frozen = freeze(model, shapes.stage(work.trains))
    if work.checkpointing:
        checkpoint_layers(model)
    objective = NextToken(model)
    optimizer = MasterAdamW(frozen, betas=(0.9, 0.999), weight_decay=0.0) if work.masters else _Plain(frozen)
    if compiled:
        model.language_model.compile()
    pool = _Pool(shape, model.towers["image"] if work.cached else None)

    def step(samples: Sequence[Any]) -> None:
        size = len(samples) // work.accumulate
        batches = [_batch(samples[i : i + size], pool, work.pack) for i in range(0, len(samples), size)]
        supervised = sum(b.supervised for b in batches)
        for batch in batches:
            loss, _ = objective(batch.to(device))
            (loss / supervised).backward()
            optimizer.collect()
        optimizer.clip(1.0)
        optimizer.step(1.0)

    warm, measured = work.samples()
    with torch.no_grad():
        total, count = objective(_batch(warm[:2], pool, None).to(device))
    random.Random(0).shuffle(measured)
    with fuse_layers(model.language_model):
        for start in range(0, len(warm), work.batch):
            step(warm[start : start + work.batch])
        _start_counting(device)
        started = time.perf_counter()
        for start in range(0, len(measured), work.batch):
            step(measured[start : start + work.batch])
        _synchronise(device)
        seconds = time.perf_counter() - started
        done = _trained(work, seconds, measured, float(total / count))
        if profile:
            done.notes["profile"] = profiled(lambda: step(measured[: work.batch]), device)
    return done


def _batch(samples: Sequence[Any], pool: Any, budget: int | None) -> Any:
    from opticnerve.data.collators.next_token import Collator
    from opticnerve.data.encode.packing import fit, pack

    rows = [pack([[s]]) for s in samples]
    collator = Collator(SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0), reads_questions=False))
    batch = collator(rows if budget is None else fit(rows, budget))
    batch.media |= pool.media([int(i) % POOL for i in batch.ids])
    return batch


class _Pool:
    """What is shown of the pictures: pixels, patches in the pictures' own shapes, or a frozen encoder's features."""

    def __init__(self, shape: Shape, tower: Any = None) -> None:
        self.sizes = None
        side = shape.vision_encoder.image
        pixels = made_data.pixels(shape, POOL, torch.bfloat16)
        if shape.vision_encoder.native:
            wide = [(side, side), (side // 2, side * 2), (side * 2, side // 2)]
            self.sizes = torch.tensor([wide[i % len(wide)] for i in range(POOL)])
            pixels = pixels.view(POOL, shape.vision_encoder.tokens, -1)
        self.shown = pixels
        if tower is not None:
            with torch.no_grad():
                features = tower.encode(pixels, self.sizes)
            # In main memory, as the cache has them.
            self.shown = replace(features, tokens_BND=features.tokens_BND.cpu(), mask_BN=features.mask_BN.cpu())

    def media(self, which: list[int]) -> dict[str, Any]:
        if not isinstance(self.shown, torch.Tensor):
            rows = {"tokens_BND": self.shown.tokens_BND[which], "mask_BN": self.shown.mask_BN[which]}
            return {"image_features": replace(self.shown, **rows)}
        if self.sizes is None:
            return {"pixel_values": self.shown[which]}
        return {"pixel_values": self.shown[which].flatten(0, 1), "image_sizes": self.sizes[which]}


class _Plain:
    """AdamW on the bf16 weights themselves, as `Trainer` has it: 6 bytes a weight beside it, where masters take 14."""

    def __init__(self, frozen: Any) -> None:
        self.weights = [p for group in frozen.groups.values() for p in group.values()]
        self.adam = torch.optim.AdamW(self.weights, lr=2e-5, weight_decay=0.0, fused=True)

    def collect(self) -> None:
        """Gradients stay where autograd left them."""

    def clip(self, limit: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.weights, limit)

    def step(self, factor: float) -> None:
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)


def _train_transformers(work: Training, device: str, compiled: bool) -> Trial:
    """`Trainer` at its best settings: bf16 weights (or, for float32 steps, autocast), SDPA, fused AdamW, batches of
    like lengths."""
    import transformers as tf

    shape = work.shaped()
    model = shapes.llava(shape, device=device)
    if work.nf4:
        _in_4_bits(model.model.language_model.layers)
    model = shapes.open_llava(model, work.trains)
    autocast = work.masters and work.trains == "full"
    if autocast:
        model = model.float()
    pool = made_data.pixels(shape, POOL, torch.bfloat16)

    def collate(samples: Sequence[Any]) -> dict[str, Any]:
        longest = max(len(s["input_ids"]) for s in samples)

        def padded(key: str, value: int) -> Any:
            return torch.tensor([s[key] + [value] * (longest - len(s[key])) for s in samples])

        mask = torch.tensor([[1] * len(s["input_ids"]) + [0] * (longest - len(s["input_ids"])) for s in samples])
        pixels = pool[[s["picture"] for s in samples]]
        return {
            "input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask,
            "pixel_values": pixels,
        }  # fmt: skip

    def data(samples: Sequence[Any]) -> list[dict[str, Any]]:
        return [{"input_ids": s.input_ids, "labels": s.labels, "picture": int(s.id) % POOL} for s in samples]

    class Clock(tf.TrainerCallback):
        started = seconds = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            _start_counting(device)
            self.started = time.perf_counter()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            _synchronise(device)
            self.seconds = time.perf_counter() - self.started

    # transformers' name for it changed between the versions that a card's image may have.
    known = inspect.signature(tf.TrainingArguments).parameters
    again = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in known)

    def train(samples: Sequence[Any], folder: str) -> float:
        arguments = tf.TrainingArguments(
            folder, per_device_train_batch_size=work.batch // work.accumulate,
            gradient_accumulation_steps=work.accumulate, num_train_epochs=1, learning_rate=2e-5, weight_decay=0.0,
            max_grad_norm=1.0, optim="adamw_torch_fused", lr_scheduler_type="constant", bf16=autocast,
            train_sampling_strategy="group_by_length", **{again: work.checkpointing},
            torch_compile=compiled, use_cpu=device == "cpu", remove_unused_columns=False, save_strategy="no",
            logging_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        clock = Clock()
        tf.Trainer(model, arguments, data_collator=collate, train_dataset=data(samples), callbacks=[clock]).train()
        return clock.seconds

    warm, measured = work.samples()
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=autocast):
        first = model(**{k: v.to(device) for k, v in collate(data(warm[:2])).items()}).loss
    with tempfile.TemporaryDirectory() as folder:
        train(warm, folder)
        gc.collect()
        seconds = train(measured, folder)
    return _trained(work, seconds, measured, float(first))


def _in_4_bits(layers: torch.nn.Module) -> None:
    """As transformers' own `BitsAndBytesConfig` loads them, with the same blocks and doubly quantised scales."""
    import bitsandbytes as bnb

    for module in list(layers.modules()):
        for name, linear in module.named_children():
            if type(linear) is torch.nn.Linear:
                made = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias=linear.bias is not None,
                    compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4", device="meta",
                )  # fmt: skip
                weight = linear.weight.detach()
                made.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4")
                made.bias = linear.bias
                setattr(module, name, made.to(weight.device))


def _trained(work: Training, seconds: float, samples: Sequence[Any], loss: float) -> Trial:
    return Trial(
        seconds, len(samples), check=loss,
        notes={"flops": work.flops(samples), "tokens": sum(len(s.input_ids) for s in samples)},
    )  # fmt: skip


# -- generation -------------------------------------------------------------------------------------------------------


def _generate(side: str, work: Generation, device: str) -> Trial:
    from opticnerve.types import ask

    shape = shapes.SHAPES[work.shape]
    rng = random.Random(1)
    pictures = made_data.pictures(shape, 1 if work.one_picture else work.questions)
    words = [" ".join(f"w{rng.randrange(8, shape.language_part.vocabulary - 1)}" for _ in range(12)) for _ in range(99)]
    asked = [ask(words[i], pictures[i % len(pictures)]) for i in range(work.questions)]
    answer = (_answers_ours if side == "opticnerve" else _answers_transformers)(shape, asked, work, device)
    answer(4)
    _start_counting(device)
    seconds, texts = [], []
    for _ in range(3):
        _synchronise(device)
        started = time.perf_counter()
        texts = answer(work.tokens)
        _synchronise(device)
        seconds.append(time.perf_counter() - started)
    tokens = sum(len(t.split()) for t in texts)  # a word a token
    return Trial(sorted(seconds)[1], tokens, check=texts)


def _answers_ours(shape: Shape, asked: list[Any], work: Generation, device: str) -> Callable[[int], list[str]]:
    from opticnerve.inference.generate import Answerer

    answerer = Answerer(shapes.ours(shape, device=device), made_data.processor(shape))
    return lambda tokens: answerer.answer(asked, max_new_tokens=tokens, batch_size=len(asked))


def _answers_transformers(shape: Shape, asked: list[Any], work: Generation, device: str) -> Callable[[int], list[str]]:
    """All questions in one batch, each with its picture: how transformers is asked."""
    from opticnerve.types import ImagePart

    model, processor = shapes.llava(shape, device=device), made_data.processor(shape)
    chats = [[{"role": m.role, "content": [_part(p, ImagePart) for p in m.parts]} for m in c.messages] for c in asked]
    tokenizer = processor.tokenizer

    @torch.inference_mode()
    def answer(tokens: int) -> list[str]:
        inputs = processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(device, torch.bfloat16)  # fmt: skip
        out = model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        texts = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [t.strip() for t in texts]

    return answer


def _part(part: Any, image: type) -> dict[str, Any]:
    return {"type": "image", "image": part.source} if isinstance(part, image) else {"type": "text", "text": part.text}


# -- the device -------------------------------------------------------------------------------------------------------


def _synchronise(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def _start_counting(device: str) -> None:
    """From here on memory counts: a peak while weights were drawn is nobody's."""
    _synchronise(device)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
