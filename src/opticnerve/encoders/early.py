"""A vision encoder goes no further than the layer that is asked for: LLaVA-1.5 takes the last but one, and the last is
work for nothing, a twelfth of CLIP-ViT-B."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn


class _EnoughError(Exception):
    """All that was asked for has been seen."""


def inputs_of(blocks: Sequence[nn.Module], wanted: Sequence[int], run: Callable[[], Any]) -> dict[int, Tensor]:
    """What the blocks of these numbers are given while `run` runs, which is stopped at the last of them."""
    found: dict[int, Tensor] = {}

    def keep(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[number] = args[0] if args else kwargs["hidden_states"]
            if len(found) == len(set(wanted)):
                raise _EnoughError

        return hook

    handles = [blocks[n].register_forward_pre_hook(keep(n), with_kwargs=True) for n in set(wanted)]
    try:
        run()
    except _EnoughError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found
