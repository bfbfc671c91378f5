"""Tiny docked models on disk, ready to be exported."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import tiny
from opticnerve.encoders.base import model_class
from opticnerve.encoders.hf_vision import _UNLISTED
from opticnerve.export import parity
from opticnerve.export.export import export
from opticnerve.inference.load import load_model
from opticnerve.language.chat_template import CHATML
from opticnerve.models.import_hf.run import import_checkpoint
from opticnerve.models.vlm.build import dock


def sentencepiece(scheme: str) -> Tokenizer:
    """Llama 2's kind: SentencePiece itself learns the words, transformers' own rule makes merges of them.

    `scheme`: where a space stands before text; "prepend" as in Llama 2's tokenizer.json, else a Metaspace's.
    """
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
    from transformers.convert_slow_tokenizer import generate_merges

    with tempfile.TemporaryDirectory() as folder:
        SentencePieceTrainer.train(
            sentence_iterator=iter([line for text in tiny.CORPUS for line in text.split("\n") if line]),
            model_prefix=f"{folder}/it", model_type="bpe", vocab_size=420, byte_fallback=True, minloglevel=2,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
        )  # fmt: skip
        pieces = SentencePieceProcessor(model_file=f"{folder}/it.model")
        count = pieces.vocab_size()
        vocab = {pieces.id_to_piece(i): i for i in range(count)}
        scores = {pieces.id_to_piece(i): pieces.get_score(i) for i in range(count) if not pieces.is_byte(i)}
    bytes_ = {w for w in vocab if w.startswith("<0x")}
    merges = generate_merges(vocab, scores, skip_tokens={"<unk>", "<s>", "</s>"} | bytes_)
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if scheme == "prepend":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    return made


@pytest.fixture(scope="module", autouse=True)
def sentencepiece_kinds() -> Iterator[None]:
    """Kinds of `tiny.tokenizer` that the tests of this folder alone know."""
    with pytest.MonkeyPatch.context() as patch:
        for scheme in ("prepend", "always", "first", "never"):
            patch.setitem(tiny.TOKENIZERS, f"sentencepiece, {scheme}", partial(sentencepiece, scheme))
        yield


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks run here, without a process of their own: for tests of what is compared, not of where."""

    def run(check: str, job: dict[str, Any], scratch: Path, **_: Any) -> dict[str, Any]:
        spec = importlib.util.spec_from_file_location(f"checks_{check}", parity.CHECKS / f"{check}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if hasattr(module, "Barrier"):
            monkeypatch.setattr(module, "Barrier", lambda: sys.meta_path[0])
        path = list(sys.meta_path)
        module.main(job, scratch / "answer.json")
        sys.meta_path[:] = path
        return parity.read(scratch)

    monkeypatch.setattr(parity, "run", run)


@pytest.fixture
def comes_back(in_this_process: None, tmp_path: Path) -> Callable[..., None]:
    """Export a saved dock and import what was written: the same ids of a prompt with a picture, the same logits."""

    def check(source: Path, kind: str, picture: Image.Image, *, atol: float) -> None:
        export(source, kind, tmp_path / "theirs")
        made = import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
        assert made.difference < 1e-5
        before, after = (load_model(folder, device="cpu") for folder in (source, made.folder))
        inputs = [p(images=picture, text="<image>what is it?", return_tensors="pt") for _, p in (before, after)]
        assert inputs[0]["input_ids"].tolist() == inputs[1]["input_ids"].tolist()
        with torch.no_grad():
            first, second = (m(**i).logits for (m, _), i in zip((before, after), inputs, strict=True))
        torch.testing.assert_close(*tiny.words_of(second, first), rtol=0, atol=atol)

    return check


def save_vision_encoder(folder: Path, family: str) -> None:
    """As `tiny.save_vision`, for families that transformers has inside larger models alone, too."""
    if family in tiny.VISION:
        tiny.save_vision(folder, family)
        return
    if family in tiny.NATIVE:
        shutil.copytree(tiny.save_native(family), folder)
        return
    config = tf.AutoConfig.for_model(
        family, hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=32,
        patch_size=8,
    )  # fmt: skip
    torch.manual_seed(1)
    model = model_class(config, _UNLISTED)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tf.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Language family, vision encoder and options → a stage's folder whose connector is calibrated and whose adapter, if any,
    matters."""
    root = tmp_path_factory.mktemp("docks")
    made: dict[str, Path] = {}

    def make(
        family: str = "llama", vision_encoder: str = "clip_vision_model", *, connector: Any = "mlp", lora: Any = None,
        dtype: torch.dtype = torch.float32, fusion: Any = "splice", tiling: Any = None, kind: str = "byte-level",
        chat: str = CHATML, bos: str | None = None, **vision: Any,
    ) -> Path:  # fmt: skip
        key = repr((family, vision_encoder, connector, lora, dtype, fusion, tiling, kind, chat, bos, vision))
        if key in made:
            return made[key]
        language, seen = root / f"{family}-{kind}-{bos}-{zlib.crc32(chat.encode())}", root / vision_encoder
        if not language.exists():
            tiny.save_language(language, family, kind=kind, chat_template=chat, bos=bos)
        if not seen.exists():
            save_vision_encoder(seen, vision_encoder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OPTICNERVE_CACHE", str(root / "cache"))
            one = dock({"type": "hf_vision", "name": str(seen), **vision}, connector, str(language), fusion=fusion,
                       tiling=tiling, dtype=dtype)  # fmt: skip
            torch.manual_seed(4)
            with torch.no_grad():
                part = one.model.image.connector
                for parameter in part.parameters():
                    parameter.mul_(5)
                part.input_mean.normal_()
                part.input_std.uniform_(0.5, 2)
                part.output_scale.fill_(0.7)
                part.calibrated.fill_(True)
                if lora:
                    one.lora = lora
                    one.model.give_lora(lora)
                    for name, parameter in one.model.named_parameters():
                        if "lora_B" in name:
                            parameter.normal_(std=0.05)
            folder = root / f"run-{len(made)}"
            one.save(folder, [n for n, _ in one.model.named_parameters() if ".lora_" in n])
        made[key] = folder
        return folder

    return make
