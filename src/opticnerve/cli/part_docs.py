"""What a part says of itself, read from its source: nothing is imported, so that no part has to wait for torch."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opticnerve.types import OpticNerveError

# Keywords that come from a part's neighbours, not from a recipe.
GIVEN = ("in_size", "out_size", "in_tokens", "language_size", "language_layers", "model")
REQUIRED, FROM_THE_NAME = "required", "from the name"


@dataclass
class PartOption:
    """A keyword of a recipe: `default` as it is written in the source, or that there is none."""

    name: str
    type: str
    default: str
    meaning: str


@dataclass
class PartDoc:
    """A part's page."""

    target: str
    summary: str
    text: str
    options: list[PartOption]
    source: str


@dataclass
class _Class:
    """A class as its file has it."""

    module: str
    node: ast.ClassDef
    tree: ast.Module

    @property
    def doc(self) -> str:
        return ast.get_docstring(self.node) or ""

    def method(self, name: str) -> ast.FunctionDef | None:
        return next((n for n in self.node.body if isinstance(n, ast.FunctionDef) and n.name == name), None)

    def value(self, name: str) -> Any:
        """A plain class attribute's value; None where there is none."""
        for n in self.node.body:
            if not isinstance(n, ast.Assign | ast.AnnAssign) or not isinstance(n.value, ast.Constant):
                continue
            target = n.target if isinstance(n, ast.AnnAssign) else n.targets[0]
            if isinstance(target, ast.Name) and target.id == name:
                return n.value.value
        return None


def read(target: str) -> PartDoc:
    """The page of the part at `module:Class`. Raises OpticNerveError: there is no such module, no source, or no such
    class in it."""
    line = lineage(target)
    own = line[0]
    source = _source(ast.get_docstring(own.tree) or "", own.doc)
    return PartDoc(target, summary(own.doc), _without_sections(own.doc), _options(line), source)


def lineage(target: str) -> list[_Class]:
    """The class and its bases, as far as their sources can be read."""
    module, _, name = target.partition(":")
    line = [_find(module, name)]
    while (base := _base(line[-1])) is not None:
        line.append(base)
    return line


def summary(doc: str) -> str:
    """The first sentence."""
    first = " ".join(doc.partition("\n\n")[0].split())
    return re.split(r"(?<!et al\.)(?<=[.!?]) (?=[A-Z0-9`])", first)[0]


def _find(module: str, name: str) -> _Class:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError) as e:
        raise OpticNerveError(f"cannot find {module}: {e}", kind="unknown-name") from e
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise OpticNerveError(
            f"cannot read {module}:{name}: there is no Python source of that module", kind="unsupported"
        )
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _Class(module, node, tree)
    raise OpticNerveError(f"{module} has no class {name}", kind="unknown-name")


def _base(of: _Class) -> _Class | None:
    """The first base that opticnerve or the part's own package wrote."""
    for base in of.node.bases:
        name = ast.unparse(base)
        try:
            for node in of.tree.body:
                if isinstance(node, ast.ClassDef) and node.name == name:
                    return _Class(of.module, node, of.tree)
                if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    original = next((a.name for a in node.names if (a.asname or a.name) == name), None)
                    if original and node.module.partition(".")[0] in ("opticnerve", of.module.partition(".")[0]):
                        return _find(node.module, original)
        except OpticNerveError:
            continue  # a class that is made, not written: its page goes without what it inherits
    return None


def _options(line: list[_Class]) -> list[PartOption]:
    """The constructor's keywords, with what the docstrings under `Args:` say of them."""
    init = next((m for c in line if (m := c.method("__init__")) is not None), None)
    if init is None:
        return []
    keywords = [*zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)]
    positional = init.args.args[1:]
    padding: list[ast.expr | None] = [None] * (len(positional) - len(init.args.defaults))
    keywords += [*zip(positional, [*padding, *init.args.defaults], strict=True)]
    wanted = [(a, default) for a, default in keywords if a.arg not in GIVEN and not a.arg.startswith("_")]
    meanings: dict[str, str] = {}
    names = {a.arg for a, _ in keywords}
    for cls in line:
        for name, said in _arguments(cls.doc, names | set(GIVEN)).items():
            if name not in meanings or meanings[name].startswith("see `"):
                meanings[name] = said
    weights = _name_of_weights(line, names)
    options = [] if weights is None else [weights]
    for argument, default in wanted:
        written = ast.unparse(default) if default else FROM_THE_NAME if weights else REQUIRED
        options.append(PartOption(argument.arg, _type(argument.annotation), written, meanings.get(argument.arg, "")))
    return options


def _type(annotation: ast.expr | None) -> str:
    return ast.unparse(annotation) if annotation else ""


def _name_of_weights(line: list[_Class], keywords: set[str]) -> PartOption | None:
    """An encoder's `name` is `from_pretrained`'s, where the constructor has none and no class takes names its own
    way."""
    needs = next((v for c in line if (v := c.value("needs_name")) is not None), None)
    loader = next((m for c in line if (m := c.method("from_pretrained")) is not None), None)
    own_way = next((c for c in line if c.method("take_name") is not None), line[-1]) is not line[-1]
    if loader is None or not needs or "name" in keywords or own_way:
        return None
    said = " ".join((ast.get_docstring(loader) or "").partition("\n\n")[0].split())
    annotation = next((a.annotation for a in loader.args.args if a.arg == "name"), None)
    return PartOption("name", _type(annotation), REQUIRED, said.removeprefix("`name`: "))


def _arguments(doc: str, names: set[str]) -> dict[str, str]:
    """What stands under `Args:`, whether one to a line or one behind the other."""
    found = re.search(r"^Args:(.*?)(?=\n\n|\Z)", doc, flags=re.DOTALL | re.MULTILINE)
    if not found:
        return {}
    first, _, rest = found[1].partition("\n")
    block = "\n".join(part for part in (first.strip(), textwrap.dedent(rest)) if part)
    items = [
        m
        for m in re.finditer(r"(?:^|(?<=\. ))(\w+(?:, \w+)*): ", block, flags=re.MULTILINE)
        if set(m[1].split(", ")) <= names
    ]
    said: dict[str, str] = {}
    ends = [*(m.start() for m in items[1:]), len(block)]
    for item, end in zip(items, ends, strict=False):
        text = " ".join(block[item.end() : end].split())
        said |= dict.fromkeys(item[1].split(", "), text)
    return said


def _without_sections(doc: str) -> str:
    """The docstring without `Args:`, `Raises:` and the like, and without its sources."""
    kept = [p for p in inspect.cleandoc(doc).split("\n\n") if not re.match(r"(Args|Raises|Returns|Sources?):", p)]
    return "\n\n".join(" ".join(re.sub(r"\s*\bSources?: .*", "", p, flags=re.DOTALL).split()) for p in kept).strip()


def _source(*docs: str) -> str:
    """Where the part comes from: what stands behind "Source", or the paragraphs that cite; empty if none does."""
    paragraphs = [" ".join(p.split()) for doc in docs for p in doc.split("\n\n")]
    named = [m[1] for p in paragraphs if (m := re.search(r"\bSources?: (.*)", p))]
    citing = [p for p in paragraphs if re.search(r"et al\.|https?://", p)]
    return " ".join(named or citing)
