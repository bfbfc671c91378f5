"""opticnerve's models in lmms-eval: `python -m lmms_eval --model opticnerve --model_args pretrained=RUN --tasks …`.

lmms-eval finds it by the entry point `lmms_eval.models` of this package. It is installed by itself
(`pip install lmms-eval`); opticnerve does not need it. lmms-eval 0.7 knows two kinds of model: "chat" ones get messages
and only ever generate; "simple" ones (`--force_simple`) get a text and a list of media, and tasks by likelihood.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from opticnerve.data.media.audio import RATE
from opticnerve.inference.generate import Answerer
from opticnerve.inference.likelihood import answer_scores
from opticnerve.inference.load import load_model
from opticnerve.types import AudioPart, Conversation, ImagePart, Message, OpticNerveError, Part, TextPart

PICTURE = "<image>"  # where a picture goes in the text of many tasks, as LLaVA began it
_SOUNDS = {".wav", ".mp3", ".m4a", ".aac", ".flac", ".ogg", ".opus"}
_VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v"}


def manifest() -> ModelManifest:
    """What lmms-eval's registry asks for."""
    return ModelManifest(
        model_id="opticnerve",
        chat_class_path=f"{__name__}.OpticNerve",
        simple_class_path=f"{__name__}.SimpleOpticNerve",
    )


class _Model(lmms):  # type: ignore[misc]
    """What both kinds share: a docked language model that answers greedily.

    Args:
        pretrained: a run's folder, a merged folder, a hub name, or "starter".
        device: "cpu", "cuda", …; the first accelerator by default. dtype: of the weights; as trained by default.
        batch_size: prompts that are answered together.
    """

    def __init__(
        self, pretrained: str, *, device: str | None = None, dtype: str | None = None, batch_size: int | str = 16,
        **unknown: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        # lmms-eval hands over options of its command line that nobody gave.
        unknown = {k: v for k, v in unknown.items() if k != "max_batch_size" and v is not None}
        if unknown:
            raise OpticNerveError(
                f"--model_args: unknown {', '.join(unknown)}; known: pretrained, device, dtype, batch_size",
                kind="unknown-key",
            )
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise OpticNerveError(
                f"--batch_size {batch_size}: give a number; nothing is searched for here", kind="wrong-type"
            )
        model, processor = load_model(str(pretrained), device=device, dtype=dtype)
        self.answerer, self.batch_size = Answerer(model, processor), int(batch_size)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise OpticNerveError("tasks of several rounds are not offered here", kind="unsupported")

    def document(self, task: str, split: str, number: int) -> Any:
        return self.task_dict[task][split][number]

    def greedy(self, asked: Sequence[Conversation], options: Sequence[dict[str, Any]]) -> list[str]:
        """The greedy answer to each, in order, at most its `max_new_tokens` long and up to its first `until`."""
        rules = [generation(o) for o in options]
        answers = [""] * len(asked)
        for length in dict.fromkeys(length for length, _ in rules):
            numbers = [n for n, (most, _) in enumerate(rules) if most == length]
            mine = [asked[n] for n in numbers]
            said = self.answerer.answer(mine, max_new_tokens=length, batch_size=self.batch_size)
            for n, text in zip(numbers, said, strict=True):
                answers[n] = cut(text, rules[n][1])
        return answers


class OpticNerve(_Model):
    """Answers to chat messages: what lmms-eval takes unless it is told `--force_simple`."""

    is_simple = False

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The greedy answer to each request, in order; one that asks for sampling or beams, or shows a video, is an
        error."""
        asked, options = [], []
        for request in requests:
            _, to_messages, how, number, task, split = request.args
            asked.append(conversation(to_messages(self.document(task, split, number)), f"{task} {number}"))
            options.append(how)
        return self.greedy(asked, options)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise OpticNerveError(
            "lmms-eval gives likelihood tasks to simple models alone; add --force_simple", kind="unsupported"
        )


class SimpleOpticNerve(_Model):
    """Answers, and likelihoods of given answers, to a text with media before it (or at each `<image>` in it)."""

    is_simple = True

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """As `OpticNerve.generate_until`."""
        asked = [self._ask(r.args[0], *r.args[2:]) for r in requests]
        return self.greedy(asked, [r.args[1] for r in requests])

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """For each request the *loss* of its continuation, and whether that is the greedy answer.

        lmms-eval 0.7 wants the loss, whatever the name says: its multiple choice takes the smallest mean negative
        log-probability. The end-of-turn token counts too, as in `opticnerve eval --metric multiple_choice`, and white
        space around the continuation does not.

        Raises:
            OpticNerveError: a request without a document (metric `acc_mutual_info`), or one that shows a video.
        """
        groups: dict[tuple[Any, ...], list[int]] = {}
        for n, request in enumerate(requests):
            if len(request.args) != 6:
                raise OpticNerveError(
                    "acc_mutual_info wants likelihoods of answers without a question; not offered here",
                    kind="unsupported",
                )
            context, _, _, number, task, split = request.args
            groups.setdefault((context, number, task, split), []).append(n)
        asked, said = [], []
        for (context, number, task, split), members in groups.items():
            targets = [requests[n].args[1] for n in members]
            document = self.document(task, split, number)
            said.append([str(t(document) if callable(t) else t).strip() for t in targets])
            asked.append(self._ask(context, requests[members[0]].args[2], number, task, split))
        model, processor = self.answerer.model, self.answerer.processor
        # One token more than the longest shows whether the model would have gone on.
        longest = 1 + max((len(processor.tokenizer(t).input_ids) for texts in said for t in texts), default=0)
        free = self.answerer.answer(asked, max_new_tokens=longest, batch_size=self.batch_size)
        found: list[Any] = [None] * len(requests)
        for question, texts, members, greedy in zip(asked, said, groups.values(), free, strict=True):
            scores = answer_scores(model, processor, question, texts)
            for n, text, score in zip(members, texts, scores, strict=True):
                # 0.7.3 makes a string of a bare pair (`unwrap_generation_output`), which no task can read.
                found[n] = GenerationResult(text=(-score, text == greedy))
        return found

    def _ask(self, context: str, to_visual: Any, number: int, task: str, split: str) -> Conversation:
        name = f"{task} {number}"
        # Tasks of text alone have no function for media.
        seen = (to_visual(self.document(task, split, number)) if callable(to_visual) else to_visual) or []
        parts = [_media(v, name) for v in seen if v is not None]
        return Conversation((Message("user", placed([*parts, TextPart(context)])),), id=name)


def conversation(messages: Sequence[Any], name: str) -> Conversation:
    """lmms-eval's chat messages (`{"role": …, "content": [{"type": "image", "url": picture}, …]}`) as ours."""
    made = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        made.append(Message(message["role"], placed([_part(p, name) for p in parts])))
    return Conversation(tuple(made), id=name)


def placed(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts of a turn, with its pictures where the text says `<image>` if it says so once for each of them."""
    pictures = [p for p in parts if isinstance(p, ImagePart)]
    if sum(p.text.count(PICTURE) for p in parts if isinstance(p, TextPart)) != len(pictures) or not pictures:
        return tuple(parts)
    waiting, made = iter(pictures), list[Part]()
    for part in parts:
        if isinstance(part, TextPart):
            first, *rest = part.text.split(PICTURE)
            made.append(TextPart(first))
            for text in rest:
                made += [next(waiting), TextPart(text)]
        elif not isinstance(part, ImagePart):
            made.append(part)
    return tuple(p for p in made if not isinstance(p, TextPart) or p.text)


def generation(options: dict[str, Any]) -> tuple[int, list[str]]:
    """How many tokens at most, and what ends an answer. Sampling and beams are refused: a score would not be that of
    the greedy answer that is given."""
    # Tasks that say do_sample without a temperature mean greedy: 0 is what lmms-eval's own models take then.
    sampled = options.get("do_sample") and float(options.get("temperature") or 0) > 0
    if sampled or int(options.get("num_beams") or 1) > 1:
        raise OpticNerveError(
            f"the task asks for {'sampling' if sampled else 'beams'}, and answers here are greedy; set "
            f"--gen_kwargs temperature=0,do_sample=False,num_beams=1",
            kind="unsupported",
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
    return TextPart(part["text"]) if part["type"] == "text" else _media(part["url"], name, part["type"])


def _media(shown: Any, name: str, kind: str = "") -> Part:
    """A picture or sound as a task gives it: opened, or by its path; `kind` is what lmms-eval takes it for.

    A sound that `datasets` has decoded is a dictionary, which lmms-eval takes for a video.
    """
    if isinstance(shown, dict) and "array" in shown:
        if shown["sampling_rate"] != RATE:
            raise OpticNerveError(
                f"{name} has a sound of {shown['sampling_rate']} Hz, and {RATE} Hz is wanted", kind="unsupported"
            )
        return AudioPart(shown["array"])
    path = Path(shown) if isinstance(shown, str) else shown
    ending = path.suffix.lower() if isinstance(path, Path) else ""
    if kind == "audio" or ending in _SOUNDS:
        return AudioPart(path)
    if isinstance(path, PIL.Image.Image | Path) and kind in ("", "image") and ending not in _VIDEOS:
        return ImagePart(path)
    raise OpticNerveError(
        f"{name} shows a {kind or ending.lstrip('.') or type(shown).__name__}, which is not offered here",
        kind="unsupported",
    )
