"""What the CUDA kernels would cost if they were built otherwise: tells a developer what to set, and decides nothing.

Builds of the compiled kernel (pairs of vectors in flight, threads), Triton's with 4 and 8 warps, and sizes of a chunk,
beside torch's foreach, one flat lerp and one flat copy. Each on a clean L2, and only if its bits are torch.lerp's.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from models import pair, tensors_of
from timing import MOMENTUM, machine, nothing_cached, said, time_once
from torch import Tensor

from eman_kernels import plan
from eman_kernels.backends import triton
from eman_kernels.pairing import Pair

CSRC = Path(__file__).parent.parent / "csrc"
BUILDS = [(in_flight, threads) for threads in (256, 512) for in_flight in (1, 2, 4)]
WARPS = (4, 8)
CHUNKS = (2048, 4096, 8192, 16384, 32768)
NETWORKS = ("wide_resnet28_2", "mobilenet_v3_large", "resnet50")
TINY = 10_000  # tensors, of 64 elements
ROUNDS = 15


def build(folder: Path, in_flight: int, threads: int, architectures: str, cuda: str) -> Path:
    """The extension with these numbers. Raises RuntimeError with what CMake or the compiler said."""
    import cmake
    import ninja
    import pybind11

    tree = folder / f"{in_flight}-{threads}"
    program = Path(cmake.CMAKE_BIN_DIR) / "cmake"
    definitions = {
        "CMAKE_MAKE_PROGRAM": Path(ninja.BIN_DIR) / "ninja",
        "CMAKE_CUDA_FLAGS": f"-DEMAN_IN_FLIGHT={in_flight} -DEMAN_THREADS={threads}",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "EMAN_CUDA": cuda,
        "EMAN_ARCH_LIST": architectures,
    }
    configure = [program, "-G", "Ninja", "-S", CSRC, "-B", tree, *(f"-D{k}={v}" for k, v in definitions.items())]
    for command in (configure, [program, "--build", tree]):
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError((done.stdout + done.stderr)[-2000:])
    (made,) = tree.glob("_C.*")
    return made


def load(file: Path) -> ModuleType:
    spec = spec_from_file_location("eman_kernels._C", file)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled_launch(extension: ModuleType, table: Tensor) -> Callable[[], None]:
    call = extension.Call(table.data_ptr(), MOMENTUM)
    stream = torch.cuda.current_stream().cuda_stream
    return lambda: extension.update_cuda(call, len(table), False, table.device.index, stream)


def triton_launch(warps: int, table: Tensor) -> Callable[[], None]:
    weights = (triton.parts(1.0 - MOMENTUM),)
    options = triton.NVIDIA_OPTIONS | {"num_warps": warps, "GENERAL": None, "THREADS": 32 * warps}
    return lambda: triton.kernels().eman_update[(len(table),)](table, None, weights, None, None, None, None, **options)


def tensors(name: str, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """The floating-point tensors of a network's teacher and student, or many tiny ones."""
    if name == "tiny":
        return tuple([torch.randn(64, device=device) for _ in range(TINY)] for _ in range(2))
    both = (tensors_of(network) for network in pair(name, "float32", device))
    return tuple([tensor for tensor in named.values() if tensor.is_floating_point()] for named in both)


def differing(run: Callable[[], None], teachers: list[Tensor], students: list[Tensor]) -> int:
    """In how many tensors the result is not torch.lerp's. Leaves the teacher as it was."""
    before = [tensor.clone() for tensor in teachers]
    run()
    want = [t.lerp(s, 1.0 - MOMENTUM) for t, s in zip(before, students, strict=True)]
    wrong = sum(not torch.equal(t, w) for t, w in zip(teachers, want, strict=True))
    torch._foreach_copy_(teachers, before)
    return wrong


def rows_of(name: str, extensions: dict[str, ModuleType], device: torch.device) -> list[dict]:
    teachers, students = tensors(name, device)
    pairs = [Pair(str(i), t, s, "ema") for i, (t, s) in enumerate(zip(teachers, students, strict=True))]
    elements = sum(tensor.numel() for tensor in teachers)
    flat = [torch.randn(elements, device=device) for _ in range(2)]
    runs = {
        ("flat copy", None): lambda: flat[0].copy_(flat[1]),
        ("flat lerp", None): lambda: flat[0].lerp_(flat[1], 1.0 - MOMENTUM),
        ("foreach", None): lambda: torch._foreach_lerp_(teachers, students, 1.0 - MOMENTUM),
    }
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    ruled = plan.chunk_size(elements, processors)
    for chunk in CHUNKS:
        table = plan.table(pairs, chunk=chunk).to(device)
        for label, extension in extensions.items():
            runs[label, chunk] = compiled_launch(extension, table)
        if triton.unavailable(device.type) is None:
            for warps in WARPS:
                runs[f"triton, {warps} warps", chunk] = triton_launch(warps, table)
    rows, cache = [], nothing_cached(device)
    times: dict[tuple, list[float]] = {}
    for (label, chunk), run in runs.items():
        row = {"kind": "variant", "model": name, "elements": elements, "method": label, "chunk": chunk}
        row["by the rule"] = chunk == ruled
        rows.append(row)
        try:
            if not label.startswith("flat") and (wrong := differing(run, teachers, students)):
                row["why_not"] = f"other bits than torch.lerp's in {wrong} tensors"
        except Exception as error:
            row["why_not"] = said(error)
        if "why_not" not in row:
            times[label, chunk] = []
    for k in range(ROUNDS + 2):
        for which, samples in times.items():
            work, _ = time_once(runs[which], device, cache)
            if k >= 2:
                samples.append(work)
    for row in rows:
        if samples := times.get((row["method"], row["chunk"])):
            row["q1_ms"], row["median_ms"], row["q3_ms"] = statistics.quantiles(samples, n=4)
            row["GB/s"] = (2 if row["method"] == "flat copy" else 3) * 4 * elements / row["median_ms"] / 1e6
    return rows


def table_of(rows: list[dict]) -> str:
    """One network's: microseconds by method and chunk; an asterisk at the size that the rule takes."""
    lines = [f"{rows[0]['model']}, {rows[0]['elements']:,} elements, microseconds"]
    by_method: dict[str, dict] = {}
    for row in rows:
        by_method.setdefault(row["method"], {})[row["chunk"]] = row
    lines.append(f"{'':28}" + "".join(f"{chunk:>10,}" for chunk in CHUNKS))
    for method, its in by_method.items():
        cells = [its.get(chunk) for chunk in (CHUNKS if None not in its else (None,))]
        text = [
            f"{1e3 * row['median_ms']:.1f}{'*' * row['by the rule']}" if "median_ms" in row else "none" for row in cells
        ]
        lines.append(f"{method:28}" + "".join(f"{cell:>10}" for cell in text))
    lines += [f"  {row['method']}, {row['chunk']}: {row['why_not']}" for row in rows if "why_not" in row]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row, after each network")
    parser.add_argument("--build-only", action="store_true", help="no GPU: build and load each, for an H100")
    arguments = parser.parse_args()
    if not arguments.build_only and not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU here; --build-only builds the kernels all the same")
    begin = time.perf_counter()
    architectures = "9.0"
    if not arguments.build_only:
        architectures = "{}.{}".format(*torch.cuda.get_device_capability())
    extensions: dict[str, ModuleType] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(BUILDS)) as pool:
        made = {b: pool.submit(build, Path(folder), *b, architectures, "on") for b in BUILDS}
        for (in_flight, threads), file in made.items():
            label = f"cuda, {in_flight} in flight, {threads}"
            try:
                extensions[label] = load(file.result())
            except (ImportError, RuntimeError) as error:  # of cmake and the like, or the compiler's
                print(f"{label}: not built: {str(error)[-500:]}", flush=True)
    print(f"{len(extensions)} builds in {time.perf_counter() - begin:.0f} s", flush=True)
    if arguments.build_only:
        return int(len(extensions) < len(BUILDS))
    device = torch.device("cuda", torch.cuda.current_device())
    described, rows = machine(device), []
    for name in (*NETWORKS, "tiny"):
        try:
            with torch.no_grad():
                found = rows_of(name, extensions, device)
        except Exception as error:
            print(f"{name}: {said(error)}", flush=True)
            continue
        print(f"\n{table_of(found)}", flush=True)
        rows += [described | row for row in found]
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"\n{time.perf_counter() - begin:.0f} s in all")
    return int(not rows)


if __name__ == "__main__":
    sys.exit(main())
