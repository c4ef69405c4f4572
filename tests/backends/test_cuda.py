"""GPU behavior: streams, devices, synchronization, graphs and launches. Results are compared in test_backends.py."""

import contextlib
import copy
import sys
import types
import warnings

import pytest
import torch
from conftest import assert_same_bits, exchange, forbid_synchronization, lerp, profiled, refused_in_a_capture
from torch import nn

import eman_kernels
from eman_kernels import (
    EMANTeacher,
    EMANTeachers,
    backends,
    ema_update_,
    eman_update_,
    plan_for,
    schedules,
)
from eman_kernels.backends import cuda, interface
from eman_kernels.backends.interface import Arguments, Work
from eman_kernels.plan import cache

SLEEP = 200_000_000  # GPU cycles: about a tenth of a second


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    """The GPU backends that update in one launch."""
    if reason := eman_kernels.available_backends()[request.param]:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


def resnet(depth):
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed: pip install '.[test]'")
    return getattr(torchvision.models, f"resnet{depth}")()


def pair(elements=100_003, device="cuda"):
    return torch.randn(elements, device=device), torch.randn(elements, device=device)


@pytest.mark.cuda
def test_a_whole_resnet_in_one_launch(backend):
    student = resnet(50).cuda()
    teacher = EMANTeacher(student, momentum=0.99, backend=backend)
    student.train()(torch.randn(4, 3, 64, 64, device="cuda"))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))
    before = copy.deepcopy(teacher.module.state_dict())
    teacher.update(student)
    for name, tensor in teacher.module.state_dict().items():
        want = student.state_dict()[name]
        assert_same_bits(tensor, lerp(before[name], want, 0.99) if want.is_floating_point() else want, name)
    assert not plan_for(teacher.module, student).ineligible
    on_device = launches(teacher.update)
    assert len(on_device) == 1, on_device
    assert "eman_update" in on_device[0]


@pytest.mark.cuda
def test_it_runs_on_the_current_stream_without_synchronizing(backend):
    teacher, student = pair()
    ema_update_([teacher], [student], 0.5, backend=backend)
    torch.cuda.synchronize()
    want = lerp(teacher, torch.full_like(student, 7.0), 0.5)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        student.fill_(7.0)
        ema_update_([teacher], [student], 0.5, backend=backend)
        assert not stream.query(), "update() waited for the device"
    stream.synchronize()
    assert_same_bits(teacher, want)


@pytest.mark.cuda
def test_no_synchronizing_call(backend):
    teacher, student = pair()
    ema_update_([teacher], [student], 0.5, backend=backend)
    with forbid_synchronization():
        ema_update_([teacher], [student], 0.5, backend=backend)


@pytest.mark.cuda
def test_a_plan_may_be_deleted_while_its_kernel_is_queued(backend):
    """The table's memory is not reused before the kernel has read it."""
    teacher, student = pair()
    stream = torch.cuda.Stream()
    ema_update_([teacher], [student], 0.0, backend=backend)
    torch.cuda.synchronize()
    student.fill_(3.0)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        ema_update_([teacher], [student], 0.0, backend=backend)
    cache._lists.clear()
    garbage = [torch.full((4, 4), -1, device="cuda") for _ in range(100)]
    stream.synchronize()
    assert (teacher == 3).all()
    assert len(garbage) == 100


@pytest.mark.cuda
def test_a_captured_graph_replays_and_outlives_its_plan(backend):
    student = nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300)).cuda()
    teacher = copy.deepcopy(student).requires_grad_(False)
    eman_update_(teacher, student, 0.5, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        eman_update_(teacher, student, 0.5, backend=backend)
    cache._networks.clear()
    garbage = [torch.full((8, 4), -1, device="cuda") for _ in range(100)]
    for _ in range(3):
        with torch.no_grad():
            student[0].weight.normal_()
        student[1].num_batches_tracked += 1
        want = lerp(teacher[0].weight, student[0].weight.detach(), 0.5)
        graph.replay()
        assert_same_bits(teacher[0].weight, want)
        assert torch.equal(teacher[1].num_batches_tracked, student[1].num_batches_tracked)
    assert len(garbage) == 100


@pytest.mark.cuda
def test_a_captured_graph_replays_with_a_schedule(backend):
    teacher, student = pair()
    momentum = torch.tensor(0.0, device="cuda", dtype=torch.float64)
    ema_update_([teacher], [student], momentum, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema_update_([teacher], [student], momentum, backend=backend)
    for k in range(5):
        student.normal_()
        momentum.fill_(0.5 + k / 20)
        want = lerp(teacher, student, 0.5 + k / 20)
        graph.replay()
        assert_same_bits(teacher, want, f"replay {k}")


def launches(run):
    """The names of the operations that ran on the device."""
    torch.cuda.synchronize()
    with profiled(torch.profiler.ProfilerActivity.CUDA) as profile:
        run()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.cuda
@pytest.mark.parametrize(
    "options", [{"rounding": "stochastic", "dtype": torch.bfloat16}, {"cast": torch.bfloat16}, {"nonfinite": "skip"}]
)
def test_one_launch_whatever_the_options(backend, options):
    student = resnet(18).cuda()
    teacher = EMANTeacher(student, momentum=0.9, backend=backend, **options)
    teacher.update(student)
    names = launches(teacher.update)
    assert len(names) == 1, names
    assert "eman_update" in names[0]
    assert not plan_for(teacher.module, student).ineligible


@pytest.mark.cuda
def test_one_launch_for_several_teachers_and_for_a_swap(backend):
    student = resnet(18).cuda()
    teachers = EMANTeachers(student, [0.9, 0.99, 0.999], backend=backend)
    teachers.update(student)
    assert len(launches(teachers.update)) == 1
    with teachers.swapped(0):
        pass  # compiles the Triton kernel
    context = teachers.swapped(0)
    names = [name for name in launches(context.__enter__) if "Memcpy" not in name]  # copies of tables to the device
    assert len(names) == 1, names
    assert "eman_swap" in names[0]
    context.__exit__(None, None, None)


@pytest.mark.cuda
def test_found_inf_causes_no_synchronization(backend):
    student = nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300)).cuda()
    teacher = EMANTeacher(student, schedules.WarmUp(0.9), backend=backend)
    found_inf = torch.zeros((), device="cuda")
    teacher.update(student, found_inf=found_inf)
    with torch.no_grad():
        student[0].weight += 1
    before = teacher.module[0].weight.clone()
    found_inf.fill_(1)
    with forbid_synchronization():
        torch.cuda._sleep(SLEEP)
        teacher.update(student, found_inf=found_inf)
        assert not torch.cuda.current_stream().query(), "update() waited for the device"
    assert torch.equal(teacher.module[0].weight, before)
    assert teacher.step == 1
    found_inf.zero_()
    teacher.update(student, found_inf=found_inf)
    assert teacher.step == 2
    assert not torch.equal(teacher.module[0].weight, before)


@pytest.mark.cuda
def test_a_captured_graph_advances_the_step_the_schedule_and_the_random_bits(backend):
    student = nn.Linear(300, 300).cuda()
    options = {"dtype": torch.bfloat16, "rounding": "stochastic", "backend": backend}
    teacher, twin = (EMANTeacher(student, schedules.WarmUp(0.99), capturable=c, **options) for c in (True, False))
    for each in (teacher, twin):
        each.update(student)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        teacher.update(student)
    for step in range(2, 6):
        with torch.no_grad():
            student.weight.normal_()
        graph.replay()
        twin.update(student)
        assert teacher.step == twin.step == step
        assert_same_bits(teacher.module.weight, twin.module.weight, f"step {step}")


@pytest.mark.cuda
def test_state_that_a_captured_graph_would_freeze_is_refused(backend):
    student = nn.Linear(30, 30).cuda()
    for options in ({"momentum": schedules.WarmUp(0.9)}, {"rounding": "stochastic", "dtype": torch.bfloat16}):
        teacher = EMANTeacher(student, backend=backend, **options)
        teacher.update(student)
        with refused_in_a_capture("capturable=True"):
            teacher.update(student)
    teacher = EMANTeacher(student, momentum=0.9, backend=backend)
    found_inf = torch.zeros((), device="cuda")
    teacher.update(student)
    with refused_in_a_capture("before the capture"):
        teacher.update(student, found_inf=found_inf)


@pytest.mark.cuda
def test_a_momentum_on_another_device_than_the_teacher(backend):
    teacher, student = pair()
    before = teacher.clone()
    with pytest.raises(ValueError, match="the momentum is on cpu and the teacher on cuda:0; move it there"):
        ema_update_([teacher], [student], torch.tensor(0.5), backend=backend)
    assert torch.equal(teacher, before)


@pytest.mark.cuda
def test_a_plan_is_not_made_during_capture(backend):
    teacher, student = pair()
    with refused_in_a_capture("before a CUDA graph is captured"):
        ema_update_([teacher], [student], 0.5, backend=backend)


@pytest.mark.cuda
def test_two_devices_and_the_device_guard(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    on_each = [pair(device=f"cuda:{i}") for i in range(2)]
    want = [lerp(t, s, 0.9) for t, s in on_each]
    torch.cuda.set_device(0)
    ema_update_([t for t, _ in on_each], [s for _, s in on_each], 0.9, backend=backend)
    assert torch.cuda.current_device() == 0
    for (teacher, _), expected in zip(on_each, want, strict=True):
        assert_same_bits(teacher, expected)


@pytest.mark.cuda
def test_both_backends_give_the_same_bits():
    for name in ("cuda", "triton"):
        if reason := eman_kernels.available_backends()[name]:
            pytest.skip(f"backend {name}: {reason}")
    student = resnet(18).cuda()
    teachers = [EMANTeacher(student, 0.9, backend=name) for name in ("cuda", "triton")]
    for _ in range(20):
        with torch.no_grad():
            for tensor in student.state_dict().values():
                tensor.add_(torch.randn_like(tensor) if tensor.is_floating_point() else 1)
        for teacher in teachers:
            teacher.update(student)
    for (name, one), other in zip(
        teachers[0].module.state_dict().items(), teachers[1].module.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


@pytest.mark.cuda
def test_teacher_and_student_on_different_devices():
    teacher, student = torch.randn(100), torch.randn(100, device="cuda")
    want = lerp(teacher, student, 0.9)
    ema_update_([teacher], [student], 0.9)
    assert_same_bits(teacher, want)


@pytest.mark.cuda
def test_moving_to_the_device_after_the_plan_was_made():
    student = nn.Linear(30, 30)
    teacher = EMANTeacher(student, momentum=0.0)
    teacher.update(student)
    student.cuda()
    teacher.cuda()
    teacher.update(student)
    assert torch.equal(teacher.module.weight, student.weight)


@pytest.mark.cuda
def test_a_launch_error_names_the_device(backend):
    if backend != "cuda":
        pytest.skip("only the compiled kernel reports it so")
    from eman_kernels import _C

    with pytest.raises(RuntimeError, match="failed on cuda:99: cudaErrorInvalidDevice"):
        _C.update_cuda(_C.Arguments(0, 0.5), 1, False, 99, 0)
    teacher, student = pair()
    ema_update_([teacher], [student], 0.0, backend=backend)
    assert torch.equal(teacher, student)


# ---------------------------------------------------------------- checks that need no GPU


class PackedArguments:
    def __init__(self, chunks, momentum):
        self.chunks, self.momenta = chunks, [momentum]

    def set_momenta(self, momenta):
        self.momenta = momenta

    def read_momenta(self, *what):
        self.momenta = what


class Calls(list):
    def Arguments(self, chunks, momentum):
        return PackedArguments(chunks, momentum)

    def __getattr__(self, name):
        return lambda *args: self.append(
            (name, *(vars(arg) if isinstance(arg, PackedArguments) else arg for arg in args))
        )


class Table:
    def __init__(self):
        self.streams = []

    def __len__(self):
        return 5

    def data_ptr(self):
        return 4096

    def record_stream(self, stream):
        self.streams.append(stream)


@pytest.mark.parametrize("capturing", [False, True])
def test_what_the_cuda_backend_passes_to_the_extension(monkeypatch, capturing):
    extension, table = Calls(), Table()
    stream = types.SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 76 + index, raising=False)
    monkeypatch.setattr(cuda, "C", extension)
    monkeypatch.setattr(backends.extension, "C", extension)
    monkeypatch.setattr(interface, "_captured_tables", kept := [])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream if device.index == 1 else None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    work, general = (Work(torch.device("cuda", 1), {}, 0, table, n_teachers=n, skip_nonfinite=n > 1) for n in (1, 5))
    for each in (work, general):
        each.streams.clear()  # as if made on another stream
    single, double, found_inf, step, skipped = map(torch.tensor, (0.25, 0.25, 0.0, 7, 0))
    double = double.double()
    cuda.run(work, Arguments([0.25], found_inf), [])
    cuda.run(work, Arguments(single), [])
    cuda.run(work, Arguments(double), [])
    exchange(cuda.swaps(work, []))
    cuda.run(general, Arguments(double, seed=3, step=(1 << 32) + 4), [])
    cuda.run(general, Arguments([0.5] * 5, seed=3, step=step, skipped=skipped), [])
    start = {"chunks": 4096, "stochastic": False, "skip_nonfinite": True, "seed": 3}
    addresses = {"step_address": step.data_ptr(), "skipped": skipped.data_ptr()}
    assert extension == [
        ("update_cuda", {"chunks": 4096, "momenta": [0.25], "found_inf": found_inf.data_ptr()}, 5, False, 1, 77),
        ("update_cuda", {"chunks": 4096, "momenta": (single.data_ptr(), 1, False)}, 5, False, 1, 77),
        ("update_cuda", {"chunks": 4096, "momenta": (double.data_ptr(), 1, True)}, 5, False, 1, 77),
        ("swap_cuda", 4096, 5, 1, 77),
        ("update_cuda", start | {"momenta": (double.data_ptr(), 5, True), "step": 4}, 1, True, 1, 77),
        ("update_cuda", start | {"momenta": [0.5] * 5} | addresses, 1, True, 1, 77),
    ]
    # Recorded once per stream, for the allocator. A captured table is never freed.
    assert table.streams == ([] if capturing else 2 * [stream])
    assert kept == ([table, table] if capturing else [])


def test_the_calls_of_a_step(monkeypatch):
    """Counted by Python's profiler: no stream object is created, and there are no waits or unneeded queries."""
    handle, capturing, table = 0, False, Table()
    extension = types.SimpleNamespace(Arguments=PackedArguments, update_cuda=lambda *args: None)
    monkeypatch.setattr(cuda, "C", extension)
    monkeypatch.setattr(backends.extension, "C", extension)
    monkeypatch.setattr(interface, "_captured_tables", kept := [])
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: handle, raising=False)

    def stream_object(device):
        return handle

    def is_current_stream_capturing():
        return capturing

    monkeypatch.setattr(torch.cuda, "current_stream", stream_object)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", is_current_stream_capturing)
    work = Work(torch.device("cuda", 0), {}, 0, table)  # made on the default stream

    def step():
        seen = []

        def profile(frame, event, argument):
            if event in ("call", "c_call"):
                seen.append(argument.__name__ if event == "c_call" else frame.f_code.co_name)

        arguments = Arguments([0.5])
        before = sys.getprofile()
        sys.setprofile(profile)
        try:
            cuda.run(work, arguments, [])
        finally:
            sys.setprofile(before)
        return len([name for name in seen if name not in ("__getattr__", "append", "setprofile")]), seen

    steady, seen = step()
    assert steady <= 10, seen
    assert not {"stream_object", "record_stream", "is_current_stream_capturing"} & set(seen)
    handle = 5
    first, again = step()[1], step()[1]
    assert {"stream_object", "record_stream", "is_current_stream_capturing"} <= set(first)
    assert not {"stream_object", "record_stream"} & set(again)
    assert table.streams == [5]
    capturing = True
    step(), step()
    assert kept == [table]
    capturing = False
    assert step()[0] == steady


@pytest.mark.parametrize("left_by", [None, KeyError])
def test_forbid_synchronization_restores_the_mode(monkeypatch, left_by):
    """The first call of the mode warns, and warnings are errors; an exception in the body ends the mode too."""
    modes = []

    def set_mode(mode):
        modes.append(mode)
        if len(modes) == 1:
            warnings.warn("Synchronization debug mode is a prototype feature and does not detect all", stacklevel=2)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with contextlib.suppress(KeyError), forbid_synchronization():
        assert modes == ["error"]
        if left_by:
            raise left_by
    assert modes == ["error", "default"]

    def fail(mode):
        modes.append(mode)
        if mode == "error":
            raise RuntimeError

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", fail)
    with pytest.raises(RuntimeError), forbid_synchronization():
        pass
    assert modes[2:] == ["error", "default"]


def test_a_refusal_ends_the_capture(monkeypatch):
    """torch's context is left without an exception and with a graph that is not empty."""
    captured, ended = [], []

    class Graph:
        def __init__(self, graph):
            pass

        def __enter__(self):
            pass

        def __exit__(self, kind, *rest):
            ended.append((kind, len(captured)))

    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "_sleep", captured.append)
    with refused_in_a_capture("before the capture"):
        raise RuntimeError("update() once before the capture")
    with pytest.raises(pytest.fail.Exception), refused_in_a_capture("before"):
        pass
    assert ended[0] == (None, 1)


def test_why_the_cuda_backend_is_unavailable(monkeypatch):
    def reason(**attributes):
        cuda.unavailable.cache_clear()
        with monkeypatch.context() as patch:
            for name, value in ({"C": types.SimpleNamespace(has_cuda=True), "missing": None} | attributes).items():
                patch.setattr(cuda, name, value)
            said = cuda.unavailable("cuda")
        cuda.unavailable.cache_clear()
        return said

    assert "built without CUDA (off: no nvcc)" in reason(
        C=types.SimpleNamespace(has_cuda=False, cuda_status="off: no nvcc")
    )
    assert reason(missing="no compiler") == "no compiler"
    assert "CPU" not in cuda.unavailable("cpu")
    assert "updates CUDA tensors only, not cpu" in cuda.unavailable("cpu")
    if not torch.cuda.is_available():
        assert "torch.cuda.is_available() is False" in reason()

    def no_image(device):
        raise RuntimeError("loading eman_update failed on cuda:0: cudaErrorNoKernelImageForDevice")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    said = reason(C=types.SimpleNamespace(has_cuda=True, cuda_status="on: sm 75 80", check_cuda=no_image))
    assert "cudaErrorNoKernelImageForDevice" in said
    assert "compute capability (7, 0); build with TORCH_CUDA_ARCH_LIST" in said
    assert reason(C=types.SimpleNamespace(has_cuda=True, check_cuda=lambda device: None)) is None
