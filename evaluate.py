"""Says how often a reward model prefers the better response, and how sure that figure is.

    python evaluate.py RUN --data pairs.jsonl           # a Markdown table on stdout
    torchrun --nproc-per-node 8 evaluate.py RUN --data pairs.jsonl
    python evaluate.py RUN --score answers.jsonl        # one reward a line, for best-of-n

RUN is a folder of train.py, or any Hugging Face sequence-classification model made of a decoder and
a `score` head with one label. Pairs are read by `read_pairs` (critique_rm.py); answers are single
records {prompt, response, critique?, id?}. --scores keeps one line a pair, --json the table.

Accuracy counts a tie as wrong, as RewardBench does (Lambert et al., arXiv 2403.13787). Intervals are
percentiles of a bootstrap over prompts, since pairs over one prompt are not independent.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist

import critique_rm as rm
from critique_rm import CritiqueRMError, PairScore, say

N_RESAMPLES = 2000
# Pairs behind each accuracy in a section, as RewardBench weighs them; math-prm has 447 real pairs.
REWARDBENCH = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}

# --------------------------------------------------------------------------------------------------
# Arguments


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="folder or Hub name of a reward model")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", help="preference pairs to test on")
    what.add_argument("--score", metavar="ANSWERS", help="single answers to score")
    parser.add_argument("--no-critiques", action="store_true", help="leave critiques out of the input")
    parser.add_argument("--skip-bad", action="store_true", help="count bad records, do not refuse")
    parser.add_argument("--max-length-tokens", type=int, help="of a sequence (default: the model's)")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096, help="computed at a time")
    parser.add_argument(
        "--judge", metavar="FILE", action="append", default=[], help="verdicts of generate.py"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--json", metavar="FILE", help="write the table there too")
    parser.add_argument("--scores", metavar="FILE", help="write one line a pair there")
    args = parser.parse_args(argv)
    if args.score and (args.json or args.scores or args.judge):
        parser.error("--json, --scores and --judge go with --data")
    for path in args.judge:
        if not Path(path).is_file():
            parser.error(f"{path}: no such file")
    for path in filter(None, (args.json, args.scores)):  # known before hours of scoring
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
    accuracy: float
    low: float | None = None  # ends of the 95 % interval
    high: float | None = None
    pairs: int | None = None  # None: a weighted mean of subsets
    coverage: float | None = None  # the share of all pairs that got an answer
    ties: float | None = None
    inconsistent: float | None = None  # verdicts that change with the order of the responses


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
        low, high = bootstrap_interval(self.correct, [s.prompt_id for s in self.scores], seed)
        ties, inconsistent = (
            None if array is None else float(array.mean()) for array in (self.ties, self.inconsistent)
        )
        n, accuracy = len(self.scores), float(self.correct.mean())
        return Row(self.scorer, subset, accuracy, low, high, n, n / n_pairs, ties, inconsistent)


def bootstrap_interval(correct: np.ndarray, prompt_ids: list[str], seed: int) -> tuple[float, float]:
    """The 95 % percentile interval of an accuracy, whole prompts resampled with replacement."""
    _, cluster = np.unique(prompt_ids, return_inverse=True)
    n_correct, n_pairs = np.bincount(cluster, correct), np.bincount(cluster)
    n = len(n_pairs)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), N_RESAMPLES)
    low, high = np.quantile((draws @ n_correct) / (draws @ n_pairs), [0.025, 0.975])
    return float(low), float(high)


def collect_opinions(scores: list[PairScore], judges: Sequence[str]) -> list[Opinions]:
    """The reward model, those that look at length alone, and the judges of the given files."""

    def by_margin(scorer: str, those: list[PairScore], margins: list[float]) -> Opinions:
        values = np.array(margins)
        return Opinions(scorer, those, (values > 0).astype(float), values == 0)

    reviewed = [s for s in scores if s.chosen_critique_words and s.rejected_critique_words]
    opinions = [
        by_margin("reward model", scores, [s.chosen_reward - s.rejected_reward for s in scores]),
        by_margin("longer response wins", scores, [s.chosen_words - s.rejected_words for s in scores]),
        by_margin(
            "longer critique wins",
            reviewed,
            [s.chosen_critique_words - s.rejected_critique_words for s in reviewed],
        ),
    ]
    for path in judges:
        opinions += read_verdicts(path, scores)
    return [opinion for opinion in opinions if opinion.scores]


def read_verdicts(path: str, scores: list[PairScore]) -> list[Opinions]:
    """Reads what `generate.py --task judge` wrote; a pair counts if both orders got an answer."""
    by_scorer: dict[str, dict[str, list[bool]]] = {}
    for where, row in rm.read_rows(path):
        try:
            answers = [row["verdicts"][order] for order in ("chosen_first", "rejected_first")]
            scorer = "judge with critiques" if row["with_critiques"] else "judge"
            pair_id = row["id"]
        except (KeyError, TypeError):
            raise CritiqueRMError(f"{where}: not a verdict of generate.py --task judge") from None
        if None not in answers:
            by_scorer.setdefault(scorer, {})[pair_id] = [a == "chosen" for a in answers]
    opinions = []
    for scorer, verdicts in by_scorer.items():
        judged = [score for score in scores if score.id in verdicts]
        if not judged:
            raise CritiqueRMError(f"{path}: no id in it is one of the pairs; judge the same file")
        right = np.array([verdicts[score.id] for score in judged], float).reshape(-1, 2)
        opinions.append(
            Opinions(scorer, judged, right.mean(1), inconsistent=right[:, 0] != right[:, 1])
        )
    return opinions


def tabulate(
    scores: list[PairScore], n_pairs: int | None = None, judges: Sequence[str] = (), seed: int = 0
) -> list[Row]:
    """All rows of the table: for each scorer overall, by subset, and by RewardBench section."""
    rows = []
    n_by_subset = Counter(score.subset for score in scores)
    for opinions in collect_opinions(scores, judges):
        rows.append(opinions.measure("all", n_pairs or len(scores), seed))
        by_subset = [
            those.measure(subset or "(none)", n, seed)
            for subset, n in sorted(n_by_subset.items())
            if len(n_by_subset) > 1 and (those := opinions.within(subset)).scores
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
    rows = [Row(scorer, f"RewardBench {name}", value) for name, value in sections.items()]
    if len(sections) == len(REWARDBENCH):
        rows.append(Row(scorer, "RewardBench", sum(sections.values()) / len(sections)))
    return rows


def to_markdown(rows: list[Row]) -> str:
    """The table, without columns that no row fills."""
    columns = {
        "scored by": lambda row: row.scorer,
        "subset": lambda row: row.subset.replace("|", "\\|"),
        "pairs": lambda row: row.pairs and str(row.pairs),
        "accuracy": lambda row: f"{row.accuracy:.4f}",
        "95 % interval": lambda row: row.high is not None and f"{row.low:.3f}–{row.high:.3f}",
        "ties": lambda row: row.ties is not None and f"{row.ties:.3f}",
        "inconsistent": lambda row: row.inconsistent is not None and f"{row.inconsistent:.3f}",
        "coverage": lambda row: row.coverage not in (None, 1) and f"{row.coverage:.3f}",
    }
    cells = {title: [show(row) or "" for row in rows] for title, show in columns.items()}
    cells = {title: column for title, column in cells.items() if any(column)}
    lines = [list(cells), ["---"] * len(cells), *zip(*cells.values())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --------------------------------------------------------------------------------------------------


def evaluate_pairs(args: argparse.Namespace) -> int:
    """Scores the pairs of --data and prints the table."""
    pairs = rm.read_pairs(args.data, args.skip_bad)
    model, encoder = load(args)
    encoded = encoder.encode_pairs(pairs, args.data)
    scores = rm.score_pairs(model, encoded, args.micro_batch_tokens)
    if dist.get_rank() != 0:
        return 0
    if args.scores:
        rm.write_scores(Path(args.scores), scores)
    rows = tabulate(scores, len(pairs), args.judge, args.seed)
    print(to_markdown(rows))
    if args.json:
        table = {
            "run": args.run,
            "data": args.data,
            "data_digest": rm.digest([asdict(pair) for pair in pairs]),
            "critiques": encoder.use_critiques,
            "seed": args.seed,
            "rows": [asdict(row) for row in rows],
        }
        rm.replace_file(Path(args.json), json.dumps(table, indent=2) + "\n")
    return 0


def score_single(args: argparse.Namespace) -> int:
    """Prints a reward for each answer of --score; null for one that cannot be scored."""
    answers = rm.read_answers(args.score)
    model, encoder = load(args)
    rewards = rm.score_answers(model, encoder, answers, args.micro_batch_tokens)
    n_missing = rewards.count(None)
    if n_cut := encoder.counts["truncated"]:
        say(f"{args.score}: {n_cut} answers were cut to {encoder.max_length_tokens} tokens")
    if dist.get_rank() == 0:
        for answer, reward in zip(answers, rewards):
            print(json.dumps({"id": answer.id, "reward": reward}))
    if n_missing:
        say(
            f"{args.score}: {n_missing} of {len(answers)} answers have no reward: longer than "
            f"{encoder.max_length_tokens} tokens, or without a critique ({rm.CRITIQUES_MISSING})"
        )
    return 1 if n_missing else 0


def load(args: argparse.Namespace):
    return rm.load_reward_model(
        args.run, False if args.no_critiques else None, args.max_length_tokens
    )


def main() -> int:
    args = parse_arguments()
    try:
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
    sys.exit(main())
