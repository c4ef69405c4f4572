"""The tests that a CPU can run, with the extension built under AddressSanitizer and UBSan, in a copy of the project;
before them the CPU kernel under ThreadSanitizer, several plans at once.

python trust/sanitize.py [PYTEST'S ARGUMENTS]     # default: all tests but those that build, measure or train
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from project import AT_ONCE, build, copy_project, environment, pytest_command

# A build for any x86-64: the loader picks the clones before the sanitizer can run.
FLAGS = (
    "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -DEMAN_NO_CLONES "
    "-fno-sanitize=vptr"
)
# The first build or measure something, and compile; the last two start processes that do.
LEFT_OUT = ("build", "benchmark", "methods", "readme", "triton", "host_kernel", "cuda")


def threads(project: Path) -> None:
    """Raises AssertionError if there is a race, or the sanitizer does not see the one that is made on purpose."""
    program = project / "threads_cpu"
    sources = [project / "trust/threads_cpu.cpp", project / "csrc/eman_update_cpu.cpp"]
    # Without OpenMP: its own waiting is not built so, and would be taken for races.
    flags = ["-std=c++17", "-O1", "-g", "-Wno-unknown-pragmas", "-DEMAN_NO_CLONES", "-fsanitize=thread", "-pthread"]
    subprocess.run(["g++", *flags, f"-I{project}/csrc", *sources, "-o", program], check=True)
    for argument, races in ([], False), (["race"], True):
        done = subprocess.run([program, *argument], capture_output=True, text=True)
        seen = "data race" in done.stderr
        assert seen == races, done.stderr
        assert races or done.returncode == 0, done.stderr
    print("ThreadSanitizer: several plans at once do not race, and two that share a teacher do")


def main(arguments: list[str]) -> int:
    library = subprocess.run(["gcc", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True).stdout
    undefined = subprocess.run(["gcc", "-print-file-name=libubsan.so"], check=True, capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        copy_project(project)
        threads(project)
        for old in project.glob("eman_kernels/_C*.so"):
            old.unlink()
        build(project, FLAGS)
        sanitized = environment(
            project,
            # Python itself is not built so: the library must be there before the extension is.
            LD_PRELOAD=f"{library.strip()} {undefined.stdout.strip()}",
            # Python and torch keep what they have until the process ends.
            ASAN_OPTIONS="detect_leaks=0:detect_odr_violation=0",
            UBSAN_OPTIONS="print_stacktrace=1",
        )
        tests = arguments or [*AT_ONCE, *(f"--ignore-glob=tests/test_{name}*.py" for name in LEFT_OUT)]
        return subprocess.run(pytest_command(*tests), cwd=project, env=sanitized).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
