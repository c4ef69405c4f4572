"""Half-precision teachers: rounded to nearest they do not move, rounded stochastically they are unbiased.

Draws benchmarks/results/rounding.png: the mean error of bfloat16 teachers relative to a float64 teacher, over 10,000
steps.
"""

import argparse
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from eman_kernels import ema_update_

MOMENTA = (0.99, 0.999, 0.9999)
GAP = 0.05  # relative distance of the student from the common start
NOISE = 0.02  # relative noise of the student in each step


def follow(
    momentum: float, rounding: str, dtype: torch.dtype = torch.bfloat16, steps: int = 10_000, elements: int = 4096
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield, for each step, the relative error of each teacher element compared with a float64 teacher."""
    generator = torch.Generator().manual_seed(0)
    start = 1 + torch.rand(elements, generator=generator)
    teacher, exact = start.to(dtype), start.to(dtype).double()
    student = torch.empty_like(start)
    for step in range(steps):
        noise = torch.randn(elements, generator=generator)
        torch.mul(start, 1 + GAP + NOISE * noise, out=student)
        ema_update_([teacher], [student], momentum, rounding=rounding, seed=1, step=step)
        exact.lerp_(student.double(), 1 - momentum)
        yield step + 1, teacher.double() / exact - 1


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000, help="default: %(default)s")
    default = Path(__file__).parent / "results" / "rounding.png"
    parser.add_argument("--out", type=Path, default=default, metavar="FILE", help="default: results/rounding.png")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not move")  # the picture shows exactly that

    figure, axes = pyplot.subplots(1, len(MOMENTA), figsize=(11, 3.4), sharey=True, layout="constrained")
    for axis, momentum in zip(axes, MOMENTA, strict=True):
        for rounding, color in (("nearest", "tab:red"), ("stochastic", "tab:blue")):
            at, means, spreads = [], [], []
            name = f"{rounding}, momentum {momentum}"
            for step, error in tqdm(follow(momentum, rounding, steps=arguments.steps), name, arguments.steps):
                if step % max(1, arguments.steps // 500) == 0:
                    at.append(step)
                    means.append(100 * error.mean().item())
                    spreads.append(3 * 100 * error.std().item() / math.sqrt(len(error)))
            axis.plot(at, means, color=color, label=rounding, linewidth=1.5)
            low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
            axis.fill_between(at, low, high, color=color, alpha=0.3, linewidth=0)
            print(f"{name}: mean error {means[-1]:+.4f} % of the value, 3 standard errors {spreads[-1]:.4f} %")
        axis.axhline(0, color="black", linewidth=0.8, linestyle=":")
        axis.set_title(f"momentum {momentum}")
        axis.set_xlabel("step")
    axes[0].set_ylabel("mean error of the bfloat16 teacher,\n% of the float64 teacher's value")
    axes[0].legend(title="rounding", loc="center right")
    figure.savefig(arguments.out, dpi=130)
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
