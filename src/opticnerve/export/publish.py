"""A model with its card on a hub, or in a folder that looks as the hub's would."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from opticnerve.common import atomic, hub
from opticnerve.export.export import Exported, export
from opticnerve.export.formats import PLAIN, Options
from opticnerve.models.checkpoint.source import resolve
from opticnerve.runs.card.card import write_card
from opticnerve.types import OpticNerveError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LIBRARY = {
    **dict.fromkeys(("hf-llava", "hf-llava-next", "hf-idefics3", "hf-blip2"), "transformers"), "gguf": "llama.cpp",
    "merged": "opticnerve",
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """Where it lies now (a folder or an address), and what the export gave."""

    place: str
    exported: Exported


def push(
    name: str,
    repo: str,
    *,
    to: str = "merged",
    to_folder: str | Path | None = None,
    licence: str | None = None,
    datasets: Sequence[str] = (),
    private: bool = False,
    options: Options = PLAIN,
    api: HfApi | None = None,
    emit: Callable[[str], None] = lambda line: None,
) -> Published:
    """Export a model, put its card beside it, and upload both.

    Args:
        repo: `owner/name`. to: the format. to_folder: put everything into a folder `name` there instead of a hub.
        licence, datasets: for the card's front matter, as the hub calls them. private: who may see a new repository.
        api: a `huggingface_hub.HfApi`; by default one with the environment's token (`HF_TOKEN`).

    Raises:
        OpticNerveError: `repo` is no name of a repository, the export failed, or the folder exists.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as e:
        raise OpticNerveError(f"{repo!r} is no name of a repository (owner/name): {e}", kind="wrong-type") from e
    title = repo.rpartition("/")[2]

    def make(folder: Path) -> Exported:
        made = export(name, to, folder, options=options, emit=emit)
        try:
            write_readme(name, folder, made, title=title, licence=licence, datasets=datasets)
        except BaseException:
            shutil.rmtree(folder)  # a folder without its card is half-made
            raise
        return made

    if to_folder is not None:
        folder = Path(to_folder) / title
        return Published(str(folder), make(folder))
    from huggingface_hub import HfApi, get_token

    if api is None and get_token() is None:  # before minutes of export
        remedy = "log in by `hf auth login` (or set HF_TOKEN) with a token that may write there"
        raise hub.HubError(f"nobody is logged in who could write to {repo!r}", remedy, kind="token")
    api = api or HfApi()
    with tempfile.TemporaryDirectory(prefix="opticnerve-push-") as scratch:
        made = make(folder := Path(scratch) / title)
        emit(f"uploading to {repo}")
        with hub.errors(repo, writes=True):
            api.create_repo(repo_id=repo, private=private, exist_ok=True)
            address = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"{to} by opticnerve")
        return Published(str(address), made)


def write_readme(
    name: str, folder: Path, made: Exported, *, title: str, licence: str | None, datasets: Sequence[str]
) -> None:
    """README.md: the run's card, if there is one, with front matter for the hub, and how the files were proved."""
    run = run_of(Path(resolve(name)))
    front: dict[str, Any] = {"license": "other", "pipeline_tag": "image-text-to-text", "tags": ["opticnerve"]}
    body = f"# {title}\n\nA vision-language model docked with opticnerve."
    if run is not None:
        own, body = split(write_card(run).read_text(encoding="utf-8"))
        front |= own
        if (run / "plots").is_dir():
            shutil.copytree(run / "plots", folder / "plots")
    front["library_name"] = LIBRARY.get(made.format, "opticnerve")
    if licence:
        front["license"] = licence
    if datasets:
        front["datasets"] = list(datasets)
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    atomic.write(folder / "README.md", f"---\n{head}---\n\n{body.strip()}\n\n{_proof(made)}\n")


def run_of(folder: Path) -> Path | None:
    """The run that a stage's folder belongs to; None for a model that stands alone."""
    run = folder.parent.parent
    return run if folder.parent.name == "stages" and (run / "recipe.yaml").is_file() else None


def split(card: str) -> tuple[dict[str, Any], str]:
    """A card's front matter and what stands behind it."""
    if not card.startswith("---\n"):
        return {}, card
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    return yaml.safe_load(head) or {}, body


def _proof(made: Exported) -> str:
    text, proof = "**UNCHECKED**: no engine has loaded these files.", made.proof
    if proof is not None:
        text = (
            f"{proof.engine} loaded them in a process of its own and answered {proof.samples} prompts: off by "
            f"{proof.difference:.2g} {proof.unit} at most ({proof.allowed:g} is allowed)."
        )
    return "\n".join(["## How these files were checked", "", text, *(f"\nNote: {n}" for n in made.notes)])
