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
    parser.add_argument("--max-length-tokens", type=int, help="of a sequence (default: the model's)")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096, help="computed at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--json", metavar="FILE", help="write the table there too")
    parser.add_argument("--scores", metavar="FILE", help="write one line a pair there")
    args = parser.parse_args(argv)
    if args.score and (args.json or args.scores):
        parser.error("--json and --scores go with --data")
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
    pairs: int | None  # None: a weighted mean of subsets
    accuracy: float
    low: float | None = None  # ends of the 95 % interval
    high: float | None = None
    ties: float | None = None


def measure(
    scorer: str, subset: str, scores: list[PairScore], margins: np.ndarray, seed: int
) -> Row:
    """Accuracy, interval and tie rate from the margins (B,) of chosen over rejected."""
    correct = margins > 0
    low, high = bootstrap_interval(correct, [score.prompt_id for score in scores], seed)
    return Row(
        scorer, subset, len(scores), float(correct.mean()), low, high, float((margins == 0).mean())
    )


def bootstrap_interval(correct: np.ndarray, prompt_ids: list[str], seed: int) -> tuple[float, float]:
    """The 95 % percentile interval of an accuracy, whole prompts resampled with replacement."""
    _, cluster = np.unique(prompt_ids, return_inverse=True)
    n_correct, n_pairs = np.bincount(cluster, correct), np.bincount(cluster)
    n = len(n_pairs)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), N_RESAMPLES)
    low, high = np.quantile((draws @ n_correct) / (draws @ n_pairs), [0.025, 0.975])
    return float(low), float(high)


def margins_by_scorer(scores: list[PairScore]) -> dict[str, np.ndarray]:
    """Margins (B,) of the reward model and of judges that look at length alone."""
    margins = {
        "reward model": [s.chosen_reward - s.rejected_reward for s in scores],
        "longer response wins": [s.chosen_words - s.rejected_words for s in scores],
    }
    if all(s.chosen_critique_words and s.rejected_critique_words for s in scores):
        margins["longer critique wins"] = [
            s.chosen_critique_words - s.rejected_critique_words for s in scores
        ]
    return {scorer: np.array(values) for scorer, values in margins.items()}


def tabulate(scores: list[PairScore], seed: int) -> list[Row]:
    """All rows of the table: for each scorer overall, by subset, and by RewardBench section."""
    rows = []
    subsets = sorted({score.subset for score in scores})
    for scorer, margins in margins_by_scorer(scores).items():
        rows.append(measure(scorer, "all", scores, margins, seed))
        by_subset = []
        for subset in subsets if len(subsets) > 1 else []:
            here = np.array([score.subset == subset for score in scores])
            those = [score for score, is_here in zip(scores, here) if is_here]
            by_subset.append(measure(scorer, subset or "(none)", those, margins[here], seed))
        rows += by_subset + rewardbench_rows(scorer, {row.subset: row.accuracy for row in by_subset})
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


def to_markdown(rows: list[Row]) -> str:
    lines = [
        "| scored by | subset | pairs | accuracy | 95 % interval | ties |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        interval = "" if row.low is None else f"{row.low:.3f}–{row.high:.3f}"
        ties = "" if row.ties is None else f"{row.ties:.3f}"
        pairs = "" if row.pairs is None else row.pairs
        subset = row.subset.replace("|", "\\|")
        lines.append(
            f"| {row.scorer} | {subset} | {pairs} | {row.accuracy:.4f} | {interval} | {ties} |"
        )
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------


def evaluate_pairs(args: argparse.Namespace) -> int:
    """Scores the pairs of --data and prints the table."""
    pairs = rm.read_pairs(args.data)
    model, encoder = load(args)
    encoded = encoder.encode_pairs(pairs, args.data)
    scores = rm.score_pairs(model, encoded, args.micro_batch_tokens)
    if dist.get_rank() != 0:
        return 0
    rows = tabulate(scores, args.seed)
    print(to_markdown(rows))
    if len(scores) < len(pairs):
        print(f"\n{len(pairs) - len(scores)} of {len(pairs)} pairs are not in this table.")
    if args.scores:
        rm.write_scores(Path(args.scores), scores)
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
        say(f"evaluate.py: {error}")
        return 1
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
