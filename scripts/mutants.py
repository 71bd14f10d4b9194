"""Mutation test of the core: small faults put into single lines, each of which some test should catch.

    python scripts/mutants.py cover coverage.json [TEST_FILE...]     which test files run which line; about 20 minutes
    python scripts/mutants.py list                                   where each mutant is; exit 1 if one is not found
    python scripts/mutants.py run coverage.json [--only TEXT] [--out TABLE.md]

`cover` measures one test file after another. It updates an existing JSON file, so that single files can be repeated. A
mutant is found by the text of its line, wherever in src/nola_vision the line is, but it must be the only one: if the
line is rewritten, so is its entry in `mutants.txt`. `run` puts one mutant at a time into a copy of the tree and runs
the default tests of the files that cover its line, quickest first, until one fails. A line that no test file runs in
its own process is tested by the files that import its module. Needs `pip install coverage`.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path("src/nola_vision")
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "dist")
Coverage = dict[str, Any]  # `seconds` by test file, and by the text of a line the test files that run it


def mutants() -> list[tuple[str, str, str]]:
    """Each mutant of `mutants.txt`: its name, the line, and the faulty line."""
    parts = Path(__file__).with_suffix(".txt").read_text().strip().split("\n\n")
    found = []
    for part in parts:
        name, line, faulty = part.split("\n")
        found.append((name, line.removeprefix("- "), faulty.removeprefix("+ ")))
    return found


def copy_tree(folder: str) -> Path:
    """A copy of the tree."""
    return Path(shutil.copytree(ROOT, Path(folder) / "tree", ignore=NOT_COPIED))


def pytest(
    tree: Path, files: list[str], prefix: list[str], seconds: float | None = None, *more: str
) -> tuple[int, str]:
    """Exit status and output of the default tests of some files; -1 after a time limit."""
    command = [sys.executable, *prefix, "-m", "pytest", *files, "-q", "-rfE", "-m", "not slow", *more]
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        [*command, "-p", "no:cacheprovider", "--color=no", "--tb=no"],
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output = started.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, 9)  # the processes that the tests have started too
        started.communicate()
        return -1, ""
    return started.returncode, output


def statements(tree: ast.AST) -> list[range]:
    """The lines of each statement; of a compound one those of its header."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None) or getattr(node, "cases", None)
            last = max(node.lineno, body[0].lineno - 1) if body and hasattr(body[0], "lineno") else node.end_lineno
            found.append(range(node.lineno, (last or node.lineno) + 1))
    return found


def cover(out: Path, files: list[str]) -> None:
    """Writes which test files run which line of the package."""
    from coverage import CoverageData

    coverage: Coverage = json.loads(out.read_text()) if out.exists() else {"seconds": {}, "lines": {}}
    lines: dict[str, set[str]] = defaultdict(set, {text: set(names) for text, names in coverage["lines"].items()})
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(folder)
        for name in files or sorted(path.relative_to(tree).as_posix() for path in tree.glob("tests/test_*.py")):
            data = Path(folder) / "coverage.data"
            data.unlink(missing_ok=True)
            began = time.monotonic()
            prefix = ["-m", "coverage", "run", f"--data-file={data}", f"--source={tree / PACKAGE}"]
            status, output = pytest(tree, [name], prefix)
            coverage["seconds"][name] = round(time.monotonic() - began, 1)
            print(name, coverage["seconds"][name], output.strip().rpartition("\n")[2], flush=True)
            if status not in (0, 5):  # 5: all tests are slow
                print(output, file=sys.stderr)
            for names in lines.values():
                names.discard(name)
            measured = CoverageData(str(data))
            measured.read()
            for path in (path for path in measured.measured_files() if path.endswith(".py")):  # not templates
                source, executed = Path(path).read_text(), set(measured.lines(path) or ())
                texts = source.splitlines()
                for numbers in statements(ast.parse(source)):
                    if executed.intersection(numbers):
                        for number in numbers:
                            lines[texts[number - 1].strip()].add(name)
            coverage["lines"] = {text: sorted(names) for text, names in sorted(lines.items()) if text and names}
            out.write_text(json.dumps(coverage, indent=0))


def find(line: str) -> tuple[Path, int] | None:
    """The file, relative to the tree, and the index of a line in it; None unless it is the only one of its text."""
    places = [
        (path.relative_to(ROOT), index)
        for path in sorted((ROOT / PACKAGE).rglob("*.py"))
        for index, text in enumerate(path.read_text().splitlines())
        if text.strip() == line
    ]
    return places[0] if len(places) == 1 else None


def importers(path: Path) -> list[str]:
    """The test files that import a module."""
    module = ".".join(path.relative_to("src").with_suffix("").parts)
    package, _, name = module.rpartition(".")
    pattern = rf"{re.escape(module)}\b|from {re.escape(package)} import .*\b{name}\b"
    return [f"tests/{one.name}" for one in sorted(ROOT.glob("tests/test_*.py")) if re.search(pattern, one.read_text())]


def run_mutant(tree: Path, line: str, faulty: str, coverage: Coverage, limit: float) -> tuple[str, str]:
    """What catches a mutant, and of how many test files."""
    if (place := find(line)) is None:
        return "NOT FOUND", ""
    path, index = place
    seconds = coverage["seconds"]
    covering = coverage["lines"].get(line)
    files = sorted(covering or importers(path), key=lambda name: seconds.get(name, 1e9))
    shown = f"{len(files)}{'' if covering else ' importing'}"
    if not files:
        return "**survives**: no test file", shown
    original = (ROOT / path).read_text()
    lines = original.splitlines(keepends=True)
    lines[index] = lines[index].replace(line, faulty)
    (tree / path).write_text("".join(lines))
    status, output = pytest(tree, files, ["-B"], limit, "-x")
    (tree / path).write_text(original)
    if status < 0:
        return f"**survives**: {limit:.0f} s are over", shown
    failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", output, re.MULTILINE)
    if status == 0 or failed is None:
        return "**survives**" + ("" if status == 0 else f": pytest ends with {status}"), shown
    return failed[1], shown


def run(coverage: Coverage, only: str, limit: float, out: Path | None) -> int:
    """Runs the mutants, and prints and writes a table."""
    table = ["| mutant | caught by | test files | seconds |", "| --- | --- | ---: | ---: |"]
    caught = []
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(folder)
        for name, line, faulty in mutants():
            if only not in name:
                continue
            began = time.monotonic()
            by, files = run_mutant(tree, line, faulty, coverage, limit)
            caught.append(not by.startswith(("**", "NOT")))
            table.append(f"| {name} | {by} | {files} | {time.monotonic() - began:.0f} |")
            print(table[-1], flush=True)
            if out is not None:
                out.write_text("\n".join([*table, "", f"{sum(caught)} of {len(caught)} mutants caught", ""]))
    print(f"{sum(caught)} of {len(caught)} mutants caught")
    return 0 if all(caught) else 1


def main() -> int:
    """Measures coverage, lists the mutants, or runs them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("cover")
    verb.add_argument("json", type=Path)
    verb.add_argument("files", nargs="*")
    verbs.add_parser("list")
    verb = verbs.add_parser("run")
    verb.add_argument("json", type=Path)
    verb.add_argument("--only", default="", help="those whose name contains this")
    verb.add_argument("--limit", type=float, default=240.0, help="seconds per mutant")
    verb.add_argument("--out", type=Path, help="a file for the table")
    arguments = parser.parse_args()
    if arguments.verb == "cover":
        cover(arguments.json, arguments.files)
        return 0
    if arguments.verb == "run":
        return run(json.loads(arguments.json.read_text()), arguments.only, arguments.limit, arguments.out)
    places = [(name, find(line)) for name, line, _ in mutants()]
    for name, place in places:
        print(f"{name}: {'NOT FOUND' if place is None else f'{place[0]}:{place[1] + 1}'}")
    return 0 if all(place for _, place in places) else 1


if __name__ == "__main__":
    sys.exit(main())
