"""`opticnerve ask` and `opticnerve chat`: one question, or a conversation about pictures with a memory."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from opticnerve.cli.guard import fail
from opticnerve.cli.options import AnswerTokens, JsonFlag, ModelArgument, TrustFlag
from opticnerve.cli.output import console_for, examples, load_answerer, print_json
from opticnerve.types import Conversation, ImagePart, Message, OpticNerveError, Part, TextPart

if TYPE_CHECKING:
    from rich.console import Console

BoxFrame = Literal["thousandths", "pixels"]
ASK_EPILOG = examples(
    'opticnerve ask starter "what shape is in the image?" --image picture.png',
    'opticnerve ask runs/demo "is there a red circle?" --image picture.png --json',
    'opticnerve ask runs/demo "What is the capital of France?"',
    'opticnerve ask runs/boxes "Where is the cup?" --image table.jpg --draw found.png',
)
CHAT_EPILOG = examples(
    "opticnerve chat starter --image picture.png",
    "opticnerve chat runs/demo",
    note="While chatting: /image FILE, /reset, /save FILE, /help, /quit. Ctrl-C stops an answer, Ctrl-D leaves.",
)
HELP = """/image FILE   look at another picture; it belongs to your next question
/reset        forget the conversation; the picture stays
/save FILE    write the conversation as one line of chat JSONL
/help         this list
/quit         leave (so does Ctrl-D); Ctrl-C stops an answer in progress"""


def ask(
    model: ModelArgument,
    question: Annotated[str, Argument(help="What you want to know.")],
    image: Annotated[list[Path] | None, Option("--image", "-i", help="A picture; may be given several times.")] = None,
    audio: Annotated[list[Path] | None, Option("--audio", "-a", help="A sound; may be given several times.")] = None,
    video: Annotated[
        list[Path] | None,
        Option("--video", "-v", help="A video, of which the frames are shown that training took; several times."),
    ] = None,
    max_new_tokens: AnswerTokens = 64,
    draw: Annotated[
        Path | None,
        Option("--draw", help="Write the last picture with the boxes and points of the answer to this file."),
    ] = None,
    frame: Annotated[
        BoxFrame, Option(help="What the answer's numbers are: thousandths of the picture's sides, or its pixels.")
    ] = "thousandths",
    trust_remote_code: TrustFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Ask a model one question, about a picture, a video, a sound, or none. The answer is what is printed on stdout."""
    from opticnerve.data.formats.boxes import FRAMES, boxes_in
    from opticnerve.data.media.audio import open_audio
    from opticnerve.data.media.marks import marked
    from opticnerve.data.media.open import open_image
    from opticnerve.data.media.timeline import sampling_of
    from opticnerve.data.media.video import frames, in_order
    from opticnerve.types import ask as conversation

    images, audios, videos = image or [], audio or [], video or []
    if draw is not None and not images:
        raise OpticNerveError("--draw draws on the picture asked about; give one with --image", kind="missing-field")
    # Before the model is loaded: a wrong path should not take seconds to be found.
    for path in images:
        open_image(path)
    for path in audios:
        open_audio(path)
    for path in videos:
        frames(path, 1)
    answerer = load_answerer(model, trust_remote_code)
    started = time.perf_counter()
    asked = conversation(question, *images, audios=audios)
    for path in videos[::-1]:
        asked = asked.shown(in_order(path, sampling_of(answerer.processor.frames)))
    [answer] = answerer.answer([asked], max_new_tokens=max_new_tokens)
    if draw is not None:
        marked(open_image(images[-1]), boxes_in(answer), frame=FRAMES[frame]).save(draw)
    if not as_json:
        typer.echo(answer)
        return
    seconds = round(time.perf_counter() - started, 3)
    found = {"images": [str(path) for path in images], "audios": [str(path) for path in audios]}
    found |= {"videos": [str(path) for path in videos]} if videos else {}
    print_json({"model": model, "question": question, **found, "answer": answer, "seconds": seconds})


def chat(
    model: ModelArgument,
    image: Annotated[Path | None, Option("--image", "-i", help="The picture to talk about.")] = None,
    max_new_tokens: AnswerTokens = 256,
    temperature: Annotated[float, Option(min=0.0, help="0 always takes the likeliest word.")] = 0.0,
    trust_remote_code: TrustFlag = False,
) -> None:
    """Talk with a model: answers appear as they are made, and it remembers what was said."""
    session = Session(max_new_tokens=max_new_tokens, temperature=temperature)
    if image is not None:
        session.show_image(image)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys and history at the prompt

    session.answerer = load_answerer(model, trust_remote_code)
    session.run()


class Session:
    """The state of a chat: what was said, and the picture that the next question brings along."""

    def __init__(self, *, max_new_tokens: int = 256, temperature: float = 0.0, answerer: Any = None) -> None:
        self.max_new_tokens, self.temperature, self.answerer = max_new_tokens, temperature, answerer
        self.messages: list[Message] = []
        self.picture: Path | None = None
        self.shown = False  # whether the picture stands in the conversation already
        self.console = console_for(False)

    def run(self) -> None:
        """Until the user leaves. An error about a picture or a file is printed, and the session goes on."""
        self.console.print("[dim]/help lists what you can type[/]")
        while True:
            try:
                line = self.console.input("[bold cyan]you>[/] ").strip()
            except EOFError:
                self.console.print()
                return
            except KeyboardInterrupt:
                self.console.print("\n[dim]Ctrl-D or /quit leaves[/]")
                continue
            try:
                if line in ("/quit", "/exit"):
                    return
                if line.startswith("/"):
                    self.command(line)
                elif line:
                    self.emit(line)
            except (OpticNerveError, OSError) as e:
                fail(str(e))

    def command(self, line: str) -> None:
        """One of the words that begin with a slash."""
        word, _, rest = line.partition(" ")
        rest = rest.strip().strip("'\"")
        if word in ("/image", "/save") and not rest:
            raise OpticNerveError(f"{word} wants a file: {word} FILE", kind="missing-field")
        match word:
            case "/image":
                self.show_image(Path(rest).expanduser())
            case "/reset":
                self.messages.clear()
                self.shown = False
                self.console.print("[dim]a new conversation[/]")
            case "/save":
                self.save(Path(rest).expanduser())
            case "/help":
                self.console.print(HELP, highlight=False, markup=False)
            case _:
                raise OpticNerveError(f"unknown command {word}; /help lists them", kind="unknown-name")

    def show_image(self, path: Path) -> None:
        """Show another picture with the next question; an unreadable one leaves the present one in place."""
        from opticnerve.data.media.open import open_image

        open_image(path)
        self.picture, self.shown = path, False
        show_picture(path, self.console)
        self.console.print(f"[dim]looking at {path}[/]", highlight=False, soft_wrap=True)

    def emit(self, question: str) -> None:
        """Ask, and print the answer as it comes. Ctrl-C keeps what was said so far; without a word, nothing is kept."""
        parts: tuple[Part, ...] = (TextPart(question),)
        if self.picture is not None and not self.shown:
            parts = (ImagePart(self.picture), *parts)
        asked = Message("user", parts)
        stream = self.answerer.stream(
            Conversation((*self.messages, asked), where="this conversation"), max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
        )  # fmt: skip
        said = ""
        try:
            for piece in stream:
                said += piece
                sys.stdout.write(piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            stream.close()
            self.console.print("  [dim](stopped)[/]", end="")
        finally:
            sys.stdout.write("\n")
        if not said.strip():
            self.console.print("[dim](no words came)[/]")
        else:
            self.messages += [asked, Message("assistant", (TextPart(said.strip()),))]
            self.shown = self.shown or self.picture is not None

    def save(self, path: Path) -> None:
        """Append the conversation to a file that training and `data check` read."""
        if not self.messages:
            raise OpticNerveError("there is nothing to save yet; ask something first", kind="empty")
        messages = [{"role": m.role, "content": [_part(p) for p in m.parts]} for m in self.messages]
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        self.console.print(f"[dim]saved to {path}[/]", highlight=False, soft_wrap=True)


def _part(part: Part) -> dict[str, str]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    return {"type": "image", "path": str(Path(str(part.source)).resolve())}


def show_picture(source: object, console: Console) -> None:
    """On a terminal, the picture in it."""
    if console.is_terminal:
        console.print(draw(source, columns=24))


def draw(source: Any, *, columns: int) -> Any:
    """A picture as rich text, `columns` characters wide: two pixels to a character cell, the upper one its colour, the
    lower one its background."""
    from rich.text import Text

    from opticnerve.data.media.open import open_image

    image = open_image(source)
    # An even number of pixel rows, for two share a character.
    rows = max(2, round(columns * image.height / image.width / 2) * 2)
    pixels: Any = image.resize((columns, rows)).load()
    text = Text()
    for y in range(0, rows, 2):
        for x in range(columns):
            upper, lower = (",".join(map(str, pixels[x, y + k])) for k in (0, 1))
            text.append("▀", style=f"rgb({upper}) on rgb({lower})")
        text.append("\n")
    return text
