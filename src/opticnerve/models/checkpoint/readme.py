"""README.md of a saved model: what it is, by the hub's words for it, and how it is loaded.

Plain transformers says of such a folder that it does not know the architecture `opticnerve`. It offers no way to say
more, short of code in the folder that is run on whoever loads it (`auto_map`, `trust_remote_code`); so a saved folder
says it here, and by `library_name`, as those of timm, open_clip and sentence-transformers do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData

from opticnerve.common import atomic

README = "README.md"
# What the model_type of a configuration is called in Python, and on a hub.
_CALLED = {
    "opticnerve": ("OpticNerveForConditionalGeneration", "OpticNerveProcessor", "image-text-to-text"),
    "opticnerve_dual_encoder": ("DualEncoder", "DualEncoderProcessor", "zero-shot-image-classification"),
    "opticnerve_fusion_classifier": ("FusionClassifier", "FusionClassifierProcessor", "visual-question-answering"),
}
_BODY = """# A model of opticnerve

It loads where opticnerve is installed:

```sh
pip install opticnerve
```

```python
from opticnerve.models import {model}, {processor}
model = {model}.from_pretrained(".")  # this folder, or its name on a hub
processor = {processor}.from_pretrained(".")
```

After `import opticnerve` the Auto classes of transformers know it, too. "Transformers does not recognize this
architecture" says that opticnerve is not installed, or was not imported.
"""


def card(config: Any) -> str:
    """The page for a model of this configuration."""
    model, processor, task = _CALLED[config.model_type]
    if "image" not in (getattr(config, "towers", None) or {"image": ...}):
        task = "audio-text-to-text"
    front = ModelCardData(library_name="opticnerve", pipeline_tag=task, tags=["opticnerve"])
    return str(ModelCard(f"---\n{front}\n---\n\n{_BODY.format(model=model, processor=processor)}"))


def introduce(folder: Path, config: Any) -> None:
    """Write the page into a folder that has none."""
    if not (folder / README).exists():
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write(folder / README, card(config))


def introduce_on_hub(repository: str, config: Any, *, private: bool | None, token: str | bool | None) -> None:
    """The same for a repository: transformers, which else writes a page of its own there, keeps one that it finds."""
    api = HfApi(token=token)
    name = api.create_repo(repository, private=private, exist_ok=True).repo_id
    if not api.file_exists(name, README):
        api.upload_file(path_or_fileobj=card(config).encode(), path_in_repo=README, repo_id=name)
