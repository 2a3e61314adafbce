"""Benchmarks and lists of responses: figures by hand, and by a second computation of each rule."""

import json
import math
from collections import Counter

import numpy as np
import pytest

import evaluate
from conftest import write
from critique_rm import PairScore, read_pairs


def group_scores(
    group: str, chosen: list[float], rejected: list[float], subset: str = "", words: int = 1
) -> list[PairScore]:
    """The scores of all pairs of a record that lists several responses."""
    scores = []
    for i, r in enumerate(chosen):
        for j, s in enumerate(rejected):
            scores.append(
                PairScore(f"{group}/{i + 1}-{j + 1}", group, subset, r, s, words, 2, None, None,
                          group, i, j, [r], [s])  # fmt: skip
            )
    return scores


def figures(scores: list[PairScore]) -> dict[str, dict[str, float]]:
    """The reward model's benchmark figures, without their resamples."""
    opinions = evaluate.opinions_by("reward", "m", scores)
    groups = evaluate.collect_groups(opinions, Counter(s.group for s in scores if s.group))
    found = evaluate.measure_benchmarks(opinions, groups, seed=0)
    return {name: {k: v[0] for k, v in parts.items()} for name, parts in found.items()}


@pytest.mark.parametrize(
    "chosen, rejected, expected",
    [
        ([2.0], [1.0, 0.0, -1.0], 1.0),
        ([1.0], [1.0, 0.0, -1.0], 1 / 2),
        ([1.0], [1.0, 1.0, 1.0], 1 / 4),
        ([0.0], [1.0, -1.0, -1.0], 0.0),
        ([0.0, 3.0], [1.0, 2.0], 1.0),
        ([3.0, 3.0], [3.0, 2.0], 2 / 3),
    ],
)
def test_best_of_n_by_hand(chosen, rejected, expected):
    scores = group_scores("a", chosen, rejected)
    (group,) = evaluate.collect_groups(evaluate.opinions_by("reward", "m", scores), Counter(a=1))
    assert group.best_of_n == pytest.approx(expected)
    rows = evaluate.tabulate([*scores, *group_scores("b", [1.0], [0.0])])
    row = next(r for r in rows if (r.scorer, r.subset) == ("reward model", "best of n"))
    assert (row.pairs, row.accuracy) == (2, pytest.approx((expected + 1) / 2))
    longest = next(r for r in rows if (r.scorer, r.subset) == ("shorter response", "best of n"))
    assert longest.accuracy == 1.0  # one word against two


def test_an_incomplete_list_is_not_in_best_of_n(capsys):
    scores = group_scores("a", [2.0], [1.0, 3.0]) + group_scores("b", [2.0], [1.0])
    rows = evaluate.tabulate(scores[:1] + scores[2:], scores)
    row = next(r for r in rows if (r.scorer, r.subset) == ("reward model", "best of n"))
    assert (row.pairs, row.accuracy) == (1, 1.0)
    assert "1 of 2 lists of responses are incomplete" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# RM-Bench


def test_rm_bench_by_hand():
    """Chosen 3, 2, 1 and rejected 0, 2, 4 by style: of the nine pairs 3 + 1 (2 > 2 is none) + 1."""
    found = figures(group_scores("a", [3.0, 2.0, 1.0], [0.0, 2.0, 4.0]))["RM-Bench"]
    # hard: (3 > 2), (3 > 4), (2 > 4); normal: (3 > 0), (2 > 2), (1 > 4); easy: (2 > 0), (1 > 0), (1 > 2)
    assert found == pytest.approx({"hard": 1 / 3, "normal": 1 / 3, "easy": 2 / 3, "average": 4 / 9})


def test_the_matrix_of_styles_by_hand():
    """Hard, normal and easy are the means of its cells above the diagonal, on it and below it."""
    scores = group_scores("a", [3.0, 2.0, 1.0], [0.0, 2.0, 4.0])  # [[1, 1, 0], [1, 0, 0], [1, 0, 0]]
    scores += group_scores("b", [3.0, 5.0, 1.0], [0.0, 2.0, 4.0])  # [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    others = group_scores("c", [1.0], [0.0, 0.0, 0.0]) + group_scores("d", [0.0] * 3, [1.0] * 3, "Ties")
    incomplete = group_scores("e", [0.0] * 3, [1.0] * 3)
    every = scores + others + incomplete
    matrix = evaluate.measure_styles(every[:-1], every)
    assert matrix == [[1.0, 1.0, 0.0], [1.0, 0.5, 0.5], [1.0, 0.0, 0.0]]
    found = figures(scores)["RM-Bench"]
    assert found["hard"] == pytest.approx((1.0 + 0.0 + 0.5) / 3)  # 0-1, 0-2, 1-2
    assert found["normal"] == pytest.approx((1.0 + 0.5 + 0.0) / 3)
    assert found["easy"] == pytest.approx((1.0 + 1.0 + 0.0) / 3)  # 1-0, 2-0, 2-1
    assert evaluate.layout(evaluate.show_styles(matrix)).splitlines()[2:] == [
        "| concise | 1.000 | 1.000 | 0.000 |",
        "| detailed | 1.000 | 0.500 | 0.500 |",
        "| markdown | 1.000 | 0.000 | 0.000 |",
    ]
    assert evaluate.measure_styles(others, others) == []


def test_rm_bench_is_what_its_rule_says_of_random_rewards():
    rng = np.random.default_rng(0)
    domains = ["chat", "math", "code", "safety-refuse", "safety-response", "safety-response"]
    rows = [(domain, *rng.integers(0, 4, (2, 3)).astype(float)) for domain in domains * 5]
    scores = []
    for n, (domain, chosen, rejected) in enumerate(rows):
        scores += group_scores(str(n), list(chosen), list(rejected), domain)
    sums, by_domain = np.zeros((3, 3)), {}
    for domain, chosen, rejected in rows:
        for i in range(3):
            for j in range(3):
                sums[i, j] += chosen[i] > rejected[j]
                by_domain.setdefault(domain, []).append(chosen[i] > rejected[j])
    acc = sums / len(rows)
    np.testing.assert_allclose(evaluate.measure_styles(scores, scores), acc)
    found = figures(scores)["RM-Bench"]
    assert found["hard"] == pytest.approx((acc[0, 1] + acc[0, 2] + acc[1, 2]) / 3)
    assert found["normal"] == pytest.approx((acc[0, 0] + acc[1, 1] + acc[2, 2]) / 3)
    assert found["easy"] == pytest.approx((acc[1, 0] + acc[2, 0] + acc[2, 1]) / 3)
    assert found["average"] == pytest.approx(acc.mean())
    means = {domain: np.mean(values) for domain, values in by_domain.items()}
    safety = (means["safety-refuse"] + means["safety-response"]) / 2
    assert found["safety"] == pytest.approx(safety)
    assert found["chat"] == pytest.approx(means["chat"])
    assert found["overall"] == pytest.approx((means["chat"] + means["math"] + means["code"] + safety) / 4)


# --------------------------------------------------------------------------------------------------
# RewardBench 2


def tied(number: int, right: list[float], wrong: list[float], ref: tuple[float, list[float]]) -> list:
    scores = group_scores(f"tied:{number}", right, wrong, "Ties")
    return scores + group_scores(f"ref:{number}", [ref[0]], ref[1], "Ties")


def ties_again(rows: list[tuple[list[float], list[float], float, list[float]]]) -> float:
    """The rule once more, as one reads it."""
    accurate, reference, ahead, both, margins = [], [], [], [], []
    for right, wrong, ref_right, ref_wrong in rows:
        d = max(right) - min(right)
        t, f = min(right) - max(wrong), ref_right - max(ref_wrong)
        accurate.append(t > 0)
        reference.append(f > 0)
        ahead.append(t > d)
        both.append(min(f, t) > d)
        if d > 0:
            margins.append(math.tanh(min(f, t) / d - 1))
        else:
            margins.append(0.0 if min(f, t) == 0 else math.copysign(1.0, min(f, t)))
    parts = (0.3, accurate), (0.3, reference), (0.2, ahead), (0.2, both), (0.01, margins)
    return sum(weight * sum(values) / len(values) for weight, values in parts)


def test_ties_by_hand():
    """d = 0.5, t = 1, f = 2: all four terms are met, and tanh(1 / 0.5 − 1) = tanh 1."""
    scores = tied(0, [2.0, 1.5], [0.5, 0.0], (3.0, [1.0]))
    assert figures(scores)["RewardBench 2"] == {"Ties": pytest.approx(1 + 0.01 * math.tanh(1))}
    # d = 2, t = 0.5, f = −1: the tied row alone is right; tanh(−1 / 2 − 1)
    scores = tied(0, [3.0, 1.0], [0.5], (0.0, [1.0]))
    expected = 0.3 + 0.01 * math.tanh(-1.5)
    assert figures(scores)["RewardBench 2"] == {"Ties": pytest.approx(expected)}


def test_ties_are_what_the_rule_says_of_random_rewards():
    rng = np.random.default_rng(1)
    rows, scores = [], []
    for n in range(60):
        right, wrong = rng.integers(0, 3, rng.integers(2, 5)), rng.integers(-2, 2, rng.integers(1, 4))
        ref_right, ref_wrong = float(rng.integers(0, 3)), rng.integers(-2, 2, 3)
        rows.append((list(map(float, right)), list(map(float, wrong)), ref_right, list(ref_wrong)))
        scores += tied(n, *rows[-1][:2], (ref_right, list(map(float, ref_wrong))))
    assert any(max(r[0]) == min(r[0]) for r in rows)
    assert figures(scores)["RewardBench 2"]["Ties"] == pytest.approx(ties_again(rows))


def test_rewardbench2_is_the_mean_of_six_subsets():
    scores = tied(0, [2.0, 1.5], [0.5, 0.0], (3.0, [1.0]))
    expected = {"Ties": 1 + 0.01 * math.tanh(1)}
    for n, subset in enumerate(["Factuality", "Precise IF", "Math", "Safety", "Focus"]):
        for k in range(4):
            scores += group_scores(f"{n}-{k}", [float(k <= n)], [0.0, -1.0, -1.0], subset)
        # right for k <= n, else one of two equal highest: a half
        expected[subset] = ((n + 1) + (3 - n) / 2) / 4 if n < 4 else 1.0
    found = figures(scores)["RewardBench 2"]
    assert found == pytest.approx({"score": sum(expected.values()) / 6, **expected})


def test_a_prompt_of_other_sizes_is_not_of_rewardbench2():
    assert "RewardBench 2" not in figures(group_scores("a", [1.0], [0.0, 0.0], "Focus"))


# --------------------------------------------------------------------------------------------------
# JudgeBench


def test_judgebench_is_over_pairs_and_not_over_sources(tmp_path):
    sources = ["mmlu-pro-law"] * 6 + ["livebench-math"] * 2
    rows = [
        {"pair_id": str(n), "source": source, "question": f"q{n}", "response_A": "x", "response_B": "y"}
        | {"label": "A>B"}
        for n, source in enumerate(sources)
    ]
    pairs = read_pairs(write(tmp_path / "a.jsonl", *rows))
    scores = [
        PairScore(p.id, p.id, p.subset, float(n < 6), 0.5, 1, 1, None, None) for n, p in enumerate(pairs)
    ]
    found = figures(scores)["JudgeBench"]
    assert found == {"overall": 6 / 8, "mmlu-pro": 1.0, "livebench-math": 0.0}


# --------------------------------------------------------------------------------------------------
# Intervals


def test_an_interval_of_a_mean_of_subsets_adds_their_variances():
    """Two subsets of 200 prompts, half of them right: the variance of the mean is a half of one's."""
    scores = []
    for subset in ("Focus", "Safety"):
        for n in range(200):
            scores += group_scores(f"{subset}{n}", [float(n % 2)], [0.5, 0.0, 0.0], subset)
    opinions = evaluate.opinions_by("reward", "m", scores)
    groups = evaluate.collect_groups(opinions, Counter(s.group for s in scores))
    parts = evaluate.measure_rewardbench2(groups, seed=0)
    mean = (parts["Focus"] + parts["Safety"]) / 2
    assert parts["Focus"][1:].std() == pytest.approx(math.sqrt(0.25 / 200), rel=0.06)
    assert mean[1:].std() == pytest.approx(math.sqrt(0.25 / 400), rel=0.06)


def test_json_holds_the_benchmarks_of_the_reward_model():
    scores = group_scores("a", [3.0, 2.0, 1.0], [0.0, 2.0, 4.0], "chat")
    scores += group_scores("b", [3.0, 2.0, 1.0], [0.0, 0.0, 0.0], "chat")
    styles = evaluate.measure_styles(scores, scores)
    found = evaluate.benchmarks_as_dict(evaluate.tabulate(scores), styles)
    assert list(found) == ["RM-Bench"]
    assert list(found["RM-Bench"]) == ["hard", "normal", "easy", "average", "chat", "matrix"]
    assert found["RM-Bench"]["matrix"] == styles
    hard = found["RM-Bench"]["hard"]
    assert hard["value"] == pytest.approx(2 / 3) and hard["low"] <= hard["value"] <= hard["high"]
    json.dumps(found, allow_nan=False)


# --------------------------------------------------------------------------------------------------
# Several critiques


def with_critiques(n: int, chosen: list[float], rejected: list[float]) -> PairScore:
    means = sum(chosen) / len(chosen), sum(rejected) / len(rejected)
    return PairScore(str(n), str(n), "", *means, 1, 1, 3, 3, chosen_rewards=chosen, rejected_rewards=rejected)


def test_accuracy_with_one_two_and_three_critiques_by_hand():
    """Chosen 3, 0, 0 against three of 0.5: right with one critique in a third of the draws, with two
    in two thirds (3 is one of them), with all of them, but in the minority of votes."""
    scores = [with_critiques(n, [3.0, 0.0, 0.0], [0.5] * 3) for n in range(40)]
    found = {name: values[0] for name, values in evaluate.measure_critiques(scores, seed=0).items()}
    assert list(found) == ["1 critique, mean", "2 critiques, mean", "3 critiques, mean", "3 critiques, majority"]
    assert found["1 critique, mean"] == pytest.approx(1 / 3, abs=0.02)
    assert found["2 critiques, mean"] == pytest.approx(2 / 3, abs=0.02)
    assert (found["3 critiques, mean"], found["3 critiques, majority"]) == (1.0, 0.0)
    assert evaluate.measure_critiques([with_critiques(0, [1.0], [0.0])], seed=0) == {}


def test_an_audit_says_which_critiques_mislead(tmp_path):
    pairs = [
        {"id": "a", "prompt": "p", "chosen": "c", "rejected": ["r", "s"], "subset": "x"}
        | {"chosen": ["c"], "chosen_critique": ["good"], "rejected_critique": ["bad", ["fine", "poor"]]}
    ]
    read = read_pairs(write(tmp_path / "a.jsonl", *pairs))
    rewards = {"good": 2.0, "bad": -1.0, "fine": 1.5, "poor": 0.25}
    scores, plain = [], []
    for pair in read:
        chosen = [rewards[c] for c in pair.chosen_critiques]
        rejected = [rewards[c] for c in pair.rejected_critiques]
        scores.append(
            PairScore(pair.id, "p", "x", 2.0, 0.0, 1, 1, 1, 1, chosen_rewards=chosen, rejected_rewards=rejected)
        )
        plain.append(PairScore(pair.id, "p", "x", 1.0, 0.5, 1, 1, None, None))
    audit = evaluate.audit_critiques(read, scores, plain)
    assert [(row["critique"], row["shift"], row["misleads"]) for row in audit] == [
        ("good", 1.0, False),
        ("bad", -1.5, False),
        ("fine", 1.0, True),
        ("poor", -0.25, False),
    ]
    assert audit[2] | {"prompt": 0} == {
        "id": "a/1-2", "subset": "x", "side": "rejected", "prompt": 0, "response": "s",
        "words": 1, "critique": "fine", "reward": 1.5, "reward_without": 0.5,
        "shift": 1.0, "usual_shift": 0.0625, "misleads": True,
    }  # fmt: skip
    assert evaluate.summarize_audit(audit) == {"x": (4, 3, 3)}
    kept = [{k: r[k] for k in ("prompt", "response", "critique")} for r in audit if not r["misleads"]]
    filtered = read_pairs(str(tmp_path / "a.jsonl"), critiques=write(tmp_path / "kept.jsonl", *kept))
    assert [pair.rejected_critiques for pair in filtered] == [("bad",), ("poor",)]
    assert [pair.chosen_critiques for pair in filtered] == [("good",)] * 2


def test_what_is_usual_for_a_length_is_the_mean_of_the_nearest():
    """By length the shifts are 6, 3, 0, −3; of two alike each is beside the one before it."""
    rows = [(40, -3.0), (10, 6.0), (30, 0.0), (20, 3.0)]
    audit = [{"words": words, "shift": shift} for words, shift in rows]
    assert evaluate.find_usual_shifts(audit, n_alike=2) == [-1.5, 4.5, 1.5, 4.5]
    assert evaluate.find_usual_shifts(audit) == [1.5] * 4


def test_a_critique_of_a_short_response_does_not_mislead_by_its_length(tmp_path):
    """All critiques lift short responses by 5 and lower long ones, those of right ones 1 less."""
    n = evaluate.N_ALIKE
    pairs, scores, plain = [], [], []
    for k in range(2 * n):
        words = 1 if k < n else 100
        usual = 5.0 if k < n else -5.0
        row = {"id": str(k), "prompt": f"p{k}", "chosen": "c " * words, "rejected": "r " * words}
        pairs.append(row | {"chosen_critique": "x", "rejected_critique": "y"})
        rewards = {"chosen_rewards": [usual + 1], "rejected_rewards": [usual - 1]}
        scores.append(PairScore(str(k), f"p{k}", "", 0.0, 0.0, words, words, 1, 1, **rewards))
        plain.append(PairScore(str(k), f"p{k}", "", 0.0, 0.0, words, words, None, None))
    audit = evaluate.audit_critiques(read_pairs(write(tmp_path / "a.jsonl", *pairs)), scores, plain)
    assert evaluate.summarize_audit(audit)[""][:2] == (4 * n, 2 * n)
    away_from_the_step = audit[: 2 * n - n // 2] + audit[2 * n + n // 2 :]
    assert not any(row["misleads"] for row in away_from_the_step)
