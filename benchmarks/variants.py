"""Measure the CUDA kernels built with other parameters, to help a developer choose them; nothing reads the result.

Compares builds of the compiled kernel (vector pairs in flight, threads), Triton with 4 and 8 warps, and chunk sizes
with torch's foreach, one flat lerp and one flat copy. Each call starts with a clean L2 cache, and variants whose result
differs from torch.lerp's in any bit are not timed.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from checks import describe_error
from models import pair, tensors_of
from timing import MOMENTUM, machine, make_eviction_buffer, time_once
from torch import Tensor
from torch.utils.cpp_extension import CUDA_HOME

from eman_kernels.backends import extension, triton
from eman_kernels.networks.pairing import Pair
from eman_kernels.plan.chunks import GPU_CHUNK_BYTES, build_table, elements_per_chunk

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
BUILDS = [(in_flight, threads) for threads in (128, 256, 512) for in_flight in (1, 2, 4)]
WARPS = (4, 8)
CHUNKS = (1024, 2048, 4096, 8192, 16384)  # elements
NETWORKS = ("wide_resnet28_2", "mobilenet_v3_large", "resnet50", "vit_b_16")
TINY = 10_000  # tensors of 64 elements each
ROUNDS = 15


Launch = Callable[[], None]


def build(folder: Path, in_flight: int, threads: int, architecture: str) -> Path:
    """Compile the kernel with these parameters for one architecture. Raises RuntimeError with the compiler output."""
    if CUDA_HOME is None:
        raise RuntimeError("no nvcc on PATH, in CUDA_HOME or CUDA_PATH")
    file = folder / f"{in_flight}-{threads}.so"
    # The flags with which CMake compiles the package.
    command = [Path(CUDA_HOME) / "bin" / "nvcc", "-O3", "-DNDEBUG", "-std=c++17", "-shared", "-Xcompiler=-fPIC"]
    command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}", f"-I{CSRC}"]
    command += [f"-DEMAN_IN_FLIGHT={in_flight}", f"-DEMAN_THREADS={threads}", HERE / "variants.cu", "-o", file]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-2000:])
    return file


def build_variants(architecture: str) -> dict[str, Callable[..., bytes | None]]:
    """Build all variants; return their launch functions by name, and print why others could not be built."""
    launches = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(BUILDS)) as pool:
        files = {b: pool.submit(build, Path(folder), *b, architecture) for b in BUILDS}
        for (in_flight, threads), file in files.items():
            label = f"cuda, {in_flight} in flight, {threads}"
            try:
                launch = ctypes.CDLL(str(file.result())).launch
            except (OSError, RuntimeError) as error:
                print(f"{label}: not built: {str(error)[-500:]}", flush=True)
                continue
            launch.argtypes = (ctypes.c_void_p, ctypes.c_double, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p)
            launch.restype = ctypes.c_char_p
            launches[label] = launch
    return launches


def compiled_launch(launch: Callable[..., bytes | None], table: Tensor) -> Launch:
    arguments = table.data_ptr(), MOMENTUM, len(table), table.device.index
    stream = torch.cuda.current_stream().cuda_stream

    def run() -> None:
        if wrong := launch(*arguments, stream):
            raise RuntimeError(wrong.decode())

    return run


def triton_launch(warps: int, table: Tensor) -> Launch:
    weights = (triton.split_into_floats(1.0 - MOMENTUM),)
    options = triton.NVIDIA_OPTIONS | {"num_warps": warps, "GENERAL": None, "THREADS": 32 * warps}
    return lambda: triton.load_kernels().eman_update[(len(table),)](
        table, None, weights, None, None, None, None, **options
    )


def cpu_launch(table: Tensor) -> Launch:
    arguments = extension.C.Arguments(table.data_ptr(), MOMENTUM)
    return lambda: extension.C.update_cpu(arguments, len(table), False, 1)


def flatten_all(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def floating_tensors(name: str, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """The floating-point tensors of a network's teacher and student, or many tiny ones."""
    if name == "tiny":
        return tuple([torch.randn(64, device=device) for _ in range(TINY)] for _ in range(2))
    both = (tensors_of(network) for network in pair(name, "float32", device))
    return tuple([tensor for tensor in named.values() if tensor.is_floating_point()] for named in both)


def measure_network(
    name: str, launches: dict[str, Callable[[Tensor], Launch]], device: torch.device, rounds: int
) -> list[dict]:
    """Measure one network. `launches` maps a name to a function that makes a launch from a table on the device."""
    teachers, students = floating_tensors(name, device)
    pairs = [Pair(str(i), t, s, "ema") for i, (t, s) in enumerate(zip(teachers, students, strict=True))]
    elements = sum(tensor.numel() for tensor in teachers)
    before = [tensor.clone() for tensor in teachers]
    want = flatten_all([t.lerp(s, 1.0 - MOMENTUM) for t, s in zip(teachers, students, strict=True)])
    flat = [torch.randn(elements, device=device) for _ in range(2)]
    runs = {
        ("flat copy", None): lambda: flat[0].copy_(flat[1]),
        ("flat lerp", None): lambda: flat[0].lerp_(flat[1], 1.0 - MOMENTUM),
        ("foreach", None): lambda: torch._foreach_lerp_(teachers, students, 1.0 - MOMENTUM),
    }
    chosen = elements_per_chunk(pairs[0], None if device.type == "cpu" else GPU_CHUNK_BYTES)
    for chunk in CHUNKS:
        table = build_table(pairs, chunk_bytes=4 * chunk).to(device)
        for label, launch in launches.items():
            runs[label, chunk] = launch(table)
    rows, cache = [], make_eviction_buffer(device)
    times: dict[tuple, list[float]] = {}
    for (label, chunk), run in runs.items():
        row = {"kind": "variant", "model": name, "elements": elements, "method": label, "chunk": chunk}
        row["by the rule"] = chunk == chosen
        rows.append(row)
        try:
            run()
            wrong = 0 if label.startswith("flat") else int((flatten_all(teachers) != want).sum())
            torch._foreach_copy_(teachers, before)
            if wrong:
                row["why_not"] = f"differs from torch.lerp in {wrong:,} elements"
        except Exception as error:
            row["why_not"] = describe_error(error)
        if "why_not" not in row:
            times[label, chunk] = []
    for k in range(rounds + 2):
        for which, samples in times.items():
            work, _ = time_once(runs[which], device, cache)
            if k >= 2:
                samples.append(work)
    for row in rows:
        if samples := times.get((row["method"], row["chunk"])):
            row["q1_ms"], row["median_ms"], row["q3_ms"] = statistics.quantiles(samples, n=4)
            row["GB/s"] = (2 if row["method"] == "flat copy" else 3) * 4 * elements / row["median_ms"] / 1e6
    return rows


def format_table(rows: list[dict]) -> str:
    """One network: microseconds by method and chunk size; an asterisk marks the size that the plan chooses."""
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
    parser.add_argument(
        "--rehearse", action="store_true", help="without a GPU: build for an H100 and time the CPU kernel"
    )
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        parser.error("torch does not see a CUDA GPU (--rehearse runs the parts that work without one)")
    begin = time.perf_counter()
    architecture = "90" if arguments.rehearse else "{}{}".format(*torch.cuda.get_device_capability())
    built = build_variants(architecture)
    print(f"{len(built)} builds in {time.perf_counter() - begin:.0f} s", flush=True)
    launches: dict[str, Callable[[Tensor], Launch]] = {}
    if arguments.rehearse:
        device, networks, rounds = torch.device("cpu"), (NETWORKS[0], "tiny"), 2
        if extension.missing is None:
            launches["cpu"] = cpu_launch
    else:
        device, networks, rounds = torch.device("cuda", torch.cuda.current_device()), (*NETWORKS, "tiny"), ROUNDS
        launches |= {label: partial(compiled_launch, launch) for label, launch in built.items()}
        if triton.unavailable("cuda") is None:
            launches |= {f"triton, {warps} warps": partial(triton_launch, warps) for warps in WARPS}
    described, rows = machine(device), []
    for name in networks:
        try:
            with torch.no_grad():
                found = measure_network(name, launches, device, rounds)
        except Exception as error:
            print(f"{name}: {describe_error(error)}", flush=True)
            continue
        print(f"\n{format_table(found)}", flush=True)
        rows += [described | row for row in found]
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"\n{time.perf_counter() - begin:.0f} s in total")
    return int(not rows)


if __name__ == "__main__":
    sys.exit(main())
