"""The nouns every part of opticnerve speaks: features, messages, conversations, and our errors.

Nothing here needs torch at run time, so that the command line can print its help at once.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

if TYPE_CHECKING:
    import PIL.Image
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


Kind = Literal[
    "refused", "unknown-name", "unknown-key", "missing-field", "missing-file", "damaged", "wrong-type", "wrong-shape",
    "out-of-range", "conflict", "unsupported", "not-installed", "mismatch", "empty", "too-large", "too-long",
    "not-finite", "exists-already", "disk-full", "no-permission", "network", "remote-code", "bad-samples", "recipe",
    "diverged", "lost-process", "request",
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)


class OpticNerveError(ValueError):
    """Something a user can put right: the message says what is wrong, where, and what to do.

    `kind` is for programs, and does not change where the message is worded anew; one of `KINDS`:

    - unknown-name, unknown-key: no such part, file format, layer or choice; no such option.
    - missing-field, missing-file: something must be given, and is not; a file or folder is not there.
    - damaged: a file cannot be read, or not as what it should be.
    - wrong-type, wrong-shape, out-of-range: a value of another type, tensors of other sizes, a number too small or big.
    - conflict: two settings exclude each other, or one does nothing beside the other.
    - unsupported: this model, part or format cannot do that.
    - not-installed: a package or program is missing.
    - mismatch: other data, weights or versions than were recorded.
    - empty, too-large, too-long, not-finite: there is nothing in it; more than is allowed; more tokens than fit; NaN or
      infinity.
    - exists-already, disk-full, no-permission, network: why something cannot be written, read or fetched.
    - remote-code: code from outside opticnerve would run, and was not allowed to.
    - bad-samples: more of the data cannot be used than the recipe allows.
    - recipe, diverged, lost-process, request: those of `RecipeError`, `Diverged`, `LostProcess` and `ApiError`.
    - refused: none of these.

    `DataError` and `HubError` have finer kinds of their own beside these.
    """

    kind: str = "refused"

    def __init__(self, *message: object, kind: Kind | None = None) -> None:
        super().__init__(*message)
        if kind is not None:
            self.kind = kind

    def under(self, where: str) -> OpticNerveError:
        """The same error of something inside of `where`."""
        error = OpticNerveError(f"{where}: {self}")
        error.kind = self.kind
        return error

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross process borders (data loader workers), and subclasses make their message of other arguments.
        return _again, (type(self), self.args), self.__dict__


def _again(cls: type[OpticNerveError], message: tuple[object, ...]) -> OpticNerveError:
    """An error as it was pickled, without its `__init__`."""
    return cls.__new__(cls, *message)


class RecipeError(OpticNerveError):
    """A recipe that cannot be run; names the key and the remedy."""

    kind = "recipe"


class DataError(OpticNerveError):
    """A sample that cannot be used; `where` is `file:line` or `file, sample id`.

    No part of it is longer than a few lines, whatever the data hold: values are quoted here, not printed.
    """

    MOST = 600
    """Characters of a part."""

    def __init__(self, problem: str, *, where: str = "", remedy: str = "", kind: str = "sample") -> None:
        problem, where, remedy = (self._shortened(part) for part in (problem, where, remedy))
        super().__init__(": ".join(p for p in (where, problem) if p) + (f" ({remedy})" if remedy else ""))
        self.problem, self.where, self.remedy, self.kind = problem, where, remedy, kind

    @classmethod
    def _shortened(cls, part: str) -> str:
        if len(part) > cls.MOST:
            part = f"{part[: cls.MOST * 2 // 3]} … {part[-cls.MOST // 3 :]}"
        return part if part.count("\n") < 8 else part.replace("\n", "↵")


def has_pip() -> bool:
    """Whether this environment has pip; those of uv have none.

    Not asked of `find_spec`: setuptools takes that for pip at work, and cannot be imported afterwards.
    """
    return any(importlib.metadata.distributions(name="pip"))


def to_install(requirement: str) -> str:
    """The command that brings a package, or an extra such as `opticnerve[audio]`, into this environment."""
    return f"{'pip' if has_pip() else 'uv pip'} install " + (f"'{requirement}'" if "[" in requirement else requirement)


@dataclass(frozen=True, slots=True)
class Features:
    """What an encoder sees, as a row of vectors for each image (or clip).

    `tokens_BND`: float, batch × tokens × width. `mask_BN`: bool, True where a token is real.
    `grids`: rows and columns of each picture's map of tokens (in raster order, from the first token on), where pictures
    keep their shape; None where all are alike.
    """

    tokens_BND: Tensor
    mask_BN: Tensor
    grids: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        if self.tokens_BND.ndim != 3 or self.mask_BN.shape != self.tokens_BND.shape[:2]:
            raise ValueError(
                f"Features want tokens of shape (B, N, D) and a mask of shape (B, N); "
                f"got {tuple(self.tokens_BND.shape)} and {tuple(self.mask_BN.shape)}"
            )


@dataclass(frozen=True, slots=True)
class TextPart:
    """A piece of text within a message."""

    text: str


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of a video, not yet decoded: number `index` of the `of` that are taken, at equal distances as frames
    are counted, or, if `timed`, in time (see `data.media.video`)."""

    source: Path | bytes
    index: int
    of: int
    timed: bool = False

    @property
    def key(self) -> str:
        """Which of its video's frames it is, in letters."""
        return f"{self.index}/{self.of}" + (" in time" if self.timed else "")


@dataclass(frozen=True, slots=True)
class ImagePart:
    """A picture within a message: a file, encoded bytes, an opened picture, or a frame of a video.
    Opened late, by `data.media.open.open_image`. `timestamp`: what is written right before it, as a part of its own:
    when a frame is shown. `pool`: side of the squares of soft tokens of which the language model gets the mean alone.
    """

    source: Path | bytes | PIL.Image.Image | Frame
    timestamp: str = ""
    pool: int = 1


@dataclass(frozen=True, slots=True)
class AudioPart:
    """A sound within a message: a file, encoded bytes, or samples already opened (float32, mono, at the audio encoder's
    rate). Opened late, by `data.media.audio.open_audio`."""

    source: Path | bytes | NDArray[Any]


Thinking = Literal["strip", "keep", "empty"]
"""What becomes of think blocks before answers; see `opticnerve.language.thinking`."""

Part = TextPart | ImagePart | AudioPart
Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class CalledTool:
    """A tool that an assistant calls, with its arguments as JSON has them. `id`: what its result names it by."""

    name: str
    arguments: dict[str, Any]
    id: str = ""

    def to_chat(self) -> dict[str, Any]:
        """As transformers' chat templates and OpenAI's API have it, the arguments as an object."""
        call = {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}
        return {"id": self.id, **call} if self.id else call


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation: who speaks, and the parts in order. `learn`: False for an assistant's turn that is
    read and not learned (`weight: 0` of a record). `calls`: tools that an assistant calls behind its words; a tool's
    turn is the result of one, `about` its `name` and `tool_call_id`, as far as they are told."""

    role: Role
    parts: tuple[Part, ...]
    learn: bool = True
    calls: tuple[CalledTool, ...] = ()
    about: tuple[tuple[str, str], ...] = ()

    @property
    def text(self) -> str:
        """The message's words, its media left out."""
        return "".join(p.text for p in self.parts if isinstance(p, TextPart))

    def written_out(self) -> Message:
        """The same, what is written before its pictures as parts of their own: as a chat template is given it."""
        if not any(isinstance(p, ImagePart) and p.timestamp for p in self.parts):
            return self
        parts: list[Part] = []
        for part in self.parts:
            if isinstance(part, ImagePart) and part.timestamp:
                parts.append(TextPart(part.timestamp))
                part = replace(part, timestamp="")
            parts.append(part)
        return replace(self, parts=tuple(parts))

    def tool_fields(self) -> dict[str, Any]:
        """What a chat message says of tools beside its role and content."""
        return ({"tool_calls": [c.to_chat() for c in self.calls]} if self.calls else {}) | dict(self.about)


@dataclass(frozen=True, slots=True)
class Conversation:
    """The one currency between data readers, training, chat, server and evaluation.

    `id` names the sample for people; `where` says where it came from (`captions.jsonl:12`); `meta` carries what an
    evaluation needs (answer type, alternative answers); `tools`: what may be called, as chat templates take it.
    """

    messages: tuple[Message, ...]
    id: str = ""
    where: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    tools: tuple[dict[str, Any], ...] = ()

    def media(self, kind: type[ImagePart] | type[AudioPart]) -> Iterator[Any]:
        """The parts of one kind, in the order in which they are mentioned."""
        return (p for m in self.messages for p in m.parts if isinstance(p, kind))

    @property
    def images(self) -> list[ImagePart]:
        return list(self.media(ImagePart))

    @property
    def audios(self) -> list[AudioPart]:
        return list(self.media(AudioPart))

    @property
    def pieces(self) -> list[ImagePart | AudioPart]:
        """All pictures, then all sounds."""
        return [*self.images, *self.audios]

    def shown(self, parts: Sequence[Part]) -> Conversation:
        """The same conversation with these parts before the first words."""
        first, *rest = self.messages
        return replace(self, messages=(replace(first, parts=(*parts, *first.parts)), *rest))

    def prompt(self) -> Conversation:
        """The same conversation without its last assistant turn: what the model is asked to continue."""
        kept = self.messages[:-1] if self.messages and self.messages[-1].role == "assistant" else self.messages
        return Conversation(kept, self.id, self.where, self.meta, self.tools)

    @property
    def answer(self) -> str | None:
        """The words of the last assistant turn, if the conversation ends with one."""
        return self.messages[-1].text if self.messages and self.messages[-1].role == "assistant" else None

    def to_chat(self) -> list[dict[str, Any]]:
        """transformers' chat format; media are given as `{"type": "image", "image": source}`."""
        return [
            {"role": m.role, "content": [_part_to_chat(p) for p in m.parts], **m.tool_fields()}
            for m in (message.written_out() for message in self.messages)
        ]


class MediaProcessor(Protocol):
    """The processor of a model of any family: words and pictures to tensors."""

    tokenizer: PreTrainedTokenizerBase
    image_processor: Any

    def __call__(self, *, images: Any = None, text: Any = None, **options: Any) -> Any: ...


class ChatProcessor(MediaProcessor, Protocol):
    """The processor of a docked model, as far as its data need it; `models.vlm.processing` says what each is."""

    feature_extractor: Any
    chat_template: Any  # a string; transformers knows dictionaries, too
    thinking: Thinking | None
    sanitize_control_tokens: bool
    image_token: str | None
    audio_token: str | None
    image_token_id: int | None
    audio_token_id: int | None

    @property
    def reads_questions(self) -> bool: ...
    @property
    def counts_by_size(self) -> bool: ...
    def image_placeholders(self, height: int = 0, width: int = 0, pool: int = 1) -> int: ...
    def image_ids(self, height: int = 0, width: int = 0, pool: int = 1) -> list[int]: ...
    def audio_placeholders(self, samples: int) -> int: ...
    def extract(self, sounds: Sequence[Any]) -> tuple[Any, list[int]]: ...
    def read_questions(self, questions: Sequence[str]) -> dict[str, Any]: ...
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


class AutogradContext(Protocol):
    """What a `torch.autograd.Function` keeps from its forward to its backward pass: tensors, and values by name."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def __getattr__(self, name: str) -> Any: ...
    def __setattr__(self, name: str, value: Any) -> None: ...


def _part_to_chat(part: Part) -> dict[str, Any]:
    match part:
        case TextPart(text):
            return {"type": "text", "text": text}
        case ImagePart(source=source):
            return {"type": "image", "image": str(source) if isinstance(source, Path) else source}
        case AudioPart(source):
            return {"type": "audio", "audio": str(source) if isinstance(source, Path) else source}


def ask(
    question: str,
    *images: Path | bytes | PIL.Image.Image,
    audios: Sequence[Path | bytes | NDArray[Any]] = (),
    answer: str | None = None,
    **meta: Any,
) -> Conversation:
    """A one-question conversation about the given pictures and sounds; with `answer`, one to learn from."""
    media: list[Part] = [*map(ImagePart, images), *map(AudioPart, audios)]
    parts: tuple[Part, ...] = (*media, TextPart(question))
    messages: tuple[Message, ...] = (Message("user", parts),)
    if answer is not None:
        messages += (Message("assistant", (TextPart(answer),)),)
    return Conversation(messages, meta=meta)
