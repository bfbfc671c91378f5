"""What models of a vision encoder and a text encoder share: how they are assembled, loaded, and taken apart by name."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel

from opticnerve.encoders.base import last_blocks
from opticnerve.models.checkpoint.strict import StrictLoading, restore_buffers
from opticnerve.models.vlm.tower import Tower, placed_like
from opticnerve.types import OpticNerveError


class TwoTowerModel(StrictLoading, PreTrainedModel):
    """`image` and `text`, each with its `encoder`, and whatever makes one model of them.

    A subclass builds all of it in `_assemble(vision encoder, reader)` from its configuration, and names its parts:
    `PARTS`, the words that a stage uses; `WHOLES`, beginnings of parameters' names that the freeze table sums up;
    `STARTS`, those of a part whose parameters are not called by its name.
    """

    PARTS: ClassVar[tuple[str, ...]]
    WHOLE_PARTS: ClassVar[tuple[str, ...]]
    STARTS: ClassVar[dict[str, tuple[str, ...]]] = {}

    # No language model, and nothing docked onto one: see `models.family.Model`.
    language_model: Any = None
    towers: ClassVar[dict[str, Tower]] = {}

    image: Any
    text: Any
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # type: ignore[assignment]
    _supports_sdpa = True

    def _assemble(self, vision_encoder: Any, reader: Any) -> None:
        raise NotImplementedError

    @classmethod
    def _around(cls, config: Any, vision_encoder: Any, reader: Any) -> Any:
        """A model of that configuration around encoders that hold their weights already."""
        model = cls.__new__(cls)
        PreTrainedModel.__init__(model, config)
        model._assemble(vision_encoder, reader)
        # post_init would draw new random weights for parts that have theirs already; only its bookkeeping is wanted.
        model.all_tied_weights_keys = {}
        model.config.dtype = placed_like(model).dtype
        model.config.architectures = [cls.__name__]
        return model.eval()

    def restore_tables(self) -> None:
        """The vision encoder may be no model of transformers; the text encoder is one always."""
        if self.image is not None:
            encoder = self.image.encoder
            restore_buffers(encoder, lambda: type(encoder)(**encoder.options))

    def _init_weights(self, module: nn.Module) -> None:
        """Each part draws its own first weights when it is built."""

    def full_name(self, part: str) -> str:
        """The words for parts are clear as they are."""
        return part

    def whole_parts(self) -> list[tuple[str, tuple[str, ...]]]:
        """What the freeze table sums up: each label, and the beginnings of the names under it."""
        return [(start.rstrip("._"), (start,)) for start in self.WHOLE_PARTS]

    def part_parameters(self, part: str) -> dict[str, nn.Parameter]:
        """Full name → parameter of one of `PARTS`.

        Raises:
            OpticNerveError: no such part, or one without parameters in this model.
        """
        named = dict(self.named_parameters())
        if match := re.fullmatch(r"(image|text)\.encoder\.last\((\d+)\)", part):
            tower = getattr(self, match[1])
            blocks = [] if tower is None else last_blocks(tower.encoder, int(match[2]))
            chosen = {id(p) for block in blocks for p in block.parameters()}
            found = {n: p for n, p in named.items() if id(p) in chosen}
        elif part in self.PARTS:
            found = {n: p for n, p in named.items() if n.startswith(self.STARTS.get(part, (part + ".",)))}
        else:
            raise OpticNerveError(f"a {type(self).__name__} has no part {part!r}; its parts: {', '.join(self.PARTS)}")
        if not found:
            raise OpticNerveError(f"{part} has no parameters in this model")
        return found
