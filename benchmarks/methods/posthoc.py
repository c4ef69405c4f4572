"""Post-hoc EMA on a run of FixMatch: synthesized averages against averages that were tracked during the same run.

Writes results/posthoc.json, .md and .png: the relative error per tensor by length, number of snapshots and dtype,
beside ema-pytorch's synthesis and averages of the student's checkpoints, and the accuracy of the averaged networks.
"""

import argparse
import copy
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ema_pytorch import PostHocEMA
from evaluation import accuracy, outputs
from fixmatch import FixMatch
from image_data import evaluation_loader, evaluation_transform, load
from matplotlib.figure import Figure
from recipes import FIXMATCH
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from tqdm import tqdm
from training import Run, train

from eman_kernels import EMANTeachers, Snapshots, schedules, synthesize
from eman_kernels.checkpoints.folders import read_folder
from eman_kernels.checkpoints.profiles import solve_coefficients

sys.path.append(str(Path(__file__).parent.parent))
from pictures import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, place
from tables import markdown

LENGTHS = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25)
STORED = (0.05, 0.1)
MOST = 32  # snapshots
COUNTS = (8, 16, 32)
OURS, OURS_32 = "eman_kernels, float16", "eman_kernels, float32"
THEIRS, THEIRS_32 = "ema-pytorch, float16", "ema-pytorch, float32"
THEIRS_10 = "ema-pytorch, update_every=10, float16"
OWN = "the student's checkpoints"


class Tracked(FixMatch):
    """FixMatch that tracks averages of all lengths, and stores two of them in each of the compared ways."""

    folder: Path
    every: int

    def after_the_step(self) -> None:
        super().after_the_step()
        if "others" not in vars(self):  # made late, because training.py changes the memory format of the student
            self.make_others()
        others = self.others
        others["tracked"].update(self.student)
        for name in (OURS, OURS_32):
            others[name].store_if_due()
        for name in (THEIRS, THEIRS_32, THEIRS_10):
            others[name].update()
        step = others["tracked"][0].step
        if step % self.every == 0:
            torch.save(self.student.state_dict(), self.folder / OWN / f"step-{step}.pt")
            for teacher, sigma_rel in zip(others["tracked"], LENGTHS, strict=True):
                others["history"][step, sigma_rel] = copy.deepcopy(teacher.module.state_dict())

    def make_others(self) -> None:
        """In a dict, so that they are no submodules of the method."""
        tracked = EMANTeachers(self.student, [schedules.PowerFunction(sigma_rel) for sigma_rel in LENGTHS])
        stored = [tracked[LENGTHS.index(sigma_rel)] for sigma_rel in STORED]
        dtypes = {OURS: torch.float16, OURS_32: torch.float32}
        others: dict[str, Any] = {"tracked": tracked, "history": {}}
        for name, dtype in dtypes.items():
            others[name] = Snapshots(stored, self.folder / name, every=self.every, dtype=dtype)
        for name, dtype, update_every in (
            (THEIRS, torch.float16, 1),
            (THEIRS_32, torch.float32, 1),
            (THEIRS_10, torch.float16, 10),
        ):
            others[name] = PostHocEMA(
                self.student,
                sigma_rels=STORED,
                update_every=update_every,
                checkpoint_every_num_steps=self.every,
                checkpoint_folder=str(self.folder / name),
                checkpoint_dtype=dtype,
            )
        (self.folder / OWN).mkdir()
        vars(self)["others"] = others


def thin(folder: Path, n: int, every: int) -> Path:
    """A folder with every so many of the 32 snapshots of another one."""
    thinned = folder.with_name(f"{folder.name}, {n}")
    thinned.mkdir()
    for path in folder.iterdir():
        step = int("".join(c if c.isdigit() else " " for c in path.stem).split()[-1])
        if step % (every * MOST // n) == 0:
            os.link(path, thinned / path.name)
    return thinned


def errors_by_tensor(average: dict[str, Tensor], tracked: dict[str, Tensor]) -> Tensor:
    """The relative error of each averaged tensor."""
    names = [name for name, tensor in tracked.items() if tensor.is_floating_point()]
    return torch.stack([(average[name] - tracked[name]).norm() / tracked[name].norm() for name in names])


def syntheses(method: Tracked) -> Iterator[tuple[str, int, float, dict[str, Tensor]]]:
    """Yield (way, number of snapshots, length, average) of all ways."""
    for name in (OURS, OURS_32, OWN, THEIRS, THEIRS_32, THEIRS_10):
        for n in COUNTS:
            folder = thin(method.folder / name, n, method.every)
            if name in (THEIRS, THEIRS_32, THEIRS_10):
                theirs = method.others[name]
                theirs.checkpoint_folder = folder
                for sigma_rel in LENGTHS:
                    yield name, n, sigma_rel, theirs.synthesize_ema_model(sigma_rel=sigma_rel).ema_model.state_dict()
            else:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message=".*do not represent")
                    yield from ((name, n, *pair) for pair in zip(LENGTHS, synthesize(folder, LENGTHS), strict=True))


def measure_errors(method: Tracked, steps: int) -> list[dict[str, Any]]:
    rows = []
    for name, n, sigma_rel, average in syntheses(method):
        tracked = method.others["history"][steps, sigma_rel]
        errors = errors_by_tensor(average, tracked)
        rows.append({"kind": "error", "way": name, "snapshots": n, "sigma_rel": sigma_rel})
        rows[-1] |= {"largest": float(errors.max()), "median": float(errors.median())}
        variances = torch.cat([t for name, t in average.items() if name.endswith("running_var")])
        rows[-1]["zero variances"] = int((variances <= 0).sum())
    for sigma_rel in LENGTHS:  # the nearest average that was stored: what there would be without a synthesis
        tracked = method.others["history"][steps, sigma_rel]
        stored = [errors_by_tensor(method.others["history"][steps, each], tracked) for each in STORED]
        errors = min(stored, key=lambda each: float(each.max()))
        rows.append({"kind": "error", "way": "the nearer stored average", "snapshots": 0, "sigma_rel": sigma_rel})
        rows[-1] |= {"largest": float(errors.max()), "median": float(errors.median())}
    for n in COUNTS:
        networks = read_folder(method.folder / f"{OURS}, {n}")
        gammas = [schedules.PowerFunction(sigma_rel).gamma for sigma_rel in LENGTHS]
        _, profile_errors = solve_coefficients([w.step for w in networks], [w.gamma for w in networks], steps, gammas)
        for sigma_rel, error in zip(LENGTHS, profile_errors.tolist(), strict=True):
            rows.append({"kind": "profile", "snapshots": n, "sigma_rel": sigma_rel, "error": error})
    return rows


def measure_accuracy(method: Tracked, images: Any, recipe: Any, steps: int) -> list[dict[str, Any]]:
    """Of the averages from 16 snapshots in float16 with three kinds of statistics, and of the tracked averages."""
    transform = evaluation_transform(recipe, images)
    batches = list(evaluation_loader(images.train, transform, range(10_000)))
    networks: dict[str, nn.Module] = {"student": method.student, "teacher": method.teacher.module}

    def add(name: str, state: dict[str, Tensor]) -> nn.Module:
        networks[name] = copy.deepcopy(method.student)
        networks[name].load_state_dict(state)
        return networks[name]

    for sigma_rel in LENGTHS:
        add(f"tracked {sigma_rel}", method.others["history"][steps, sigma_rel])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*do not represent")
            average = synthesize(method.folder / f"{OURS}, 16", sigma_rel)
        add(f"synthesized {sigma_rel}", average)
        add(f"student's statistics {sigma_rel}", average | buffers_of(method.student))
        update_bn(batches, add(f"update_bn {sigma_rel}", average))
        add(f"checkpoints {sigma_rel}", synthesize(method.folder / f"{OWN}, 16", sigma_rel))
    test = evaluation_loader(images.test, transform, range(len(images.test_labels)))
    made, labels = outputs(networks, tqdm(test, "evaluation"), torch.device("cpu"))
    return [
        {"kind": "accuracy", "network": name, "accuracy": accuracy(logits, labels)} for name, logits in made.items()
    ]


def buffers_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


# ---------------------------------------------------------------- table and picture


def percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def write_tables(rows: list[dict[str, Any]], record: dict[str, Any]) -> str:
    headers = ["average by", "snapshots", *(f"sigma_rel {sigma_rel}" for sigma_rel in LENGTHS)]
    found = {(r["way"], r["snapshots"], r["sigma_rel"]): r for r in rows if r["kind"] == "error"}
    lines = []
    for way, n in dict.fromkeys((way, n) for way, n, _ in found):
        at = [found[way, n, sigma_rel] for sigma_rel in LENGTHS]
        lines.append([way, n or "", *(f"{percent(r['largest'])} ({percent(r['median'])})" for r in at)])
    profiles = {(r["snapshots"], r["sigma_rel"]): r["error"] for r in rows if r["kind"] == "profile"}
    lines += [["error of the profile", n, *(percent(profiles[n, s]) for s in LENGTHS)] for n in COUNTS]
    zeros = sum(r.get("zero variances", 0) for r in rows if r["kind"] == "error" and r["way"] in (OURS, OURS_32))
    accuracies = {r["network"]: r["accuracy"] for r in rows if r["kind"] == "accuracy"}
    ways = ("tracked", "synthesized", "update_bn", "student's statistics", "checkpoints")
    labels = {
        "tracked": "tracked",
        "synthesized": "synthesized, statistics too",
        "update_bn": "synthesized, statistics by `update_bn` on 10,000 training images",
        "student's statistics": "synthesized weights, the student's statistics",
        "checkpoints": "average of 16 checkpoints of the student",
    }
    of_length = [[labels[way], *(f"{accuracies[f'{way} {s}']:.2f}" for s in LENGTHS)] for way in ways]
    return "\n".join(
        [
            "# Post-hoc EMA on a run of FixMatch",
            "",
            f"{place([record])}. FashionMNIST, small recipe, {record['steps']} updates, resnet10t with BatchNorm "
            f"(0.3 M parameters). Averages at the last update, from averages with sigma_rel {STORED[0]} and "
            f"{STORED[1]} that were stored 8, 16 or 32 times at equal distances. Written by "
            "`benchmarks/methods/posthoc.py`.",
            "",
            "Relative error against the average of that length that was tracked in the same run: the largest of all "
            "tensors, BatchNorm statistics included (in brackets the median).",
            "",
            markdown(lines, headers),
            f"Variances that came out negative and were set to 0, in all syntheses of eman_kernels: {zeros}.",
            "",
            f"Accuracy on the test images, in percent, from 16 snapshots in float16. Student: "
            f"{accuracies['student']:.2f}; FixMatch's own teacher: {accuracies['teacher']:.2f}.",
            "",
            markdown(of_length, ["average", *headers[2:]]),
            "![Error and accuracy by length](posthoc.png)",
            "",
        ]
    )


def draw(rows: list[dict[str, Any]], record: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    styles = {8: ":", 16: "--", 32: "-"}
    for way, color in ((OURS, BLUE), (OURS_32, GREEN), (THEIRS, ORANGE), (THEIRS_10, PINK), (OWN, GREY)):
        for n, style in styles.items():
            errors = [r for r in rows if r["kind"] == "error" and r["way"] == way and r["snapshots"] == n]
            points = [(r["sigma_rel"], 100 * r["largest"]) for r in errors if r["largest"] > 1e-6]  # not exact ones
            left.plot(*zip(*points, strict=True), style, color=color, marker=".")
        left.plot([], [], color=color, label=way)
    nearest = [r for r in rows if r["kind"] == "error" and not r["snapshots"]]
    points = [(r["sigma_rel"], 100 * r["largest"]) for r in nearest if r["largest"]]
    left.plot(*zip(*points, strict=True), color=BLACK, linewidth=0.8, label=nearest[0]["way"])
    for n, style in styles.items():
        left.plot([], [], style, color=GREY, label=f"{n} snapshots")
    left.set(xscale="log", yscale="log", xlabel="sigma_rel", ylabel="largest relative error of a tensor, %")
    left.set_xticks(LENGTHS, LENGTHS)
    left.minorticks_off()
    left.legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    accuracies = {r["network"]: r["accuracy"] for r in rows if r["kind"] == "accuracy"}
    for way, color, label in (
        ("tracked", BLACK, "tracked"),
        ("synthesized", BLUE, "synthesized"),
        ("update_bn", GREEN, "synthesized, then update_bn"),
        ("student's statistics", PINK, "synthesized, the student's statistics"),
        ("checkpoints", GREY, "average of checkpoints"),
    ):
        values = [accuracies[f"{way} {sigma_rel}"] for sigma_rel in LENGTHS]
        right.plot(LENGTHS, values, marker=".", color=color, label=label, linewidth=2.5 if way == "tracked" else 1.2)
    right.axhline(accuracies["student"], color=ORANGE, linewidth=1, label="student")
    right.set(xscale="log", xlabel="sigma_rel", ylabel="test accuracy, %")
    right.set_xticks(LENGTHS, LENGTHS)
    right.minorticks_off()
    right.legend(fontsize=7)
    figure.suptitle(place([record]), fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of FashionMNIST (default: %(default)s)")
    default = Path(__file__).parent.parent / "results"
    parser.add_argument("--out", type=Path, default=default, metavar="FOLDER", help="default: benchmarks/results")
    parser.add_argument("--every", type=int, default=38, help="updates between snapshots (default: %(default)s)")
    parser.add_argument("--draw", action="store_true", help="only write the tables and the picture again")
    arguments = parser.parse_args()
    stem = arguments.out / "posthoc"
    if not arguments.draw:
        images = load("FashionMNIST", arguments.root)
        steps, recipe = arguments.every * MOST, FIXMATCH["small"]
        run = Run("eman", evaluations=1)
        per_pass = FixMatch.steps_per_pass(recipe, images, images.labelled(run.labels, run.seed))
        recipe = replace(recipe, epochs=steps / per_pass)
        made: list[Tracked] = []
        with tempfile.TemporaryDirectory() as folder:

            class Here(Tracked):
                def __init__(self, *arguments: Any) -> None:
                    super().__init__(*arguments)
                    made.append(self)

            Here.folder, Here.every = Path(folder), arguments.every
            Here.__name__ = "FixMatch"
            record = train(Here, recipe, images, run)
            method = made[0].eval()
            for name in (OURS, OURS_32):
                method.others[name].wait()
            rows = measure_errors(method, record["steps"]) + measure_accuracy(method, images, recipe, record["steps"])
        record = {name: value for name, value in record.items() if name not in ("curve", "init", "checkpoint")}
        lines = ",\n".join(json.dumps(row) for row in [{"kind": "run"} | record, *rows])
        stem.with_suffix(".json").write_text(f"[\n{lines}\n]\n")
    record, *rows = json.loads(stem.with_suffix(".json").read_text())
    stem.with_suffix(".md").write_text(write_tables(rows, record))
    draw(rows, record).savefig(stem.with_suffix(".png"), dpi=120)
    print(write_tables(rows, record))


if __name__ == "__main__":
    main()
