"""The compiled CUDA kernel: one launch on the current stream of the tensors' device."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from .extension import C, missing, pack_arguments
from .interface import Arguments, Work

NAME = "cuda"
TAKES_TABLE = True


@cache
def unavailable(device_type: str) -> str | None:
    if device_type != "cuda":
        return f"it updates CUDA tensors only, not {device_type}; move the models to the GPU or use backend='auto'"
    if missing:
        return missing
    if not C.has_cuda:
        return (
            f"the extension was built without CUDA ({C.cuda_status}); with an nvcc in place, install the package "
            "again, as before but with `EMAN_KERNELS_CUDA=on pip install -v --force-reinstall --no-deps`"
        )
    if torch.version.hip:
        return "this is torch for ROCm, and the kernel is built for CUDA; use backend='auto'"
    if not torch.cuda.is_available():
        return "no CUDA device is visible to torch (torch.cuda.is_available() is False)"
    for device in range(torch.cuda.device_count()):
        try:
            C.check_cuda(device)
        except RuntimeError as error:
            return (
                f"{error} (built for {C.cuda_status}; the device is of compute capability "
                f"{torch.cuda.get_device_capability(device)}; build with TORCH_CUDA_ARCH_LIST set to it)"
            )
    return None


def run(work: Work, arguments: Arguments, tensors: Sequence[Tensor]) -> None:
    stream = work.current_stream()
    C.update_cuda(pack_arguments(work, arguments), work.n_pieces, work.general, work.device.index, stream)
    work.keep_table(stream)


def swaps(work: Work, tensors: Sequence[Tensor]) -> Iterator[tuple[Callable[[], object], ...]]:
    assert work.table is not None
    stream = work.current_stream()
    # Before the launch, because after an interrupt this generator is not resumed.
    work.keep_table(stream)
    yield (partial(C.swap_cuda, work.table.data_ptr(), len(work.table), work.device.index, stream),)
