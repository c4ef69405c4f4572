"""`make methods`: three methods with each teacher, over several seeds; one line of JSON per run, tables and pictures.

An interrupted study resumes: runs whose results are already in --out and --work are not repeated, so a new study needs
new folders. With --out benchmarks/results, the tables in methods/README.md are updated as well.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from byol import Byol
from findings import block, draw, shares_table, summary, text
from fixmatch import FixMatch
from image_data import Images, load
from method import KINDS, Kind
from moco import Moco
from share import shares
from tqdm import tqdm
from training import LABELS, Run, append, train

sys.path.append(str(Path(__file__).parent.parent))
from tables import embed
from timing import write_rows

METHODS = {"fixmatch": FixMatch, "byol": Byol, "moco": Moco}
BENCHMARKS = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Job:
    """One run of the study; `setting` names the change to the small recipe."""

    setting: str
    method: str
    teacher: Kind
    seed: int
    labels: int = LABELS[0]
    changes: dict[str, Any] = field(default_factory=dict)  # to the recipe
    classes_a_batch: int | None = None
    after: str | None = None  # key of the job whose student provides the initial backbone

    @property
    def key(self) -> str:
        return f"{self.setting}, {self.labels} labels, {self.teacher}, seed {self.seed}"


def short_study() -> list[Job]:
    """A study of some minutes: one seed, and too few steps to compare teachers."""
    brief = {"epochs": 0.5}
    jobs = [Job("FixMatch", "fixmatch", teacher, 0, changes=brief) for teacher in KINDS]
    jobs.append(Job("supervised only", "fixmatch", "bn", 0, changes=brief | {"unlabelled_weight": 0.0}))
    for method, name in (("byol", "BYOL"), ("moco", "MoCo")):
        jobs += [Job(name, method, teacher, 0, changes={"epochs": 0.4}) for teacher in KINDS]
    return jobs


def full_study(seeds: int) -> list[Job]:
    """All runs, the most important first, so that an interrupted study has the main part."""
    supervised, published = {"unlabelled_weight": 0.0}, {"threshold": 0.7}
    jobs = []

    def add(
        setting: str, method: str, labels: int = LABELS[0], kinds: Sequence[Kind] = KINDS, first: int = 0, **more: Any
    ) -> None:
        for seed in range(first, first + seeds):
            after = Job("MoCo", "moco", "eman", seed).key if "MoCo-EMAN" in setting else None
            jobs.extend(Job(setting, method, kind, seed, labels, after=after, **more) for kind in kinds)

    for labels in LABELS:
        add("FixMatch", "fixmatch", labels)
        add("supervised only", "fixmatch", labels, ["bn"], changes=supervised)
        if labels == LABELS[0]:
            add("MoCo", "moco")
            add("BYOL", "byol")
    add("FixMatch, batches of two classes", "fixmatch", classes_a_batch=2)
    add("FixMatch from MoCo-EMAN", "fixmatch")
    add("supervised only from MoCo-EMAN", "fixmatch", kinds=["bn"], changes=supervised)
    add("FixMatch, threshold 0.7", "fixmatch", changes=published)
    # Added after the other results were known, so with seeds that had not been used.
    add("FixMatch, other seeds", "fixmatch", kinds=["eman"], first=200)
    add("FixMatch, calibrated, other seeds", "fixmatch", kinds=["eman"], first=200, changes={"calibration": 50})
    return jobs


def checkpoint_of(key: str, folder: Path) -> Path:
    return folder / ("".join(c if c.isalnum() else "-" for c in key) + ".pt")


_images: Images | None = None


def init_worker(data: str, root: Path) -> None:
    """Set up a process of the pool: one thread, and the data set loaded once."""
    global _images
    torch.set_num_threads(1)
    _images = load(data, root)


def run_job(job: Job, folder: Path) -> dict[str, Any]:
    make = METHODS[job.method]
    run = Run(
        job.teacher,
        job.labels,
        job.seed,
        job.classes_a_batch,
        init=checkpoint_of(job.after, folder) if job.after else None,
        checkpoint=checkpoint_of(job.key, folder),
    )
    record = train(make, replace(make.recipes["small"], **job.changes), _images, run)
    return {"key": job.key, "setting": job.setting} | record


def run_jobs(jobs: list[Job], results: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the jobs that have no record yet; return the records of all jobs."""
    records = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {record["key"] for record in records}
    folder = arguments.work
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TQDM_DISABLE"] = "1"  # in the worker processes; this process shows one bar for all runs
    bar = tqdm(
        total=len(jobs), desc="runs", initial=len(jobs) - sum(job.key not in done for job in jobs), disable=False
    )
    pool = ProcessPoolExecutor(
        arguments.jobs, get_context("spawn"), initializer=init_worker, initargs=(arguments.data, arguments.root)
    )
    with pool:
        waiting, running = [job for job in jobs if job.key not in done], set()
        while waiting or running:
            ready = [job for job in waiting if job.after is None or job.after in done]
            waiting = [job for job in waiting if job not in ready]
            running |= {pool.submit(run_job, job, folder) for job in ready}
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                record = future.result()
                append(results, record)
                records.append(record)
                done.add(record["key"])
                bar.set_postfix_str(record["key"])
                bar.update()
    wanted = {job.key for job in jobs}
    return [record for record in records if record["key"] in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="some minutes instead of hours (`make methods` uses this)")
    parser.add_argument("--seeds", type=int, default=5, help="default: %(default)s")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="parallel runs (default: number of cores, %(default)s)"
    )
    parser.add_argument("--data", default="FashionMNIST", help="a class of torchvision.datasets, or imagefolder")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the data (default: %(default)s)")
    parser.add_argument(
        "--work", type=Path, default=Path("build/methods"), help="folder for checkpoints (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/methods"), help="folder for the results (default: %(default)s)"
    )
    arguments = parser.parse_args()
    try:
        images = load(arguments.data, arguments.root)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from None
    stem = arguments.out / ("methods-short" if arguments.short else "methods")
    arguments.out.mkdir(parents=True, exist_ok=True)
    jobs = short_study() if arguments.short else full_study(arguments.seeds)
    records = run_jobs(jobs, stem.with_suffix(".jsonl"), arguments)
    of_shares = stem.with_name(f"{stem.name}-shares.json")
    if not of_shares.exists():
        rows = shares(METHODS.values(), images, rounds=5 if arguments.short else 40)
        write_rows(of_shares, rows)
    rows = json.loads(of_shares.read_text())
    picture = stem.with_suffix(".png")
    draw(records, picture)
    stem.with_suffix(".md").write_text(text(records, rows, picture.name))
    if arguments.out.resolve() == BENCHMARKS / "results":
        readme = BENCHMARKS / "methods" / "README.md"
        readme.write_text(embed(readme.read_text(), "study.py", block(records, rows, picture.name)))
    print(summary(records), shares_table(rows), f"written: {stem}.jsonl, .md, .png and -shares.json", sep="\n")


if __name__ == "__main__":
    main()
