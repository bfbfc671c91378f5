"""Every ready recipe loads, and plans on the meta device: the hub's configurations are read, no weight, no network.

All are planned by one process of its own, in front of a hub cache that holds the configurations under
`tests/hub_configs` (as their repositories have them) and tiny tokenizers, so that the code that looks names up runs as
it is. Data files of the names that the recipes expect hold a few samples in the form that they are published in.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from opticnerve import recipe as recipes
from opticnerve.language.chat_template import CHATML
from opticnerve.starter.demo import recipe_path
from ready_data import data_folders

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
OURS = {
    "starter",
    "starter-full",
    "starter-audio",
    "starter-contrastive",
    "starter-fusion",
    "starter-preference",
    "starter-receipts",
    "photos",
}  # these need no hub
READY = sorted(p.stem for p in (ROOT / "recipes").glob("*.yaml") if p.stem not in OURS)
PLAN_ALL = """
import json, sys, traceback
from opticnerve import recipe
from opticnerve.plan import cost as plan_cost
from opticnerve.plan import plan
from opticnerve.data.dataset.load import load_data

# Room enough: whether a 7B model fits into this machine is not what is asked.
plan_cost.device = lambda: {"type": "cpu", "name": "", "cores": 1, "memory": 10**14, "free": 10**14}
plan.matmul_rate = lambda *a, **k: 1e12
found = {}

def look(path):
    loaded = recipe.load(path)
    made = plan.make(loaded)
    entry = made.to_dict()
    if made.sample is not None:
        entry["sample"] = {
            "text": made.processor.tokenizer.decode(made.sample.input_ids), "learned": made.sample.supervised
        }
        learned = [i for i, l in zip(made.sample.input_ids, made.sample.labels) if l != -100]
        entry["sample"]["answer"] = made.processor.tokenizer.decode(learned)
    entry["asked"] = [len(load_data(task.data)) for task in loaded.evaluate]
    return entry

for path in sys.argv[1:]:
    try:
        found[path] = look(path)
    except Exception:
        found[path] = {"error": traceback.format_exc()}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Known:
    """What is published about a model, and what follows from it by hand."""

    tokens: int  # soft tokens of a picture (of a tile, where it is tiled) or a window of sound
    encoder: int  # parameters
    language: int
    trains: tuple[tuple[str, ...], ...]  # of each stage
    connector: int | None = None
    placeholders: int | None = None
    shape: str = "3 × 336 × 336"
    width: int = 1024
    answer: str = "two cats on a sofa"
    modality: str = "image"
    warnings: tuple[str, ...] = field(default=())


def mlp(into: int, out: int, depth: int = 2) -> int:
    return (into + 1) * out + (depth - 1) * (out + 1) * out


# Language models' counts are those that the hub shows beside their weights; CLIP's and SigLIP's are timm's.
CLIP_336, CLIP_224, SO400M = 303_507_456, 303_179_776, 428_225_600
VICUNA, LLAMA_3, QWEN_HALF, QWEN_1_5, QWEN_7 = 6_738_415_616, 8_030_261_248, 494_032_768, 1_543_714_304, 7_615_616_512
ALIGN_AND_TUNE = (("image.connector",), ("image.connector", "language"))
WITH_EYE = (("image.connector",), ("image.connector", "image.encoder", "language"))
KNOWN = {
    "llava-1.5-7b": Known(576, CLIP_336, VICUNA, ALIGN_AND_TUNE, connector=20_979_712),
    "llava-llama-3-8b": Known(576, CLIP_336, LLAMA_3, ALIGN_AND_TUNE, connector=20_979_712),
    "llava-next-vicuna-7b": Known(
        576, CLIP_336, VICUNA, WITH_EYE, connector=20_979_712, warnings=("one picture takes 2,928 of the 4,096",)
    ),
    "siglip-so400m-qwen2.5-0.5b": Known(
        729, SO400M, QWEN_HALF, WITH_EYE, connector=mlp(1152, 896), shape="3 × 384 × 384", width=1152
    ),
    "siglip-so400m-qwen2.5-7b": Known(
        729, SO400M, QWEN_7, WITH_EYE, connector=mlp(1152, 3584), shape="3 × 384 × 384", width=1152
    ),
    "blip2-opt-2.7b": Known(
        32, 1_012_588_928, 2_651_596_800, (("image.connector",), ("image.connector",)), shape="3 × 224 × 224", width=1408
    ),
    "flamingo-qwen2.5-1.5b": Known(
        64, CLIP_224, QWEN_1_5, (("image.connector", "image.fusion"),) * 2, placeholders=1, shape="3 × 224 × 224"
    ),
    "prismatic-dinosiglip-7b": Known(
        729, 304_370_688 - 640 * 1024 + SO400M, VICUNA, (("image.connector", "language"),), connector=mlp(2176, 4096, 3),
        shape="3 × 384 × 384", width=2176,
    ),
    "fuyu-qwen2.5-1.5b": Known(
        256, 0, QWEN_1_5, (("image.connector", "language"),) * 2, connector=(2700 + 1) * 1536, shape="3 × 480 × 480",
        width=2700,
    ),
    "whisper-qwen2.5-1.5b": Known(
        300, 88_154_112, QWEN_1_5, (("audio.connector",),), connector=mlp(768, 1536), shape="80 × 3000", width=768,
        modality="audio",
    ),
    "llava-japanese": Known(
        729, SO400M, 407_896_064 + 1_459_718_144, ALIGN_AND_TUNE, connector=mlp(1152, 2048), shape="3 × 384 × 384",
        width=1152, answer="ソファの上の二匹の猫",
    ),
}  # fmt: skip


def hub_cache(home: Path) -> None:
    """`HF_HOME` as it stands after the configurations and tokenizers of the recipes' models have been fetched."""
    words = tiny.tokenizer(eos="</s>", bos="<s>", chat_template=CHATML)
    for file in sorted((ROOT / "tests" / "hub_configs").glob("*.json")):
        revision = "0" * 40
        repository = home / "hub" / f"models--{file.stem}"
        snapshot = repository / "snapshots" / revision
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(revision)
        for name, content in json.loads(file.read_text(encoding="utf-8")).items():
            (snapshot / name).write_text(json.dumps(content))
        words.save_pretrained(snapshot)


class Plans(dict[str, Any]):
    """Recipe → its plan; one that could not be made fails the test that asks for it, and no other."""

    def __getitem__(self, name: str) -> Any:
        plan = super().__getitem__(name)
        assert "error" not in plan, plan["error"]
        return plan


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Plans:
    """Recipe → its plan as a dict, with the first sample."""
    root = tmp_path_factory.mktemp("ready")
    hub_cache(root / "hf")
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}, **data_folders(root),
        "HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1", "OPTICNERVE_CACHE": str(root / "cache"),
    }  # fmt: skip
    paths = [str(recipe_path(name)) for name in READY]
    done = subprocess.run(
        [sys.executable, "-c", PLAN_ALL, *paths], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    made = json.loads(done.stdout.splitlines()[-1])
    return Plans({name: made[path] for name, path in zip(READY, paths, strict=True)})


def test_every_ready_recipe_is_known() -> None:
    assert set(READY) == set(KNOWN)


def part(plan: dict[str, Any], name: str) -> dict[str, Any]:
    [found] = [s for s in plan["shapes"] if s["part"] == name]
    return dict(found)


@pytest.mark.parametrize("name", READY)
def test_shapes_and_parameters_are_those_that_are_published(plans: Plans, name: str) -> None:
    plan, known = plans[name], KNOWN[name]
    tower = known.modality
    assert part(plan, "sound" if tower == "audio" else "picture")["output"] == known.shape
    encoder, connector = part(plan, f"{tower}.encoder"), part(plan, f"{tower}.connector")
    assert encoder["output"].endswith(f" × {known.width}")
    assert encoder["parameters"] == known.encoder
    assert int(connector["output"].split(" × ")[0]) == known.tokens
    if known.connector is not None:
        assert connector["parameters"] == known.connector
    placeholders = known.tokens if known.placeholders is None else known.placeholders
    assert int(part(plan, f"{tower}.fusion")["output"].split()[0]) == placeholders
    assert part(plan, "language")["parameters"] == known.language


@pytest.mark.parametrize("name", READY)
def test_what_trains_and_nothing_else(plans: Plans, name: str) -> None:
    found = [tuple(sorted(p["part"] for p in s["parts"] if p["trained"])) for s in plans[name]["stages"]]
    assert found == [tuple(sorted(parts)) for parts in KNOWN[name].trains]


@pytest.mark.parametrize("name", READY)
def test_no_warning_that_should_not_be_there(plans: Plans, name: str) -> None:
    warnings = [r["text"] for r in plans[name]["remarks"] if r["level"] == "warning"]
    # The data here are a handful of samples, of course.
    left = [w for w in warnings if "is larger than the data" not in w]
    assert len(left) == len(KNOWN[name].warnings), left
    assert all(any(expected in w for w in left) for expected in KNOWN[name].warnings)


@pytest.mark.parametrize("name", READY)
def test_the_first_sample_teaches_its_answer(plans: Plans, name: str) -> None:
    plan = plans[name]
    assert all(s["samples"] and not s["bad_samples"] for s in plan["stages"])
    assert plan["sample"]["answer"].strip().startswith(KNOWN[name].answer)
    assert plan["asked"] and all(plan["asked"])


@pytest.mark.parametrize("name", READY)
def test_a_caption_stage_shows_the_picture_alone(plans: Plans, name: str) -> None:
    """As LLaVA's `preprocess_plain`: what the user says in the data file has no place in it."""
    [first, *_] = yaml.safe_load(recipe_path(name).read_text(encoding="utf-8"))["stages"]
    text = plans[name]["sample"]["text"]
    asks = "What is" in text or "写真" in text or "Transcribe" in text
    alone = first.get("template") == "caption" or first.get("objective") == "qformer_pretraining"
    assert asks != alone


def test_the_q_former_is_bert_base_with_cross_attention(plans: Plans) -> None:
    """188 million parameters, says the BLIP-2 paper (section 3.1) of the whole Q-Former, queries included."""
    assert part(plans["blip2-opt-2.7b"], "image.connector")["parameters"] == pytest.approx(188e6, rel=0.02)


def test_flamingo_s_layers(plans: Plans) -> None:
    """Every fourth of 28 layers: seven, each with 4 matrices of attention and 3 of a perceptron four times as wide."""
    width = 1536
    layer = 4 * width**2 + 3 * 4 * width**2 + 2 * width + 2
    assert part(plans["flamingo-qwen2.5-1.5b"], "image.fusion")["parameters"] == 7 * layer + width


def test_llava_s_prompt_is_the_original_s(plans: Plans, monkeypatch: pytest.MonkeyPatch) -> None:
    """Letter by letter `conv_vicuna_v1` of LLaVA's conversation.py."""
    import jinja2

    for variable in ("LLAVA_PRETRAIN", "LLAVA_INSTRUCT", "VQAV2", "LLAVA_NEXT"):
        monkeypatch.setenv(variable, "/nowhere")
    says = [("user", "<image>\nWhat?"), ("assistant", "Cats."), ("user", "How many?"), ("assistant", "Two.")]
    messages = [{"role": r, "content": c} for r, c in says]
    for name in ("llava-1.5-7b", "llava-next-vicuna-7b"):
        template = recipes.load(recipe_path(name)).model.language.chat_template
        assert template is not None
        rendered = jinja2.Template(template, trim_blocks=True, lstrip_blocks=True).render(
            messages=messages, eos_token="</s>", add_generation_prompt=False
        )
        assert rendered == (
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. USER: <image>\nWhat? ASSISTANT: Cats.</s>"
            "USER: How many? ASSISTANT: Two.</s>"
        )


@pytest.mark.parametrize("name", READY)
def test_the_header_says_what_it_is_where_from_and_how(name: str) -> None:
    text = recipe_path(name).read_text(encoding="utf-8")
    header = "\n".join(line for line in text.split("\nname:")[0].splitlines() if line.startswith("#"))
    assert f"opticnerve train {name}" in header
    assert "arXiv:" in header or "blog" in header
    assert "docs/models.md" in header
    assert yaml.safe_load(text)["name"] == name
    used = set(re.findall(r"\$\{(\w+)\}", text))
    assert used and all(f"{variable}=/" in header for variable in used), used


def test_the_document_describes_each_and_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert all(any(name in s or name.removesuffix("-7b") in s for s in sections) for name in READY)
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", text))
    assert named and {n for n in named if not (ROOT / n).is_file()} == set()
    used = {v for name in READY for v in re.findall(r"\$\{(\w+)\}", recipe_path(name).read_text(encoding="utf-8"))}
    assert {v for v in used if f"| `{v}` |" not in text} == set()
