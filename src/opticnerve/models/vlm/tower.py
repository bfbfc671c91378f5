"""A tower: one encoder, its connector, and the way they enter the language model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from opticnerve import registry
from opticnerve.common.on_host import on_host, sent
from opticnerve.connectors.base import Connector
from opticnerve.encoders.base import Encoder
from opticnerve.encoders.native import NativeLayout, pooled_layout, real
from opticnerve.fusion.base import Fusion, onloaded
from opticnerve.language.layers import decoder_layers
from opticnerve.models.vlm.splitting import SplitLayout
from opticnerve.models.vlm.tiling import TileLayout, Tiling
from opticnerve.types import Features, OpticNerveError

# What each modality is called among a model's inputs, by transformers' conventions.
MEDIA_INPUT = {"image": "pixel_values", "audio": "input_features"}


class Tower(nn.Module):
    """Media in, soft tokens at the language model's width out. Checks that neighbours fit when it is built.

    With `tiling`, an image comes as several tiles; each goes through encoder and connector, and all of them become one
    row of soft tokens.
    """

    encoder: Encoder
    connector: Connector
    fusion: Fusion
    tiling: Tiling | None
    layout: TileLayout | SplitLayout | NativeLayout | None
    """How a picture's size says how many rows of pixels and how many soft tokens it is; None where all are alike."""

    def __init__(self, encoder: Encoder, connector: Connector, fusion: Fusion, tiling: Tiling | None = None) -> None:
        super().__init__()
        if encoder.hidden_size != connector.in_size or encoder.num_tokens != connector.in_tokens:
            raise OpticNerveError(
                f"encoder gives {encoder.num_tokens} tokens of width {encoder.hidden_size}; "
                f"connector takes {connector.in_tokens} of width {connector.in_size}",
                kind="wrong-shape",
            )
        self.encoder, self.connector, self.fusion, self.tiling = encoder, connector, fusion, tiling
        self.layout = _layout(encoder, connector, tiling)

    @property
    def num_tokens(self) -> int:
        """Soft tokens of one piece of media: an image or a tile, a window of sound; of a picture that keeps its shape
        the most."""
        layout = self.layout
        return layout.max_tokens if isinstance(layout, NativeLayout) else int(self.connector.num_tokens)

    @property
    def grid(self) -> int | None:
        """Side of the map that a picture's soft tokens form; None where they form none, or each picture has its own."""
        side = isqrt(self.num_tokens)
        square = self.connector.keeps_grid and side * side == self.num_tokens
        return side if square and self.layout is None and self.encoder.modality == "image" else None

    def tokens_of(self, size: Sequence[int], pool: int) -> int:
        """Soft tokens of one picture of (height, width) pixels, squares of side `pool` pooled."""
        if self.layout is None:
            return self.num_tokens if pool == 1 else (-(-(self.grid or 0) // pool)) ** 2
        layout = self.layout
        return (pooled_layout(layout, pool) if isinstance(layout, NativeLayout) else layout).num_tokens(*size)

    @property
    def num_placeholders(self) -> int:
        """Placeholders that the processor writes for a piece of media (without tiling); the most, where sizes count."""
        return self.fusion.placeholders(self.num_tokens)

    @property
    def max_placeholders(self) -> int:
        """The most that any picture (or window of sound) takes."""
        return self.num_placeholders if self.layout is None else self.fusion.placeholders(self.layout.max_tokens)

    @property
    def wants_text(self) -> bool:
        """Whether the connector reads the question, too (InstructBLIP's Q-Former)."""
        return bool(getattr(self.connector, "wants_text", False))

    @property
    def reads_words(self) -> bool:
        """Whether the connector has a tokenizer of its own, for questions or for its pretraining."""
        return self.wants_text or getattr(self.connector, "tokenizer_name", None) is not None

    def forward(self, media: Tensor, sizes: Tensor | None = None, text: Sequence[Tensor] | None = None) -> Features:
        """`media` (pieces, *encoder.media_shape) in any float dtype → `Features`, one row for each image or window.

        `sizes` (images, 2): original heights and widths, where they count (`layout`). `text`: ids and mask of the
        questions, where the connector reads them.
        """
        return self.connect(self.encode(media, sizes), sizes, text)

    def encode(self, media: Tensor, sizes: Tensor | None = None) -> Features:
        """The encoder's part alone: what a cache of frozen features holds."""
        if self.encoder.native is not None and sizes is None:
            raise ValueError("how many tokens a picture has depends on its size: give image_sizes beside pixel_values")
        features: Features = self.encoder(self.placed(media), *self.grids(sizes))
        return features

    def grids(self, sizes: Tensor | None) -> tuple[list[tuple[int, int]], ...]:
        """What an encoder of pictures that keep their shape takes beside their patches; nothing for others."""
        native = self.encoder.native
        return () if native is None or sizes is None else ([native.grid(*size) for size in on_host(sizes).tolist()],)

    def placed(self, media: Tensor) -> Tensor:
        """Media on the device and in the floating dtype of the encoder."""
        return media.to(placed_like(self.encoder, self.connector, otherwise=media))

    def connect(
        self, features: Features, sizes: Tensor | None = None, text: Sequence[Tensor] | None = None,
        pools: Tensor | None = None,
    ) -> Features:  # fmt: skip
        """The connector's part, and the arranging of tiles, on features from `encode` or from a cache.

        `pools` (images,): side of the squares of soft tokens that become one, where any is more than 1.
        """
        if self.tiling is not None and sizes is None:
            raise ValueError("the images come in tiles: give image_sizes beside pixel_values")
        weight = placed_like(self.connector, otherwise=features.tokens_BND)
        features = replace(features, tokens_BND=features.tokens_BND.to(weight))
        if self.wants_text and text is None:
            raise ValueError("this connector reads the question: give qformer_input_ids and qformer_attention_mask")
        words: list[Tensor] = [t.to(weight.device) for t in text or ()] if self.wants_text else []
        if self.tiling is None:
            soft: Features = self.connector(features, *words)
            return soft if pools is None else self._pooled(soft, on_host(pools).tolist())
        assert sizes is not None
        if words:
            tiles = sent(torch.tensor([self.tiling.tiles(*size) for size in on_host(sizes).tolist()]), weight.device)
            words = [t.repeat_interleave(tiles, 0, output_size=len(features.mask_BN)) for t in words]
        soft = self.connector(features, *words)
        with onloaded(self.tiling):
            return self.tiling.arrange(soft, sizes)

    def _pooled(self, soft: Features, pools: list[int]) -> Features:
        """Each picture's map as the means of squares of tokens; those at its right and lower edge may be cut."""
        if soft.grids is None and self.grid is None:
            raise ValueError("image_pools: the soft tokens of this model form no map")
        grids = soft.grids or [(self.grid or 0, self.grid or 0)] * len(pools)
        rows = []
        for tokens_ND, grid, pool in zip(soft.tokens_BND, grids, pools, strict=True):
            map_DYX = tokens_ND[: grid[0] * grid[1]].T.unflatten(1, grid)
            pooled_DYX = F.avg_pool2d(map_DYX[None], pool, ceil_mode=True, count_include_pad=False)[0]
            rows.append(pooled_DYX.flatten(1).T)
        return Features(pad_sequence(rows, batch_first=True), real([len(r) for r in rows], rows[0]))

    def dummy_media(self) -> tuple[Tensor, Tensor | None]:
        """Media and sizes of nothing."""
        sizes, pieces = None, 1
        if self.layout is not None:
            side = self.encoder.image_size if self.encoder.native is None else self.encoder.native.patch_size
            sizes, pieces = torch.tensor([[side, side]]), self.layout.num_pieces(side, side)
        device = placed_like(self.connector).device
        return torch.zeros(pieces, *self.encoder.media_shape, device=device), sizes

    def dummy_features(self) -> Features:
        """The soft tokens of nothing: what a process without media puts through, so that all processes do the same."""
        media, sizes = self.dummy_media()
        word = torch.zeros(1, 1, dtype=torch.long, device=media.device)
        features: Features = self(media, sizes, (word, torch.ones_like(word)) if self.wants_text else None)
        return features

    def must_take_part(self) -> bool:
        """Whether trained weights of a tower that has nothing to do must still get a gradient: other processes wait."""
        return (
            torch.is_grad_enabled()
            and torch.distributed.is_available()
            and torch.distributed.is_initialized()
            and torch.distributed.get_world_size() > 1
            and any(p.requires_grad for p in self.parameters())
        )

    def describe(self) -> dict[str, Any]:
        """The tower's entry in `OpticNerveConfig.towers`."""
        entry = {
            "encoder": described(registry.encoders, self.encoder),
            "connector": described(registry.connectors, self.connector),
            "fusion": described(registry.fusions, self.fusion),
        }
        return entry if self.tiling is None else {**entry, "tiling": self.tiling.options}


def placed_like(*modules: nn.Module, otherwise: Tensor | None = None) -> Tensor:
    """A tensor of the device and floating dtype that the first of the modules with any computes in.

    Quantised layers hold whole numbers, or nothing that torch calls a parameter; what they are given stays floating.

    Args:
        otherwise: what is to be placed. It stays on its device where the modules have nothing to go by, or where their
            weights are offloaded (on `meta` in between) and hooks take care of devices.
    """
    place = None if otherwise is None else otherwise.device
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point() and tensor.element_size() > 1:  # below 16 bits: stored, not computed in
                return (
                    tensor if place is None or not tensor.is_meta else torch.empty(0, device=place, dtype=tensor.dtype)
                )
    return otherwise if otherwise is not None and otherwise.is_floating_point() else torch.empty(0, device=place)


def language_sizes(language_model: PreTrainedModel) -> dict[str, int]:
    """What connectors and fusions must know of a language model."""
    return {
        "language_size": int(language_model.get_input_embeddings().embedding_dim),  # type: ignore[arg-type]
        "language_layers": len(decoder_layers(language_model)[1]),
    }


def build_tower(spec: dict[str, Any], sizes: dict[str, int], *, trust_remote_code: bool = False) -> Tower:
    """A tower with random weights from its entry in the configuration. `sizes`: from `language_sizes`."""
    encoder = make(registry.encoders, spec["encoder"], trust_remote_code)
    return join(encoder, spec, sizes, trust_remote_code)


def join(encoder: Encoder, spec: dict[str, Any], sizes: dict[str, int], trusted: bool = True) -> Tower:
    """Build the connector that fits between `encoder` and the language model, the fusion, and the tiling if any.

    `spec`: a mapping with `connector`, `fusion` and perhaps `tiling`.
    """
    ends = {"in_size": encoder.hidden_size, "in_tokens": encoder.num_tokens, "out_size": sizes["language_size"]}
    own_shape = encoder.native is not None
    connector_class = registry.connectors.get(spec["connector"]["type"], allow_dotted=trusted)
    if own_shape and "maps" in inspect.signature(connector_class).parameters:
        ends["maps"] = True
    connector = make(registry.connectors, {**spec["connector"], **ends}, trusted)
    fusion = make(registry.fusions, {**spec["fusion"], **sizes}, trusted)
    tiling = None
    if spec.get("tiling"):
        if encoder.modality != "image":
            raise OpticNerveError(f"tiling is for pictures, not for {encoder.modality}", kind="unsupported")
        if own_shape:
            raise OpticNerveError("tiling cuts pictures into squares; leave out tiling or fit: native", kind="conflict")
        side = round(connector.num_tokens**0.5)
        tiling = Tiling.from_options(
            spec["tiling"],
            tile_size=encoder.image_size,
            tile_tokens=connector.num_tokens,
            grid=side if connector.keeps_grid and side * side == connector.num_tokens else None,
            language_width=sizes["language_size"],
        )
    return Tower(encoder, connector, fusion, tiling)


def _layout(
    encoder: Encoder, connector: Connector, tiling: Tiling | None
) -> TileLayout | SplitLayout | NativeLayout | None:
    """From a picture's size to its rows of pixels and its soft tokens, through encoder and connector."""
    native = encoder.native
    if native is None:
        return tiling.spec if tiling is not None else None
    if not connector.any_shape:
        raise OpticNerveError(
            f"{type(connector).__name__} takes maps of one shape, and with fit: native each picture has its own; take "
            "linear, mlp, pixel_shuffle, resampler or qformer, or another fit",
            kind="unsupported",
        )
    tokens = None if connector.keeps_grid or connector.by_area else int(connector.num_tokens)
    (rows, columns), (more_rows, more_columns) = native.pool, connector.pool
    return replace(native, pool=(rows * more_rows, columns * more_columns), tokens=tokens)


def make(parts: registry.Registry[Any], spec: dict[str, Any], trusted: bool = True) -> Any:
    """One part from `{"type": name, **keywords}`; wrong keywords are an error that lists the right ones."""
    options = {k: v for k, v in spec.items() if k != "type"}
    cls = parts.get(spec["type"], allow_dotted=trusted)
    check_options(parts.kind, spec["type"], cls, options)
    return cls(**options)


# Keywords that come from a part's neighbours, not from a recipe.
_GIVEN = ("in_size", "out_size", "in_tokens", "maps", "language_size", "language_layers")


def check_options(kind: str, name: str, cls: type, options: dict[str, Any]) -> None:
    """Refuse keywords that the part's constructor does not take."""
    known = inspect.signature(cls).parameters
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return
    if unknown := sorted(set(options) - set(known)):
        takes = [k for k in known if k not in _GIVEN and not k.startswith("_")]
        raise OpticNerveError(
            f"{kind} {name!r} takes no {', '.join(unknown)}; it takes {', '.join(takes) or 'no options'}",
            kind="unknown-key",
        )


def described(parts: registry.Registry[Any], module: Any) -> dict[str, Any]:
    """What `make` builds the same part of: the registered name of its class, or the dotted path, and its options."""
    own = f"{type(module).__module__}:{type(module).__qualname__}"
    return {"type": next((n for n in parts.names() if parts.points_to(n, type(module))), own), **module.options}
