"""Apply each fault to a copy of the project, run the tests that should detect it, and list the undetected faults.

    python tests/trust/mutants.py [--at-once] [WORD ...]

WORD selects faults whose file, function or text contains one of the words. --at-once skips the first run without a
fault.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from faults import FAULTS, HOST, Fault
from locating import find_code
from project import ROOT, build, copy_project, environment, pytest_command

SECONDS = 900  # a fault with which the tests run longer counts as detected


def locate(project: Path, fault: Fault) -> tuple[Path, int, int]:
    """The file of a fault, and its first and last character there."""
    found = find_code(project, fault.where, fault.old)
    assert len(found) == 1, f"found {len(found)} times instead of once: {fault}"
    return found[0]


def describe(fault: Fault) -> str:
    return f"{locate(ROOT, fault)[0].relative_to(ROOT)}: {fault}"


def is_built(fault: Fault) -> bool:
    """Whether the extension is rebuilt. Such faults run last, because the extension keeps the last of them."""
    return describe(fault).startswith("csrc/") and fault.tests != HOST


def run_tests(project: Path, files: list[str], chosen: str = "") -> tuple[bool, str]:
    """Whether the tests in these files failed, and the last line of their output."""
    paths = [str(path) for file in files for path in (project / "tests").rglob(file)]
    command = pytest_command("-x", *paths, *(["-k", chosen] if chosen else []))
    try:
        done = subprocess.run(
            command, cwd=project, capture_output=True, text=True, timeout=SECONDS, env=environment(project)
        )
    except subprocess.TimeoutExpired:
        return True, f"still running after {SECONDS} s"
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
    if done.returncode < 0 or done.returncode == 1:  # a crash counts as detected
        return True, last
    return False, last if done.returncode == 0 else f"pytest ended with {done.returncode}: {last}"


def try_fault(project: Path, fault: Fault) -> tuple[bool, str]:
    path, begin, end = locate(project, fault)
    text = path.read_text()
    path.write_text(text[:begin] + fault.new + text[end:])
    try:
        if is_built(fault):
            build(project)
        return run_tests(project, *fault.selection())
    finally:
        path.write_text(text)


def main(words: list[str]) -> int:
    at_once = "--at-once" in words
    words = [word for word in words if word != "--at-once"]
    faults = [fault for fault in FAULTS if not words or any(word in describe(fault) for word in words)]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        copy_project(project)
        files = set() if at_once else {file for fault in faults for file in fault.selection()[0]}
        failed, last = run_tests(project, sorted(files)) if files else (False, "")
        if failed or (files and "passed" not in last):
            print(f"without a fault: {last}")
            return 2
        for number, fault in enumerate(sorted(faults, key=is_built), 1):
            begin = time.monotonic()
            seen, last = try_fault(project, fault)
            if not seen:
                survivors.append(fault)
            print(
                f"{number}/{len(faults)} {'seen' if seen else 'SURVIVED'} {time.monotonic() - begin:.0f} s  "
                f"{describe(fault)}\n      {last}",
                flush=True,
            )
    print(f"{len(faults) - len(survivors)} of {len(faults)} faults were seen; these survived:" if survivors else
          f"all {len(faults)} faults were seen")  # fmt: skip
    for fault in survivors:
        print(f"  {describe(fault)}   ({fault.tests})")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
