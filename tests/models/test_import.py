"""`opticnerve import`: what comes out, what is refused, and that nothing half-made stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import checkpoints
import tiny
from errors import refused
from opticnerve.cli.export import import_
from opticnerve.cli.guard import guarded
from opticnerve.data.encode.tokenize import encode
from opticnerve.inference.generate import Answerer
from opticnerve.inference.load import load_model
from opticnerve.models.import_hf import run as importing
from opticnerve.models.import_hf.run import import_checkpoint
from opticnerve.types import OpticNerveError, ask


def edit(folder: Path, change: Callable[[dict[str, Any]], None], file: str = "config.json") -> Path:
    """Change a JSON file of a checkpoint."""
    path = folder / file
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return folder


def edit_weights(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    return checkpoints.save_llava(tmp_path / "llava")


# -- what comes out -----------------------------------------------------------------------------------------------


def test_the_folder_stands_alone_and_names_no_other(llava: Path, tmp_path: Path) -> None:
    made = import_checkpoint(llava, tmp_path / "out")
    names = {f.name for f in made.folder.iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} <= names
    assert not any(str(tmp_path) in f.read_text() for f in made.folder.glob("*.json"))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["llava", "out"]
    kept = len(load_file(llava / "model.safetensors"))
    assert made.tensors == kept
    assert len(load_file(made.folder / "model.safetensors")) == kept + 4  # the connector's calibration


def test_the_placeholder_keeps_its_id_and_the_vocabulary_its_size(llava: Path, tmp_path: Path) -> None:
    made = import_checkpoint(llava, tmp_path / "out")
    source, config = tf.AutoConfig.from_pretrained(llava), tf.AutoConfig.from_pretrained(made.folder)
    assert config.image_token_id == source.image_token_id
    assert config.text_config.vocab_size == source.text_config.vocab_size


def test_generation_settings_are_kept(llava: Path, tmp_path: Path) -> None:
    import_checkpoint(llava, tmp_path / "out")
    assert tf.GenerationConfig.from_pretrained(tmp_path / "out").max_length == 77


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_keep_their_dtype_unless_another_is_asked_for(dtype: str, tmp_path: Path) -> None:
    source = checkpoints.save_llava(tmp_path / "llava", dtype=getattr(torch, dtype))
    made = import_checkpoint(source, tmp_path / "out")
    assert made.dtype == dtype
    state = load_file(made.folder / "model.safetensors")
    assert {str(t.dtype) for t in state.values() if t.is_floating_point()} == {f"torch.{dtype}"}
    wide = import_checkpoint(source, tmp_path / "wide", dtype="float32")
    assert wide.dtype == "float32"
    assert tf.AutoConfig.from_pretrained(wide.folder).dtype == torch.float32


def test_fewer_digits_on_request_are_compared_with_as_few(llava: Path, tmp_path: Path) -> None:
    made = import_checkpoint(llava, tmp_path / "out", dtype="bfloat16")
    assert made.dtype == "bfloat16"
    assert made.difference < 1e-5


def test_parts_with_more_digits_than_the_rest_are_noticed(llava: Path, tmp_path: Path) -> None:
    def mixed(state: dict[str, Any]) -> None:
        for name in state:
            if "lm_head" not in name:
                state[name] = state[name].half()

    edit_weights(edit(llava, lambda c: c.update(dtype="float16")), mixed)
    made = import_checkpoint(llava, tmp_path / "out")
    assert made.dtype == "float32"
    assert "more digits" in made.notes[0]
    head = load_file(made.folder / "model.safetensors")["language_model.lm_head.weight"]
    assert not torch.equal(head, head.half().float())


def test_their_chat_template_is_kept(llava: Path, tmp_path: Path) -> None:
    made = import_checkpoint(llava, tmp_path / "out")
    model, processor = load_model(made.folder, device="cpu")
    asked = ask("what is this?", tiny.picture())
    assert Answerer(model, processor).render(asked) == "USER: <image>\nwhat is this? ASSISTANT:"
    assert processor.chat_template.endswith(checkpoints.LLAVA_CHAT)
    # It ends no answer, with which nobody could train it on.
    assert len(made.notes) == 1
    assert "</s> is written behind each" in made.notes[0]
    learned = encode(ask("what is this?", tiny.picture(), answer="a dog"), processor)
    assert processor.tokenizer.decode([i for i in learned.labels if i >= 0]).strip() == "a dog</s>"


def test_without_a_chat_template_a_plain_one_is_put_in_and_said(tmp_path: Path) -> None:
    source = checkpoints.save_llava(tmp_path / "llava", chat_template=None, image_token="<picture>")
    made = import_checkpoint(source, tmp_path / "out")
    assert "no chat template" in made.notes[0]
    model, processor = load_model(made.folder, device="cpu")
    text = Answerer(model, processor).render(ask("what is this?", tiny.picture()))
    assert text == "USER: <picture>\nwhat is this?\nASSISTANT:"


def test_old_processors_are_told_what_the_model_knows(llava: Path, tmp_path: Path) -> None:
    forgotten = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
    edit(llava, lambda c: [c.pop(k) for k in forgotten], "processor_config.json")
    assert import_checkpoint(llava, tmp_path / "out").difference < 1e-5


def test_without_a_padding_token_the_end_token_serves(llava: Path, tmp_path: Path) -> None:
    edit(llava, lambda c: c.pop("pad_token"), "tokenizer_config.json")
    made = import_checkpoint(llava, tmp_path / "out")
    assert "</s> serves as one" in made.notes[0]
    assert load_model(made.folder, device="cpu")[1].tokenizer.pad_token == "</s>"


def test_an_imported_llava_answers(llava: Path, tmp_path: Path) -> None:
    model, processor = load_model(import_checkpoint(llava, tmp_path / "out").folder, device="cpu")
    asked = [ask("what is this?", tiny.picture()), ask("which of the two?", tiny.picture(1), tiny.picture(2))]
    assert len(Answerer(model, processor).answer(asked, max_new_tokens=4)) == 2


@pytest.mark.parametrize(
    ("save", "form"),
    [(checkpoints.save_blip2, "Question: what is this? Answer:"), (checkpoints.save_instructblip, "what is this?")],
)
def test_an_imported_blip_sees_the_picture_before_the_begin_token(
    save: Callable[[Path], Path], form: str, tmp_path: Path
) -> None:
    source = save(tmp_path / "source")
    made = import_checkpoint(source, tmp_path / "out")
    model, processor = load_model(made.folder, device="cpu")
    theirs = tf.AutoProcessor.from_pretrained(source)(tiny.picture(), text=form, return_tensors="pt")
    ours = Answerer(model, processor).inputs([ask("what is this?", tiny.picture())])
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
    if "qformer_input_ids" in theirs:
        assert ours["qformer_input_ids"].tolist() == theirs["qformer_input_ids"].tolist()
    assert any("before your words" in note for note in made.notes)
    learned = encode(ask("what is this?", tiny.picture(), answer="a dog"), processor)
    answer = processor.tokenizer.decode([i for i in learned.labels if i >= 0])
    assert answer.strip() == f"a dog{processor.tokenizer.eos_token}"
    assert Answerer(model, processor).answer([ask("what is this?", tiny.picture())], max_new_tokens=3)


# -- what is refused ----------------------------------------------------------------------------------------------


def save_config(folder: Path, config: Any) -> Path:
    """A configuration alone: a refusal must come before any weight is read."""
    config.save_pretrained(folder)
    return folder


def clip_llava(**options: Any) -> Any:
    return tf.LlavaConfig(vision_config=tiny.vision_config("clip_vision_model"), **options)


T5 = {"model_type": "t5", "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "encoder-decoder": (
        lambda: tf.Blip2Config(text_config=T5, image_token_index=3),
        ("unsupported", "t5", "encoder-decoder"),
    ),
    "vision tower": (lambda: tf.LlavaConfig(vision_config={"model_type": "pixtral"}), ("unsupported", "pixtral")),
    "other weights": (
        lambda: clip_llava(architectures=["BunnyPhiForCausalLM"]),
        ("unsupported", "BunnyPhiForCausalLM", "LlavaForConditionalGeneration"),
    ),
    "retrieval": (
        lambda: tf.Blip2Config(architectures=["Blip2ForImageTextRetrieval"], image_token_index=3),
        ("unsupported", "Blip2ForImageTextRetrieval"),
    ),
    "quantised": (
        lambda: clip_llava(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("unsupported", "llava", "quantised"),
    ),
    "no image token": (lambda: tf.Blip2Config(), ("unsupported", "image_token_index")),
    "words in the Q-Former": (
        lambda: tf.Blip2Config(qformer_config={"use_qformer_text_input": True}, image_token_index=3),
        ("unsupported", "Q-Former", "words' branch"),
    ),
    "other Q-Former": (
        lambda: tf.Blip2Config(qformer_config={"hidden_act": "relu"}, image_token_index=3),
        ("unsupported", "hidden_act relu", "gelu"),
    ),
    "other kind": (lambda: tf.VipLlavaConfig(), ("unsupported", "vipllava", "llava_next")),
    "both directions": (lambda: tf.PaliGemmaConfig(), ("unsupported", "paligemma", "both directions", "`language`")),
    "both directions, Gemma 3": (lambda: tf.Gemma3Config(), ("unsupported", "gemma3", "both directions")),
    "three dimensions": (lambda: tf.Qwen2VLConfig(), ("unsupported", "qwen2_vl", "M-RoPE", "qwen_vl")),
    "three dimensions, 2.5": (lambda: tf.Qwen2_5_VLConfig(), ("unsupported", "qwen2_5_vl", "M-RoPE")),
    "a perceiver": (lambda: tf.Idefics2Config(), ("unsupported", "idefics2", "perceiver")),
    "a budget of another kind": (
        lambda: tf.LlavaOnevisionConfig(vision_aspect_ratio="square"),
        ("unsupported", "vision_aspect_ratio", "square", "anyres_max_N"),
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_configurations_are_refused_before_weights_are_read(case: str, tmp_path: Path) -> None:
    make, refusal = REFUSED[case]
    with refused(*refusal):
        import_checkpoint(save_config(tmp_path / "source", make()), tmp_path / "out")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["source"]


def test_all_reasons_are_named_at_once(tmp_path: Path) -> None:
    config = tf.Blip2Config(text_config=T5, qformer_config={"hidden_act": "relu"})
    with pytest.raises(OpticNerveError) as error:
        import_checkpoint(save_config(tmp_path / "source", config), tmp_path / "out")
    assert all(word in str(error.value) for word in ("encoder-decoder", "relu", "image_token_index"))


def test_a_setting_that_transformers_itself_refuses(llava: Path, tmp_path: Path) -> None:
    edit(llava, lambda c: c.update(vision_feature_select_strategy="cls"))
    with refused("damaged", "vision_feature_select_strategy", "cls"):
        import_checkpoint(llava, tmp_path / "out")


def import_refused(source: Path, out: Path, *refusal: Any) -> None:
    with refused(*refusal):
        import_checkpoint(source, out)
    assert not out.exists()
    assert not list(out.parent.glob(".out*"))


def test_default_selection_of_tiles_needs_a_class_token(tmp_path: Path) -> None:
    source = checkpoints.save_llava_next(
        tmp_path / "llava", vision="siglip_vision_model", vision_feature_select_strategy="default"
    )
    import_refused(source, tmp_path / "out", "unsupported", 0, 1)


def test_tiles_side_by_side_have_no_room_for_a_class_token(tmp_path: Path) -> None:
    source = checkpoints.save_llava_next(tmp_path / "next", vision_feature_select_strategy="full")
    import_refused(source, tmp_path / "out", "unsupported", 1)


def test_pinpoints_must_agree(tmp_path: Path) -> None:
    source = checkpoints.save_llava_next(tmp_path / "next")
    edit(source, lambda c: c.update(image_grid_pinpoints=[[32, 64]]))
    import_refused(source, tmp_path / "out", "mismatch", "image_grid_pinpoints")


def test_budgets_must_agree(tmp_path: Path) -> None:
    source = checkpoints.save_llava_onevision(tmp_path / "onevision")
    edit(source, lambda c: c.update(vision_aspect_ratio="anyres_max_4"))
    import_refused(source, tmp_path / "out", "mismatch", "vision_aspect_ratio", "anyres_max_4", "anyres_max_3")


def test_the_image_token_must_agree(llava: Path, tmp_path: Path) -> None:
    edit(llava, lambda c: c.update(image_token_index=5))
    import_refused(llava, tmp_path / "out", "mismatch", 5, "<image>")


def test_unexpected_tensors_are_named(llava: Path, tmp_path: Path) -> None:
    edit_weights(llava, lambda s: s.update({"model.extra_projector.weight": torch.zeros(2)}))
    import_refused(llava, tmp_path / "out", "mismatch", "model.extra_projector.weight")


def test_missing_tensors_are_named(llava: Path, tmp_path: Path) -> None:
    edit_weights(llava, lambda s: [s.pop(n) for n in list(s) if n.endswith("linear_2.bias")])
    import_refused(llava, tmp_path / "out", "mismatch", "model.multi_modal_projector.linear_2.bias")


def test_a_checkpoint_that_does_not_run_in_transformers_is_refused(llava: Path, tmp_path: Path) -> None:
    edit(llava, lambda c: c.update(num_additional_image_tokens=0), "processor_config.json")
    import_refused(llava, tmp_path / "out", "damaged", "15", "512")


def test_a_checkpoint_without_processor_is_refused(llava: Path, tmp_path: Path) -> None:
    for file in llava.glob("*"):
        if file.name not in ("config.json", "model.safetensors", "generation_config.json"):
            file.unlink()
    import_refused(llava, tmp_path / "out", "damaged", "processor", "llava")


def test_a_language_model_that_ends_otherwise_is_caught_by_its_logits(tmp_path: Path) -> None:
    """transformers' LLaVA leaves out the cap that Gemma 2 puts on its logits."""
    source = checkpoints.save_llava(tmp_path / "llava", text="gemma2")
    import_refused(source, tmp_path / "out", "mismatch", "logits", "float32")


def test_a_language_model_with_other_tensors_is_refused(tmp_path: Path) -> None:
    source = checkpoints.save_llava(tmp_path / "llava", text="phi")
    import_refused(source, tmp_path / "out", "mismatch", "PhiForCausalLM", "lm_head.bias")


def test_logits_that_differ_leave_nothing_behind(llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = importing.record

    def nudged(model: Any, processor: Any, chosen: Any) -> None:
        record(model, processor, chosen)
        chosen[-1].logits[0, 0] += 2e-4

    monkeypatch.setattr(importing, "record", nudged)
    import_refused(llava, tmp_path / "out", "mismatch", 0.0002)


def test_a_folder_that_exists_is_left_alone(llava: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with refused("exists-already", "out"):
        import_checkpoint(llava, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_that_is_not_there_is_no_hub_name(tmp_path: Path) -> None:
    with refused("name", "nowhere"):
        import_checkpoint(tmp_path / "nowhere", tmp_path / "out")


def test_our_own_models_are_no_imports(llava: Path, tmp_path: Path) -> None:
    made = import_checkpoint(llava, tmp_path / "out")
    with refused("unsupported", "out", "opticnerve"):
        import_checkpoint(made.folder, tmp_path / "again")


def test_unknown_dtypes_are_refused(llava: Path, tmp_path: Path) -> None:
    with refused("unknown-name", "'int4'", "float32", "bfloat16", "float16"):
        import_checkpoint(llava, tmp_path / "out", dtype="int4")


def test_tensors_are_accounted_for_in_both_directions() -> None:
    theirs, ours = torch.nn.Module(), torch.nn.Module()
    theirs.a = ours.b = torch.nn.Linear(2, 2)
    assert importing.account(theirs, ours) == 2
    theirs.lost, ours.new = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(3, 3, bias=False)
    with refused("mismatch", "lost.weight", "new.weight"):
        importing.account(theirs, ours)


# -- the command --------------------------------------------------------------------------------------------------


def run(*arguments: Any) -> Any:
    app = typer.Typer()
    app.command()(guarded(import_))
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_command_says_what_it_made(tmp_path: Path) -> None:
    source = checkpoints.save_llava_next(tmp_path / "next", chat_template=None)
    result = run(source, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "llava_next: clip_vision_model × mlp × splice × tiling → mistral" in result.stdout
    assert "all accounted for" in result.stdout
    assert "note: the checkpoint has no chat template" in result.stdout


def test_the_command_as_json(llava: Path, tmp_path: Path) -> None:
    result = run(llava, tmp_path / "out", "--json")
    said = json.loads(result.stdout)
    assert said["model_type"] == "llava"
    assert said["max_abs_difference"] < 1e-5
    assert said["image"]["encoder"]["layer"] == -2


def test_the_command_refuses_with_a_message_and_exit_code_1(tmp_path: Path) -> None:
    source = save_config(tmp_path / "source", tf.VipLlavaConfig())
    result = run(source, tmp_path / "out")
    assert result.exit_code == 1
    assert "what can be imported" in result.stderr
