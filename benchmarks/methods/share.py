"""The update's share of a step of each method: the published loop and eman_kernels in turn in one process."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from image_data import Images
from method import Method
from tqdm import tqdm
from training import LABELS, make_optimizer, move_batches

sys.path.append(str(Path(__file__).parent.parent))
from timing import machine, pin_the_heap, summarize_shares, synchronized_ms
from updates import LOOP, OURS, published_loop


class Timed:
    """A separate training run with one update method."""

    def __init__(self, make: type[Method], images: Images, loop: bool, device: torch.device, steps: int) -> None:
        torch.manual_seed(0)
        recipe = make.recipes["small"]
        self.device = device
        self.method = make(recipe, images, "eman", steps).to(device, memory_format=torch.channels_last)
        self.optimizer = make_optimizer(recipe, self.method)
        teacher, student = self.method.teacher, self.method.student
        update = torch.no_grad()(published_loop(teacher.module, student, recipe.momentum).update)
        self.update = update if loop else lambda: teacher.update(student)
        self.method.update_teacher = self._update
        self.times: list[tuple[float, float]] = []

    def _update(self) -> None:
        begin = synchronized_ms(self.device)
        self.update()
        self.in_update = synchronized_ms(self.device) - begin

    def step(self, batch: Any) -> None:
        begin = synchronized_ms(self.device)
        loss, _ = self.method(batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.method.after_the_step()
        self.times.append((synchronized_ms(self.device) - begin, self.in_update))


def shares(methods: Iterable[type[Method]], images: Images, rounds: int) -> list[dict[str, Any]]:
    """Rows for tables.step_table: medians and quartiles in milliseconds and percent, not counting augmentation."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pin_the_heap()
    rows = []
    for make in methods:
        recipe, labelled, warm_up = make.recipes["small"], images.labelled(LABELS[0], 0), 3
        ways = {LOOP: Timed(make, images, True, device, rounds), OURS: Timed(make, images, False, device, rounds)}
        loader = make.loader(recipe, images, labelled, 0, None, steps=range(rounds + warm_up))
        bar = tqdm(loader, f"share of {make.__name__}", rounds + warm_up, leave=False, disable=None)
        for batch in move_batches(device, bar):
            for way in ways.values():
                way.step(batch)
        for name, way in ways.items():
            row = {"kind": "step", "method": name, "model": make.__name__, "threads": torch.get_num_threads()}
            rows.append(row | summarize_shares(way.times[warm_up:]) | machine(device))
    return rows
