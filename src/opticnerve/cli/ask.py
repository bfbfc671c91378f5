"""`opticnerve ask`: one question, one answer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from opticnerve.cli.output import JsonFlag, TrustFlag, examples, print_json, quiet_libraries

EPILOG = examples(
    'opticnerve ask starter "what shape is in the image?" --image picture.png',
    'opticnerve ask runs/demo "is there a red circle?" --image picture.png --json',
    'opticnerve ask runs/demo "What is the capital of France?"',
)
MODEL_HELP = "A run's folder, a stage's folder, a merged folder, a hub name, or `starter`."
ImageOption = Annotated[list[Path] | None, typer.Option("--image", "-i", help="A picture; may be given several times.")]
AudioOption = Annotated[list[Path] | None, typer.Option("--audio", "-a", help="A sound; may be given several times.")]


def ask(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    question: Annotated[str, typer.Argument(help="What you want to know.")],
    image: ImageOption = None,
    audio: AudioOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 64,
    trust_remote_code: TrustFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Ask a model one question, about a picture, a sound, or none. The answer is what is printed on stdout."""
    from opticnerve.data.media.audio import open_audio
    from opticnerve.data.media.open import open_image
    from opticnerve.types import ask as conversation

    # Before the model is loaded: a wrong path should not take seconds to be found.
    for path in image or []:
        open_image(path)
    for path in audio or []:
        open_audio(path)

    from opticnerve.inference.generate import Answerer
    from opticnerve.inference.load import load_model

    quiet_libraries()
    answerer = Answerer(*load_model(model, trust_remote_code=trust_remote_code))
    started = time.perf_counter()
    asked = conversation(question, *(image or ()), audios=audio or ())
    [answer] = answerer.answer([asked], max_new_tokens=max_new_tokens)
    if as_json:
        found = {"images": [str(path) for path in image or []], "audios": [str(path) for path in audio or []]}
        seconds = round(time.perf_counter() - started, 3)
        print_json({"model": model, "question": question, **found, "answer": answer, "seconds": seconds})
    else:
        typer.echo(answer)
