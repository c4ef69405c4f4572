"""The compiled kernel on CPU threads."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from .extension import C, missing, pack_arguments
from .interface import Arguments, Work

NAME = "cpu"
TAKES_TABLE = True

# With fewer elements per thread, waking a thread costs more time than it saves.
ELEMENTS_PER_THREAD = 1 << 17


def unavailable(device_type: str) -> str | None:
    if device_type != "cpu":
        return f"it updates CPU tensors only, not {device_type}; leave the choice to backend='auto'"
    return missing


_max_threads = float("inf")


def _use_one_thread() -> None:
    global _max_threads
    _max_threads = 1


# A forked child process has none of the threads that OpenMP started in its parent, but would wait for them forever.
# Windows has no fork.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_use_one_thread)


def count_threads(numel: int) -> int:
    """As many threads as torch uses; fewer if there are few elements."""
    most = min(numel // ELEMENTS_PER_THREAD, _max_threads)
    return int(min(torch.get_num_threads(), most)) if most > 1 else 1


def run(work: Work, arguments: Arguments, tensors: Sequence[Tensor]) -> None:
    C.update_cpu(pack_arguments(work, arguments), work.n_pieces, work.general, count_threads(work.numel))


def swaps(work: Work, tensors: Sequence[Tensor]) -> Iterator[tuple[Callable[[], object], ...]]:
    assert work.table is not None
    yield (partial(C.swap_cpu, work.table.data_ptr(), len(work.table), count_threads(work.numel)),)
