"""critique_rm.py, the model: packed rewards and gradients are those of each sequence alone."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import critique_rm as rm
from conftest import (
    ARCHITECTURES,
    CPU,
    OTHERS,
    RECURRENT,
    load,
    random_groups,
    rewards_alone,
    rewards_together,
    save_tiny,
)

WITH_SDPA = [(name, "sdpa") for name in ARCHITECTURES if name != "Gemma2"]  # which has none
EAGER = [(name, "eager") for name in ARCHITECTURES if name not in RECURRENT]


def gradient(p: torch.nn.Parameter) -> torch.Tensor:
    if p.grad is None:
        return torch.zeros(p.shape)
    return p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad


@pytest.mark.parametrize("name, attention", EAGER + WITH_SDPA)
def test_packed_rewards_and_gradients_equal_hugging_face_on_each_sequence(
    tmp_path, mesh, make_config, name, attention
):
    folder, groups = save_tiny(make_config, name, tmp_path), random_groups(1, 2, 8)
    ours = load(folder, mesh, attention)
    theirs = AutoModelForSequenceClassification.from_pretrained(
        folder, attn_implementation=attention
    ).eval()
    assert rm.shares_prefixes(ours, 40) == (name not in RECURRENT)
    together, alone = rewards_together(ours, groups), rewards_alone(theirs, groups)
    assert alone.std() > 0.1
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    for rewards in (together, alone):
        (rewards * torch.linspace(-1, 1, len(rewards))).sum().backward()
    scale = max(gradient(p).norm() for p in theirs.parameters())
    for (name, p), expected in zip(ours.named_parameters(), theirs.parameters()):
        assert (gradient(p) - gradient(expected)).norm() <= 1e-5 * scale, name


@pytest.mark.parametrize("name", OTHERS)
def test_rewards_of_other_architectures_are_right(tmp_path, mesh, make_config, name):
    """Prefixes are shared only where a token's position can be given."""
    folder, groups = save_tiny(make_config, name, tmp_path), random_groups(1, 2, 3)
    model = load(folder, mesh)
    assert rm.shares_prefixes(model, 40) == (name in ("GPT2", "OPT"))
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        together, alone = rewards_together(model, groups), rewards_alone(theirs, groups)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["Gemma3Text", "Jamba"])
def test_neighbours_order_and_padding_do_not_change_a_reward(tmp_path, mesh, make_config, name):
    model = load(save_tiny(make_config, name, tmp_path), mesh)
    groups = random_groups(1, 3, 2, 5)
    expected = sum(rm.score_groups(model, groups, 10**6), [])
    singles = [[s] for group in groups for s in group]
    for budget in (1, 100):
        backwards = rm.score_groups(model, [g[::-1] for g in groups[::-1]], budget)
        assert sum(backwards, [])[::-1] == pytest.approx(expected, abs=5e-6)
        apart = rm.score_groups(model, singles, budget)
        assert sum(apart, []) == pytest.approx(expected, abs=5e-6)


def test_an_empty_micro_batch_adds_no_reward_and_no_gradient(tmp_path, mesh, make_config):
    model = load(save_tiny(make_config, "Llama", tmp_path), mesh)
    rewards = rm.compute_rewards(model, rm.collate([], CPU), share_prefixes=True)
    assert rewards.shape == (0,)
    rm.pairwise_loss(rewards, rewards, rewards).backward()
    assert all(p.grad is None or not p.grad.full_tensor().any() for p in model.parameters())
