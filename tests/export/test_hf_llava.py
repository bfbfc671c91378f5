"""`hf-llava`: what comes out, what is refused, and that the gate lets nothing wrong through."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import transformers as tf
from safetensors import safe_open

from errors import refused
from opticnerve.export import parity
from opticnerve.export.export import Exported, export
from opticnerve.export.hf import common as hf_common
from opticnerve.export.hf import llava

pytestmark = pytest.mark.usefixtures("private_cache")
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def clip(saved: Make, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The whole way, stock transformers in a process of its own included: bfloat16, adapter, calibration."""
    source = saved("llama", "clip_vision_model", layer=-2, lora={"rank": 4}, dtype=torch.bfloat16)
    return export(source, "hf-llava", tmp_path_factory.mktemp("clip") / "out")


def test_stock_transformers_gives_the_same_answers(clip: Exported) -> None:
    assert clip.proof is not None
    assert clip.proof.engine == f"transformers {tf.__version__}"
    assert clip.proof.samples == 5
    assert clip.proof.difference <= 1e-5
    assert 0 < clip.rounding < 0.1  # the adapter was added into bfloat16
    record = json.loads((clip.folder / "export.json").read_text())
    assert record["proof"]["difference"] == clip.proof.difference


def test_names_are_the_published_checkpoints(clip: Exported) -> None:
    with safe_open(clip.folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        kinds = {file.get_tensor(n).dtype for n in names}
    assert kinds == {torch.bfloat16}
    assert {n.split(".")[0] for n in names} == {"language_model", "vision_tower", "multi_modal_projector"}
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in names
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in names
    assert "language_model.lm_head.weight" in names
    assert not any("lora" in n for n in names)


def test_nothing_names_where_it_came_from(clip: Exported, tmp_path: Path) -> None:
    texts = [f.read_text() for f in clip.folder.glob("*.json")]
    assert not any(str(clip.folder.parent.parent) in t for t in texts)
    assert {f.name for f in clip.folder.parent.iterdir()} == {"out"}


def test_an_answer_ends_where_training_taught_it(clip: Exported) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(clip.folder)
    generation = tf.GenerationConfig.from_pretrained(clip.folder)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in generation.eos_token_id


@pytest.mark.usefixtures("in_this_process")
def test_siglip_behind_its_final_norm_with_one_matrix_and_other_pictures(saved: Make, tmp_path: Path) -> None:
    source = saved("qwen2", "siglip_vision_model", layer="last", connector="linear", image_size=48)
    made = export(source, "hf-llava", tmp_path / "out")
    assert made.proof is not None
    assert made.proof.difference <= 1e-5
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vision_config"]["tie_last_hidden_states"] is True
    assert config["vision_config"]["image_size"] == 48
    assert config["projector_hidden_act"] == "linear"


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("layer", ["last", -2])
def test_pixtral_sees_pictures_in_their_own_shape(layer: Any, saved: Make, tmp_path: Path) -> None:
    """Two pictures of different shapes in one prompt among the samples, none of them square."""
    made = export(saved("mistral", "pixtral", layer=layer, fit="native"), "hf-llava", tmp_path / "out")
    assert made.proof is not None
    assert made.proof.difference <= 1e-5
    assert any("ends of rows" in note for note in made.notes)
    processor = tf.AutoProcessor.from_pretrained(tmp_path / "out")
    assert isinstance(processor, tf.PixtralProcessor)
    wide = PIL.Image.new("RGB", (70, 30))
    ids = processor(images=wide, text=processor.image_token, return_tensors="pt")["input_ids"][0].tolist()
    assert ids == [processor.image_token_id] * 9 * 4  # patches of 8 px, rounded up


@pytest.mark.usefixtures("in_this_process")
def test_one_scaled_tensor_is_caught_and_nothing_stays(
    saved: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = llava.HFLlava.state

    def scaled(*args: Any, **kwargs: Any) -> dict[str, Any]:
        state = honest(*args, **kwargs)
        state["multi_modal_projector.linear_2.weight"] = state["multi_modal_projector.linear_2.weight"] * 1.01
        return state

    monkeypatch.setattr(llava.HFLlava, "state", scaled)
    with refused("mismatch", "sample 2 in transformers", "logits"):
        export(saved("llama", "clip_vision_model", layer=-2), "hf-llava", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"connector": {"type": "mlp", "depth": 3}}, "its mlp has 3 layers"),
        ({"connector": {"type": "pixel_shuffle"}}, "its connector is pixel_shuffle"),
        ({"connector": {"type": "resampler", "num_latents": 4}}, "its connector is resampler"),
        (
            {"connector": {"type": "resampler", "num_latents": 4}, "fusion": "cross_attention"},
            "its fusion is cross_attention",
        ),
        ({"tiling": {"type": "anyres"}}, "it cuts pictures into tiles"),
        ({"lora": {"rank": 2, "when": "media"}}, "lora.when: media"),
        ({"vision_encoder": "dinov2"}, "its vision encoder is a dinov2"),
        ({"vision_encoder": "siglip2_vision_model", "fit": "native"}, "makes each square but of a pixtral"),
        ({"vision_encoder": "pixtral", "fit": "squash"}, "in their own shape"),
        ({"vision_encoder": "pixtral", "fit": "native", "max_patches": 90}, "a budget of 1 to 90 patches"),
        ({"family": "gpt2"}, "no plain decoder"),
        ({"family": "gemma2"}, "final_logit_softcapping"),
    ],
)
def test_what_llava_cannot_hold_is_refused_with_a_way_out(
    options: dict[str, Any], reason: str, saved: Make, tmp_path: Path
) -> None:
    options = {"vision_encoder": "siglip_vision_model", **options}
    with refused("unsupported", reason, "nearest"):
        export(saved(**options), "hf-llava", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_taken_folder_an_unknown_format_and_an_unknown_dtype_are_refused(saved: Make, tmp_path: Path) -> None:
    from opticnerve.export.formats import Options

    with refused("exists-already", tmp_path):
        export("anything", "hf-llava", tmp_path)
    with refused("unknown-name", "'hf-lava'", "'hf-llava'"):
        export("anything", "hf-lava", tmp_path / "out")
    with refused("unknown-name", "'q8_0'", "auto, float32"):
        export("anything", "hf-llava", tmp_path / "out", options=Options(dtype="q8_0"))


def test_the_check_cannot_import_opticnerve() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import stock_transformers\n"
        "sys.meta_path.insert(0, stock_transformers.Barrier()); import opticnerve.types"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(parity.CHECKS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "it must load in stock transformers" in done.stderr


def test_an_engine_that_fails_says_why(tmp_path: Path) -> None:
    with refused("refused", "exit code 1") as failed:
        parity.run("llama_cpp", {}, tmp_path)
    assert "xllamacpp" in str(failed.value) or "KeyError" in str(failed.value)
    with refused("missing-file", tmp_path / "nowhere", "--check-python"):
        parity.run("llama_cpp", {}, tmp_path, python=tmp_path / "nowhere")


def test_a_lengthened_tables_rows_are_never_the_greedy_word() -> None:
    torch.manual_seed(0)
    table_VD = hf_common.lengthened(torch.randn(50, 8), 53)
    logits_BV = torch.randn(200, 8) @ table_VD.T
    assert table_VD.shape == (53, 8)
    assert int(logits_BV.argmax(-1).max()) < 50


def reference(**changes: Any) -> parity.Reference:
    torch.manual_seed(0)
    values = {"text": "hm", "ids": [1, 2], "pixels": torch.zeros(1, 3), "logits_KV": torch.randn(2, 5), "greedy": [3]}
    return parity.Reference(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"text": "hmm"}, "chat template writes 'hmm'"),
        ({"ids": [1, 3]}, "2 tokens for our 2, or others"),
        ({"pixels": torch.ones(1, 3)}, "pixels differ by up to 1"),
        ({"logits_KV": torch.full((2, 5), float("nan"))}, "logits differ by up to inf"),
        ({"greedy": [4]}, "the greedy answer is [4], ours [3]"),
    ],
)
def test_each_kind_of_difference_is_found(changes: dict[str, Any], problem: str) -> None:
    ours = reference()
    assert parity.compare_logits([ours], [vars(reference())], "it") == 0
    with refused("mismatch", problem):
        parity.compare_logits([ours], [vars(reference(**changes))], "it")


def test_tensors_out_of_place_are_listed() -> None:
    with refused("mismatch", "a.weight"):
        parity.check_loaded({"engine": "it", "problems": {"missing_keys": ["a.weight"]}})
