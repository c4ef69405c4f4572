"""Apply random one-token changes to the Python modules, run the tests of the module, and list the undetected changes.

    python tests/trust/random_mutants.py [NUMBER [SEED]]

Cosmic Ray's operators make the changes. Every position in the code that an operator can change is drawn with the same
probability, then one of the operators that apply there; type annotations are left out. The tests are those that mirror
the module (tests/update/test_step.py for eman_kernels/update/step.py), if they detect nothing, those of its folder and
the general ones, and at last those of all folders. Exits with 1 if fewer than nine tenths were detected.
"""

import ast
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from project import AT_ONCE, ROOT, copy_project, environment, pytest_command

SECONDS = 900  # a change with which the tests run longer counts as detected
GENERAL = ("test_functional.py", "test_teacher.py", "test_situations.py", "test_swapping.py", "test_structure.py")
# They need arguments that name a variable.
LEFT_OUT = ("core/VariableReplacer", "core/VariableInserter")

Change = tuple[str, int]  # the name of an operator, and which of its occurrences in the file


def find_changes(text: str) -> dict[tuple[int, int], list[Change]]:
    """The changes of a module that are possible at each line and column."""
    # Sets of annotated lines and columns; a change of an annotation is either seen at import or has no effect.
    annotations = [
        ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
        for owner in ast.walk(ast.parse(text))
        for node in (getattr(owner, "annotation", None), getattr(owner, "returns", None))
        if node is not None
    ]
    changes, nodes = defaultdict(list), list(ast_nodes(get_ast(text)))
    for name in operator_names():
        if name not in LEFT_OUT:
            operator = get_operator(name)()
            starts = [start for node in nodes for start, _ in operator.mutation_positions(node)]
            for occurrence, start in enumerate(starts):
                if not any(begin <= start < end for begin, end in annotations):
                    changes[start].append((name, occurrence))
    return changes


def stages(project: Path, module: Path) -> Iterator[list[Path]]:
    """The tests of a module: the nearest first, then those of its folder and the general ones, then all folders."""
    tests, general = project / "tests", [path for pattern in GENERAL for path in (project / "tests").rglob(pattern)]
    if nearest := sorted(tests.rglob(f"test_{module.stem}.py")):
        yield nearest
    folder = tests / module.parent.relative_to(project / "eman_kernels")
    if folder.exists() and folder.name not in ("tests", "integrations"):
        yield [folder, *general]
    # Not those of trust: they fail whenever a change touches the text of a fault.
    folders = [path for path in sorted(tests.iterdir()) if path.name != "trust" and any(path.glob("test_*.py"))]
    yield [*folders, *general]


def run_tests(project: Path, paths: list[Path], *arguments: str) -> bool:
    """Whether one of the tests fails, or the package cannot be imported any more."""
    command = pytest_command("-x", "-m", "not slow and not build", *arguments, *map(str, paths))
    try:
        done = subprocess.run(command, cwd=project, capture_output=True, timeout=SECONDS, env=environment(project))
    except subprocess.TimeoutExpired:
        return True
    return done.returncode not in (0, 5)  # 5: no test was selected


def is_seen(project: Path, module: Path) -> bool:
    return any(
        run_tests(project, paths, *(AT_ONCE if number else ())) for number, paths in enumerate(stages(project, module))
    )


def main(number: int = 20, seed: int = 0) -> int:
    choose = random.Random(seed)
    texts = {path: path.read_text() for path in sorted((ROOT / "eman_kernels").rglob("*.py"))}
    places = [(path, *item) for path, text in texts.items() for item in sorted(find_changes(text).items())]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        copy_project(project)
        drawn = choose.sample(places, number)
        needed = {
            test for path, *_ in drawn for paths in stages(project, project / path.relative_to(ROOT)) for test in paths
        }
        if run_tests(project, sorted(needed), *AT_ONCE):
            print("a test fails without a change")
            return 2
        for count, (path, (line, column), changes) in enumerate(drawn, 1):
            name, occurrence = choose.choice(changes)
            module, text, begin = project / path.relative_to(ROOT), texts[path], time.monotonic()
            changed = mutate_code(text, get_operator(name)(), occurrence)
            module.write_text(changed)
            seen = is_seen(project, module)
            module.write_text(text)
            what = f"{path.relative_to(ROOT)}:{line}:{column} {name.removeprefix('core/')}\n"
            what += "".join(
                f"      {sign} {each.strip()}\n"
                for sign, lines, others in (("-", text, changed), ("+", changed, text))
                for each in lines.splitlines() if each not in others.splitlines()
            )  # fmt: skip
            survivors += [] if seen else [what]
            print(f"{count}/{number} {'seen' if seen else 'SURVIVED'} {time.monotonic() - begin:.0f} s  {what}",
                  end="", flush=True)  # fmt: skip
    print(f"{number - len(survivors)} of {number} changes were seen (seed {seed}; {len(places)} places)")
    print(*survivors, sep="")
    return len(survivors) > number / 10


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
