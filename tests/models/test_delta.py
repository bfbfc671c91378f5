"""Invariant 6 for runs: what was trained, with references to what was not; the same logits again, or a refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import tiny
from errors import refused
from opticnerve.common.private_names import attention_of
from opticnerve.inference.generate import Answerer
from opticnerve.language.lora import add_lora, has_lora
from opticnerve.models import OpticNerveConfig, OpticNerveForConditionalGeneration
from opticnerve.models.checkpoint import delta
from opticnerve.models.vlm.build import Dock, merge
from opticnerve.types import OpticNerveError, ask

pytestmark = pytest.mark.usefixtures("private_cache")
LORA = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": "all-linear"}


def trained(made: Dock, *parts: str) -> Dock:
    """The dock after something has happened to the named parts."""
    if "language.lora" in parts:
        made.lora = dict(LORA)
        add_lora(made.model.language_model, LORA)
    torch.manual_seed(7)
    with torch.no_grad():
        for part in parts:
            for parameter in made.model.part_parameters(part).values():
                parameter.add_(0.1 * torch.randn_like(parameter))
        made.model.image.connector.output_scale.fill_(1.5)
    return made


def save(made: Dock, folder: Path, *parts: str) -> Path:
    names = {n for p in parts for n in made.model.part_parameters(p)}
    delta.save(made.model, folder, bases=made.bases, lora=made.lora, trained=names)
    made.processor.save_pretrained(folder)
    return folder


def logits(model: Any, processor: Any) -> torch.Tensor:
    batch = Answerer(model, processor).inputs(
        [ask("what is it?", tiny.picture(1)), ask("q", tiny.picture(2), tiny.picture(3))]
    )
    with torch.no_grad():
        return model(**batch).logits


PARTS = [
    ("connector",),
    ("connector", "language.lora"),
    ("connector", "encoder.last(1)", "language.last(1)"),
    ("connector", "encoder", "language"),
    ("connector", "language.embeddings"),
]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("parts", PARTS, ids="+".join)
def test_save_and_load(docked: Callable[..., Dock], tmp_path: Path, parts: tuple[str, ...], family: str) -> None:
    made = trained(docked(family), *parts)
    folder = save(made, tmp_path / "run", *parts)
    again = AutoModelForImageTextToText.from_pretrained(folder)
    ours, theirs = made.model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert torch.equal(logits(again, AutoProcessor.from_pretrained(folder)), logits(*made))
    assert not again.training
    held = set(load_file(folder / delta.TENSORS))
    wanted = {n for p in parts for n in made.model.part_parameters(p)}
    assert held == wanted | {n for n in ours if ".connector." in n}


@pytest.mark.parametrize("family", ["llama", "llama tied", "gpt2"])
@pytest.mark.parametrize("parts", PARTS[:2], ids="+".join)
def test_merge_makes_a_folder_of_its_own(
    docked: Callable[..., Dock], tmp_path: Path, parts: tuple[str, ...], family: str
) -> None:
    made = trained(docked(family), *parts)
    folder = save(made, tmp_path / "run", *parts)
    out = merge(folder, tmp_path / "merged")
    assert delta.find(out) is None
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert not has_lora(model.language_model)
    torch.testing.assert_close(logits(model, AutoProcessor.from_pretrained(out)), logits(*made), rtol=1e-4, atol=1e-5)
    with refused("exists-already", "merged"):
        merge(folder, out)


def test_batch_norm_statistics_of_a_trained_eye_travel(
    docked: Callable[..., Dock], timm_folder: Callable[..., str], tmp_path: Path
) -> None:
    made = docked("llama", {"type": "timm", "name": timm_folder(), "image_size": 96})
    for module in made.model.image.encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.add_(0.3)
            module.num_batches_tracked.add_(5)
    again = OpticNerveForConditionalGeneration.from_pretrained(save(made, tmp_path / "run", "connector", "encoder"))
    ours = made.model.state_dict()
    assert all(torch.equal(t, ours[n]) for n, t in again.state_dict().items())


class TestRefusals:
    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        """A run on bases of its own, which a test may spoil."""
        from opticnerve.language.chat_template import CHATML
        from opticnerve.models.vlm.build import dock

        language = tiny.save_language(tmp_path / "language", "llama", chat_template=CHATML)
        made = dock(tiny.save_vision(tmp_path / "vision"), "mlp", language)
        return save(trained(made, "connector", "language.lora"), tmp_path / "run", "connector", "language.lora")

    def load(self, run: Path) -> Any:
        return OpticNerveForConditionalGeneration.from_pretrained(run)

    def test_another_language_model(self, run: Path) -> None:
        tiny.save_language(run.parent / "language", "llama", seed=9)
        with refused("mismatch", "of language", "SHA-256"):
            self.load(run)

    def test_another_eye(self, run: Path) -> None:
        tiny.save_vision(run.parent / "vision", seed=9)
        with refused("mismatch", "of image", "SHA-256"):
            self.load(run)

    def test_the_same_weights_written_again(self, run: Path) -> None:
        from opticnerve.language.chat_template import CHATML

        tiny.save_language(run.parent / "language", "llama", chat_template=CHATML)
        self.load(run)

    def edit(self, run: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        tensors = load_file(run / delta.TENSORS)
        change(tensors)
        save_file(tensors, run / delta.TENSORS, metadata={"format": "pt"})

    @pytest.mark.parametrize("name", ["image.connector.layers.2.bias", "image.connector.input_mean"])
    def test_a_missing_tensor(self, run: Path, name: str) -> None:
        self.edit(run, lambda t: t.pop(name))
        with refused("mismatch", name):
            self.load(run)

    def test_a_missing_adapter(self, run: Path) -> None:
        self.edit(run, lambda t: [t.pop(n) for n in list(t) if "lora_A" in n])
        with refused("mismatch", "lora_A"):
            self.load(run)

    def test_a_tensor_too_many(self, run: Path) -> None:
        self.edit(run, lambda t: t.update(stray=torch.ones(1)))
        with refused("mismatch", "stray"):
            self.load(run)

    def test_a_tensor_of_another_shape(self, run: Path) -> None:
        self.edit(run, lambda t: t.update({"image.connector.layers.2.bias": torch.ones(3)}))
        with refused("mismatch", "layers.2.bias", "(3,)", "(32,)"):
            self.load(run)

    def test_a_torn_file(self, run: Path) -> None:
        data = (run / delta.TENSORS).read_bytes()
        (run / delta.TENSORS).write_bytes(data[:100])
        with refused("damaged", "trained.safetensors", f"{int.from_bytes(data[:8], 'little'):,}", 100):
            self.load(run)

    def test_a_torn_reference(self, run: Path) -> None:
        (run / delta.REFERENCE).write_text('{"bases": {')
        with refused("damaged", "dock.json"):
            self.load(run)

    def change(self, run: Path, **values: Any) -> None:
        reference = json.loads((run / delta.REFERENCE).read_text())
        (run / delta.REFERENCE).write_text(json.dumps({**reference, **values}))

    def test_a_flipped_bit(self, run: Path) -> None:
        data = bytearray((run / delta.TENSORS).read_bytes())
        data[-3] ^= 1
        (run / delta.TENSORS).write_bytes(bytes(data))
        with refused("damaged", "trained.safetensors", "SHA-256", "dock.json"):
            self.load(run)

    def test_numbers_of_another_kind(self, run: Path) -> None:
        self.edit(run, lambda t: t.update({"image.connector.layers.2.bias": torch.ones(32, dtype=torch.int32)}))
        self.change(run, sha256=None)
        with refused("mismatch", "torch.int32", "torch.float32"):
            self.load(run)

    def test_a_list_that_says_another_shape(self, run: Path) -> None:
        reference = json.loads((run / delta.REFERENCE).read_text())
        self.change(run, tensors={**reference["tensors"], "image.connector.layers.2.bias": [31]})
        with refused("mismatch", "(32,)", "dock.json", "(31,)"):
            self.load(run)

    def test_no_reference_at_all(self, run: Path) -> None:
        (run / delta.REFERENCE).unlink()
        with refused("missing-file", "dock.json"):
            self.load(run)

    def test_a_newer_format(self, run: Path) -> None:
        self.change(run, format=delta.QUANTIZED_FORMAT + 1)
        with refused("mismatch", 2, 3, "dock.json"):
            self.load(run)

    def test_files_that_do_not_belong_together(self, run: Path) -> None:
        reference = json.loads((run / delta.REFERENCE).read_text())
        self.change(run, bases={**reference["bases"], "audio": {"name": None, "sha256": None}})
        with refused("mismatch", "config.json", "dock.json", "audio, image"):
            self.load(run)

    def test_a_base_of_which_nobody_can_tell(
        self, run: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No hash was recorded: said each time. A hash was, and there is no file to compare with: refused."""
        reference = json.loads((run / delta.REFERENCE).read_text())
        known = reference["bases"]["image"]["sha256"]
        reference["bases"]["image"]["sha256"] = None
        self.change(run, bases=reference["bases"])
        self.load(run)
        assert "the weights of image" in caplog.text
        assert "cannot be verified" in caplog.text
        reference["bases"]["image"]["sha256"] = known
        self.change(run, bases=reference["bases"])
        monkeypatch.setattr("opticnerve.encoders.hf_vision.weight_files", lambda folder: [])
        with refused("mismatch", "of image", "SHA-256"):
            self.load(run)

    def test_a_base_that_lost_a_tensor(self, run: Path) -> None:
        file = run.parent / "language/model.safetensors"
        tensors = load_file(file)
        tensors.pop("model.layers.1.mlp.up_proj.weight")
        save_file(tensors, file, metadata={"format": "pt"})
        with refused("mismatch", "model.layers.1.mlp.up_proj.weight"):
            self.load(run)

    @pytest.mark.parametrize("key", ["bases", "tensors", "dtype", "lora"])
    @pytest.mark.parametrize("value", [7, [], "torch", {"language": 3}])
    def test_a_reference_of_wrong_kinds(self, run: Path, key: str, value: Any) -> None:
        self.change(run, **{key: value})
        with pytest.raises(OpticNerveError):
            self.load(run)

    def test_versions_are_recorded(self, run: Path) -> None:
        import opticnerve

        reference = delta.read(run)
        assert reference["opticnerve"] == opticnerve.__version__
        assert reference["torch"] == torch.__version__
        assert reference["format"] == delta.FORMAT

    def test_a_reference_without_lora(self, run: Path) -> None:
        reference = json.loads((run / delta.REFERENCE).read_text())
        (run / delta.REFERENCE).write_text(json.dumps({**reference, "lora": None}))
        with refused("mismatch", "lora_A"):
            self.load(run)


def test_bf16_and_another_precision(docked: Callable[..., Dock], tmp_path: Path) -> None:
    made = trained(docked("llama", dtype=torch.bfloat16), "connector", "language.lora")
    folder = save(made, tmp_path / "run", "connector", "language.lora")
    again = OpticNerveForConditionalGeneration.from_pretrained(folder)
    assert again.language_model.dtype == torch.bfloat16
    assert torch.equal(logits(again, made.processor), logits(*made))
    assert OpticNerveForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).dtype == torch.float32


def test_a_gguf_file_within_a_folder_is_found_again(
    language_folder: Callable[..., str],
    vision_folder: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """(Dequantising itself is the starter's daily bread; here it is stood in for.)"""
    from opticnerve.language import load
    from opticnerve.models.vlm.build import dock

    (tmp_path / "base").mkdir()
    (tmp_path / "base/small.gguf").write_bytes(b"weights")
    monkeypatch.setattr(load, "_dequantised", lambda file: Path(language_folder("llama")))
    made = dock(vision_folder(), "mlp", {"name": str(tmp_path / "base"), "gguf_file": "small.gguf"})
    folder = save(made, tmp_path / "run", "connector")
    again = OpticNerveForConditionalGeneration.from_pretrained(folder)
    assert torch.equal(logits(again, made.processor), logits(*made))
    (tmp_path / "base/small.gguf").write_bytes(b"other weights")
    with refused("mismatch", "of language", "SHA-256"):
        OpticNerveForConditionalGeneration.from_pretrained(folder)


class TestKeywords:
    """What `from_pretrained` is given beside a run's folder is honoured, or refused by its name."""

    @pytest.fixture
    def run(self, docked: Callable[..., Dock], tmp_path: Path) -> Path:
        return save(trained(docked("llama"), "connector"), tmp_path / "run", "connector")

    def load(self, run: Path, **options: Any) -> Any:
        return delta.load(OpticNerveForConditionalGeneration, run, **options)

    def test_attention(self, run: Path) -> None:
        model = self.load(run, attn_implementation="eager")
        assert attention_of(model.config) == attention_of(model.language_model.config) == "eager"
        assert attention_of(self.load(run).language_model.config) == "sdpa"
        with refused("unsupported", "attn_implementation", "no_such"):
            self.load(run, attn_implementation="no_such")

    def test_report_and_older_names(self, run: Path) -> None:
        model, report = self.load(run, output_loading_info=True, torch_dtype=torch.bfloat16)
        assert model.dtype == torch.bfloat16
        assert not any(report.values())
        assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= set(report)

    def test_what_does_no_harm(self, run: Path) -> None:
        self.load(run, revision="main", cache_dir="x", local_files_only=True, token=None, low_cpu_mem_usage=True,
                  use_safetensors=True, _from_auto=True, subfolder="", trust_remote_code=None)  # fmt: skip

    @pytest.mark.parametrize(
        "options", [{"foo": 1}, {"quantization_config": {"load_in_4bit": True}}, {"config": "elsewhere"},
                    {"subfolder": "x"}, {"key_mapping": {"a": "b"}}],
    )  # fmt: skip
    def test_what_cannot_be(self, run: Path, options: dict[str, Any]) -> None:
        with refused("unsupported", *options):
            self.load(run, **options)

    def test_the_remedy_is_named(self, run: Path) -> None:
        with refused("unsupported", "opticnerve merge", run):
            self.load(run, foo=1)

    def test_a_configuration(self, run: Path) -> None:
        own = OpticNerveConfig.from_pretrained(run, attn_implementation="eager")
        assert attention_of(self.load(run, config=own).language_model.config) == "eager"
        own.image_token_id += 1
        with refused("mismatch", "image_token_id"):
            self.load(run, config=own)

    @pytest.mark.parametrize("device_map", ["cpu", "auto", torch.device("cpu"), {"": "cpu"}, "disk"], ids=str)
    def test_devices(self, run: Path, device_map: Any, tmp_path: Path) -> None:
        options: dict[str, Any] = {"device_map": device_map}
        if device_map == "disk":  # as much of it as can be
            options["device_map"] = {"image": "cpu", "language_model.lm_head": "cpu", "language_model.model": "disk"}
            options["offload_folder"] = tmp_path / "offload"
        model, processor = self.load(run, **options), AutoProcessor.from_pretrained(run)
        assert (next(model.language_model.model.parameters()).device.type == "meta") == (device_map == "disk")
        assert torch.equal(logits(model, processor), logits(self.load(run), processor))

    def test_devices_that_are_not(self, run: Path) -> None:
        with refused("unsupported", "device_map"):
            self.load(run, device_map={"image": "cpu", "language_model": "disk"})
