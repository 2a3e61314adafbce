"""evaluate.py: the statistics against values by hand, the command as its users run it."""

import base64
import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

import evaluate
import generate
from critique_rm import CritiqueRMError, Message, Pair, PairScore, read_answers, read_pairs
from chat_server import Server, completion

ROOT = Path(__file__).parent.parent


def score(n: int, margin: float, subset: str = "", prompt: str | None = None, words=(1, 2)):
    return PairScore(str(n), prompt or str(n), subset, margin, 0.0, *words, None, None)


def row(rows: list[evaluate.Row], scorer: str, subset: str) -> evaluate.Row:
    return next(r for r in rows if (r.scorer, r.subset) == (scorer, subset))


def test_a_tie_is_wrong_and_counted():
    scores = [score(0, 1.0), score(1, 0.0), score(2, -1.0), score(3, 2.0)]
    model, longer, shorter = evaluate.tabulate(scores)
    assert (model.accuracy, model.ties, model.pairs) == (0.5, 0.25, 4)
    assert (longer.scorer, longer.accuracy) == ("longer response", 0.0)
    assert (shorter.scorer, shorter.accuracy) == ("shorter response", 1.0)


def test_rewardbench_sections_match_the_reference_figures():
    """Numbers right in each subset, and the scores that the benchmark's README gets from them."""
    n_right = {
        **{"alpacaeval-easy": 50, "alpacaeval-length": 56, "alpacaeval-hard": 67},
        **{"mt-bench-easy": 16, "mt-bench-med": 29, "mt-bench-hard": 20, "llmbar-natural": 52},
        **{"llmbar-adver-neighbor": 58, "llmbar-adver-GPTInst": 36, "llmbar-adver-GPTOut": 22},
        **{"llmbar-adver-manual": 17, "refusals-dangerous": 97, "refusals-offensive": 100},
        **{"xstest-should-refuse": 154, "xstest-should-respond": 71, "donotanswer": 112},
        **{"hep-cpp": 103, "hep-go": 104, "hep-java": 116, "hep-js": 109, "hep-python": 90},
        **{"hep-rust": 106, "math-prm": 984 * 132 / 447},
    }
    counts = {subset: n for weights in evaluate.REWARDBENCH.values() for subset, n in weights.items()}
    accuracy = {subset: n_right[subset] / n for subset, n in counts.items()}
    *sections, mean = evaluate.rewardbench_rows("m", accuracy)
    expected = {"Chat": 60.8939, "Chat Hard": 44.9561, "Safety": 72.1622, "Reasoning": 46.6757}
    found = {row.subset.removeprefix("RewardBench "): 100 * row.accuracy for row in sections}
    assert found == pytest.approx(expected, abs=1e-4)
    assert mean.accuracy == pytest.approx(sum(expected.values()) / 400, abs=1e-6)


def test_rewardbench_weights_add_up_to_the_published_counts():
    totals = {name: sum(weights.values()) for name, weights in evaluate.REWARDBENCH.items()}
    assert totals == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968}


def test_a_section_needs_all_its_subsets():
    assert evaluate.rewardbench_rows("m", {"llmbar-natural": 1.0}) == []


def test_interval_matches_the_normal_one_for_independent_pairs():
    correct = np.arange(1000) % 10 < 7
    low, high = evaluate.bootstrap_interval(correct, [str(n) for n in range(1000)], seed=0)
    half = 1.96 * np.sqrt(0.7 * 0.3 / 1000)
    assert (low, high) == pytest.approx((0.7 - half, 0.7 + half), abs=0.004)


def test_interval_is_wider_when_pairs_share_prompts():
    """Ten equal pairs a prompt are worth one: the interval of 100 prompts, not of 1,000 pairs."""
    correct = np.repeat(np.arange(100) % 10 < 7, 10)
    low, high = evaluate.bootstrap_interval(correct, [str(n // 10) for n in range(1000)], seed=0)
    half = 1.96 * np.sqrt(0.7 * 0.3 / 100)
    assert (low, high) == pytest.approx((0.7 - half, 0.7 + half), abs=0.015)


def test_an_interval_of_equal_values_is_exact_or_none():
    """12 prompts are all right one time in 40 at an accuracy of 0.7354: 0.7354**12 = 0.025."""
    (all_right, *_) = evaluate.tabulate([score(n, 1.0) for n in range(12)])
    assert (all_right.low, all_right.high) == (pytest.approx(0.7354, abs=1e-4), 1.0)
    (all_wrong, *_) = evaluate.tabulate([score(n, -1.0) for n in range(12)])
    assert (all_wrong.low, all_wrong.high) == (0.0, pytest.approx(0.2646, abs=1e-4))
    (one_prompt, *_) = evaluate.tabulate([score(n, n - 0.5, prompt="p") for n in range(2)])
    assert (one_prompt.accuracy, one_prompt.low, one_prompt.high) == (0.5, None, None)


def test_a_judge_counts_where_both_orders_are_answered(tmp_path):
    answers = [("chosen", "chosen"), ("chosen", "rejected"), ("rejected", None), ("rejected",) * 2]
    path = tmp_path / "verdicts.jsonl"
    with path.open("w") as file:
        for n, (first, second) in enumerate(answers):
            verdicts = {"chosen_first": first, "rejected_first": second}
            file.write(json.dumps({"id": str(n), "with_critiques": True, "verdicts": verdicts}) + "\n")
    rows = evaluate.tabulate([score(n, 1.0) for n in range(4)], judges=[str(path)])
    judge = row(rows, "judge with critiques", "all")
    assert (judge.accuracy, judge.inconsistent) == (pytest.approx(0.5), pytest.approx(1 / 3))
    assert (judge.pairs, judge.coverage, judge.ties) == (3, 0.75, None)
    model = row(rows, "reward model, pairs of judge with critiques", "all")
    assert (model.pairs, model.accuracy) == (3, 1.0)
    (other := tmp_path / "other.jsonl").write_text(path.read_text())
    rows = evaluate.tabulate([score(n, 1.0) for n in range(4)], judges=[str(path), str(other)])
    names = [f"judge with critiques ({name})" for name in (path, other)]
    assert [row(rows, name, "all").accuracy for name in names] == [0.5, 0.5]


@pytest.mark.parametrize("pair_id, last", [("x", "chosen"), ("0", None)])
def test_verdicts_that_say_nothing_are_refused_before_scoring(pair_id, last, tmp_path):
    path = tmp_path / "verdicts.jsonl"
    verdicts = {"chosen_first": "chosen", "rejected_first": last}
    path.write_text(json.dumps({"id": pair_id, "with_critiques": False, "verdicts": verdicts}))
    (pairs := tmp_path / "pairs.jsonl").write_text(
        json.dumps({"id": "0", "prompt": "p", "chosen": "c", "rejected": "r"})
    )
    arguments = ["no-such-model", "--data", str(pairs), "--judge", str(path)]
    with pytest.raises(CritiqueRMError, match="holds no verdict in both orders on these pairs"):
        evaluate.evaluate_pairs(evaluate.parse_arguments(arguments))
    path.write_text(json.dumps({"id": ["0"], "with_critiques": False, "verdicts": verdicts | {
        "rejected_first": "chosen"}}))
    with pytest.raises(CritiqueRMError, match="verdicts.jsonl:1: not a verdict"):
        evaluate.evaluate_pairs(evaluate.parse_arguments(arguments))
    path.write_text(json.dumps({"id": "0", "with_critiques": False, "verdicts": verdicts | {
        "rejected_first": "X"}}))
    with pytest.raises(CritiqueRMError, match="verdicts.jsonl:1: not a verdict"):
        evaluate.evaluate_pairs(evaluate.parse_arguments(arguments))
    line = json.dumps({"id": "0", "with_critiques": True, "verdicts": verdicts | {"rejected_first": "chosen"}})
    path.write_text(f"{line}\n{line}\n")
    with pytest.raises(CritiqueRMError, match="verdicts.jsonl:2: a second verdict on '0'"):
        evaluate.evaluate_pairs(evaluate.parse_arguments(arguments))


def test_pairs_that_were_not_scored_lower_the_coverage():
    missing = [score(n, 0.0, "a") for n in range(2, 5)]
    scored = [score(0, 1.0, "a"), score(1, 1.0, "b")]
    rows = evaluate.tabulate(scored, scored + missing)
    assert [row(rows, "reward model", name).coverage for name in ("all", "a", "b")] == [0.4, 0.25, 1]


def test_subsets_have_rows_and_names_cannot_break_the_table():
    rows = evaluate.tabulate([score(0, 1.0, "a|b"), score(1, -1.0, "c")])
    assert row(rows, "reward model", "a|b").accuracy == 1.0
    assert row(rows, "reward model", "c").accuracy == 0.0
    assert "| reward model | a\\|b | 1 | 1.0000 |" in evaluate.to_markdown(rows)


@pytest.mark.parametrize("name", ["a\nb", "a\r\n| x |", "\t", "a\x1b[31m", "\u2028"])
def test_whatever_a_subset_is_called_a_row_is_a_line_of_equal_columns(name):
    blocks = evaluate.to_wide(evaluate.tabulate([score(0, 1.0, name), score(1, -1.0, "c")]))
    lines = evaluate.to_text(blocks).splitlines()
    assert len(lines) == 2 + 3
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {7}
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"x"', '"10"', "null", "true"])
def test_scores_that_are_no_numbers_are_refused(tmp_path, value):
    good = json.dumps(asdict(score(0, 1.0)))
    (path := tmp_path / "s.jsonl").write_text(f"{good}\n{good.replace('1.0', value, 1)}\n")
    with pytest.raises(CritiqueRMError, match="s.jsonl:2: not a line of --save-scores"):
        evaluate.read_scores(str(path))
    path.write_text(f"{good}\n{good}\n")
    with pytest.raises(CritiqueRMError, match="s.jsonl:2: id '0' comes twice"):
        evaluate.read_scores(str(path))


def test_a_sign_flip_by_hand():
    """Of the 16 signs of four prompts that differ by 1 in one direction, two are as far from zero."""
    prompts = [str(n) for n in range(6)]
    p = evaluate.sign_flip_p(np.array([1, 1, 1, 1, 0, 0.0]), prompts, seed=0)
    assert p == pytest.approx(2 / 16, abs=0.01)
    # two pairs a prompt: the sums are 2, 2 and 0, and two of four signs are as far
    p = evaluate.sign_flip_p(np.array([1, 1, 1, 1, 1, -1.0]), ["a", "a", "b", "b", "c", "c"], seed=0)
    assert p == pytest.approx(2 / 4, abs=0.02)
    assert evaluate.sign_flip_p(np.zeros(3), prompts[:3], seed=0) == 1


def test_a_sign_flip_finds_what_is_not_there_one_time_in_twenty():
    rng = np.random.default_rng(0)
    found = [
        evaluate.sign_flip_p(rng.choice([-1.0, 0, 1], 60), [str(n // 2) for n in range(60)], seed=n)
        for n in range(300)
    ]
    assert 0.02 < np.mean(np.array(found) < 0.05) < 0.09


def test_holm_by_hand():
    assert evaluate.adjust_holm([0.04, 0.01, 0.03, 0.9]) == pytest.approx([0.09, 0.04, 0.09, 0.9])
    assert evaluate.adjust_holm([0.6, 0.5]) == [1.0, 1.0] and evaluate.adjust_holm([]) == []


def test_a_comparison_by_hand(capsys):
    a = [score(n, margin, "xy"[n % 2]) for n, margin in enumerate([1, 1, 1, -1, 1, 0])]
    b = [score(n, margin, "xy"[n % 2]) for n, margin in enumerate([1, -1, -1, 1, 1])]
    overall, x, y = evaluate.compare(a, [*b, score(9, 1.0)])
    assert "5 pairs in both; 1 only in A, 1 in B" in capsys.readouterr().err
    assert (overall.pairs, overall.accuracy_of_A, overall.accuracy_of_B) == (5, 0.8, 0.6)
    assert (overall.only_A_right, overall.only_B_right) == (2, 1)
    assert overall.difference == pytest.approx(0.2)
    assert overall.low < 0 < overall.high and overall.p == pytest.approx(1.0, abs=0.01)
    assert (x.subset, x.pairs, x.difference) == ("x", 3, pytest.approx(1 / 3))
    assert (y.subset, y.pairs, y.difference) == ("y", 2, 0.0)
    table = evaluate.to_markdown([overall, x, y])
    assert "| all | 5 | 0.8000 | 0.6000 | 0.2000 |" in table
    same, *_ = evaluate.compare(a, a)  # no interval from 0 to 0
    assert (same.difference, same.low, same.high, same.p) == (0.0, None, None, 1.0)
    with pytest.raises(CritiqueRMError, match="not hold scores of the same pairs"):
        evaluate.compare(a, [score(0, 1.0, "x", prompt="another")])


def test_a_comparison_flips_prompts_and_corrects_subsets():
    """Three prompts of two pairs in each of two subsets, A always right: 2 of 8 signs, then Holm's."""
    a = [score(n, 1.0, "xy"[n // 6], prompt=str(n // 2)) for n in range(12)]
    overall, x, y = evaluate.compare(a, [replace(s, chosen_reward=-1.0) for s in a])
    assert overall.p == pytest.approx(2 / 64, abs=0.006)
    assert (x.p, y.p) == (pytest.approx(2 * 2 / 8, abs=0.03), pytest.approx(2 * 2 / 8, abs=0.03))


def test_robustness_by_hand():
    scores = [score(0, 2.0, words=(3, 1)), score(1, -1.0, words=(1, 2)), score(2, 1.0, words=(1, 3))]
    figures = evaluate.measure_robustness(scores)
    assert figures["accuracy where chosen is longer (1 pairs)"] == 1
    assert figures["accuracy where chosen is shorter (2 pairs)"] == 0.5
    losses = [np.log(1 + np.exp(-m)) for m in (2, -1, 1)]
    assert figures["log loss"] == pytest.approx(np.mean(losses))
    expected = np.corrcoef([2, -1, 1], [2, -1, -2])[0, 1]
    assert figures["correlation of margin and length difference"] == pytest.approx(expected)
    # confidences 0.88 (right), 0.73 (wrong), 0.73 (right): the last two fall into one bin
    one, two = 1 / (1 + np.exp(-2)), 1 / (1 + np.exp(-1))
    expected = (abs(1 - one) + abs(1 - 2 * two)) / 3
    assert figures["expected calibration error"] == pytest.approx(expected)
    assert figures["mean reward"] == pytest.approx(2 / 3 / 2)


def test_probes_move_critiques_and_nothing_else():
    pairs = [
        Pair(str(n), (), f"c{n}", f"r{n}", (f"+{n}",), (f"-{n}",), subset="ab"[n >= 10])
        for n in range(20)
    ]
    swapped = evaluate.apply_probe(pairs, "swapped", 0)
    assert swapped[3] == replace(pairs[3], chosen_critiques=("-3",), rejected_critiques=("+3",))
    empty = evaluate.apply_probe(pairs, "empty", 0)
    assert empty[3] == replace(pairs[3], chosen_critiques=("",), rejected_critiques=("",))
    alone = evaluate.apply_probe(pairs, "critique-only", 0)
    assert alone[3] == replace(pairs[3], chosen="", rejected="")
    shuffled = evaluate.apply_probe(pairs, "shuffled", 0)
    assert shuffled == evaluate.apply_probe(pairs, "shuffled", 0) != pairs
    for subset in "ab":
        before, after = (
            [c for p in those if p.subset == subset for c in p.chosen_critiques + p.rejected_critiques]
            for those in (pairs, shuffled)
        )
        assert sorted(before) == sorted(after)
    assert [(p.chosen, p.rejected) for p in shuffled] == [(p.chosen, p.rejected) for p in pairs]


def test_shuffling_moves_the_critique_of_a_response_once(tmp_path):
    """A response of a list has one critique in all its pairs; swapping is of pairs, by definition."""
    rows = [
        {"id": str(n), "prompt": f"p{n}", "chosen": ["a", "b"], "rejected": ["c", "d", "e"]}
        | {"chosen_critique": [f"{n}a", f"{n}b"], "rejected_critique": [f"{n}{x}" for x in "cde"]}
        for n in range(8)
    ]
    (path := tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = read_pairs(str(path))
    after = evaluate.shuffle_critiques(pairs, 0)
    moved = {}
    for p in after:
        for side, response in zip(("chosen", "rejected"), (p.chosen, p.rejected)):
            (critique,) = getattr(p, f"{side}_critiques")
            assert moved.setdefault((p.group, response), critique) == critique
    assert sorted(moved.values()) == sorted(f"{n}{x}" for n in range(8) for x in "abcde")
    assert all(critique != group + response for (group, response), critique in moved.items())


def test_shuffling_subsets_of_one_pair_is_not_swapping():
    pairs = [Pair(str(n), (), "c", "r", (f"+{n}",), (f"-{n}",), subset=str(n)) for n in range(40)]
    after = evaluate.shuffle_critiques(pairs, 0)
    n_swapped = sum(p.chosen_critiques == (f"-{p.id}",) for p in after)
    n_kept = sum(p.chosen_critiques == (f"+{p.id}",) for p in after)
    assert n_swapped < 4 and n_kept == 0


def test_shuffling_a_share_moves_no_more_than_that():
    pairs = [Pair(str(n), (), "c", "r", (f"+{n}",), (f"-{n}",), subset="ab"[n % 2]) for n in range(40)]
    assert evaluate.shuffle_critiques(pairs, 0, share=0.0) == pairs
    after = evaluate.shuffle_critiques(pairs, 0, share=0.25)
    texts = [[p.chosen_critiques + p.rejected_critiques for p in those] for those in (pairs, after)]
    n_moved = int((np.array(texts[0]) != np.array(texts[1])).sum())
    assert n_moved == 20
    assert sorted(sum(texts[0], ())) == sorted(sum(texts[1], ()))


def test_equal_pairs_by_hand():
    curve = np.array([0.5, 0.6, 0.8])
    sizes = [10, 100, 1000]
    assert evaluate.equal_pairs(0.6, sizes, curve) == pytest.approx(100)
    assert evaluate.equal_pairs(0.7, sizes, curve) == pytest.approx(10**2.5)
    assert evaluate.equal_pairs(0.4, sizes, curve) == 0
    assert evaluate.equal_pairs(0.9, sizes, curve) == np.inf
    assert evaluate.equal_pairs(0.6, sizes, np.array([0.6, 0.5, 0.7])) == 10  # the first, not 316
    worth = evaluate.Worth(None, 0.0, 3.0, smallest=0.1, largest=12.5)
    assert str(worth) == "more than 12.5 (less than 0.1 to 3)"


def test_a_curve_by_hand(capsys):
    """Plain: 0.5 and 0.75 of 40 pairs after 10 and 1,000; with critiques 0.625 after 10 already."""

    def right(n_right: int) -> list[PairScore]:
        return [score(n, 1.0 if n < n_right else -1.0) for n in range(40)]

    runs = {
        ("weak", 10): {0: right(24), 1: right(26)},
        ("weak", 1000): {0: right(39)},
        ("none", 10): {0: right(20)},
        ("none", 1000): {0: [*right(30), score(40, 1.0)]},
    }
    points = evaluate.measure_curve("t", runs, seed=0)
    err = capsys.readouterr().err
    assert "t: 1 pairs are left out" in err and "t: the interval of a single seed" in err
    assert [p.accuracy for p in points] == pytest.approx([0.5, 0.75, 0.625, 0.975])
    assert [p.seeds for p in points] == [1, 1, 2, 1]
    worth = [p.worth_in_plain_pairs for p in points]
    assert worth[0] is None and worth[2].value == pytest.approx(10)  # 10**2 pairs over 10
    assert worth[3] == evaluate.Worth(None, None, None, smallest=0.01, largest=1.0)
    assert str(worth[3]) == "more than 1 (more than 1 to more than 1)"
    assert points[0].low < 0.5 < points[0].high
    assert [p.more_than_none for p in points[:2]] == [None, None]
    assert [p.more_than_none.value for p in points[2:]] == pytest.approx([0.125, 0.225])
    assert "| t | weak | 10 | 2 | 40 | 0.6250 |" in evaluate.to_markdown(points)


def test_the_difference_of_two_curves_is_paired():
    """Of 40 pairs one is right with critiques only: drawn 0 to 3 times in the middle 95 %."""

    def right(n_right: int) -> list[PairScore]:
        return [score(n, 1.0 if n < n_right else -1.0) for n in range(40)]

    runs = {("a", 9): {0: right(9), 1: right(31)}, ("none", 9): {0: right(8), 1: right(30)}}
    _, point = evaluate.measure_curve("t", runs, seed=0)
    assert str(point.more_than_none) == "+0.025 (+0.000 to +0.075)"


def test_the_interval_of_a_curve_holds_the_luck_of_seeds():
    """Of four seeds one is always right: so are two of three drawn in 14 % of draws, all in 1.6 %."""
    runs = {("none", 10): {n: [score(k, n - 2.5) for k in range(9)] for n in range(4)}}
    (point,) = evaluate.measure_curve("t", runs, seed=0)
    assert (point.accuracy, point.low, point.high) == (0.25, 0.0, pytest.approx(2 / 3))


def test_a_point_of_a_curve_with_all_right_has_the_exact_interval():
    points = evaluate.measure_curve("t", {("none", 9): {0: [score(n, 1.0) for n in range(12)]}}, 0)
    assert (points[0].low, points[0].high) == (pytest.approx(0.7354, abs=1e-4), 1.0)
    one_prompt = {("none", 9): {0: [score(n, n - 0.5, prompt="p") for n in range(2)]}}
    points += evaluate.measure_curve("t", one_prompt, 0)
    assert (points[1].accuracy, points[1].low, points[1].high) == (0.5, None, None)


def test_a_curve_reads_what_train_leaves(finished, capsys, tmp_path):
    folder, out, _ = finished
    shutil.copytree(folder, copy := tmp_path / "copy")
    arguments = evaluate.parse_arguments(["--curve", str(folder), str(copy)])
    with pytest.raises(CritiqueRMError, match="copy: another run has its seed, pairs and critiques"):
        evaluate.print_curves(arguments)
    record = json.loads((folder / "run.json").read_text())
    older = {name: value for name, value in record.items() if name != "training_pairs"}
    (copy / "run.json").write_text(json.dumps(older))
    with pytest.raises(CritiqueRMError, match="copy: not a finished run, or one of an older"):
        evaluate.print_curves(arguments)
    record["arguments"]["seed"] = 1
    (copy / "run.json").write_text(json.dumps(record))
    assert evaluate.print_curves(arguments) == 0
    accuracy = json.loads(out.splitlines()[-1])["test_accuracy"]
    assert f"| test | of the data | 10 | 2 | 12 | {accuracy:.4f} |" in capsys.readouterr().out
    for name, value in ("lr", 1.0), ("train", "other.jsonl"):
        changed = record | {"arguments": record["arguments"] | {name: value}}
        (copy / "run.json").write_text(json.dumps(changed))
        with pytest.raises(CritiqueRMError, match=f"copy: trained with .*'{name}': {value!r}"):
            evaluate.print_curves(arguments)


def test_the_page_holds_the_data_as_text_that_cannot_end_its_script():
    evil = "</script><img src=x onerror=alert(1)>\u2028{data}__DATA__"
    pair = Pair(evil, (Message("user", evil),), evil, "b", (evil,), (), evil)
    scores = [replace(score(0, 1.5), subset=evil)]
    page = evaluate.to_html([{evil: [evil]}, evil], [pair], scores, {})
    assert page.count("</script>") == 2 and "<img" not in page
    data = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]
    (row,) = json.loads(data)["pairs"]
    assert row["chosen"] == {"reward": 1.5, "response": evil, "critiques": [evil]}
    assert (row["id"], row["prompt"]) == (evil, "user: " + evil)
    assert json.loads(data)["tables"] == [[[evil, [evil]]], evil]
    assert not re.search(r"https?:|src=|@import|innerHTML *=", page.replace(data, ""))
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', page, re.DOTALL)[1]
    assert [part.strip() for part in policy.split(";")] == [
        *("default-src 'none'", "style-src 'unsafe-inline'", "script-src 'unsafe-inline'"),
        "img-src data:",
    ]


EVIL = "</script><img src=x onerror=alert(1)>"
NODE = """
const made = [];
function element(tag) {
  const node = {tag, textContent: "", className: "", value: "", style: {}, children: [], heard: {}};
  node.appendChild = child => { node.children.push(child); return child; };
  node.replaceChildren = () => { node.children = []; };
  node.addEventListener = (event, listener) => { node.heard[event] = listener; };
  return node;
}
const known = {};
const document = {
  createElement: tag => { const node = element(tag); made.push(node); return node; },
  getElementById: id => known[id] ||= element(id),
};
const location = {hash: HASH, replace: url => { location.hash = url; }};
const heard = {};
const addEventListener = (event, listener) => { heard[event] = listener; };
let observed = 0;  // how often, as each time it is said anew whether the end is near
class IntersectionObserver {
  constructor(listener) { heard.scroll = near => listener([{isIntersecting: near}]); }
  observe() { observed += 1; }
  unobserve() {}
}
document.getElementById("order").value = "1";
document.getElementById("data").textContent = DATA;
SCRIPT
const shown = [];
const look = () => shown.push([get("count").textContent, main.children.map(card => card.id)]);
const enter = (id, value) => { get(id).value = value; get(id).heard.input(); look(); };
look();
STEPS
const nodes = made.map(node => [node.tag, node.className, node.textContent]);
const styles = made.filter(node => node.style.width).map(node => node.style);
const links = made.filter(node => node.href).map(node => node.href);
console.log(JSON.stringify({nodes, shown, styles, links, observed}));
"""
needs_node = pytest.mark.skipif(not shutil.which("node"), reason="runs the page's script in node")


def run_page(page: str, folder: Path, steps: str = "", address: str = "") -> dict:
    """What the script of a page has made, and after each look the count and the ids it shows."""
    data = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    program = NODE.replace("SCRIPT", script).replace("STEPS", steps)
    program = program.replace("HASH", json.dumps(address)).replace("DATA", json.dumps(data))
    (path := folder / "page.js").write_text(program)
    result = subprocess.run(["node", path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def plain_page(margins: dict[str, float], **changes) -> str:
    """Pairs by id with these margins; `changes` are of the first."""
    pairs = [Pair(id, (Message("user", "Q"),), "c", "r", ("good",), ("bad",), "s") for id in margins]
    pairs[0] = replace(pairs[0], **changes)
    scores = [replace(score(0, margin), id=id) for id, margin in margins.items()]
    return evaluate.to_html([], pairs, scores, {})


def audited_page(with_audit: bool = True) -> str:
    """Two pairs that share a chosen response with two critiques, of which the second misleads."""
    prompt = (Message("user", EVIL),)
    pairs = [Pair(n, prompt, "c", f"r{n}", ("good", EVIL), (f"bad{n}",)) for n in "ab"]
    scores, plain = [], []
    for n, pair in enumerate(pairs):
        rewards = {"chosen_rewards": [2.0, 0.25], "rejected_rewards": [-1.0, 1.5][n : n + 1]}
        scores.append(replace(score(n, 1.0), id=pair.id, **rewards))
        plain.append(PairScore(pair.id, "p", "", 1.0, 0.5, 1, 1, None, None))
    audit = evaluate.audit_critiques(pairs, scores, plain) if with_audit else None
    return evaluate.to_html([], pairs, scores, {}, audit)


def test_an_audit_of_prompts_with_tools_is_read_back(tmp_path):
    """Else the critiques that it keeps could not be given to train.py."""
    row = {"id": "a", "prompt": "Q", "tools": [{"name": "weather"}], "chosen": "c", "rejected": "r"}
    row |= {"chosen_critique": "good", "rejected_critique": "bad"}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row))
    pairs = read_pairs(str(path))
    scored = replace(score("a", 1.0), chosen_rewards=[1.0], rejected_rewards=[0.0])
    audit = evaluate.audit_critiques(pairs, [scored], [scored])
    path = tmp_path / "audit.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in audit))
    answers = read_answers(str(path))
    assert [answer.prompt for answer in answers] == [pairs[0].prompt] * 2
    assert [answer.critiques for answer in answers] == [("good",), ("bad",)]


def page_data(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_marks_the_critiques_that_mislead_and_by_how_much():
    """Shifts of 1, −0.75, −1.5 and 1 are −0.0625 in the mean, which is usual here; the page shows
    those that mislead beyond that: −0.75 + 0.0625 in both pairs, and 1 + 0.0625."""
    page = audited_page()
    data = page_data(page)
    assert page.count("</script>") == 2 and "<img" not in page
    assert [pair["chosen"]["misleads"] for pair in data["pairs"]] == [[None, -0.6875]] * 2
    assert [pair["rejected"]["misleads"] for pair in data["pairs"]] == [[None], [1.0625]]
    worst = [(m["id"], m["side"], m["critique"], m["shift"]) for m in data["misleading"]]
    assert worst == [("b", "rejected", "badb", 1.0), ("a", "chosen", EVIL, -0.75)]
    assert data["misleading"][1]["prompt"] == "user: " + EVIL


def test_the_page_without_an_audit_holds_none():
    data = page_data(audited_page(with_audit=False))
    assert list(data) == ["tables", "pictures", "pairs"]
    assert list(data["pairs"][0]["chosen"]) == ["reward", "response", "critiques"]


@needs_node
@pytest.mark.parametrize("with_audit", [True, False])
def test_the_script_of_the_page_shows_the_marks_as_text(with_audit, tmp_path):
    made = run_page(audited_page(with_audit), tmp_path)["nodes"]
    shifts = [text for _, name, text in made if name == "shift"]
    down, up = "misleads by -0.688", "misleads by +1.063"
    assert shifts == ([up, down, down, down, up] if with_audit else [])
    critiques = [[name, text] for _, name, text in made if name.startswith("critique")]
    of_pairs = critiques[2:] if with_audit else critiques
    marked = "critique misleads" if with_audit else "critique"
    assert of_pairs == [
        *(["critique", "good"], [marked, EVIL], ["critique", "bada"]),
        *(["critique", "good"], [marked, EVIL], [marked, "badb"]),
    ]


@needs_node
def test_tables_come_to_the_page_as_columns_and_text(tmp_path):
    """A cell may hold what Markdown would take for the end of it."""
    blocks = [{"": ["a | b", "c"], "n": ["1", "2"]}, "- a note"]
    pair = Pair("a", (Message("user", "Q"),), "c", "r", (), ())
    page = evaluate.to_html(blocks, [pair], [replace(score(0, 1.0), id="a")], {"margins": "data:,"})
    nodes = run_page(page, tmp_path)["nodes"]
    tags = [(tag, text) for tag, _, text in nodes[: nodes.index(["article", "right", ""])]]
    assert tags == [
        *(("table", ""), ("tr", ""), ("th", ""), ("th", "n")),
        *(("tr", ""), ("td", "a | b"), ("td", "1"), ("tr", ""), ("td", "c"), ("td", "2")),
        *(("pre", "- a note"), ("img", "")),
    ]


@needs_node
def test_the_search_reads_ids_prompts_responses_and_critiques(tmp_path):
    page = plain_page({"a": 1.0, "b": -2.0, "c": 3.0}, rejected="An ÄPFEL pie", subset="t")
    for changes in ({"id": "xÄpfel"}, {"prompt": (Message("user", "äpfel"),)}, {"rejected_critiques": ("x", "äpfel")}):
        assert "pfel" in plain_page({"a": 1.0}, **changes)
        (_, after) = run_page(plain_page({"a": 1.0, "b": 2.0}, **changes), tmp_path, 'enter("search", "ÄPFEL")')["shown"]
        assert after == ["1 of 2 pairs, 1 right", [changes.get("id", "a")]]
    steps = """
    enter("search", "äpfel");
    enter("search", "nowhere");
    enter("search", "");
    enter("order", "-1");
    enter("side", "right");
    enter("subset", "t");
    enter("side", "wrong");
    """
    assert run_page(page, tmp_path, steps)["shown"] == [
        ["3 of 3 pairs, 2 right", ["b", "a", "c"]],
        ["1 of 3 pairs, 1 right", ["a"]],
        ["0 of 3 pairs, 0 right", []],
        ["3 of 3 pairs, 2 right", ["b", "a", "c"]],
        ["3 of 3 pairs, 2 right", ["c", "a", "b"]],
        ["2 of 3 pairs, 2 right", ["c", "a"]],
        ["1 of 3 pairs, 1 right", ["a"]],
        ["0 of 3 pairs, 0 right", []],
    ]


@needs_node
def test_a_link_shows_its_pair_first_whatever_the_filters(tmp_path):
    page = plain_page({"7/1 ü&?": 5.0, "b": -2.0, "c": 3.0})
    found = run_page(page, tmp_path, 'enter("side", "wrong"); enter("search", "nowhere");', "#7%2F1%20%C3%BC%26%3F")
    assert found["shown"] == [
        ["3 of 3 pairs, 2 right", ["7/1 ü&?", "b", "c"]],
        ["1 of 3 pairs, 0 right", ["7/1 ü&?", "b"]],
        ["0 of 3 pairs, 0 right", ["7/1 ü&?"]],
    ]
    assert found["links"][:3] == ["#7%2F1%20%C3%BC%26%3F", "#b", "#c"]
    steps = """
    enter("side", "wrong");
    const go = address => { location.hash = address; heard.hashchange(); look(); };
    go("#b");  // it is there: the page stays as it is
    go("#c");
    go("#%");
    """
    assert [ids for _, ids in run_page(page, tmp_path, steps, "#nobody")["shown"]] == [
        ["b", "c", "7/1 ü&?"],
        *(["b"], ["b"], ["c", "b"], ["b"]),
    ]


@needs_node
def test_the_page_adds_pairs_as_one_scrolls(tmp_path):
    page = plain_page({str(n): float(n) for n in range(120)})
    steps = """
    heard.scroll(false); look();
    heard.scroll(true); look();
    heard.scroll(true); look();
    heard.scroll(true); look();
    enter("search", "1");
    """
    found = run_page(page, tmp_path, steps)
    every = [str(n) for n in range(120)]
    ids = [ids for _, ids in found["shown"]]
    assert ids[:5] == [every[:50], every[:50], every[:100], every, every]
    assert ids[5] == [n for n in every if "1" in n][:50]
    assert found["observed"] == 5  # at the start, after each of three portions, after the search


@needs_node
def test_bars_are_as_long_as_margins(tmp_path):
    styles = run_page(plain_page({"a": -1.0, "b": 0.0, "c": 4.0}), tmp_path)["styles"]
    assert styles == [
        {"width": "12.5%", "left": "37.5%"},
        {"width": "0%", "left": "50%"},
        {"width": "50%", "left": "50%"},
    ]


def test_a_wilson_interval_by_hand():
    """One of one: 1 / (1 + 1.96²) to 1; seven of ten as in the textbooks."""
    assert evaluate.wilson_interval(1.0, 1) == pytest.approx((1 / (1 + 1.96**2), 1.0))
    assert evaluate.wilson_interval(0.0, 1) == pytest.approx((0.0, 1.96**2 / (1 + 1.96**2)))
    assert evaluate.wilson_interval(0.7, 10) == pytest.approx((0.3968, 0.8922), abs=1e-4)


def test_calibration_bins_by_hand():
    """σ(1) = 0.731 is in the fifth tenth from 0.5 to 1, σ(40) in the last; pairs of one prompt are
    one to the interval."""
    margins = {"p": [1.0, -1.0, 1.0], "q": [1.0], "r": [40.0]}
    scores = [score(n, m, prompt=p) for p in margins for n, m in enumerate(margins[p])]
    fifth, last = evaluate.calibrate(scores)
    assert (fifth.start, fifth.pairs, fifth.accuracy) == (pytest.approx(0.7), 4, 0.75)
    assert fifth.confidence == pytest.approx(1 / (1 + np.exp(-1)))
    assert (fifth.low, fifth.high) == evaluate.wilson_interval(0.75, 2)
    assert (last.start, last.pairs, last.confidence) == (pytest.approx(0.95), 1, 1.0)
    assert (last.low, last.high) == pytest.approx((1 / (1 + 1.96**2), 1.0))


def intervals(axes) -> list[list[float]]:
    """Lower and upper ends of the vertical lines of a picture."""
    lines = [line for drawn in axes.collections for line in drawn.get_segments()]
    return [line[:, 1].tolist() for line in lines]


def test_the_picture_of_calibration_says_how_many_pairs_are_in_a_bin():
    pytest.importorskip("matplotlib")
    scores = [score(n, margin) for n, margin in enumerate([1.0, -1.0, 40.0])]
    above, below = evaluate.plot_calibration(scores).axes
    diagonal, points = above.lines
    assert points.get_linestyle() == "None" and points.get_ydata().tolist() == [0.5, 1.0]
    assert intervals(above) == [[b.low, b.high] for b in evaluate.calibrate(scores)]
    assert [text.get_text() for text in below.texts] == ["2", "1"]
    assert [bar.get_x() for bar in below.patches] == pytest.approx([0.7, 0.95])
    labels = [above.get_ylabel(), below.get_ylabel(), below.get_xlabel()]
    assert labels == ["accuracy", "pairs", "confidence: σ(|margin|)"]


def test_the_page_shows_pictures_where_matplotlib_is(monkeypatch):
    scores = [score(n, margin, words=(n, 2)) for n, margin in enumerate([2.0, -1.0, 0.5])]
    if evaluate.import_figure():
        pictures = evaluate.plot_scores(scores)
        assert list(pictures) == ["margins by length", "calibration"]
        for url in pictures.values():
            assert base64.b64decode(url.partition("data:image/png;base64,")[2])[:4] == b"\x89PNG"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert evaluate.plot_scores(scores) == {}
    with pytest.raises(CritiqueRMError, match="pip install matplotlib"):
        evaluate.plot_curve([])


def curve_points(test: str = "t") -> list[evaluate.Point]:
    """Three sizes without critiques and with two kinds of them, of the second the last size only."""
    points = []
    for n, size in enumerate([256, 512, 603]):
        points.append(evaluate.Point(test, "none", size, 5, 40, 0.5 + n / 10, 0.4, 0.9))
    for n, size in enumerate([256, 512, 603]):
        more = evaluate.Estimate(0.1 + n / 10, 0.05, 0.5)
        points.append(evaluate.Point(test, "of the data", size, 5, 40, 0.6 + n / 5, 0.5, 1.0, more))
    more = evaluate.Estimate(-0.2, -0.3, -0.1)
    points.append(evaluate.Point(test, "_weak.jsonl", 603, 3, 40, 0.5, None, None, more))
    return points


def test_the_picture_of_a_curve_holds_accuracy_and_difference():
    pytest.importorskip("matplotlib")
    figure = evaluate.plot_curve(curve_points())
    left, right = figure.axes
    assert (left.get_title(), right.get_title()) == ("t, 40 pairs", "t: with critiques minus without")
    assert (left.get_ylabel(), right.get_ylabel()) == ("accuracy", "difference in accuracy")
    assert left.get_xlabel() == right.get_xlabel() == "training pairs"
    _, *curves = left.lines
    assert [line.get_ydata().tolist() for line in curves] == [
        *([0.5, 0.6, 0.7], pytest.approx([0.6, 0.8, 1.0]), [0.5]),
    ]
    assert intervals(left) == [[0.4, 0.9]] * 3 + [[0.5, 1.0]] * 3 + [[0.5, 0.5]]
    zero, *differences = right.lines
    assert list(zero.get_ydata()) == [0, 0]
    assert [line.get_ydata().tolist() for line in differences] == [pytest.approx([0.1, 0.2, 0.3]), [-0.2]]
    assert intervals(right) == [[0.05, 0.5]] * 3 + [[-0.3, -0.1]]
    assert [line.get_color() for line in curves[1:]] == [line.get_color() for line in differences]
    assert len({line.get_color() for line in curves} & set(evaluate.COLORS)) == 3
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["chance", "none", "of the data", "_weak.jsonl"]
    assert figure.get_suptitle() == "Means of 3 to 5 seeds; 95 % intervals over prompts and seeds"


def test_a_curve_without_critiques_has_no_difference_to_draw():
    pytest.importorskip("matplotlib")
    points = [replace(point, seeds=1) for point in curve_points()[:3]]
    figure = evaluate.plot_curve(points)
    assert [axes.get_ylabel() for axes in figure.axes] == ["accuracy"]
    assert figure.get_suptitle() == "One seed; 95 % intervals over prompts"


def test_nothing_overlaps_in_the_picture_of_a_curve(tmp_path):
    """Neither ticks nor titles nor legend, with sizes close together, two tests and long names."""
    pytest.importorskip("matplotlib")
    points = curve_points() + curve_points("a-test-file-of-which-the-name-is-as-long-as-names-of-files-get-to-be")
    sizes = [100_000, 200_000, 400_000, 800_000, 1_600_000]
    for n, size in enumerate(sizes):
        name = f"critiques-of-a-critic-with-a-long-name-{n}.jsonl"
        points.append(replace(points[3], critiques=name, training_pairs=size))
    figure = evaluate.plot_curve(points)
    figure.savefig(path := tmp_path / "curve.svg")
    assert path.read_text().startswith("<?xml") and path.stat().st_size < 200_000
    figure.draw_without_rendering()
    boxes = {"legend": figure.legends[0].get_window_extent()}
    for n, axes in enumerate(figure.axes):
        texts = [axes.title, axes.xaxis.label, axes.yaxis.label]
        for text in [*texts, *axes.get_xticklabels(), *axes.get_yticklabels()]:
            if text.get_text():
                boxes[n, text.get_text()] = text.get_window_extent()
    outside = [name for name, box in boxes.items() if box.x0 < 0 or box.x1 > figure.bbox.x1]
    assert outside == []
    pairs = itertools.combinations(boxes, 2)
    assert [(a, b) for a, b in pairs if boxes[a].overlaps(boxes[b])] == []


def test_sizes_too_close_to_the_next_have_no_label():
    labels = evaluate.label_sizes([32, 64, 128, 256, 512, 603])
    assert labels == ["32", "64", "128", "256", "", "603"]
    assert evaluate.label_sizes([7]) == ["7"]


def test_a_picture_of_an_unknown_kind_is_refused_at_once(capsys):
    with pytest.raises(SystemExit) as ended:
        evaluate.parse_arguments(["--curve", "RUN", "--plot", "curve.doc"])
    assert ended.value.code == 2
    assert "--plot curve.doc: the name must end in .png, .svg, .pdf" in capsys.readouterr().err


def test_probes_of_a_run_stand_beside_its_accuracy(finished, test_file, mesh, capsys, tmp_path):
    folder, out, _ = finished
    probes = ["swapped", "response-only"]
    options = [word for probe in probes for word in ("--probe", probe)]
    scores = tmp_path / "a.jsonl"
    options += ["--data", str(test_file), "--save-scores", str(scores)]
    assert evaluate.evaluate_pairs(evaluate.parse_arguments([str(folder), *options])) == 0
    table = capsys.readouterr().out
    accuracy = json.loads(out.splitlines()[-1])["test_accuracy"]
    names, _, row = (line.split(" | ") for line in table.splitlines()[:3])
    table_row = dict(zip(names, row))
    assert list(table_row)[4:6] == ["swapped", "response-only"]
    assert table_row["reward model"] == f"{accuracy:.3f}"
    assert "- response-only: critiques and separator removed" in table
    swapped = [json.loads(line) for line in test_file.read_text().splitlines()]
    for row in swapped:
        row["chosen_critique"], row["rejected_critique"] = row["rejected_critique"], row["chosen_critique"]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in swapped))
    options = ["--data", str(test_file), "--critiques", str(other)]
    assert evaluate.evaluate_pairs(evaluate.parse_arguments([str(folder), *options])) == 0
    assert f"| all | 12 | {table_row['swapped']} |" in capsys.readouterr().out
    options = ["--data", str(test_file), "--no-critiques"]
    assert evaluate.evaluate_pairs(evaluate.parse_arguments([str(folder), *options])) == 0
    assert f"| all | 12 | {table_row['response-only']} |" in capsys.readouterr().out
    two = ["--compare", str(scores), str(folder / "scores-test.jsonl")]
    assert evaluate.compare_scores(evaluate.parse_arguments(two)) == 0
    assert f"| all | 12 | {accuracy:.4f} | {accuracy:.4f} | 0.0000 |" in capsys.readouterr().out


def test_equal_critiques_are_ties_of_a_probe_without_responses(
    finished, test_file, mesh, capsys, tmp_path
):
    rows = [json.loads(line) for line in test_file.read_text().splitlines()]
    for row in rows[:3]:
        row["rejected_critique"] = row["chosen_critique"]
    (data := tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = tmp_path / "table.json"
    options = ["--data", str(data), "--probe", "critique-only", "--json", str(table)]
    assert evaluate.evaluate_pairs(evaluate.parse_arguments([str(finished[0]), *options])) == 0
    rows = json.loads(table.read_text())["rows"]
    probe = next(row for row in rows if row["scorer"] == "reward model, critique-only")
    assert (probe["pairs"], probe["ties"], probe["coverage"]) == (12, 3 / 12, 1)


def test_an_audit_is_in_its_file_in_the_table_and_on_the_page(
    finished, test_file, mesh, capsys, tmp_path
):
    audit, html, table = tmp_path / "audit.jsonl", tmp_path / "a.html", tmp_path / "table.json"
    options = ["--data", test_file, "--audit", audit, "--html", html, "--json", table]
    arguments = evaluate.parse_arguments([str(word) for word in (finished[0], *options)])
    assert evaluate.evaluate_pairs(arguments) == 0
    rows = [json.loads(line) for line in audit.read_text().splitlines()]
    shifts = [row["shift"] - row["usual_shift"] for row in rows if row["misleads"]]
    assert 0 < len(shifts) < len(rows) == 24
    data = page_data(html.read_text())
    marks = [pair[side]["misleads"] for pair in data["pairs"] for side in ("chosen", "rejected")]
    assert sorted(shift for side in marks for shift in side if shift) == sorted(shifts)
    out = capsys.readouterr().out
    for subset in {row["subset"] for row in rows}:
        those = [row for row in rows if row["subset"] == subset]
        towards = [(row["shift"] >= 0) == (row["side"] == "chosen") for row in those]
        right = [not row["misleads"] for row in those]
        assert f"| {subset} | {len(those)} | {np.mean(towards):.3f} | {np.mean(right):.3f} |" in out
    assert out.count("\n- ") == min(10, len(shifts)) == len(data["misleading"])
    assert "matrix" not in table.read_text()


def test_rm_bench_rows_print_their_matrix(finished, mesh, capsys, tmp_path):
    texts = ["four", "It is four.", "**four**"]
    row = {"id": "a", "prompt": "2 + 2?", "chosen": texts, "rejected": [t + "!" for t in texts]}
    row |= {"chosen_critique": ["right"] * 3, "rejected_critique": ["wrong"] * 3}
    (data := tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    table, scores = tmp_path / "table.json", tmp_path / "scores.jsonl"
    options = ["--data", data, "--json", table, "--save-scores", scores]
    arguments = evaluate.parse_arguments([str(word) for word in (finished[0], *options)])
    assert evaluate.evaluate_pairs(arguments) == 0
    matrix = [[0.0] * 3 for _ in range(3)]
    for line in scores.read_text().splitlines():
        s = json.loads(line)
        is_right = s["chosen_reward"] > s["rejected_reward"]
        matrix[s["chosen_index"]][s["rejected_index"]] = float(is_right)
    assert json.loads(table.read_text())["benchmarks"]["RM-Bench"]["matrix"] == matrix
    out = capsys.readouterr().out
    heads = ["RM-Bench: hard", "RM-Bench: chosen is | rejected is concise", "| log loss"]
    assert sorted(heads, key=out.index) == heads


def test_evaluating_a_run_repeats_its_test(finished, by_two):
    """In two processes, though it was tested by one."""
    folder, out, _ = finished
    accuracy = json.loads(out.splitlines()[-1])["test_accuracy"]
    markdown = (by_two / "table.md").read_text()
    assert markdown.splitlines()[2].startswith(f"| all | 12 | {accuracy:.3f} |")
    assert json.loads((by_two / "table.json").read_text())["rows"][0]["accuracy"] == accuracy
    mine, trained = (
        [json.loads(line)["chosen_reward"] for line in path.read_text().splitlines()]
        for path in (by_two / "scores.jsonl", folder / "scores-test.jsonl")
    )
    np.testing.assert_allclose(mine, trained, atol=1e-5)


def test_single_answers_get_the_reward_they_have_in_a_pair(finished, tmp_path, mesh, capsys):
    folder, _, _ = finished
    pair = json.loads((ROOT / "data" / "test.jsonl").read_text().splitlines()[0])
    answers = tmp_path / "answers.jsonl"
    rows = [
        {"id": "a", "prompt": pair["prompt"], "response": pair["chosen"], "critique": pair["chosen_critique"]},
        {"id": "b", "prompt": pair["prompt"], "response": pair["chosen"]},
    ]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = evaluate.score_single(evaluate.parse_arguments([str(folder), "--answers", str(answers)]))
    captured = capsys.readouterr()
    first, second = map(json.loads, captured.out.splitlines())
    expected = json.loads((folder / "scores-test.jsonl").read_text().splitlines()[0])
    assert first == {"id": "a", "reward": pytest.approx(expected["chosen_reward"], abs=1e-5)}
    assert (second, code) == ({"id": "b", "reward": None}, 1)
    assert "1 of 2 answers have no reward" in captured.err
    answers.write_text("not JSON\n" + json.dumps(rows[0]))
    options = [str(folder), "--answers", str(answers), "--skip-bad"]
    assert evaluate.score_single(evaluate.parse_arguments(options)) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == first and "1 bad records skipped" in captured.err


def test_two_commands_lead_from_raw_answers_to_rewards(
    finished, tmp_path, mesh, capsys, monkeypatch
):
    """The reward of an answer with two critiques is the mean of its rewards with each of them."""
    folder, _, _ = finished
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n % 2} + 2?", "response": str(n)} for n in range(4)]
    raw = "".join(json.dumps(row) + "\n" for row in rows)
    Path("answers.jsonl").write_text(raw)
    server = Server(lambda request, number: completion(f"Critique number {number}: it is wrong."))
    options = ["--base-url", server.url, "--model", "m", "--n-critiques", "2", "--workers", "1"]
    assert generate.main(["answers.jsonl", "--output", "with.jsonl", *options]) == 0
    server.stop()
    capsys.readouterr()
    arguments = evaluate.parse_arguments([str(folder), "--answers", "with.jsonl"])
    assert evaluate.score_single(arguments) == 0
    rewards = capsys.readouterr().out
    found = [json.loads(line)["reward"] for line in rewards.splitlines()]
    criticised = [json.loads(line) for line in Path("with.jsonl").read_text().splitlines()]
    alone = []
    for row in criticised:
        alone += [json.dumps(row | {"critique": critique}) for critique in row["critique"]]
    Path("alone.jsonl").write_text("\n".join(alone))
    arguments = evaluate.parse_arguments([str(folder), "--answers", "alone.jsonl"])
    assert evaluate.score_single(arguments) == 0
    each = [json.loads(line)["reward"] for line in capsys.readouterr().out.splitlines()]
    assert len(set(each)) == 8
    assert found == pytest.approx(np.reshape(each, (4, 2)).mean(axis=1), abs=1e-5)
    best = [max((0, 2), key=found.__getitem__), max((1, 3), key=found.__getitem__)]
    Path("rewards.jsonl").write_text(rewards)
    page = (ROOT / "docs/evaluating.md").read_text()
    (command,) = re.findall(r"^jq .*max_by.*$", page, re.MULTILINE)
    if shutil.which("jq"):
        lines = subprocess.run(command, shell=True, stdout=subprocess.PIPE, text=True, check=True)
        picked = [json.loads(line)["response"] for line in lines.stdout.splitlines()]
        assert picked == [rows[n]["response"] for n in best]


def test_a_folder_without_a_head_is_refused_in_one_line(finished, tmp_path, monkeypatch, capsys):
    folder, _, _ = finished
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    from safetensors.torch import load_file, save_file

    stored = load_file(next(folder.glob("*.safetensors")))
    save_file({k: v for k, v in stored.items() if k != "score.weight"}, tmp_path / "model.safetensors")
    data = str(ROOT / "data" / "test.jsonl")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path), "--data", data])
    code, (out, err) = evaluate.main(), capsys.readouterr()
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith(f"evaluate.py: {tmp_path}: 1 weights are not in")
    assert "it has no reward head" in err


@pytest.mark.parametrize("flag", ["--score", "--scores"])
def test_flags_that_were_renamed_have_one_spelling(flag, capsys):
    with pytest.raises(SystemExit) as ended:
        evaluate.parse_arguments(["RUN", "--data", "a.jsonl", flag, "b.jsonl"])
    assert ended.value.code == 2
    assert f"unrecognized arguments: {flag} b.jsonl" in capsys.readouterr().err


def test_what_needs_pairs_is_refused_with_single_answers(capsys):
    with pytest.raises(SystemExit) as ended:
        evaluate.parse_arguments(["RUN", "--answers", "a.jsonl", "--save-scores", "b.jsonl"])
    assert ended.value.code == 2
    assert "--save-scores, --audit, --judge, --probe, --html, --critiques go with --data" in capsys.readouterr().err
