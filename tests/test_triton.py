"""The Triton kernel without a GPU: interpreted against the reference, and compiled ahead of time for NVIDIA and AMD."""

import os
import re
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch

from eman_kernels import ema_update_
from eman_kernels.backends import triton as backend

HERE = Path(__file__).parent
triton = pytest.importorskip("triton", reason="triton is not installed")
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
if backend.missing:
    pytest.skip(backend.missing, allow_module_level=True)


@pytest.mark.skipif(VERSION < (3, 9), reason=f"the interpreter of triton {triton.__version__} rounds an fma twice")
def test_interpreted_over_every_pair_size_and_alignment():
    """test_backends.py once more, in a process in which Triton interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "test_backends.py"]
    done = subprocess.run(
        [*command, "-k", "triton-interpreted"],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:]
    # 8 pairs by 4 alignments, 7 copies by 2, 8 pairs by 3 momenta on the device, the end points, 8 pairs against fp64.
    assert re.search(rf"^{8 * 4 + 7 * 2 + 8 * 3 + 1 + 8} passed, \d+ deselected", done.stdout, re.M), done.stdout[-500:]


def compiled(target, *arguments, options, momentum=None):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: nothing is compiled in this process")
    target = GPUTarget(target, *arguments)
    source = ASTSource(
        backend.eman_update,
        signature={"table": "*i64", "momentum": momentum or "constexpr"}
        | {"high": "fp32", "middle": "fp32", "low": "fp32", "THREADS": "constexpr"},
        constexprs={"THREADS": target.warp_size * backend.NUM_WARPS} | ({} if momentum else {"momentum": None}),
        attrs={(0,): [["tt.divisibility", 16]]},
    )
    return triton.compile(source, target=target, options=options)


# The vector loops' accesses of 16 bytes. Averages read both tensors: four pairs of one dtype and the wider side of four
# mixed ones. Copies read the student alone. Every pair but (half <- float) twice stores 16 bytes.
WIDE_LOADS = 4 * 2 + 4 + 4
WIDE_STORES = 12 - 2


@pytest.mark.parametrize("momentum", [None, "*fp32", "*fp64"], ids=["by value", "float on device", "double on device"])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_ptx_and_registers_for_nvidia(arch, momentum, tmp_path):
    kernel = compiled("cuda", arch, 32, options=backend.NVIDIA_OPTIONS, momentum=momentum)
    ptx = kernel.asm["ptx"]
    accesses = re.findall(r"\b(ld|st)\.global(?:\.v(\d))?\.b(\d+)", ptx)
    widths = Counter((which, int(vector or 1) * int(bits) // 8) for which, vector, bits in accesses)
    assert widths["ld", 16] >= WIDE_LOADS
    assert widths["st", 16] >= WIDE_STORES
    assert not re.search(r"\b(ld|st)\.(?!global|param)\w", ptx), (
        "an access that is not global: shared, local or generic"
    )
    assert "bar.sync" not in ptx

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("this triton carries no cuobjdump: registers not counted")
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    said = subprocess.run(
        [cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", said)}
    print(f"sm_{arch}:", used)
    assert used["REG"] <= 40
    assert used["STACK"] == used["SHARED"] == used["LOCAL"] == 0


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
def test_three_floats_hold_a_double(momentum):
    weight = 1.0 - momentum
    parts = backend.parts(weight)
    assert all(torch.tensor(part, dtype=torch.float32).item() == part for part in parts)
    assert (parts[0] + parts[1]) + parts[2] == weight
    assert parts[0] == torch.tensor(weight, dtype=torch.float32).item()


def test_asked_for_by_name_and_not_able(monkeypatch):
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

    assert "pip install triton" in reason("cuda", missing="triton does not import; `pip install triton`")
    assert "no code for mps tensors" in reason("mps")
    if not torch.cuda.is_available():
        assert "torch.cuda.is_available() is False" in reason("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert reason("cuda") is None


def test_what_is_launched(monkeypatch):
    """The grid, the arguments and the options for a GPU, without one."""
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launched.append((grid, args, kwargs))

    class Work:
        device = torch.device("cuda", 0)
        table = torch.zeros(5, 4, dtype=torch.int64)

        def keep_table(self):
            launched.append("kept")

    guard = types.SimpleNamespace(device=lambda device: torch.no_grad())
    monkeypatch.setattr(backend, "eman_update", Kernel())
    monkeypatch.setattr(torch, "get_device_module", lambda device: guard)
    for name, warp, options in (("cuda", 32, backend.NVIDIA_OPTIONS), ("hip", 64, backend.OPTIONS)):
        target = types.SimpleNamespace(backend=name, warp_size=warp)
        monkeypatch.setattr(backend, "current_target", lambda device, target=target: target)
        launched.clear()
        backend.run(Work(), 0.75)
        (grid, args, kwargs), kept = launched
        assert grid == (5,)
        assert args[0] is Work.table
        assert args[1:] == (None, 0.25, 0.0, 0.0)
        assert kwargs == {"THREADS": 4 * warp} | options
        assert kept == "kept"
        momentum = torch.tensor(0.5)
        backend.run(Work(), momentum)
        assert launched[2][1][1] is momentum
