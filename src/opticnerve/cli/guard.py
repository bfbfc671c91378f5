"""Exit codes that mean something, and errors that a user can read."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from typing import Any, TypeVar

import typer

from opticnerve.types import OpticNerveError

OK, ERROR, USAGE, BAD_SAMPLES, INTERRUPTED = 0, 1, 2, 3, 130
MEANING = {
    OK: "done",
    ERROR: "something is wrong that you can put right; the message says what and how",
    USAGE: "the command line itself is wrong",
    BAD_SAMPLES: "`data check` found bad samples",
    INTERRUPTED: "stopped by Ctrl-C or SIGTERM; a training run has been saved (`serve` and `ui` end with 0)",
}
_F = TypeVar("_F", bound=Callable[..., Any])
_settings = {"debug": False}


class Stopped(Exception):
    """A run was interrupted; the message says what is saved and how to go on."""


def show_tracebacks(wanted: bool) -> None:
    """With `--debug`, errors come with their tracebacks."""
    _settings["debug"] = wanted


def guarded(command: _F) -> _F:
    """Wrap a command: an error that a user can put right becomes one message and exit code 1, an interruption 130.

    Any other exception is a fault of ours and keeps its traceback.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except BrokenPipeError:  # `… | head`: nobody reads on, which is no error
            raise
        except (OpticNerveError, OSError) as e:
            _traceback()
            fail(str(e) or type(e).__name__)
            raise typer.Exit(ERROR) from e
        except (Stopped, KeyboardInterrupt) as e:
            if isinstance(e, KeyboardInterrupt):
                _traceback()
            emit(str(e) if isinstance(e, Stopped) else "stopped", style="bold yellow")
            raise typer.Exit(INTERRUPTED) from e

    return run  # type: ignore[return-value]


def _traceback() -> None:
    if _settings["debug"]:
        import traceback

        traceback.print_exc()


def fail(message: str) -> None:
    """`error: …` on stderr, in red."""
    from rich.console import Console
    from rich.text import Text

    text = Text.assemble(("error:", "bold red"), " ", message)
    Console(stderr=True).print(text, soft_wrap=True)


def emit(message: str, style: str = "") -> None:
    """A line on stderr."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text(message, style=style), soft_wrap=True)


def terminate_like_ctrl_c() -> None:
    """SIGTERM (a scheduler, a container that is shut down) is handled as Ctrl-C is, whatever the command is doing."""
    import threading

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
