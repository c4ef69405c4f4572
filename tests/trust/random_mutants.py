"""Apply random one-token changes to the Python modules, run the tests that reach them, and list the undetected changes.

    python tests/trust/random_mutants.py [NUMBER [SEED]]

Cosmic Ray's operators make the changes. Every position in the code that an operator can change is drawn with the same
probability, then one of the operators that apply there; type annotations are left out. Coverage says which tests run
the statement. All tests are run for a statement that only an import or another process runs. Exits with 1 if fewer than
nine tenths were detected.
"""

import ast
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from coverage import CoverageData
from project import AT_ONCE, ROOT, copy_project, environment, pytest_command

SECONDS = 900  # a change with which the tests run longer counts as detected
# Tests that always run: an interrupt inside coverage leaves its lock locked, so nothing can be recorded of them.
NOT_RECORDED = "tests/update/test_interrupts.py"
# Not those of trust: they fail whenever a change touches the text of a fault.
SELECTION = ("-m", "not slow and not build", "--ignore=tests/trust")
MANY = 100  # tests, which are worth the start of several processes
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


def find_statement(text: str, line: int) -> range:
    """The lines from the begin of the innermost statement that holds this line, to the line."""
    statements = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)]
    begins = (node.lineno for node in statements if node.lineno <= line <= node.end_lineno)
    return range(max(begins, default=line), line + 1)  # a decorator is in no statement


def record_tests(project: Path) -> CoverageData | None:
    """Which tests run each line of the package. None if a test fails."""
    (project / ".coveragerc").write_text("[run]\nsource = eman_kernels\n")
    record = ("--cov", "--cov-config=.coveragerc", "--cov-context=test", "--cov-report=", f"--ignore={NOT_RECORDED}")
    if not run_tests(project, *AT_ONCE, *record) or not run_tests(project, NOT_RECORDED):
        return None
    data = CoverageData(str(project / ".coverage"))
    data.read()
    return data


def choose_tests(data: CoverageData, module: Path, statement: range) -> list[str]:
    """The tests that run a line of the statement, those that mirror the module first. Empty if there are none."""
    contexts = data.contexts_by_lineno(str(module.resolve()))
    tests = {context.split("|")[0] for line in statement for context in contexts.get(line, ()) if context}
    return sorted(tests, key=lambda test: (f"/test_{module.stem}.py::" not in test, test))


def run_tests(project: Path, *arguments: str) -> bool:
    """Whether all tests pass."""
    command = pytest_command("-x", *SELECTION, *arguments)
    try:
        done = subprocess.run(command, cwd=project, capture_output=True, timeout=SECONDS, env=environment(project))
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def is_seen(project: Path, module: Path, tests: list[str]) -> bool:
    if not tests:  # all, those of the module's folder first
        folder = project / "tests" / module.parent.relative_to(project / "eman_kernels")
        return not run_tests(project, *AT_ONCE, *(str(path) for path in (folder, project / "tests") if path.exists()))
    return not run_tests(project, *(AT_ONCE if len(tests) > MANY else ()), *tests, NOT_RECORDED)


def main(number: int = 20, seed: int = 0) -> int:
    choose = random.Random(seed)
    texts = {path: path.read_text() for path in sorted((ROOT / "eman_kernels").rglob("*.py"))}
    places = [(path, *item) for path, text in texts.items() for item in sorted(find_changes(text).items())]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        copy_project(project)
        drawn = choose.sample(places, number)
        if (data := record_tests(project)) is None:
            print("a test fails without a change")
            return 2
        for count, (path, (line, column), changes) in enumerate(drawn, 1):
            name, occurrence = choose.choice(changes)
            module, text, begin = project / path.relative_to(ROOT), texts[path], time.monotonic()
            changed = mutate_code(text, get_operator(name)(), occurrence)
            module.write_text(changed)
            tests = choose_tests(data, module, find_statement(text, line))
            seen = is_seen(project, module, tests)
            module.write_text(text)
            what = f"{path.relative_to(ROOT)}:{line}:{column} {name.removeprefix('core/')}\n"
            what += "".join(
                f"      {sign} {each.strip()}\n"
                for sign, lines, others in (("-", text, changed), ("+", changed, text))
                for each in lines.splitlines() if each not in others.splitlines()
            )  # fmt: skip
            survivors += [] if seen else [what]
            result = f"{'seen' if seen else 'SURVIVED'} {time.monotonic() - begin:.0f} s, {len(tests) or 'all'} tests"
            print(f"{count}/{number} {result}  {what}", end="", flush=True)
    print(f"{number - len(survivors)} of {number} changes were seen (seed {seed}; {len(places)} places)")
    print(*survivors, sep="")
    return len(survivors) > number / 10


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
