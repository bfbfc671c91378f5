"""What every encoder promises: media tensor in, `Features` out, and three declared facts."""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opticnerve.common.private_names import computed_tables
from opticnerve.encoders.native import NativeImageProcessor, NativeLayout
from opticnerve.types import Features, OpticNerveError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Encoder(nn.Module, ABC):
    """A vision encoder or an audio encoder.

    A subclass sets, by the end of its constructor,
    `hidden_size` (width D of a token), `num_tokens` (tokens N of one piece of media, fixed) and `options` (the plain
    keywords that build the same module again with random weights: they go into `config.json`). A vision encoder also
    sets `image_size`, the side of its square input in pixels; and `native`, where pictures keep their shape:
    `num_tokens` is then the most that any picture takes.
    It never projects to the language model's width and never freezes itself.
    """

    modality: ClassVar[Literal["image", "audio"]] = "image"
    needs_name: ClassVar[bool] = True
    """False where there are no pretrained weights to name (raw patches)."""
    hidden_size: int
    num_tokens: int
    image_size: int
    fit: str
    mean: list[float]
    std: list[float]
    resample: int
    crop_pct: float
    options: dict[str, Any]
    files: list[str]
    native: NativeLayout | None = None
    """How a picture of any shape is cut into patches, and how many tokens it becomes; None where all are square."""

    if TYPE_CHECKING:
        # What a subclass has of its own is a module, a tensor or a plain value.
        def __getattr__(self, name: str) -> Any: ...

    def train(self, mode: bool = True) -> Self:
        """As every module; see `hold_statistics`."""
        super().train(mode)
        self.hold_statistics()
        return self

    def hold_statistics(self) -> None:
        """Batch norms whose weights are frozen keep their statistics, whoever calls `model.train()` (transformers'
        Trainer does, and those of TRL); and so do all that see pictures of several shapes, one shape after the other:
        no batch has statistics to learn."""
        trained = any(p.requires_grad for p in self.parameters())
        for module in self.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
                learns = trained if module.weight is None else module.weight.requires_grad
                if self.native is not None or not learns:
                    module.eval()

    @classmethod
    @abstractmethod
    def from_pretrained(cls, name: Any, **options: Any) -> Encoder:
        """The encoder with its pretrained weights, by hub name, local folder or starter name."""

    @classmethod
    def planned(cls, name: Any, **options: Any) -> Encoder:
        """The same module with random weights: configurations are read, no weight is. (`plan` calls it on the meta
        device.)

        By default the constructor is called with `name` if it takes one.
        """
        if "name" in inspect.signature(cls.__init__).parameters:
            options["name"] = name
        elif cls.needs_name:
            raise OpticNerveError(
                f"{cls.__name__} cannot be foreseen: it needs a classmethod `planned(name, **options)`",
                kind="unsupported",
            )
        return cls(**options)

    @classmethod
    def take_name(cls, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Split a recipe's options into what names the weights and the rest.

        Raises:
            OpticNerveError: there is no name, and this encoder needs one.
        """
        rest = dict(options)
        name = rest.pop("name", None)
        if name is None and cls.needs_name:
            raise OpticNerveError(
                f"{cls.__name__} needs a name: a hub name, a local folder, or starter/…", kind="missing-field"
            )
        return name, rest

    @classmethod
    def loading_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Of `self.options` as a configuration keeps them, those that `from_pretrained` takes beside the name."""
        return {k: v for k, v in options.items() if k not in ("name", "architecture")}

    @abstractmethod
    def forward(self, media: Tensor) -> Features:
        """(B, *media_shape) float → `Features` of (B, num_tokens, hidden_size).

        One with `native` takes the pictures' rows and columns of patches, too, as `grids`: (all pictures' patches,
        p · p · 3) → `Features` of (B, most tokens, hidden_size) with the `grids` of the tokens.
        """

    def states(self, media: Tensor, **asked: bool) -> dict[str, Any]:
        """`hidden_states` and `attentions` of an encoder that is a model of transformers, as `output_hidden_states` and
        `output_attentions` ask for them.

        Raises:
            OpticNerveError: it is another's.
        """
        raise OpticNerveError(
            f"{', '.join(k for k, v in asked.items() if v)}: {type(self).__name__} gives features alone",
            kind="unsupported",
        )

    def take_pictures(
        self, size: int, fit: str, mean: list[float] | None, std: list[float] | None, resample: int = 3,
        crop_pct: float = 1.0,
    ) -> None:  # fmt: skip
        """Settle how pictures are prepared, as in `make_image_processor`; mean and deviation are 0.5 by default.

        Raises:
            OpticNerveError: a crop of pictures that keep their shape.
        """
        if fit == "native" and crop_pct != 1:
            raise OpticNerveError(f"crop_pct: {crop_pct} does not go with fit: native", kind="conflict")
        self.image_size, self.fit, self.resample, self.crop_pct = size, fit, resample, crop_pct
        self.mean, self.std = list(mean or [0.5] * 3), list(std or [0.5] * 3)

    def take_budget(
        self, fit: str, min_patches: int | None, max_patches: int | None, usual: NativeLayout
    ) -> dict[str, int]:  # fmt: skip
        """With `fit: native`, settle the budget of patches (see `NativeLayout`); what is not given is the `usual`.

        Returns: the options that build the same again; none for another fit.

        Raises:
            OpticNerveError: a budget that means nothing beside another fit, or that no picture can keep.
        """
        given: dict[str, Any] = {"min_patches": min_patches, "max_patches": max_patches}
        given = {k: v for k, v in given.items() if v is not None}
        if fit != "native":
            if given:
                raise OpticNerveError(f"{', '.join(given)}: for fit: native, not for fit: {fit}", kind="conflict")
            return {}
        fills = usual.min_patches == usual.max_patches  # every picture, whatever its size
        most = usual.max_patches if max_patches is None else max_patches
        least = most if fills else min(usual.min_patches, most)
        self.native = replace(usual, max_patches=most, min_patches=least if min_patches is None else min_patches)
        return {"min_patches": self.native.min_patches, "max_patches": self.native.max_patches}

    def image_processor(self) -> Any:
        """The transformers image processor that turns pictures into this encoder's `pixel_values`."""
        if not hasattr(self, "mean"):
            raise OpticNerveError(f"{type(self).__name__} sees no pictures", kind="unsupported")
        if (layout := self.native) is not None:
            how: dict[str, Any] = {k: getattr(layout, k) for k in NativeImageProcessor.LAYOUT}
            return NativeImageProcessor(**how, resample=self.resample, image_mean=self.mean, image_std=self.std)
        return make_image_processor(
            size=self.image_size, mean=self.mean, std=self.std, fit=self.fit, resample=self.resample,
            crop_pct=self.crop_pct,
        )  # fmt: skip

    def feature_extractor(self) -> Any:
        """The transformers feature extractor that turns sound into this encoder's `input_features`."""
        raise OpticNerveError(f"{type(self).__name__} hears no sound", kind="unsupported")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Tables that a model of transformers computes itself (DINOv3's rotary frequencies) keep their precision, as
        they do where transformers loads the model in another dtype."""
        kept = list(computed_tables(self.model)) if isinstance(self._modules.get("model"), PreTrainedModel) else []
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name, before in kept:
            now = module.get_buffer(name)
            if now.dtype != before.dtype:
                setattr(module, name, before.to(now.device))
        return self

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The encoder's blocks from input to output: what `encoder.last(N)` counts."""

    @property
    def media_shape(self) -> tuple[int, ...]:
        """Shape of one piece of media (with `native`, of a patch) as `forward` takes it, without the batch."""
        if self.native is not None:
            return (3 * self.native.patch_size**2,)
        return (3, self.image_size, self.image_size)

    def weight_files(self) -> list[str]:
        """The files that the weights came from, for the content hash; empty when there are none."""
        return list(getattr(self, "files", ()))


def last_blocks(encoder: Encoder, count: int) -> list[nn.Module]:
    """The last `count` blocks of an encoder; more than it has is an error with both numbers."""
    blocks = encoder.blocks()
    if not 0 < count <= len(blocks):
        raise OpticNerveError(
            f"encoder.last({count}): this encoder has {len(blocks)} blocks; ask for 1 to {len(blocks)}",
            kind="out-of-range",
        )
    return blocks[-count:]


# -- what several encoders do ------------------------------------------------------------------------------------------


def all_real(tokens_BND: Tensor) -> Features:
    """Tokens of which none is padding."""
    return Features(tokens_BND, torch.ones(tokens_BND.shape[:2], dtype=torch.bool, device=tokens_BND.device))


def longest_list(model: nn.Module, part: str) -> list[nn.Module]:
    """The longest ModuleList: a transformer's layers."""
    lists: list[Any] = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise OpticNerveError(f"{type(model).__name__} has no list of layers; train `{part}` whole", kind="unsupported")
    return list(sorted(lists, key=len)[-1])


class _EnoughError(Exception):
    """All that was asked for has been seen."""


def inputs_of(blocks: Sequence[nn.Module], run: Callable[[], Any]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What each of these blocks is given while `run` runs (arguments and keywords), which is stopped at the last."""
    found: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def keep(number: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[number] = args, kwargs
        if len(found) == len(blocks):
            raise _EnoughError

    handles = [b.register_forward_pre_hook(partial(keep, n), with_kwargs=True) for n, b in enumerate(blocks)]
    try:
        run()
    except _EnoughError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [found[n] for n in sorted(found)]


def config_from_dict(architecture: dict[str, Any], needed_by: str, such_as: str) -> Any:
    """transformers' configuration from a dict with `model_type`."""
    from transformers import AutoConfig

    architecture = dict(architecture)
    model_type = architecture.pop("model_type", None)
    if model_type is None:
        raise OpticNerveError(f"{needed_by} needs architecture.model_type, such as {such_as}", kind="missing-field")
    return AutoConfig.for_model(model_type, **architecture)


def plain_config(config: PreTrainedConfig) -> dict[str, Any]:
    """The configuration as it comes back from a JSON file (the numbers of labels as text, for one)."""
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {k: v for k, v in found.items() if k not in ("_name_or_path", "dtype")}  # the weights' dtype is the recipe's


def model_class(config: PreTrainedConfig, unlisted: Mapping[str, str]) -> Any:
    """transformers' class for a configuration; `unlisted`: names of those that are not in its table of AutoModel."""
    import transformers as tf

    if config.model_type in unlisted:
        return getattr(tf, unlisted[config.model_type])
    try:
        return tf.MODEL_MAPPING[type(config)]
    except KeyError as e:
        raise OpticNerveError(f"transformers has no model for {type(config).__name__}", kind="unknown-name") from e


def load_part(
    cls: type[Any], folder: str, name: str, part: str, *, optional: tuple[str, ...] = (), **options: Any
) -> Any:
    """A model of transformers' `cls` with the weights in `folder`, which may hold more than these.

    Args:
        name, part: for the message. optional: beginnings of names that may be missing.

    Raises:
        OpticNerveError: weights are missing, or of another shape.
    """
    loaded: Any = cls.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    model, report = loaded
    missing = [k for k in sorted(report["missing_keys"]) if not k.startswith(optional)]
    if missing or report["mismatched_keys"]:
        raise OpticNerveError(
            f"{name!r} lacks weights of its {part}: missing {missing[:8]}, "
            f"mismatched {sorted(map(str, report['mismatched_keys']))[:8]}",
            kind="mismatch",
        )
    return model


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], what: str, *, assign: bool = False) -> None:
    """These weights into a module: complete, nothing over, every shape right. `what`: begins the message."""
    wanted = module.state_dict()
    problems = [f"missing {n}" for n in wanted if n not in state]
    problems += [f"left over {n}" for n in state if n not in wanted]
    problems += [
        f"{n} is {tuple(state[n].shape)}, not {tuple(t.shape)}"
        for n, t in wanted.items()
        if n in state and state[n].shape != t.shape
    ]
    if problems:
        raise OpticNerveError(f"{what}: {'; '.join(problems[:8])}", kind="mismatch")
    module.load_state_dict(state, assign=assign)


FITS = ("squash", "squash_float", "crop", "pad")  # "native" makes no square: see `NativeLayout`


def make_image_processor(
    *, size: int, mean: list[float], std: list[float], fit: str = "squash", resample: int = 3, crop_pct: float = 1.0
) -> Any:
    """An image processor for square inputs.

    `fit`: "squash" resizes to size × size (SigLIP), "crop" resizes the shorter side and crops the centre (CLIP),
    "pad" pads to a square first (LLaVA-1.5), "squash_float" squashes without rounding to 8 bits (DINOv3).
    `crop_pct`: how much of the resized side the square in the middle keeps, as timm has it: with 0.875 a picture is
    resized to 256 where `size` is 224 (DINOv2). `resample` is PIL's number (3 is bicubic).
    """
    import transformers as tf

    if fit not in FITS:
        raise OpticNerveError(f"unknown fit {fit!r}; known: {', '.join(FITS)}", kind="unknown-name")
    if crop_pct != 1 and (fit not in ("squash", "crop") or not crop_pct > 0):
        raise OpticNerveError(
            f"crop_pct: {crop_pct} does not go with fit: {fit}; it is above 0, and for squash and crop", kind="conflict"
        )
    common: dict[str, Any] = {"image_mean": mean, "image_std": std, "resample": resample, "do_convert_rgb": True}
    square = {"height": size, "width": size}
    resized = int(size / crop_pct + 1e-6)  # rounded down, as timm does
    if fit == "crop":
        return tf.CLIPImageProcessor(size={"shortest_edge": resized}, crop_size=square, **common)
    if fit == "pad":
        return tf.LlavaImageProcessor(do_pad=True, size={"shortest_edge": size}, crop_size=square, **common)
    if fit == "squash_float":
        return tf.DINOv3ViTImageProcessor(size=square, **common)
    if resized != size:
        return tf.CLIPImageProcessor(size={"height": resized, "width": resized}, crop_size=square, **common)
    return tf.SiglipImageProcessor(size=square, **common)
