"""nanoVLM's checkpoints (github.com/huggingface/nanoVLM): SigLIP × pixel_shuffle × splice, a Llama behind it.

Its layers are classes of its own with transformers' arithmetic, so the tensors move into `SiglipVisionModel` and
`LlamaForCausalLM`. Four forms were published, and config.json tells them apart: a 224-pixel square before the prompt
(222M); the square by a placeholder's word; tiles, each behind its word; tiles behind the whole picture (230M, 460M).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from math import isqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn
from transformers import BatchFeature

from opticnerve.common import hub
from opticnerve.connectors.mlp import PixelShuffleConnector
from opticnerve.encoders.base import make_image_processor
from opticnerve.fusion.base import Splice
from opticnerve.language.chat_template import CHATML, IMAGE_TOKEN
from opticnerve.models.checkpoint.strict import wrap_errors
from opticnerve.models.import_hf.source import Source, adopt, make_encoder, make_processor, prefixed, read_tensors
from opticnerve.models.vlm.processing import OpticNerveProcessor
from opticnerve.models.vlm.splitting import PictureWords, SplitLayout
from opticnerve.models.vlm.tiling import Tiling
from opticnerve.models.vlm.tower import Tower, language_sizes
from opticnerve.types import OpticNerveError

_NEEDED = (
    "vit_hidden_dim", "vit_inter_dim", "vit_patch_size", "vit_img_size", "vit_n_heads", "vit_n_blocks", "vit_ln_eps",
    "lm_hidden_dim", "lm_inter_dim", "lm_rms_eps", "lm_re_base", "lm_max_position_embeddings", "lm_vocab_size",
    "lm_n_heads", "lm_n_kv_heads", "lm_n_blocks", "lm_tokenizer", "mp_pixel_shuffle_factor",
)  # fmt: skip
_TILE, _TILE_WORD = re.compile(r"r(\d+)c(\d+)"), "<row_{row}_col_{column}>"
_RENAMED = [
    (r"vision_encoder\.patch_embedding\.conv\.", "vision_encoder.embeddings.patch_embedding."),
    (r"vision_encoder\.patch_embedding\.position_embedding", "vision_encoder.embeddings.position_embedding.weight"),
    (r"vision_encoder\.layer_norm\.", "vision_encoder.post_layernorm."),
    (r"vision_encoder\.blocks\.(\d+)\.ln(\d)\.", r"vision_encoder.encoder.layers.\1.layer_norm\2."),
    (r"vision_encoder\.blocks\.(\d+)\.attn\.", r"vision_encoder.encoder.layers.\1.self_attn."),
    (r"vision_encoder\.blocks\.", "vision_encoder.encoder.layers."),
    (r"decoder\.token_embedding\.", "decoder.model.embed_tokens."),
    (r"decoder\.head\.", "decoder.lm_head."),
    (r"decoder\.norm\.", "decoder.model.norm."),
    (r"decoder\.blocks\.(\d+)\.attn\.out_proj\.", r"decoder.model.layers.\1.self_attn.o_proj."),
    (r"decoder\.blocks\.(\d+)\.attn\.", r"decoder.model.layers.\1.self_attn."),
    (r"decoder\.blocks\.(\d+)\.norm1\.", r"decoder.model.layers.\1.input_layernorm."),
    (r"decoder\.blocks\.(\d+)\.norm2\.", r"decoder.model.layers.\1.post_attention_layernorm."),
    (r"decoder\.blocks\.", "decoder.model.layers."),
]

# Its parts as text: pictures without a line break behind them, and numbered where one turn shows several.
_PARTS = "".join(
    line.strip()
    for line in """
    {%- set nano = namespace(messages=[]) -%}
    {%- for message in messages -%}
      {%- if message['content'] is string -%}{%- set nano.messages = nano.messages + [message] -%}
      {%- else -%}
        {%- set joined = namespace(text='', pictures=0) -%}
        {%- set pictures = message['content'] | selectattr('type', 'equalto', 'image') | list | length -%}
        {%- for part in message['content'] -%}
          {%- if part['type'] == 'image' -%}
            {%- set joined.text = joined.text + NUMBER + IMAGE -%}
            {%- set joined.pictures = joined.pictures + 1 -%}
          {%- elif part['type'] == 'text' -%}{%- set joined.text = joined.text + part['text'] -%}
          {%- else -%}{{ raise_exception('unknown content part: ' + part['type']) }}{%- endif -%}
        {%- endfor -%}
        {%- set nano.messages = nano.messages + [dict(message, content=joined.text)] -%}
      {%- endif -%}
    {%- endfor -%}
    {%- set messages = nano.messages -%}{{ '' }}
    """.splitlines()
)
_NUMBER = "(('<image: ' ~ joined.pictures ~ '>') if pictures > 1 else '')"
# The 222M's, which had no chat template: the picture goes before everything.
_QUESTIONS = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ IMAGE * message['content'].count(IMAGE) + 'Question: ' }}"
    "{{ message['content'].replace(IMAGE, '') + ' ' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ 'Answer:' + message['content'] + eos_token }}"
    "{%- else -%}{{ message['content'] + ' ' }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ 'Answer:' }}{%- endif -%}"
)


def recognises(raw: dict[str, Any]) -> bool:
    """Whether a config.json is one of these."""
    return {"vit_hidden_dim", "lm_hidden_dim"} <= raw.keys()


def read_config(name: str, raw: dict[str, Any]) -> Any:
    """transformers' configurations of the parts, and `raw`, what was written.

    Raises:
        OpticNerveError: something is missing, or of a kind that cannot be.
    """
    if missing := [k for k in _NEEDED if raw.get(k) is None]:
        raise OpticNerveError(f"config.json of {name} lacks {', '.join(missing)}", kind="damaged")
    with wrap_errors("the configuration", name):
        vision = tf.SiglipVisionConfig(
            hidden_size=raw["vit_hidden_dim"], intermediate_size=raw["vit_inter_dim"],
            num_hidden_layers=raw["vit_n_blocks"], num_attention_heads=raw["vit_n_heads"],
            image_size=raw["vit_img_size"], patch_size=raw["vit_patch_size"], layer_norm_eps=raw["vit_ln_eps"],
            vision_use_head=False,
        )  # fmt: skip
        text = tf.LlamaConfig(
            vocab_size=raw["lm_vocab_size"], hidden_size=raw["lm_hidden_dim"], intermediate_size=raw["lm_inter_dim"],
            num_hidden_layers=raw["lm_n_blocks"], num_attention_heads=raw["lm_n_heads"],
            num_key_value_heads=raw["lm_n_kv_heads"], rms_norm_eps=raw["lm_rms_eps"],
            max_position_embeddings=raw["lm_max_position_embeddings"],
            rope_parameters={"rope_type": "default", "rope_theta": float(raw["lm_re_base"])},
            tie_word_embeddings=bool(raw.get("lm_tie_weights", True)), bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
    return SimpleNamespace(
        model_type="nanovlm", architectures=None, vision_config=vision, text_config=text, image_token_id=None,
        dtype=torch.float32, raw=raw,
    )  # fmt: skip


def refuse(config: Any) -> list[str]:
    """What of a nanoVLM cannot be imported, by its configuration."""
    raw, reasons = config.raw, []
    side, factor = config.vision_config.image_size // config.vision_config.patch_size, raw["mp_pixel_shuffle_factor"]
    if raw.get("vit_cls_flag"):
        reasons.append("its encoder gives one vector of the whole picture (vit_cls_flag)")
    if raw.get("lm_attn_scaling", 1.0) != 1.0:
        reasons.append(f"its rotary embeddings are scaled (lm_attn_scaling: {raw['lm_attn_scaling']})")
    if side % factor:
        reasons.append(f"its map of {side} × {side} patches has no squares of {factor}")
    elif (said := raw.get("mp_image_token_length")) not in (None, (side // factor) ** 2) and _words(raw):
        reasons.append(f"it writes {said} placeholders a tile, which gives {(side // factor) ** 2} soft tokens")
    words = {k: v for k, v in _words(raw).items() if _TILE.fullmatch(k)}
    if words:
        tile, longest = config.vision_config.image_size, raw.get("max_img_size") or 0
        if longest < tile or longest % tile:
            reasons.append(f"its max_img_size, {longest}, is not made of whole tiles ({tile} px)")
        named = {(row, column) for row in range(1, longest // tile + 1) for column in range(1, longest // tile + 1)}
        if any(words.get(f"r{r}c{c}") != _TILE_WORD.format(row=r, column=c) for r, c in named):
            reasons.append(
                f"its tiles have other words than {_TILE_WORD}, or fewer than {longest // tile} rows of them"
            )
    elif "global_image_token" in _words(raw):
        reasons.append("it has a word for the whole picture and none for tiles")
    return reasons


class NanoVLM(nn.Module):
    """Its forward (`VisionLanguageModel`, `ModalityProjector`) around the two models of transformers."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.factor = config, config.raw["mp_pixel_shuffle_factor"]
        self.vision_encoder = tf.SiglipVisionModel(config.vision_config)
        self.decoder: Any = tf.LlamaForCausalLM(config.text_config)
        width = config.vision_config.hidden_size * self.factor**2
        self.projection = nn.Linear(width, config.text_config.hidden_size, bias=False)

    @property
    def device(self) -> torch.device:
        return self.projection.weight.device

    def get_input_embeddings(self) -> nn.Module:
        """The table that looks up words and placeholders."""
        table: nn.Module = self.decoder.get_input_embeddings()
        return table

    def set_input_embeddings(self, table: nn.Module) -> None:
        """Another table in its place."""
        self.decoder.set_input_embeddings(table)

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Any:
        """Logits of prompts (B, N) whose placeholders stand for the tiles (T, 3, S, S), in order."""
        words_BND = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            map_TND = self.vision_encoder(pixel_values).last_hidden_state
            s, g = self.factor, isqrt(map_TND.shape[1]) // self.factor
            squares_TYXD = map_TND.unflatten(1, (g, s, g, s)).transpose(2, 3).flatten(3)
            words_BND[input_ids == self.config.image_token_id] = self.projection(squares_TYXD).flatten(0, 2)
        return self.decoder(inputs_embeds=words_BND)


class NanoProcessor:
    """Its `DynamicResize`, `GlobalAndSplitImages` and `get_image_string`, as its `generate.py` calls them."""

    def __init__(self, layout: SplitLayout, tokenizer: Any, words: dict[str, str], image_token: str) -> None:
        self.layout, self.tokenizer, self.words, self.image_token = layout, tokenizer, words, image_token

    def __call__(self, *, images: Sequence[PIL.Image.Image] | None, text: str, return_tensors: str) -> BatchFeature:
        data: dict[str, Any] = {}
        for picture in images or ():
            tiles_TCSS, (rows, columns) = self.cut(picture)
            data.setdefault("pixel_values", []).append(tiles_TCSS)
            text = text.replace(self.image_token, self.write(rows, columns).replace(self.image_token, "\0"), 1)
        data["input_ids"] = self.tokenizer([text.replace("\0", self.image_token)])["input_ids"]
        if "pixel_values" in data:
            data["pixel_values"] = torch.cat(data["pixel_values"])
        return BatchFeature(data, tensor_type=return_tensors)

    def cut(self, picture: PIL.Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """A picture's tiles, and how many rows and columns of them there are."""
        side, rows, columns = self.layout.tile_size, *self.layout.shape(picture.height, picture.width)
        how = PIL.Image.Resampling.BICUBIC if self.layout.split else PIL.Image.Resampling.BILINEAR
        pixels_HWC = torch.from_numpy(np.array(picture.resize((columns * side, rows * side), how)))
        canvas_CHW = pixels_HWC.permute(2, 0, 1) / 255
        tiles = [t for row_CHW in canvas_CHW.split(side, 1) for t in row_CHW.split(side, 2)]
        if len(tiles) > 1 and self.layout.thumbnail:
            tiles = [F.interpolate(canvas_CHW[None], (side, side), mode="bilinear", antialias=True)[0], *tiles]
        return torch.stack(tiles), (rows, columns)

    def write(self, rows: int, columns: int) -> str:
        """The words and placeholders of a picture."""
        piece, whole = self.image_token * self.layout.tile_tokens, self.words.get("global_image_token")
        if not self.layout.split:
            return piece
        made = whole + piece if whole else ""
        if rows * columns == 1 and whole:
            return made
        return made + "".join(self.words[f"r{r + 1}c{c + 1}"] + piece for r in range(rows) for c in range(columns))


def read(name: str, raw: dict[str, Any], config: Any) -> Source:
    """Weights, in float32, and the tokenizer that config.json names, or that lies beside the weights.

    Raises:
        OpticNerveError: pickles, tensors that are missing, unexpected or of another shape, or no such tokenizer.
    """
    folder, words = Path(hub.fetch(name)), _words(raw)
    tokenizer = _tokenizer(folder, config, name)
    image_token = words.get("image_token", IMAGE_TOKEN)
    config.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
    config.text_config.eos_token_id = config.text_config.pad_token_id = tokenizer.eos_token_id
    state = renamed(read_tensors(name, folder))
    config.dtype = next(iter(state.values())).dtype
    if config.text_config.tie_word_embeddings:  # safetensors keeps one table under one of its two names
        tables = "decoder.model.embed_tokens.weight", "decoder.lm_head.weight"
        state |= {k: state[other] for k, other in zip(tables, tables[::-1], strict=True) if other in state}
    model = NanoVLM(config)
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        raise OpticNerveError(f"the weights of {name} are not those of its config.json: {e}", kind="mismatch") from e
    side = config.vision_config.image_size // config.vision_config.patch_size
    layout = SplitLayout(
        config.vision_config.image_size, (side // model.factor) ** 2, "nanovlm", longest_side=raw.get("max_img_size"),
        split="r1c1" in words, enlarge=bool(raw.get("resize_to_max_side_len")), thumbnail="global_image_token" in words,
    )  # fmt: skip
    return Source(name, model.eval(), NanoProcessor(layout, tokenizer, words, image_token), [])


def _tokenizer(folder: Path, config: Any, name: str) -> Any:
    """The tokenizer with the words that nanoVLM adds, in its order."""
    words, rows = _words(config.raw), config.text_config.vocab_size
    where = str(folder) if (folder / "tokenizer.json").is_file() else str(config.raw["lm_tokenizer"])
    with wrap_errors("the tokenizer", where), hub.quiet():
        tokenizer: Any = tf.AutoTokenizer.from_pretrained(where)
    added = list(words.values()) or [IMAGE_TOKEN]
    tokenizer.add_special_tokens({"additional_special_tokens": added}, replace_extra_special_tokens=False)
    if words and len(tokenizer) > rows:
        raise OpticNerveError(
            f"{where} with the words of {name} has {len(tokenizer)} tokens, and its table {rows} rows: it is another "
            "tokenizer than the model was trained with; put that beside the weights",
            kind="mismatch",
        )
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names that `NanoVLM` has for them."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "decoder.rotary_embd.inv_freq":  # computed
            continue
        name = name.replace("MP.proj.", "projection.")
        for pattern, new in _RENAMED:
            name, count = re.subn(f"^{pattern}", new, name)
            if count:
                break
        if ".qkv_proj." in name:
            thirds = zip("qkv", tensor.chunk(3), strict=True)
            found |= {name.replace("qkv_proj", f"{letter}_proj"): third for letter, third in thirds}
        else:
            found[name] = tensor[0] if "position_embedding" in name else tensor
    return found


def ready(source: Source) -> None:
    """It knows all that it needs."""


def convert(source: Source) -> tuple[Any, Tower, OpticNerveProcessor]:
    """Language model, tower and processor."""
    theirs, layout, words = source.model, source.processor.layout, source.processor.words
    images = make_image_processor(
        size=layout.tile_size, mean=[0.0] * 3, std=[1.0] * 3, resample=3 if layout.split else 2
    )
    encoder = make_encoder(source, theirs.vision_encoder, layer="last", class_token="drop", images=images)
    sizes = language_sizes(theirs.decoder)
    connector = PixelShuffleConnector(
        in_size=encoder.hidden_size, in_tokens=encoder.num_tokens, out_size=sizes["language_size"],
        scale=theirs.factor, depth=1, calibrate=False,
    )  # fmt: skip
    adopt(connector, prefixed(theirs.projection, "layers.0"))
    tiling = Tiling(layout, sizes["language_size"])
    tower = Tower(encoder, connector, Splice(**sizes), tiling)
    whole, first = words.get("global_image_token", ""), _TILE_WORD.format(row=1, column=1)
    written = PictureWords(tile=_TILE_WORD, thumbnail=whole, alone=whole or first) if layout.split else None
    return theirs.decoder, tower, make_processor(
        source, tower, source.processor.tokenizer, chat_template=_template(source),
        image_processor=tiling.image_processor(images), picture_words=written and asdict(written),
    )  # fmt: skip


def _template(source: Source) -> str:
    """Its chat template behind its way with pictures; of the first form its words around a question."""
    raw, numbered = source.config.raw, bool(source.processor.words)
    made = _PARTS.replace("NUMBER", _NUMBER if numbered else "''")
    made += str(raw.get("lm_chat_template") or CHATML) if numbered else _QUESTIONS
    return made.replace("IMAGE", json.dumps(source.image_token))


def prompts(source: Source, processor: OpticNerveProcessor, question: str, pictures: int) -> tuple[str, str]:
    """One question in their form and in ours, which are the same."""
    numbers = [f"<image: {i}>" if pictures > 1 and source.processor.words else "" for i in range(pictures)]
    text = "".join(n + source.image_token for n in numbers) + f"Question: {question} Answer:"
    return text, text


def _words(raw: dict[str, Any]) -> dict[str, str]:
    """The words that it added to its tokenizer, by name; the first form added none."""
    return raw.get("vlm_extra_tokens") or {}
