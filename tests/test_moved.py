"""Old paths of modules: they still import what is there now, and say so."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec

import pytest

from opticnerve.common.moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_leads_to_a_module_that_is_there(old: str) -> None:
    for new in MOVED[old]:
        found = find_spec(new)
        assert found is not None
        assert found.origin is not None


def test_an_old_path_is_the_module_and_says_where_it_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "opticnerve.build", raising=False)
    from opticnerve.models.vlm import build as there

    spec = there.__spec__
    with pytest.warns(DeprecationWarning, match=r"opticnerve\.build is opticnerve\.models\.vlm\.build now") as told:
        from opticnerve.build import dock
    assert told[0].filename == __file__
    assert dock is there.dock
    assert sys.modules["opticnerve.build"] is there
    assert there.__spec__ is spec


def test_a_folder_that_is_gone_is_passed_through(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("opticnerve.data.readers", "opticnerve.data.readers.read"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.warns(DeprecationWarning, match=r"opticnerve\.data\.dataset\.read now"):
        module = importlib.import_module("opticnerve.data.readers.read")
    assert module.__name__ == "opticnerve.data.dataset.read"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_module_that_came_apart_has_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("opticnerve.data.images", "opticnerve.data.readers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    from opticnerve.data.images import MAX_PIXELS, Frame, open_image
    from opticnerve.data.readers import FORMATS, read

    from opticnerve.data.dataset import read as reading
    from opticnerve.data.media import images
    from opticnerve.data.media import open as opening
    from opticnerve.types import Frame as frame_of_a_video

    assert (open_image, MAX_PIXELS, Frame) == (opening.open_image, images.MAX_PIXELS, frame_of_a_video)
    assert (read, FORMATS) == (reading.read, reading.FORMATS)


def test_what_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"opticnerve\.nonsense"):
        importlib.import_module("opticnerve.nonsense")
