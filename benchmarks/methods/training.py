"""The training loop of all three methods, on one process or on several (started by torchrun)."""

import argparse
import functools
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
import torch.distributed as dist
from evaluation import accuracy, distance, linear_probe, nearest_neighbors, outputs
from image_data import Images, evaluation_loader, evaluation_transform, load
from lightly.utils.lars import LARS
from method import KINDS, Kind, Method
from recipes import Recipe
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

sys.path.append(str(Path(__file__).parent.parent))
from timing import machine

LABELS = (13, 128)  # per class: 1 % and 10 % of ImageNet
QUICK_TEST = 2000  # test images of the intermediate evaluations; the last one uses all


@dataclass(frozen=True)
class Run:
    """Settings of a run that are not hyperparameters of the recipe."""

    teacher: Kind
    labels: int = LABELS[0]  # per class
    seed: int = 0
    classes_a_batch: int | None = None  # classes per batch of unlabeled images; default: no restriction
    init: Path | None = None  # checkpoint whose student provides the initial backbone
    checkpoint: Path | None = None  # written at each evaluation; if it exists, the run resumes from it
    evaluations: int = 8
    workers: int = 0


@dataclass(frozen=True)
class Process:
    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def processes() -> Iterator[Process]:
    """Set up torch.distributed if torchrun started this process; yield its rank, world size and device."""
    if "WORLD_SIZE" not in os.environ:
        yield Process()
        return
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Process(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def train(make: type[Method], recipe: Any, images: Images, run: Run, process: Process | None = None) -> dict[str, Any]:
    """Train one student and its teacher; return a record with settings, results and curves.

    Raises:
        ValueError: the batch cannot be divided among the processes, or the checkpoint belongs to another run.
        FloatingPointError: the loss is not finite.
    """
    process = process or Process()
    if recipe.batch % process.world:
        raise ValueError(f"a batch of {recipe.batch} cannot be divided among {process.world} processes")
    begin = time.perf_counter()
    torch.manual_seed(run.seed)
    labelled = images.labelled(run.labels, run.seed)
    per_pass = make.steps_per_pass(recipe, images, labelled)
    steps = max(1, round(recipe.epochs * per_pass))
    method = make(recipe, images, run.teacher, steps)
    if run.init is not None:
        start_from(run.init, method)
    method.to(process.device, memory_format=torch.channels_last)
    learner: nn.Module = method
    if process.world > 1:
        if make.sync_batchnorm and run.teacher != "eman" and process.device.type == "cuda":
            method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
        # DDP's broadcast of buffers gives all processes the running statistics of rank 0, for student and teacher.
        learner = DistributedDataParallel(method)
    optimizer = make_optimizer(recipe, method)
    scheduler = LambdaLR(optimizer, lambda step: learning_rate(recipe, step, steps, per_pass))
    state = State(make, recipe, run, method, optimizer, scheduler)
    first, curve = state.load()
    parts = {"rank": process.rank, "world": process.world, "workers": run.workers}
    loader = functools.partial(make.loader, recipe, images, labelled, run.seed, run.classes_a_batch, **parts)
    method.train()
    if first == 0:
        calibrate(method, move_batches(process.device, loader(steps=range(-recipe.calibration, 0))))
    evaluate = Evaluation(recipe, images, run, process.device)
    due = {round(steps * (k + 1) / run.evaluations) for k in range(run.evaluations)}
    sums: Counter[str] = Counter()
    quiet = None if process.rank == 0 else True  # None: no bar if stderr is not a terminal
    bar = tqdm(loader(steps=range(first, steps)), make.__name__, steps, initial=first, leave=False, disable=quiet)
    for step, batch in enumerate(move_batches(process.device, bar), start=first + 1):
        loss, metrics = learner(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        method.after_the_step()
        for name, (amount, total) in {"loss": (loss.detach(), 1), **metrics}.items():
            sums[name] += amount
            sums[f"{name} of"] += total
        if step in due:
            point = {"step": step} | averages(sums, process)
            if not math.isfinite(point["loss"]):
                raise FloatingPointError(f"the loss is {point['loss']} in the steps before {step}: lower --lr")
            sums.clear()
            if process.rank == 0:
                curve.append(point | evaluate(method, final=step == steps))
                bar.set_postfix({name: f"{value:.3g}" for name, value in curve[-1].items() if name != "step"})
                state.save(step, curve)
            # A resumed run sets this seed as well, so its random numbers are the same from here on.
            torch.manual_seed(run.seed + step)
    settings = {
        "method": make.__name__.lower(),
        "data": images.name,
        **asdict(run),
        "world": process.world,
        "recipe": asdict(recipe),
    }
    last = {name: value for name, value in (curve[-1] if curve else {}).items() if name != "step"}
    told = {"steps": steps, "seconds": time.perf_counter() - begin, "threads": torch.get_num_threads()}
    return settings | {"results": last, "curve": curve} | told | machine(process.device)


def move_batches(device: torch.device, batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        yield tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), batch)


@torch.no_grad()
def calibrate(method: Method, batches: Iterable[Any]) -> None:
    """Run the student on some batches before the first step, then reset the teacher to a copy of the student.

    Running statistics start at (0, 1), and a teacher with a high momentum stays near these values for long. A low
    initial momentum (schedules.WarmUp) does not work for MoCo: keys that move as fast as the queries collapse.
    """
    for batch in batches:
        method(batch)
    if method.teacher is not None:
        method.teacher.module.load_state_dict(method.student.state_dict())
        method.teacher.step = 0


def make_optimizer(recipe: Recipe, method: Method) -> torch.optim.Optimizer:
    if recipe.optimizer == "lars":
        # LARS adapts only parameters with weight decay, so not BatchNorm and biases.
        return LARS(param_groups_weight_decay(method, recipe.weight_decay), lr=recipe.lr, momentum=0.9)
    learned = [parameter for parameter in method.parameters() if parameter.requires_grad]
    return torch.optim.SGD(learned, recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)


def learning_rate(recipe: Recipe, step: int, steps: int, per_pass: float) -> float:
    """The learning rate of a step (counted from 0), as a fraction of the recipe's."""
    warmup = recipe.warmup * per_pass
    if step < warmup:
        return (step + 1) / warmup if step + 1 < warmup else 1.0
    if recipe.decay == "steps":
        return 0.1 ** ((step >= 0.6 * steps) + (step >= 0.8 * steps))
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def averages(sums: Counter[str], process: Process) -> dict[str, float]:
    """Average the metrics over the steps since the last evaluation and all processes; omit those with a count of 0."""
    names = sorted(name for name in sums if not name.endswith(" of"))
    amounts = [sums[key] for name in names for key in (name, f"{name} of")]
    values = torch.stack([torch.as_tensor(a, dtype=torch.float32, device=process.device) for a in amounts])
    if process.world > 1:
        dist.all_reduce(values)
    return {name: amount / of for name, (amount, of) in zip(names, values.view(-1, 2).tolist(), strict=True) if of}


class Evaluation:
    """Evaluates student and teacher on the test images: accuracy of a classifier, or quality of the features."""

    def __init__(self, recipe: Recipe, images: Images, run: Run, device: torch.device) -> None:
        self.images, self.run, self.device, self.transform = images, run, device, evaluation_transform(recipe, images)

    def __call__(self, method: Method, final: bool) -> dict[str, float]:
        count = len(self.images.test_labels)
        # A random subset, because the images of a folder are sorted by class.
        chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        test = self._loader(self.images.test, chosen if final else chosen[:QUICK_TEST])
        networks = method.backbones()
        made, labels = outputs(networks, test, self.device)
        found = {}
        if method.teacher is not None:
            found |= distance(method.teacher, method.student)
        if method.classifies:
            return found | {f"{name}_accuracy": accuracy(logits, labels) for name, logits in made.items()}
        labels_of_train = self.images.train_labels
        most = min(LABELS[-1], int(labels_of_train[labels_of_train >= 0].bincount().min()))
        banks = {n: self.images.labelled(n, self.run.seed) for n in ([*LABELS[:-1], most] if final else [most])}
        for per_class, bank in banks.items():
            features, bank_labels = outputs(networks, self._loader(self.images.train, bank), self.device)
            for name in networks:
                against = (features[name], bank_labels, made[name], labels, self.images.classes)
                if per_class == most:
                    found[f"{name}_knn"] = nearest_neighbors(*against)
                if final:
                    found[f"{name}_probe_{per_class}"] = linear_probe(*against)
        return found

    def _loader(self, images: Any, chosen: Any) -> Any:
        return evaluation_loader(images, self.transform, [int(k) for k in chosen], self.run.workers)


@dataclass
class State:
    """The contents of a checkpoint."""

    make: type[Method]
    recipe: Recipe
    run: Run
    method: Method
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR

    def _of(self) -> dict[str, Any]:
        told = asdict(replace(self.run, checkpoint=None, workers=0)) | asdict(self.recipe)
        return {name: str(value) for name, value in told.items()} | {"method": self.make.__name__}

    def load(self) -> tuple[int, list[dict[str, float]]]:
        """Load the checkpoint, if any; return the number of finished steps and the curve."""
        path = self.run.checkpoint
        if path is None or not path.exists():
            return 0, []
        state = torch.load(path, map_location="cpu", weights_only=True)
        now = self._of()
        if differs := [f"{name} was {was}" for name, was in state["of"].items() if now.get(name) != was]:
            raise ValueError(f"{path} is a checkpoint of another run: {', '.join(differs)}")
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.manual_seed(self.run.seed + state["step"])
        return state["step"], state["curve"]

    def save(self, step: int, curve: list[dict[str, float]]) -> None:
        if self.run.checkpoint is None:
            return
        state = {name: getattr(self, name).state_dict() for name in ("method", "optimizer", "scheduler")}
        new = self.run.checkpoint.with_suffix(".new")
        torch.save(state | {"of": self._of(), "step": step, "curve": curve}, new)
        new.replace(self.run.checkpoint)  # atomically: an interruption leaves the old or the new checkpoint


def start_from(path: Path, method: Method) -> None:
    """Load the backbones of student and teacher from the student of a checkpoint; classifiers and heads stay new."""
    trained = torch.load(path, map_location="cpu", weights_only=True)["method"]
    prefix = "student.0." if any(name.startswith("student.0.") for name in trained) else "student."
    backbone = {name.removeprefix(prefix): tensor for name, tensor in trained.items() if name.startswith(prefix)}
    for net in method.backbones().values():
        mine = net.state_dict()
        missing = [name for name in mine if name not in backbone and not name.startswith("fc.")]
        if missing:
            raise ValueError(f"{path} has no {', '.join(missing[:3])}: the checkpoint is of another network")
        net.load_state_dict({name: backbone[name] for name in mine if not name.startswith("fc.")}, strict=False)


# ---------------------------------------------------------------- the command line


def parser_of(make: type[Method]) -> argparse.ArgumentParser:
    doc = sys.modules[make.__module__].__doc__ or ""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None)
    parser.add_argument("--teacher", choices=KINDS, default="eman", help="kind of teacher (default: %(default)s)")
    parser.add_argument("--recipe", choices=list(make.recipes), default="small", help="default: %(default)s")
    parser.add_argument("--data", default="FashionMNIST", help="a class of torchvision.datasets, or imagefolder")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the data (default: %(default)s)")
    parser.add_argument("--labels", type=int, default=LABELS[0], help="labels per class (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--classes-a-batch", type=int, help="restrict unlabeled batches to this many classes (a stress test)"
    )
    parser.add_argument("--init", type=Path, help="checkpoint whose student provides the initial backbone")
    parser.add_argument(
        "--checkpoint", type=Path, help="written at each evaluation, and resumed from; must be visible to all processes"
    )
    parser.add_argument("--evaluations", type=int, default=8, help="number of evaluations (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="image loading processes per training process")
    parser.add_argument("--out", type=Path, help="file to which the run's record is appended as a line of JSON")
    group = parser.add_argument_group("overrides of the recipe")
    for one in fields(next(iter(make.recipes.values()))):
        choices = get_args(one.type) if get_origin(one.type) is Literal else None
        kind = str if choices else one.type
        group.add_argument(f"--{one.name.replace('_', '-')}", type=kind, choices=choices, default=None)
    return parser


def main(make: type[Method]) -> None:
    """Run a method from the command line: print its results, and append its record to --out."""
    arguments = vars(parser_of(make).parse_args())
    recipe = make.recipes[arguments["recipe"]]
    recipe = replace(recipe, **{f.name: arguments[f.name] for f in fields(recipe) if arguments[f.name] is not None})
    run = Run(**{one.name: arguments[one.name] for one in fields(Run)})
    try:
        images = load(arguments["data"], arguments["root"])
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from None
    with processes() as process:
        record = train(make, recipe, images, run, process)
        if process.rank == 0:
            print(json.dumps(record["results"], indent=2))
            if arguments["out"]:
                append(arguments["out"], record)


def append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record, default=str) + "\n")
