"""``python -m eman_kernels synthesize``: averages of any length from a folder of snapshots."""

import argparse
from pathlib import Path

from ..schedules import PowerFunction
from .folders import SUFFIX, StoredNetwork, read_folder, write_network
from .profiles import COMMON_LENGTHS
from .synthesis import add_up, combine, describe_range, list_missing, select_networks, solve_for_networks


def add_synthesize_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand; ``run_synthesize`` is what it runs."""
    parser = commands.add_parser(
        "synthesize",
        help="averages of any length from the snapshots of a run",
        description="Writes averages of other lengths than those that were tracked, as safetensors files with the "
        "network's state_dict. See docs/post-hoc.md.",
    )
    parser.add_argument("folder", type=Path, help="of Snapshots, of ema-pytorch's PostHocEMA, or of checkpoints")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--sigma-rel", type=float, nargs="+", metavar="S", help="lengths relative to the training")
    length.add_argument("--gamma", type=float, nargs="+", metavar="G", help="lengths as exponents")
    length.add_argument("--half-life", type=float, nargs="+", metavar="H", help="lengths as half-lives in updates")
    length.add_argument("--describe", action="store_true", help="show what is stored and what can be made of it")
    parser.add_argument("--step", type=int, help="number of updates after which the average is taken; default: last")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write the averages")
    parser.add_argument(
        "--stored-sigma-rel", type=float, nargs="+", default=(), metavar="S", help="the sigma_rels of a PostHocEMA"
    )
    parser.set_defaults(run=run_synthesize)


def run_synthesize(arguments: argparse.Namespace) -> int:
    """Returns the exit status; errors of the arguments and the folder are printed."""
    kinds = [kind for kind in ("sigma_rel", "gamma", "half_life") if getattr(arguments, kind) is not None]
    if not kinds and not arguments.describe:
        raise SystemExit("pass --sigma-rel, --gamma, --half-life or --describe")
    if kinds and arguments.out is None:
        raise SystemExit("pass --out FOLDER, where to write the averages")
    if kinds and arguments.out.resolve() == arguments.folder.resolve():
        raise SystemExit("--out must be another folder, because a folder of snapshots holds nothing else")
    try:
        networks = read_folder(arguments.folder, arguments.stored_sigma_rel)
        if arguments.describe:
            print(describe_folder(networks, arguments.step))
        else:
            _synthesize_to_files(networks, kinds[0], getattr(arguments, kinds[0]), arguments.step, arguments.out)
    except (ValueError, FileNotFoundError, ImportError) as error:
        raise SystemExit(str(error)) from None
    return 0


def _synthesize_to_files(
    networks: list[StoredNetwork], kind: str, lengths: list[float], step: int | None, out: Path
) -> None:
    combination = combine(networks, kind, lengths, step)
    out.mkdir(parents=True, exist_ok=True)
    averages = add_up(combination, progress=True)
    for i, (length, average) in enumerate(zip(lengths, averages, strict=True)):
        path = out / f"{kind}-{length:g}-step-{combination.step}{SUFFIX}"
        sigma_rel = PowerFunction.from_gamma(combination.gammas[i]).sigma_rel
        # Not under the keys of a snapshot, so that the folder is not taken for one of snapshots.
        metadata = {"synthesized_sigma_rel": repr(sigma_rel), "synthesized_step": str(combination.step)}
        error = "" if combination.errors is None else f", error of the profile {combination.errors[i]:.1%}"
        write_network(path, average, metadata)
        print(f"{path}: sigma_rel {sigma_rel:.4f} at step {combination.step}{error}")


def describe_folder(networks: list[StoredNetwork], step: int | None) -> str:
    """What is stored, and the errors of the averages that can be made of it."""
    used, step = select_networks(networks, step)
    size = sum(network.path.stat().st_size for network in networks)
    steps = sorted({network.step for network in networks})
    lines = [f"{len(networks)} files, {size / 1e6:,.0f} MB, {len(networks[0].shapes)} tensors each"]
    lines.append(f"{len(steps)} steps, from {steps[0]} to {steps[-1]}")
    if used[0].sigma_rel is None:
        return "\n".join([*lines, "checkpoints of the student: the error of an average of them is not known"])
    lines += [f"sigma_rel {sigma_rel:g}" for sigma_rel in sorted({network.sigma_rel for network in networks})]
    lines += list_missing(networks)
    gammas = [PowerFunction(sigma_rel).gamma for sigma_rel in COMMON_LENGTHS]
    coefficients, errors = solve_for_networks(used, step, gammas)
    lines += ["", f"averages at step {step}. {describe_range(used, step)}"]
    lines += ["sigma_rel  error of the profile  rounding errors are multiplied by"]
    for sigma_rel, error, column in zip(COMMON_LENGTHS, errors.tolist(), coefficients.T, strict=True):
        lines.append(f"{sigma_rel:9g}  {error:20.2%}  {float(column.norm()):33.1f}")
    return "\n".join(lines)
