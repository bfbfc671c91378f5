"""`opticnerve chat`: a conversation about pictures, with a memory."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from opticnerve.cli.ask import MODEL_HELP
from opticnerve.cli.guard import fail
from opticnerve.cli.output import TrustFlag, console_for, examples, quiet_libraries
from opticnerve.types import Conversation, ImagePart, Message, OpticNerveError, Part, TextPart

EPILOG = examples(
    "opticnerve chat starter --image picture.png",
    "opticnerve chat runs/demo",
    note="While chatting: /image FILE, /reset, /save FILE, /help, /quit. Ctrl-C stops an answer, Ctrl-D leaves.",
)
HELP = """/image FILE   look at another picture; it belongs to your next question
/reset        forget the conversation; the picture stays
/save FILE    write the conversation as one line of chat JSONL
/help         this list
/quit         leave (so does Ctrl-D); Ctrl-C stops an answer in progress"""


def chat(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    image: Annotated[Path | None, typer.Option("--image", "-i", help="The picture to talk about.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest word.")] = 0.0,
    trust_remote_code: TrustFlag = False,
) -> None:
    """Talk with a model: answers appear as they are made, and it remembers what was said."""
    session = Session(max_new_tokens=max_new_tokens, temperature=temperature)
    if image is not None:
        session.show_image(image)

    from opticnerve.inference.generate import Answerer
    from opticnerve.inference.load import load_model

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys and history at the prompt

    quiet_libraries()
    session.answerer = Answerer(*load_model(model, trust_remote_code=trust_remote_code))
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
            raise OpticNerveError(f"{word} wants a file: {word} FILE")
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
                raise OpticNerveError(f"unknown command {word}; /help lists them")

    def show_image(self, path: Path) -> None:
        """Show another picture with the next question; an unreadable one leaves the present one in place."""
        from opticnerve.data.media.open import open_image

        open_image(path)
        self.picture, self.shown = path, False
        if self.console.is_terminal:
            from opticnerve.cli.picture import draw

            self.console.print(draw(path, columns=24))
        self.console.print(f"[dim]looking at {path}[/]", highlight=False, soft_wrap=True)

    def emit(self, question: str) -> None:
        """Ask, and print the answer as it comes. Ctrl-C keeps what was said so far; without a word, nothing is kept."""
        parts: tuple[Part, ...] = (TextPart(question),)
        if self.picture is not None and not self.shown:
            parts = (ImagePart(self.picture), *parts)
        asked = Message("user", parts)
        stream = self.answerer.stream(
            Conversation((*self.messages, asked), where="this conversation"),
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
        )
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
            raise OpticNerveError("there is nothing to save yet; ask something first")
        messages = [{"role": m.role, "content": [_part(p) for p in m.parts]} for m in self.messages]
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        self.console.print(f"[dim]saved to {path}[/]", highlight=False, soft_wrap=True)


def _part(part: Part) -> dict[str, str]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    return {"type": "image", "path": str(Path(str(part.source)).resolve())}
