"""A tower: one encoder, its connector, and the way they enter the language model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from opticnerve import registry
from opticnerve.connectors.base import Connector
from opticnerve.encoders.base import Encoder
from opticnerve.types import Features, OpticNerveError


class Tower(nn.Module):
    """Media in, soft tokens at the language model's width out. Checks that neighbours fit when it is built."""

    encoder: Encoder
    connector: Connector
    fusion: Any

    def __init__(self, encoder: Encoder, connector: Connector, fusion: nn.Module) -> None:
        super().__init__()
        if encoder.hidden_size != connector.in_size or encoder.num_tokens != connector.in_tokens:
            raise OpticNerveError(
                f"encoder gives {encoder.num_tokens} tokens of width {encoder.hidden_size}; "
                f"connector takes {connector.in_tokens} of width {connector.in_size}"
            )
        self.encoder, self.connector, self.fusion = encoder, connector, fusion

    @property
    def num_tokens(self) -> int:
        """Soft tokens of one image: the number of placeholders that the processor writes."""
        return int(self.connector.num_tokens)

    def forward(self, pixel_values: Tensor) -> Features:
        """`pixel_values` (B, 3, H, W) in any float dtype → `Features` (B, num_tokens, language width)."""
        return self.connector(self.encode(pixel_values))

    def encode(self, pixel_values: Tensor) -> Features:
        """The encoder's part alone: what a cache of frozen features holds."""
        weight = next(self.encoder.parameters(), None)
        if weight is not None:
            pixel_values = pixel_values.to(weight.device, weight.dtype)
        features: Features = self.encoder(pixel_values)
        return features

    def connect(self, features: Features) -> Features:
        """The connector's part alone, on features from `encode` or from a cache."""
        weight = next(self.connector.parameters())
        return self.connector(Features(features.tokens_BND.to(weight.device, weight.dtype), features.mask_BN))

    def describe(self) -> dict[str, Any]:
        """The tower's entry in `OpticNerveConfig.towers`."""
        return {
            "encoder": {"type": type_name(registry.encoders, self.encoder), **self.encoder.options},
            "connector": {"type": type_name(registry.connectors, self.connector), **self.connector.options},
            "fusion": {"type": type_name(registry.fusions, self.fusion), **self.fusion.options},
        }


def build_tower(spec: dict[str, Any], *, language_width: int, trust_remote_code: bool = False) -> Tower:
    """A tower with random weights from its entry in the configuration."""
    encoder = make(registry.encoders, spec["encoder"], trust_remote_code)
    return join(encoder, spec["connector"], spec["fusion"], language_width, trust_remote_code)


def join(
    encoder: Encoder, connector: dict[str, Any], fusion: dict[str, Any], language_width: int, trusted: bool = True
) -> Tower:
    """Build the connector that fits between `encoder` and the language model, and the fusion."""
    sizes = {"in_size": encoder.hidden_size, "in_tokens": encoder.num_tokens, "out_size": language_width}
    return Tower(
        encoder, make(registry.connectors, {**connector, **sizes}, trusted), make(registry.fusions, fusion, trusted)
    )


def make(parts: registry.Registry[Any], spec: dict[str, Any], trusted: bool = True) -> Any:
    """One part from `{"type": name, **keywords}`; wrong keywords are an error that lists the right ones."""
    options = {k: v for k, v in spec.items() if k != "type"}
    cls = parts.get(spec["type"], allow_dotted=trusted)
    check_options(parts.kind, spec["type"], cls, options)
    return cls(**options)


def check_options(kind: str, name: str, cls: type, options: dict[str, Any]) -> None:
    """Refuse keywords that the part's constructor does not take."""
    import inspect

    known = inspect.signature(cls).parameters
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return
    if unknown := sorted(set(options) - set(known)):
        takes = [k for k in known if k not in ("in_size", "out_size", "in_tokens") and not k.startswith("_")]
        raise OpticNerveError(
            f"{kind} {name!r} takes no {', '.join(unknown)}; it takes {', '.join(takes) or 'no options'}"
        )


def type_name(parts: registry.Registry[Any], module: nn.Module) -> str:
    """The registered name of a part's class, or its dotted path."""
    for name in parts.names():
        if parts.get(name) is type(module):
            return name
    return f"{type(module).__module__}:{type(module).__qualname__}"
