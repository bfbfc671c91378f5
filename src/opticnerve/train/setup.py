"""All that must stand before a stage's first step: what trains and what is frozen, the data, the features
of frozen encoders, calibrated connectors, the strategy, and the state to go on from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from transformers import PreTrainedModel

from opticnerve import registry
from opticnerve.common import atomic, private_names
from opticnerve.common.shards import to_device
from opticnerve.data.dataset.bad_samples import BadSampleCounter
from opticnerve.data.dataset.dataset import NO_MEDIA, Example
from opticnerve.data.dataset.load import load_examples, load_streams
from opticnerve.distributed.collectives import barrier, on_main, sequence_parallel
from opticnerve.features.store import see_all
from opticnerve.language.chat_template import stage_template
from opticnerve.language.layers import context_length, decoder_layers
from opticnerve.language.quantization import quantized_layers
from opticnerve.models.family import Family, FamilyModel
from opticnerve.models.freeze import Frozen, freeze
from opticnerve.models.vlm.tower import check_options
from opticnerve.objectives.base import Objective
from opticnerve.ops.fused_layers import fuse_layers
from opticnerve.ops.kernels import functions_for
from opticnerve.ops.offload import offload_encoder
from opticnerve.ops.varlen import attention_by
from opticnerve.recipe import CacheSpec, LoraSpec, Recipe, Stage
from opticnerve.train import checkpoint
from opticnerve.train.calibrate import calibrate
from opticnerve.train.memory import checkpoint_layers, give_memory_back, recomputed_layers
from opticnerve.train.metrics import METRICS, steps_in
from opticnerve.train.precheck import Notes, fingerprint, precheck, samples_to_check
from opticnerve.train.sampler import Collate, StageSampler, StreamingSampler
from opticnerve.train.state import TrainState
from opticnerve.train.strategy import Strategy, make_strategy
from opticnerve.train.validation import HeldOut, Score, Validation, held_out_stage
from opticnerve.types import MediaProcessor, OpticNerveError

BACKEND = "inductor"
_LOOKED_AT = 32  # rows of a stream


@dataclass
class StageSetup:
    """A stage that is ready for its next step."""

    dock: Family
    stage: Stage
    folder: Path
    accelerator: Accelerator
    console: Console | None
    frozen: Frozen
    skipped: BadSampleCounter
    sampler: StageSampler
    strategy: Strategy
    state: TrainState

    @property
    def steps_before(self) -> int:
        """Steps of the stages before this one: a tracker's axis goes on."""
        mine = _number_of(self.folder)
        return sum(steps_in(f) for f in self.folder.parent.glob(f"*/{METRICS}") if _number_of(f.parent) < mine)

    def emit(self, what: str) -> None:
        """Say something, once."""
        if self.accelerator.is_main_process:
            (self.console.print if self.console is not None else print)(what)

    @contextmanager
    def fast_layers(self) -> Iterator[None]:
        """Within it, the layers compute in the ways that the stage asks for; after it, the model is in `eval()`."""
        try:
            with contextlib.ExitStack() as stack:
                stage, model, device = self.stage, self.strategy.model, self.accelerator.device
                if model.language_model is not None:
                    functions, name = functions_for(device, stage.kernels, layers_compiled=stage.compile)
                    required = stage.kernels is not None
                    stack.enter_context(fuse_layers(model.language_model, functions, required=required))
                    if device.type == "cuda":
                        self.emit(f"norms and gated MLPs by {name}")
                elif stage.kernels is not None:
                    raise OpticNerveError("kernels is for docked language models; leave it out", kind="unsupported")
                stack.enter_context(attention_by(model.language_model, self.stage.attention))
                if self.stage.compile:
                    stack.enter_context(compiled_layers(model))
                give_memory_back()
                yield
        finally:
            self.dock.model.eval()
            if self.stage.gradient_checkpointing:
                private_names.keep_activations(self.dock.model.language_model)


def set_up(
    dock: Family, recipe: Recipe, stage: Stage, folder: Path, accelerator: Accelerator, *, trained: set[str],
    resume: bool, console: Console | None = None, score: Score | None = None,
) -> StageSetup:  # fmt: skip
    """Make a stage ready for its first step, or, where it goes on from a checkpoint, for the step after that.

    Args:
        trained: names of parameters that earlier stages trained; this stage's are added to it.
        score: asks an entry of `evaluate`, where `validate.metric` names one.

    Raises:
        OpticNerveError: anything in the recipe, the data or the folder that a user can put right.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    model, processor, stage = dock.model, dock.processor, within_context(stage, dock.model)

    check_boxes(stage, model)

    # What trains, and what is frozen.
    give_lora(dock, stage)
    frozen = freeze(model, stage.train)
    if stage.gradient_checkpointing:
        checkpoint_layers(model, recomputed_layers(model, stage.gradient_checkpointing))
    trained |= {n for group in frozen.groups.values() for n in group}
    objective = make_objective(stage, model)
    frozen = frozen.beside(objective.own_parameters(), objective.rate)
    if accelerator.is_main_process:
        atomic.clear_left_overs(folder)
        atomic.write_json(folder / "freeze.json", frozen.to_dict())
        if console is not None:
            console.print(frozen.table())

    # The data, of which the first samples are looked at.
    skipped = BadSampleCounter(stage.bad_samples, stage.name)
    sampler, data = make_sampler(
        stage, processor, seed=recipe.seed, accelerator=accelerator, skipped=skipped, console=console,
        collate=objective.collator(processor, stage, recipe.seed),
    )  # fmt: skip
    held_out = None
    if (spec := stage.validate) is not None and (spec.data or spec.split):
        held_out = make_held_out(stage, processor, objective, sampler)
        data |= {"held_out": held_out.fingerprint}
    to_device(objective, accelerator.device)
    if stage.cache_features:
        seeing = [sampler] if held_out is None else [sampler, held_out.sampler]
        cache_features(model, processor, stage, seeing, accelerator, console)

    # Fresh connectors measure what they will get, the same on every process; then the weights may be shared out.
    going_on = resume and bool(checkpoint.checkpoints(folder))
    if not going_on:
        calibrate(model, sampler.whole())
    strategy = make_strategy(accelerator, objective, frozen, stage)
    if stage.cache_features and not strategy.spread:
        offload_encoder(model.image.encoder, folder, console)

    state = TrainState(strategy, sampler, data, folder)
    if spec is not None:
        state.validation = Validation(
            spec, strategy, held_out, seed=recipe.seed, moving=list(state.moving), score=score
        )  # fmt: skip
    ready = StageSetup(dock, stage, folder, accelerator, console, frozen, skipped, sampler, strategy, state)
    if going_on:
        whole = partial(checkpoint.newest_whole, folder, warn=ready.emit, most=steps_in(folder / METRICS))
        found = on_main(accelerator, whole)  # which hashes its files, for all
        assert found is not None
        state.load_state_dict(checkpoint.read(found, strategy.mesh), ready.emit)
    return ready


def _number_of(folder: Path) -> int:
    """Of a stage, which its folder's name begins with."""
    number, _, _ = folder.name.partition("-")
    return int(number) if number.isdigit() else 0


# -- the model --------------------------------------------------------------------------------------------------------


def make_objective(stage: Stage, model: FamilyModel) -> Any:
    """What the stage minimises, with the recipe's options."""
    spec = stage.objective
    cls = registry.objectives.get(spec.type)
    check_options("objective", spec.type, cls, spec.options)
    return cls(model, **spec.options)


def within_context(stage: Stage, model: PreTrainedModel) -> Stage:
    """No sample may be longer than the language model's context, whether the stage says so or not."""
    context = context_length(getattr(model.config, "text_config", None))
    if not context:
        return stage
    return stage.model_copy(update={"max_length": min(stage.max_length or context, context)})


def check_boxes(stage: Stage, model: PreTrainedModel) -> None:
    """Boxes are of the whole picture: who is shown its middle alone cannot learn them."""
    fit = getattr(getattr(getattr(model, "image", None), "encoder", None), "fit", None)
    if fit == "crop" and (found := [spec.path for spec in stage.data if spec.boxes]):
        raise OpticNerveError(
            f"stage {stage.name}: {found[0]} has boxes of whole pictures, of which the encoder is shown the middle "
            "(fit: crop); set model.image.encoder.fit to pad, squash or native",
            kind="conflict",
        )


def give_lora(dock: Family, stage: Stage) -> None:
    """Fresh adapters for the first stage that trains them; a later stage goes on with them and may not reshape them."""
    model: FamilyModel = dock.model
    for part in (model.full_name(p).removesuffix(".lora") for p in stage.train if p.endswith(".lora")):
        options, known = (stage.lora or LoraSpec()).options(part), model.adapters.get(part)
        if known is None:
            model.give_lora(options, part)
            if part == "language":
                dock.lora = options
        elif stage.lora is not None and options != known:
            raise OpticNerveError(
                f"stage {stage.name}: lora is {options}, but an earlier stage's adapter on {part} is {known}; leave "
                "lora out to go on with it, or merge it and start another recipe",
                kind="conflict",
            )


@contextmanager
def compiled_layers(model: FamilyModel) -> Iterator[None]:
    """Within it, each layer of the language model runs compiled: one graph serves all layers and all lengths."""
    if model.language_model is None:
        raise OpticNerveError("compile is for docked language models; leave it out", kind="unsupported")
    if quantized_layers(model.language_model):
        raise OpticNerveError("compile was not tried over quantised weights; leave it out", kind="unsupported")
    _, layers = decoder_layers(model.language_model)
    for layer in layers:
        layer.compile(dynamic=True, backend=BACKEND)
    try:
        yield
    finally:
        for layer in layers:
            private_names.undo_compile(layer)


# -- the data ---------------------------------------------------------------------------------------------------------


def make_sampler(
    stage: Stage, processor: MediaProcessor, *, seed: int, accelerator: Accelerator, skipped: BadSampleCounter,
    collate: Collate | None, console: Console | None = None,
) -> tuple[StageSampler, dict[str, Any]]:  # fmt: skip
    """The samples of a stage, and the fingerprint of its data. The first samples are looked at.

    Args:
        skipped: is told bad samples, where the stage's `bad_samples` does not refuse them.
        console: gets a warning where no sample has a picture or a sound.

    Raises:
        DataError: a sample is bad and the stage refuses it, or data cannot be read at all.
    """
    on_error = skipped.__call__ if stage.bad_samples != "refuse" else None  # the counter itself is false while empty
    template, notes, check = stage_template(stage.template, processor.tokenizer), Notes(), samples_to_check(stage)
    sharing = sequence_parallel()  # those that share a sequence read the same rows
    options: dict[str, Any] = {
        "seed": seed, "rank": accelerator.process_index // sharing, "world": accelerator.num_processes // sharing,
        "template": template,
        "collate": collate, "on_error": on_error,
    }  # fmt: skip
    if stage.data[0].streaming:
        streaming = StreamingSampler(load_streams(stage, seed=seed), stage, processor, **options)
        if stage.data[0].limit is not None and len(stage.data) == 1:
            skipped.of(stage.data[0].limit)
        streaming.check(check)
        sampler: StageSampler = streaming
        has_media = any(c.pieces for v in range(_LOOKED_AT) for c in sampler.drawn(v))
    else:
        split = stage.validate.split if stage.validate is not None else None
        loaded = load_examples(stage.data, on_error=on_error, split=split)
        has_media = loaded.with_media() > 0
        skipped.of(loaded.samples() + len(skipped))
        examples = precheck(
            loaded, processor, stage, template=template, on_error=on_error, collate=collate, check=check, notes=notes
        )
        sampler = StageSampler(examples, stage, processor, lengths=notes.lengths, **options)
    if console is not None and not has_media:
        console.print(f"[bold red]warning:[/] stage {stage.name}: {NO_MEDIA}", soft_wrap=True, highlight=False)
    return sampler, fingerprint(sampler, notes)


def make_held_out(stage: Stage, processor: MediaProcessor, objective: Objective, sampler: StageSampler) -> HeldOut:
    """What the stage's `validate` holds out, looked at as the data that it trains on.

    Raises:
        DataError: a sample is bad and the stage refuses it. OpticNerveError: nothing is held out.
    """
    spec, held = stage.validate, held_out_stage(stage, objective)
    assert spec is not None
    on_error = None if stage.bad_samples == "refuse" else lambda e: sampler.leave_out([e])
    examples: Sequence[Example] = load_examples(held.data, on_error=on_error, split=spec.split, held_out=True)
    notes = Notes()
    examples = precheck(
        examples, processor, held, template=sampler.template, on_error=on_error, collate=sampler.own_collate,
        check=samples_to_check(held), notes=notes,
    )  # fmt: skip
    # A collator of its own, for that of the stage may hold what it has seen.
    held_sampler = StageSampler(
        examples, held, processor, seed=sampler.seed, rank=sampler.rank, world=sampler.world,
        template=sampler.template, collate=objective.collator(processor, held, sampler.seed), on_error=on_error,
    )  # fmt: skip
    made = HeldOut(held_sampler, whole_batches=objective.in_batch)
    made.fingerprint = fingerprint(held_sampler, notes)
    return made


def cache_features(
    model: FamilyModel, processor: MediaProcessor, stage: Stage, samplers: Sequence[StageSampler],
    accelerator: Accelerator, console: Console | None,
) -> None:  # fmt: skip
    """Have the frozen vision encoder see all pictures of the stage once, and the samplers take what it saw."""
    spec = stage.cache_features if isinstance(stage.cache_features, CacheSpec) else CacheSpec()
    [sampler, *_] = samplers
    pictures = [picture for each in samplers for picture in each.pictures()]
    store = see_all(
        model, processor, pictures, budget=spec.budget, stored=spec.dtype,
        rank=accelerator.process_index, world=accelerator.num_processes, wait=lambda: barrier(accelerator),
        threads=stage.workers or None, on_error=sampler.on_error, console=console,
    )  # fmt: skip
    for each in samplers:
        each.collate.features = store
