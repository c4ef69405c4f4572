"""The update's share of a training step, for each way to update a teacher.

- wide_resnet28_2: a FixMatch-like step: teacher forward on weakly augmented images, student forward and backward on
  labeled and strongly augmented ones, SGD, update. FixMatch's batch is 64 and 448 images.
- resnet50: supervised, with bfloat16 autocast and channels_last; 128 images, the batch per GPU of torchvision's recipe
  with an average of the weights. The teacher only follows.

The steps are written as a user would write them. The smaller the batch, the larger the share.
"""

import copy
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from checks import describe_error
from models import pair
from timing import MOMENTUM, quartiles, summarize_shares, synchronized_ms
from torch import Tensor, nn
from tqdm import tqdm
from updates import LOOP, OURS, compiled_lerp_loop, published_loop

from eman_kernels import EMANTeacher, plan_for

UNLABELLED = 7  # images per labeled one in FixMatch
WARM_UP = 2
IN_A_ROW = 4  # steps of a round that run back to back on a GPU; the first one is not measured
Work = Callable[[], object]
Way = tuple[Callable, Work]  # the teacher's forward pass and its update
Loss = Callable[[Callable], Tensor]  # of the student, given the teacher's forward pass


# ---------------------------------------------------------------- ways to update a teacher


def loop_of(make: Callable, student: nn.Module) -> Way:
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    return teacher, torch.no_grad()(make(teacher, student, MOMENTUM).update)


def published(student: nn.Module) -> Way:
    return loop_of(published_loop, student)


def compiled(student: nn.Module) -> Way:
    return loop_of(compiled_lerp_loop, student)


def timm_v3(student: nn.Module) -> Way:
    from timm.utils import ModelEmaV3

    teacher = ModelEmaV3(student, decay=MOMENTUM)
    return teacher, lambda: teacher.update(student)


def ours(student: nn.Module) -> Way:
    teacher = EMANTeacher(student, MOMENTUM)
    return teacher, lambda: teacher.update(student)


def ours_in_reverse(student: nn.Module) -> Way:
    """With the full chunks in reverse order: the optimizer's last writes may still be in the L2 cache."""
    teacher, update = ours(student)
    update()
    reverse_full_chunks(teacher, student)
    return teacher, update


def reverse_full_chunks(teacher: EMANTeacher, student: nn.Module) -> None:
    for _, work in plan_for(teacher.module, student).works:
        numel = work.table[:, 3] & 0xFFFFFFFF  # csrc/chunk.h
        n_full = int((numel == numel[0]).sum())  # they come first
        work.table[:n_full] = work.table[:n_full].flip(0)


WAYS = {LOOP: published, "timm ModelEmaV3": timm_v3, "torch.compile of the lerp loop": compiled, OURS: ours}
REVERSED = {f"{OURS}, full chunks in reverse order": ours_in_reverse}  # a candidate, for a GPU


# ---------------------------------------------------------------- training steps


def fixmatch(device: torch.device, labelled: int) -> tuple[nn.Module, Loss]:
    _, student = pair("wide_resnet28_2", "float32", device)
    classes = torch.randint(10, (labelled,), device=device)
    images = torch.randn(labelled * (1 + UNLABELLED), 3, 32, 32, device=device)
    weak = torch.randn(labelled * UNLABELLED, 3, 32, 32, device=device)

    def loss(teacher: Callable) -> Tensor:
        with torch.no_grad():
            confidence, pseudo = teacher(weak).softmax(dim=1).max(dim=1)
        logits = student(images)
        unlabelled = nn.functional.cross_entropy(logits[labelled:], pseudo, reduction="none")
        return nn.functional.cross_entropy(logits[:labelled], classes) + (unlabelled * (confidence > 0.95)).mean()

    return student, loss


def supervised(device: torch.device, labelled: int) -> tuple[nn.Module, Loss]:
    _, student = pair("resnet50", "float32", device)
    student.to(memory_format=torch.channels_last)
    side = 224 if device.type == "cuda" else 32
    images = torch.randn(labelled, 3, side, side, device=device).to(memory_format=torch.channels_last)
    classes = torch.randint(1000, (labelled,), device=device)

    def loss(teacher: Callable) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return nn.functional.cross_entropy(student(images), classes)

    return student, loss


class Step(NamedTuple):
    make: Callable[[torch.device, int], tuple[nn.Module, Loss]]
    dtype: str
    labelled: int  # labeled images per step on a GPU
    unlabelled: int  # per labeled one


STEPS = {
    "wide_resnet28_2": Step(fixmatch, "float32", 64, UNLABELLED),
    "resnet50": Step(supervised, "bfloat16 autocast", 128, 0),
}


# ---------------------------------------------------------------- measuring


def time_on_host(train: Work, update: Work, device: torch.device) -> tuple[float, float]:
    """Milliseconds of a step with its update, and of the update. The device is idle before both, so that the host does
    not wait for it."""
    times = []
    for work in (train, update):
        begin = synchronized_ms(device)
        work()
        times.append(1e3 * time.perf_counter() - begin)
    return sum(times), times[1]


def time_on_device(train: Work, update: Work, device: torch.device) -> list[tuple[float, float]]:
    """The same for steps that run back to back, as in training, by the device's clock. If the host falls behind, the
    device's waits for it count. In the first step it starts behind, so that step is left out."""
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(3)] for _ in range(IN_A_ROW)]
    for begin, before, end in marks:
        begin.record()
        train()
        before.record()
        update()
        end.record()
    torch.cuda.synchronize(device)
    return [(begin.elapsed_time(end), before.elapsed_time(end)) for begin, before, end in marks[1:]]


def training_steps(
    model: str, device: torch.device, rounds: int, labelled: int, ways: dict[str, Callable[[nn.Module], Way]] = WAYS
) -> list[dict]:
    """One row per way: milliseconds of the step and of the update, and the share, with quartiles.

    On CUDA these are the device's times, and host_step_ms and host_update_ms the host's. first_update_ms is the host's
    time for the first update, with compilation or planning.
    """
    step = STEPS[model]
    student, loss_of = step.make(device, labelled)
    student.train()
    optimizer = torch.optim.SGD(
        student.parameters(), lr=0.03, momentum=0.9, nesterov=True, fused=device.type == "cuda" or None
    )

    def train(teacher: Callable) -> None:
        loss = loss_of(teacher)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    rows: dict[str, dict] = {}
    parts: dict[str, tuple[Work, Work]] = {}
    for name, make in ways.items():
        rows[name] = {"kind": "step", "method": name, "model": model, "dtype": step.dtype, "labelled": labelled}
        rows[name] |= {"unlabelled": labelled * step.unlabelled, "threads": torch.get_num_threads()}
        try:
            teacher, update = make(student)
            begin = synchronized_ms(device)
            update()
            rows[name]["first_update_ms"] = synchronized_ms(device) - begin
        except Exception as error:  # a library that is missing, or a compiler that fails
            rows[name]["why_not"] = describe_error(error)
            continue
        parts[name] = (lambda teacher=teacher: train(teacher)), update
    on_host: dict[str, list[tuple[float, float]]] = {name: [] for name in parts}
    on_device: dict[str, list[tuple[float, float]]] = {name: [] for name in parts}
    for k in tqdm(range(rounds + WARM_UP), desc=f"training steps of {model}", leave=False, disable=None):
        for name, works in parts.items():
            host = time_on_host(*works, device)
            taken = time_on_device(*works, device) if device.type == "cuda" else []
            if k >= WARM_UP:
                on_host[name].append(host)
                on_device[name] += taken
    for name, host in on_host.items():
        rows[name] |= summarize_shares(on_device[name] or host)
        if on_device[name]:
            for key, samples in zip(("host_step_ms", "host_update_ms"), zip(*host, strict=True), strict=True):
                rows[name][key] = quartiles(list(samples))[1]
    return list(rows.values())
