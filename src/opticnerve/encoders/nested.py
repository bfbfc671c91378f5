"""Vision encoders that hold other encoders: two side by side on one picture, and the one of a trained `DualEncoder`."""

from __future__ import annotations

import inspect
import json
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from opticnerve import registry
from opticnerve.common import hub
from opticnerve.common.cache import weight_files
from opticnerve.encoders.base import Encoder, load_exactly
from opticnerve.encoders.native import check_one_shape
from opticnerve.types import Features, OpticNerveError


class PairEncoder(Encoder):
    """Two encoders, each with its own weights, on the same pixels, such as SigLIP for what is named and DINOv2 for
    where it is.

    Source: Karamcheti et al. 2024, Prismatic VLMs, section 4.2 (features joined along the width). Joining along the row
    of tokens instead is what Eagle calls sequence append (Shi et al. 2024).

    There is one `pixel_values`, prepared as the first encoder wants it: its size, fit, resampling, mean and deviation.
    Before the second encoder the pixels are normalised anew to the second's mean and deviation; its own fit and
    resampling are not used. Both must take pictures of the same size.

    Args:
        first, second: encoders as in a recipe, `{"type": "hf_vision", "name": …, options}`; in a configuration the
            options that build them again instead of the name.
        join: "channels" puts the two vectors of each place together (as many tokens as each encoder gives, which must
            be the same number), "tokens" puts the second's row of tokens behind the first's (of the same width).
    """

    scale_311: Tensor
    shift_311: Tensor

    def __init__(
        self, *, first: dict[str, Any], second: dict[str, Any], join: Literal["channels", "tokens"] = "channels",
        _encoders: list[Encoder] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if join not in ("channels", "tokens"):
            raise OpticNerveError(f"join is 'channels' or 'tokens', not {join!r}", kind="unknown-name")
        specs = {"first": first, "second": second}
        one, other = _encoders or [part_class(**rest) for part_class, rest in _parts(specs).values()]
        for encoder in (one, other):
            check_one_shape(encoder, "a pair")
        if one.image_size != other.image_size:
            raise OpticNerveError(
                f"the two encoders see one picture, but the first takes {one.image_size} px and the second "
                f"{other.image_size} px; set image_size on one of them",
                kind="conflict",
            )
        self.first, self.second, self.join = one, other, join
        self.image_size = one.image_size
        if join == "channels":
            _check_same("num_tokens", one, other, "tokens", "join the channels")
            self.num_tokens, self.hidden_size = one.num_tokens, one.hidden_size + other.hidden_size
        else:
            _check_same("hidden_size", one, other, "channels", "join the tokens")
            self.num_tokens, self.hidden_size = one.num_tokens + other.num_tokens, one.hidden_size
        self.options = {
            "first": {"type": first["type"], **one.options},
            "second": {"type": second["type"], **other.options},
            "join": join,
        }
        mine, theirs = one.image_processor(), other.image_processor()
        mean_3, std_3 = (torch.tensor(v) for v in (mine.image_mean, mine.image_std))
        other_mean_3, other_std_3 = (torch.tensor(v) for v in (theirs.image_mean, theirs.image_std))
        # (x · std + mean − other mean) / other std, as one product and one sum.
        self.register_buffer("scale_311", (std_3 / other_std_3).view(3, 1, 1), persistent=False)
        self.register_buffer("shift_311", ((mean_3 - other_mean_3) / other_std_3).view(3, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(cls, name: dict[str, Any], **options: Any) -> PairEncoder:
        """`name`: `{"first": …, "second": …}`, as each encoder's own `from_pretrained` takes it."""
        encoder = cls._assemble(name, options, "from_pretrained")
        encoder.files = [*encoder.first.weight_files(), *encoder.second.weight_files()]
        return encoder

    @classmethod
    def planned(cls, name: dict[str, Any], **options: Any) -> PairEncoder:
        return cls._assemble(name, options, "planned")

    @classmethod
    def _assemble(cls, name: dict[str, Any], options: dict[str, Any], how: str) -> PairEncoder:
        parts = _parts(options).items()
        return cls(
            **options, _encoders=[getattr(part_class, how)(name[part], **rest) for part, (part_class, rest) in parts]
        )

    @classmethod
    def take_name(cls, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The names of both encoders as `{"first": …, "second": …}`, and the options without them."""
        names, rest = {}, dict(options)
        for part, (part_class, mine) in _parts(options, may_name=True).items():
            try:
                names[part], left = part_class.take_name(mine)
            except OpticNerveError as e:
                raise e.under(f"encoder.{part}") from e
            rest[part] = {"type": options[part]["type"], **left}
        return names, rest

    @classmethod
    def loading_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        parts = _parts(options, may_name=True).items()
        return options | {p: {"type": options[p]["type"], **c.loading_options(rest)} for p, (c, rest) in parts}

    def forward(self, pixel_values: Tensor) -> Features:
        one = self.first(pixel_values)
        other = self.second(pixel_values * self.scale_311 + self.shift_311)
        if self.join == "tokens":
            return Features(
                torch.cat([one.tokens_BND, other.tokens_BND], dim=1), torch.cat([one.mask_BN, other.mask_BN], dim=1)
            )
        return Features(torch.cat([one.tokens_BND, other.tokens_BND], dim=2), one.mask_BN & other.mask_BN)

    def image_processor(self) -> Any:
        return self.first.image_processor()

    def blocks(self) -> list[nn.Module]:
        """Pairs of blocks, counted from the end: `encoder.last(2)` is the last two of each encoder."""
        pairs = zip_longest(reversed(self.first.blocks()), reversed(self.second.blocks()))
        blocks: list[nn.Module] = [nn.ModuleList([b for b in pair if b is not None]) for pair in pairs]
        return blocks[::-1]


def _parts(options: dict[str, Any], *, may_name: bool = False) -> dict[str, tuple[type[Encoder], dict[str, Any]]]:
    """Of each of the two its class and its options without the type; unknown ones are an error that lists the known."""
    found = {}
    for part in ("first", "second"):
        spec: Any = options.get(part)
        part_class = _part_class(part, spec)
        rest = {k: v for k, v in spec.items() if k != "type"}
        known = inspect.signature(part_class).parameters
        unknown = sorted(set(rest) - set(known) - ({"name"} if may_name else set()))
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            takes = ", ".join(k for k in known if not k.startswith("_"))
            raise OpticNerveError(
                f"encoder.{part}: {spec['type']!r} takes no {', '.join(unknown)}; it takes {takes or 'no options'}",
                kind="unknown-key",
            )
        found[part] = part_class, rest
    return found


def _part_class(part: str, spec: object) -> type[Encoder]:
    """The class of one of the two.

    Only registered names: a pair's configuration may come from a downloaded folder, and a dotted path in it would run
    code that nobody has agreed to.
    """
    if not isinstance(spec, dict) or "type" not in spec:
        raise OpticNerveError(
            f"encoder.{part} wants a mapping with a type, such as hf_vision or timm, not {spec!r}", kind="wrong-type"
        )
    if spec["type"] not in registry.encoders.names() and ":" in str(spec["type"]):
        raise OpticNerveError(
            f"encoder.{part}: {spec['type']!r} is a dotted path; a pair takes registered encoders only, so give yours "
            "a name by an entry point of the group opticnerve.encoders",
            kind="unsupported",
        )
    found: type[Encoder] = registry.encoders.get(spec["type"])
    if found.modality != "image":
        raise OpticNerveError(
            f"encoder.{part}: {spec['type']!r} is for {found.modality}; a pair looks at pictures", kind="unsupported"
        )
    return found


def _check_same(attribute: str, first: Encoder, second: Encoder, what: str, to_do: str) -> None:
    mine, theirs = getattr(first, attribute), getattr(second, attribute)
    if mine != theirs:
        other = "join: tokens" if what == "tokens" else "join: channels"
        raise OpticNerveError(
            f"to {to_do}, both encoders must give as many {what}; the first gives {mine}, the second {theirs}: "
            f"choose others (a patch size, image_size, layer or class_token), or {other}",
            kind="wrong-shape",
        )


# -- of a trained DualEncoder ------------------------------------------------------------------------------------------

_PREFIX = "image.encoder."


class DualEncoderVision(Encoder):
    """The vision encoder of a trained `DualEncoder`, to be docked onto a language model: CLIP's way to LLaVA, with
    one's own. The projection into the space shared with words stays behind: the connector takes its place.

    In a recipe: `encoder: {type: dual_encoder, name: FOLDER}`.
    Source: Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision; Liu et al. 2023,
    Visual Instruction Tuning, section 4.1, where such a vision encoder meets a language model.

    Args:
        encoder: `{"type": …, options}` of the encoder inside. In a recipe, beside `name`, what shall differ from how it
            was trained, such as `{layer: -2}`.
    """

    def __init__(self, *, encoder: dict[str, Any], _encoder: Encoder | None = None) -> None:
        super().__init__()
        self.inner = _encoder if _encoder is not None else _build(encoder)
        check_one_shape(self.inner, "dual_encoder")
        self.hidden_size, self.num_tokens = self.inner.hidden_size, self.inner.num_tokens
        self.image_size = self.inner.image_size
        self.options = {"encoder": {"type": encoder["type"], **self.inner.options}}
        self.files = []

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> DualEncoderVision:
        """`name`: a folder that `DualEncoder.save_pretrained` wrote, or its hub name. options: `encoder`, as above.

        Raises:
            OpticNerveError: there is no `DualEncoder`, or weights of its vision encoder are missing or left over.
        """
        folder = Path(hub.fetch(name))
        spec = _spec(folder, options.get("encoder"))
        inner = _build(spec)
        files = weight_files(folder)
        state: dict[str, Tensor] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                state |= {k.removeprefix(_PREFIX): opened.get_tensor(k) for k in opened.keys() if k.startswith(_PREFIX)}  # noqa: SIM118
        load_exactly(inner, state, f"the vision encoder in {name} does not fit its config.json")
        vision_encoder = cls(encoder=spec, _encoder=inner)
        vision_encoder.files = files
        return vision_encoder.eval()

    @classmethod
    def planned(cls, name: str, **options: Any) -> DualEncoderVision:
        """The same shapes from the configuration alone."""
        with torch.device("cpu"):
            spec = _spec(Path(hub.fetch(name, weights=False)), options.get("encoder"))
        return cls(encoder=spec)

    def forward(self, media: Tensor) -> Features:
        features: Features = self.inner(media)
        return features

    def image_processor(self) -> Any:
        return self.inner.image_processor()

    def blocks(self) -> list[nn.Module]:
        return self.inner.blocks()


def _build(spec: dict[str, Any]) -> Encoder:
    options = {k: v for k, v in spec.items() if k != "type"}
    encoder: Encoder = registry.encoders.get(spec["type"], allow_dotted=False)(**options)
    return encoder


def _spec(folder: Path, changes: dict[str, Any] | None) -> dict[str, Any]:
    """How the encoder inside is built: as it was saved, with what a recipe changes."""
    try:
        image: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))["image"]
        saved: dict[str, Any] = image["encoder"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise OpticNerveError(
            f"{folder} holds no DualEncoder (its config.json names no image encoder): {e!r}", kind="unsupported"
        ) from e
    if image.get("lora"):
        raise OpticNerveError(
            f"the vision encoder in {folder} has an adapter (image.encoder.lora) beside its weights; load the model, "
            "add it in by `merge_adapters()`, and save it again",
            kind="unsupported",
        )
    changes = changes or {}
    if changes.get("type", saved["type"]) != saved["type"]:
        raise OpticNerveError(
            f"the vision encoder in {folder} is of type {saved['type']!r}, not {changes['type']!r}", kind="mismatch"
        )
    if unknown := sorted(set(changes) - set(saved)):
        raise OpticNerveError(
            f"encoder {saved['type']!r} takes no {', '.join(unknown)}; it takes {', '.join(saved)}", kind="unknown-key"
        )
    return {**saved, **changes}
