"""No file from elsewhere runs code: what opticnerve's own source may not call, and how it reads what can hold pickles."""

from __future__ import annotations

import ast
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from errors import refused
from opticnerve.encoders.whisper import read_openai

SOURCE = Path(__file__).parents[1] / "src"
# Called by these names, they run what a file says.
NEVER = {
    "eval", "exec", "compile_command", "pickle.load", "pickle.loads", "pickle.Unpickler", "cPickle.load", "dill.load", "dill.loads",
    "joblib.load", "cloudpickle.load", "cloudpickle.loads", "marshal.load", "marshal.loads", "shelve.open", "torch.jit.load",
    "torch.package.PackageImporter", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all", "pandas.read_pickle",
    "pd.read_pickle", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip
SAFE_LOADERS = ("_BoundedLoader",)  # a yaml.SafeLoader with bounds


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


def faults(text: str) -> list[str]:
    """What a module does that none of ours may do."""
    tree, found = ast.parse(text), []
    for name, call in calls(tree):
        at = f"line {call.lineno}: {name}"
        if name in NEVER:
            found.append(at)
        if name == "torch.load" and keyword(call, "weights_only") != "True":
            found.append(f"{at} without weights_only=True")
        if name == "yaml.load" and keyword(call, "Loader") not in SAFE_LOADERS:
            found.append(f"{at} with Loader={keyword(call, 'Loader')}")
        if keyword(call, "shell") not in (None, "False"):
            found.append(f"{at} with a shell")
        if keyword(call, "allow_pickle") not in (None, "False"):
            found.append(f"{at} with allow_pickle")
        # Passing on what the caller said is fine, and so are parts that were built once already under their own check.
        if keyword(call, "trust_remote_code") == "True" and "build_tower" not in ast.unparse(call):
            found.append(f"{at} trusts remote code")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args][::-1]
            defaults = list(zip(arguments, node.args.defaults[::-1], strict=False))
            defaults += [
                (a, d) for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if d is not None
            ]
            found += [
                f"line {node.lineno}: {node.name} has trust_remote_code=True by default"
                for argument, default in defaults
                if argument.arg == "trust_remote_code" and ast.unparse(default) == "True"
            ]
    return found


def test_our_source_runs_nothing_that_a_file_says() -> None:
    wrong = {
        str(f.relative_to(SOURCE)): w for f in SOURCE.rglob("*.py") if (w := faults(f.read_text(encoding="utf-8")))
    }
    assert not wrong


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(f)", "torch.load(f, weights_only=False)", "pickle.loads(x)", "yaml.load(t, Loader=yaml.Loader)", "yaml.load(t)",
        "eval(x)", "exec(x)", "subprocess.run('ls', shell=True)", "np.load(f, allow_pickle=True)",
        "AutoModel.from_pretrained(n, trust_remote_code=True)", "def f(trust_remote_code=True): ...",
        "def f(*, trust_remote_code: bool = True): ...", "os.system('x')",
    ],
)  # fmt: skip
def test_the_search_finds(text: str) -> None:
    assert faults(text)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (Path("the-bomb-went-off"),)


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_in_place_of_weights_does_not_run(
    archive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stored = {"dims": Bomb(), "model_state_dict": {}}
    if archive:
        torch.save(stored, "ear.pt")
    else:
        Path("ear.pt").write_bytes(pickle.dumps(stored))
    with refused("damaged", "ear.pt", "OpenAI Whisper"):
        read_openai(Path("ear.pt"))
    assert not Path("the-bomb-went-off").exists()
