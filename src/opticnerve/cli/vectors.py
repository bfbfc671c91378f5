"""`opticnerve classify` and `opticnerve embed`: what a dual encoder does with pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from opticnerve.cli.options import JsonFlag, TrustFlag
from opticnerve.cli.output import console_for, examples, print_json, quiet_libraries
from opticnerve.types import OpticNerveError

CLASSIFY_EPILOG = examples(
    'opticnerve classify runs/contrastive --image picture.png --classes "cat, dog, bird"',
    'opticnerve classify runs/contrastive -i a.png -i b.png --classes names.txt --templates "a photo of a {}."',
    note="A class is the mean of its name in all templates; the picture belongs to the class it lies nearest.",
)
EMBED_EPILOG = examples(
    "opticnerve embed runs/contrastive --data captions.jsonl --out vectors",
    "opticnerve embed runs/contrastive --data starter/emoji/held-out-vendor --out vectors --faiss",
    note="images.npy and texts.npy hold float32 vectors of length 1, a row for each line of the .ids.jsonl beside "
    "them: faiss's `index.add(numpy.load(file))` takes them as they are.",
)
MODEL_HELP = "A run's folder of a dual encoder, or its hub name."


def classify(
    model: Annotated[str, Argument(help=MODEL_HELP)],
    image: Annotated[list[Path], Option("--image", "-i", help="A picture; may be given several times.")],
    classes: Annotated[str, Option(help="Names with commas between them, or a text file with one in each line.")],
    templates: Annotated[
        str, Option(help="plain, photo, clip, or a sentence of your own with {} for the name.")
    ] = "photo",
    top: Annotated[int, Option(min=1, help="So many of the likeliest classes are shown.")] = 3,
    trust_remote_code: TrustFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Classify pictures among classes that you name, without training (zero-shot)."""
    from opticnerve.data.media.open import open_image
    from opticnerve.inference.zero_shot import ZeroShotClassifier, check_classes

    named = _classes(classes)
    check_classes(named)
    for path in image:
        open_image(path)
    found = ZeroShotClassifier(_embedder(model, trust_remote_code), named, templates).probabilities(image)
    best = [
        {"image": str(path), "classes": [{"class": named[i], "probability": float(row[i])} for i in (-row).argsort()]}
        for path, row in zip(image, found, strict=True)
    ]
    if as_json:
        print_json({"model": model, "templates": templates, "pictures": best})
        return
    for entry in best:
        shown: Any = entry["classes"]
        likely = ", ".join(f"{c['class']} {c['probability']:.1%}" for c in shown[:top])
        typer.echo(f"{entry['image']}: {likely}" if len(best) > 1 else likely)


def embed(
    model: Annotated[str, Argument(help=MODEL_HELP)],
    data: Annotated[str, Option(help="Captioned pictures: a file of any format that training reads.")],
    out: Annotated[Path, Option(help="The folder to write to.")],
    media: Annotated[Path | None, Option(help="Where the pictures' paths start.")] = None,
    faiss: Annotated[bool, Option("--faiss", help="Write a Faiss index, too (needs faiss).")] = False,
    trust_remote_code: TrustFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Turn captioned pictures into vectors: of the pictures and of the captions, in files for a search engine."""
    from opticnerve.common.progress import Waiting
    from opticnerve.data.collators.contrastive import caption_of
    from opticnerve.data.dataset.load import load_data
    from opticnerve.inference.embeddings import save_embeddings
    from opticnerve.recipe import DataSpec

    if out.is_file():
        raise OpticNerveError(f"--out {out} is a file; name a folder", kind="wrong-type")
    conversations = load_data(DataSpec(path=data, media=str(media) if media else None))
    texts = list(dict.fromkeys(caption_of(c) for c in conversations))
    ids = [c.id for c in conversations]
    console, embedder = console_for(as_json), _embedder(model, trust_remote_code)
    with Waiting(console, f"{len(conversations):,} pictures") as bar:
        vectors = embedder.images([c.images[0].source for c in conversations], progress=bar.update)
    written = {"images": save_embeddings(out, "images", vectors, ids, faiss_index=faiss)}
    written["texts"] = save_embeddings(out, "texts", embedder.texts(texts), texts, faiss_index=faiss)
    files = {kind: {k: str(v) for k, v in paths.items()} for kind, paths in written.items()}
    if as_json:
        print_json({"model": model, "pictures": len(ids), "texts": len(texts), "width": vectors.shape[1], **files})
        return
    for paths in files.values():
        console.print("wrote " + ", ".join(paths.values()), soft_wrap=True)


def _embedder(model: str, trust_remote_code: bool) -> Any:
    from opticnerve.inference.embeddings import Embedder, load_dual_encoder

    quiet_libraries()
    return Embedder(*load_dual_encoder(model, trust_remote_code=trust_remote_code))


def _classes(given: str) -> list[str]:
    path = Path(given)
    if path.suffix == ".txt" and path.is_file():
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [name.strip() for name in given.split(",")] if given.strip() else []
