"""What every fusion promises: connected features enter a language model whose own weights stay as they are; and the
simplest, soft tokens in the text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils import torch_compilable_check

from opticnerve.common.on_host import on_host
from opticnerve.common.private_names import assert_on_device
from opticnerve.common.shards import rows_of
from opticnerve.types import Features


class Fusion(nn.Module, ABC):
    """The way of one modality's soft tokens into the language model.

    Args:
        language_size: width of the language model's embeddings. language_layers: how many layers it has.

    `options` holds the plain keywords that build the same module again (without the sizes, which come from the
    language model). `seen` is what the layers know of the pictures of the prompt in hand, None between prompts.
    """

    def __init__(self, *, language_size: int, language_layers: int) -> None:
        super().__init__()
        self.language_size, self.language_layers = language_size, language_layers
        self.options: dict[str, Any] = {}
        self.seen: Any = None

    if TYPE_CHECKING:
        # What a subclass has of its own is a module, a tensor or a plain value.
        def __getattr__(self, name: str) -> Any: ...

    @abstractmethod
    def placeholders(self, num_tokens: int) -> int:
        """Placeholders that the processor writes for a picture (or window of sound) of `num_tokens` soft tokens."""

    @abstractmethod
    def embed(self, embeds_BLD: Tensor, placeholder_BL: Tensor, features: Features) -> Tensor:
        """Embeddings (B, L, D) with something in the places of the placeholders (a bool mask, (B, L)).

        `features`: soft tokens, one row for each picture, in the order of the placeholders.

        Raises:
            ValueError: placeholders and features disagree; the message has both numbers.
        """

    def see(self, placeholder_BL: Tensor, features: Features, group_BL: Tensor | None = None) -> Any:
        """What the layers need to know of the pictures of this prompt; None where they need nothing.

        It outlives the forward pass: it travels with the cache and serves every later token (see `later`).
        `group_BL`: which sample of a packed row each position belongs to.
        """
        return None

    def imagine(self, rows: int, length: int, features: Features) -> Any:
        """`see` for shapes alone (the meta device): `rows` of `length` tokens, the pictures spread evenly."""
        return None

    def later(self, seen: Any, length: int) -> Any:
        """`seen` for the next `length` tokens behind those that it was made for."""
        return seen

    def beside(self, parts: Sequence[tuple[Any, Tensor]]) -> Any:
        """What rows of several batches see, side by side: of each `seen` (None: nothing) its rows of these indices.

        Answers share a running batch (`serve.batch`) where a fusion that sees something says how.
        """
        raise NotImplementedError

    @contextmanager
    def seeing(self, seen: object) -> Iterator[None]:
        """Within it, a forward pass of the language model sees what `see` gave."""
        before, self.seen = self.seen, seen
        try:
            yield
        finally:
            self.seen = before

    def wire(self, language_model: nn.Module) -> None:
        """Called once, when the language model is docked: a fusion that acts within its layers hooks itself there."""

    def start(self, embeddings: nn.Module) -> None:
        """Called once for a fresh dock, with the language model's embedding table: first weights that depend on it."""

    def dummy_pass(self, embeds_BLD: Tensor, features: Features) -> Tensor:
        """The same embeddings, bit for bit, made to depend on every weight of this fusion and on `features`.

        With several processes, each must give every trained weight a gradient in every step, also where its share of
        the batch holds no picture.
        """
        touched = sum((p.sum() * 0 for p in self.parameters()), features.tokens_BND.sum() * 0)
        return embeds_BLD + touched.to(embeds_BLD.dtype)


@contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """Within it, a module's own weights are there, also where accelerate offloads them: it does so in `forward`
    alone."""
    if not any(p.is_meta for p in module.parameters(recurse=False)):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def check_count(
    wanted: int | Tensor, found: int | Tensor,
    message: str = "{wanted} image placeholders in the text, but {found} visual tokens from the pictures; let the "
    "processor write the placeholders, and never truncate after it has",
) -> None:  # fmt: skip
    """The processor wrote as many placeholders as there are soft tokens, or it is an error with both numbers.

    Numbers on a device are waited for once; a graph (`torch.compile`, `torch.export`) carries the check along. They may
    lie on several devices, as the parts of a model do that is split over them.
    """
    if any(isinstance(count, Tensor) and count.is_meta for count in (wanted, found)):
        return  # nobody knows
    if isinstance(wanted, Tensor) and isinstance(found, Tensor):
        found = found.to(wanted.device)
    torch_compilable_check(
        torch.as_tensor(wanted == found), lambda: message.format(wanted=int(wanted), found=int(found))
    )


@torch.no_grad()
def words_of(embeddings: nn.Module, rows: int = 8192) -> tuple[Tensor, float]:
    """Mean (D,) and deviation of all words as the language model's first layer meets them, in float32.

    The embedding *module* is asked, not its table: Gemma's multiplies by the square root of its width, others end in a
    norm. What a model does to embeddings behind the module (Granite's multiplier, Bloom's norm, OPT's projection) it
    does to soft tokens as well.
    """
    weight: Any = embeddings.weight
    count, total, squares = 0, torch.zeros((), dtype=torch.float64), 0.0
    for start in range(0, weight.shape[0], rows):
        words_VD = _words(embeddings, start, min(start + rows, weight.shape[0])).double().cpu()
        count, total, squares = count + len(words_VD), total + words_VD.sum(0), squares + float(words_VD.square().sum())
    numbers = count * total.numel()
    variance = (squares - float(total.sum()) ** 2 / numbers) / (numbers - 1)
    return (total / count).float(), max(variance, 0.0) ** 0.5


def _words(embeddings: nn.Module, start: int, stop: int) -> Tensor:
    """The embeddings (V, D) of the words from `start` to `stop`. Of a table that lies in shards these rows alone come
    together, and every process must call it."""
    table: Any = embeddings.weight
    ids_V = torch.arange(start, stop, device=table.device)
    if not isinstance(table, DTensor):
        words_VD: Tensor = embeddings(ids_V)
        return words_VD
    module: Any = embeddings
    rows, padding = {"weight": rows_of(table, start, stop)}, module.padding_idx
    module.padding_idx = None  # a number in all of the table; it concerns gradients alone
    try:
        words_VD = torch.func.functional_call(embeddings, rows, (ids_V - start,))
    finally:
        module.padding_idx = padding
    return words_VD


class Splice(Fusion):
    """Soft tokens in the text: written over the embeddings at the placeholder positions, in order. LLaVA's and BLIP-2's
    way into the language model.

    It has no weights of its own, and only checks: the processor alone decides how many placeholders there are.
    Source: Liu et al. 2023, Visual Instruction Tuning, section 4.1.

    Args: language_size, language_layers: see `Fusion`.
    """

    def placeholders(self, num_tokens: int) -> int:
        return num_tokens

    def embed(self, embeds_BLD: Tensor, placeholder_BL: Tensor, features: Features) -> Tensor:
        real_K, shown_BL = features.mask_BN.flatten(), on_host(placeholder_BL)
        if real_K.is_cuda and not shown_BL.is_cuda and int(shown_BL.sum()) == len(real_K):
            # Known on the host, and as many as there can be: that all are real is left to the device, unwaited for.
            assert_on_device(real_K.all(), "an encoder calls tokens not real that have placeholders")
        else:
            check_count(shown_BL.sum(), on_host(features.mask_BN).sum())
        # Those that are real first, in their order: `tokens[mask]` would wait for the device and break a graph.
        first_K = torch.argsort((~real_K).byte(), stable=True)
        soft_KD = features.tokens_BND.flatten(0, 1)[first_K].to(embeds_BLD)
        return embeds_BLD.masked_scatter(placeholder_BL.unsqueeze(-1), soft_KD)
