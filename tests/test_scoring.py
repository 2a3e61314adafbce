"""critique_rm.py: the loss by hand, and the rewards of pairs and of single answers."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import critique_rm as rm
from conftest import ASKED, assistant, sized, talk, user, words
from critique_rm import Answer


@pytest.mark.parametrize(
    "chosen, rejected, margin, centering, expected",
    [
        (1.5, 1.5, 0, 0, math.log(2)),
        (2, 0, 0, 0, math.log(1 + math.exp(-2))),
        (2, 0, 1, 0, math.log(1 + math.exp(-1))),
        (2, 1, 0, 0.1, math.log(1 + math.exp(-1)) + 0.1 * 9),
        (-200, 200, 0, 0, 400),
    ],
)
def test_loss_by_hand(chosen, rejected, margin, centering, expected):
    values = (torch.tensor([float(v)] * 3) for v in (chosen, rejected, margin))
    assert rm.pairwise_loss(*values, centering).item() == pytest.approx(3 * expected, rel=1e-6)


def test_a_reward_of_a_pair_is_the_mean_over_its_critiques(reward_folder, mesh, tmp_path):
    model, encoder = rm.load_reward_model(str(reward_folder), max_length_tokens=300)
    pairs = [
        sized(3, 2, 4, id="a", chosen_critiques=("good", "very good", "good")),
        sized(3, 5, 1, id="b", subset="s"),
        sized(2, 2, 2, id="c"),
    ]
    encoded = encoder.encode_pairs(pairs, "a")
    assert [len(e.chosen) for e in encoded] == [3, 1, 1]
    scores = rm.score_pairs(model, encoded, 500)
    for pair, score in zip(pairs, scores):
        for answer, mean in zip(pair.answers, (score.chosen_reward, score.rejected_reward)):
            singles = [replace(answer, critiques=(critique,)) for critique in answer.critiques]
            rewards = rm.score_answers(model, encoder, singles)
            assert mean == pytest.approx(np.mean(rewards), abs=1e-5)
    assert [(score.id, score.subset) for score in scores] == [("a", ""), ("b", "s"), ("c", "")]
    assert scores[0].prompt_id == scores[1].prompt_id != scores[2].prompt_id
    assert (scores[0].chosen_words, scores[0].rejected_words) == (2, 4)
    assert (scores[0].chosen_critique_words, scores[0].rejected_critique_words) == (4 / 3, 2)
    rm.write_scores(tmp_path / "scores.jsonl", scores)
    rows = (tmp_path / "scores.jsonl").read_text().splitlines()
    assert [rm.PairScore(**json.loads(row)) for row in rows] == scores


def test_an_answer_that_cannot_be_read_whole_has_no_reward(reward_folder, mesh):
    model, encoder = rm.load_reward_model(str(reward_folder), max_length_tokens=300)
    critiques = [("c",), (), (words("c", 300),), ("d",), ("c", "d")]
    answers = [Answer(talk(ASKED), "r", several) for several in critiques]
    rewards = rm.score_answers(model, encoder, answers)
    assert [reward is None for reward in rewards] == [False, True, True, False, False]
    assert rewards[4] == pytest.approx((rewards[0] + rewards[3]) / 2, abs=1e-6)
    encoder.use_critiques = False  # all five are then the same
    rewards = rm.score_answers(model, encoder, answers)
    assert rewards == [rewards[0]] * 5 and rewards[0] is not None


def test_a_reward_function_gives_the_rewards_of_single_answers_in_order(reward_folder, mesh):
    asked = []

    def critic(prompt: str | list[dict], response: str) -> str:
        asked.append((prompt, response))
        return f"about {response}"

    reward = rm.make_reward_function(str(reward_folder), critic)
    prompts = ["p", [user("q")], "p", "p"]
    completions = ["a b c", [assistant("d")], "e", "a b c"]
    rewards = reward(prompts, completions, critique=["good", None, ["x", "y"], None], extra=[1] * 4)
    assert asked == [([user("q")], "d"), ("p", "a b c")]
    model, encoder = rm.load_reward_model(str(reward_folder))
    singles = [("p", "a b c", ("good",)), ("q", "d", ("about d",))]
    singles += [("p", "e", ("x", "y")), ("p", "a b c", ("about a b c",))]
    answers = [Answer(talk([user(p)]), r, c) for p, r, c in singles]
    assert rewards == pytest.approx(rm.score_answers(model, encoder, answers), abs=1e-6)
    assert rm.make_reward_function(str(reward_folder))(["p"], ["a"]) == [None]  # no critique
    with pytest.raises(ValueError):
        reward(["p"], ["a", "b"])
