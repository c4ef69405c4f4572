"""Apply random one-token changes to the Python modules, run the tests that reach them, and list the undetected changes.

    python tests/trust/random_mutants.py [NUMBER [SEED]]

Cosmic Ray's operators make the changes. Every position in the code that an operator can change is drawn with the same
probability, then one of the operators that apply there; type annotations are left out. Coverage says which tests run
the statement, also in processes that they start. All tests are run for a statement that only an import runs. Exits with
1 if fewer than nine tenths were detected.
"""

import ast
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from coverage import CoverageData
from project import AT_ONCE, ROOT, copy_project, environment, pytest_command

SECONDS = 900  # a change with which the tests run longer counts as detected
# Tests that always run: an interrupt inside coverage leaves its lock locked, so nothing can be recorded of them.
NOT_RECORDED = "tests/update/test_interrupts.py"
# Not those of trust, which fail whenever a change touches the text of a fault, nor those that install the project.
SELECTION = ("-m", "not slow", "--ignore=tests/trust", "--ignore=tests/test_build.py")
# They need arguments that name a variable.
LEFT_OUT = ("core/VariableReplacer", "core/VariableInserter")
# Every Python process records itself. One that a test starts finds "test (setup)" or "test (call)" in its environment.
CONFIG = """
[run]
source = eman_kernels
parallel = true
concurrency = multiprocessing, thread
context = ${PYTEST_CURRENT_TEST-}
data_file = %s/.coverage
disable_warnings = no-data-collected
"""
PLUGIN = """
import coverage
import pytest

@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    coverage.Coverage.current().switch_context(item.nodeid)
    return (yield)
"""

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


def collect_tests(project: Path) -> set[str]:
    command = pytest_command("--collect-only", *SELECTION)
    done = subprocess.run(command, cwd=project, env=environment(project), check=True, capture_output=True, text=True)
    return {line for line in done.stdout.splitlines() if "::" in line}


def record_tests(project: Path) -> CoverageData | None:
    """Which tests run each line of the package. None if a test fails."""
    config = project / ".coveragerc"
    config.write_text(CONFIG % project)
    (project / "record_contexts.py").write_text(PLUGIN)
    arguments = pytest_command(*SELECTION, *AT_ONCE, f"--ignore={NOT_RECORDED}", "-p", "record_contexts")
    env = environment(project, COVERAGE_PROCESS_START=str(config))
    if subprocess.run(arguments, cwd=project, env=env).returncode or not run_tests(project, NOT_RECORDED):
        return None
    subprocess.run([sys.executable, "-m", "coverage", "combine", "-q"], cwd=project, check=True)
    data = CoverageData(str(project / ".coverage"))
    data.read()
    return data


def choose_tests(data: CoverageData, collected: set[str], project: Path, module: Path, statement: range) -> list[str]:
    """Those of the collected tests that run a line of the statement, after the file that mirrors the module:
    torch.compile and Triton read code that is not recorded. Empty for all tests: if no test runs the statement, or an
    import does."""
    files = {path: path.relative_to(project).as_posix() for path in sorted((project / "tests").rglob("test_*.py"))}
    # test_triton.py mirrors triton.py and triton_kernels.py.
    whole = [name for path, name in files.items() if module.stem.startswith(path.stem.removeprefix("test_"))]
    contexts = data.contexts_by_lineno(str(module))
    # "test", or in another process "test (call)" or "test (call)|a test that it runs".
    recorded = {context.split("|")[0] for line in statement for context in contexts.get(line, ())}
    if not recorded or "" in recorded:
        return []
    if any(test.endswith(")") for test in recorded):
        # Connected processes come from one server, and have the name of the first test that needed it.
        whole += [name for path, name in files.items() if name not in whole and "processes import" in path.read_text()]
    # With a name that it does not know, pytest ends like with a failure.
    tests = {test.split(" (")[0] for test in recorded} & collected
    return [*whole, *sorted(test for test in tests if test.split("::")[0] not in whole)]


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
        tests = [str(path) for path in (folder, project / "tests") if path.exists()]
    return not run_tests(project, *tests, NOT_RECORDED)


def main(number: int = 20, seed: int = 0) -> int:
    choose = random.Random(seed)
    texts = {path: path.read_text() for path in sorted((ROOT / "eman_kernels").rglob("*.py"))}
    places = [(path, *item) for path, text in texts.items() for item in sorted(find_changes(text).items())]
    drawn = [(path, line, column, *choose.choice(all_)) for path, (line, column), all_ in choose.sample(places, number)]
    survivors, projects = [], SimpleQueue()  # of copies that no thread uses now

    def try_change(count: int, path: Path, line: int, column: int, name: str, occurrence: int) -> None:
        project, text, begin = projects.get(), texts[path], time.monotonic()
        module = project / path.relative_to(ROOT)
        changed = mutate_code(text, get_operator(name)(), occurrence)
        tests = choose_tests(data, collected, recorded, recorded / path.relative_to(ROOT), find_statement(text, line))
        module.write_text(changed)
        seen = is_seen(project, module, tests)
        module.write_text(text)
        projects.put(project)
        what = f"{path.relative_to(ROOT)}:{line}:{column} {name.removeprefix('core/')}\n"
        what += "".join(
            f"      {sign} {each.strip()}\n"
            for sign, lines, others in (("-", text, changed), ("+", changed, text))
            for each in lines.splitlines() if each not in others.splitlines()
        )  # fmt: skip
        if not seen:
            survivors.append(what)
        result = f"{'seen' if seen else 'SURVIVED'} {time.monotonic() - begin:.0f} s, {len(tests) or 'all'} tests"
        print(f"{count}/{number} {result}  {what}", end="", flush=True)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as threads:
        copies = [Path(folder, str(index)).resolve() for index in range(os.cpu_count())]
        for project in copies:
            copy_project(project)
            projects.put(project)
        recorded = copies[0]
        collected = collect_tests(recorded)
        if (data := record_tests(recorded)) is None:
            print("a test fails without a change")
            return 2
        list(threads.map(try_change, range(1, number + 1), *zip(*drawn, strict=True)))
    print(f"{number - len(survivors)} of {number} changes were seen (seed {seed}; {len(places)} places)")
    print(*survivors, sep="")
    return len(survivors) > number / 10


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
