"""opticnerve's models in lmms-eval: `python -m lmms_eval --model opticnerve --model_args pretrained=RUN --tasks …`.

lmms-eval finds it by the entry point `lmms_eval.models` of this package. It is installed by itself
(`pip install lmms-eval`); opticnerve does not need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from opticnerve.data.audio import RATE
from opticnerve.inference.generate import Answerer
from opticnerve.inference.load import load_model
from opticnerve.types import AudioPart, Conversation, ImagePart, Message, OpticNerveError, Part, TextPart


def manifest() -> ModelManifest:
    """What lmms-eval's registry asks for."""
    return ModelManifest(model_id="opticnerve", chat_class_path=f"{__name__}.OpticNerve")


class OpticNerve(lmms):  # type: ignore[misc]
    """A docked language model under lmms-eval's interface: greedy answers to chat messages.

    Args:
        pretrained: a run's folder, a merged folder, a hub name, or "starter".
        device: "cpu", "cuda", …; the first accelerator by default. dtype: of the weights; as trained by default.
        batch_size: prompts that are answered together.
    """

    is_simple = False

    def __init__(
        self, pretrained: str, *, device: str | None = None, dtype: str | None = None, batch_size: int | str = 16,
        **unknown: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        # lmms-eval hands over options of its command line that nobody gave.
        unknown = {k: v for k, v in unknown.items() if k != "max_batch_size" and v is not None}
        if unknown:
            raise OpticNerveError(
                f"--model_args: unknown {', '.join(unknown)}; known: pretrained, device, dtype, batch_size"
            )
        model, processor = load_model(str(pretrained), device=device, dtype=dtype)
        self.answerer, self.batch_size = Answerer(model, processor), int(batch_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The greedy answer to each request, in order, up to its first `until`.

        Raises:
            OpticNerveError: a request that asks for sampling or beams, or shows a video.
        """
        answers = [""] * len(requests)
        by_length: dict[int, list[int]] = {}
        asked: list[Conversation] = []
        until: list[list[str]] = []
        for number, request in enumerate(requests):
            _, to_messages, options, document, task, split = request.args
            asked.append(conversation(to_messages(self.task_dict[task][split][document]), f"{task} {document}"))
            length, stops = generation(options)
            until.append(stops)
            by_length.setdefault(length, []).append(number)
        for length, numbers in by_length.items():
            said = self.answerer.answer(
                [asked[n] for n in numbers], max_new_tokens=length, batch_size=self.batch_size
            )  # fmt: skip
            for n, text in zip(numbers, said, strict=True):
                answers[n] = cut(text, until[n])
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise OpticNerveError(
            "lmms-eval gives chat models no likelihood tasks; `opticnerve eval --metric multiple_choice` measures by "
            "likelihood"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise OpticNerveError("tasks of several rounds are not offered here")


def conversation(messages: Sequence[Any], name: str) -> Conversation:
    """lmms-eval's chat messages (`{"role": …, "content": [{"type": "image", "url": picture}, …]}`) as ours."""
    made = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        made.append(Message(message["role"], tuple(_part(p, name) for p in parts)))
    return Conversation(tuple(made), id=name)


def generation(options: dict[str, Any]) -> tuple[int, list[str]]:
    """How many tokens at most, and what ends an answer.

    Raises:
        OpticNerveError: sampling or beams: a score would not be that of the greedy answer that is given.
    """
    sampled = options.get("do_sample") and float(options.get("temperature") or 0) > 0
    if sampled or int(options.get("num_beams") or 1) > 1:
        raise OpticNerveError(
            f"the task asks for {'sampling' if sampled else 'beams'}, and answers here are greedy; set "
            f"--gen_kwargs temperature=0,do_sample=False,num_beams=1"
        )
    stops = options.get("until") or []
    return int(options.get("max_new_tokens") or 64), [stops] if isinstance(stops, str) else list(stops)


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of `stops`."""
    for stop in stops:
        if stop:
            text = text.partition(stop)[0]
    return text


def _part(part: dict[str, Any], name: str) -> Part:
    match part["type"]:
        case "text":
            return TextPart(part["text"])
        case "image":
            return ImagePart(part["url"])
        case "audio":
            return AudioPart(_samples(part["url"], name))
    raise OpticNerveError(f"{name} shows a {part['type']}, which is not offered here")


def _samples(sound: Any, name: str) -> Any:
    """`datasets` decodes sounds to `{"array": …, "sampling_rate": …}`."""
    if not isinstance(sound, dict):
        return sound
    if sound["sampling_rate"] != RATE:
        raise OpticNerveError(f"{name} has a sound of {sound['sampling_rate']} Hz, and {RATE} Hz is wanted")
    return sound["array"]
