"""``python -m eman_kernels`` prints what a bug report needs: versions, backends, and a self-check of each backend."""

import platform
import sys
from pathlib import Path

import torch
from torch import nn

from . import __version__, available_backends, eman_update_
from .backends import device_type_of
from .backends.extension import C, missing


def compare_to_reference(backend: str) -> str | None:
    """Run one update with this backend and with the reference. Returns how the results differ, or None if equal."""
    device = device_type_of(backend)
    networks = []
    for name in (backend, "reference"):
        torch.manual_seed(0)
        teacher, student = (nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300)).to(device) for _ in range(2))
        student(torch.randn(8, 300, device=device))
        with torch.no_grad():
            eman_update_(teacher, student, 0.99, backend=name)
        networks.append(teacher.state_dict())
    different = [name for name, tensor in networks[0].items() if not torch.equal(tensor, networks[1][name])]
    return f"but differs from the reference in {', '.join(different)}" if different else None


def main() -> int:
    """Print the report. Returns 1 if an available backend gives other bits than the reference, else 0."""
    print(f"eman_kernels {__version__} ({Path(__file__).parent})")
    print(f"python {platform.python_version()}, torch {torch.__version__} (CUDA {torch.version.cuda})")
    print(f"{platform.platform()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print(f"extension: {missing or f'CPU kernel on, OpenMP {C.openmp_status}; CUDA kernel {C.cuda_status}'}")
    for device in range(torch.cuda.device_count()):
        print(f"cuda:{device}: {torch.cuda.get_device_name(device)}, {torch.cuda.get_device_capability(device)}")
    print("backends:")
    faults = 0
    for name, reason in available_backends().items():
        fault = compare_to_reference(name) if reason is None else None
        faults += fault is not None
        status = f"not available: {reason}" if reason else f"available, {fault}" if fault else "available"
        print(f"  {name:10} {status}")
    print(f"self-check: {'failed' if faults else 'passed'}")
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main())
