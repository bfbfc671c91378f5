"""A picture on its way into the page: dropped, pasted, chosen or photographed, and looked at before any model is."""

from __future__ import annotations

import html
from abc import ABCMeta
from pathlib import Path
from typing import Any

from opticnerve.data.media.open import image_size, open_image
from opticnerve.types import DataError, OpticNerveError
from opticnerve.ui.i18n import Translations
from opticnerve.ui.limits import Limits


class Refused(OpticNerveError):
    """What cannot be done, in the page's language."""


def check_picture(path: str | None, words: Translations, limits: Limits) -> None:
    """Open a picture as training and `opticnerve ask` do; None (no picture) is fine.

    Raises:
        Refused: the file is too large, has too many pixels, or is no picture that can be read.
    """
    if path is None:
        return
    if (size := Path(path).stat().st_size) > limits.upload_bytes:
        raise Refused(words("too_many_bytes", found=f"{size:,}", most=f"{limits.upload_bytes:,}"))
    try:
        height, width = image_size(Path(path))
        if height * width > limits.pixels:
            raise Refused(words("too_many_pixels", found=f"{width:,} × {height:,}", most=f"{limits.pixels:,}"))
        open_image(Path(path), max_pixels=limits.pixels)
    except DataError as e:
        # The opener's own words name the file where it lies on the server, which is nothing for a page.
        raise Refused(words("broken_picture", formats="PNG, JPEG, WebP, GIF, BMP, TIFF")) from e


def alert(message: str) -> str:
    """HTML that a screen reader speaks at once; empty for no message."""
    return f'<p role="alert" class="alert">{html.escape(message)}</p>' if message else ""


def note(message: str) -> str:
    """HTML of a quiet remark: what is being done."""
    return f'<p role="status" class="note">{html.escape(message)}</p>' if message else ""


def picture_input(words: Translations, elem_id: str) -> Any:
    """A picture's place: drop, paste, choose or photograph. Its value is the uploaded file as it came."""
    import gradio as gr

    def preprocess(self: Any, payload: Any) -> str | None:
        return None if payload is None else str(payload.path)

    # Gradio would open the file itself, with limits of its own and errors in its own words; that is `check_picture`'s
    # work. A `class` statement would do, but for gradio's metaclass, which writes a file of stubs beside the source.
    uploaded = ABCMeta.__new__(
        type(gr.Image), "Uploaded", (gr.Image,),
        {"preprocess": preprocess, "is_template": True, "__module__": __name__},  # to the browser it is a gr.Image
    )  # fmt: skip
    return uploaded(
        type="filepath", sources=["upload", "clipboard", "webcam"], label=words("picture"), height=280, elem_id=elem_id,
        buttons=["fullscreen"], webcam_options=gr.WebcamOptions(mirror=False), placeholder=words("picture_place"),
        alt_text=words("picture"),
    )  # fmt: skip


def watch_picture(picture: Any, error: Any, words: Translations, limits: Limits) -> None:
    """Say at once, in `error`, what is wrong with a new picture, and take it away."""
    import gradio as gr

    def show_image(path: str | None) -> tuple[Any, Any]:
        if path is None:  # taken away: by the visitor, or here because of what the error says
            return gr.skip(), gr.skip()
        try:
            check_picture(path, words, limits)
        except Refused as e:
            return None, alert(str(e))
        return gr.skip(), ""

    picture.change(show_image, picture, [picture, error], show_progress="hidden", api_visibility="private")
