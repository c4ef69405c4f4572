"""The build: what it produces, what it leaves out and reports, and the machine code of the kernels."""

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import cmake
import ninja
import pybind11
import pytest

import eman_kernels
from eman_kernels.backends import extension

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
pytestmark = pytest.mark.build


def call(*command, env=None, check=True, cwd=None):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env, cwd=cwd)
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def tool(name):
    """A program on PATH, or the one in Triton's wheel."""
    if found := shutil.which(name):
        return found
    triton = pytest.importorskip("triton", reason=f"no {name} on PATH, and no triton that carries one")
    carried = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not carried.exists():
        pytest.skip(f"no {name} on PATH or in triton's wheel")
    return carried


# ---------------------------------------------------------------- the machine code of the kernels


@pytest.fixture(scope="module")
def cubins(tmp_path_factory):
    """(ptxas report, cubin) by architecture, for every architecture that the toolkit supports from 75 on."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("nvcc needs a host compiler, and there is none on PATH")
    folder = tmp_path_factory.mktemp("cubins")
    made = {}
    for arch in call(nvcc, "--list-gpu-code").stdout.split():
        number = int(re.fullmatch(r"sm_(\d+)", arch)[1])
        if number < 75:
            continue
        cubin = folder / f"{arch}.cubin"
        flags = [
            "-O3",
            "-std=c++17",
            "-DEMAN_WITH_CUDA",
            f"-arch={arch}",
            "-Xptxas=-v",
            "-cubin",
            "-Werror=all-warnings",
        ]
        made[number] = (call(nvcc, *flags, CSRC / "eman_update.cu", "-o", cubin).stderr, cubin)
    return made


def test_compiles_for_every_architecture_without_spills_or_a_stack_frame(cubins):
    assert {75, 80, 90} <= set(cubins)
    registers = {}
    for arch, (report, _) in cubins.items():
        assert report.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == 4, report
        for kernel, used in re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", report, re.S):
            registers.setdefault(kernel, {})[arch] = int(used)
    print("registers:", registers)
    # An SM has 64 K registers. With 32 per thread all 8 blocks of 256 threads fit on it, with 40 six, with 64 four.
    assert all(registers["eman_update"][arch] <= 32 for arch in (80, 90, 100))
    assert max(registers["eman_update"].values()) <= 40
    assert max(registers["eman_update_general"].values()) <= 64
    assert max(registers["eman_update_several"].values()) <= 64
    assert max(registers["eman_swap"].values()) <= 64


@pytest.mark.parametrize("kernel", ["eman_update", "eman_update_general", "eman_update_several", "eman_swap"])
@pytest.mark.parametrize("arch", [75, 80, 90, 100, 120])
def test_accesses_are_global_and_16_bytes_wide(cubins, arch, kernel):
    sass = call(tool("cuobjdump"), "-sass", "-fun", kernel, cubins[arch][1]).stdout
    accesses = re.findall(r"\b((?:LD|ST)G?[A-Z]*(?:\.[A-Z0-9_]+)*)\b", sass)
    counts = {name: accesses.count(name) for name in set(accesses)}
    print(f"sm_{arch}, {kernel}:", dict(sorted(counts.items())))

    def count(start, *parts):
        return sum(n for name, n in counts.items() if name.startswith(start) and all(p in name for p in parts))

    assert count("LD.") == count("ST.") == 0, "generic accesses"
    assert count("LDL") == count("STL") == 0, "local memory"
    if kernel == "eman_swap":
        # Data that is written must not be read through the read-only cache.
        assert count("LDG", ".128", "CONSTANT") == 0
        assert min(count("LDG", ".128"), count("STG", ".128")) >= 2 * 4
        return
    # Stores of teachers: 16 bytes in 6 of the 8 averages and all 4 copies, 8 bytes in the other two (half <- float).
    assert count("STG", ".128") >= 10
    assert count("STG", ".64") >= 2
    if kernel == "eman_update" and arch >= 80:
        # One instruction narrows two floats: 4 per vector of half <- half, and 2 per vector of half <- float.
        packed = re.findall(r"\bF2FP\.(?:BF16\.(?:F32\.)?|F16\.F32\.)?PACK_AB\b", sass)
        print(Counter(packed))
        assert len(packed) >= 2 * (4 + 2)
        assert sum("BF16" in name for name in packed) >= 4 + 2
    # Loads of students: 16 bytes in 6 of the 8 averages (float <- half reads 8) and in the copies, always through the
    # read-only cache.
    assert count("LDG", ".128", "CONSTANT") >= 10
    # Loads of teachers, only for the averages: 6 have 16 bytes.
    assert count("LDG", ".128") - count("LDG", ".128", "CONSTANT") >= 6


def functions_of_the_cpu_kernel(compiler, objdump, folder):
    """The machine code of each function, compiled with the flags of the extension."""
    flags = re.search(r"COMPILE_LANGUAGE:CXX>:([^>]*)>", (CSRC / "CMakeLists.txt").read_text())[1].split()
    made = folder / "cpu.o"
    call(compiler, *flags, "-Werror", "-std=c++17", "-fPIC", "-fopenmp", "-c", CSRC / "eman_update_cpu.cpp", "-o", made)
    code = call(objdump, "-dr", "--no-show-raw-insn", made).stdout
    return dict(re.findall(r"^[0-9a-f]+ <(\S+)>:\n(.*?)(?=\n\n|\Z)", code, re.M | re.S))


def test_the_cpu_kernel_is_vector_code_on_arm(tmp_path):
    """Every 64-bit ARM processor has vector fma instructions, so that no clones are needed."""
    prefix = "" if platform.machine() == "aarch64" else "aarch64-linux-gnu-"
    compiler = shutil.which(f"{prefix}g++")
    if compiler is None:
        pytest.skip(f"no {prefix}g++ on PATH (package g++-aarch64-linux-gnu)")
    functions = functions_of_the_cpu_kernel(compiler, tool(f"{prefix}objdump"), tmp_path)
    assert not any(re.search(r"\bfmaf?\b", body) for body in functions.values())
    for kernel in ("update_chunk_of_any_pair", "update_piece"):
        (body,) = (body for name, body in functions.items() if kernel in name)
        vectors = len(re.findall(r"\bfml[as]\s+v\d+\.(?:4s|2d)", body))
        print(kernel, vectors)
        assert vectors >= 8  # pairs


def test_the_cpu_kernels_clones_are_vector_code(tmp_path):
    """The plain and the general kernel use vector fma instructions on every machine that has them."""
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs g++ on x86-64")
    if int(call(compiler, "-dumpversion").stdout.split(".")[0]) < 12:
        pytest.skip("this g++ makes no clones")
    functions = functions_of_the_cpu_kernel(compiler, tool("objdump"), tmp_path)
    calling = {name for name, body in functions.items() if re.search(r"\bfmaf?\b", body)}
    assert calling
    assert all(name.endswith(".default") for name in calling), calling
    for kernel in ("update_chunk_of_any_pair", "update_piece"):
        for arch, register in (("v3", "ymm"), ("v4", "zmm")):
            (body,) = (body for name, body in functions.items() if kernel in name and name.endswith(f"x86_64_{arch}"))
            vectors = len(re.findall(rf"vfmadd\w+p[sd] .*%{register}", body))
            print(kernel, arch, vectors)
            assert vectors >= 8  # pairs


# ---------------------------------------------------------------- the extension and the wheel


def test_the_extension_has_nothing_of_torch_in_it():
    if extension.missing:
        pytest.skip(extension.missing)
    symbols = call(tool("nm"), "-D", extension.C.__file__).stdout
    assert "PyInit__C" in symbols
    assert not re.search(r"\b_ZNK?(2at|3c10|5torch)|\b(THP|aoti_|torch_)", symbols)
    needed = call(tool("objdump"), "-p", extension.C.__file__).stdout
    libraries = {name.split(".so")[0] for name in re.findall(r"NEEDED\s+(\S+)", needed)}
    assert libraries <= {
        "libstdc++",
        "libgomp",
        "libm",
        "libgcc_s",
        "libc",
        "ld-linux-x86-64",
        "ld-linux-aarch64",
        "libpthread",
        "libdl",
        "librt",
    }


def isolated(*command, env=None):
    """Run a command that installs the build requirements; skip if no package registry can be reached."""
    # By default pip would retry for a minute and a half.
    env = {"PIP_RETRIES": "1", "PIP_DEFAULT_TIMEOUT": "15"} | (env or dict(os.environ))
    done = call(*command, env=env, check=False)
    said = done.stdout + done.stderr
    if done.returncode and (lacking := re.search(r"No matching distribution found for \S+", said)):
        pytest.skip(f"no package registry: {lacking[0]}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return said


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    pytest.importorskip("build", reason="build is not installed: pip install '.[test]'")
    out = tmp_path_factory.mktemp("sdist")
    isolated(sys.executable, "-m", "build", "--sdist", "--outdir", out, ROOT)
    (made,) = out.glob("*.tar.gz")
    return made


def test_the_extension_is_hardened():
    """No memory is writable and executable, and the loader's pointers are read-only after loading."""
    if extension.missing:
        pytest.skip(extension.missing)
    headers = call(tool("readelf"), "--wide", "--segments", "--dynamic", extension.C.__file__).stdout
    (stack,) = re.findall(r"GNU_STACK.* ([RWE]+) ", headers)
    assert stack == "RW"
    assert "GNU_RELRO" in headers
    assert re.search(r"BIND_NOW|\bNOW\b", headers)
    assert not re.search(r"LOAD.* RWE ", headers)


def test_one_openmp_is_loaded_beside_torchs():
    """Whatever its file name in torch's wheel, the loader knows torch's libgomp as libgomp.so.1."""
    if extension.missing or "on" not in extension.C.openmp_status:
        pytest.skip(extension.missing or extension.C.openmp_status)
    code = "import eman_kernels; print(open('/proc/self/maps').read())"
    maps = call(sys.executable, "-c", code).stdout
    assert len(set(re.findall(r"/\S*libgomp\S*", maps))) == 1


def wheel_of(sdist, out, **env):
    said = isolated(sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", out, sdist, env=os.environ | env)
    (made,) = out.glob("*.whl")
    return made, re.findall(r"eman_kernels: (?:CPU|CUDA|no) .*", said)


def run_from(wheel, folder, module, *arguments):
    """python -m module, with this wheel and without any editable install."""
    if not folder.exists():
        call(sys.executable, "-m", "pip", "install", "--no-deps", "--target", folder, wheel)
    script = (
        "import runpy, sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]; "
        f"sys.argv = {[module, *map(str, arguments)]}; runpy.run_module({module!r}, run_name='__main__')"
    )
    return call(sys.executable, "-c", script, env=os.environ | {"PYTHONPATH": str(folder)}, cwd=folder).stdout


@pytest.mark.slow
def test_an_sdist_builds_a_small_wheel_in_an_isolated_environment(sdist, tmp_path):
    """Without torch: only the build requirements are installed."""
    wheel, lines = wheel_of(sdist, tmp_path)
    assert wheel.stat().st_size < 2_000_000
    assert wheel.name.startswith(f"eman_kernels-{eman_kernels.__version__}-")
    names = zipfile.ZipFile(wheel).namelist()
    assert "eman_kernels/py.typed" in names
    extensions = [name for name in names if name.startswith("eman_kernels/_C.")]
    assert len(extensions) == (0 if extension.missing else 1)
    said = run_from(wheel, tmp_path / "site", "eman_kernels")
    assert str(tmp_path) in said
    assert "self-check: passed" in said
    print(*lines, wheel.name, f"{wheel.stat().st_size / 1e6:.2f} MB", sep="\n")
    if not extension.missing and extension.C.has_cuda:
        assert any(line.startswith("eman_kernels: CUDA kernel: on: nvcc") for line in lines), lines


@pytest.mark.slow
def test_without_a_compiler_the_package_installs_and_works(sdist, tmp_path):
    wheel, lines = wheel_of(sdist, tmp_path, CXX="no-such-compiler", CC="no-such-compiler")
    assert not any("_C." in name for name in zipfile.ZipFile(wheel).namelist())
    assert "no compiled extension: no C++ compiler was found" in lines[0]
    said = run_from(wheel, tmp_path / "site", "eman_kernels")
    assert re.search(r"cpu\s+not available: the compiled extension is not in this installation", said), said
    assert re.search(r"foreach\s+available", said)
    assert "self-check: passed" in said
    names = ("backends", "functional", "pairing", "chunks", "teacher", "guards")
    suite = [path for name in names for path in (ROOT / "tests").rglob(f"test_{name}.py")]
    said = run_from(wheel, tmp_path / "site", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", *suite)
    assert int(re.search(r"^(\d+) passed", said, re.M)[1]) > 150
    assert "the compiled extension is not in this installation" in said


@pytest.mark.parametrize("options", [[], ["--inplace"]])
def test_build_ext_replaces_the_library_in_the_package_only_in_place(tmp_path, options):
    """Without a compiler, so that nothing is built: an old library must not stay where a new one would be."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(CSRC, tmp_path / "csrc")
    shutil.copytree(ROOT / "eman_kernels", tmp_path / "eman_kernels", ignore=shutil.ignore_patterns("*.so"))
    old = tmp_path / "eman_kernels" / "_C.old.so"
    old.touch()
    env = os.environ | {"CXX": "no-such-compiler", "CC": "no-such-compiler"}
    call(sys.executable, "setup.py", "build_ext", *options, env=env, cwd=tmp_path)
    assert old.exists() == (not options)


@pytest.mark.parametrize("system", ["Darwin", "Windows"])
def test_on_another_system_no_extension_is_built(tmp_path, system):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "eman_kernels", tmp_path / "eman_kernels", ignore=shutil.ignore_patterns("*.so"))
    old = tmp_path / "eman_kernels" / "_C.old.so"
    old.touch()
    simulated = f"import platform, runpy; platform.system = lambda: {system!r}; runpy.run_path('setup.py')"
    build = [sys.executable, "-c", simulated, "build_ext", "--inplace"]
    said = call(*build, env=os.environ | {"EMAN_KERNELS_CUDA": "auto"}, cwd=tmp_path).stdout
    assert f"eman_kernels: no compiled extension: it is for Linux only, and this is {system}." in said
    assert not list(tmp_path.glob("eman_kernels/_C*"))
    done = call(*build, env=os.environ | {"EMAN_KERNELS_CUDA": "on"}, cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert "EMAN_KERNELS_CUDA=on, but no extension can be built: it is for Linux only" in done.stderr


# ---------------------------------------------------------------- decisions of CMake


def configure(folder, **definitions):
    definitions |= {
        "CMAKE_MAKE_PROGRAM": Path(ninja.BIN_DIR) / "ninja",
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "Python_EXECUTABLE": sys.executable,
    }
    env = os.environ | {name: definitions.pop(name) for name in ("CXX", "CUDA_HOME") if name in definitions}
    command = [Path(cmake.CMAKE_BIN_DIR) / "cmake", "-G", "Ninja", "-S", CSRC, "-B", folder]
    done = call(*command, *(f"-D{name}={value}" for name, value in definitions.items()), env=env, check=False)
    return done.returncode, done.stdout + done.stderr


def test_cuda_off(tmp_path):
    if extension.missing:
        pytest.skip(extension.missing)
    status, said = configure(tmp_path, EMAN_CUDA="off")
    assert status == 0
    assert "eman_kernels: CUDA kernel: off: EMAN_KERNELS_CUDA=off" in said


def test_cuda_on_fails_with_the_reason(tmp_path):
    broken = tmp_path / "cuda" / "bin" / "nvcc"
    broken.parent.mkdir(parents=True)
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    if not extension.missing:
        status, said = configure(tmp_path / "a", EMAN_CUDA="auto", CUDA_HOME=str(tmp_path / "cuda"))
        assert status == 0
        assert re.search(r"CUDA kernel: off: \S+/cuda/bin/nvcc does not compile with", said), said
        status, said = configure(tmp_path / "b", EMAN_CUDA="on", CUDA_HOME=str(tmp_path / "cuda"))
        assert status != 0
        assert re.search(r"EMAN_KERNELS_CUDA=on, but the CUDA kernels are off:\s+\S+/nvcc\s+does not compile", said), (
            said
        )
    status, said = configure(tmp_path / "c", EMAN_CUDA="on", CXX="no-such-compiler")
    assert status != 0
    assert re.search(r"EMAN_KERNELS_CUDA=on, but no extension can be built: no C\+\+ compiler", said), said
    status, said = configure(tmp_path / "d", EMAN_CUDA="yes")
    assert status != 0
    assert "EMAN_KERNELS_CUDA must be auto, on or off, and is 'yes'" in said


@pytest.mark.slow
def test_architectures_as_torch_lists_them(tmp_path):
    if extension.missing or not extension.C.has_cuda:
        pytest.skip(extension.missing or extension.C.cuda_status)
    status, said = configure(tmp_path / "a", EMAN_ARCH_LIST="8.0 9.0a;10.0+PTX")
    assert status == 0
    assert re.search(r"CUDA kernel: on: nvcc [\d.]+, sm 80 90a 100\n", said), said
    status, said = configure(tmp_path / "b", EMAN_ARCH_LIST="Hopper")
    assert status != 0
    assert "TORCH_CUDA_ARCH_LIST: 'Hopper' is not like 9.0 or 9.0+PTX" in said
