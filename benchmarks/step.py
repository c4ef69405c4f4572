"""The update's share of a FixMatch-like training step: student forward and backward, teacher forward, SGD, update.

The step is written as a user would write it, once per update method. The batch is small on a CPU (8 labeled and 56
unlabeled images) and FixMatch's own on a GPU (64 and 448): the smaller the batch, the larger the share.
"""

import copy
from collections.abc import Callable

import torch
from models import pair
from timing import MOMENTUM, summarize_shares, synchronized_ms
from torch import nn
from tqdm import tqdm
from updates import LOOP, published_loop

from eman_kernels import EMANTeacher

UNLABELLED = 7  # per labeled image
Way = tuple[Callable, Callable[[], object]]  # the teacher's forward pass and its update


def published(student: nn.Module) -> Way:
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    update = torch.no_grad()(published_loop(teacher, student, MOMENTUM).update)
    return teacher, update


def timm_v3(student: nn.Module) -> Way:
    from timm.utils import ModelEmaV3

    teacher = ModelEmaV3(student, decay=MOMENTUM)
    return teacher, lambda: teacher.update(student)


def ours(student: nn.Module) -> Way:
    teacher = EMANTeacher(student, MOMENTUM)
    return teacher, lambda: teacher.update(student)


WAYS = {LOOP: published, "timm ModelEmaV3": timm_v3, "eman_kernels": ours}


def training_steps(device: torch.device, rounds: int, labelled: int) -> list[dict]:
    """One row per update method: milliseconds of the step and of the update, and the share, with quartiles."""
    _, student = pair("wide_resnet28_2", "float32", device)
    student.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.03, momentum=0.9, nesterov=True)
    ways, rows = {}, []
    for name, make in WAYS.items():
        try:
            ways[name] = make(student)
        except ImportError as error:
            rows.append({"kind": "step", "method": name, "why_not": str(error)})
    classes = torch.randint(10, (labelled,), device=device)
    images = torch.randn(labelled * (1 + UNLABELLED), 3, 32, 32, device=device)
    weak = torch.randn(labelled * UNLABELLED, 3, 32, 32, device=device)

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for k in tqdm(range(rounds + 2), desc="training steps", leave=False, disable=None):
        for name, (teacher, update) in ways.items():
            begin = synchronized_ms(device)
            with torch.no_grad():
                confidence, pseudo = teacher(weak).softmax(dim=1).max(dim=1)
            logits = student(images)
            loss = nn.functional.cross_entropy(logits[:labelled], classes)
            unlabelled = nn.functional.cross_entropy(logits[labelled:], pseudo, reduction="none")
            loss = loss + (unlabelled * (confidence > 0.95)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            before = synchronized_ms(device)
            update()
            end = synchronized_ms(device)
            if k >= 2:
                times[name].append((end - begin, end - before))
    for name, samples in times.items():
        row = {"kind": "step", "method": name, "model": "wide_resnet28_2", "dtype": "float32", "labelled": labelled}
        row |= {"threads": torch.get_num_threads(), "unlabelled": labelled * UNLABELLED}
        rows.append(row | summarize_shares(samples))
    return rows
