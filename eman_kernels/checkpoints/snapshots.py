"""Stores the averages of a training run every so many updates, for averages of any length after the training."""

import json
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, distributed

from ..networks.errors import warn_user
from ..networks.pairing import pair_modules
from ..networks.tensors import fsdp1_class, is_distributed
from ..schedules import CopyFirst, PowerFunction
from ..teacher import EMANTeacher
from .folders import SUFFIX, StoredNetwork, check_same_network, import_safetensors, read_folder, write_network
from .profiles import COMMON_LENGTHS, solve_coefficients


class Snapshots:
    """Stores the averages of teachers in a folder, from which ``synthesize`` makes averages of other lengths.

    Two averages with ``PowerFunction(0.05)`` and ``PowerFunction(0.10)``, each stored 32 times, represent all lengths
    from 0.02 to 0.25: see the guide. With 16 it is 0.03 to 0.23.

    A snapshot is copied to CPU memory, which waits for the device, and written by another thread while the training
    continues. Each average and step is one safetensors file, which holds the network's state_dict (its tensors only;
    tied tensors are stored under each of their names). It is written under a temporary name and renamed, so a killed
    run leaves no half file. A resumed run continues the folder. Files of steps that it reaches again are replaced.

    Sharded teachers (FSDP2) are gathered tensor by tensor, so each process must call the same methods. The process of
    rank 0 writes whole tensors, which load into any other sharding.

    Args:
        teachers: EMANTeachers, or other teachers that are updated together, whose momenta are
            ``schedules.PowerFunction`` with different lengths; or one EMANTeacher. ``CopyFirst(PowerFunction(...))``
            with one copy is the same schedule.
        folder: created if it does not exist. One folder per run.
        every: the number of updates between snapshots.
        dtype: of the stored parameters: float16 (default), bfloat16 or float32. Parameters that it cannot hold, because
            values are above 65504 or most are below 6e-5, keep their own dtype, as buffers and tensors that are not
            averaged do.
        keep: the number of steps to keep, at least 2; default: all. If there are more, the step (never the last one) is
            removed without which the averages of sigma_rel 0.02 to 0.25 can be represented best.

    Raises:
        ValueError: a momentum is not a PowerFunction, two are equal, the folder holds snapshots of other momenta or of
            another network, the teachers are sharded with FSDP1, or an argument is out of range. Nothing has been
            written.
        ImportError: safetensors is not installed.

    >>> from tempfile import mkdtemp
    >>> from torch import nn
    >>> from eman_kernels import EMANTeachers
    >>> student, folder = nn.Linear(4, 4), mkdtemp()
    >>> teachers = EMANTeachers(student, momenta=[PowerFunction(0.05), PowerFunction(0.10)])
    >>> with Snapshots(teachers, folder, every=1000) as snapshots:
    ...     for _ in range(3000):
    ...         teachers.update(student)
    ...         snapshots.store_if_due()
    >>> len(list(Path(folder).iterdir()))
    6
    """

    def __init__(
        self,
        teachers: EMANTeacher | Iterable[EMANTeacher],
        folder: str | Path,
        *,
        every: int,
        dtype: torch.dtype = torch.float16,
        keep: int | None = None,
    ) -> None:
        if every < 1 or (keep is not None and keep < 2):
            raise ValueError(f"every must be at least 1 and keep at least 2, but they are {every} and {keep}")
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"dtype must be float16, bfloat16 or float32, but is {dtype}")
        import_safetensors()
        self.folder = Path(folder)
        self._teachers = [teachers] if isinstance(teachers, EMANTeacher) else list(teachers)
        self._sigma_rels = [_length_of(teacher) for teacher in self._teachers]
        if len(set(map(_format_length, self._sigma_rels))) < len(self._sigma_rels):
            raise ValueError(f"the teachers' lengths must differ, but are {self._sigma_rels}")
        if any(isinstance(module, fsdp1_class()) for teacher in self._teachers for module in teacher.modules()):
            raise ValueError("snapshots of networks of FSDP1 are not supported: shard them with FSDP2 (fully_shard)")
        self._every, self._dtype, self._keep = every, dtype, keep
        self._is_writer = (
            not distributed.is_available() or not distributed.is_initialized() or not distributed.get_rank()
        )
        self._is_sharded = any(map(is_distributed, self._teachers[0].module.parameters()))
        self._last_step: int | None = None  # of the latest look at the teacher's step
        self._calls = 0  # since then
        self._stored_step: int | None = None
        self._thread = ThreadPoolExecutor(1, "snapshots")
        self._write: Future[None] | None = None
        self._check_folder()
        if self._is_writer:
            self.folder.mkdir(parents=True, exist_ok=True)
            for unfinished in self.folder.glob(f"*{SUFFIX}.tmp"):
                unfinished.unlink()

    def store_if_due(self) -> None:
        """Call this after each update: stores a snapshot when the number of updates reaches a multiple of ``every``.

        If the step is stored on the device (``capturable=True``, a fused optimizer), it is read only when the number of
        calls says that a snapshot may be due; with several updates per call, a snapshot may be late.
        """
        step = self._teachers[0].state.step
        self._calls += 1
        before = self._last_step
        if before is not None and isinstance(step, Tensor) and self._calls < self._every - before % self._every:
            return
        self._last_step, self._calls = int(step), 0
        if before is None:
            self._begin(self._last_step)
        elif self._last_step // self._every > before // self._every:
            self._store(self._last_step)

    def store(self) -> None:
        """Store a snapshot now, such as after the last update, unless this object has stored one of this step."""
        self.wait()  # for the exception of a snapshot that could not be written
        self._last_step, self._calls = self._teachers[0].step, 0
        if self._last_step != self._stored_step:
            self._store(self._last_step)

    def wait(self) -> None:
        """Wait until the latest snapshot has been written. Raises the exception that its thread has raised."""
        if self._write is not None:
            write, self._write = self._write, None
            try:
                write.result()
            except BaseException:
                self._stored_step = None
                raise

    def __enter__(self) -> "Snapshots":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def _begin(self, step: int) -> None:
        """The first call: the run may be a resumed one, and its step may have been stored already."""
        stored = self._stored()
        if ahead := [network for network in stored if network.step > step]:
            warn_user(
                f"{self.folder} has snapshots up to step {ahead[-1].step}, and the teachers are at step {step}. Later "
                "snapshots are replaced when the run reaches their steps; remove them if it will not"
            )
        if step > 0 and step % self._every == 0:
            self._store(step, {network.path for network in stored})

    def _store(self, step: int, existing: Collection[Path] = ()) -> None:
        if step == 0:
            raise ValueError("the teachers have not been updated yet")
        steps = [teacher.step for teacher in self._teachers]
        if len(set(steps)) > 1:
            raise ValueError(f"the teachers must have had the same number of updates, but have had {steps}")
        self.wait()
        self._stored_step = step
        files = []
        for teacher, sigma_rel in zip(self._teachers, self._sigma_rels, strict=True):
            if not self._is_writer and not self._is_sharded:
                continue
            tensors, copied = self._copy_to_host(teacher)
            path = self.folder / f"sigma_rel-{_format_length(sigma_rel)}-step-{step:09}{SUFFIX}"
            if path not in existing:
                metadata = {"step": str(step), "sigma_rel": repr(sigma_rel), "copied": json.dumps(copied)}
                files.append((path, tensors, metadata))
        if self._is_writer:
            self._write = self._thread.submit(self._write_files, files)

    def _copy_to_host(self, teacher: EMANTeacher) -> tuple[dict[str, Tensor], list[str]]:
        """Copies of a teacher's tensors, and the names of floating-point tensors that are not averaged."""
        network = teacher.module
        own = network.state_dict(keep_vars=True)
        parameters = {id(parameter) for parameter in network.parameters()}
        pairs = pair_modules(network, network, teacher.options)
        averaged = {id(pair.teacher) for pair in pairs if pair.rule == "ema"}
        tensors, copied = {}, []
        for full_name, tensor in teacher.state_dict().items():
            name = full_name.removeprefix("module.")
            if name == full_name or not isinstance(tensor, Tensor):  # a count of the teacher, or an object
                continue
            is_averaged = id(own[name]) in averaged
            if not is_averaged and (tensor.is_floating_point() or tensor.is_complex()):
                copied.append(name)
            whole = tensor.full_tensor() if is_distributed(tensor) else tensor
            if self._is_writer:
                narrow = is_averaged and id(own[name]) in parameters and not tensor.is_complex()
                tensors[name] = _copy(whole, self._dtype if narrow else tensor.dtype)
        return tensors, copied

    def _write_files(self, files: list[tuple[Path, dict[str, Tensor], dict[str, str]]]) -> None:
        for path, tensors, metadata in files:
            write_network(path, tensors, metadata)
        if self._keep is not None:
            networks = self._stored()
            while len(steps := sorted({network.step for network in networks})) > self._keep:
                removed = _choose_superfluous(steps, self._sigma_rels)
                for network in networks:
                    if network.step == removed:
                        network.path.unlink()
                networks = [network for network in networks if network.step != removed]

    def _stored(self) -> list[StoredNetwork]:
        return read_folder(self.folder) if self.folder.is_dir() else []

    def _check_folder(self) -> None:
        """Raises ValueError if the folder is of other momenta or of another network."""
        stored = self._stored()
        own = set(map(_format_length, self._sigma_rels))
        for network in stored:
            if network.sigma_rel is None or _format_length(network.sigma_rel) not in own:
                what = "is no snapshot" if network.sigma_rel is None else f"has sigma_rel {network.sigma_rel}"
                raise ValueError(
                    f"{network.path} {what}, and the teachers have {self._sigma_rels}: use one folder per run"
                )
        state = self._teachers[0].module.state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if isinstance(tensor, Tensor)}
        check_same_network(shapes, stored, "the teachers")


def _length_of(teacher: EMANTeacher) -> float:
    momentum = teacher.momentum
    if isinstance(momentum, CopyFirst) and momentum.updates <= 1:
        momentum = momentum.momentum  # the first momentum of PowerFunction is 0
    if not isinstance(momentum, PowerFunction):
        raise ValueError(
            f"snapshots can be combined only if the momentum is a schedules.PowerFunction, but it is {momentum}: "
            "EMANTeachers(student, momenta=[PowerFunction(0.05), PowerFunction(0.10)])"
        )
    return momentum.sigma_rel


def _format_length(sigma_rel: float) -> str:
    return f"{sigma_rel:g}"


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy in CPU memory; in its own dtype if the other cannot hold it with the usual rounding error,
    because values are too large or most of them too small."""
    tensor = tensor.detach()
    if dtype != tensor.dtype:
        narrow = tensor.to(dtype)
        error = torch.linalg.vector_norm(narrow.float().sub_(tensor))
        if not error > torch.finfo(dtype).eps * torch.linalg.vector_norm(tensor.float()):
            tensor = narrow
    return tensor.to("cpu", copy=True).contiguous()


def _choose_superfluous(steps: Sequence[int], sigma_rels: Sequence[float]) -> int:
    """The step without which the mean error of the profiles at the last step is smallest."""
    gammas, targets = ([PowerFunction(each).gamma for each in lengths] for lengths in (sigma_rels, COMMON_LENGTHS))

    def error_without(step: int) -> float:
        kept = [other for other in steps if other != step]
        stored = [(other, gamma) for other in kept for gamma in gammas]
        _, errors = solve_coefficients(*zip(*stored, strict=True), kept[-1], targets)
        return float(errors.mean())

    return min(steps[:-1], key=error_without)
