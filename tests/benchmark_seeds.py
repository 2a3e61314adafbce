"""The figures of a benchmark as means over seeds, with and without critiques, and their difference.

    python tests/benchmark_seeds.py --of RUN1/scores-NAME.jsonl RUN2/scores-NAME.jsonl ... \\
        [--against BASELINE1/scores-NAME.jsonl ...]

The files are those that train.py or evaluate.py --save-scores left. Prints a Markdown table; intervals
are of 95 % over prompts, the same draws for all files, so that those of the difference are paired.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--of", nargs="+", required=True, metavar="SCORES")
    parser.add_argument("--against", nargs="+", default=[], metavar="SCORES")
    args = parser.parse_args()
    ours = mean_figures(args.of)
    others = mean_figures(args.against) if args.against else {}
    columns = {"": list(ours), f"mean of {len(args.of)}": list(map(show, ours.values()))}
    columns["each"] = each_figure(args.of, list(ours))
    if others:
        columns[f"against: mean of {len(args.against)}"] = [show(others[name]) for name in ours]
        columns["against: each"] = each_figure(args.against, list(ours))
        columns["difference"] = [show(ours[name] - others[name], "+.3f") for name in ours]
    print(evaluate.layout(columns))


def read_figures(path: str) -> evaluate.Figures:
    """All figures of the reward model and, of the same metric, those of length."""
    scores = evaluate.read_scores(path)
    n_by_group = Counter(score.group for score in scores)
    figures = {}
    for opinions in evaluate.collect_opinions(scores, [], {}):
        groups = evaluate.collect_groups(opinions, n_by_group)
        for benchmark, found in evaluate.measure_benchmarks(opinions, groups, seed=0).items():
            for name, values in found.items():
                figures[f"{benchmark}, {name}: {opinions.scorer}"] = values
    return figures


def mean_figures(paths: list[str]) -> evaluate.Figures:
    of_seeds = [read_figures(path) for path in paths]
    return {name: np.mean([figures[name] for figures in of_seeds], axis=0) for name in of_seeds[0]}


def each_figure(paths: list[str], names: list[str]) -> list[str]:
    of_seeds = [read_figures(path) for path in paths]
    return [", ".join(f"{figures[name][0]:.3f}" for figures in of_seeds) for name in names]


def show(values: np.ndarray, form: str = ".3f") -> str:
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return f"{values[0]:{form}} ({low:{form}} to {high:{form}})"


if __name__ == "__main__":
    main()
