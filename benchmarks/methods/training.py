"""The one training loop of the three methods, on one process or, started by torchrun, on several."""

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
from evaluation import accuracy, distance, linear_probe, nearest_neighbours, outputs
from image_data import Images, in_order, load, plain
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

LABELS = (13, 128)  # a class: 1 % and 10 % of ImageNet's
QUICK_TEST = 2000  # images of the evaluations on the way; the last one takes all


@dataclass(frozen=True)
class Run:
    """What is trained, apart from the recipe's numbers."""

    teacher: Kind
    labels: int = LABELS[0]  # a class
    seed: int = 0
    classes_a_batch: int | None = None  # of the unlabelled images; default: as they come
    init: Path | None = None  # a checkpoint whose student's backbone is the start
    checkpoint: Path | None = None  # written at each evaluation; where it exists already, the run goes on from there
    evaluations: int = 8
    workers: int = 0


@dataclass(frozen=True)
class Process:
    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def processes() -> Iterator[Process]:
    """This process among those that torchrun has started; alone without it."""
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
    """Train one student and its teacher; returns the record of it: settings, results and the curves.

    Raises:
        ValueError: the batch cannot be divided among the processes, or the checkpoint is of another run.
        FloatingPointError: the loss is not finite.
    """
    process = process or Process()
    if recipe.batch % process.world:
        raise ValueError(f"a batch of {recipe.batch} cannot be divided among {process.world} processes")
    begin = time.perf_counter()
    torch.manual_seed(run.seed)
    labelled = images.labelled(run.labels, run.seed)
    a_pass = make.steps_a_pass(recipe, images, labelled)
    steps = max(1, round(recipe.epochs * a_pass))
    method = make(recipe, images, run.teacher, steps)
    if run.init is not None:
        start_from(run.init, method)
    method.to(process.device, memory_format=torch.channels_last)
    learner: nn.Module = method
    if process.world > 1:
        if make.sync_batchnorm and run.teacher != "eman" and process.device.type == "cuda":
            method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
        # Its broadcast of buffers gives all processes the first one's running statistics, and those of its teacher.
        learner = DistributedDataParallel(method)
    optimizer = make_optimizer(recipe, method)
    scheduler = LambdaLR(optimizer, lambda step: learning_rate(recipe, step, steps, a_pass))
    state = State(make, recipe, run, method, optimizer, scheduler)
    first, curve = state.load()
    parts = {"rank": process.rank, "world": process.world, "workers": run.workers}
    loader = functools.partial(make.loader, recipe, images, labelled, run.seed, run.classes_a_batch, **parts)
    method.train()
    if first == 0:
        calibrate(method, on(process.device, loader(steps=range(-recipe.calibration, 0))))
    evaluate = Evaluation(recipe, images, run, process.device)
    due = {round(steps * (k + 1) / run.evaluations) for k in range(run.evaluations)}
    sums: Counter[str] = Counter()
    quiet = None if process.rank == 0 else True  # None: where nobody looks
    bar = tqdm(loader(steps=range(first, steps)), make.__name__, steps, initial=first, leave=False, disable=quiet)
    for step, batch in enumerate(on(process.device, bar), start=first + 1):
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
            # So that what is random from here on is the same after a resumption.
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


def on(device: torch.device, batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        yield tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), batch)


@torch.no_grad()
def calibrate(method: Method, batches: Iterable[Any]) -> None:
    """Let the student see some batches before the first step, and the teacher begin as a copy of what it then is.

    Running statistics begin at (0, 1). A teacher with a high momentum keeps them there for long, and one with a low
    momentum at first (schedules.WarmUp) is no good to MoCo: keys that move as fast as the queries collapse.
    """
    for batch in batches:
        method(batch)
    if method.teacher is not None:
        method.teacher.module.load_state_dict(method.student.state_dict())
        method.teacher.step = 0


def make_optimizer(recipe: Recipe, method: Method) -> torch.optim.Optimizer:
    if recipe.optimizer == "lars":
        # LARS adapts what has a weight decay: neither BatchNorm nor biases.
        return LARS(param_groups_weight_decay(method, recipe.weight_decay), lr=recipe.lr, momentum=0.9)
    learned = [parameter for parameter in method.parameters() if parameter.requires_grad]
    return torch.optim.SGD(learned, recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)


def learning_rate(recipe: Recipe, step: int, steps: int, a_pass: float) -> float:
    """As a share of the recipe's, for the step counted from 0."""
    warmup = recipe.warmup * a_pass
    if step < warmup:
        return (step + 1) / warmup if step + 1 < warmup else 1.0
    if recipe.decay == "steps":
        return 0.1 ** ((step >= 0.6 * steps) + (step >= 0.8 * steps))
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def averages(sums: Counter[str], process: Process) -> dict[str, float]:
    """Over all steps since the last evaluation, and all processes; without what there was nothing of."""
    names = sorted(name for name in sums if not name.endswith(" of"))
    amounts = [sums[key] for name in names for key in (name, f"{name} of")]
    values = torch.stack([torch.as_tensor(a, dtype=torch.float32, device=process.device) for a in amounts])
    if process.world > 1:
        dist.all_reduce(values)
    return {name: amount / of for name, (amount, of) in zip(names, values.view(-1, 2).tolist(), strict=True) if of}


class Evaluation:
    """The student and its teacher on the test images: a classifier's accuracy, or what its features are worth."""

    def __init__(self, recipe: Recipe, images: Images, run: Run, device: torch.device) -> None:
        self.images, self.run, self.device, self.transform = images, run, device, plain(recipe, images)

    def __call__(self, method: Method, final: bool) -> dict[str, float]:
        count = len(self.images.test_labels)
        # Not the first ones: a folder's images are sorted by class.
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
                    found[f"{name}_knn"] = nearest_neighbours(*against)
                if final:
                    found[f"{name}_probe_{per_class}"] = linear_probe(*against)
        return found

    def _loader(self, images: Any, chosen: Any) -> Any:
        return in_order(images, self.transform, [int(k) for k in chosen], self.run.workers)


@dataclass
class State:
    """What a checkpoint holds."""

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
        """The steps that were done, and the curve."""
        path = self.run.checkpoint
        if path is None or not path.exists():
            return 0, []
        state = torch.load(path, map_location="cpu", weights_only=True)
        now = self._of()
        if differs := [f"{name} was {was}" for name, was in state["of"].items() if now.get(name) != was]:
            raise ValueError(f"{path} is the checkpoint of another run: {', '.join(differs)}")
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
        new.replace(self.run.checkpoint)  # at once: an interruption leaves the old one or the new one


def start_from(path: Path, method: Method) -> None:
    """Take the student's backbone, and its teacher's, from a checkpoint's student; classifiers and heads stay new."""
    trained = torch.load(path, map_location="cpu", weights_only=True)["method"]
    prefix = "student.0." if any(name.startswith("student.0.") for name in trained) else "student."
    backbone = {name.removeprefix(prefix): tensor for name, tensor in trained.items() if name.startswith(prefix)}
    for net in method.backbones().values():
        mine = net.state_dict()
        missing = [name for name in mine if name not in backbone and not name.startswith("fc.")]
        if missing:
            raise ValueError(f"{path} has no {', '.join(missing[:3])}: it is of another network")
        net.load_state_dict({name: backbone[name] for name in mine if not name.startswith("fc.")}, strict=False)


# ---------------------------------------------------------------- the command line


def parser_of(make: type[Method]) -> argparse.ArgumentParser:
    doc = sys.modules[make.__module__].__doc__ or ""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None)
    parser.add_argument("--teacher", choices=KINDS, default="eman", help="whose outputs teach (default: %(default)s)")
    parser.add_argument("--recipe", choices=list(make.recipes), default="small", help="default: %(default)s")
    parser.add_argument("--data", default="FashionMNIST", help="of torchvision.datasets, or imagefolder")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where the data is (default: %(default)s)")
    parser.add_argument("--labels", type=int, default=LABELS[0], help="a class (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--classes-a-batch", type=int, help="unlabelled batches of so many classes: a stress")
    parser.add_argument("--init", type=Path, help="checkpoint whose student's backbone is the start")
    parser.add_argument(
        "--checkpoint", type=Path, help="written at each evaluation, and gone on from; all processes must see it"
    )
    parser.add_argument("--evaluations", type=int, default=8, help="during the run (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images, for each that trains")
    parser.add_argument("--out", type=Path, help="file that gets the run's record as one more line of JSON")
    group = parser.add_argument_group("instead of the recipe's")
    for one in fields(next(iter(make.recipes.values()))):
        choices = get_args(one.type) if get_origin(one.type) is Literal else None
        kind = str if choices else one.type
        group.add_argument(f"--{one.name.replace('_', '-')}", type=kind, choices=choices, default=None)
    return parser


def main(make: type[Method]) -> None:
    """Run a method from the command line; its record goes to --out, its results to the screen."""
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
