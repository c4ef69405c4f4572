"""Processes connected by torch.distributed, kept for a test module: `World(...).run(work, ...)`."""

import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

TIMEOUT = 60  # seconds
# Slow imports, done once for all processes. None of them starts a thread or queries a device.
_PRELOADED = [
    "pytest",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
]


def why_none(backend: str, size: int) -> str | None:
    """Why such processes cannot be started, or None."""
    if not dist.is_available() or not getattr(dist, f"is_{backend}_available")():
        return f"torch was built without {backend}"
    if backend == "nccl" and torch.cuda.device_count() < size:
        return f"needs {size} CUDA GPUs; torch sees {torch.cuda.device_count()}"
    try:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            sock.listen()
    except OSError as error:
        return f"no port can be opened: {error}"
    return None


class World:
    """`size` processes of one group. Each runs the same work and reports what it returned or raised."""

    def __init__(self, backend: str, size: int, folder: Path) -> None:
        self.device, self.size = {"gloo": "cpu", "nccl": "cuda"}[backend], size
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        pipes = [context.Pipe() for _ in range(size)]
        self._connections = [here for here, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(there, backend, rank, size, str(folder)), daemon=True)
            for rank, (_, there) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()
        for _, there in pipes:
            there.close()  # so that the end of a process closes its pipe

    def run(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """What `work(*args)` returns in each process. Fails if one raises or does not answer in time."""
        answers = self.answers(work, *args)
        if failed := [f"process {rank}: {answer}" for rank, (fine, answer) in enumerate(answers) if not fine]:
            raise AssertionError("\n".join(failed))
        return [answer for _, answer in answers]

    def answers(self, work: Callable[..., Any], *args: Any) -> list[tuple[bool, Any]]:
        """For each process, whether `work(*args)` succeeded, and what it returned or raised."""
        for connection in self._connections:
            connection.send((work, args))
        answers = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(TIMEOUT):
                self.stop()
                raise AssertionError(f"process {rank} of {self.size} hangs")
            try:
                answers.append(connection.recv())
            except EOFError:
                answers.append((False, "the process has gone"))
        return answers

    def stop(self) -> None:
        for connection in self._connections:
            connection.close()  # tells a waiting process to exit
        for process in self._processes:
            process.join(5)
            process.kill()
            process.join()


def _serve(connection: Connection, backend: str, rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    file = f"file://{folder}/{backend}-{size}"
    dist.init_process_group(backend, init_method=file, rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT))
    while True:
        try:
            work, args = connection.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            answer = True, work(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        connection.send(answer)
