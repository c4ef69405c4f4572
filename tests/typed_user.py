"""Example user code that test_types.py runs and checks with mypy and pyright in strict mode."""

from collections.abc import Callable
from dataclasses import replace
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from eman_kernels import (
    EMANTeacher,
    EMANTeachers,
    Momentum,
    Options,
    Rule,
    Snapshots,
    available_backends,
    ema_update_,
    eman_update_,
    load_ema_checkpoint,
    plan_for,
    schedules,
    swapped,
    synthesize,
)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.norm(self.linear(x))
        return output


def falling(step: int | Tensor) -> float | Tensor:
    """A user-defined schedule."""
    return 0.5 / (step + 1)


def evaluate(network: nn.Module) -> float:
    output: Tensor = network(torch.ones(2, 4))
    return output.detach().sum().item()


def train() -> EMANTeacher:
    student = Network()
    teacher = EMANTeacher(
        student,
        momentum=schedules.WarmUp(0.999),
        rules={"*.bias": "copy"},
        buffers="ema",
        backend="reference",
        dtype=torch.float32,
        rounding="nearest",
        cast=torch.bfloat16,
        nonfinite="skip",
        sync_buffers="none",
    )
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    handle = teacher.follow(optimizer, student, every=1, start=0)
    for images in torch.randn(2, 8, 4):
        targets: Tensor = teacher(images)
        loss = nn.functional.mse_loss(student(images), targets.float())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # pyright: ignore[reportUnknownMemberType] (in torch)
        optimizer.step()  # pyright: ignore[reportUnknownMemberType] (in torch)
    handle.remove()
    teacher.update(student, momentum=0.5, found_inf=torch.zeros(()))
    teacher.update()
    teacher.refresh()
    teacher.step += 1
    skipped: int = 0 if teacher.skipped is None else int(teacher.skipped)
    assert skipped == 0
    with teacher.swapped():
        evaluate(student)
    teacher.swap(student)
    teacher.swap_back()
    state = teacher.state_dict()
    names: list[str] = list(state)
    assert "module.linear.weight" in names
    teacher.load_state_dict(state)
    found = load_ema_checkpoint(teacher, state)
    step: int | None = found.step
    assert step == teacher.step
    network: nn.Module = teacher.module
    load_ema_checkpoint(teacher, {"ema": [network.state_dict()]}, key="ema", prefix="0.", index=0, step=step)
    load_ema_checkpoint(network, network)
    evaluate(network)
    return teacher.train().eval()


def train_several() -> list[int]:
    student = Network()
    momenta: list[Momentum] = [0.9, torch.tensor(0.99), schedules.Cosine(0.996, 100), falling]
    teachers = EMANTeachers(student, momenta, rules={"*.bias": "copy"}, dtype=torch.float32, rounding="nearest")
    teachers.update(student, found_inf=None)
    outputs: list[Tensor] = teachers(torch.ones(2, 4))
    assert len(outputs) == len(teachers)
    with teachers.swapped(0, student):
        evaluate(student)
    first: EMANTeacher = teachers[0]
    assert first.step == 1
    return [teacher.step for teacher in teachers]


def choose_the_length_afterwards() -> int:
    student = Network()
    momenta: list[Momentum] = [schedules.PowerFunction(0.05), schedules.PowerFunction.from_gamma(6.94)]
    teachers = EMANTeachers(student, momenta)
    with TemporaryDirectory() as folder:
        with Snapshots(teachers, folder, every=10, dtype=torch.float32, keep=8) as snapshots:
            for _ in range(100):
                teachers.update(student)
                snapshots.store_if_due()
            snapshots.store()
        student.load_state_dict(synthesize(folder, 0.07))
        average: dict[str, Tensor] = synthesize(folder, half_life=20.0, step=100)
        several: list[dict[str, Tensor]] = synthesize(folder, [0.05, 0.1], progress=False)
    return len(average) + len(several)


def misuse(student: nn.Module) -> None:
    """Never called. In strict mode mypy reports a ``type: ignore`` on a line without an error."""
    EMANTeachers(student, [0.9], rounding="up")  # type: ignore[arg-type]
    EMANTeachers(student, [0.9], momentum=0.9)  # type: ignore[call-arg]


def use_functions() -> str:
    teacher, student = Network(), Network()
    rules: dict[str, Rule] = {"linear.*": "skip"}
    eman_update_(teacher, student, 0.99, rules=rules, buffers="copy")
    eman_update_(teacher, student, torch.tensor(0.99), rounding="stochastic", seed=1, step=2)
    ema_update_([torch.zeros(3)], [torch.ones(3)], momentum=0.999, nonfinite="propagate")
    ema_update_(list(teacher.parameters()), list(student.parameters()), 0.999)
    with swapped(teacher, student, buffers="ema"):
        evaluate(student)
    average = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    ema_update_(average, dict(student.named_parameters()), 0.99)
    with swapped(average, dict(student.named_parameters())), swapped([torch.zeros(2)], [torch.ones(2)]):
        evaluate(student)
    follower = EMANTeacher(student)
    follower.options = replace(follower.options, rounding="stochastic")
    follower.buffer_rule, follower.rules = "copy", rules
    assert follower.options == Options(rules, "copy", rounding="stochastic")
    step: int = follower.step
    assert follower.rounding == "stochastic"
    assert step == 0
    plan = plan_for(teacher, student)
    return "" if plan is None else plan.describe()


def use_schedules() -> list[float]:
    all_schedules: list[Callable[[int | Tensor], float | Tensor]] = [
        schedules.Constant(0.9),
        schedules.Cosine(0.996, steps=100),
        schedules.Linear(0.999, 0.9999, steps=100),
        schedules.WarmUp(0.999),
        schedules.ExponentialWarmUp(0.9999, tau=2000),
        schedules.HalfLife(50_000, batch_size=256),
        schedules.PowerFunction(0.05),
        schedules.InverseGamma(0.9999),
        schedules.Average(),
        schedules.Average(0.999),
        schedules.CopyFirst(schedules.WarmUp(0.99)),
        schedules.Offset(schedules.WarmUp(0.99), 1),
    ]
    return [float(schedule(7)) for schedule in all_schedules]


def unavailable_backends() -> dict[str, str]:
    return {name: reason for name, reason in available_backends().items() if reason is not None}


if __name__ == "__main__":
    assert train().step == 5
    assert train_several() == [1, 1, 1, 1]
    assert choose_the_length_afterwards() == 7 + 2
    assert use_functions()
    assert len(use_schedules()) == 12
    assert "reference" not in unavailable_backends()
