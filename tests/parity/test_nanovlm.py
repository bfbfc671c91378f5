"""nanoVLM's checkpoints, imported, against its forward and its preparation written out here by its own names
(github.com/huggingface/nanoVLM at 4e0c096: `models/`, `data/custom_transforms.py`, `data/processors.py`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import ceil
from typing import Any

import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, resize, to_tensor

import checkpoints
import tiny
from opticnerve.data.encode.tokenize import encode
from opticnerve.inference.generate import Answerer
from opticnerve.inference.load import load_model
from opticnerve.models.import_hf.run import import_checkpoint
from opticnerve.types import ask


@dataclass
class Reference:
    """Its configuration and tensors."""

    cfg: dict[str, Any]
    state: dict[str, Tensor]

    @property
    def words(self) -> dict[str, str]:
        return dict(self.cfg.get("vlm_extra_tokens", {}))

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def vision(self, pixels: Tensor) -> Tensor:
        cfg, s = self.cfg, self.state
        width, heads, place = cfg["vit_hidden_dim"], cfg["vit_n_heads"], "vision_encoder.patch_embedding"

        def norm(name: str, x: Tensor) -> Tensor:
            return F.layer_norm(x, (width,), s[f"{name}.weight"], s[f"{name}.bias"], cfg["vit_ln_eps"])

        x = F.conv2d(pixels, s[f"{place}.conv.weight"], s[f"{place}.conv.bias"], stride=cfg["vit_patch_size"])
        x = x.flatten(2).transpose(1, 2) + s[f"{place}.position_embedding"]
        for i in range(cfg["vit_n_blocks"]):
            block = f"vision_encoder.blocks.{i}"
            qkv = self.linear(f"{block}.attn.qkv_proj", norm(f"{block}.ln1", x)).split(width, 2)
            q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in qkv)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + self.linear(f"{block}.attn.out_proj", y)
            y = F.gelu(self.linear(f"{block}.mlp.fc1", norm(f"{block}.ln2", x)), approximate="tanh")
            x = x + self.linear(f"{block}.mlp.fc2", y)
        return norm("vision_encoder.layer_norm", x)

    def project(self, x: Tensor) -> Tensor:
        side, factor = int(x.shape[1] ** 0.5), self.cfg["mp_pixel_shuffle_factor"]
        x = x.reshape(len(x), side // factor, factor, side // factor, factor, -1).permute(0, 1, 3, 2, 4, 5)
        return self.linear("MP.proj", x.reshape(len(x), (side // factor) ** 2, -1))

    def decode(self, x: Tensor) -> Tensor:
        cfg, s = self.cfg, self.state
        dim, groups = cfg["lm_hidden_dim"] // cfg["lm_n_heads"], cfg["lm_n_heads"] // cfg["lm_n_kv_heads"]
        angles = torch.outer(
            torch.arange(x.shape[1]).float(), 1.0 / cfg["lm_re_base"] ** (torch.arange(0, dim, 2).float() / dim)
        )
        cos, sin = (f(torch.cat([angles, angles], 1)) for f in (torch.cos, torch.sin))

        def norm(name: str, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + cfg["lm_rms_eps"]) * s[f"{name}.weight"]

        def turned(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat([-second, first], -1) * sin

        for i in range(cfg["lm_n_blocks"]):
            block = f"decoder.blocks.{i}"
            names = [f"{block}.attn.{n}_proj" for n in "qkv"]
            normed = norm(f"{block}.norm1", x)
            q, k, v = (self.linear(n, normed).unflatten(2, (-1, dim)).transpose(1, 2) for n in names)
            k, v = (t.repeat_interleave(groups, dim=1) for t in (turned(k), v))
            y = F.scaled_dot_product_attention(turned(q), k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + self.linear(f"{block}.attn.out_proj", y)
            y = norm(f"{block}.norm2", x)
            y = F.silu(self.linear(f"{block}.mlp.gate_proj", y)) * self.linear(f"{block}.mlp.up_proj", y)
            x = x + self.linear(f"{block}.mlp.down_proj", y)
        return norm("decoder.norm", x) @ s["decoder.head.weight" if not cfg["lm_tie_weights"] else TABLE].T

    def tiles(self, picture: PIL.Image.Image) -> tuple[Tensor, tuple[int, int]]:
        side = self.cfg["vit_img_size"]
        if "max_img_size" not in self.cfg:
            return to_tensor(resize(picture, [side, side]))[None], (1, 1)
        (w, h), most = picture.size, self.cfg["max_img_size"]
        long, short = max(w, h), min(w, h)
        target = most if self.cfg.get("resize_to_max_side_len") else min(most, ceil(long / side) * side)
        small = max(ceil(short * (target / long) / side) * side, side)
        size = [small, target] if w >= h else [target, small]
        x = to_tensor(resize(picture, size, interpolation=InterpolationMode.BICUBIC))
        rows, columns = size[0] // side, size[1] // side
        cut = x.reshape(3, rows, side, columns, side).permute(1, 3, 0, 2, 4).flatten(0, 1)
        if len(cut) > 1 and "global_image_token" in self.words:
            cut = torch.cat([resize(x, [side, side])[None], cut])
        return cut, (rows, columns)

    def write(self, shapes: list[tuple[int, int]]) -> str:
        made = ""
        for i, (rows, columns) in enumerate(shapes):
            piece = self.words["image_token"] * self.cfg["mp_image_token_length"]
            made += f"<image: {i}>" if len(shapes) > 1 else ""
            if whole := self.words.get("global_image_token"):
                made += whole + piece
                if (rows, columns) == (1, 1):
                    continue
            if "r1c1" in self.words:
                for r in range(rows):
                    made += "".join(self.words[f"r{r + 1}c{c + 1}"] + piece for c in range(columns))
            else:
                made += piece
        return made

    def logits(self, tokenizer: Any, words: str, pictures: list[PIL.Image.Image]) -> tuple[list[int], Tensor]:
        """Token ids of a question, and its logits; of the first form behind the picture's."""
        cut, shapes = zip(*map(self.tiles, pictures), strict=True)
        soft = self.project(self.vision(torch.cat(cut))).flatten(0, 1)
        if not self.words:
            ids = tokenizer(f"Question: {words} Answer:")["input_ids"]
            return ids, self.decode(torch.cat([soft, self.state[TABLE][ids]])[None])[0, len(soft) :]
        chat = [{"role": "user", "content": self.write(list(shapes)) + words}]
        text = tokenizer.apply_chat_template(
            chat, chat_template=self.cfg["lm_chat_template"], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text)["input_ids"]
        x = self.state[TABLE][ids]
        x[torch.tensor(ids) == tokenizer.convert_tokens_to_ids("<|image|>")] = soft
        return ids, self.decode(x[None])[0]


TABLE = "decoder.token_embedding.weight"
WIDE, TALL, SMALL = (tiny.picture(i).resize(size) for i, size in enumerate([(90, 31), (25, 131), (11, 7)]))
SHOWN = {"wide": [WIDE], "tall": [TALL], "smaller than a tile": [SMALL], "two": [TALL, SMALL]}


@pytest.fixture(scope="module", params=list(checkpoints.NANOVLM))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Reference, Any, Any]:
    folder = tmp_path_factory.mktemp("nano")
    source = checkpoints.save_nanovlm(folder / "source", form=request.param)
    made = import_checkpoint(source, folder / "out")
    assert made.difference < 1e-5
    state = load_file(source / "model.safetensors")
    return Reference(json.loads((source / "config.json").read_text()), state), *load_model(made.folder, device="cpu")


@pytest.mark.parametrize("shown", list(SHOWN))
def test_its_tokens_and_logits_are_nanovlms(pair: tuple[Reference, Any, Any], shown: str) -> None:
    theirs, model, processor = pair
    pictures = SHOWN[shown] if theirs.words else SHOWN[shown][:1]  # the first form shows one
    inputs = Answerer(model, processor).inputs([ask("what is this?", *pictures)])
    with torch.no_grad():
        ids, expected = theirs.logits(processor.tokenizer, "what is this?", pictures)
        logits = model(**inputs).logits[0, -len(ids) :]
    assert inputs["input_ids"][0, -len(ids) :].tolist() == ids
    torch.testing.assert_close(*tiny.words_of(logits, expected), rtol=0, atol=1e-5)


def test_it_can_be_trained_on(pair: tuple[Reference, Any, Any]) -> None:
    processor = pair[2]
    learned = encode(ask("what is this?", WIDE, answer="a dog"), processor)
    assert processor.tokenizer.decode([i for i in learned.labels if i >= 0]) == "a dog<|im_end|>"
