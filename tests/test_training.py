"""train.py, training: the step, the order of pairs, the learning rate."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import critique_rm as rm
import train
from conftest import read_lines, run_here


def test_micro_batches_do_not_change_the_step(model_and_pairs):
    args, model, pairs = model_and_pairs
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rows = []
    for tokens in (1, 512, 10**6):
        args.micro_batch_tokens = tokens
        rows.append(train.train_step(model, optimizer, pairs, 0, args))
    for row in rows[1:]:
        assert row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=1e-5)
        assert row["n_tokens"] == rows[0]["n_tokens"]


class Reads(TorchDispatchMode):
    """Notes operations that wait for the device: those whose result the host needs to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        follows_data = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        by_numbers = operation is torch.ops.aten.index.Tensor and all(
            index is None or index.dtype == torch.int64 for index in args[1]
        )
        if follows_data & {*operation.tags} and not by_numbers:
            self.waiting.append(operation.name())
        return operation(*args, **kwargs or {})


def test_a_step_never_waits_for_the_device_before_the_gradient_norm(model_and_pairs, monkeypatch):
    """What a GPU would be waited for, seen without one: values read, and shapes that follow them."""
    args, model, pairs = model_and_pairs
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train.train_step(model, optimizer, pairs, 0, args)  # tries what the model can
    reads, seen, reduce = Reads(), [], train.dist.all_reduce

    def all_reduce(values: torch.Tensor, **options) -> None:
        seen.append(list(reads.waiting))  # the loop over micro-batches is over
        reduce(values, **options)

    monkeypatch.setattr(train.dist, "all_reduce", all_reduce)
    with reads:
        torch.ones(2).unique()
        torch.ones(()).item()
        assert len(reads.waiting) == 2  # they would be noted
        reads.waiting.clear()
        train.train_step(model, optimizer, pairs, 0, args)
    assert seen == [[], []] and reads.waiting  # the loss and the norm are read in the end


def test_averaging_equal_critiques_is_the_same_step_as_one(model_and_pairs):
    args, model, pairs = model_and_pairs
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    one = train.train_step(model, optimizer, pairs, 0, args)
    thrice = [rm.EncodedPair(e.pair, e.chosen * 3, e.rejected * 2) for e in pairs]
    args.average_critiques = True
    three = train.train_step(model, optimizer, thrice, 0, args)
    assert three["n_tokens"] == one["n_tokens"]  # the trie holds them once
    assert three["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert three["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)


def test_one_of_several_critiques_is_drawn_for_each_epoch():
    args = train.parse_arguments([])
    pair = rm.Pair("id", (rm.Message("user", "x"),), "y", "z")
    encoded = rm.EncodedPair(pair, [np.array([n]) for n in range(4)], [np.array([9])])
    drawn = [[int(side[0][0]) for side in train.choose_sequences(encoded, e, args)] for e in range(40)]
    assert {chosen for chosen, _ in drawn} == {0, 1, 2, 3}
    assert drawn == [[int(s[0][0]) for s in train.choose_sequences(encoded, e, args)] for e in range(40)]


def test_mean_rewards_of_sides_by_hand():
    """Pair 5 has three chosen sequences and one rejected one, pair 2 one and two."""
    rewards = torch.tensor([1.0, 7.0, 2.0, 6.0, 4.0, 0.0, 9.0])
    owners = np.array([10, 5, 10, 4, 5, 11, 10], np.int32)
    chosen, rejected, pair_ids = train.mean_per_side(rewards, owners)
    assert chosen.tolist() == [6.0, 4.0]  # 6, and (1 + 2 + 9) / 3
    assert rejected.tolist() == [5.5, 0.0]  # (7 + 4) / 2, and 0
    assert pair_ids.tolist() == [2, 5]


def test_rewards_of_a_step_are_those_of_its_pairs(model_and_pairs):
    args, model, pairs = model_and_pairs
    row = train.train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), pairs, 0, args)
    rewards = []
    for score in rm.score_pairs(model, pairs, 512):
        rewards += [score.chosen_reward, score.rejected_reward]
    found = [row["min_reward"], row["mean_reward"], row["max_reward"]]
    assert found == pytest.approx([min(rewards), np.mean(rewards), max(rewards)], rel=1e-5)


def test_eight_pairs_are_learned(model_and_pairs):
    args, model, pairs = model_and_pairs
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = [train.train_step(model, optimizer, pairs, 0, args)["loss"] for _ in range(6)]
    assert losses[-1] < 0.2 < losses[0]


def test_a_loss_that_is_not_finite_stops_before_the_update(model_and_pairs):
    args, model, pairs = model_and_pairs
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with torch.no_grad():
        model.score.weight.fill_(math.inf)
    before = [p.full_tensor().clone() for p in model.model.parameters()]
    with pytest.raises(rm.CritiqueRMError, match="not both finite; nothing was updated"):
        train.train_step(model, optimizer, pairs, 0, args)
    assert all(torch.equal(a, p.full_tensor()) for a, p in zip(before, model.model.parameters()))


def test_rewards_that_stay_equal_end_the_run(model_and_pairs, tmp_path, monkeypatch):
    args, model, pairs = model_and_pairs
    row = {"loss": math.log(2), "accuracy": 0.0, "margin": 0.0, "n_pairs": 8}
    monkeypatch.setattr(train, "train_step", lambda *_: row)
    args = train.parse_arguments(["--epochs", "100", "--batch-pairs", "8"])
    with pytest.raises(rm.CritiqueRMError, match="all rewards were equal for 20 steps"):
        train.train(model, pairs, [], {}, tmp_path, args)
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 10 + 20  # a tenth is warm-up


def test_training_computes_what_scoring_does(model_and_pairs):
    """No module is in training mode, where routers add noise, but those that checkpoint."""
    _, model, _ = model_and_pairs
    assert not any(module.training for module in model.modules())
    rm.set_mode(model, checkpointing=True)
    assert [type(m).__name__ for m in model.modules() if m.training] == [
        *("FSDPLlamaModel", "FSDPLlamaDecoderLayer", "FSDPLlamaDecoderLayer")
    ]
    model.activation_checkpointing_disable()
    rm.set_mode(model, checkpointing=False)


def test_activation_checkpointing_does_not_change_the_gradient(model_and_pairs):
    args, model, pairs = model_and_pairs
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    plain = train.train_step(model, optimizer, pairs, 0, args)
    rm.set_mode(model, checkpointing=True)
    checkpointed = train.train_step(model, optimizer, pairs, 0, args)
    model.activation_checkpointing_disable()
    rm.set_mode(model, checkpointing=False)
    assert checkpointed["grad_norm"] == plain["grad_norm"]


def test_every_pair_comes_once_an_epoch_in_an_order_of_seed_and_epoch():
    args = train.parse_arguments(["--batch-pairs", "4"])
    pairs = list(range(10))
    epochs = [[n for k in range(3) for n in train.pairs_of_step(pairs, 3 * e + k, args)] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == pairs
    assert epochs[0] != epochs[1]
    args.batch_pairs = 10
    assert train.pairs_of_step(pairs, 0, args) == epochs[0]


def test_learning_rate_warms_up_and_ends_near_zero():
    rates = [train.learning_rate(step, 20, 2, 1.0) for step in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[11] == pytest.approx(0.5)  # half way down the cosine
    assert rates[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 17 / 18)))


def test_warm_up_acts(small, mesh, tmp_path):
    run_here(*small, "--warmup-share", "0.5", "--out", tmp_path)
    rates = [row["lr"] for row in read_lines(tmp_path / "metrics.jsonl")]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3, 0.75e-3, 0.25e-3])


def test_weight_decay_acts():
    """Where the gradient is zero AdamW takes lr × decay × w away, and nothing by default."""
    layer = torch.nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.zeros_like(layer.weight)
    train.make_optimizer(layer, train.parse_arguments(["--lr", "0.5"])).step()
    assert torch.equal(layer.weight, before)
    flags = ["--lr", "0.5", "--weight-decay", "0.25"]
    train.make_optimizer(layer, train.parse_arguments(flags)).step()
    torch.testing.assert_close(layer.weight, before * (1 - 0.5 * 0.25))
