"""Shared test helpers: backends with their devices, tensors surrounded by sentinels, and bit-exact comparison."""

import ctypes
import ctypes.util
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eman_kernels import backends
from eman_kernels.backends.interface import Arguments, Work
from eman_kernels.backends.interrupts import uninterrupted
from eman_kernels.networks.pairing import Pair
from eman_kernels.options import Options
from eman_kernels.plan.plan import Plan
from eman_kernels.plan.work import build_work

# When ultralytics is imported, it looks up hosts and writes its settings.
os.environ.setdefault("YOLO_OFFLINE", "True")
os.environ.setdefault("YOLO_CONFIG_DIR", str(Path(tempfile.gettempdir()) / "eman_kernels_tests"))

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EMA_PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float64, torch.float64),
]
COPY_DTYPES = [torch.bool, torch.int8, torch.bfloat16, torch.int32, torch.float32, torch.int64, torch.float64]
MOMENTA = [0.0, 0.1, 0.5, 0.7, 0.996, 0.9999, 1.0]
CHUNK = 16384
SIZES = [0, 1, 2, 7, 8, 17, 1009, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]
# Exactly representable in every dtype, so casts do not round them.
NUMBERS = [torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1.0, -2.5, 2.0**15, -(2.0**15)]
SENTINEL = 0x5A
# Triton reads the variable at import, so test_triton.py starts a separate process in which every kernel is interpreted.
INTERPRETED = [
    pytest.param(
        ("triton", "cpu"),
        id="triton-interpreted",
        marks=pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy computes, and warns
    )
] * (os.environ.get("TRITON_INTERPRET") == "1")


def _give_the_interpreter_an_exact_fma() -> None:
    """Triton's interpreter rounds the product of an fma before version 3.9: use the C library's fma instead."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    exact = {}
    for function, of_c, dtype in ((libm.fmaf, ctypes.c_float, np.float32), (libm.fma, ctypes.c_double, np.float64)):
        function.restype, function.argtypes = of_c, [of_c] * 3
        exact[np.dtype(dtype)] = np.vectorize(function, otypes=[dtype])

    def create_fma(self, x, y, z):
        return TensorHandle(exact[z.data.dtype](x.data, y.data, z.data), z.dtype.scalar)

    InterpreterBuilder.create_fma = create_fma


if INTERPRETED and backends.triton.explain_missing() is None:
    _give_the_interpreter_an_exact_fma()


@pytest.fixture(
    params=[
        pytest.param(("cuda", "cuda"), id="cuda", marks=pytest.mark.cuda),
        pytest.param(("triton", "cuda"), id="triton", marks=pytest.mark.cuda),
        *INTERPRETED,
        pytest.param(("cpu", "cpu"), id="cpu"),
        pytest.param(("foreach", "cpu"), id="foreach"),
        pytest.param(("foreach", "cuda"), id="foreach-on-cuda", marks=pytest.mark.cuda),
    ]
)
def backend_and_device(request: pytest.FixtureRequest) -> tuple[str, torch.device]:
    """Every backend except the reference, against which the others are compared."""
    backend, device = request.param
    if reason := backends.BACKENDS[backend].unavailable(device):
        pytest.skip(f"backend {backend}: {reason}")
    return backend, torch.device(device, 0) if device == "cuda" else torch.device(device)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU; torch sees none")


# The slowest files, which run first: pytest-xdist gives whole files to its workers, and a long one should not be last.
LONGEST = [
    "test_benchmark.py",
    "test_triton.py",
    "test_build.py",
    "test_methods.py",
    "test_traced.py",
    "test_distributed.py",
    "test_host_kernel.py",
    "test_types.py",
    "test_faults.py",
    "test_staging.py",
    "test_backends.py",
    "test_transformers.py",
    "test_timm.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


# Number of slow tests that -m left out. With pytest-xdist each worker counts all of them, and the controller prints it.
_deselected_slow = pytest.StashKey[int]()


def pytest_deselected(items: Iterable[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow"):
            stash = item.config.stash
            stash[_deselected_slow] = stash.get(_deselected_slow, 0) + 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["deselected_slow"] = session.config.stash.get(_deselected_slow, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    if output := getattr(node, "workeroutput", None):  # a crashed worker has none
        node.config.stash[_deselected_slow] = output.get("deselected_slow", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    number = config.stash.get(_deselected_slow, 0)
    if number and "slow" in config.option.markexpr:  # not for -k alone
        terminalreporter.write_line(f"{number} slow tests were left out; `make test-all` runs them too")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@contextmanager
def forbid_synchronization() -> Iterator[None]:
    """Make device synchronizations raise within the context; the previous mode is restored on any exit."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature")  # shown only once
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def refused_in_a_capture(match: str) -> Iterator[None]:
    """Expect a RuntimeError from the body during a CUDA graph capture, and end the capture normally.

    If the exception left torch's context before anything was captured, torch would warn about an empty graph and
    leave the capture stream as the current stream.
    """
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.cuda._sleep(1)
        with pytest.raises(RuntimeError, match=match):
            yield


def profiled(*activities: torch.profiler.ProfilerActivity, **options: bool) -> torch.profiler.profile:
    """torch's profiler. Without acc_events some torch versions warn that events are discarded."""
    return torch.profiler.profile(activities=activities, acc_events=True, **options)


def tensors_of(pairs: list[Pair]) -> list[Tensor]:
    """All tensors that a plan of these pairs uses."""
    return [tensor for p in pairs for tensor in (p.teacher, p.student, p.cast) if tensor is not None]


def planned(pairs: list[Pair], backend: str | None = None, **options: str) -> tuple[Plan, list[Tensor]]:
    """A plan, and the tensors that it runs on."""
    tensors = tensors_of(pairs)
    return Plan(pairs, tensors, Options(backend=backend, **options)), tensors


def update(backend: str, pairs: list[Pair], arguments: Arguments, **options: str) -> Plan:
    """Update all pairs with this backend, without falling back to the reference."""
    made, tensors = planned(pairs, backend, **options)
    assert not made.ineligible
    for chosen, work in made.works:
        chosen.run(work, arguments, tensors)
    return made


def work_of(pairs: list[Pair], backend: ModuleType, device: torch.device, n_teachers: int = 1, **options: str) -> Work:
    """The work of one backend for these pairs, eligible or not."""
    index_of = {id(t): i for i, t in enumerate(tensors_of(pairs))}
    return build_work(device, backend, pairs, index_of, n_teachers, Options(**options))


def exchange(pieces: Iterable[tuple[Callable[[], object], ...]]) -> None:
    """Run the calls that a backend's `swaps` returns."""
    for calls in pieces:
        uninterrupted(*calls)


def examples(text: str) -> list[str]:
    """The fenced Python blocks of a page or a docstring."""
    return re.findall(r"```python\n(.*?)```", text, re.S)


def adapters_example(library: str) -> str:
    """The example for this library in docs/adapters.md."""
    page = (ROOT / "docs" / "adapters.md").read_text()
    (example,) = [block for block in examples(page) if f"eman_kernels.integrations.{library} import" in block]
    return example


class Guarded:
    """A tensor of numel elements with sentinels on both sides, `offset` elements past a 64-byte boundary."""

    def __init__(self, values: Tensor, offset: int = 0, device: torch.device | str = "cpu") -> None:
        size = values.element_size()
        self.begin = 64 + offset * size
        self.end = self.begin + values.numel() * size
        self.memory = torch.full((self.end + 64,), SENTINEL, dtype=torch.uint8, device=device)
        assert self.memory.data_ptr() % 64 == 0
        self.tensor = self.memory[self.begin : self.end].view(values.dtype)
        self.tensor.copy_(values)

    def intact(self) -> bool:
        outside = torch.cat([self.memory[: self.begin], self.memory[self.end :]])
        return bool((outside == SENTINEL).all())


def values(numel: int, dtype: torch.dtype) -> Tensor:
    """Random values across the dtype's range of magnitudes, including special values."""
    if dtype == torch.bool:
        return torch.rand(numel) < 0.5
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        return torch.randint(info.min, info.max, (numel,), dtype=dtype)
    random = (torch.randn(numel, dtype=torch.float64) * 10.0 ** torch.randint(-8, 5, (numel,))).to(dtype)
    finfo = torch.finfo(dtype)
    special = [0.0, -0.0, 1.0, finfo.max, finfo.min, finfo.tiny, finfo.smallest_normal / 4, float("inf"), float("nan")]
    where = torch.randperm(numel)[: numel // 20]
    random[where] = torch.tensor(special, dtype=dtype)[torch.randint(len(special), (len(where),))]
    return random


def every_number(teacher_dtype: torch.dtype, student_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every number paired with every other, repeated to fill both vector loops and their scalar tails; also
    the largest finite numbers, whose difference overflows."""
    largest = torch.finfo(teacher_dtype).max
    teacher = torch.tensor([*NUMBERS, largest, -largest], dtype=torch.float64).to(teacher_dtype)
    student = torch.tensor(NUMBERS, dtype=torch.float64).to(student_dtype)
    pairs = torch.cartesian_prod(torch.arange(len(teacher)), torch.arange(len(student)))
    teacher, student = teacher[pairs[:, 0]], student[pairs[:, 1]]
    # With equal dtypes, student and teacher can both hold the largest number.
    if teacher_dtype == student_dtype:
        ends = torch.tensor([largest, -largest, -largest, largest], dtype=teacher_dtype)
        teacher, student = torch.cat([teacher, ends]), torch.cat([student, ends.roll(1)])
    return teacher.repeat(11), student.repeat(11)


def lerp(teacher: Tensor, student: Tensor, momentum: float) -> Tensor:
    """torch.lerp on the CPU, in the precision and with the rounding that the update guarantees. At momentum 0 and 1
    and where both are equal there is no arithmetic, because it would turn non-finite values into NaNs."""
    teacher, student = teacher.cpu(), student.cpu()
    if momentum in (0, 1):
        return teacher.clone() if momentum else student.to(teacher.dtype, copy=True)
    wide = torch.float64 if torch.float64 in (teacher.dtype, student.dtype) else torch.float32
    average = torch.lerp(teacher.to(wide), student.to(wide), 1.0 - momentum).to(teacher.dtype)
    equal = teacher.to(wide) == student.to(wide)
    average[equal] = teacher[equal]
    return average


TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


def skip_unless_selectable(dtype: torch.dtype) -> None:
    """The reference needs torch.where and the tests need indexing; torch 2.6 and 2.7 lack one or both for float8."""
    one, true = torch.zeros(1, dtype=dtype), torch.ones(1, dtype=torch.bool)
    try:
        torch.where(true, one, one)[true]
    except RuntimeError as error:
        pytest.skip(f"this torch: {error}")


def is_interpreted(backend: str, device: torch.device) -> bool:
    return backend == "triton" and device.type == "cpu"


def comparison(backend: str, device: torch.device, *dtypes: torch.dtype) -> Callable[..., None]:
    """The comparison to use for results of this backend in these dtypes."""
    inexact = is_interpreted(backend, device) and torch.bfloat16 in dtypes
    return assert_close_when_interpreted if inexact else assert_same_bits


def assert_close_when_interpreted(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal within 1 ulp, or both tiny: Triton's interpreter truncates float32 to bfloat16 and flushes subnormals."""
    actual, expected = actual.cpu(), expected.cpu()
    as_integer = {2: torch.int16, 4: torch.int32}[expected.element_size()]
    # Neighboring floats of the same sign are neighboring integers; infinity follows the largest float.
    bits = [tensor.view(as_integer).long() for tensor in (actual, expected)]
    near = ((bits[0] - bits[1]).abs() <= 1) | (actual.isnan() & expected.isnan())
    tiny = 2 * torch.finfo(torch.bfloat16).smallest_normal
    near |= (actual.abs() <= tiny) & (expected.abs() <= tiny)
    assert near.all(), f"{what}: {actual[~near][:3]}, expected {expected[~near][:3]}"


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal values. All NaNs are equal, and 0 equals -0: torch.lerp's vector and scalar code differ in these."""
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    assert actual.dtype == expected.dtype
    same = actual == expected
    if actual.is_floating_point():
        same |= actual.isnan() & expected.isnan()
    if not same.all():
        at = (~same).nonzero()[0]
        raise AssertionError(
            f"{what}: {int((~same).sum())} of {same.numel()} differ, first at {at.tolist()}: "
            f"{actual[tuple(at)].item()!r}, expected {expected[tuple(at)].item()!r}"
        )
