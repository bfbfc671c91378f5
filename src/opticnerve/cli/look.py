"""`opticnerve look`: where in a picture a model looks while it answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from opticnerve.cli.options import AnswerTokens, JsonFlag, ModelArgument, TrustFlag
from opticnerve.cli.output import console_for, examples, print_json, quiet_libraries
from opticnerve.types import OpticNerveError

if TYPE_CHECKING:
    from opticnerve.interpret.attribution import Attribution

EPILOG = examples(
    'opticnerve look starter "what shape is in the image?" --image picture.png -o where.png',
    'opticnerve look starter "what color is it?" -i picture.png --method attention --layer 20 --head 3 -o head.png',
    'opticnerve look runs/mine "what is this?" -i picture.png --method rollout --method relevance -o both.png --json',
    note="An occlusion map always stands beside the method: attention alone can mislead. docs/look.md says how to read "
    "them.",
)
ImageOption = Annotated[
    list[Path] | None, Option("--image", "-i", help="The picture, exactly one.", show_default=False)
]
MethodOption = Annotated[
    list[str] | None,
    Option(
        "--method", "-m", show_default=False,
        help="attention, rollout, relevance, cross_attention, gradient or occlusion; may be given several times. "
        "By default relevance; cross_attention for models that have it; gradient where soft tokens have no place.",
    ),
]  # fmt: skip
_ONE = "for attention and cross_attention: one {}, from 0; the mean over all by default."


def look_command(
    model: ModelArgument,
    question: Annotated[str, Argument(help="What you want to know.")],
    image: ImageOption = None,
    output: Annotated[Path, Option("--output", "-o", help="The PNG to write.")] = Path("where.png"),
    method: MethodOption = None,
    layer: Annotated[int | None, Option(help=_ONE.format("layer"), show_default=False)] = None,
    head: Annotated[int | None, Option(help=_ONE.format("head"), show_default=False)] = None,
    grid: Annotated[int, Option(help="Cells on each side of the occlusion map.")] = 6,
    patch: Annotated[int, Option(help="Side of the square that covers, in cells.")] = 2,
    max_new_tokens: AnswerTokens = 24,
    trust_remote_code: TrustFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Draw where in the picture a model looks for each word of its answer. Weights are taken as float32."""
    from opticnerve.data.media.open import open_image
    from opticnerve.types import ask as conversation

    # Before the model is loaded: a wrong path should not take seconds to be found.
    if len(image or []) != 1:
        raise OpticNerveError(f"give exactly one --image FILE to look at, not {len(image or [])}", kind="out-of-range")
    if output.suffix.lower() != ".png":
        raise OpticNerveError(
            f"the map is written as PNG: give -o a name that ends in .png, not {output}", kind="unknown-name"
        )
    assert image is not None
    picture = open_image(image[0])

    import torch

    from opticnerve.inference.load import load_model
    from opticnerve.interpret import attribution
    from opticnerve.interpret.plot import attribution_plot

    for name in method or []:
        if name not in attribution.METHODS:
            raise OpticNerveError(
                f"unknown method {name!r}; known: {', '.join(attribution.METHODS)}", kind="unknown-name"
            )
    quiet_libraries()
    parts = load_model(model, dtype=torch.float32, trust_remote_code=trust_remote_code)
    looked = attribution.attribute(
        *parts, conversation(question, image[0]), methods=method, layer=layer, head=head, grid=grid, patch=patch,
        max_new_tokens=max_new_tokens,
    )  # fmt: skip
    attribution_plot(looked, picture, question, output)
    if as_json:
        print_json({"model": model, "question": question, "image": image[0], "output": output, **_plain(looked)})
        return
    console = console_for(as_json)
    typer.echo(looked.answer)
    for found in looked.maps:
        peaks = (found.peak(i) for i in range(len(looked.words)))
        places = (
            f"{w.text} at {x:.0%} from the left, {y:.0%} from the top"
            for w, (x, y) in zip(looked.words, peaks, strict=True)
        )
        console.print(f"{found.method}: {', '.join(places)}", markup=False, highlight=False)
    console.print(f"written: {output}", markup=False, highlight=False)


def _plain(looked: Attribution) -> dict[str, Any]:
    """Words, and for each method its grids (rows from the top) and the place of the highest cell (0 to 1)."""
    words = [
        {"text": w.text, "tokens": len(w.tokens), "log_p": p} for w, p in zip(looked.words, looked.log_p, strict=True)
    ]
    maps = [
        {
            "method": m.method, "note": m.note, "grids": m.grid_WHH.astype(float).tolist(),
            "peaks": [dict(zip(("x", "y"), m.peak(i), strict=True)) for i in range(len(looked.words))],
            "on_picture": m.on_picture,
        }
        for m in looked.maps
    ]  # fmt: skip
    return {"answer": looked.answer, "words": words, "maps": maps, "box": list(looked.box)}
