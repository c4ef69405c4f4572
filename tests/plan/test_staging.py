"""Teachers in CPU memory of students on another device: a GPU, or second_device.cpp in a separate process."""

import copy
import os
import re
import subprocess
import sys

import pytest
import second_device
import torch
import torch.distributed as dist
from conftest import assert_same_bits, lerp, profiled, refused_in_a_capture
from torch import nn

from eman_kernels import (
    EMANTeacher,
    EMANTeachers,
    available_backends,
    ema_update_,
    eman_update_,
    plan_for,
    swapped,
)
from eman_kernels.plan import cache, staging

LIBRARY = os.environ.get("EMAN_KERNELS_SECOND_DEVICE")
if LIBRARY:
    second_device.load(LIBRARY)


@pytest.fixture(
    params=[pytest.param("cuda", marks=pytest.mark.cuda), *[pytest.param(second_device.NAME)] * bool(LIBRARY)]
)
def device(request):
    return torch.device(request.param, 0)


@pytest.mark.build
@pytest.mark.skipif(LIBRARY is not None, reason="already in the process with the second device")
def test_on_a_second_device(tmp_path):
    """Run the tests below in a process that has the device."""
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=3", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-k", second_device.NAME],
        capture_output=True,
        text=True,
        env=os.environ | {"EMAN_KERNELS_SECOND_DEVICE": str(second_device.compiled(tmp_path))},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert re.search(r"^\d+ passed, (1 skipped, )?\d+ deselected", done.stdout, re.M), done.stdout[-500:]


def network():
    return nn.Sequential(nn.Conv2d(3, 70, 3), nn.BatchNorm2d(70), nn.Flatten(), nn.Linear(70 * 36, 11))


def enqueue_values(student, nans=0):
    """Enqueue new values for the student on its device, without waiting, and return them."""
    values = {}
    for name, tensor in student.state_dict().items():
        new = torch.randn(tensor.shape).to(tensor.dtype) if tensor.is_floating_point() else torch.randint(99, ())
        if nans:
            new.view(-1)[:nans] = torch.nan if tensor.is_floating_point() else 0
        waiting = new.to(tensor.device)
        tensor.copy_(waiting)
        values[name] = new
    return values


OPTIONS = {
    "plain": ({}, torch.float32),
    "mixed": ({"dtype": torch.float32}, torch.bfloat16),
    "half": ({}, torch.float16),
    "stochastic": ({"rounding": "stochastic", "seed": 3}, torch.bfloat16),
    "double": ({}, torch.float64),
    "skip": ({"nonfinite": "skip"}, torch.float32),
    "cast": ({"cast": torch.bfloat16}, torch.float32),
    "copied buffers": ({"buffers": "copy"}, torch.float32),
    "foreach": ({"backend": "foreach"}, torch.float32),
    "reference": ({"backend": "reference"}, torch.float32),
}


@pytest.mark.filterwarnings("ignore:at momentum")
@pytest.mark.parametrize(("options", "dtype"), OPTIONS.values(), ids=OPTIONS)
def test_same_bits_as_for_a_student_on_the_cpu(device, options, dtype):
    on_cpu = network().to(dtype)
    teacher, want = EMANTeacher(on_cpu, 0.9, **options), EMANTeacher(on_cpu, 0.9, **options | {"backend": "reference"})
    student = network().to(dtype).to(device)
    for _ in range(3):
        on_cpu.load_state_dict(enqueue_values(student, nans=1 if "nonfinite" in options else 0))
        teacher.update(student)
        enqueue_values(student)  # too late to be seen by the update
        want.update(on_cpu)
        for name, tensor in want.module.state_dict().items():
            assert_same_bits(teacher.module.state_dict()[name], tensor, name)
    assert teacher.step == 3
    if "nonfinite" in options:
        assert teacher.skipped == want.skipped == 3 * 8  # one per tensor except the counter
    if "cast" in options:
        for own, its in zip(
            teacher.state.refresh_low_precision(teacher.module).copies,
            want.state.refresh_low_precision(want.module).copies,
            strict=True,
        ):
            assert_same_bits(own, its)
    assert not plan_for(teacher.module, student).ineligible


def copies(device, run):
    """The number of copies to the CPU, and of those to pageable memory."""
    if device.type == second_device.NAME:
        before = second_device.copies_to_host()
        run()
        return tuple(now - then for now, then in zip(second_device.copies_to_host(), before, strict=True))
    torch.cuda.synchronize()
    with profiled(torch.profiler.ProfilerActivity.CUDA) as profile:
        run()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if "Memcpy DtoH" in event.name]
    return len(names), len([name for name in names if "Pageable" in name])


def test_one_copy_into_pinned_memory(device):
    teacher, student = EMANTeacher(network(), 0.5), network().to(device)
    teacher.update(student)
    assert copies(device, teacher.update) == (1, 0)
    size = sum(-(-tensor.nbytes // 16) * 16 for tensor in student.state_dict().values())
    last = plan_for(teacher.module, student).describe().splitlines()[-1]
    assert last == f"  from {device}: {size} bytes to pinned CPU memory in 1 transfers per update"


@pytest.mark.parametrize("gathered", [64, 300, 5000, 10_000])
def test_pieces(device, monkeypatch, gathered):
    """Large tensors are copied individually, small ones in groups that fit into the staging buffer."""
    monkeypatch.setattr(staging, "BUFFER_BYTES", gathered)
    student = network().to(device)
    teacher = EMANTeacher(network(), 0.5)
    for _ in range(2):
        before = {name: tensor.clone() for name, tensor in teacher.module.state_dict().items()}
        values = enqueue_values(student)
        teacher.update(student)
        for name, value in values.items():
            want = lerp(before[name], value, 0.5) if value.is_floating_point() else value
            assert_same_bits(teacher.module.state_dict()[name], want, name)
    sizes = [-(-tensor.nbytes // 16) * 16 for tensor in student.state_dict().values()]
    small = sum(size for size in sizes if size <= gathered)
    (its,) = plan_for(teacher.module, student).staging._copies
    assert its._buffer.nbytes == min(small, gathered)
    count, pageable = copies(device, teacher.update)
    large = len([size for size in sizes if size > gathered])
    assert large + -(-small // gathered) <= count <= len(sizes)
    assert pageable == 0


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "not dense", "float8", "complex", "narrower"])
def test_layouts_and_dtypes(device, layout):
    teacher, student = torch.randn(4, 3, 6, 6), torch.randn(4, 3, 6, 6)
    if layout == "channels_last":
        student = student.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        student = student.transpose(0, 3).contiguous().transpose(0, 3)
    elif layout == "not dense":
        teacher = torch.randn(4, 3, 6, 12)[..., ::2]
    elif layout == "float8":
        teacher, student = teacher.to(torch.float8_e4m3fn), student.to(torch.float8_e4m3fn)
    elif layout == "complex":
        teacher, student = torch.complex(teacher, teacher), torch.complex(student, -student)
    else:
        student = student.double()
    want = teacher.clone()
    ema_update_([want], [student], 0.75, backend="reference")
    its = torch.empty_strided(student.shape, student.stride(), dtype=student.dtype, device=device)
    ema_update_([teacher], [its.copy_(student)], 0.75)
    assert torch.equal(teacher.to(torch.complex128), want.to(torch.complex128))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_found_inf_where_the_gradients_are(device, dtype):
    student = network().to(device)
    teacher = EMANTeacher(network(), 0.5)
    kept = {name: tensor.clone() for name, tensor in teacher.module.state_dict().items()}
    for found, step in ((1.0, 0), (torch.nan, 0), (0.0, 1), (3.0, 1)):
        values = enqueue_values(student)
        teacher.update(student, found_inf=torch.tensor([found], dtype=dtype).to(device))
        assert teacher.step == step
        if found == 0:
            kept = {n: lerp(kept[n], v, 0.5) if v.is_floating_point() else v for n, v in values.items()}
        for name, tensor in teacher.module.state_dict().items():
            assert_same_bits(tensor, kept[name], name)
    enqueue_values(student)
    eman_update_(teacher.module, student, 0.5, found_inf=torch.ones((), dtype=dtype).to(device))
    assert_same_bits(teacher.module[0].weight, kept["0.weight"])


def test_a_momentum_on_the_students_device_is_an_error(device):
    teacher, student = torch.zeros(5), torch.ones(5).to(device)
    match = f"the momentum is on {device} and the teacher on cpu; move it there, or give the momentum as a number"
    with pytest.raises(ValueError, match=match):
        ema_update_([teacher], [student], torch.tensor(0.5).to(device))
    assert not teacher.any()
    ema_update_([teacher], [student], torch.tensor(0.5))
    assert (teacher == 0.5).all()


def test_writes_of_another_thread_during_the_wait_are_not_seen(device, monkeypatch):
    student, teacher = network().to(device), EMANTeacher(network(), 0.5)
    want = copy.deepcopy(teacher)
    start, on_cpu = staging._DeviceCopy.start, network()

    def then_enqueue(its, tensors):
        start(its, tensors)
        enqueue_values(student)

    monkeypatch.setattr(staging._DeviceCopy, "start", then_enqueue)
    for _ in range(2):
        on_cpu.load_state_dict(enqueue_values(student))
        teacher.update(student)
        want.update(on_cpu)
        assert_same_bits(teacher.module[3].weight, want.module[3].weight)


def test_several_teachers(device):
    student, on_cpu = network().to(device), network()
    teachers, want = (EMANTeachers(on_cpu, [0.5, 0.9], backend=backend) for backend in (None, "reference"))
    for _ in range(2):
        on_cpu.load_state_dict(enqueue_values(student))
        teachers.update(student)
        want.update(on_cpu)
    for one, other in zip(teachers.state_dict().values(), want.state_dict().values(), strict=True):
        assert_same_bits(one, other)
    assert copies(device, teachers.update) == (1, 0)


@pytest.mark.parametrize("which", [0, 1])
def test_one_teacher_on_the_cpu_and_one_on_the_students_device(device, which):
    student, on_cpu = network().to(device), network()
    teachers, want = (EMANTeachers(on_cpu, [0.5, 0.9]) for _ in range(2))
    teachers[which].to(device)
    on_cpu.load_state_dict(enqueue_values(student))
    teachers.update(student)
    want.update(on_cpu)
    for name, tensor in want.state_dict().items():
        assert_same_bits(teachers.state_dict()[name], tensor, name)
    reasons = set(plan_for(teachers[0].module, student).ineligible.values())
    assert reasons == {"its teachers differ in dtypes, devices or ties"}


def test_a_student_on_two_devices(device):
    student = network()
    teacher = EMANTeacher(network(), 0.5)
    want = copy.deepcopy(teacher)
    student[3].to(device), teacher.module[0].to(device)
    for _ in range(2):
        on_cpu = network()
        on_cpu.load_state_dict(enqueue_values(student))
        teacher.update(student)
        want.update(on_cpu)
        for name, tensor in want.module.state_dict().items():
            assert_same_bits(teacher.module.state_dict()[name], tensor, name)


@pytest.mark.parametrize("backend", [None, "foreach", "reference"])
def test_tied_tensors_are_copied_once(device, backend):
    teacher, student = (nn.Sequential(nn.Linear(9, 9, bias=False), nn.Linear(9, 9, bias=False)) for _ in range(2))
    for net in (student.to(device), teacher):
        net[1].weight = net[0].weight
    want = lerp(teacher[0].weight.detach(), student[0].weight.detach().cpu(), 0.5)
    eman_update_(teacher, student, 0.5, backend=backend)
    assert_same_bits(teacher[0].weight, want)
    assert f"{-(-81 * 4 // 16) * 16} bytes" in plan_for(teacher, student).describe()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_in_cpu_memory(device, dtype):
    """As left by FSDP2's CPUOffloadPolicy: the same mesh and placement, but stored in host memory."""
    tensor = pytest.importorskip("torch.distributed.tensor", reason="torch was built without distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        shards = torch.randn(40, 33), torch.randn(40, 33).to(dtype)
        teacher, student = (tensor.distribute_tensor(shard.clone(), mesh, [tensor.Shard(0)]) for shard in shards)
        student._local_tensor = shards[1].to(device)
        ema_update_([teacher], [student], 0.9)
        version = teacher._version
        assert copies(device, lambda: ema_update_([teacher], [student], 0.9)) == (1, 0)
        assert teacher._version > version
        want = lerp(lerp(*shards, 0.9), shards[1], 0.9)
        assert_same_bits(teacher.to_local(), want)
    finally:
        dist.destroy_process_group()


def test_a_given_module_takes_the_students_values(device):
    student = network().to(device)
    teacher = EMANTeacher(student, 0.5, module=network())
    for name, tensor in student.state_dict().items():
        assert_same_bits(teacher.module.state_dict()[name], tensor, name)


def test_swapped_and_back(device):
    student = network().to(device)
    teacher = EMANTeacher(network(), 0.5)
    teacher.update(student)
    averages, weights = ({n: t.cpu().clone() for n, t in net.state_dict().items()} for net in (teacher.module, student))
    with swapped(teacher.module, student):
        for name, tensor in student.state_dict().items():
            assert_same_bits(tensor, averages[name], name)
    for name, tensor in student.state_dict().items():
        assert_same_bits(tensor, weights[name], name)
    teacher.update(student)


def test_one_plan_keeps_its_staging_buffers(device):
    student = network().to(device)
    teacher = EMANTeacher(network(), 0.5)
    for _ in range(3):
        student[3].weight = nn.Parameter(torch.randn(11, 70 * 36).to(device))
        want = lerp(teacher.module[3].weight, student[3].weight.detach(), 0.5)
        teacher.update(student)
        assert_same_bits(teacher.module[3].weight, want)
    teacher.rounding = "stochastic"
    teacher.update(student)
    plans = cache.cache_of_networks(teacher.module, student).plans
    assert len(plans) == 2
    teacher.to(device)
    teacher.update(student)
    plans = cache.cache_of_networks(teacher.module, student).plans
    assert [cached.plan.staging is not None for cached in plans] == [False, True]


def test_memory_is_pinned_where_possible():
    if LIBRARY is None:
        assert staging._allocate_pinned(100).is_pinned() == torch.cuda.is_available()


def test_a_device_without_streams_uses_the_reference(device, monkeypatch):
    monkeypatch.delattr(getattr(torch, device.type), "Stream")
    teacher, student = nn.Linear(5, 5), nn.Linear(5, 5).to(device)
    want = lerp(teacher.weight.detach(), student.weight.detach().cpu(), 0.5)
    eman_update_(teacher, student, 0.5)
    assert_same_bits(teacher.weight, want)
    assert plan_for(teacher, student).ineligible["weight"] == f"the teacher is on cpu, the student on {device}"


@pytest.mark.cuda
def test_a_captured_graph_is_refused_before_anything_is_written():
    student = network().cuda()
    teacher = EMANTeacher(network(), 0.5)
    kept = teacher.module[0].weight.clone()
    with refused_in_a_capture("a CUDA graph cannot hold the update of a teacher in CPU memory"):
        teacher.update(student)
    assert_same_bits(teacher.module[0].weight, kept)
    teacher.update(student)
    kept = teacher.module[0].weight.clone()
    enqueue_values(student)
    with refused_in_a_capture("a CUDA graph cannot hold the update of a teacher in CPU memory"):
        teacher.update(student)
    assert_same_bits(teacher.module[0].weight, kept)
    assert teacher.step == 1


@pytest.mark.cuda
def test_grad_scaler_and_a_fused_optimizer():
    student = network().cuda()
    teacher = EMANTeacher(network(), 0.5)
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    teacher.follow(optimizer, student)
    scaler = torch.amp.GradScaler("cuda")
    for step, scale in enumerate((1.0, torch.inf, 1.0)):
        loss = student(torch.randn(2, 3, 8, 8, device="cuda")).square().mean() * scale
        scaler.scale(loss).backward()
        scaler.step(optimizer), scaler.update(), optimizer.zero_grad()
        assert teacher.step == (1, 1, 2)[step]
    assert all(tensor.isfinite().all() for tensor in teacher.module.parameters())


def test_the_extension_is_available(device):
    if available_backends()["cpu"] is None:
        teacher, student = nn.Linear(5, 5), nn.Linear(5, 5).to(device)
        eman_update_(teacher, student, 0.5)
        assert [backend.NAME for backend, _ in plan_for(teacher, student).works] == ["cpu"]
