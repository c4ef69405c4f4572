"""The compiled kernel on CPU threads."""

import os
from functools import partial

import torch

from ..interrupts import at_once
from .extension import C, call_of, missing

NAME = "cpu"
TAKES_TABLE = True

# Below this many elements a thread, waking it costs more than it brings.
ELEMENTS_PER_THREAD = 1 << 17


def unavailable(device_type: str) -> str | None:
    if device_type != "cpu":
        return f"it updates CPU tensors only, not {device_type}; leave the choice to backend='auto'"
    return missing


# A child process has none of the threads that OpenMP started before the fork, and would wait for them forever.
_most_threads = float("inf")


def _one_thread() -> None:
    global _most_threads
    _most_threads = 1


os.register_at_fork(after_in_child=_one_thread)


def threads(numel: int) -> int:
    """As many as torch uses, fewer for little work."""
    most = min(numel // ELEMENTS_PER_THREAD, _most_threads)
    return min(torch.get_num_threads(), most) if most > 1 else 1


def run(work, call, tensors) -> None:
    launch = partial(C.update_cpu, call_of(work, call), work.n_pieces, work.general, threads(work.numel))
    at_once(launch, *call.counts)


def swaps(work, tensors):
    yield (partial(C.swap_cpu, work.table.data_ptr(), len(work.table), threads(work.numel)),)
