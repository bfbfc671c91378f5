"""The bounded form of the fuzz tests; the long form is `python tests/fuzz/long.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_target import MEBIBYTES, Hang, Target, attempt, limited, peak_mebibytes
from fuzz_targets import TARGETS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opticnerve.types import OpticNerveError

pytestmark = [pytest.mark.usefixtures("private_cache"), pytest.mark.filterwarnings("ignore")]
CASES = 150  # of a target; those that load models get a share


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_input_is_refused_in_words(name: str, place: Path) -> None:
    target = TARGETS[name]
    folder = place / name
    folder.mkdir()
    before = peak_mebibytes()

    @settings(
        max_examples=max(5, round(CASES * target.share)), deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.randoms(use_true_random=True))
    def tried(rng: object) -> None:
        # (Five times the long form's patience: neighbours share this machine.)
        attempt(target, target.make(rng), folder, seconds=10)  # type: ignore[arg-type]

    tried()
    assert peak_mebibytes() - before < MEBIBYTES


class TestTheHarness:
    """It sees what it is there for."""

    def run(self, does: object, folder: Path) -> str:
        return attempt(Target("t", lambda rng: b"", does), b"", folder, seconds=0.2)  # type: ignore[arg-type]

    def test_an_error_of_ours_is_a_refusal(self, tmp_path: Path) -> None:
        def refuse(data: bytes, folder: Path) -> None:
            raise OpticNerveError("no")

        assert self.run(refuse, tmp_path) == "refused"

    def test_any_other_error_is_a_fault(self, tmp_path: Path) -> None:
        def crash(data: bytes, folder: Path) -> None:
            raise KeyError("x")

        with pytest.raises(KeyError):
            self.run(crash, tmp_path)

    def test_an_error_without_words_is_a_fault(self, tmp_path: Path) -> None:
        def mumble(data: bytes, folder: Path) -> None:
            raise OpticNerveError(" ")

        with pytest.raises(AssertionError, match="without a message"):
            self.run(mumble, tmp_path)

    def test_a_hang_is_a_fault(self, tmp_path: Path) -> None:
        def hang(data: bytes, folder: Path) -> None:
            while True:
                pass

        with pytest.raises(Hang):
            self.run(hang, tmp_path)

    def test_what_blocks_is_stopped(self) -> None:
        import time

        with pytest.raises(Hang), limited(0.2):
            time.sleep(5)
