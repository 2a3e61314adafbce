"""Says how often a reward model prefers the better response, and how sure that figure is.

    python evaluate.py RUN --data pairs.jsonl           # a Markdown table on stdout
    torchrun --nproc-per-node 8 evaluate.py RUN --data pairs.jsonl
    python evaluate.py RUN --data pairs.jsonl --probe shuffled --probe swapped --audit audit.jsonl
    python evaluate.py --compare A.scores.jsonl B.scores.jsonl
    python evaluate.py --curve RUN1 RUN2 ... [--plot curve.png]
    python evaluate.py RUN --answers answers.jsonl      # one reward a line, for best-of-n

RUN is a folder of train.py, or any Hugging Face sequence-classification model made of a decoder
and a `score` head with one label. Pairs are read by `read_pairs` (critique_rm.py); answers are
single records {prompt, response, critique?, id?}. A probe scores the same pairs with their
critiques changed, to see whether the model reads them; --audit says how each critique moves the
reward; lists of responses, and rows of RewardBench, RewardBench 2, RM-Bench and JudgeBench, add
their own figures to the table; --compare says whether one model beats another on the pairs that
both have scored; --curve reads runs of train.py on different numbers of pairs (--max-pairs), with
different critiques or none (--critiques, --no-critiques), of several seeds, and says how many plain
pairs one pair with critiques is worth.

Accuracy counts a tie as wrong, as RewardBench does (Lambert et al., arXiv 2403.13787). Intervals
are percentiles of a bootstrap over prompts, since pairs over one prompt are not independent (of a
curve over prompts and seeds); p values are those of flipping the sign of the difference of each
prompt at random.

Sections, one with its step in README.md's journey of a pair:
    Arguments
    What scorers say
    Intervals and tests
    Probes
    Benchmarks
    What critiques do
    Length and calibration
    Comparison
    Curves
    8. Tables
    Pictures
    A page to look at
    The commands
"""

import argparse
import base64
import io
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from textwrap import fill

import numpy as np
import torch.distributed as dist

import critique_rm as rm
from critique_rm import (
    CritiqueRMError,
    Pair,
    PairScore,
    log,
    nonnegative_int,
    positive_int,
)

# --------------------------------------------------------------------------------------------------
# Arguments


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False, formatter_class=rm.HelpFormatter
    )
    parser.add_argument(
        "run",
        metavar="RUN",
        nargs="?",
        help="reward model: a folder of train.py, or another folder or Hub name",
    )
    add_actions(parser)
    add_input_arguments(parser)
    add_output_arguments(parser)
    return parser


def add_actions(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to do (exactly one)")
    add = group.add_mutually_exclusive_group(required=True).add_argument
    add(
        "--data",
        metavar="PAIRS",
        help="score the preference pairs of this file or Hub data set, and print the table",
    )
    add(
        "--answers",
        metavar="FILE",
        help="score the single answers of this file, and print a reward a line",
    )
    add(
        "--compare",
        metavar="SCORES",
        nargs=2,
        help="compare two models by their scores of the same pairs: two files of --save-scores, or "
        "scores-TEST.jsonl of two runs",
    )
    add(
        "--curve",
        metavar="RUN",
        nargs="+",
        help="print the accuracy of these runs of train.py over their number of training pairs",
    )


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("input").add_argument
    add(
        "--no-critiques",
        action="store_true",
        help="leave critiques out of the input, even if the model was trained with them",
    )
    add(
        "--critiques",
        metavar="FILE",
        help="take the critiques from this file instead; it is searched for the same pair, then "
        "for the same prompt and response",
    )
    add(
        "--skip-bad",
        action="store_true",
        help="leave out bad records and count them, instead of stopping at the first",
    )
    add(
        "--max-length-tokens",
        metavar="N",
        type=positive_int,
        help="longest input in tokens, critique included (default: as in training; for other "
        "models their own limit, at most 4,096)",
    )
    add(
        "--dtype",
        choices=rm.DTYPES,
        default="auto",
        help="number format to compute in; auto takes bfloat16 where the hardware has units for "
        "it, else float32",
    )
    add(
        "--compile",
        action="store_true",
        help="compile the model's blocks: a minute at the start, worth it for thousands of pairs",
    )
    add(
        "--micro-batch-tokens",
        metavar="N",
        type=positive_int,
        default=4096,
        help="tokens that a process computes at once",
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("table").add_argument
    add(
        "--probe",
        choices=PROBES,
        action="append",
        default=[],
        help="score the pairs again with their critiques changed in this way; may be given several "
        "times",
    )
    add(
        "--judge",
        metavar="FILE",
        action="append",
        default=[],
        help="show the verdicts that generate.py --task judge wrote into this file beside the "
        "model's; may be given several times",
    )
    add(
        "--seed",
        metavar="N",
        type=nonnegative_int,
        default=0,
        help="seed of the bootstrap, of the sign flips and of shuffling",
    )
    add = parser.add_argument_group("files to write").add_argument
    add("--json", metavar="FILE", help="all figures, as JSON (not with --answers)")
    add("--save-scores", metavar="FILE", help="the rewards of each pair, one line a pair")
    add("--audit", metavar="FILE", help="how each critique moves the reward, one line a critique")
    add("--html", metavar="FILE", help="a page for browsers, to look at tables and pairs")
    add(
        "--plot",
        metavar="FILE",
        help="a picture of the curve, as .png, .svg or .pdf (needs matplotlib)",
    )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    with_data = ("save_scores", "audit", "judge", "probe", "html", "critiques")
    if not args.data and any(getattr(args, name) for name in with_data):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in with_data)
        parser.error(f"{flags} go with --data")
    if args.answers and args.json:
        parser.error("--json does not go with --answers")
    if bool(args.run) == bool(args.compare or args.curve) or args.plot and not args.curve:
        parser.error("RUN goes with --data or --answers, and --plot with --curve")
    if args.plot and Path(args.plot).suffix.lower() not in PICTURES:
        parser.error(f"--plot {args.plot}: the name must end in {', '.join(PICTURES)}")
    outputs = (args.json, args.save_scores, args.audit, args.html, args.plot)
    for path in filter(None, outputs):  # before hours of scoring
        if not Path(path).absolute().parent.is_dir():
            parser.error(f"{path}: there is no such folder")
    return args


# --------------------------------------------------------------------------------------------------
# What scorers say


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
    values: np.ndarray | None = None  # (B, 2) of chosen and rejected; None of a judge
    ties: np.ndarray | None = None  # (B,) bool
    inconsistent: np.ndarray | None = None  # (B,) bool

    def within(self, subset: str) -> "Opinions":
        here = np.array([score.subset == subset for score in self.scores], bool)
        arrays = (self.correct, self.values, self.ties, self.inconsistent)
        return Opinions(
            self.scorer,
            [score for score, is_here in zip(self.scores, here) if is_here],
            *(array if array is None else array[here] for array in arrays),
        )

    def measure(self, subset: str, n_pairs: int, seed: int) -> Row:
        """Accuracy with interval, out of the `n_pairs` that there are."""
        prompt_ids = [score.prompt_id for score in self.scores]
        accuracy = float(self.correct.mean())
        low, high = bootstrap_interval(self.correct, prompt_ids, seed)
        if low is None:
            low, high = exact_interval(accuracy, len(set(prompt_ids)))
        return Row(
            scorer=self.scorer,
            subset=subset,
            pairs=len(self.scores),
            accuracy=accuracy,
            low=low,
            high=high,
            ties=None if self.ties is None else float(self.ties.mean()),
            inconsistent=None if self.inconsistent is None else float(self.inconsistent.mean()),
            coverage=len(self.scores) / n_pairs,
        )


def opinions_by(quantity: str, scorer: str, scores: list[PairScore], sign: int = 1) -> Opinions:
    """Prefers the response of which a field of PairScore is higher, or lower with `sign` -1."""
    values = np.zeros((len(scores), 2))
    for n, score in enumerate(scores):
        values[n] = [getattr(score, f"{side}_{quantity}") for side in rm.SIDES]
    values *= sign
    margins = values[:, 0] - values[:, 1]
    correct = (margins > 0).astype(float)
    return Opinions(scorer, scores, correct, values, ties=margins == 0)


def collect_opinions(
    scores: list[PairScore], judges: Sequence[str], probed: dict[str, list[PairScore]]
) -> list[Opinions]:
    """The reward model, also under probes, those that look at length alone, and the judges.

    Where a judge has left pairs out, the reward model has another row, on the same pairs.
    """
    reviewed = [s for s in scores if s.chosen_critique_words and s.rejected_critique_words]
    opinions = [opinions_by("reward", "reward model", scores)]
    for name, changed in probed.items():
        opinions.append(opinions_by("reward", name, changed))
    opinions += [
        opinions_by("words", "longer response", scores),
        opinions_by("words", "shorter response", scores, sign=-1),
        opinions_by("critique_words", "longer critique", reviewed),
    ]
    for path in judges:
        for judge in read_verdicts(path, scores, len(judges) > 1):
            opinions.append(judge)
            if len(judge.scores) < len(scores):
                name = f"reward model, pairs of {judge.scorer}"
                opinions.append(opinions_by("reward", name, judge.scores))
    return [opinion for opinion in opinions if opinion.scores]


def read_verdicts(
    path: str, scores: Sequence[PairScore | Pair], is_one_of_many: bool = False
) -> list[Opinions]:
    """Reads what `generate.py --task judge` wrote; a pair counts if both orders got an answer."""
    by_scorer: dict[str, dict[str, list[bool]]] = {}
    for where, row in rm.read_rows(path):
        try:
            answers = [row["verdicts"][order] for order in ("chosen_first", "rejected_first")]
            if not {*answers} <= {*rm.SIDES, None} or not isinstance(row["with_critiques"], bool):
                raise TypeError
            scorer = "judge with critiques" if row["with_critiques"] else "judge"
            scorer += f" ({path})" if is_one_of_many else ""
            if None not in answers:
                verdicts = by_scorer.setdefault(scorer, {})
                if row["id"] in verdicts:
                    raise CritiqueRMError(f"{where}: a second verdict on {row['id']!r}; keep one")
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


def read_scores(path: str) -> list[PairScore]:
    """Reads what --save-scores and train.py write."""
    scores: dict[str, PairScore] = {}
    for where, row in rm.read_rows(path):
        try:
            score = PairScore(**row)
        except TypeError:
            raise CritiqueRMError(f"{where}: not a line of --save-scores") from None
        rewards = (score.chosen_reward, score.rejected_reward)
        is_finite = all(type(r) in (int, float) and math.isfinite(r) for r in rewards)
        texts = (score.id, score.prompt_id, score.subset)
        if not is_finite or not all(isinstance(text, str) for text in texts):
            raise CritiqueRMError(
                f"{where}: not a line of --save-scores, or a reward is not finite"
            )
        if score.id in scores:
            raise CritiqueRMError(f"{where}: id {score.id!r} comes twice; keep one of the lines")
        scores[score.id] = score
    if not scores:
        raise CritiqueRMError(f"{path}: no score in it")
    return list(scores.values())


# --------------------------------------------------------------------------------------------------
# Intervals and tests

N_RESAMPLES = 2000
N_FLIPS = 9999
FLIPS_PER_BLOCK = 99  # at once: of 100,000 prompts all would take 8 GB
Figures = dict[str, np.ndarray]  # by name: the value, and those of N_RESAMPLES resamples


def resample(n: int, n_drawn: int, seed: int | list[int]) -> Iterator[np.ndarray]:
    """N_RESAMPLES times: how often each of n is drawn when some are drawn with replacement, (n,)."""
    rng = np.random.default_rng(seed)
    return (rng.multinomial(n_drawn, np.full(n, 1 / n)) for _ in range(N_RESAMPLES))


def resampled_mean(
    values: Sequence[float], prompt_ids: Sequence[str], seed: int, stratum: str = ""
) -> np.ndarray:
    """The mean of (B,) values, then that of each draw of as many prompts: (1 + N_RESAMPLES,).

    Draws of another stratum are others, so that figures of subsets can be added up.
    """
    _, prompt = np.unique(prompt_ids, return_inverse=True)
    n_of_prompt = np.bincount(prompt)
    sum_of_prompt = np.bincount(prompt, values)
    n_prompts = len(n_of_prompt)
    means = [np.mean(values)]
    for draw in resample(n_prompts, n_prompts, [seed, zlib.crc32(stratum.encode())]):
        means.append(draw @ sum_of_prompt / (draw @ n_of_prompt))
    return np.array(means)


def bootstrap_interval(
    correct: np.ndarray, prompt_ids: list[str], seed: int
) -> tuple[float | None, float | None]:
    """The 95 % percentile interval of the mean of (B,) values, prompts drawn with replacement."""
    _, prompt = np.unique(prompt_ids, return_inverse=True)
    n_pairs = np.bincount(prompt)  # (P,) of each prompt
    n_correct = np.bincount(prompt, correct)
    means = []
    for draw in resample(len(n_pairs), len(n_pairs), seed):
        means.append(draw @ n_correct / (draw @ n_pairs))
    return percentile_interval(means)


def percentile_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The middle 95 % of the values of resamples; none if they are all equal and so say nothing."""
    low, high = map(float, np.quantile(values, [0.025, 0.975]))
    return (low, high) if low < high else (None, None)


def exact_interval(accuracy: float, n: int) -> tuple[float | None, float | None]:
    """Of n prompts that are all right or all wrong (Clopper & Pearson 1934); else none."""
    end = 0.025 ** (1 / n)
    return {1.0: (end, 1.0), 0.0: (0.0, 1 - end)}.get(accuracy, (None, None))


def wilson_interval(accuracy: float, n: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy on n prompts, for n as small as one (Wilson 1927).

    As pairs over one prompt are not independent, each prompt counts once: rather too wide than
    too narrow.
    """
    z = 1.96  # standard deviations of a normal distribution, within which 95 % are
    share = z**2 / n
    middle = (accuracy + share / 2) / (1 + share)
    deviation = math.sqrt(accuracy * (1 - accuracy) / n + share / (4 * n))
    half_width = z * deviation / (1 + share)
    return max(0.0, middle - half_width), min(1.0, middle + half_width)


def sign_flip_p(differences: np.ndarray, prompt_ids: list[str], seed: int) -> float:
    """The two-sided p of no difference: how often random signs of prompts give as large a sum.

    A Monte Carlo permutation test; with its own draw counted, p is never 0 (Phipson & Smyth 2010).
    """
    _, cluster = np.unique(prompt_ids, return_inverse=True)
    sums = np.bincount(cluster, differences)
    sums = sums[sums != 0]
    rng = np.random.default_rng(seed)
    n_as_far = 1
    for _ in range(N_FLIPS // FLIPS_PER_BLOCK):
        signs = rng.choice([-1.0, 1.0], (FLIPS_PER_BLOCK, len(sums)))
        is_as_far = np.abs(signs @ sums) >= abs(sums.sum()) - 1e-9
        n_as_far += int(is_as_far.sum())
    return n_as_far / (1 + N_FLIPS)


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (1979): the smallest p times n, the next times n - 1, never decreasing."""
    p = np.array(p_values, float)
    order = np.argsort(p)
    factors = np.arange(len(p), 0, -1)  # n, n - 1, … 1
    rising = np.maximum.accumulate(p[order] * factors)
    adjusted = np.empty_like(p)
    adjusted[order] = rising.clip(max=1)
    return adjusted.tolist()


# --------------------------------------------------------------------------------------------------
# Probes

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
MIN_SHUFFLED_PAIRS = 10  # with one pair, shuffling a subset would be swapping


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

    A response that stands in several pairs of a group keeps one critique. Subsets of less than
    MIN_SHUFFLED_PAIRS are one.
    """
    sizes = Counter(pair.subset for pair in pairs)
    critiques: dict[tuple, tuple[str, ...]] = {}  # by place: subset, pair or group, side, index
    places = []
    for pair in pairs:
        subset = pair.subset if sizes[pair.subset] >= MIN_SHUFFLED_PAIRS else ""
        both = []
        for side, answer in zip(rm.SIDES, pair.answers):
            index = getattr(pair, f"{side}_index") if pair.group else 0
            both.append((subset, pair.group or pair.id, side, index))
            critiques[both[-1]] = answer.critiques
        places.append(both)
    rng = np.random.default_rng(seed)
    for subset in sorted({place[0] for place in critiques}):
        of_subset = [place for place in critiques if place[0] == subset]
        drawn = rng.permutation(len(of_subset))[: round(share * len(of_subset))]
        moved = [
            critiques[of_subset[k]] for k in np.roll(drawn, 1)
        ]  # round: none stays in its place
        critiques |= {of_subset[k]: texts for k, texts in zip(drawn, moved)}
    shuffled = []
    for pair, (chosen, rejected) in zip(pairs, places):
        new = {"chosen_critiques": critiques[chosen], "rejected_critiques": critiques[rejected]}
        shuffled.append(replace(pair, **new))
    return shuffled


# --------------------------------------------------------------------------------------------------
# Benchmarks

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
REWARDBENCH2 = ("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties")
RM_BENCH_DOMAINS = ("chat", "math", "code", "safety")
RM_BENCH_STYLES = ("concise", "detailed", "markdown")


@dataclass(frozen=True)
class Group:
    """What one scorer says of the responses of one record that lists several."""

    id: str
    prompt_id: str
    subset: str
    wins: np.ndarray  # (C, R) 1 where the chosen response comes out above the rejected one
    chosen: np.ndarray | None  # (C,) values; None of a judge, who only compares pairs
    rejected: np.ndarray | None  # (R,)

    @property
    def best_of_n(self) -> float:
        """The share of right responses among those with the highest value."""
        highest = max(self.chosen.max(), self.rejected.max())
        n_right = (self.chosen == highest).sum()
        return float(n_right / (n_right + (self.rejected == highest).sum()))


def collect_groups(opinions: Opinions, n_by_group: Counter[str]) -> list[Group]:
    """The groups of which all pairs were scored."""
    places: dict[str, list[int]] = {}
    for n, score in enumerate(opinions.scores):
        if score.group:
            places.setdefault(score.group, []).append(n)
    groups = []
    for group_id, numbers in places.items():
        scores = [opinions.scores[n] for n in numbers]
        if len(scores) < n_by_group[group_id]:
            continue
        rows = [score.chosen_index for score in scores]
        columns = [score.rejected_index for score in scores]
        wins = np.zeros((max(rows) + 1, max(columns) + 1))
        wins[rows, columns] = opinions.correct[numbers]
        chosen = rejected = None
        if opinions.values is not None:
            chosen, rejected = np.zeros(wins.shape[0]), np.zeros(wins.shape[1])
            chosen[rows], rejected[columns] = opinions.values[numbers].T
            restored = np.stack([chosen[rows], rejected[columns]], axis=1)
            if (restored != opinions.values[numbers]).any():  # critiques swapped within pairs
                chosen = rejected = None
        first = scores[0]
        groups.append(Group(group_id, first.prompt_id, first.subset, wins, chosen, rejected))
    return groups


def measure_benchmarks(opinions: Opinions, groups: list[Group], seed: int) -> dict[str, Figures]:
    """The official figures of each benchmark whose rows are there."""
    benchmarks = {
        "RewardBench 2": measure_rewardbench2(groups, seed),
        "RM-Bench": measure_rm_bench(groups, seed),
        "JudgeBench": measure_judgebench(opinions, seed),
    }
    return {name: figures for name, figures in benchmarks.items() if figures}


def measure_rewardbench2(groups: list[Group], seed: int) -> Figures:
    """Best of four in five subsets, Ties by its own rule, and the mean of the six.

    A prompt counts 1/k where the right response is among k with the highest value (Malik et al.,
    arXiv 2506.01937; rewardbench/utils.py).
    """
    figures = {}
    for subset in REWARDBENCH2:
        of_subset = [g for g in groups if g.subset == subset and g.chosen is not None]
        if subset == "Ties":
            of_subset = [g for g in of_subset if g.id.startswith(("ref:", "tied:"))]
        else:
            of_subset = [g for g in of_subset if g.wins.shape == (1, 3)]
        if of_subset and subset == "Ties":
            figures[subset] = score_ties(of_subset, seed)
        elif of_subset:
            ids = [g.prompt_id for g in of_subset]
            figures[subset] = resampled_mean([g.best_of_n for g in of_subset], ids, seed, subset)
    if len(figures) == len(REWARDBENCH2):
        figures = {"score": sum(figures.values()) / len(figures), **figures}
    return figures


def score_ties(groups: list[Group], seed: int) -> np.ndarray:
    """RewardBench 2's Ties: several right responses (tied:N) beside the same with one (ref:N).

    With gap the lowest right value less the highest wrong one (t of the tied row, f of the other),
    and d the spread of the tied row's right values:
    0.3 mean[t > 0] + 0.3 mean[f > 0] + 0.2 mean[t > d] + 0.2 mean[min(f, t) > d]
    + 0.01 mean tanh(min(f, t) / d − 1), where 0/0 counts 0.
    """
    gaps: dict[str, dict[str, float]] = {"tied": {}, "ref": {}}
    spread: dict[str, float] = {}
    for group in groups:
        kind, _, number = group.id.partition(":")
        gaps[kind][number] = group.chosen.min() - group.rejected.max()
        spread[number] = spread.get(number, 0.0)
        if kind == "tied":
            spread[number] = group.chosen.max() - group.chosen.min()
    both = [number for number in gaps["tied"] if number in gaps["ref"]]
    t = np.array([gaps["tied"][number] for number in both])
    f = np.array([gaps["ref"][number] for number in both])
    d = np.array([spread[number] for number in both])
    worse = np.minimum(f, t)
    with np.errstate(divide="ignore", invalid="ignore"):
        margin = np.nan_to_num(np.tanh(worse / d - 1), nan=0.0)
    terms = [(0.2, t > d, both), (0.2, worse > d, both), (0.01, margin, both)]
    for kind in ("tied", "ref"):
        is_accurate = np.array(list(gaps[kind].values())) > 0
        terms.append((0.3, is_accurate, list(gaps[kind])))
    score = np.zeros(1 + N_RESAMPLES)
    for weight, values, numbers in terms:
        if numbers:
            score += weight * resampled_mean(values, numbers, seed, "Ties")
    return score


def measure_rm_bench(groups: list[Group], seed: int) -> Figures:
    """Right and wrong answers in three styles each, plainest first (Liu et al., arXiv 2410.16184).

    hard: the wrong answer is the fancier one (above the diagonal of the matrix chosen × rejected),
    normal: on it, easy: below it. By domain, where the rows name them; safety is the mean of its
    two halves, overall of the four domains.
    """
    groups = select_rm_bench(groups)
    if not groups:
        return {}
    styles = np.arange(3)
    fancier = styles[None, :] - styles[:, None]  # style of rejected less that of chosen
    parts = {
        "hard": fancier > 0,
        "normal": fancier == 0,
        "easy": fancier < 0,
        "average": np.full((3, 3), True),
    }
    ids = [g.prompt_id for g in groups]
    figures = {}
    for name, part in parts.items():
        figures[name] = resampled_mean([g.wins[part].mean() for g in groups], ids, seed, "RM-Bench")
    by_domain: dict[str, list[np.ndarray]] = {}
    for subset in sorted({g.subset for g in groups}):
        of_subset = [g for g in groups if g.subset == subset]
        average = resampled_mean(
            [g.wins.mean() for g in of_subset], [g.prompt_id for g in of_subset], seed, subset
        )
        by_domain.setdefault(subset.partition("-")[0], []).append(average)
    for domain in RM_BENCH_DOMAINS:
        if domain in by_domain:
            figures[domain] = np.mean(by_domain[domain], axis=0)
    if by_domain.keys() >= {*RM_BENCH_DOMAINS}:
        figures["overall"] = np.mean([figures[domain] for domain in RM_BENCH_DOMAINS], axis=0)
    return figures


def select_rm_bench(groups: list[Group]) -> list[Group]:
    return [g for g in groups if g.wins.shape == (3, 3) and g.subset != "Ties"]


def measure_styles(scores: Sequence[PairScore], pairs: Sequence[Pair]) -> list[list[float]]:
    """RM-Bench's matrix: how often the reward model prefers chosen of style i to rejected of j.

    Chosen down, rejected across, plainest first; `pairs` are all that there are. Empty without rows
    of RM-Bench.
    """
    opinions = opinions_by("reward", "reward model", scores)
    n_by_group = Counter(pair.group for pair in pairs if pair.group)
    groups = select_rm_bench(collect_groups(opinions, n_by_group))
    if not groups:
        return []
    return np.mean([group.wins for group in groups], axis=0).tolist()


def measure_judgebench(opinions: Opinions, seed: int) -> Figures:
    """Accuracy by source, and over all pairs (Tan et al., arXiv 2410.12784)."""
    figures = {}
    ids = np.array([score.prompt_id for score in opinions.scores])
    subsets = np.array([score.subset for score in opinions.scores])
    for source in ("overall", *rm.JUDGEBENCH_SOURCES):
        here = np.isin(subsets, rm.JUDGEBENCH_SOURCES if source == "overall" else [source])
        if here.any():
            figures[source] = resampled_mean(opinions.correct[here], ids[here], seed, source)
    return figures


# --------------------------------------------------------------------------------------------------
# What critiques do

N_DRAWS = 200  # of critiques of a response
N_MISLEADING = 10  # critiques that are shown
N_ALIKE = 50  # critiques of responses about as long, to compare one with


def measure_critiques(scores: list[PairScore], seed: int) -> Figures:
    """Accuracy with 1, 2, … K critiques a response, drawn from its own, and by majority.

    With k: of the mean rewards of k drawn critiques, the mean over N_DRAWS draws; all there are
    where there are fewer. Majority: more than half of all pairs of a chosen critique's reward and a
    rejected one's are the right way round. Empty if no response has several.
    """
    n_most = max(len(r) for s in scores for r in (s.chosen_rewards, s.rejected_rewards))
    if n_most < 2:
        return {}
    rng, ids = np.random.default_rng(seed), [score.prompt_id for score in scores]
    figures = {}
    for k in range(1, n_most + 1):
        right = []
        for score in scores:
            sides = []
            for rewards in (score.chosen_rewards, score.rejected_rewards):
                order = rng.random((N_DRAWS, len(rewards))).argsort(axis=1)[:, :k]
                sides.append(np.array(rewards)[order].mean(axis=1))
            right.append((sides[0] > sides[1]).mean())
        figures[f"{k} critique{'s' if k > 1 else ''}, mean"] = resampled_mean(right, ids, seed)
    votes = [np.greater.outer(s.chosen_rewards, s.rejected_rewards).mean() > 0.5 for s in scores]
    figures[f"{n_most} critiques, majority"] = resampled_mean(votes, ids, seed)
    return figures


def audit_critiques(
    pairs: Sequence[Pair], scores: Sequence[PairScore], plain: Sequence[PairScore]
) -> list[dict]:
    """How each critique moves the reward, r(x, y, c) − r(x, y), and whether it misleads.

    `plain` are scores of the same pairs without critiques. A critique of a response that stands in
    several pairs comes once. It misleads if, compared with the usual shift for responses about as
    long, it moves the reward away from the label: a model that has always read critiques may go by
    length where there is none, and then any critique lifts a short response.
    """
    without = {score.id: score for score in plain}
    rows = {}
    for pair, score in zip(pairs, scores):
        if pair.id not in without:
            continue
        for side, answer in zip(rm.SIDES, pair.answers):
            before = getattr(without[pair.id], f"{side}_reward")
            rewards = getattr(score, f"{side}_rewards")
            for critique, reward in zip(answer.critiques, rewards):
                row = {
                    "id": pair.id,
                    "subset": pair.subset,
                    "side": side,
                    **rm.write_prompt(pair.prompt),
                    "response": answer.message.text,
                    "words": getattr(score, f"{side}_words"),
                    "critique": critique,
                    "reward": reward,
                    "reward_without": before,
                    "shift": reward - before,
                }
                rows.setdefault((pair.prompt, side, answer.message, critique), row)
    audit = list(rows.values())
    for row, usual_shift in zip(audit, find_usual_shifts(audit)):
        row["usual_shift"] = usual_shift
        row["misleads"] = towards_label(row["side"], unusual_shift(row)) < 0
    return audit


def find_usual_shifts(audit: list[dict], n_alike: int = N_ALIKE) -> list[float]:
    """For each critique the mean shift of the `n_alike` whose responses are nearest in length."""
    by_length = sorted(range(len(audit)), key=lambda n: audit[n]["words"])
    shifts = np.array([audit[n]["shift"] for n in by_length])
    n_alike = min(n_alike, len(audit))
    usual = [0.0] * len(audit)
    for place, n in enumerate(by_length):
        start = place - n_alike // 2
        start = min(max(start, 0), len(audit) - n_alike)
        usual[n] = float(shifts[start : start + n_alike].mean())
    return usual


def unusual_shift(row: dict) -> float:
    """How far a critique moves the reward beyond what is usual for the length of its response."""
    return row["shift"] - row["usual_shift"]


def towards_label(side: str, shift: float) -> float:
    """A shift of a reward, positive if it is one towards the label."""
    return shift if side == "chosen" else -shift


def find_most_misleading(audit: list[dict]) -> list[dict]:
    misleading = [row for row in audit if row["misleads"]]
    return sorted(misleading, key=lambda row: -abs(unusual_shift(row)))[:N_MISLEADING]


def summarize_audit(audit: list[dict]) -> dict[str, tuple[int, int, int]]:
    """By subset: the number of critiques, of shifts towards the label, and of those not misleading."""
    counts: dict[str, tuple[int, int, int]] = {}
    for row in audit:
        n, n_towards, n_right = counts.get(row["subset"], (0, 0, 0))
        is_towards = towards_label(row["side"], row["shift"]) >= 0
        counts[row["subset"]] = (n + 1, n_towards + is_towards, n_right + (not row["misleads"]))
    return counts


# --------------------------------------------------------------------------------------------------
# Length and calibration


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
    figures["expected calibration error"] = calibration_error(scores)
    for subset in sorted({s.subset for s in scores}):
        rewards = [(s.chosen_reward + s.rejected_reward) / 2 for s in scores if s.subset == subset]
        figures["mean reward" + (f", {subset}" if subset else "")] = np.mean(rewards)
    return {name: float(value) for name, value in figures.items()}


def margins_and_lengths(scores: list[PairScore]) -> tuple[np.ndarray, np.ndarray]:
    """(B,) each: reward and words of chosen less those of rejected."""
    margin = [s.chosen_reward - s.rejected_reward for s in scores]
    return np.array(margin), np.array([s.chosen_words - s.rejected_words for s in scores])


@dataclass(frozen=True)
class Bin:
    """The pairs whose confidence, σ(|margin|), lies in one tenth of the range from 0.5 to 1."""

    start: float  # of that tenth
    pairs: int
    confidence: float  # the mean
    accuracy: float
    low: float  # ends of the 95 % interval of the accuracy
    high: float


def calibrate(scores: list[PairScore], n_bins: int = 10) -> list[Bin]:
    """The bins of equal width that hold any pair, by rising confidence in the response preferred."""
    margin, _ = margins_and_lengths(scores)
    confidence = 1 / (1 + np.exp(-np.abs(margin)))  # from 0.5 to 1
    share_of_range = 2 * confidence - 1
    numbers = np.minimum(share_of_range * n_bins, n_bins - 1).astype(int)
    prompt_ids = np.array([score.prompt_id for score in scores])
    bins = []
    for number in np.unique(numbers):
        here = numbers == number
        accuracy = float((margin[here] > 0).mean())
        low, high = wilson_interval(accuracy, len(set(prompt_ids[here])))
        bins.append(
            Bin(
                start=0.5 + 0.5 * number / n_bins,
                pairs=int(here.sum()),
                confidence=float(confidence[here].mean()),
                accuracy=accuracy,
                low=low,
                high=high,
            )
        )
    return bins


def calibration_error(scores: list[PairScore]) -> float:
    """Of σ(|margin|), the confidence in the response preferred (Guo et al., arXiv 1706.04599).

    The mean distance of confidence and accuracy in bins of equal width from 0.5 to 1.
    """
    distances = [b.pairs * abs(b.accuracy - b.confidence) for b in calibrate(scores)]
    return sum(distances) / len(scores)


# --------------------------------------------------------------------------------------------------
# Comparison


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
    log(f"{n} pairs in both; {len(a) - n} only in A, {len(b) - n} in B")
    if not common or any(one.prompt_id != other.prompt_id for one, other in common):
        raise CritiqueRMError(
            "the two files do not hold scores of the same pairs; score one file twice"
        )
    subsets = np.array([one.subset for one, _ in common])
    prompts = np.array([one.prompt_id for one, _ in common])
    right = np.array([[s.chosen_reward > s.rejected_reward for s in two] for two in common], float)

    def difference_in(name: str, selected: np.ndarray) -> Difference:
        of_a, of_b = right[selected].T  # (n,) 1 where the scorer is right
        low, high = bootstrap_interval(of_a - of_b, prompts[selected], seed)
        accuracy_a = float(of_a.mean())
        accuracy_b = float(of_b.mean())
        return Difference(
            subset=name,
            pairs=len(of_a),
            accuracy_of_A=accuracy_a,
            accuracy_of_B=accuracy_b,
            difference=accuracy_a - accuracy_b,
            low=low,
            high=high,
            p=sign_flip_p(of_a - of_b, prompts[selected], seed),
            only_A_right=int((of_a > of_b).sum()),
            only_B_right=int((of_b > of_a).sum()),
        )

    whole = difference_in("all", np.full(n, True))
    names = sorted(set(subsets))
    if len(names) == 1:
        return [whole]
    rows = [difference_in(name or "(none)", subsets == name) for name in names]
    adjusted = adjust_holm([row.p for row in rows])
    return [whole, *(replace(row, p=p) for row, p in zip(rows, adjusted))]


# --------------------------------------------------------------------------------------------------
# Curves


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


@dataclass(frozen=True)
class Worth:
    """Plain pairs that one pair with critiques is worth, and the ends of the 95 % interval.

    0 is less than the smallest number that was measured, None more than the largest.
    """

    value: float | None
    low: float | None
    high: float | None
    smallest: float  # measured numbers of plain pairs, for each pair with critiques
    largest: float

    def __str__(self) -> str:
        return f"{self._show(self.value)} ({self._show(self.low)} to {self._show(self.high)})"

    def _show(self, worth: float | None) -> str:
        """Never beyond what was measured."""
        if worth is None:
            return f"more than {self.largest:.3g}"
        return f"less than {self.smallest:.3g}" if worth == 0 else f"{worth:.3g}"


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
    more_than_none: Estimate | None = None  # accuracy, after as many pairs
    worth_in_plain_pairs: Worth | None = None


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
            n_pairs = record["training_pairs"]
            seed = arguments["seed"]
            if type(n_pairs) is not int or n_pairs < 1:
                raise ValueError
        except (OSError, ValueError, LookupError, TypeError):
            problem = "not a finished run, or one of an older train.py; run it again"
            raise CritiqueRMError(f"{folder}: {problem}") from None
        key = "none" if arguments["no_critiques"] else critiques, n_pairs
        common = common or settings
        if settings != common:
            raise CritiqueRMError(f"{folder}: trained with {settings}, the first with {common}")
        for path in sorted(folder.glob("scores-*.jsonl")):
            seeds = tests.setdefault(path.stem.removeprefix("scores-"), {}).setdefault(key, {})
            if seed in seeds:
                raise CritiqueRMError(f"{folder}: another run has its seed, pairs and critiques")
            seeds[seed] = read_scores(str(path))
    return tests


def measure_curve(test: str, runs: Runs, seed: int) -> list[Point]:
    """The points of all curves on one test file, and what critiques add and are worth."""
    runs = dict(sorted(runs.items(), key=lambda item: (item[0][0] != "none", item[0])))
    common = find_common_pairs(test, runs)
    accuracy = resample_accuracy(runs, common, seed)
    if any(len(by_seed) == 1 for by_seed in runs.values()):
        log(f"{test}: the interval of a single seed is over prompts alone; seeds differ, run more")
    plain = {size: values for (critiques, size), values in accuracy.items() if critiques == "none"}
    points = []
    for (critiques, size), values in accuracy.items():
        low, high = percentile_interval(values[1:])
        if low is None:
            n_prompts = len({score.prompt_id for score in common})
            low, high = exact_interval(values[0], n_prompts)
        more = worth = None
        if critiques != "none" and size in plain:
            more = estimate(values - plain[size])
        if critiques != "none" and len(plain) > 1:
            worth = measure_worth(values, size, plain)
        point = Point(
            test=test,
            critiques=critiques,
            training_pairs=size,
            seeds=len(runs[critiques, size]),
            test_pairs=len(common),
            accuracy=float(values[0]),
            low=low,
            high=high,
            more_than_none=more,
            worth_in_plain_pairs=worth,
        )
        points.append(point)
    return points


def find_common_pairs(test: str, runs: Runs) -> list[PairScore]:
    """The scores of one run for the pairs that all runs have scored."""
    all_scores = [scores for by_seed in runs.values() for scores in by_seed.values()]
    pairs_of_runs = [{(s.id, s.prompt_id) for s in scores} for scores in all_scores]
    in_all = set.intersection(*pairs_of_runs)
    common = [s for s in all_scores[0] if (s.id, s.prompt_id) in in_all]
    n_left_out = max(map(len, all_scores)) - len(common)
    if n_left_out:
        log(f"{test}: {n_left_out} pairs are left out, as some run has not scored them")
    if not common:
        raise CritiqueRMError(f"the runs have no pair of {test} in common; give them one test file")
    return common


def resample_accuracy(
    runs: Runs, common: list[PairScore], seed: int
) -> dict[tuple[str, int], np.ndarray]:
    """For each point the mean accuracy over seeds: of the data, then of N_RESAMPLES resamples.

    Prompts and seeds are resampled, for all runs with the same seeds alike, so that the intervals
    of a difference and of the worth are paired ones.
    Of n seeds n - 1 are drawn, which makes the variance of their mean the unbiased one (McCarthy &
    Snowden 1985); with n drawn, three seeds would look a third less different than they are.
    """
    _, prompt = np.unique([score.prompt_id for score in common], return_inverse=True)
    n_pairs = np.bincount(prompt)  # (P,) of each prompt
    prompt_draws = data_and_resamples(len(n_pairs), len(n_pairs), seed)  # (1 + N_RESAMPLES, P)
    accuracy = {}
    for key, by_seed in runs.items():
        n_correct = []  # of each seed, by prompt
        for _, scores in sorted(by_seed.items()):
            correct = {s.id: s.chosen_reward > s.rejected_reward for s in scores}
            n_correct.append(np.bincount(prompt, [correct[score.id] for score in common]))
        by_draw = prompt_draws @ np.transpose(n_correct)  # (1 + N_RESAMPLES, seeds)
        by_draw = by_draw / (prompt_draws @ n_pairs)[:, None]
        n_drawn = max(1, len(by_seed) - 1)
        seed_draws = data_and_resamples(len(by_seed), n_drawn, seed + 1)
        accuracy[key] = (by_draw * seed_draws).sum(1) / seed_draws.sum(1)
    return accuracy


def data_and_resamples(n: int, n_drawn: int, seed: int) -> np.ndarray:
    """How often each of n comes in the data, once, and in the resamples, (1 + N_RESAMPLES, n)."""
    return np.stack([np.ones(n, int), *resample(n, n_drawn, seed)])


def estimate(values: np.ndarray) -> Estimate:
    """The value of the data, which comes first, and the middle 95 % of the resamples'."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Estimate(float(values[0]), float(low), float(high))


def measure_worth(values: np.ndarray, n_pairs: int, plain: dict[int, np.ndarray]) -> Worth:
    """How many plain pairs give the accuracy of `n_pairs` with critiques, over `n_pairs`."""
    sizes = list(plain)
    curves = np.stack(list(plain.values()), 1)  # (1 + N_RESAMPLES, sizes)
    worths = []
    for accuracy, curve in zip(values, curves):
        worths.append(equal_pairs(accuracy, sizes, curve) / n_pairs)
    low, high = np.quantile(worths[1:], [0.025, 0.975], method="nearest")
    ends = []
    for worth in (worths[0], low, high):
        is_measured = worth != np.inf
        ends.append(float(worth) if is_measured else None)
    return Worth(*ends, smallest=sizes[0] / n_pairs, largest=sizes[-1] / n_pairs)


def equal_pairs(accuracy: float, sizes: Sequence[int], curve: np.ndarray) -> float:
    """Where a curve over log N first reaches an accuracy; 0 or infinity if that is off its ends."""
    k = int(np.argmax(curve >= accuracy))
    if curve[k] < accuracy:
        return float(np.inf)
    if k == 0:
        return float(sizes[0]) if curve[0] == accuracy else 0.0
    share_of_step = (accuracy - curve[k - 1]) / (curve[k] - curve[k - 1])
    growth = sizes[k] / sizes[k - 1]
    return float(sizes[k - 1] * growth**share_of_step)


# --------------------------------------------------------------------------------------------------
# 8. Tables


def tabulate(
    scores: list[PairScore],
    pairs: Sequence[Pair | PairScore] | None = None,
    judges: Sequence[str] = (),
    seed: int = 0,
    probed: dict[str, list[PairScore]] | None = None,
) -> list[Row]:
    """All rows of the table: for each scorer overall, by subset, by RewardBench section, benchmark.

    `pairs` are all that there are, of which some may not have been scored.
    """
    rows = []
    pairs = scores if pairs is None else pairs
    n_by_subset = Counter(pair.subset for pair in pairs)
    n_by_group = Counter(pair.group for pair in pairs if pair.group)
    for opinions in collect_opinions(scores, judges, probed or {}):
        rows.append(opinions.measure("all", n_by_subset.total(), seed))
        by_subset = []
        for subset, n in sorted(n_by_subset.items()) if len(n_by_subset) > 1 else ():
            of_subset = opinions.within(subset)
            if of_subset.scores:
                by_subset.append(of_subset.measure(subset or "(none)", n, seed))
        accuracy = {row.subset: row.accuracy for row in by_subset}
        rows += by_subset + rewardbench_rows(opinions.scorer, accuracy)
        rows += group_rows(opinions, n_by_group, seed)
    return rows + critique_rows(scores, seed)


def group_rows(opinions: Opinions, n_by_group: Counter[str], seed: int) -> list[Row]:
    """Best of n over the records that list several responses, and the figures of benchmarks."""
    groups = collect_groups(opinions, n_by_group)
    rows = []
    if opinions.scorer == "reward model" and len(groups) < len(n_by_group):
        n_left_out = len(n_by_group) - len(groups)
        log(
            f"{n_left_out} of {len(n_by_group)} lists of responses are incomplete: not in best of n"
        )
    if groups and all(group.chosen is not None for group in groups):
        ids = [group.prompt_id for group in groups]
        figure = resampled_mean([group.best_of_n for group in groups], ids, seed)
        rows.append(figure_row(opinions.scorer, "best of n", len(groups), figure))
    for benchmark, figures in measure_benchmarks(opinions, groups, seed).items():
        for name, figure in figures.items():
            rows.append(figure_row(opinions.scorer, f"{benchmark}: {name}", None, figure))
    return rows


def critique_rows(scores: list[PairScore], seed: int) -> list[Row]:
    figures = measure_critiques(scores, seed)
    return [figure_row("reward model", name, len(scores), f) for name, f in figures.items()]


def benchmarks_as_dict(rows: Sequence[Row], styles: list[list[float]]) -> dict[str, dict]:
    """The reward model's figures of benchmarks, and RM-Bench's matrix, for --json."""
    benchmarks: dict[str, dict] = {}
    for row in rows:
        benchmark, colon, name = row.subset.partition(": ")
        if row.scorer == "reward model" and colon and row.pairs is None:
            figure = {"value": row.accuracy, "low": row.low, "high": row.high}
            benchmarks.setdefault(benchmark, {})[name] = figure
    if styles:
        benchmarks["RM-Bench"]["matrix"] = styles
    return benchmarks


def figure_row(scorer: str, name: str, n: int | None, figure: np.ndarray) -> Row:
    low, high = percentile_interval(figure[1:])
    return Row(scorer, name, n, float(figure[0]), low, high)


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


Columns = dict[str, list[str]]  # a table: the cells below each heading


def to_wide(rows: Sequence[Row]) -> list[Columns | str]:
    """The table that people read: subsets down, scorers across, the first with its interval.

    After it a list of notes in Markdown, if there are any.
    """
    scorers = list(dict.fromkeys(row.scorer for row in rows))
    cells = {(row.subset, row.scorer): row for row in rows}
    subsets = list(dict.fromkeys(row.subset for row in rows))
    first = [cells.get((subset, scorers[0])) for subset in subsets]
    columns = {"": subsets, "n": [show(row and row.pairs) for row in first]}
    for scorer in scorers:
        column = [cells.get((subset, scorer)) for subset in subsets]
        columns[SHORT_NAMES.get(scorer, scorer)] = [
            f"{row.accuracy:.3f}" if row else "" for row in column
        ]
        if scorer == scorers[0]:
            columns["95 % interval"] = [show_interval(row) if row else "" for row in first]
    notes = []
    for row in rows:
        if row.subset == "all":
            notes += note_of(row)
    return [columns, "\n".join(notes)] if notes else [columns]


SHORT_NAMES = {  # the table is to fit a screen
    "longer response": "longer",
    "shorter response": "shorter",
    **{f"reward model, {probe}": probe for probe in PROBES},
}


def note_of(row: Row) -> list[str]:
    """What else there is to know of a scorer: a line, if there is."""
    known = []
    if row.ties and "longer" not in row.scorer and "shorter" not in row.scorer:
        known.append(f"{row.ties:.1%} ties, which count as wrong")
    if row.inconsistent is not None:
        known.append(f"{row.inconsistent:.1%} of the verdicts change with the order")
    if row.coverage is not None and row.coverage < 1:
        known.append(f"{row.coverage:.1%} of the pairs")
    return [f"- {row.scorer}: {', '.join(known)}"] if known else []


def show_styles(styles: list[list[float]]) -> Columns:
    """RM-Bench's matrix as a table."""
    columns = {"RM-Bench: chosen is": list(RM_BENCH_STYLES)}
    for style, accuracies in zip(RM_BENCH_STYLES, zip(*styles)):
        columns[f"rejected is {style}"] = [f"{accuracy:.3f}" for accuracy in accuracies]
    return columns


def show_audit(audit: list[dict]) -> Columns:
    """How many critiques move the reward towards the label, by subset."""
    counts = summarize_audit(audit)
    columns = {
        "critiques": [subset or "(all)" for subset in counts],
        "n": [],
        "towards the label": [],
        "more than is usual for the length": [],
    }
    for n, n_towards, n_right in counts.values():
        columns["n"].append(str(n))
        columns["towards the label"].append(f"{n_towards / n:.3f}")
        columns["more than is usual for the length"].append(f"{n_right / n:.3f}")
    return columns


def show_most_misleading(audit: list[dict]) -> str:
    lines = ["Critiques that mislead most (shift of the reward beyond what is usual):"]
    for row in find_most_misleading(audit):
        text = to_cell(row["critique"])
        text = text if len(text) <= 160 else text[:157] + "..."
        lines.append(f"- {row['id']}, {row['side']}, {unusual_shift(row):+.2f}: {text}")
    return "\n".join(lines)


def show_interval(row: Row | Difference | Point) -> str:
    return "" if row.low is None else f"{row.low:.3f} to {row.high:.3f}"


def to_markdown(rows: Sequence[Row | Difference | Point]) -> str:
    """A table with a column for each field that any of the rows fills."""
    columns = {}
    for name in (field.name for field in fields(rows[0])):
        values = [getattr(row, name) for row in rows]
        if name == "low":
            name = "95 % interval"
            values = [show_interval(row) for row in rows]
        if name != "high" and not all(value in (None, "") for value in values):
            columns[name.replace("_", " ")] = [show(value) for value in values]
    return layout(columns)


def show(value: object) -> str:
    if value is None or value is False:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def to_text(blocks: Sequence[Columns | str]) -> str:
    """Tables and paragraphs as one Markdown text."""
    return "\n\n".join(b if isinstance(b, str) else layout(b) for b in blocks)


def layout(columns: Columns) -> str:
    """Columns of text as a Markdown table, whatever the text."""
    lines = [list(columns), ["---"] * len(columns), *zip(*columns.values())]
    return "\n".join("| " + " | ".join(map(to_cell, line)) + " |" for line in lines)


def to_cell(text: str) -> str:
    """Text that cannot end a cell or a line of a table: white space and control characters."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(printable.split()).replace("|", "\\|")


# --------------------------------------------------------------------------------------------------
# Pictures

PICTURES = (".png", ".svg", ".pdf")
# Colours that colour-blind people tell apart (Okabe & Ito 2008). Black is no critiques, which come
# first in a curve.
COLORS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "osD^vPX"


def import_figure():
    """matplotlib's class of figures, which needs no screen; None if it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure


def plot_curve(points: Sequence[Point]):
    """A row for each test: accuracy over training pairs, and how much of it critiques add.

    Returns a figure of matplotlib; without differences it has the first column only.
    """
    figure_class = import_figure()
    if figure_class is None:
        raise CritiqueRMError("--plot needs matplotlib; run: pip install matplotlib")
    tests = list(dict.fromkeys(point.test for point in points))
    kinds = list(dict.fromkeys(point.critiques for point in points))
    n_columns = 2 if any(point.more_than_none for point in points) else 1
    size = (1 + 4.8 * n_columns, 1 + 3.4 * len(tests))  # inches
    figure = figure_class(figsize=size, layout="constrained")
    rows = figure.subplots(len(tests), n_columns, squeeze=False)
    legend = {}  # a line by its name
    for test, axes in zip(tests, rows):
        of_test = [point for point in points if point.test == test]
        legend |= draw_accuracy(axes[0], of_test, kinds)
        if n_columns == 2:
            draw_difference(axes[1], of_test, kinds)
    longest = max(map(len, legend))
    n_across = max(1, 40 * n_columns // (longest + 8))
    place = "outside lower center"
    figure.legend(legend.values(), legend, title="critiques", loc=place, ncols=n_across)
    figure.suptitle(describe_intervals(points), fontsize="medium")
    return figure


def draw_accuracy(axes, points: Sequence[Point], kinds: Sequence[str]) -> dict:
    """Of one test, by kind of critiques. Returns the lines by name."""
    estimates = {}
    for p in points:
        low, high = (p.accuracy, p.accuracy) if p.low is None else (p.low, p.high)
        estimates[p.critiques, p.training_pairs] = Estimate(p.accuracy, low, high)
    chance = axes.axhline(0.5, color="gray", linestyle=":")
    title = f"{points[0].test}, {points[0].test_pairs} pairs"
    axes.set(title=fill(title, 45), ylabel="accuracy")
    return {"chance": chance, **draw_curves(axes, estimates, points, kinds)}


def draw_difference(axes, points: Sequence[Point], kinds: Sequence[str]) -> None:
    """What each kind of critiques adds to the accuracy without, after as many pairs."""
    estimates = {}
    for p in points:
        if p.more_than_none:
            estimates[p.critiques, p.training_pairs] = p.more_than_none
    axes.axhline(0, color="gray", linewidth=1)
    draw_curves(axes, estimates, points, kinds)
    title = f"{points[0].test}: with critiques minus without"
    axes.set(title=fill(title, 45), ylabel="difference in accuracy")


def describe_intervals(points: Sequence[Point]) -> str:
    seeds = sorted({point.seeds for point in points})
    if seeds == [1]:
        return "One seed; 95 % intervals over prompts"
    numbers = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return f"Means of {numbers} seeds; 95 % intervals over prompts and seeds"


def draw_curves(
    axes,
    estimates: dict[tuple[str, int], Estimate],
    points: Sequence[Point],
    kinds: Sequence[str],
) -> dict:
    """Estimates by kind of critiques and number of training pairs. Returns a line for each kind.

    Kinds lie a little side by side, so that no interval hides another.
    """
    sizes = sorted({point.training_pairs for point in points})
    width = math.log(sizes[-1] / sizes[0])  # of the axis, which is logarithmic
    step = 0.015 * width or 0.1
    lines = {}
    for n, kind in enumerate(kinds):
        curve = {size: estimates[kind, size] for size in sizes if (kind, size) in estimates}
        if not curve:
            continue
        color = COLORS[n % len(COLORS)]
        marker = MARKERS[n % len(MARKERS)]
        shift = math.exp(step * (n - (len(kinds) - 1) / 2))
        x = [size * shift for size in curve]
        values = [estimate.value for estimate in curve.values()]
        lows = [estimate.low for estimate in curve.values()]
        highs = [estimate.high for estimate in curve.values()]
        (lines[kind],) = axes.plot(x, values, color=color, marker=marker, markersize=5)
        axes.vlines(x, lows, highs, color=color, linewidth=1)
    axes.set(xscale="log", xlabel="training pairs")
    axes.set_xticks(sizes, label_sizes(sizes))
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    return lines


def label_sizes(sizes: Sequence[int]) -> list[str]:
    """The texts of ticks on a logarithmic axis, empty where one would touch that to its right."""
    least_ratio = (sizes[-1] / sizes[0]) ** (1 / 9)  # a ninth of the axis has room for six digits
    labels = []
    right = math.inf
    for size in reversed(sizes):
        has_room = right / size >= least_ratio
        labels.append(str(size) if has_room else "")
        right = size if has_room else right
    return labels[::-1]


def plot_scores(scores: list[PairScore]) -> dict[str, str]:
    """The page's pictures by name, as URLs that hold them; none without matplotlib."""
    if import_figure() is None:
        return {}
    return {
        "margins by length": to_url(plot_lengths(scores)),
        "calibration": to_url(plot_calibration(scores)),
    }


def to_url(figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, dpi=100)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def plot_lengths(scores: list[PairScore]):
    """Does the longer response get the higher reward? A figure of matplotlib."""
    margin, longer = margins_and_lengths(scores)
    figure = import_figure()(figsize=(5, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="gray", linewidth=1)
    axes.scatter(longer, margin, s=10, color=COLORS[1], alpha=0.6, linewidths=0)
    axes.set(title="Margins by length", ylabel="margin of rewards")
    axes.set(xlabel="words of chosen less those of rejected")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_calibration(scores: list[PairScore]):
    """Is the model right as often as it is confident, and how many pairs say so? A figure."""
    bins = calibrate(scores)
    confidence = [b.confidence for b in bins]
    figure = import_figure()(figsize=(5, 4.4), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    above.plot([0.5, 1], [0.5, 1], color="gray", linewidth=1)
    # Not joined: a bin of few pairs says little, and a line would give it as much weight.
    above.vlines(confidence, [b.low for b in bins], [b.high for b in bins], color=COLORS[1])
    above.plot(confidence, [b.accuracy for b in bins], "o", color=COLORS[1])
    above.set(title="Calibration, 95 % intervals", ylabel="accuracy", ylim=(-0.03, 1.03))
    bars = below.bar(
        [b.start for b in bins], [b.pairs for b in bins], 0.046, align="edge", color=COLORS[6]
    )
    below.bar_label(bars, fontsize=8)
    below.margins(y=0.3)
    below.set(xlabel="confidence: σ(|margin|)", ylabel="pairs", xlim=(0.49, 1.01))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


# --------------------------------------------------------------------------------------------------
# A page to look at

# The data takes the place of __DATA__; what it holds becomes text (`textContent`), never HTML.
PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none';
  style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<title>Rewards</title>
<style>
:root {
  color-scheme: light dark;
  --page: #fff; --text: #1b1b1b; --faint: #666; --line: #d4d4d4; --right: #0072b2; --wrong: #c44e00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #16181b; --text: #e6e6e6; --faint: #a0a0a0; --line: #3b3f45;
    --right: #56b4e9; --wrong: #f08a4b;
  }
  img { filter: invert(.9) hue-rotate(180deg) }  /* white becomes dark, blue stays blue */
}
body {
  font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem;
  background: var(--page); color: var(--text);
}
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: inherit }
a { color: inherit }
h1 { font-size: 1.5rem; margin: 0 0 .5rem }
h2, h3 { font-size: 1rem; margin: 0 0 .4rem; overflow-wrap: anywhere }
h2 span { font-weight: normal; color: var(--faint) }
h3 { color: var(--faint); font-weight: normal }
pre + h3 { margin-top: 1rem }
summary { cursor: pointer; padding: .3rem 0 }
table { display: block; overflow-x: auto; border-collapse: collapse; margin: 1rem 0 }
th, td { border-bottom: 1px solid var(--line); padding: .15rem .8rem .15rem 0; text-align: left }
td { font-variant-numeric: tabular-nums }
img { max-width: 100%; background: #fff }
input, select { font: inherit; max-width: 100% }
#controls {
  display: flex; flex-wrap: wrap; align-items: baseline; gap: .3rem 1rem; padding: .6rem 0;
  background: var(--page); border-bottom: 1px solid var(--line);
}
@media (min-width: 50rem) {
  #controls { position: sticky; top: 0; z-index: 1 }
  article { scroll-margin-top: 4rem }
}
article {
  border: 1px solid var(--line); border-left: 5px solid var(--right); border-radius: 5px;
  margin: 1rem 0; padding: 1rem;
}
article.wrong { border-left-color: var(--wrong) }
article:target { outline: 2px solid var(--text) }
.bar {
  display: inline-block; position: relative; width: 8rem; height: .6rem; margin-left: .4rem;
  background: var(--line);
}
.bar::after { content: ""; position: absolute; inset: -.2rem 50%; border-left: 1px solid var(--text) }
.bar i { display: block; position: relative; height: 100%; background: var(--right) }
.wrong .bar i { background: var(--wrong) }
.two {
  display: grid; gap: 1.5rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr));
}
.critique, .shift { border-left: 3px solid var(--line); padding-left: .7rem }
.critique { color: var(--faint); margin-top: .7rem }
.misleads, .shift { border-color: var(--wrong) }
.shift { color: var(--wrong); margin: 0 }
</style>
<h1>Rewards</h1>
<details><summary>Tables and pictures</summary><section id="tables"></section></details>
<details id="misleading" hidden><summary>Critiques that mislead most</summary></details>
<div id="controls">
<label>search <input id="search" type="search" size="24"></label>
<label>subset <select id="subset"><option value="">all</option></select></label>
<label>show <select id="side"><option value="">all</option><option>right</option>
<option>wrong</option></select></label>
<label>order <select id="order"><option value="1">lowest margin first</option>
<option value="-1">highest margin first</option></select></label>
<output id="count"></output>
</div>
<main id="pairs"></main>
<div id="end"></div>
<script type="application/json" id="data">__DATA__</script>
<script>
"use strict";
const get = id => document.getElementById(id);
const {tables, pictures, misleading, pairs} = JSON.parse(get("data").textContent);
const main = get("pairs");
const end = get("end");

for (const pair of pairs) {
  const sides = [pair.chosen, pair.rejected];
  const texts = sides.flatMap(side => [side.response, ...side.critiques]);
  pair.margin = pair.chosen.reward - pair.rejected.reward;
  pair.words = [pair.id, pair.prompt, ...texts].join("\n").toLowerCase();
}
const widest = pairs.reduce((most, pair) => Math.max(most, Math.abs(pair.margin)), 0) || 1;

function add(parent, tag, text = "", name = "") {
  const element = parent.appendChild(document.createElement(tag));
  element.textContent = text;  // never innerHTML: what the data holds stays text
  element.className = name;
  return element;
}

function signed(number) {
  return (number > 0 ? "+" : "") + number.toFixed(3);
}

// Above the pairs: tables, as columns of a heading and cells, paragraphs, pictures.

function addTable(parent, columns) {
  const table = add(parent, "table");
  const head = add(table, "tr");
  for (const [heading] of columns) add(head, "th", heading);
  const [, firstCells] = columns[0];
  for (const n of firstCells.keys()) {
    const row = add(table, "tr");
    for (const [, cells] of columns) add(row, "td", cells[n]);
  }
}

for (const block of tables) {
  if (typeof block === "string") add(get("tables"), "pre", block);
  else addTable(get("tables"), block);
}
for (const [name, url] of Object.entries(pictures)) {
  const image = add(get("tables"), "img");
  image.alt = name;
  image.src = url;
}
if (misleading) {  // there was an audit
  get("misleading").hidden = false;
  for (const row of misleading) {
    const article = add(get("misleading"), "article", "", "wrong");
    addLink(add(article, "h2"), row.id, `${row.subset} · ${row.side}`);
    add(article, "pre", row.prompt);
    add(article, "h3", "response");
    add(article, "pre", row.response);
    addCritique(article, row.critique, row.shift - row.usual_shift);
  }
}

// One pair.

function addLink(heading, id, text) {
  add(heading, "a", id).href = "#" + encodeURIComponent(id);
  add(heading, "span", " " + text);
}

function addBar(heading, margin) {  // to the right of its middle if positive, else to the left
  const bar = add(add(heading, "span", "", "bar"), "i");
  const percent = 50 * Math.abs(margin) / widest;
  bar.style.width = `${percent}%`;
  bar.style.left = `${margin > 0 ? 50 : 50 - percent}%`;
}

function addCritique(parent, critique, shift) {  // if it misleads: by how much
  add(parent, "pre", critique, shift ? "critique misleads" : "critique");
  if (shift) add(parent, "p", `misleads by ${signed(shift)}`, "shift");
}

function addPair(pair) {
  const article = add(main, "article", "", pair.margin > 0 ? "right" : "wrong");
  article.id = pair.id;
  const heading = add(article, "h2");
  addLink(heading, pair.id, `${pair.subset} · margin ${signed(pair.margin)}`);
  addBar(heading, pair.margin);
  add(article, "pre", pair.prompt);
  const two = add(article, "div", "", "two");
  for (const name of ["chosen", "rejected"]) {
    const side = pair[name];
    const shifts = side.misleads || [];  // without an audit there are none
    const column = add(two, "div");
    add(column, "h3", `${name}, reward ${side.reward.toFixed(3)}`);
    add(column, "pre", side.response);
    side.critiques.forEach((critique, n) => addCritique(column, critique, shifts[n]));
  }
}

// The pairs that the controls select: a portion at once, the next when the end comes near.

let waiting = [];
const observer = new IntersectionObserver(
  ([{isIntersecting}]) => { if (isIntersecting) addPortion(); },
  {rootMargin: "1500px"},
);

function addPortion() {
  waiting.splice(0, 50).forEach(addPair);
  observer.unobserve(end);
  observer.observe(end);  // calls again if the end is still near
}

function show() {
  const [words, subset, side, order] =
    ["search", "subset", "side", "order"].map(id => get(id).value);
  const selected = pairs
    .filter(pair => pair.words.includes(words.toLowerCase()))
    .filter(pair => !subset || pair.subset === subset)
    .filter(pair => !side || (pair.margin > 0) === (side === "right"))
    .sort((a, b) => order * (a.margin - b.margin));
  const nRight = selected.filter(pair => pair.margin > 0).length;
  get("count").textContent = `${selected.length} of ${pairs.length} pairs, ${nRight} right`;
  const linked = pairs.filter(pair => pair.id === linkedId());  // it comes first, filtered or not
  waiting = [...linked, ...selected.filter(pair => !linked.includes(pair))];
  main.replaceChildren();
  addPortion();
}

// A link to one pair: page.html#id.

function linkedId() {
  try {
    return decodeURIComponent(location.hash.slice(1));
  } catch {  // a stray %
    return "";
  }
}

function follow() {
  const isThere = [...main.children].some(article => article.id === linkedId());
  if (!isThere) show();
  if (linkedId()) location.replace(location.hash);  // now the browser can scroll to it
}

const subsets = new Set(pairs.map(pair => pair.subset));
for (const subset of [...subsets].sort())
  if (subset) add(get("subset"), "option", subset);
for (const id of ["search", "subset", "side", "order"]) get(id).addEventListener("input", show);
addEventListener("hashchange", follow);
follow();
</script>
"""


def to_html(
    blocks: list[Columns | str],
    pairs: list[Pair],
    scores: list[PairScore],
    pictures: dict[str, str],
    audit: list[dict] | None = None,
) -> str:
    """One file that needs nothing else; the data stands in it as JSON that cannot end a script.

    With the rows of an audit it marks the critiques that mislead, and shows the worst of them.
    """
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
    tables = [block if isinstance(block, str) else list(block.items()) for block in blocks]
    data = {"tables": tables, "pictures": pictures, "pairs": rows}
    if audit is not None:
        mark_misleading(rows, pairs, audit)
        prompts = {row["id"]: row["prompt"] for row in rows}
        most = find_most_misleading(audit)
        data["misleading"] = [row | {"prompt": prompts[row["id"]]} for row in most]
    return PAGE.replace("__DATA__", json.dumps(data).replace("<", "\\u003c"))


def mark_misleading(rows: list[dict], pairs: list[Pair], audit: list[dict]) -> None:
    """Adds to each side of the page's rows the shifts of its critiques: null if not misleading.

    By text and not by id: the audit has a critique once where its response stands in several pairs.
    """
    shifts = {}
    for judged in audit:
        if judged["misleads"]:
            asked = (judged.get("tools"), judged["prompt"])
            key = rm.digest(*asked, judged["side"], judged["response"], judged["critique"])
            shifts[key] = unusual_shift(judged)
    for row, pair in zip(rows, pairs):
        written = rm.write_prompt(pair.prompt)
        asked = (written.get("tools"), written["prompt"])
        for side in rm.SIDES:
            response, critiques = row[side]["response"], row[side]["critiques"]
            keys = [rm.digest(*asked, side, response, critique) for critique in critiques]
            row[side]["misleads"] = [shifts.get(key) for key in keys]


# --------------------------------------------------------------------------------------------------
# The commands


def evaluate_pairs(args: argparse.Namespace) -> int:
    """Scores the pairs of --data, also under probes, and prints the tables."""
    pairs = rm.read_pairs(args.data, args.skip_bad, args.critiques)
    for path in args.judge:  # before hours of scoring
        read_verdicts(path, pairs)
    model, encoder = load(args)
    if (args.probe or args.audit) and not encoder.use_critiques:
        advice = "--probe and --audit need a model that does"
        raise CritiqueRMError(f"{args.run}: reads no critiques; {advice}")
    encoded = encoder.encode_pairs(pairs, args.data, skip_bad=args.skip_bad)
    scores = rm.score_pairs(model, encoded, args.micro_batch_tokens)
    description = {
        "run": args.run,
        "data": args.data,
        "data_digest": rm.digest(*map(rm.digest_pair, pairs)),
        "critiques": encoder.use_critiques,
        "dtype": rm.name_of(model.compute_dtype),
        "seed": args.seed,
    }
    scored = [e.pair for e in encoded]
    probed = score_probes(args, model, encoder, scored)
    audit = score_audit(args, model, encoder, scored, scores) if args.audit else None
    if dist.get_rank() != 0:
        return 0
    if audit is not None:
        rm.replace_file(Path(args.audit), "".join(rm.to_json(row) + "\n" for row in audit))
    if args.save_scores:
        rm.write_scores(Path(args.save_scores), scores)
    rows = tabulate(scores, pairs, args.judge, args.seed, probed)
    robustness = measure_robustness(scores)
    values = [f"{value:.4f}" for value in robustness.values()]
    blocks = to_wide(rows)
    styles = measure_styles(scores, pairs)
    if styles:
        blocks.append(show_styles(styles))
    if args.probe:
        lines = [f"- {probe}: {PROBES[probe]}" for probe in dict.fromkeys(args.probe)]
        blocks += ["\n".join(lines), READS_CRITIQUES]
    blocks.append({"reward model, beside accuracy": list(robustness), "value": values})
    if audit is not None:
        blocks.append(show_audit(audit))
    if args.html:
        page = to_html(blocks, scored, scores, plot_scores(scores), audit)
        rm.replace_file(Path(args.html), page)
        log(f"wrote {args.html}")
    if args.json:
        table = description | {"rows": [asdict(row) for row in rows], "robustness": robustness}
        table["benchmarks"] = benchmarks_as_dict(rows, styles)
        write_json(args.json, table)
    if audit is not None:  # the page shows them whole
        blocks.append(show_most_misleading(audit))
    print(to_text(blocks))
    return 0


def score_probes(
    args: argparse.Namespace, model, encoder: rm.Encoder, pairs: list[Pair]
) -> dict[str, list[PairScore]]:
    """The pairs' scores under each probe, by the name of its row. A collective call."""
    probed = {}
    for probe in dict.fromkeys(args.probe):
        encoder.use_critiques = probe != "response-only"
        changed = apply_probe(pairs, probe, args.seed)
        encoded = encoder.encode_pairs(changed, f"{args.data}, {probe}", keep_equal=True)
        scores = rm.score_pairs(model, encoded, args.micro_batch_tokens)
        probed[f"reward model, {probe}"] = scores
    return probed


def score_audit(
    args: argparse.Namespace,
    model,
    encoder: rm.Encoder,
    pairs: list[Pair],
    scores: list[PairScore],
) -> list[dict]:
    """Scores the pairs without critiques, and says what these do. A collective call."""
    encoder.use_critiques = False
    encoded = encoder.encode_pairs(pairs, f"{args.data}, audit", keep_equal=True)
    plain = rm.score_pairs(model, encoded, args.micro_batch_tokens)
    return audit_critiques(pairs, scores, plain)


def compare_scores(args: argparse.Namespace) -> int:
    """Compares the two files of --compare and prints the table."""
    rows = compare(*(read_scores(path) for path in args.compare), args.seed)
    print(to_markdown(rows))
    if len(rows) > 1:
        print("\nThe p values of subsets are corrected for their number (Holm).")
    if args.json:
        table = {"a": args.compare[0], "b": args.compare[1], "rows": [asdict(row) for row in rows]}
        write_json(args.json, table)
    return 0


def print_curves(args: argparse.Namespace) -> int:
    """Prints the learning curves of the runs of --curve."""
    tests = read_curve(args.curve).items()
    points = [point for test, runs in tests for point in measure_curve(test, runs, args.seed)]
    if args.plot:
        plot_curve(points).savefig(args.plot, dpi=150)
    if args.json:
        write_json(args.json, {"runs": args.curve, "rows": [asdict(point) for point in points]})
    print(to_markdown(points))
    return 0


def write_json(path: str, table: dict) -> None:
    rm.replace_file(Path(path), rm.to_json(table, indent=2) + "\n")


def score_single(args: argparse.Namespace) -> int:
    """Prints a reward for each answer of --answers; null for one that cannot be scored."""
    answers = rm.read_answers(args.answers, args.skip_bad)
    model, encoder = load(args)
    rewards = rm.score_answers(model, encoder, answers, args.micro_batch_tokens, args.skip_bad)
    n_missing = rewards.count(None)
    if counted := encoder.describe_counts():
        log(f"{args.answers}: of {len(answers)} answers {counted}")
    if dist.get_rank() == 0:
        for answer, reward in zip(answers, rewards):
            print(rm.to_json({"id": answer.id or answer.where, "reward": reward}))
    if n_missing:
        hint = f" ({rm.CRITIQUES_MISSING})" if encoder.counts["without critique"] else ""
        log(f"{args.answers}: {n_missing} of {len(answers)} answers have no reward{hint}")
    return 1 if n_missing else 0


def load(args: argparse.Namespace):
    """The model of RUN and its encoder, as the arguments say."""
    return rm.load_reward_model(
        args.run,
        False if args.no_critiques else None,
        args.max_length_tokens,
        args.dtype,
        args.compile,
    )


def main() -> int:
    args = parse_arguments()
    try:
        if args.compare or args.curve:
            return compare_scores(args) if args.compare else print_curves(args)
        code = evaluate_pairs(args) if args.data else score_single(args)
    except (CritiqueRMError, OSError) as error:
        rm.log_error("evaluate.py", error)
        return 1
    except KeyboardInterrupt:
        log("evaluate.py: interrupted")
        return 130
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    rm.leave(main())
