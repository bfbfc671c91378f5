"""Questions in, answers out: in batches, or word by word."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from threading import Thread
from typing import Any

import torch
from transformers import TextIteratorStreamer

from opticnerve.data.audio import RATE, open_audio
from opticnerve.data.images import open_image
from opticnerve.data.labels import end_of_turn, picture_questions, render
from opticnerve.types import Conversation, OpticNerveError


class Answerer:
    """A model with its processor, ready for conversations.

    Args: model, processor: as from `load_model` or `dock`.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    def answer(
        self,
        conversations: Sequence[Conversation],
        *,
        max_new_tokens: int = 64,
        batch_size: int = 16,
        progress: Callable[[int], None] | None = None,
    ) -> list[str]:
        """Greedy answers, one per conversation, in order. Prompts of like length share a batch, padded on the left.

        `progress` is called with the number of answers done so far.
        """
        lengths = [sum(len(m.text) for m in c.messages) for c in conversations]
        order = sorted(range(len(conversations)), key=lengths.__getitem__)
        answers = [""] * len(conversations)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            inputs = self.inputs([conversations[i] for i in chosen])
            with torch.inference_mode():
                out = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **self.stops())
            texts = self.processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text.strip()
            if progress is not None:
                progress(start + len(chosen))
        return answers

    def stream(
        self,
        conversation: Conversation,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        """The answer in pieces as they come. Closing the iterator stops the model after its current token."""
        if seed is not None:
            torch.manual_seed(seed)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
        )
        stopped: list[bool] = []
        failed: list[BaseException] = []

        def stop(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((len(ids),), bool(stopped), device=ids.device)

        def work() -> None:
            try:
                with torch.inference_mode():
                    self.model.generate(
                        **self.inputs([conversation]), max_new_tokens=max_new_tokens, streamer=streamer,
                        stopping_criteria=[stop],
                        **sampling, **self.stops(),
                    )  # fmt: skip
            except BaseException as e:  # handed to the reader below; a thread's own traceback would reach nobody
                failed.append(e)
                streamer.end()

        thread = Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            stopped.append(True)
            thread.join()
        if failed:
            raise failed[0]

    def inputs(self, conversations: Sequence[Conversation]) -> Any:
        """Tensors on the model's device for prompts (a last assistant turn is left out)."""
        prompts = [c.prompt() for c in conversations]
        texts = [self.render(c) for c in prompts]
        pictures = [open_image(i.source, where=c.where or c.id) for c in prompts for i in c.images]
        extractor = self.processor.feature_extractor
        rate = extractor.sampling_rate if extractor is not None else RATE
        sounds = [open_audio(a.source, where=c.where or c.id, rate=rate) for c in prompts for a in c.audios]
        more: dict[str, Any] = {"audio": sounds, "sampling_rate": rate} if sounds else {}
        if pictures and self.processor.reads_questions:
            more["questions"] = [q for c in prompts for q in picture_questions(c)]
        tokenizer = self.processor.tokenizer
        starts_itself = tokenizer.bos_token is not None and texts[0].startswith(tokenizer.bos_token)
        return self.processor(
            text=texts, images=pictures or None, return_tensors="pt", padding=True,
            add_special_tokens=not starts_itself, **more,
        ).to(self.model.device)  # fmt: skip

    def render(self, prompt: Conversation) -> str:
        """The prompt as text, the template's cue for the assistant at its end."""
        return render(prompt, self.processor, self.processor.chat_template, generation_prompt=True)

    def stops(self) -> dict[str, Any]:
        """What `generate` is told of ends: the tokens that end an answer, and the one that pads."""
        tokenizer = self.processor.tokenizer
        known = self.model.generation_config.eos_token_id
        ends = {*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id}
        # What training taught to end a turn is the template's word, which need not be the tokenizer's end token.
        with contextlib.suppress(OpticNerveError):  # a template without one still answers, up to max_new_tokens
            ends.add(tokenizer.convert_tokens_to_ids(end_of_turn(self.processor, self.processor.chat_template)))
        ends -= {None}
        return {"eos_token_id": sorted(ends), "pad_token_id": tokenizer.pad_token_id}
