"""Says how often a reward model prefers the better response, and how sure that figure is.

    python evaluate.py RUN --data pairs.jsonl           # a Markdown table on stdout
    torchrun --nproc-per-node 8 evaluate.py RUN --data pairs.jsonl
    python evaluate.py RUN --data pairs.jsonl --probe shuffled --probe swapped
    python evaluate.py --compare A.scores.jsonl B.scores.jsonl
    python evaluate.py --curve RUN1 RUN2 ... [--plot curve.png]
    python evaluate.py RUN --score answers.jsonl        # one reward a line, for best-of-n

RUN is a folder of train.py, or any Hugging Face sequence-classification model made of a decoder
and a `score` head with one label. Pairs are read by `read_pairs` (critique_rm.py); answers are
single records {prompt, response, critique?, id?}. A probe scores the same pairs with their
critiques changed, to see whether the model reads them; --compare says whether one model beats
another on the pairs that both have scored; --curve reads runs of train.py on different numbers of
pairs (--max-pairs), with different critiques or none (--critiques, --no-critiques), of several
seeds, and says how many plain pairs one pair with critiques is worth.

Accuracy counts a tie as wrong, as RewardBench does (Lambert et al., arXiv 2403.13787). Intervals
are percentiles of a bootstrap over prompts, since pairs over one prompt are not independent (of a
curve over prompts and seeds); p values are those of flipping the sign of the difference of each
prompt at random.
"""

import argparse
import base64
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch.distributed as dist

import critique_rm as rm
from critique_rm import CritiqueRMError, Pair, PairScore, natural, positive_int, say

N_RESAMPLES = 2000
N_FLIPS = 9999
MIN_SHUFFLED_PAIRS = 10  # with one pair, shuffling a subset would be swapping
PROBES = {  # what changes, and what stays in the input
    "shuffled": "critiques exchanged at random, within subsets of ten pairs or more; prompt, "
    "response, separator stay",
    "swapped": "critiques of chosen and rejected exchanged; prompt, response, separator stay",
    "empty": "critiques removed; prompt, response and separator stay",
    "critique-only": "responses removed; prompt, separator and critique stay",
    "response-only": "critiques and separator removed; prompt and response stay",
}
READS_CRITIQUES = (
    "A model that reads critiques loses accuracy when they are shuffled and more when they are "
    "swapped; one that reads nothing else keeps it without the response."
)
# Pairs behind each accuracy in a section, as RewardBench weighs them; math-prm has 447 real pairs.
# fmt: off
REWARDBENCH = {
    "Chat": {
        "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95,
        "mt-bench-easy": 28, "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
        "xstest-should-respond": 250, "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164,
        "hep-python": 164, "hep-rust": 164,
    },
}
# fmt: on

# --------------------------------------------------------------------------------------------------
# Arguments


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", nargs="?", help="folder or Hub name of a model")
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--data", metavar="PAIRS", help="preference pairs to test on")
    add("--score", metavar="ANSWERS", help="single answers to score")
    add("--compare", nargs=2, metavar="SCORES", help="two files of --scores, or of two runs")
    add("--curve", nargs="+", metavar="RUN", help="folders of train.py")
    add = parser.add_argument_group("input").add_argument
    add("--no-critiques", action="store_true", help="leave critiques out of the input")
    add("--critiques", metavar="FILE", help="take them from there, by pair id")
    add("--skip-bad", action="store_true", help="leave out bad records, count them")
    add("--max-length-tokens", type=positive_int, help="of a sequence; None: the model's")
    add("--micro-batch-tokens", type=positive_int, default=4096, help="computed at once on a rank")
    add = parser.add_argument_group("table").add_argument
    add("--probe", choices=PROBES, action="append", default=[], help="another row; repeatable")
    add("--judge", metavar="FILE", action="append", default=[], help="verdicts of generate.py")
    add("--seed", type=natural, default=0, help="of bootstrap, sign flips and shuffling")
    add = parser.add_argument_group("files to write").add_argument
    add("--json", metavar="FILE", help="the table")
    add("--scores", metavar="FILE", help="one line a pair")
    add("--html", metavar="FILE", help="a page to look at the pairs")
    add("--plot", metavar="FILE", help="a picture of the curve (needs matplotlib)")
    args = parser.parse_args(argv)
    with_data = args.scores or args.judge or args.probe or args.html or args.critiques
    if not args.data and with_data:
        parser.error("--scores, --judge, --probe, --html and --critiques go with --data")
    if args.score and args.json:
        parser.error("--json does not go with --score")
    if bool(args.run) == bool(args.compare or args.curve) or args.plot and not args.curve:
        parser.error("RUN goes with --data or --score, and --plot with --curve")
    outputs = (args.json, args.scores, args.html, args.plot)
    for path in filter(None, outputs):  # before hours of scoring
        if not Path(path).absolute().parent.is_dir():
            parser.error(f"{path}: there is no such folder")
    return args


# --------------------------------------------------------------------------------------------------
# Statistics


@dataclass(frozen=True)
class Row:
    """One line of the table: how often `scorer` puts chosen above rejected in `subset`."""

    scorer: str
    subset: str
    pairs: int | None  # None: a weighted mean of subsets
    accuracy: float
    low: float | None = None  # ends of the 95 % interval
    high: float | None = None
    ties: float | None = None
    inconsistent: float | None = None  # verdicts that change with the order of the responses
    coverage: float | None = None  # the share of all pairs that got an answer


@dataclass(frozen=True)
class Opinions:
    """What one scorer says of the pairs it could read."""

    scorer: str
    scores: list[PairScore]  # B pairs
    correct: np.ndarray  # (B,) 1 right, 0 wrong; a judge may be right in one of two orders
    ties: np.ndarray | None = None  # (B,) bool
    inconsistent: np.ndarray | None = None  # (B,) bool

    def within(self, subset: str) -> "Opinions":
        here = np.array([score.subset == subset for score in self.scores], bool)
        arrays = (self.correct, self.ties, self.inconsistent)
        return Opinions(
            self.scorer,
            [score for score, is_here in zip(self.scores, here) if is_here],
            *(array if array is None else array[here] for array in arrays),
        )

    def measure(self, subset: str, n_pairs: int, seed: int) -> Row:
        """Accuracy with interval, out of the `n_pairs` that there are."""
        prompt_ids = [score.prompt_id for score in self.scores]
        low, high = bootstrap_interval(self.correct, prompt_ids, seed)
        ties, inconsistent = (
            None if array is None else float(array.mean())
            for array in (self.ties, self.inconsistent)
        )
        n, accuracy = len(self.scores), float(self.correct.mean())
        if low is None:
            low, high = exact_interval(accuracy, len(set(prompt_ids)))
        return Row(self.scorer, subset, n, accuracy, low, high, ties, inconsistent, n / n_pairs)


def bootstrap_interval(
    correct: np.ndarray, prompt_ids: list[str], seed: int
) -> tuple[float | None, float | None]:
    """The 95 % percentile interval of the mean of (B,) values, prompts drawn with replacement."""
    _, cluster = np.unique(prompt_ids, return_inverse=True)
    n_correct, n_pairs = np.bincount(cluster, correct), np.bincount(cluster)
    draws = resample(len(n_pairs), len(n_pairs), seed)
    return percentile_interval([draw @ n_correct / (draw @ n_pairs) for draw in draws])


def resample(n: int, n_drawn: int, seed: int) -> Iterator[np.ndarray]:
    """N_RESAMPLES times: how often each of n is drawn when some are drawn with replacement, (n,)."""
    rng = np.random.default_rng(seed)
    return (rng.multinomial(n_drawn, np.full(n, 1 / n)) for _ in range(N_RESAMPLES))


def percentile_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The middle 95 % of the values of resamples; none if they are all equal and so say nothing."""
    low, high = map(float, np.quantile(values, [0.025, 0.975]))
    return (low, high) if low < high else (None, None)


def exact_interval(accuracy: float, n: int) -> tuple[float | None, float | None]:
    """Of n prompts that are all right or all wrong (Clopper & Pearson 1934); else none."""
    end = 0.025 ** (1 / n)
    return {1.0: (end, 1.0), 0.0: (0.0, 1 - end)}.get(accuracy, (None, None))


def sign_flip_p(differences: np.ndarray, prompt_ids: list[str], seed: int) -> float:
    """The two-sided p of no difference: how often random signs of prompts give as large a sum.

    A Monte Carlo permutation test; with its own draw counted, p is never 0 (Phipson & Smyth 2010).
    """
    _, cluster = np.unique(prompt_ids, return_inverse=True)
    sums = np.bincount(cluster, differences)
    sums = sums[sums != 0]
    rng, n_as_far = np.random.default_rng(seed), 1
    for _ in range(N_FLIPS // 99):  # in blocks, for large sets
        signs = rng.choice([-1.0, 1.0], (99, len(sums)))
        n_as_far += int((np.abs(signs @ sums) >= abs(sums.sum()) - 1e-9).sum())
    return n_as_far / (1 + N_FLIPS)


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (1979): the smallest p times n, the next times n - 1, never decreasing."""
    p = np.array(p_values, float)
    order, adjusted = np.argsort(p), np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted.tolist()


@dataclass(frozen=True)
class Difference:
    """One line of a comparison: accuracy of A minus accuracy of B on the pairs of a subset."""

    subset: str
    pairs: int
    accuracy_of_A: float
    accuracy_of_B: float
    difference: float
    low: float | None  # ends of the 95 % interval
    high: float | None
    p: float  # of subsets: after Holm's correction
    only_A_right: int  # McNemar's counts
    only_B_right: int


def compare(a: list[PairScore], b: list[PairScore], seed: int = 0) -> list[Difference]:
    """The difference on the pairs that both scored, overall and by subset.

    Raises CritiqueRMError if there are none, or if pairs of one id are of different prompts.
    """
    others = {score.id: score for score in b}
    common = [(score, others[score.id]) for score in a if score.id in others]
    n = len(common)
    say(f"{n} pairs in both; {len(a) - n} only in A, {len(b) - n} in B")
    if not common or any(one.prompt_id != other.prompt_id for one, other in common):
        raise CritiqueRMError(
            "the two files do not hold scores of the same pairs; score one file twice"
        )
    subsets = np.array([one.subset for one, _ in common])
    prompts = np.array([one.prompt_id for one, _ in common])
    right = np.array([[s.chosen_reward > s.rejected_reward for s in two] for two in common], float)

    def measure(name: str, here: np.ndarray) -> Difference:
        of_a, of_b = right[here].T
        low, high = bootstrap_interval(of_a - of_b, prompts[here], seed)
        p = sign_flip_p(of_a - of_b, prompts[here], seed)
        means = float(of_a.mean()), float(of_b.mean())
        only = int((of_a > of_b).sum()), int((of_b > of_a).sum())
        return Difference(name, len(of_a), *means, means[0] - means[1], low, high, p, *only)

    names = sorted(set(subsets)) if len(set(subsets)) > 1 else []
    rows = [measure(name or "(none)", subsets == name) for name in names]
    adjusted = adjust_holm([row.p for row in rows])
    rows = [replace(row, p=p) for row, p in zip(rows, adjusted)]
    return [measure("all", np.full(len(common), True)), *rows]


@dataclass(frozen=True)
class Point:
    """One point of a learning curve: mean accuracy over seeds after training on so many pairs."""

    test: str  # name of the test file
    critiques: str  # which: "none", "of the data", or the name of the file they were taken from
    training_pairs: int
    seeds: int
    test_pairs: int
    accuracy: float
    low: float | None  # ends of the 95 % interval
    high: float | None
    more_than_none: str = ""  # accuracy, after as many pairs; both with their 95 % interval
    worth_in_plain_pairs: str = ""  # of one pair with critiques


Runs = dict[tuple[str, int], dict[int, list[PairScore]]]
COMPARABLE = (  # arguments that one curve has in common
    *("model", "train", "max_length_tokens", "epochs", "batch_pairs", "lr", "centering"),
    "average_critiques",
)


def read_curve(folders: Sequence[str]) -> dict[str, Runs]:
    """The scores on each test file, by critiques and number of training pairs, and by seed."""
    tests: dict[str, Runs] = {}
    common = None
    for folder in map(Path, folders):
        try:
            record = json.loads((folder / "run.json").read_text())
            arguments = record["arguments"]
            settings = {name: arguments[name] for name in COMPARABLE}
            critiques = Path(arguments["critiques"] or "of the data").name
            key = "none" if arguments["no_critiques"] else critiques, record["training_pairs"]
            seed = arguments["seed"]
        except (OSError, ValueError, LookupError, TypeError):
            problem = "not a finished run, or one of an older train.py; run it again"
            raise CritiqueRMError(f"{folder}: {problem}") from None
        if settings != (common := common or settings):
            raise CritiqueRMError(f"{folder}: trained with {settings}, the first with {common}")
        for path in sorted(folder.glob("scores-*.jsonl")):
            seeds = tests.setdefault(path.stem.removeprefix("scores-"), {}).setdefault(key, {})
            if seed in seeds:
                raise CritiqueRMError(f"{folder}: another run has its seed, pairs and critiques")
            seeds[seed] = read_scores(str(path))
    return tests


def measure_curve(test: str, runs: Runs, seed: int) -> list[Point]:
    """The points of all curves on one test file, and what critiques add and are worth.

    Prompts and seeds are resampled, for all runs with the same seeds alike, so that the intervals
    of a difference and of the worth are paired ones.
    Of n seeds n - 1 are drawn, which makes the variance of their mean the unbiased one (McCarthy &
    Snowden 1985); with n drawn, three seeds would look a third less different than they are.
    """
    runs = dict(sorted(runs.items(), key=lambda item: (item[0][0] != "none", item[0])))
    every = [scores for by_seed in runs.values() for scores in by_seed.values()]
    kept = set.intersection(*({(s.id, s.prompt_id) for s in scores} for scores in every))
    first = [s for s in every[0] if (s.id, s.prompt_id) in kept]
    if n_left_out := max(map(len, every)) - len(first):
        say(f"{test}: {n_left_out} pairs are left out, as some run has not scored them")
    if not first:
        raise CritiqueRMError(f"the runs have no pair of {test} in common; give them one test file")
    _, cluster = np.unique([s.prompt_id for s in first], return_inverse=True)
    n_in_cluster = np.bincount(cluster)

    def draw(n: int, n_drawn: int, seed: int) -> np.ndarray:  # the first is the data itself
        return np.stack([np.ones(n, int), *resample(n, n_drawn, seed)])

    prompts = draw(len(n_in_cluster), len(n_in_cluster), seed)
    accuracy = {}  # (1 + N_RESAMPLES,) each
    for key, by_seed in runs.items():
        right = [
            {s.id: s.chosen_reward > s.rejected_reward for s in scores}
            for _, scores in sorted(by_seed.items())
        ]
        n_right = [np.bincount(cluster, [one[s.id] for s in first]) for one in right]
        by_run = prompts @ np.transpose(n_right) / (prompts @ n_in_cluster)[:, None]
        seeds = draw(len(right), max(1, len(right) - 1), seed + 1)
        accuracy[key] = (by_run * seeds).sum(1) / seeds.sum(1)
    if any(len(by_seed) == 1 for by_seed in runs.values()):
        say(f"{test}: the interval of a single seed is over prompts alone; seeds differ, run more")
    plain = {size: values for (critiques, size), values in accuracy.items() if critiques == "none"}
    points = []
    for (critiques, size), values in accuracy.items():
        low, high = percentile_interval(values[1:])
        if low is None:
            low, high = exact_interval(values[0], len(n_in_cluster))
        more = worth = ""
        if critiques != "none" and size in plain:
            more = "{:+.3f} ({:+.3f} to {:+.3f})".format(*middle(values - plain[size]))
        if critiques != "none" and len(plain) > 1:
            worth = measure_worth(values, size, plain)
        counts = len(runs[critiques, size]), len(first)
        points.append(
            Point(test, critiques, size, *counts, float(values[0]), low, high, more, worth)
        )
    return points


def middle(values: np.ndarray, **how: str) -> tuple[float, float, float]:
    """The first value, which is that of the data, and the middle 95 % of the resamples'."""
    return values[0], *np.quantile(values[1:], [0.025, 0.975], **how)


def measure_worth(values: np.ndarray, n_pairs: int, plain: dict[int, np.ndarray]) -> str:
    """How many plain pairs give the accuracy of `n_pairs` with critiques, over `n_pairs`."""
    sizes, curves = list(plain), np.stack(list(plain.values()), 1)  # (1 + N_RESAMPLES, points)
    found = [equal_pairs(value, sizes, curve) / n_pairs for value, curve in zip(values, curves)]
    limits = sizes[0] / n_pairs, sizes[-1] / n_pairs
    return "{} ({} to {})".format(
        *(show_worth(x, *limits) for x in middle(found, method="nearest"))
    )


def equal_pairs(accuracy: float, sizes: Sequence[int], curve: np.ndarray) -> float:
    """Where a curve over log N first reaches an accuracy; 0 or infinity if that is off its ends."""
    k = int(np.argmax(curve >= accuracy))
    if curve[k] < accuracy:
        return float(np.inf)
    if k == 0:
        return float(sizes[0]) if curve[0] == accuracy else 0.0
    share = (accuracy - curve[k - 1]) / (curve[k] - curve[k - 1])
    return float(sizes[k - 1] * (sizes[k] / sizes[k - 1]) ** share)


def show_worth(worth: float, lowest: float, highest: float) -> str:
    """Never beyond what was measured."""
    if worth == 0:
        return f"less than {lowest:.3g}"
    return f"more than {highest:.3g}" if worth == np.inf else f"{worth:.3g}"


def plot_curve(points: Sequence[Point], path: str) -> None:
    """For each test: accuracy over training pairs by critiques; beside it that at the most pairs."""
    pyplot = load_pyplot()
    if pyplot is None:
        raise CritiqueRMError("--plot needs matplotlib; run: pip install matplotlib")
    tests = list(dict.fromkeys(point.test for point in points))
    size = {"figsize": (10, 4 * len(tests)), "layout": "constrained"}
    figure, rows = pyplot.subplots(len(tests), 2, squeeze=False, sharey="row", **size)
    for test, (left, right) in zip(tests, rows):
        for critiques in dict.fromkeys(point.critiques for point in points if point.test == test):
            those = [p for p in points if (p.test, p.critiques) == (test, critiques)]
            sizes, accuracy = [p.training_pairs for p in those], [p.accuracy for p in those]
            ends = [(p.low, p.high) if p.low is not None else (p.accuracy,) * 2 for p in those]
            ends = np.abs(np.transpose(ends) - accuracy)
            if len(those) > 1:
                left.errorbar(sizes, accuracy, ends, marker="o", capsize=3, label=critiques)
            right.errorbar([critiques], accuracy[-1:], ends[:, -1:], marker="o", capsize=3)
        left.set(xscale="log", xlabel="training pairs", ylabel=f"accuracy on {test}")
        sizes = sorted({point.training_pairs for point in points if point.test == test})
        left.set_xticks(sizes, map(str, sizes), rotation=90)
        left.minorticks_off()
        left.legend(title="critiques")
        right.set(xlabel="critiques, at the most training pairs")
        right.tick_params(axis="x", rotation=20)
    figure.savefig(path, dpi=150)


def draw_margins(scores: list[PairScore]) -> str:
    """What margins go with: length, and being right. A picture as URL, empty without matplotlib."""
    if (pyplot := load_pyplot()) is None:
        return ""
    margin, longer = margins_and_lengths(scores)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.scatter(longer, margin, s=8)
    left.axhline(0, color="gray", linewidth=1)
    left.set(xlabel="words of chosen - words of rejected", ylabel="margin of rewards")
    _, confidence, accuracy = calibrate(margin)
    right.plot([0.5, 1], [0.5, 1], color="gray", linewidth=1)
    right.plot(confidence, accuracy, marker="o")
    right.set(xlabel="confidence: σ(|margin|)", ylabel="accuracy")
    figure.savefig(file := io.BytesIO(), dpi=100)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def load_pyplot():
    """matplotlib's drawing part, without a screen; None if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def measure_robustness(scores: list[PairScore]) -> dict[str, float]:
    """What accuracy alone does not say: length, calibration, and the level of the rewards."""
    margin, longer = margins_and_lengths(scores)
    figures = {}
    for name, here in (("longer", longer > 0), ("shorter", longer < 0)):
        if here.any():
            figures[f"accuracy where chosen is {name} ({here.sum()} pairs)"] = (
                margin[here] > 0
            ).mean()
    if margin.std() and longer.std():
        figures["correlation of margin and length difference"] = np.corrcoef(margin, longer)[0, 1]
    figures["log loss"] = np.logaddexp(0, -margin).mean()
    figures["expected calibration error"] = calibration_error(margin)
    for subset in sorted({s.subset for s in scores}):
        rewards = [(s.chosen_reward + s.rejected_reward) / 2 for s in scores if s.subset == subset]
        figures["mean reward" + (f", {subset}" if subset else "")] = np.mean(rewards)
    return {name: float(value) for name, value in figures.items()}


def margins_and_lengths(scores: list[PairScore]) -> tuple[np.ndarray, np.ndarray]:
    """(B,) each: reward and words of chosen less those of rejected."""
    margin = [s.chosen_reward - s.rejected_reward for s in scores]
    return np.array(margin), np.array([s.chosen_words - s.rejected_words for s in scores])


def calibration_error(margin: np.ndarray) -> float:
    """Of σ(|margin|), the confidence in the response preferred (Guo et al., arXiv 1706.04599).

    The mean distance of confidence and accuracy in bins of equal width from 0.5 to 1.
    """
    n_in_bin, confidence, accuracy = calibrate(margin)
    return float(n_in_bin @ np.abs(accuracy - confidence) / len(margin))


def calibrate(margin: np.ndarray, n_bins: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number of pairs, mean σ(|margin|) and accuracy in those bins of it that hold any."""
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    bins = np.minimum((2 * confidence - 1) * n_bins, n_bins - 1).astype(int)
    _, bins, n_in_bin = np.unique(bins, return_inverse=True, return_counts=True)
    means = (np.bincount(bins, values) / n_in_bin for values in (confidence, margin > 0))
    return n_in_bin, *means


def apply_probe(pairs: list[Pair], probe: str, seed: int) -> list[Pair]:
    """The pairs changed as PROBES says; response-only is for an encoder without critiques."""
    if probe == "shuffled":
        return shuffle_critiques(pairs, seed)
    changes = {
        "swapped": lambda pair: {
            "chosen_critiques": pair.rejected_critiques,
            "rejected_critiques": pair.chosen_critiques,
        },
        "empty": lambda _: {"chosen_critiques": ("",), "rejected_critiques": ("",)},
        "critique-only": lambda _: {"chosen": "", "rejected": ""},
        "response-only": lambda _: {},
    }
    return [replace(pair, **changes[probe](pair)) for pair in pairs]


def shuffle_critiques(pairs: list[Pair], seed: int, share: float = 1.0) -> list[Pair]:
    """Exchanges the critiques of a random share of the responses of each subset at random.

    Subsets of less than MIN_SHUFFLED_PAIRS are one.
    """
    critiques = {(n, s): a.critiques for n, p in enumerate(pairs) for s, a in enumerate(p.answers)}
    sizes = Counter(pair.subset for pair in pairs)
    subsets = [p.subset if sizes[p.subset] >= MIN_SHUFFLED_PAIRS else "" for p in pairs]
    rng = np.random.default_rng(seed)
    for subset in sorted(set(subsets)):
        places = [place for place in critiques if subsets[place[0]] == subset]
        drawn = rng.permutation(len(places))[: round(share * len(places))]
        moved = [critiques[places[k]] for k in np.roll(drawn, 1)]  # round: none stays in its place
        critiques |= {places[k]: texts for k, texts in zip(drawn, moved)}
    return [
        replace(pair, chosen_critiques=critiques[n, 0], rejected_critiques=critiques[n, 1])
        for n, pair in enumerate(pairs)
    ]


def collect_opinions(
    scores: list[PairScore], judges: Sequence[str], probed: dict[str, list[PairScore]]
) -> list[Opinions]:
    """The reward model, also under probes, those that look at length alone, and the judges.

    Where a judge has left pairs out, the reward model has another row, on the same pairs.
    """

    def by(quantity: str, scorer: str, those: list[PairScore]) -> Opinions:
        chosen, rejected = ([getattr(s, f"{side}_{quantity}") for s in those] for side in rm.SIDES)
        margins = np.subtract(chosen, rejected)
        return Opinions(scorer, those, (margins > 0).astype(float), margins == 0)

    reviewed = [s for s in scores if s.chosen_critique_words and s.rejected_critique_words]
    opinions = [
        *(by("reward", name, those) for name, those in {"reward model": scores, **probed}.items()),
        by("words", "longer response wins", scores),
        by("critique_words", "longer critique wins", reviewed),
    ]
    for path in judges:
        for judge in read_verdicts(path, scores, len(judges) > 1):
            opinions.append(judge)
            if len(judge.scores) < len(scores):
                name = f"reward model, pairs of {judge.scorer}"
                opinions.append(by("reward", name, judge.scores))
    return [opinion for opinion in opinions if opinion.scores]


def read_verdicts(
    path: str, scores: Sequence[PairScore | Pair], is_one_of_many: bool = False
) -> list[Opinions]:
    """Reads what `generate.py --task judge` wrote; a pair counts if both orders got an answer."""
    by_scorer: dict[str, dict[str, list[bool]]] = {}
    for where, row in rm.read_rows(path):
        try:
            answers = [row["verdicts"][order] for order in ("chosen_first", "rejected_first")]
            if not {*answers} <= {*rm.SIDES, None}:
                raise TypeError
            scorer = "judge with critiques" if row["with_critiques"] else "judge"
            scorer += f" ({path})" if is_one_of_many else ""
            if None not in answers:
                verdicts = by_scorer.setdefault(scorer, {})
                verdicts[row["id"]] = [answer == "chosen" for answer in answers]
        except (KeyError, TypeError):
            raise CritiqueRMError(f"{where}: not a verdict of generate.py --task judge") from None
    opinions = []
    for scorer, verdicts in by_scorer.items():
        judged = [score for score in scores if score.id in verdicts]
        right = np.array([verdicts[score.id] for score in judged], float).reshape(-1, 2)
        opinions.append(
            Opinions(scorer, judged, right.mean(1), inconsistent=right[:, 0] != right[:, 1])
        )
    if not any(opinion.scores for opinion in opinions):
        raise CritiqueRMError(f"{path}: holds no verdict in both orders on these pairs; judge them")
    return opinions


def tabulate(
    scores: list[PairScore],
    n_by_subset: Counter[str] | None = None,
    judges: Sequence[str] = (),
    seed: int = 0,
    probed: dict[str, list[PairScore]] | None = None,
) -> list[Row]:
    """All rows of the table: for each scorer overall, by subset, and by RewardBench section.

    Probes have a row each, without subsets.
    """
    rows = []
    n_by_subset = n_by_subset or Counter(score.subset for score in scores)
    probed = probed or {}
    for opinions in collect_opinions(scores, judges, probed):
        rows.append(opinions.measure("all", n_by_subset.total(), seed))
        by_subset = [
            those.measure(subset or "(none)", n, seed)
            for subset, n in sorted(n_by_subset.items())
            if len(n_by_subset) > 1 and opinions.scorer not in probed
            if (those := opinions.within(subset)).scores
        ]
        accuracy = {row.subset: row.accuracy for row in by_subset}
        rows += by_subset + rewardbench_rows(opinions.scorer, accuracy)
    return rows


def rewardbench_rows(scorer: str, accuracy: dict[str, float]) -> list[Row]:
    """Sections whose subsets are all there, with the official weights, and the mean of all four."""
    sections = {
        name: sum(accuracy[subset] * n for subset, n in weights.items()) / sum(weights.values())
        for name, weights in REWARDBENCH.items()
        if accuracy.keys() >= weights.keys()
    }
    rows = [Row(scorer, f"RewardBench {name}", None, value) for name, value in sections.items()]
    if len(sections) == len(REWARDBENCH):
        rows.append(Row(scorer, "RewardBench", None, sum(sections.values()) / len(sections)))
    return rows


def to_markdown(rows: Sequence[Row | Difference | Point]) -> str:
    """A table with a column for each field that any of the rows fills."""
    columns = {}
    for name in (field.name for field in fields(rows[0])):
        values = [getattr(row, name) for row in rows]
        if name == "low":
            name = "95 % interval"
            values = [row.low is not None and f"{row.low:.3f} to {row.high:.3f}" for row in rows]
        if name != "high" and not all(value in (None, "") for value in values):
            columns[name.replace("_", " ")] = [show(value) for value in values]
    return layout(columns)


def show(value: object) -> str:
    if value is None or value is False:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def layout(columns: dict[str, list[str]]) -> str:
    """Columns of text as a Markdown table, whatever the text."""
    lines = [list(columns), ["---"] * len(columns), *zip(*columns.values())]
    return "\n".join("| " + " | ".join(map(to_cell, line)) + " |" for line in lines)


def to_cell(text: str) -> str:
    """Text that cannot end a cell or a line of a table: white space and control characters."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(printable.split()).replace("|", "\\|")


# --------------------------------------------------------------------------------------------------
# A page to look at

PAGE = """<!doctype html>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'; img-src data:">
<title>Rewards</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 1rem }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: inherit }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }}
td {{ border-bottom: 1px solid #ddd; padding: .15rem .8rem .15rem 0 }}
tr:first-child {{ font-weight: bold }}
article {{ border: 1px solid #ccc; border-radius: 6px; margin: 1rem 0; padding: 1rem }}
article.wrong {{ border-left: 6px solid #c33 }}
.two {{ display: grid; grid-template-columns: 1fr 1fr; gap: 1.5rem; margin-top: 1rem }}
.critique {{ color: #555; border-left: 3px solid #ccc; padding-left: .7rem; margin-top: .7rem }}
h3 {{ font-size: 1em; margin: 0 0 .4rem }}
</style>
<h1>Rewards</h1>
<section id="tables"></section>
<p>
<label>subset <select id="subset"><option value="">all</option></select></label>
<label>show <select id="side"><option value="">all</option><option>right</option>
<option>wrong</option></select></label>
<label>order <select id="order"><option value="1">lowest margin first</option>
<option value="-1">highest margin first</option></select></label>
<output id="count"></output>
</p>
<main></main>
<script type="application/json" id="data">{data}</script>
<script>
const {{tables, picture, pairs}} = JSON.parse(document.getElementById("data").textContent);
const get = id => document.getElementById(id);
function add(parent, tag, text, name) {{
  const element = parent.appendChild(document.createElement(tag));
  element.textContent = text;  // never innerHTML: what the data holds stays text
  if (name) element.className = name;
  return element;
}}
for (const text of tables) {{
  if (!text.startsWith("|")) {{ add(get("tables"), "pre", text); continue; }}
  const table = add(get("tables"), "table", "");
  for (const line of text.split("\\n").filter(line => !line.startsWith("| --- |"))) {{
    const row = add(table, "tr", "");
    for (const cell of line.slice(2, -2).split(" | "))
      add(row, "td", cell.replaceAll("\\\\|", "|"));
  }}
}}
if (picture) add(get("tables"), "img", "").src = picture;
for (const subset of [...new Set(pairs.map(p => p.subset))].sort())
  if (subset) add(get("subset"), "option", subset);
function show() {{
  const [subset, side, order] = ["subset", "side", "order"].map(id => get(id).value);
  const margin = p => p.chosen.reward - p.rejected.reward;
  const shown = pairs
    .filter(p => !subset || p.subset === subset)
    .filter(p => !side || (margin(p) > 0) === (side === "right"))
    .sort((a, b) => order * (margin(a) - margin(b)));
  const main = document.querySelector("main");
  main.replaceChildren();
  get("count").textContent = `${{shown.length}} of ${{pairs.length}} pairs`;
  for (const p of shown) {{
    const article = add(main, "article", "", margin(p) > 0 ? "right" : "wrong");
    add(article, "h3", `${{p.id}} ${{p.subset}}: margin ${{margin(p).toFixed(3)}}`);
    add(article, "pre", p.prompt);
    const two = add(article, "div", "", "two");
    for (const name of ["chosen", "rejected"]) {{
      const column = add(two, "div", "");
      add(column, "h3", `${{name}}, reward ${{p[name].reward.toFixed(3)}}`);
      add(column, "pre", p[name].response);
      for (const critique of p[name].critiques) add(column, "pre", critique, "critique");
    }}
  }}
}}
for (const id of ["subset", "side", "order"]) get(id).addEventListener("change", show);
show();
</script>
"""


def to_html(
    tables: list[str], pairs: list[Pair], scores: list[PairScore], picture: str = ""
) -> str:
    """One file that needs nothing else; the data stands in it as JSON that cannot end a script."""
    rows = []
    for pair, score in zip(pairs, scores):
        prompt = "\n\n".join(f"{message.role}: {message.text}" for message in pair.prompt)
        row = {"id": pair.id, "subset": pair.subset, "prompt": prompt}
        for side, answer in zip(rm.SIDES, pair.answers):
            row[side] = {
                "reward": getattr(score, f"{side}_reward"),
                "response": answer.message.text,
                "critiques": answer.critiques,
            }
        rows.append(row)
    data = json.dumps({"tables": tables, "picture": picture, "pairs": rows})
    return PAGE.format(data=data.replace("<", "\\u003c"))


# --------------------------------------------------------------------------------------------------


def evaluate_pairs(args: argparse.Namespace) -> int:
    """Scores the pairs of --data, also under probes, and prints the tables."""
    pairs = rm.read_pairs(args.data, args.skip_bad, args.critiques)
    for path in args.judge:  # before hours of scoring
        read_verdicts(path, pairs)
    model, encoder = load(args)
    if args.probe and not encoder.use_critiques:
        raise CritiqueRMError(f"{args.run}: reads no critiques; --probe needs a model that does")
    encoded = encoder.encode_pairs(pairs, args.data, skip_bad=args.skip_bad)
    scores = rm.score_pairs(model, encoded, args.micro_batch_tokens)
    description = {
        "run": args.run,
        "data": args.data,
        "data_digest": rm.digest(*map(rm.digest_pair, pairs)),
        "critiques": encoder.use_critiques,
        "seed": args.seed,
    }
    probed = {}
    for probe in dict.fromkeys(args.probe):
        encoder.use_critiques = probe != "response-only"
        changed = apply_probe([e.pair for e in encoded], probe, args.seed)
        changed = encoder.encode_pairs(changed, f"{args.data}, {probe}", keep_equal=True)
        probed[f"reward model, {probe}"] = rm.score_pairs(model, changed, args.micro_batch_tokens)
    if dist.get_rank() != 0:
        return 0
    if args.scores:
        rm.write_scores(Path(args.scores), scores)
    rows = tabulate(scores, Counter(p.subset for p in pairs), args.judge, args.seed, probed)
    robustness = measure_robustness(scores)
    values = [f"{value:.4f}" for value in robustness.values()]
    tables = [to_markdown(rows), layout({"reward model": list(robustness), "value": values})]
    if args.probe:
        lines = [f"- {probe}: {PROBES[probe]}" for probe in dict.fromkeys(args.probe)]
        tables.insert(1, "\n".join([*lines, "", READS_CRITIQUES]))
    if args.html:
        page = to_html(tables, [e.pair for e in encoded], scores, draw_margins(scores))
        rm.replace_file(Path(args.html), page)
    if args.json:
        table = description | {"rows": [asdict(row) for row in rows], "robustness": robustness}
        write_json(args.json, table)
    print("\n\n".join(tables))
    return 0


def compare_scores(args: argparse.Namespace) -> int:
    """Compares the two files of --compare and prints the table."""
    rows = compare(*(read_scores(path) for path in args.compare), args.seed)
    print(to_markdown(rows))
    if args.json:
        table = {"a": args.compare[0], "b": args.compare[1], "rows": [asdict(row) for row in rows]}
        write_json(args.json, table)
    return 0


def draw_curve(args: argparse.Namespace) -> int:
    """Prints the learning curves of the runs of --curve."""
    tests = read_curve(args.curve).items()
    points = [point for test, runs in tests for point in measure_curve(test, runs, args.seed)]
    if args.plot:
        plot_curve(points, args.plot)
    if args.json:
        write_json(args.json, {"runs": args.curve, "rows": [asdict(point) for point in points]})
    print(to_markdown(points))
    return 0


def write_json(path: str, table: dict) -> None:
    rm.replace_file(Path(path), rm.to_json(table, indent=2) + "\n")


def read_scores(path: str) -> list[PairScore]:
    """Reads what --scores and train.py write."""
    scores = []
    for where, row in rm.read_rows(path):
        try:
            score = PairScore(**row)
            rewards = np.array([score.chosen_reward, score.rejected_reward], float)
            texts = (score.id, score.prompt_id, score.subset)
        except (TypeError, ValueError):
            raise CritiqueRMError(f"{where}: not a line of --scores") from None
        if not np.isfinite(rewards).all() or not all(isinstance(text, str) for text in texts):
            raise CritiqueRMError(f"{where}: not a line of --scores, or its rewards are not finite")
        scores.append(score)
    if not scores:
        raise CritiqueRMError(f"{path}: no score in it")
    return scores


def score_single(args: argparse.Namespace) -> int:
    """Prints a reward for each answer of --score; null for one that cannot be scored."""
    answers = rm.read_answers(args.score, args.skip_bad)
    model, encoder = load(args)
    rewards = rm.score_answers(model, encoder, answers, args.micro_batch_tokens, args.skip_bad)
    n_missing = rewards.count(None)
    if counted := encoder.describe_counts():
        say(f"{args.score}: of {len(answers)} answers {counted}")
    if dist.get_rank() == 0:
        for answer, reward in zip(answers, rewards):
            print(rm.to_json({"id": answer.id, "reward": reward}))
    if n_missing:
        hint = f" ({rm.CRITIQUES_MISSING})" if encoder.counts["without critique"] else ""
        say(f"{args.score}: {n_missing} of {len(answers)} answers have no reward{hint}")
    return 1 if n_missing else 0


def load(args: argparse.Namespace):
    """The model of RUN and its encoder, as the arguments say."""
    return rm.load_reward_model(
        args.run, False if args.no_critiques else None, args.max_length_tokens
    )


def main() -> int:
    args = parse_arguments()
    try:
        if args.compare or args.curve:
            return compare_scores(args) if args.compare else draw_curve(args)
        code = evaluate_pairs(args) if args.data else score_single(args)
    except (CritiqueRMError, OSError) as error:
        rm.say_error("evaluate.py", error)
        return 1
    except KeyboardInterrupt:
        say("evaluate.py: interrupted")
        return 130
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    rm.leave(main())
