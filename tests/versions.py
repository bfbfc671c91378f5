"""Environments with other versions than this one's, made of a wheel of this checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]


def uv() -> str | None:
    """The program: from PATH, or the one that `make` has put here."""
    return shutil.which("uv", path=f"{os.environ.get('PATH', '')}{os.pathsep}{CHECKOUT / '.uv' / 'bin'}")


def run(*command: str | Path, cwd: Path | None = None, timeout: int = 900) -> str:
    """What a command prints to either stream; a failure shows all of it."""
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=outside(), text=True, timeout=timeout, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(map(str, command))}\nended with {done.returncode}:\n{done.stdout[-6000:]}"
    return done.stdout


def outside() -> dict[str, str]:
    """The environment of a process that knows nothing of this one's packages."""
    ours = (
        "PYTHONPATH", "PYTHONHOME", "PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV",
        "UV_PROJECT_ENVIRONMENT", "OPTICNERVE_CACHE",
    )  # fmt: skip
    return {k: v for k, v in os.environ.items() if k not in ours and not k.startswith("COV")}


def index_is_reached() -> bool:
    """Whether packages can be installed here."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", os.devnull, "pip"]
    if tool := uv():
        command = [tool, "pip", "compile", "--quiet", "--no-cache", "--no-header", "-"]
    done = subprocess.run(command, input="easy-vqa", text=True, capture_output=True, env=outside(), timeout=300)
    return done.returncode == 0


def build_wheel(folder: Path) -> Path:
    tool = uv()
    build = [tool, "build", "--quiet", "--wheel", "--out-dir"] if tool else [sys.executable, "-m", "pip", "wheel", "-w"]
    run(*build, folder, *([] if tool else ["--no-deps"]), CHECKOUT)
    return next(folder.glob("opticnerve-*.whl"))


def install(environment: Path, wheel: Path, extras: str, *, lowest: bool) -> Path:
    """An environment of `python -m venv` in which pip has installed the wheel; its Python.

    What the wheel asks for is brought by uv where there is one: pip takes ten minutes for what uv takes seconds. pip has
    the last word and finds everything there, or not.
    """
    run(sys.executable, "-m", "venv", environment)
    python = environment / "bin" / "python"
    wanted = f"{wheel}[{extras}]"
    if tool := uv():
        how = "lowest-direct" if lowest else "highest"
        run(tool, "pip", "install", "--quiet", "--python", python, "--resolution", how, wanted)
        run(tool, "pip", "uninstall", "--quiet", "--python", python, "opticnerve")
    elif lowest:
        raise RuntimeError("pip cannot choose the lowest versions; install uv")
    run(python, "-m", "pip", "install", "--quiet", wanted)
    return python
