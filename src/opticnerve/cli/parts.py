"""`opticnerve parts`: every encoder, connector and fusion, and what each can be told."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument

from opticnerve.cli import part_docs
from opticnerve.cli.options import JsonFlag
from opticnerve.cli.output import console_for, examples, print_json, table_of
from opticnerve.types import OpticNerveError

if TYPE_CHECKING:
    from rich.console import Console

    from opticnerve.registry import Registry

EPILOG = examples(
    "opticnerve parts",
    "opticnerve parts mlp",
    "opticnerve parts my_package.pool:PoolConnector --json",
    note="A recipe names a part as `type`, and gives its options beside it: [cyan]connector: {type: mlp, depth: 3}[/].",
)


def parts(
    name: Annotated[str | None, Argument(help="A part, or its dotted path package.module:Class.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List every part with one line each; of one part, its options with their defaults, and its paper."""
    if name is None:
        _list(as_json)
    else:
        _page(name, as_json)


def _registries() -> list[Any]:
    from opticnerve import registry

    return [found for found in vars(registry).values() if isinstance(found, registry.Registry)]


def _target(parts_of_a_kind: Registry[Any], name: str) -> str:
    """`module:Class` of a registered part."""
    target = parts_of_a_kind._targets[name]
    return target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"


def _list(as_json: bool) -> None:
    rows: list[dict[str, str]] = []
    for kind in _registries():
        for name in kind.names():
            target = _target(kind, name)
            try:
                summary = part_docs.read(target).summary
            except OpticNerveError as e:
                summary = str(e)
            rows.append({"kind": kind.kind, "name": name, "summary": summary, "target": target})
    if as_json:
        print_json(rows)
        return
    table = table_of("", "kind", "name", "", box=None, padding=(0, 2, 0, 0))
    table.columns[1].style = "bold"
    for column in table.columns[:2]:
        column.no_wrap = True
    for before, row in zip([None, *rows], rows, strict=False):
        first = before is None or before["kind"] != row["kind"]
        if first and before is not None:
            table.add_row()
        table.add_row(row["kind"] if first else "", row["name"], row["summary"])
    console_for(False).print(table)


def _page(name: str, as_json: bool) -> None:
    found = [(k.kind, _target(k, name)) for k in _registries() if name in k.names()]
    if not found and ":" in name:
        found = [(_kind(name), name)]
    if not found:
        raise OpticNerveError(_unknown(name), kind="unknown-name")
    pages = [(kind, part_docs.read(target)) for kind, target in found]
    if as_json:
        print_json([{"kind": kind, "name": name, **asdict(page)} for kind, page in pages])
        return
    console = console_for(False)
    for kind, page in pages:
        _show(kind, name, page, console)


def _kind(path: str) -> str:
    """The kind of a part that is named by dotted path, from the class that it builds on."""
    bases = [c.node.name for c in part_docs.lineage(path)]
    for kind in _registries():
        if kind.kind.capitalize() in bases:
            return str(kind.kind)
    known = ", ".join(k.kind.capitalize() for k in _registries())
    raise OpticNerveError(f"{path} is no part: it builds on none of {known}", kind="wrong-type")


def _unknown(name: str) -> str:
    import difflib

    known = [n for kind in _registries() for n in kind.names()]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"; near it: {', '.join(near)}" if near else ""
    return f"no part is called {name!r}{hint}. `opticnerve parts` lists them all: {', '.join(known)}"


def _show(kind: str, name: str, page: Any, console: Console) -> None:
    from rich.text import Text

    console.print(Text.assemble((name, "bold"), f"  {kind}, ", (page.target, "dim")), soft_wrap=True)
    console.print(Text(f"\n{page.text}\n"))
    if page.options:
        table = table_of("", "option", "default", "meaning", box=None, padding=(0, 2, 0, 0))
        table.columns[0].style = "bold"
        for before, option in zip([None, *page.options], page.options, strict=False):
            same = before is not None and option.meaning and option.meaning == before.meaning
            table.add_row(Text(option.name), Text(option.default), Text("as above" if same else option.meaning))
        console.print(table)
    else:
        console.print("It has no options.")
    if page.source:
        console.print(Text(f"\nSource: {page.source}", style="dim"))
