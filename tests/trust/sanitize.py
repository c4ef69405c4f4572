"""Run the CPU kernel under ThreadSanitizer, with several plans at once. Then run the tests that need no GPU, in a copy
of the project whose extension is built with AddressSanitizer and UBSan.

python tests/trust/sanitize.py [PYTEST'S ARGUMENTS]     # default: all tests except those that build, measure or train
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from project import AT_ONCE, build, copy_project, environment, pytest_command

# Without function clones, because the loader selects them before the sanitizer is initialized.
FLAGS = (
    "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -DEMAN_NO_CLONES "
    "-fno-sanitize=vptr"
)
# These compile, measure or train, or start processes that do.
LEFT_OUT = ("build", "benchmark", "methods", "readme", "triton", "host_kernel", "cuda")


def threads(project: Path) -> None:
    """Raises AssertionError if there is a race, or if the sanitizer misses the intentional one."""
    program = project / "threads_cpu"
    sources = [project / "tests/trust/threads_cpu.cpp", project / "csrc/eman_update_cpu.cpp"]
    # Without OpenMP, whose library is not instrumented, so its synchronization would be reported as races.
    flags = ["-std=c++17", "-O1", "-g", "-Wno-unknown-pragmas", "-DEMAN_NO_CLONES", "-fsanitize=thread", "-pthread"]
    subprocess.run(["g++", *flags, f"-I{project}/csrc", *sources, "-o", program], check=True)
    for argument, races in ([], False), (["race"], True):
        done = subprocess.run([program, *argument], capture_output=True, text=True)
        seen = "data race" in done.stderr
        assert seen == races, done.stderr
        assert races or done.returncode == 0, done.stderr
    print("ThreadSanitizer: several plans at once do not race, and two that share a teacher do (as intended)")


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
            # Python itself is not instrumented, so the library must be loaded before the extension.
            LD_PRELOAD=f"{library.strip()} {undefined.stdout.strip()}",
            # Python and torch free their memory only when the process ends.
            ASAN_OPTIONS="detect_leaks=0:detect_odr_violation=0",
            UBSAN_OPTIONS="print_stacktrace=1",
        )
        tests = arguments or [*AT_ONCE, *(f"--ignore-glob=tests/*test_{name}*.py" for name in LEFT_OUT)]
        return subprocess.run(pytest_command(*tests), cwd=project, env=sanitized).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
