"""How far the planner's time model is from published training rates: each row, then the errors.

Nothing is run: the rows are in ``megaprot.tools.planning.published``, those marked ``fitted`` set the model's shares.
usage: python benchmarks/bench_planning.py [--fit]

``--fit`` repeats the fit of the shares instead: least squares of the logarithms of the errors of the fitted rows, drawn
weakly towards a half size of 100 and a traffic factor of 2, which few rows determine.
"""

import math
import statistics
import sys
from dataclasses import replace

from scipy.optimize import minimize

from megaprot.tools.planning import step_time
from megaprot.tools.planning.gpus import GPUS
from megaprot.tools.planning.published import median_error, published_runs

GENERATIONS = {"a": 0, "h": 1, "b": 2}
_START, _PULL = (0.75, 0.6, 0.55, math.log(100.0), math.log(2.0)), 0.002


def fit() -> None:
    """Print the matrix shares of A100, Hopper and Blackwell, the half size and the traffic factor that fit best."""
    runs = [run for run in published_runs() if run.fitted]

    def loss(values: list[float]) -> float:
        step_time.HALF_SIZE, step_time.TRAFFIC_FACTOR = math.exp(values[3]), math.exp(values[4])
        total = _PULL * sum((value - start) ** 2 for value, start in zip(values[3:], _START[3:], strict=True))
        for run in runs:
            gpu = replace(GPUS[run.gpu], matrix_share=values[GENERATIONS[run.gpu[0]]])
            total += math.log(1.0 + run.error(gpu)) ** 2
        return total

    best = minimize(loss, _START, method="Nelder-Mead", options={"maxiter": 6000, "xatol": 1e-4, "fatol": 1e-7}).x
    shares = ", ".join(
        f"{name} {value:.3f}" for name, value in zip(("A100", "Hopper", "Blackwell"), best, strict=False)
    )
    print(f"{shares}; half size {math.exp(best[3]):.1f}, traffic factor {math.exp(best[4]):.2f}")


def main() -> None:
    """Print the table in Markdown."""
    print("| run | source | published TFLOP/s a GPU | predicted | error | |\n|---|---|---|---|---|---|")
    runs = published_runs()
    for run in runs:
        gpu = GPUS[run.gpu]
        numbers = f"{run.tflops:.0f} | {run.predicted(gpu):.0f} | {100 * run.error(gpu):+.1f} %"
        print(f"| {run.name} | {run.source.split(',')[0]} | {numbers} | {'fitted' if run.fitted else ''} |")
    for name, wanted in (("fitted", True), ("not fitted", False)):
        chosen = [run for run in runs if run.fitted == wanted]
        worst = max(abs(run.error(GPUS[run.gpu])) for run in chosen)
        mean = statistics.fmean(run.error(GPUS[run.gpu]) for run in chosen)
        middle = 100 * median_error(chosen)
        print(f"{len(chosen)} rows {name}: median {middle:.1f} %, mean {100 * mean:+.1f} %, worst {100 * worst:.1f} %")


if __name__ == "__main__":
    fit() if sys.argv[1:] == ["--fit"] else main()
