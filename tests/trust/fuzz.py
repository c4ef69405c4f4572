"""Fuzz both kernels on the host with chunk tables made from random bytes, by libFuzzer if available, else by a driver.

python tests/trust/fuzz.py [SECONDS]     # default 60
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLANGS = ("clang++", *(f"clang++-{version}" for version in range(24, 13, -1)))
SOURCES = [ROOT / "tests/trust/fuzz_table.cpp", ROOT / "csrc/eman_update_cpu.cpp"]
FLAGS = ["-std=c++17", "-O1", "-g", "-fno-strict-aliasing", "-ffp-contract=off", "-DEMAN_NO_CLONES"]
FLAGS += [f"-I{ROOT}/csrc", f"-I{ROOT}/tests/backends", "-Wno-unknown-pragmas", "-fno-sanitize-recover=all"]
INPUTS_PER_SECOND = 500  # of the driver, at most


def main(seconds: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "fuzz_table")
        for clang in filter(shutil.which, CLANGS):
            command = [clang, *FLAGS, "-fsanitize=fuzzer,address,undefined", *SOURCES, "-o", program]
            if subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0:
                corpus = Path(folder, "corpus")
                corpus.mkdir()
                options = [f"-max_total_time={seconds}", "-max_len=256", "-len_control=0", "-print_final_stats=1"]
                return subprocess.run([program, *options, corpus], cwd=ROOT).returncode
        print("no clang with libFuzzer: random inputs with g++")
        command = ["g++", *FLAGS, "-DEMAN_DRIVER", "-fsanitize=address,undefined", *SOURCES, "-o", program]
        subprocess.run(command, check=True)
        return subprocess.run([program, str(seconds * INPUTS_PER_SECOND)]).returncode


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 60))
