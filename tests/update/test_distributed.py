"""Several processes: synchronized statistics, shards updated in one launch, and errors raised in every process."""

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import TORCH, assert_same_bits, lerp
from processes import World, why_none
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from eman_kernels import EMANTeacher, EMANTeachers, available_backends, ema_update_, eman_update_, plan_for

if not dist.is_available():
    pytest.skip("torch was built without distributed", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
MOMENTUM = 0.9
trains_shards = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this torch does not run on CPUs"
)
trains_shards_with_replicas = pytest.mark.skipif(
    TORCH < (2, 8), reason="FSDP2 of torch 2.6 and 2.7 reduces over replicas with an operation that gloo lacks"
)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, int], World]]:
    """Processes by backend and number, started on first use."""
    started: dict[tuple[str, int], World] = {}

    def world(backend: str, size: int) -> World:
        if reason := why_none(backend, size):
            pytest.skip(reason)
        if (backend, size) not in started:
            started[backend, size] = World(backend, size, tmp_path_factory.mktemp("store"))
        return started[backend, size]

    yield world
    for one in started.values():
        one.stop()


BACKENDS = [pytest.param("gloo", id="gloo"), pytest.param("nccl", id="nccl", marks=pytest.mark.cuda)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.slow)], ids=["2", "4"])
def world(request: pytest.FixtureRequest, worlds: Callable[[str, int], World], backend: str) -> World:
    return worlds(backend, request.param)


# Helpers that run in the processes.


def device() -> torch.device:
    return torch.device("cuda", dist.get_rank()) if dist.get_backend() == "nccl" else torch.device("cpu")


def mesh(*shape: int) -> DeviceMesh:
    shape = shape or (dist.get_world_size(),)
    names = ("replicate", "shard")[-len(shape) :]
    return dist.device_mesh.init_device_mesh(device().type, shape, mesh_dim_names=names)


def on_all(value: Tensor) -> list[Tensor]:
    """The values of all processes."""
    all_of = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(all_of, value.detach().contiguous())
    return all_of


def assert_same_on_all(network: nn.Module) -> None:
    for name, tensor in network.state_dict().items():
        for its in on_all(tensor):
            assert_same_bits(its, tensor, name)


def net(width: int = 8) -> nn.Sequential:
    torch.manual_seed(1)
    layers = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3), nn.BatchNorm2d(width)
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(5)).to(device())


def trained(student: nn.Module, steps: int = 6, channels: int = 3) -> Iterator[int]:
    """Steps of training, on data that differs between processes."""
    torch.manual_seed(100 + dist.get_rank())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for step in range(steps):
        images = (1 + dist.get_rank()) * torch.randn(8, channels, 8, 8, device=device()) + dist.get_rank()
        student(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step


def materialised(width: int = 8) -> nn.Sequential:
    network = net(width)
    network.eval()(torch.zeros(1, 3, 8, 8, device=device()))
    return network.train()


def ddp(network: nn.Module) -> DistributedDataParallel:
    return DistributedDataParallel(network, device_ids=[dist.get_rank()] if device().type == "cuda" else None)


# DDP


def follow_statistics(how: str, rounding: str, dtype: torch.dtype | None) -> float:
    student = ddp(materialised())
    teacher = EMANTeacher(student, MOMENTUM, sync_buffers=how, rounding=rounding, dtype=dtype)
    expected = copy.deepcopy(dict(teacher.module.state_dict()))
    gap = 0.0
    for step in trained(student):
        with CommDebugMode() as collectives:
            teacher.update(student)
        # In the first update the processes compare their buffers.
        assert step == 0 or collectives.get_total_counts() == (0 if how == "none" else 1)
        its = student.module.state_dict()
        for name in its:
            if "running" in name:
                all_of = on_all(its[name])
                gap = max(gap, max(float((one - all_of[0]).abs().max()) for one in all_of))
                if how == "mean":
                    its[name] = torch.stack(all_of).sum(0) / len(all_of)
                elif how == "rank0":
                    its[name] = all_of[0]
            if rounding == "nearest":
                follows = its[name].is_floating_point()
                expected[name] = lerp(expected[name], its[name], MOMENTUM) if follows else its[name].clone()
                # With four summands, the collective chooses the order.
                near = 1e-6 if how == "mean" and "running" in name and dist.get_world_size() > 2 else 0
                torch.testing.assert_close(
                    teacher.module.state_dict()[name].cpu(), expected[name].cpu(), rtol=near, atol=near
                )
    assert gap > 1e-2, "the students' statistics do not differ, and the test shows nothing"
    assert teacher.step == 6
    if how != "none":
        assert_same_on_all(teacher.module)
    else:
        for name, parameter in teacher.module.named_parameters():
            for its in on_all(parameter):
                assert_same_bits(its, parameter, name)
    one = teacher.module[1].running_mean.float()
    return max(float((other - one).abs().max()) for other in on_all(one))


@pytest.mark.parametrize("how", ["mean", "rank0"])
def test_statistics_are_averaged_over_all_processes(world: World, how: str) -> None:
    assert max(world.run(follow_statistics, how, "nearest", None)) == 0


def test_without_sync_statistics_stay_local(world: World) -> None:
    assert max(world.run(follow_statistics, "none", "nearest", None)) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_draws_the_same_bits_in_each_process(world: World, dtype: torch.dtype) -> None:
    assert max(world.run(follow_statistics, "mean", "stochastic", dtype)) == 0


def mixed_dtypes_and_places() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            rank = dist.get_rank()
            self.weight = nn.Parameter(torch.arange(3.0))
            self.register_buffer("wide", torch.full((3,), 1 + 2.0**-40 * rank, dtype=torch.float64))
            self.register_buffer("narrow", torch.full((5,), 1.0 + rank, dtype=torch.bfloat16))
            self.register_buffer("hidden", torch.full((2, 3), float(rank)).t(), persistent=False)
            self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
            self.register_buffer("count", torch.tensor(7))
            self.register_buffer("tied", self.hidden)
            self.register_buffer("learned", torch.full((2,), float(rank), requires_grad=True))

    student = Network().to(device())
    teacher = EMANTeacher(student, 0.0, sync_buffers="mean")
    teacher.update(student)
    mean = (dist.get_world_size() - 1) / 2
    assert_same_bits(teacher.module.wide, torch.full((3,), 1 + 2.0**-40 * mean, dtype=torch.float64))
    assert_same_bits(teacher.module.narrow, torch.full((5,), 1 + mean, dtype=torch.bfloat16))
    assert_same_bits(teacher.module.hidden, torch.full((3, 2), mean))
    assert_same_bits(teacher.module.mask, student.mask)
    assert int(teacher.module.count) == 7
    assert_same_bits(teacher.module.learned.detach(), torch.full((2,), mean))
    assert not plan_for(teacher.module, student).ineligible
    assert float(student.hidden[0, 0]) == dist.get_rank(), "the student was written"


def test_buffers_of_any_kind(world: World) -> None:
    world.run(mixed_dtypes_and_places)


def several_teachers_and_the_function() -> None:
    student = ddp(materialised())
    teachers = EMANTeachers(student, [0.5, 0.9], sync_buffers="mean")
    plain = copy.deepcopy(student.module)
    for _ in trained(student, 3):
        teachers.update(student)
        eman_update_(plain, student, 0.5, sync_buffers="mean")
    assert_same_on_all(teachers[0].module)
    assert_same_on_all(teachers[1].module)
    for name, tensor in plain.state_dict().items():
        assert_same_bits(teachers[0].module.state_dict()[name], tensor, name)


def test_several_teachers_and_the_function(world: World) -> None:
    world.run(several_teachers_and_the_function)


def statistics_of_a_teacher_in_cpu_memory() -> None:
    student = ddp(materialised())
    teacher = EMANTeacher(student, 0.0, sync_buffers="mean").cpu()
    for _ in trained(student, 2):
        teacher.update(student)
        mean = sum(on_all(student.module[1].running_mean)) / dist.get_world_size()
        torch.testing.assert_close(teacher.module[1].running_mean, mean.cpu())
        assert_same_bits(teacher.module[0].weight, student.module[0].weight)


def test_statistics_of_a_teacher_in_cpu_memory(worlds: Callable[[str, int], World], backend: str) -> None:
    """They are reduced on the students' devices, because NCCL cannot reduce CPU tensors."""
    worlds(backend, 2).run(statistics_of_a_teacher_in_cpu_memory)


def raised(update: Callable[[], object]) -> str | None:
    try:
        update()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def lack_a_tensor(when: int) -> list[str | None]:
    student = materialised()
    teacher = EMANTeacher(student, MOMENTUM, sync_buffers="mean")
    if when:
        teacher.update(student)
    kept = copy.deepcopy(teacher.module.state_dict())
    norm = student[1]
    if dist.get_rank() == 1:
        student[1] = nn.BatchNorm2d(8, track_running_stats=False).to(device())
    first = raised(lambda: teacher.update(student))
    if dist.get_rank() == 1 or device().type == "cpu":
        for name, tensor in teacher.module.state_dict().items():
            assert_same_bits(tensor, kept[name], name)
    student[1] = norm
    teacher.update(student)  # updates work again
    assert_same_on_all(teacher.module)
    return [first, str(teacher.step - when)]


@pytest.mark.parametrize("when", [0, 1], ids=["at first", "later"])
def test_a_process_that_lacks_a_tensor_is_an_error_without_a_hang(world: World, when: int) -> None:
    answers = world.run(lack_a_tensor, when)
    assert "1.running_mean: the student has none" in answers[1][0]
    for rank, (error, _) in enumerate(answers):
        if rank != 1 and (world.device == "cpu" or not when):
            assert error.startswith("RuntimeError: process 1 cannot update its teacher. Nothing was written.")
            assert "1.running_mean: the student has none" in error


def differ_in_shape() -> str | None:
    student = materialised(8 + dist.get_rank())
    return raised(lambda: EMANTeacher(student, MOMENTUM, sync_buffers="mean").update(student))


def test_processes_whose_buffers_differ_are_an_error_in_each(world: World) -> None:
    for error in world.run(differ_in_shape):
        assert "1.running_mean: torch.float32 of shape (8,) in process 0, but not in process 1" in error
        assert "1.running_mean: torch.float32 of shape (9,) in process 1, but not in process 0" in error


def change_alike() -> None:
    student = materialised()
    teacher = EMANTeacher(student, 0.0, sync_buffers="mean")
    teacher.update(student)
    for network in (student, teacher.module):
        network[1] = nn.BatchNorm2d(8).to(device())
        network.append(nn.BatchNorm1d(5).to(device()))
        network[-1].running_mean += dist.get_rank()
    teacher.update(student)
    mean = (dist.get_world_size() - 1) / 2
    assert_same_bits(teacher.module[-1].running_mean, torch.full((5,), mean))


def test_buffers_that_change_equally_in_all_processes(world: World) -> None:
    world.run(change_alike)


def test_sync_buffers_is_checked() -> None:
    with pytest.raises(ValueError, match="unknown sync_buffers='average': it must be one of 'none', 'mean', 'rank0'"):
        EMANTeacher(nn.Linear(2, 2), sync_buffers="average")


def test_the_reason_why_processes_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(*_: object) -> None:
        raise PermissionError("no network here")

    monkeypatch.setattr("processes.socket.socket.bind", bind)
    assert why_none("gloo", 2) == "no port can be opened: no network here"
    if dist.is_nccl_available() and not torch.cuda.is_available():
        assert why_none("nccl", 2) == "needs 2 CUDA GPUs; torch sees 0"


def test_one_process_has_nothing_to_sync() -> None:
    student = nn.BatchNorm1d(3)
    teacher = EMANTeacher(student, 0.5, sync_buffers="mean")
    student.running_mean += 1
    teacher.update(student)
    assert_same_bits(teacher.module.running_mean, torch.full((3,), 0.5))


# FSDP2 and DTensors


def uneven() -> nn.Sequential:
    """Dimensions of 10 and 3, so that some shards are smaller than others, or empty."""
    torch.manual_seed(2)
    network = nn.Sequential(
        nn.Linear(7, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Sequential(nn.Linear(10, 32), nn.ReLU())
    )
    return network.append(nn.Linear(32, 3)).to(device())


def shard(network: nn.Module, on: DeviceMesh | None = None, **options: Any) -> nn.Module:
    on = on or mesh()
    fully_shard(network[3], mesh=on, **options)
    return fully_shard(network, mesh=on, **options)


def sharded_pair(
    momentum: Any = MOMENTUM, on: DeviceMesh | None = None, **options: Any
) -> tuple[nn.Module, EMANTeacher]:
    student, other = uneven(), uneven()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(torch.nan)
    if "dtype" in options:
        other.to(options["dtype"])
    student = shard(student, on)
    return student, EMANTeacher(student, momentum, module=shard(other, on), **options)


def whole(network: nn.Module) -> dict[str, Tensor]:
    state = network.state_dict()
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in state.items()}


def steps(student: nn.Module, n: int = 3) -> Iterator[int]:
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    torch.manual_seed(dist.get_rank())
    for step in range(n):
        student.train()(torch.randn(6, 7, device=device())).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step


def is_whole(network: nn.Module) -> bool:
    return not isinstance(network[0].weight, DTensor)


def follow_sharded(shape: tuple[int, ...], forwards: str) -> None:
    student, teacher = sharded_pair(on=mesh(*shape))
    expected = whole(teacher.module)
    for _ in steps(student):
        inputs = torch.randn(2, 7, device=device())
        if "teacher" in forwards:
            teacher(inputs)
            assert is_whole(teacher.module)
        if "student" in forwards:
            with torch.no_grad():
                student.eval()(inputs)
            assert is_whole(student)
        with CommDebugMode() as collectives:
            teacher.update(student)
        assert collectives.get_total_counts() == 0
        its = whole(student)
        for name, tensor in its.items():
            expected[name] = lerp(expected[name], tensor, MOMENTUM) if tensor.is_floating_point() else tensor
            assert_same_bits(whole(teacher.module)[name], expected[name], name)
    assert teacher.step == 3
    # The forward pass gathers the written values.
    outside = EMANTeacher(uneven())
    outside.module.load_state_dict(expected)
    torch.testing.assert_close(teacher(inputs), outside(inputs))


@trains_shards
@pytest.mark.parametrize("forwards", ["neither", "teacher", "student", "teacher and student"])
def test_the_loop_of_the_readme_with_fsdp(world: World, forwards: str) -> None:
    world.run(follow_sharded, (world.size,), forwards)


def skip_by_the_norm(capturable: bool) -> None:
    """clip_grad_norm_ returns a DTensor, whose local value is only a part of the norm."""
    student, teacher = sharded_pair(0.0, capturable=capturable)
    for step in range(3):
        student.train()(torch.randn(6, 7, device=device())).square().mean().backward()
        if step == 1 and dist.get_rank() == 0:
            student[0].weight.grad.to_local().view(-1)[0] = torch.inf
        norm = nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        assert isinstance(norm, DTensor)
        expected = whole(student if step != 1 else teacher.module)
        teacher.update(student, found_inf=~norm.isfinite())
        for name, tensor in expected.items():
            assert_same_bits(whole(teacher.module)[name], tensor, name)
        student.zero_grad()
    assert int(teacher.step) == 2


@trains_shards
@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_skipped_by_the_norm_of_sharded_gradients(world: World, capturable: bool) -> None:
    world.run(skip_by_the_norm, capturable)


@trains_shards_with_replicas
def test_shards_that_have_replicas(worlds: Callable[[str, int], World], backend: str) -> None:
    worlds(backend, 4).run(follow_sharded, (2, 2), "teacher and student")


def local(network: nn.Module) -> dict[str, Tensor]:
    state = network.state_dict()
    return {name: (t.to_local() if isinstance(t, DTensor) else t).cpu().clone() for name, t in state.items()}


def follow_into_cpu_memory() -> str:
    student = shard(uneven())
    teacher = EMANTeacher(student, MOMENTUM, module=shard(uneven(), offload_policy=CPUOffloadPolicy()))
    for _ in steps(student):
        expected = local(teacher.module)
        teacher.update(student)
        for name, tensor in local(student).items():
            want = lerp(expected[name], tensor, MOMENTUM) if tensor.is_floating_point() else tensor
            assert_same_bits(local(teacher.module)[name], want, name)
    return plan_for(teacher.module, student).describe()


@pytest.mark.cuda
def test_shards_in_cpu_memory(worlds: Callable[[str, int], World]) -> None:
    for description in worlds("nccl", 2).run(follow_into_cpu_memory):
        assert "reference" not in description
        assert "to pinned CPU memory in 1 transfers" in description


def describe_sharded(kernel: str) -> tuple[str, int]:
    student, teacher = sharded_pair(backend=kernel)
    teacher.update(student)
    plan = plan_for(teacher.module, student)
    assert not plan.ineligible
    assert len(plan.works) == 1
    numel = sum(t.to_local().numel() if isinstance(t, DTensor) else t.numel() for t in student.state_dict().values())
    assert plan.works[0][1].numel == numel
    return plan.describe()


@pytest.mark.parametrize("kernel", ["cpu", "foreach"])
def test_shards_take_one_pass_of_the_backend(worlds: Callable[[str, int], World], kernel: str) -> None:
    if kernel == "cpu" and (reason := available_backends()["cpu"]):
        pytest.skip(reason)
    for description in worlds("gloo", 4).run(describe_sharded, kernel):
        assert description.startswith(f"cpu: {kernel} updates")
        assert "reference" not in description


def draw(shape: tuple[int, ...], rounding: str, nonfinite: str) -> None:
    options = {"rounding": rounding, "nonfinite": nonfinite, "dtype": torch.bfloat16}
    student, teacher = sharded_pair(on=mesh(*shape), **options)
    plain = EMANTeacher(uneven(), MOMENTUM, **options)
    for _ in steps(student):
        first = student[3][0].weight.detach().to_local().view(-1)[:1]
        kept = first.clone()
        if nonfinite == "skip":
            first.fill_(torch.nan)
        its = uneven()
        its.load_state_dict(whole(student))
        teacher.update(student)
        plain.update(its)
        first.copy_(kept)
        for name, tensor in whole(teacher.module).items():
            # Only the dimension of 32 is split at a multiple of 8 elements.
            if rounding == "nearest" or name in ("3.0.weight", "3.0.bias", "1.running_mean", "1.running_var"):
                assert_same_bits(tensor, plain.module.state_dict()[name], name)
    if nonfinite == "skip":
        assert int(teacher.skipped) == 3
        assert whole(teacher.module)["3.0.weight"].isfinite().all()


@trains_shards
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_shards_draw_the_bits_of_the_whole(world: World, rounding: str, nonfinite: str) -> None:
    world.run(draw, (world.size,), rounding, nonfinite)


@trains_shards_with_replicas
def test_replicas_of_shards_draw_the_same_bits(worlds: Callable[[str, int], World], backend: str) -> None:
    worlds(backend, 4).run(draw, (2, 2), "stochastic", "propagate")


def test_elements_after_an_empty_shard_draw_the_same_bits(worlds: Callable[[str, int], World]) -> None:
    """Of a dimension of 3, the fourth process has no elements."""
    worlds("gloo", 4).run(draw, (4,), "stochastic", "propagate")


def draw_differently() -> None:
    """Equal elements in different shards are rounded differently."""
    on = mesh()
    student = distribute_tensor(torch.ones(4 * 64, 8, device=device()), on, [Shard(0)])
    for dim in (0, 1):
        student = student.redistribute(placements=[Shard(dim)])
        teacher = distribute_tensor(torch.zeros(4 * 64, 8, dtype=torch.bfloat16, device=device()), on, [Shard(dim)])
        ema_update_([teacher], [student], 0.7, rounding="stochastic", step=1)
        first, *others = on_all(teacher.to_local().float())
        assert all(not torch.equal(first, other) for other in others)


def draw_in_shards_of_shards() -> None:
    torch.manual_seed(0)
    whole_one = torch.randn(4 * 64, 8, device=device())
    on, placements = mesh(2, 2), [Shard(0), Shard(0)]
    student = distribute_tensor(whole_one, on, placements)
    teacher = distribute_tensor(torch.zeros_like(whole_one, dtype=torch.bfloat16), on, placements)
    plain = torch.zeros_like(whole_one, dtype=torch.bfloat16)
    for step in range(1, 4):
        ema_update_([teacher], [student], 0.7, rounding="stochastic", step=step)
        ema_update_([plain], [whole_one], 0.7, rounding="stochastic", step=step)
    assert_same_bits(teacher.full_tensor(), plain)


def test_shards_of_shards_draw_the_bits_of_the_whole(worlds: Callable[[str, int], World], backend: str) -> None:
    worlds(backend, 4).run(draw_in_shards_of_shards)


def test_no_two_shards_draw_the_same_bits(world: World) -> None:
    world.run(draw_differently)


def assert_equal_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, tensor in one.items():
        assert_same_bits(other[name], tensor, name)


def swap_sharded(kind: str) -> None:
    student, teacher = sharded_pair()
    for _ in steps(student):
        teacher.update(student)
    inputs = torch.randn(4, 7, device=device())
    averages, weights = whole(teacher.module), whole(student)
    averaged = teacher(inputs)
    before = student.eval()(inputs)  # now both are unsharded
    with teacher.swapped(student):
        torch.testing.assert_close(student(inputs), averaged)
        assert is_whole(student)
        assert_equal_states(whole(student), averages)
        assert_equal_states(whole(teacher.module), weights)
        # Checkpoints contain the teacher's values.
        own = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in teacher.state_dict().items()}
        assert_equal_states(averages, {name.removeprefix("module."): tensor for name, tensor in own.items()})
        if kind == "an error":
            with pytest.raises(RuntimeError, match="swapped already"):
                teacher.swap(student)
        student(inputs), teacher(inputs)
    torch.testing.assert_close(student(inputs), before)
    assert_equal_states(whole(teacher.module), averages)
    assert_equal_states(whole(student), weights)
    teacher.update(student)


@trains_shards
@pytest.mark.parametrize("kind", ["plainly", "an error"])
def test_shards_are_swapped(world: World, kind: str) -> None:
    world.run(swap_sharded, kind)


def placed(tensor: Tensor, placement: str, on: DeviceMesh) -> Tensor:
    if placement == "plain":
        return tensor
    if placement == "partial":
        return DTensor.from_local(tensor, on, [Partial()])
    return distribute_tensor(tensor, on, [{"0": Shard(0), "1": Shard(1), "replicate": Replicate()}[placement]])


def mismatch(teacher: str, student: str) -> str | None:
    on = mesh()
    networks = []
    for placement in (teacher, student):
        network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(device())
        network[1].weight = nn.Parameter(placed(network[1].weight.detach().fill_(1), placement, on))
        networks.append(network)
    kept = [p.detach().clone() for p in networks[0].parameters()]
    error = raised(lambda: eman_update_(*networks, 0.5))
    for parameter, was in zip(networks[0].parameters(), kept, strict=True):
        now, was = (t.to_local() if isinstance(t, DTensor) else t for t in (parameter.detach(), was))
        assert torch.equal(now, was) == (error is not None or teacher == student)
    return error


@pytest.mark.parametrize(
    ("teacher", "student"), [("0", "1"), ("replicate", "0"), ("plain", "0"), ("0", "plain"), ("replicate", "plain")]
)
def test_mismatched_placements_are_an_error(world: World, teacher: str, student: str) -> None:
    said = {"0": "Shard|S(0)", "1": "Shard|S(1)", "replicate": "R", "plain": "a plain Parameter"}
    for error in world.run(mismatch, teacher, student):
        assert error.startswith("ValueError: ")
        assert "nothing was written.\n  1.weight: the teacher is a" in error
        assert "Shard both alike" in error
        for placement in (teacher, student):
            assert any(word in error for word in said[placement].split("|"))


def test_unreduced_partial_values_are_an_error(worlds: Callable[[str, int], World], backend: str) -> None:
    for error in worlds(backend, 2).run(mismatch, "partial", "partial"):
        assert "1.weight: teacher and student are a DTensor placed P" in error
        assert "redistribute() both to Shard or Replicate" in error


def mismatched_meshes() -> str | None:
    one, other = mesh(2, 2), mesh()
    tensors = [
        distribute_tensor(torch.ones(8, device=device()), one, [Replicate(), Shard(0)]),
        distribute_tensor(torch.zeros(8, device=device()), other, [Shard(0)]),
    ]
    return raised(lambda: ema_update_([tensors[0]], [tensors[1]], 0.5))


def test_mismatched_meshes_are_an_error(worlds: Callable[[str, int], World], backend: str) -> None:
    for error in worlds(backend, 4).run(mismatched_meshes):
        assert "teacher_tensors[0]: the teacher is a DTensor placed" in error
        assert error.count("DeviceMesh") == 2


def new_shards() -> None:
    """A shard with a new address under the same DTensor, one with another placement, and one that is replaced."""
    on = mesh()
    networks = [nn.Linear(8, 8, bias=False).to(device()).requires_grad_(False) for _ in range(2)]
    for network in networks:
        network.weight = nn.Parameter(distribute_tensor(network.weight, on, [Shard(0)]), requires_grad=False)
    teacher, student = networks

    def follows() -> None:
        expected = lerp(teacher.weight.full_tensor(), student.weight.full_tensor(), 0.5)
        eman_update_(teacher, student, 0.5)
        assert_same_bits(teacher.weight.full_tensor(), expected)

    follows()
    plan = plan_for(teacher, student)
    follows()
    assert plan_for(teacher, student) is plan
    old = student.weight._local_tensor
    student.weight._local_tensor = old + 1
    old.fill_(torch.nan)
    follows()
    for network in networks:
        network.weight = nn.Parameter(network.weight.redistribute(placements=[Shard(1)]), requires_grad=False)
    follows()
    for network in networks:
        network.weight.data = distribute_tensor(torch.randn(8, 8, device=device()), on, [Shard(0)])
    follows()


@pytest.mark.parametrize("compiled", [True, False])
def test_changed_shards_are_detected(worlds: Callable[[str, int], World], backend: str, compiled: bool) -> None:
    worlds(backend, 2).run(new_shards if compiled else new_shards_without_extension)


def new_shards_without_extension() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eman_kernels.networks.guards._extension_reads_torch", False)
        new_shards()


def change_the_placement(placement: str) -> str | None:
    """The same memory with another placement, so it is another part of another tensor."""
    on = mesh()
    networks = [nn.Linear(8, 8, bias=False).to(device()) for _ in range(2)]
    for network in networks:
        network.weight = nn.Parameter(distribute_tensor(network.weight.detach(), on, [Shard(0)]))
    teacher, student = networks
    eman_update_(teacher, student, 0.5)
    shard = student.weight.detach().to_local()
    student.weight = nn.Parameter(DTensor.from_local(shard, on, [{"1": Shard(1), "partial": Partial()}[placement]]))
    assert student.weight.to_local().data_ptr() == shard.data_ptr()
    return raised(lambda: eman_update_(teacher, student, 0.5))


@pytest.mark.parametrize("placement", ["1", "partial"])
def test_a_shard_with_another_placement_is_detected(
    worlds: Callable[[str, int], World], backend: str, placement: str
) -> None:
    for error in worlds(backend, 2).run(change_the_placement, placement):
        assert error is not None
        assert "weight: the teacher's shape is (8, 8), the student's" in error


def autograd_detects() -> str | None:
    on = mesh()
    networks = [nn.Linear(8, 8, bias=False).to(device()) for _ in range(2)]
    for network in networks:
        network.weight = nn.Parameter(distribute_tensor(network.weight.detach(), on, [Shard(0)]))
    teacher, student = networks
    inputs = distribute_tensor(torch.randn(2, 8, device=device()), on, [Replicate()]).requires_grad_()
    loss = teacher(inputs).sum()
    with torch.no_grad():
        eman_update_(teacher, student, 0.5)
    return raised(loss.backward)


def test_autograd_detects_that_shards_are_written(worlds: Callable[[str, int], World], backend: str) -> None:
    for error in worlds(backend, 2).run(autograd_detects):
        assert "modified by an inplace operation" in error


def tensor_parallel() -> None:
    torch.manual_seed(3)
    student = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).to(device())
    teacher = EMANTeacher(student, MOMENTUM, cast=torch.bfloat16)
    for network in (student, teacher.module):
        parallelize_module(network, mesh(), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    inputs = torch.randn(4, 8, device=device())
    for _ in range(3):
        student(inputs).square().sum().backward()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter -= 0.1 * parameter.grad
        expected = {n: lerp(t, whole(student)[n], MOMENTUM) for n, t in whole(teacher.module).items()}
        teacher.update(student)
        for name, tensor in whole(teacher.module).items():
            assert_same_bits(tensor, expected[name], name)
        plain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).to(device(), torch.bfloat16)
        plain.load_state_dict(expected)
        output = teacher(inputs)
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output, plain(inputs.bfloat16()), rtol=0.02, atol=0.005)


def test_tensor_parallel_with_a_low_precision_copy(worlds: Callable[[str, int], World], backend: str) -> None:
    worlds(backend, 2).run(tensor_parallel)


def cast_what_fsdp_gathers() -> tuple[str | None, torch.dtype]:
    student = uneven()
    teacher = EMANTeacher(student, cast=torch.bfloat16)
    shard(teacher.module)
    error = raised(lambda: teacher(torch.randn(2, 7, device=device())))
    other = EMANTeacher(nn.Linear(7, 3).to(device()))
    fully_shard(other.module, mesh=mesh(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    return error, other(torch.randn(2, 7, device=device())).dtype


@trains_shards
def test_cast_recommends_mixed_precision_of_fsdp(worlds: Callable[[str, int], World], backend: str) -> None:
    for error, dtype in worlds(backend, 2).run(cast_what_fsdp_gathers):
        assert "mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)" in error
        assert dtype == torch.bfloat16


def update_in_a_graph(what: str) -> None:
    torch._dynamo.reset()
    student, teacher = sharded_pair()

    def update(factor: float) -> Tensor:
        if what == "teacher":
            teacher.update(student)
        elif what == "networks":
            eman_update_(teacher.module, student, MOMENTUM)
        else:
            ema_update_([*teacher.module.parameters()], [*student.parameters()], MOMENTUM)
        return torch.ones(2) * factor

    compiled = torch.compile(update, backend="eager")
    for step in steps(student):
        expected = whole(teacher.module)
        assert torch.equal(compiled(2.0), torch.full((2,), 2.0))
        parameters = dict(student.named_parameters())
        for name, tensor in whole(student).items():
            if name in parameters or what != "lists":
                follows = tensor.is_floating_point()
                expected[name] = lerp(expected[name], tensor, MOMENTUM) if follows else tensor
            assert_same_bits(whole(teacher.module)[name], expected[name], name)
        assert teacher.step == (step + 1 if what == "teacher" else 0)


@trains_shards
@pytest.mark.parametrize("what", ["teacher", "networks", "lists"])
def test_shards_in_a_compiled_graph_break_it(worlds: Callable[[str, int], World], backend: str, what: str) -> None:
    worlds(backend, 2).run(update_in_a_graph, what)


# Checkpoints


def save(folder: Path) -> dict[str, Tensor]:
    # A checkpoint stores the buffers of one process only.
    student, teacher = sharded_pair(sync_buffers="mean")
    for _ in steps(student, 5):
        teacher.update(student)
    teacher(torch.randn(2, 7, device=device()))  # leaves the root unsharded
    dcp.save({"teacher": teacher.state_dict()}, checkpoint_id=folder)
    return {name: tensor.cpu() for name, tensor in whole(teacher.module).items()}


def load(folder: Path) -> tuple[int, dict[str, Tensor]]:
    _, teacher = sharded_pair()
    teacher(torch.randn(2, 7, device=device()))
    state = {"teacher": teacher.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    teacher.load_state_dict(state["teacher"])
    dcp.save({"teacher": teacher.state_dict()}, checkpoint_id=folder)
    return teacher.step, {name: tensor.cpu() for name, tensor in whole(teacher.module).items()}


@trains_shards
@pytest.mark.parametrize("sizes", [(1, 2, 4), (4, 2, 1)], ids=["1 2 4", "4 2 1"])
def test_checkpoints_go_from_one_number_of_processes_to_another(
    worlds: Callable[[str, int], World], backend: str, sizes: tuple[int, ...], tmp_path: Path
) -> None:
    saved, *_ = worlds(backend, sizes[0]).run(save, tmp_path)
    for size in sizes[1:]:
        for step, loaded in worlds(backend, size).run(load, tmp_path):
            assert step == 5
            for name, tensor in saved.items():
                assert_same_bits(loaded[name], tensor, name)


def gather_whole() -> dict[str, Tensor] | None:
    student, teacher = sharded_pair()
    for _ in steps(student):
        teacher.update(student)
    expected = whole(teacher.module)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(teacher.module, options=options)
    if dist.get_rank():
        assert not state
        return None
    for name, tensor in expected.items():
        assert_same_bits(state[name], tensor, name)
    uneven().load_state_dict(state)
    return None


@trains_shards
def test_the_full_state_dict_equals_that_of_a_plain_network(world: World) -> None:
    world.run(gather_whole)


def follow_with_fsdp1(strategy: str, orig: bool) -> list[Any]:
    """Whether the teacher answers like the student, which it copies, after forwards of either; then the error while
    only the student is gathered, and whether an update while both are gathered is kept."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval().to(device())
    options = {"sharding_strategy": getattr(ShardingStrategy, strategy), "use_orig_params": orig}
    options["device_id"] = torch.device(device())
    student, module = (FullyShardedDataParallel(copy.deepcopy(net), **options) for _ in range(2))
    teacher = EMANTeacher(student, 0.0, module=module, keep_values=True)
    inputs, results = torch.ones(2, 4, device=device()), []

    def answers() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return teacher(inputs), student(inputs)

    def change() -> None:
        with FullyShardedDataParallel.summon_full_params(student), torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(1)

    for forward in (False, True, True):
        if forward:
            before, _ = answers()
        change()
        teacher.update(student)
        mine, theirs = answers()
        results.append(torch.equal(mine, theirs) and not (forward and torch.equal(mine, before)))
    gathered = FullyShardedDataParallel.summon_full_params
    with gathered(student):
        results.append(raised(lambda: teacher.update(student)))
    change()
    with gathered(student), gathered(teacher.module):
        teacher.update(student)
    results.append(torch.equal(*answers()))
    with teacher.swapped(student):
        swapped = answers()
    results.append(torch.equal(*swapped) and torch.equal(*answers()))
    return results


@pytest.mark.parametrize("orig", [True, False])
@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP"])
@pytest.mark.filterwarnings("ignore")
def test_fsdp1_reads_what_was_updated(
    worlds: Callable[[str, int], World], backend: str, strategy: str, orig: bool
) -> None:
    """Its root keeps the gathered parameters after a forward."""
    for *followed, error, together, swapped in worlds(backend, 2).run(follow_with_fsdp1, strategy, orig):
        assert followed == [True] * 3
        assert "summon_full_params" in error
        assert "architecture" not in error
        assert (together, swapped) == (True, True)


def share_what_fsdp_gathers() -> str | None:
    return raised(lambda: EMANTeacher(shard(uneven()), module=shard(uneven()), rules={"0.*": "share"}))


def test_share_is_an_error_with_fsdp(worlds: Callable[[str, int], World], backend: str) -> None:
    for error in worlds(backend, 2).run(share_what_fsdp_gathers):
        assert 'give those tensors the rule "skip"' in error
