"""Line coverage of the package's Python and, in a host build, of csrc/, measured in a copy of the project.

    python tests/trust/coverage_report.py [PYTEST'S ARGUMENTS]     # default: all tests except those of other code

Fails below 95 % of lines of either. Excluded lines state the reason: `# pragma: no cover - reason` in Python,
GCOVR_EXCL in C++.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from project import AT_ONCE, build, copy_project, environment, pytest_command

LEAST = 95
# These run the installer, the benchmarks and trainings: a third of the time, and no line of the package that the other
# tests do not reach. test_interrupts.py is excluded because an interrupt inside coverage leaves its lock locked.
LEFT_OUT = ("build", "benchmark", "methods", "interrupts")
CONFIG = """
[run]
source = eman_kernels
branch = false
parallel = true
concurrency = multiprocessing, thread
patch = subprocess
disable_warnings = no-data-collected
[report]
show_missing = true
skip_covered = true
"""
# Triton compiles its functions and torch.compile traces code, so Python runs no line of either. (Triton's interpreter
# runs copies of the functions.)
CONFIG += "exclude_also =\n    @triton.jit[\\s\\S]*?(?=\\n\\n    @|\\Z)\n    if torch.compiler.is_compiling\n"


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        copy_project(project)
        for old in project.glob("eman_kernels/_C*.so"):
            old.unlink()
        build(project, "--coverage -O1 -fprofile-update=atomic")
        (project / ".coveragerc").write_text(CONFIG)
        # test_host_kernel.py compiles the CUDA kernels for the host, and uses CXXFLAGS.
        env = environment(project, CXXFLAGS="--coverage -fprofile-update=atomic")
        arguments = arguments or [*AT_ONCE, *(f"--ignore-glob=tests/*test_{name}*.py" for name in LEFT_OUT)]
        tests = pytest_command(f"--basetemp={project}/tmp", *arguments)
        coverage = [sys.executable, "-m", "coverage"]
        failed = subprocess.run([*coverage, "run", *tests[1:]], cwd=project, env=env).returncode
        subprocess.run([*coverage, "combine", "-q"], cwd=project, env=env, check=True)
        python = subprocess.run([*coverage, "report", f"--fail-under={LEAST}"], cwd=project, env=env).returncode
        cpp = subprocess.run(
            [
                sys.executable,
                "-m",
                "gcovr",
                "--root",
                project,
                "--filter",
                f"{project}/csrc/",
                f"--fail-under-line={LEAST}",
                "--merge-lines",  # of template instances, and of clones, of which one is loaded
                "--merge-mode-functions=merge-use-line-0",
                "--gcov-ignore-errors=no_working_dir_found",
                project,
            ],
            cwd=project,
        ).returncode
        return failed or python or cpp


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
