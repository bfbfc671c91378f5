"""Everything that exists only for speed: other ways to compute what plain torch, transformers and peft compute.

Here alone other people's `forward` and attention are replaced, and only while a stage trains or an answer is written.
`OPTICNERVE_PLAIN=1` in the environment switches all of it off: then every number comes from transformers' and peft's
own code, slower and in more memory. Whoever doubts a result runs it once that way; the test suite passes both ways.

What a stage uses, and what it does not apply to, is told once by the logger `opticnerve.ops`, at level INFO.
"""

from __future__ import annotations

import logging
import os
from functools import cache

_log = logging.getLogger(__name__)


def enabled() -> bool:
    """Whether anything of this folder may be used. Asked each time, so that a test may change its mind."""
    if os.environ.get("OPTICNERVE_PLAIN", "0") in ("", "0"):
        return True
    tell("off, for OPTICNERVE_PLAIN is set: transformers' and peft's own code computes")
    return False


@cache
def tell(what: str) -> None:
    """Say once that an op applies, or why it does not."""
    _log.info("ops: %s", what)
