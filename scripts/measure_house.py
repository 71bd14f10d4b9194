"""Measures the source tree from its syntax alone: lines, imports between folders, circles, private names of others.

    python scripts/measure_house.py [ROOT]             this tree, or another one
    python scripts/measure_house.py [ROOT] --private   only the private names of other packages, each with its places

A room is a folder of src/nola_vision, or a file that lies in none. Imports inside functions count too, those of
`if TYPE_CHECKING` as well. A circle is a set of files (or rooms) each of which imports all others, if indirectly. The
floors are the length of the longest chain of imports, a circle being one floor.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

PACKAGE = "nola_vision"
Graph = dict[str, set[str]]


def modules(root: Path) -> dict[str, Path]:
    """The package's files by module name."""
    source = root / "src"
    names = {}
    for path in sorted((source / PACKAGE).rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """Each import as its module, and what is imported from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def file_graph(trees: Mapping[str, ast.AST]) -> Graph:
    """The modules of the package that each module imports."""
    graph: Graph = {name: set() for name in trees}
    for name, tree in trees.items():
        for module, what in imports(tree):
            found = f"{module}.{what}" if f"{module}.{what}" in trees else module
            if found in trees and found != name:
                graph[name].add(found)
    return graph


def room(module: str, names: Mapping[str, Path]) -> str:
    """The room of a module: its folder, or the file itself."""
    parts = module.split(".")
    return parts[1] + "/" if len(parts) > 2 or names[module].name == "__init__.py" and len(parts) == 2 else parts[-1]


def room_graph(graph: Graph, names: Mapping[str, Path]) -> Graph:
    """The rooms that each room imports."""
    rooms: Graph = defaultdict(set)
    for module, imported in graph.items():
        rooms[room(module, names)] |= {room(one, names) for one in imported} - {room(module, names)}
    return dict(rooms)


def reachable(graph: Graph, start: str) -> set[str]:
    """All that one node leads to; itself only on a circle."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def circles(graph: Graph) -> list[list[str]]:
    """The sets of nodes that lead to each other."""
    leads = {node: reachable(graph, node) for node in graph}
    found = {frozenset({node, *(one for one in leads[node] if node in leads[one])}) for node in graph}
    return sorted(sorted(circle) for circle in found if len(circle) > 1)


def floors(graph: Graph) -> int:
    """The length of the longest chain of imports."""
    leads = {node: reachable(graph, node) for node in graph}
    above: dict[str, int] = {}
    # a node leads to all that those it leads to lead to; those of a circle come before what leads to it alone
    for node in sorted(graph, key=lambda node: (len(leads[node]), node not in leads[node])):
        lower = [one for one in leads[node] if node not in leads[one]]
        above[node] = 1 + max((above[one] for one in lower), default=0)
    return max(above.values())


def _is_private(name: str) -> bool:
    public = ("_replace", "_asdict", "_fields")  # of named tuples
    return name.startswith("_") and not name.endswith("__") and name.strip("_") != "" and name not in public


def _defined(trees: Mapping[str, ast.AST]) -> Set[str]:
    """The private names that the package defines itself."""
    names: set[str] = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
    return names


def private_names(trees: Mapping[str, ast.AST]) -> Iterator[tuple[str, str, int]]:
    """Each use of a private name of another package: what it is, the module that uses it, and the line.

    These are imports, attributes of an imported module, private methods of a base class, and attributes of any object
    whose name this package defines nowhere.
    """
    defined = _defined(trees)
    own = (PACKAGE, "__future__", *sys.stdlib_module_names)
    for name, tree in trees.items():
        bound: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = node.module if isinstance(node, ast.ImportFrom) else None
                for alias in node.names:
                    whole = f"{module}.{alias.name}" if module else alias.name
                    bound[alias.asname or (alias.name if module else alias.name.split(".")[0])] = whole
                    if whole.split(".")[0] not in own and any(map(_is_private, whole.split("."))):
                        yield whole, name, node.lineno
        inner: set[ast.AST] = set()
        for node in ast.walk(tree):  # outer nodes come first: torch._C._x is one use
            if not isinstance(node, ast.Attribute) or node in inner:
                continue
            chain, base = [node.attr], node.value
            while isinstance(base, ast.Attribute):
                inner.add(base)
                chain.append(base.attr)
                base = base.value
            private = [attribute for attribute in chain if _is_private(attribute)]
            if not private:
                continue
            if isinstance(base, ast.Name) and base.id in bound:
                origin = bound[base.id]
                if origin.split(".")[0] not in own:
                    yield ".".join([origin, *reversed(chain)]), name, node.lineno
            elif isinstance(base, ast.Call) and isinstance(base.func, ast.Name) and base.func.id == "super":
                yield f"super().{private[0]}", name, node.lineno
            elif foreign := [attribute for attribute in private if attribute not in defined]:
                yield f".{foreign[0]}", name, node.lineno


def print_private(trees: Mapping[str, ast.AST]) -> None:
    """Prints a table of the private names of other packages."""
    uses: dict[str, list[str]] = defaultdict(list)
    for what, module, line in private_names(trees):
        uses[what].append(f"{module.removeprefix(PACKAGE + '.')}:{line}")
    print(f"{len(uses)} private names of other packages, used {sum(map(len, uses.values()))} times\n")
    print("| name | uses | where |\n| --- | ---: | --- |")
    for what, places in sorted(uses.items()):
        print(f"| `{what}` | {len(places)} | {', '.join(places)} |")


def main() -> None:
    """Prints the measurements as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--private", action="store_true", help="only the private names of other packages")
    arguments = parser.parse_args()
    names = modules(arguments.root)
    texts = {name: path.read_text(encoding="utf-8") for name, path in names.items()}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    if arguments.private:
        print_private(trees)
        return
    lines = {name: text.count("\n") for name, text in texts.items()}
    graph = file_graph(trees)
    graph.pop(PACKAGE)  # the public names; what imports them imports everything
    graph = {name: found - {PACKAGE} for name, found in graph.items()}
    rooms = room_graph(graph, names)
    folders = [name for name in rooms if name.endswith("/")]

    print("| | |\n| --- | ---: |")
    print(f"| files | {len(names)} |\n| lines | {sum(lines.values()):,} |")
    longest = sorted(lines, key=lambda name: -lines[name])
    print(f"| largest file | {longest[0]}, {lines[longest[0]]} lines |")
    print(f"| files over 400 lines | {sum(count > 400 for count in lines.values())} |")
    print(f"| rooms: folders, files outside folders | {len(folders)}, {len(rooms) - len(folders)} |")
    print(f"| imports between files | {sum(map(len, graph.values()))} |")
    print(f"| imports between rooms | {sum(map(len, rooms.values()))} |")
    between = sum(one.endswith("/") for room in folders for one in rooms[room])
    print(f"| of these between folders | {between} |")
    print(f"| floors of files, of rooms | {floors(graph)}, {floors(rooms)} |")
    for what, circle in (("files", circles(graph)), ("rooms", circles(rooms))):
        print(f"| circles of {what} | {len(circle)} |")
    print(f"| private names of other packages | {len({what for what, _, _ in private_names(trees)})} |")
    for what, circle in (("files", circles(graph)), ("rooms", circles(rooms))):
        for members in circle:
            print(f"\nCircle of {len(members)} {what}: {', '.join(members)}")

    print("\n| room | files | lines | largest | imports |\n| --- | ---: | ---: | --- | --- |")
    files = Counter(room(name, names) for name in graph)
    for one in sorted(rooms, key=lambda one: (not one.endswith("/"), one)):
        inside = {name: lines[name] for name in graph if room(name, names) == one}
        largest = max(inside, key=lambda name: inside[name])
        imported = ", ".join(sorted(rooms[one]))
        name = largest.rpartition(".")[2]
        print(f"| {one} | {files[one]} | {sum(inside.values()):,} | {name}, {inside[largest]} | {imported} |")


if __name__ == "__main__":
    main()
