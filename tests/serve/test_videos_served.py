"""A video in a request: shown by the frames that training took, within bounds."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

from served import chat, serving

import made_scenes
from opticnerve.data.media.timeline import sampling_of
from opticnerve.data.media.video import in_order, pixels_in
from opticnerve.inference.generate import Answerer
from opticnerve.models.vlm.build import Dock
from opticnerve.serve.limits import ServerLimits
from opticnerve.types import ask


def sent(video: bytes) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": f"data:video/gif;base64,{base64.b64encode(video).decode()}"}}


def test_a_video_is_answered_as_the_model_alone_answers_it(docked: Callable[..., Dock], tmp_path: Path) -> None:
    made_scenes.save_clips(tmp_path, 2, seed=1)
    made = docked()
    made.processor.frames = {"fps": 1, "max": 5}
    clips = [(tmp_path / f"{i}.gif").read_bytes() for i in range(2)]
    asked = ask("which is longer?")
    for clip in clips[::-1]:
        asked = asked.shown(in_order(clip, sampling_of(made.processor.frames)))
    assert len({p.timestamp for p in asked.images}) > 2
    wanted = "".join(Answerer(made.model, made.processor).stream(asked, max_new_tokens=6))
    limits = ServerLimits(video_pixels=pixels_in(clips[0]))
    assert limits.video_pixels == made_scenes.FRAMES * 16 * 16
    with serving(made.model, made.processor, limits=limits) as live:
        reply = live.post(**chat("which is longer?", *map(sent, clips)), max_tokens=6, temperature=0).json()
        assert reply["choices"][0]["message"]["content"] == wanted
        longer = made_scenes.film(made_scenes.FRAMES + 1, 500)
        for body, code in (
            (sent(longer), None),
            (sent(clips[0][:40]), "invalid_video"),
            (sent(b"no"), "invalid_video"),
        ):
            refused = live.post(**chat("?", body))
            assert refused.status_code == 400
            assert refused.json()["error"]["code"] == code
            assert refused.json()["error"]["param"] == "messages.0.content.0.video_url.url"
