"""The compiled kernel on CPU threads."""

import torch

from .extension import C, call_of, missing

NAME = "cpu"
TAKES_TABLE = True

# Below this many elements a thread, waking it costs more than it brings.
ELEMENTS_PER_THREAD = 1 << 17


def unavailable(device_type: str) -> str | None:
    if device_type != "cpu":
        return f"it updates CPU tensors only, not {device_type}; leave the choice to backend='auto'"
    return missing


def threads(numel: int) -> int:
    """As many as torch uses, fewer for little work."""
    return max(1, min(torch.get_num_threads(), numel // ELEMENTS_PER_THREAD))


def run(work, call) -> None:
    C.update_cpu(call_of(work, call), work.n_pieces, work.general, threads(work.numel))


def swap(work) -> None:
    C.swap_cpu(work.table.data_ptr(), len(work.table), threads(work.numel))
