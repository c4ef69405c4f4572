"""Apply each fault to a copy of the project, run the tests that should detect it, and list the undetected faults.

    python trust/mutants.py [--at-once] [WORD ...]

WORD selects faults whose path or text contains one of the words. --at-once skips the first run without a fault.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from faults import FAULTS, HOST, Fault
from project import build, copy_project, environment, pytest_command

SECONDS = 900  # a fault with which the tests run longer counts as detected


def is_built(fault: Fault) -> bool:
    """Whether the extension is rebuilt. Such faults run last, because the extension keeps the last of them."""
    return fault.path.startswith("csrc/") and fault.tests != HOST


def run_tests(project: Path, files: list[str], chosen: str = "") -> tuple[bool, str]:
    """Whether the tests failed, and the last line of their output."""
    command = pytest_command("-x", *(f"tests/{file}" for file in files), *(["-k", chosen] if chosen else []))
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
    path = project / fault.path
    text = path.read_text()
    assert text.count(fault.old) == 1, f"not found exactly once: {fault}"
    path.write_text(text.replace(fault.old, fault.new))
    try:
        if is_built(fault):
            build(project)
        files, _, chosen = fault.tests.partition(" -k ")
        return run_tests(project, files.split(), chosen)
    finally:
        path.write_text(text)


def main(words: list[str]) -> int:
    at_once = "--at-once" in words
    words = [word for word in words if word != "--at-once"]
    faults = [fault for fault in FAULTS if not words or any(word in str(fault) for word in words)]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        copy_project(project)
        files = set() if at_once else {file for fault in faults for file in fault.tests.partition(" -k ")[0].split()}
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
                f"{number}/{len(faults)} {'seen' if seen else 'SURVIVED'} {time.monotonic() - begin:.0f} s  {fault}\n"
                f"      {last}",
                flush=True,
            )
    print(f"{len(faults) - len(survivors)} of {len(faults)} faults were seen; these survived:" if survivors else
          f"all {len(faults)} faults were seen")  # fmt: skip
    for fault in survivors:
        print(f"  {fault}   ({fault.tests})")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
