"""The Triton kernel without a GPU: interpreted against the reference, and compiled ahead of time for NVIDIA and AMD."""

import contextlib
import operator
import os
import re
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import exchange

from eman_kernels import ema_update_
from eman_kernels.backends import triton as backend
from eman_kernels.backends.interface import Arguments

HERE = Path(__file__).parent
triton = pytest.importorskip("triton", reason="triton is not installed")
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
if backend.explain_missing():
    pytest.skip(backend.explain_missing(), allow_module_level=True)


def interpret(selected, *files):
    """Run the selected tests of these files in a process in which Triton interprets its kernels. Returns the output."""
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=3", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-k", selected, *(HERE / file for file in files)],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    if VERSION < (3, 8) and "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip(f"the interpreter of triton {triton.__version__} does not run with numpy {np.__version__}")
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def test_some_interpreted():
    """Half of them: one alignment instead of four, and without the tests of every combination of values."""
    left_out = "0-0-off or 1-0-off or 0-1-off or interpreted-0- or skipping_and_healing or exact_where_the_average_is"
    said = interpret(
        f"triton-interpreted and not ({left_out})", "test_backends.py", "test_general.py", "test_nonfinite.py"
    )
    assert int(re.search(r"^(\d+) passed", said, re.M)[1]) > 250, said[-500:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "tests"),
    [
        # 8 pairs x 4 alignments, 7 copies x 2, 8 pairs x 3 momenta on the device, end points, 8 pairs against fp64.
        ("test_backends.py", 8 * 4 + 7 * 2 + 8 * 3 + 1 + 8),
        # 8 pairs x 5 momenta x 3 ways to pass them, x 5, 2 pairs, 8 pairs x 3 ways. Cast: 3 pairs x 2 dtypes x 5.
        # Stochastic: 4 pairs x 5 x 3, and momentum 0. Skipping: 8 x 5 x 2 roundings x 3. Copied: 4 dtypes x 2.
        # found_inf: 2. Networks: 2 of 3, the third is skipped. Healing: 2 dtypes. Infinite later: 2 dtypes x 2 momenta.
        (
            "test_nonfinite.py",
            8 * 5 * 3 + 8 * 5 + 2 + 8 * 3 + 3 * 2 * 5 + 4 * 5 * 3 + 1 + 8 * 5 * 2 * 3 + 4 * 2 + 2 + 2 + 2 + 2 * 2,
        ),
        # Stochastic: 4 pairs x 3 alignments x 2, draws, 3 large numbers. Cast: 3 pairs x 2 dtypes and alignments.
        # Skipping: 8 pairs, counted and not, 4 copies, integers. Teachers: 3 counts x 3 momenta, the first teacher.
        # found_inf: 2 x 3. Swap: 8 dtypes x 3 alignments, the context. All options together.
        ("test_general.py", 4 * 3 * 2 + 1 + 3 + 3 * 2 * 2 + 8 * 2 + 4 + 1 + 3 * 3 + 1 + 2 * 3 + 8 * 3 + 1 + 1),
    ],
)
def test_interpreted(file, tests):
    """All tests of the backends."""
    said = interpret("triton-interpreted", file)
    assert re.search(rf"^{tests} passed, (\d+ skipped, )?\d+ deselected", said, re.M), said[-500:]


def compiled(target, *arguments, options, kernel="eman_update", general=None, **types):
    """Compile ahead of time. general: (n_teachers, stochastic, skips, casts). types: dtypes of the arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: kernels cannot be compiled in this process")
    target = GPUTarget(target, *arguments)
    constants = {"THREADS": target.warp_size * backend.NUM_WARPS}
    signature = {"table": "*i64"}
    if kernel == "eman_update":
        n_teachers = general[0] if general else 1
        by_value = {} if "momenta" in types else {"weights": n_teachers * (("fp32",) * 3,)}
        names = ("momenta", "weights", "found_inf", "seed", "step", "skipped")
        signature |= dict.fromkeys(names, "constexpr") | by_value | types
        constants |= {name: None for name in names if signature[name] == "constexpr"} | {"GENERAL": general}
    source = ASTSource(
        getattr(backend.load_kernels(), kernel),
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(0,): [["tt.divisibility", 16]]},
    )
    return triton.compile(source, target=target, options=options)


ARCHITECTURES = [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100))]
# 16-byte accesses of the vector loops. Averages read both tensors: four pairs of one dtype, and the wider side of four
# mixed pairs. Copies read only the student. Every pair except the two (half <- float) stores 16 bytes.
WIDE_LOADS = 4 * 2 + 4 + 4
WIDE_STORES = 12 - 2


def accesses_of(kernel):
    """Count accesses by kind and width in bytes, such as ("ld", 16), in the PTX, where each loop body occurs once."""
    found = re.findall(r"\b(ld|st)\.global(?:\.v(\d))?\.b(\d+)", kernel.asm["ptx"])
    return Counter((which, int(vector or 1) * int(bits) // 8) for which, vector, bits in found)


def machine_code(kernel, tmp_path):
    """What the assembler produced: registers and memory, and the number of each instruction."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("this triton ships no cuobjdump: the machine code cannot be checked")
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])

    def said(option):
        return subprocess.run([cuobjdump, option, cubin], capture_output=True, text=True, check=True).stdout

    used = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", said("--dump-resource-usage"))
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][\w.]*)", said("--dump-sass"), re.M)
    return {name: int(number) for name, number in used}, Counter(code)


def count(code, start, *parts):
    return sum(n for name, n in code.items() if name.startswith(start) and all(part in name for part in parts))


@pytest.mark.parametrize("types", [{}, {"momenta": "*fp32"}, {"momenta": "*fp64"}, {"found_inf": "*fp32"}], ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_machine_code_for_nvidia(arch, types, tmp_path):
    kernel = compiled("cuda", arch, 32, options=backend.NVIDIA_OPTIONS, **types)
    used, code = machine_code(kernel, tmp_path)
    print(f"sm_{arch}:", used, sum(code.values()), "instructions")
    assert count(code, "LDG", ".128") >= WIDE_LOADS
    assert count(code, "STG", ".128") >= WIDE_STORES
    assert count(code, "LD.") == count(code, "ST.") == 0, "generic accesses"
    assert sum(count(code, name) for name in ("LDL", "STL", "LDS", "STS", "BAR")) == 0, "local or shared memory"
    assert used["REG"] <= 40
    assert used["STACK"] == used["SHARED"] == used["LOCAL"] == 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("general", "types"),
    [
        ((1, True, False, False), {"seed": "i32", "step": "i32"}),
        ((1, True, False, False), {"seed": "i32", "step": "*i64", "momenta": "*fp64", "found_inf": "*fp32"}),
        ((1, False, True, False), {"skipped": "*i64"}),
        ((1, False, False, True), {}),
        ((3, False, False, False), {}),
        ("swap", {}),
    ],
    ids=["stochastic", "stochastic, all on device", "skip", "cast", "three teachers", "swap"],
)
def test_machine_code_of_the_general_update(arch, general, types, tmp_path):
    which = {"kernel": "eman_swap"} if general == "swap" else {"general": general}
    kernel = compiled("cuda", arch, 32, options=backend.NVIDIA_GENERAL_OPTIONS, **which, **types)
    n_teachers = 1 if general == "swap" else general[0]
    widths = accesses_of(kernel)
    if general == "swap":
        assert widths["ld", 16] == widths["st", 16] == 2 * 4
    else:
        # A copy of bytes uses accesses of at most eight bytes. The student is read once for all teachers.
        students, teachers, stores = 4 + 2 + 3, 4 + 2, WIDE_STORES - 1
        assert widths["ld", 16] == students + n_teachers * teachers
        assert widths["st", 16] == n_teachers * stores
    used, code = machine_code(kernel, tmp_path)
    print(f"sm_{arch}, {general}:", used, sum(code.values()), "instructions")
    assert count(code, "LDG", ".128") >= widths["ld", 16]
    assert count(code, "STG", ".128") >= widths["st", 16]
    assert used["REG"] <= 64
    assert used["STACK"] == used["LOCAL"] == 0
    # Only the reduction of the skipped count uses shared memory, once.
    assert (count(code, "BAR") > 0) == ("skipped" in types)


def test_code_for_amd():
    if "amd" not in triton.backends.backends:
        pytest.skip("this triton has no AMD backend")
    assembly = compiled("hip", "gfx942", 64, options=backend.OPTIONS).asm["amdgcn"]
    wide = Counter(re.findall(r"\b\w+_(load|store)_dwordx4\b", assembly))
    assert wide["load"] >= WIDE_LOADS
    assert wide["store"] >= WIDE_STORES
    assert re.search(r"vgpr_spill_count: +0\b", assembly)
    assert re.search(r"sgpr_spill_count: +0\b", assembly)
    assert int(re.search(r"vgpr_count: +(\d+)", assembly)[1]) <= 64


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 0.9, 0.996, 0.9999, 1 - 2**-53, 1.0, 1 / 3, 0.999999999])
def test_three_floats_represent_a_double(momentum):
    weight = 1.0 - momentum
    parts = backend.split_into_floats(weight)
    assert all(torch.tensor(part, dtype=torch.float32).item() == part for part in parts)
    assert (parts[0] + parts[1]) + parts[2] == weight
    assert parts[0] == torch.tensor(weight, dtype=torch.float32).item()


def test_an_unavailable_backend_requested_by_name(monkeypatch):
    teacher, student = torch.zeros(3), torch.ones(3)
    if os.environ.get("TRITON_INTERPRET") != "1":
        with pytest.raises(RuntimeError, match=r"backend 'triton' cannot .* on cpu: it updates GPU tensors only"):
            ema_update_([teacher], [student], 0.5, backend="triton")
        assert (teacher == 0).all()

    def reason(device_type, **attributes):
        with monkeypatch.context() as patch:
            for name, value in attributes.items():
                patch.setattr(backend, name, value)
            backend.unavailable.cache_clear()
            said = backend.unavailable(device_type)
        backend.unavailable.cache_clear()
        return said

    assert "no code for mps tensors" in reason("mps")
    if not torch.cuda.is_available():
        assert "torch.cuda.is_available() is False" in reason("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert reason("cuda") is None
    says = "triton does not import; `pip install triton`"
    assert reason("cuda", explain_missing=lambda: says) == says


@pytest.mark.parametrize(("name", "warp"), [("cuda", 32), ("hip", 64)])
def test_what_is_launched(monkeypatch, name, warp):
    """The grid, arguments and options of a GPU launch, checked without a GPU."""
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            assert current == Work.device.index
            return lambda *args, **kwargs: launched.append((grid, args, kwargs))

    class Work:
        device = torch.device("cuda", 0)
        table = torch.zeros(6, 4, dtype=torch.int64)
        n_teachers, n_pieces = 1, 6
        general = stochastic = skip_nonfinite = casts = False

        def current_stream(self):
            return "stream"

        def keep_table(self, stream):
            launched.append(f"kept for the {stream}")

    current = 0

    @contextlib.contextmanager
    def guard(device):
        nonlocal current
        before, current = current, device.index
        launched.append(f"guarded from {before}")
        yield
        current = before

    target = types.SimpleNamespace(backend=name, warp_size=warp)
    for kernel in ("eman_update", "eman_swap"):
        monkeypatch.setattr(backend.load_kernels(), kernel, Kernel())
    monkeypatch.setattr(torch, "get_device_module", lambda device: types.SimpleNamespace(device=guard))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: current)
    monkeypatch.setattr(backend, "find_target", lambda device: target)
    plain, general = (
        ({"THREADS": backend.NUM_WARPS * warp} | (options if name == "cuda" else backend.OPTIONS))
        for options in (backend.NVIDIA_OPTIONS, backend.NVIDIA_GENERAL_OPTIONS)
    )

    backend.run(Work(), Arguments([0.75]), [])
    (grid, args, kwargs), kept = launched
    assert (grid, kept) == ((6,), "kept for the stream")
    assert args[0] is Work.table
    assert args[1:] == (None, ((0.25, 0.0, 0.0),), None, None, None, None)
    assert kwargs == plain | {"GENERAL": None}

    momentum, found_inf, step, skipped = (torch.tensor(number) for number in (0.5, 0.0, 7, 0))
    work = Work()
    work.n_teachers, work.n_pieces, work.general, work.stochastic, work.skip_nonfinite = 2, 3, True, True, True
    backend.run(work, Arguments(momentum, found_inf, 11, step, skipped), [])
    (grid, args, kwargs), _ = launched[2:]
    assert grid == (3,)
    assert all(map(operator.is_, args, (Work.table, momentum, None, found_inf, 11, step, skipped)))
    assert kwargs == general | {"GENERAL": (2, True, True, False)}

    exchange(backend.swaps(Work(), []))
    assert launched[4] == ((6,), (Work.table,), general)

    # The device guard costs 13 more Python calls, so it is used only if the table is on another device.
    del launched[:]
    current = 1
    backend.run(Work(), Arguments([0.75]), [])
    guarded, (grid, args, kwargs), _ = launched
    assert (guarded, current) == ("guarded from 1", 1)
    assert (grid, args[0], kwargs) == ((6,), Work.table, plain | {"GENERAL": None})
