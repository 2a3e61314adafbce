"""Training with low-rank adapters: the same step, a plain folder, the same run when it goes on."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.func import functional_call
from transformers import LlamaForSequenceClassification

import critique_rm as rm
import train
from conftest import ADAPTERS, read_lines, run_here, stopped_at

RANK, ALPHA = 4, 6.0


def arguments(base: Path, *more: object) -> train.Namespace:
    flags = ["--model", base, "--lora-rank", RANK, "--lora-alpha", ALPHA, *more]
    return train.parse_arguments([str(flag) for flag in flags])


def prepare(base: Path, *more: object):
    """A model with adapters that change what it computes, and 6 encoded pairs."""
    args = arguments(base, "--micro-batch-tokens", "512", *more)
    pairs = rm.read_pairs(args.train)[:6]
    model, encoder = train.prepare_model(args, base, pairs)
    generator = torch.Generator().manual_seed(1)
    for layer in train.adapted_layers(model).values():
        values = torch.randn(layer.lora_b.shape, generator=generator)
        layer.lora_b.data.to_local().copy_(0.1 * values)
    return args, model, encoder, encoder.encode_pairs(pairs, "pairs")


def merge(model) -> dict[str, torch.Tensor]:
    """W + (α/R) B A by the layer's name, in double precision."""
    merged = {}
    for name, layer in train.adapted_layers(model).items():
        a, b = (p.detach().full_tensor().double() for p in (layer.lora_a, layer.lora_b))
        merged[name] = layer.weight.detach().double() + ALPHA / RANK * b @ a
    return merged


# --------------------------------------------------------------------------------------------------
# The step


def test_gradients_are_those_of_plain_autograd_on_the_sum_of_matrices(finished):
    """The second implementation: Transformers' class, each sequence alone, weights W + (α/R) B A."""
    args, model, _, pairs = prepare(finished[0])
    found = {}

    def keep(optimizer, *_) -> None:
        for name, p in train.trained_parameters(model).items():
            found[name] = p.grad.full_tensor().clone()

    optimizer = torch.optim.SGD(train.trained_parameters(model).values(), lr=0.0)
    optimizer.register_step_pre_hook(keep)
    row = train.train_step(model, optimizer, pairs, 0, args)

    twin = LlamaForSequenceClassification.from_pretrained(finished[0])
    trained = {}
    for name, p in train.trained_parameters(model).items():
        trained[name] = p.detach().full_tensor().clone().requires_grad_()
    weights = dict(twin.named_parameters()) | {"score.weight": trained["score.weight"]}
    for name in train.adapted_layers(model):
        product = trained[f"{name}.lora_b"] @ trained[f"{name}.lora_a"]
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + ALPHA / RANK * product
    loss = torch.zeros(())
    for pair in pairs:
        rewards = []
        for sequence in (pair.chosen[0], pair.rejected[0]):
            ids = torch.from_numpy(sequence.astype(np.int64))[None]
            states = functional_call(twin, weights, (ids,), {"output_hidden_states": True})
            rewards.append(states.hidden_states[-1][0, -1] @ weights["score.weight"][0])
        loss = loss - nn.functional.logsigmoid(rewards[0] - rewards[1]) / len(pairs)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in trained.values()]).norm()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert len(found) == len(trained) == 2 * 7 * 2 + 1
    for name, p in trained.items():
        expected = p.grad * min(1.0, 1 / norm)  # clipped
        assert expected.norm() > 0
        assert (found[name] - expected).norm() < 1e-4 * expected.norm(), name


def test_a_step_of_full_rank_is_one_of_all_weights():
    """One layer, R = H_in, α = R, A orthogonal, B = 0, SGD: B A changes as W does in full training.

    The gradient of B is G Aᵀ, so that after a step B A = −lr G AᵀA = −lr G; that of A is zero.
    """
    torch.manual_seed(0)
    full = nn.Linear(12, 20)
    adapted = train.AdaptedLinear(nn.Linear(12, 20).requires_grad_(False), rank=12, alpha=12)
    adapted.load_state_dict(full.state_dict(), strict=False)
    with torch.no_grad():
        adapted.lora_a.copy_(nn.init.orthogonal_(torch.empty(12, 12)))
        adapted.lora_b.zero_()
    x, target = torch.randn(7, 12), torch.randn(7, 20)
    for layer, trained in ((full, [full.weight]), (adapted, [adapted.lora_a, adapted.lora_b])):
        (layer(x) - target).square().sum().backward()
        torch.optim.SGD(trained, lr=0.1).step()
    merged = adapted.weight + adapted.lora_b @ adapted.lora_a
    assert (merged - full.weight).abs().max() < 1e-5 < (adapted.weight - full.weight).abs().max()


def test_adapters_start_at_the_model_itself_and_follow_the_seed(finished):
    models = {}
    for seed in (0, 0, 1):
        args = arguments(finished[0], "--seed", seed)
        model, _ = train.prepare_model(args, finished[0], [])
        layers = train.adapted_layers(model).values()
        drawn = torch.cat([layer.lora_a.full_tensor().flatten() for layer in layers])
        assert not any(layer.lora_b.full_tensor().any() for layer in layers)
        assert torch.equal(models.setdefault(seed, drawn), drawn)
    assert not torch.equal(models[0], models[1])
    n_inputs = torch.tensor([layer.lora_a.shape[1] for layer in layers])
    assert models[0].abs().max() <= n_inputs.min() ** -0.5
    assert models[0].var().item() == pytest.approx(1 / 3 / 128, rel=0.5)  # most inputs are of 128


def test_frozen_weights_are_held_once_in_what_they_are_computed_in(finished):
    """Without FSDP where there is one shard, which would compute with a copy of them."""
    _, model, _, _ = prepare(finished[0], "--dtype", "bfloat16")
    for name, p in model.named_parameters():
        is_trained = name.endswith(("lora_a", "lora_b")) or name == "score.weight"
        assert p.requires_grad == is_trained, name
        assert p.dtype == (torch.float32 if is_trained else torch.bfloat16), name
        assert hasattr(p, "full_tensor") == is_trained, name


def test_activation_checkpointing_does_not_change_the_gradient_of_adapters(finished):
    args, model, _, pairs = prepare(finished[0])
    optimizer = torch.optim.SGD(train.trained_parameters(model).values(), lr=0.0)
    plain = train.train_step(model, optimizer, pairs, 0, args)
    rm.set_mode(model, checkpointing=True)
    checkpointed = train.train_step(model, optimizer, pairs, 0, args)
    assert checkpointed == plain


# --------------------------------------------------------------------------------------------------
# The result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_computes_what_adapters_do(finished, tmp_path, dtype):
    """In fp32 to 1e-5; files are of the base's dtype, each weight the nearest to W + (α/R) B A."""
    base = tmp_path / "base"
    shutil.copytree(finished[0], base)
    twin = LlamaForSequenceClassification.from_pretrained(base, dtype=dtype)
    twin.save_pretrained(base, max_shard_size="1MB")
    (base / "model.safetensors").unlink()
    args, model, encoder, pairs = prepare(base)
    before = rm.score_pairs(model, pairs, 512)
    (tmp_path / "run").mkdir()
    train.save_result(model, encoder, tmp_path / "run", args)
    merged, _ = rm.load_reward_model(str(tmp_path / "run"), dtype="float32")
    after = rm.score_pairs(merged, pairs, 512)
    differences = [abs(a.chosen_reward - b.chosen_reward) for a, b in zip(before, after)]
    assert max(differences) < (1e-5 if dtype == torch.float32 else 0.1)
    expected = merge(model)
    stored = {}
    for path in (tmp_path / "run").glob("*.safetensors"):
        stored |= safetensors.torch.load_file(path)
    assert stored.keys() == twin.state_dict().keys()
    for name, weight in stored.items():
        assert weight.dtype == (torch.float32 if name == "score.weight" else dtype), name
        if name.removesuffix(".weight") in expected:
            nearest = expected[name.removesuffix(".weight")].to(dtype)
            torch.testing.assert_close(
                weight, nearest, rtol=0.008 if dtype.itemsize == 2 else 1e-6, atol=1e-7
            )
        else:
            assert torch.equal(weight.float(), twin.state_dict()[name].float()), name
    again = LlamaForSequenceClassification.from_pretrained(tmp_path / "run")
    assert again.dtype == dtype


def test_the_check_after_saving_notices_another_head_where_weights_are_rounded(finished, tmp_path):
    args, model, encoder, pairs = prepare(finished[0], "--dtype", "bfloat16")
    before = rm.score_pairs(model, pairs, 512)
    train.save_result(model, encoder, tmp_path, args)
    train.check_saved(tmp_path, pairs, before, "bfloat16", args)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    stored["score.weight"] = stored["score.weight"].flip(1)
    safetensors.torch.save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(rm.CritiqueRMError, match="after saving and loading"):
        train.check_saved(tmp_path, pairs, before, "bfloat16", args)


# --------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def adapted(finished, small, mesh, tmp_path_factory) -> Path:
    """The folder of a run of adapters."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    run_here(*small, "--model", finished[0], *ADAPTERS, "--out", folder)
    return folder


def test_two_processes_train_the_same_adapters(adapted, by_two):
    for name, column in (("metrics.jsonl", "grad_norm"), ("scores-test.jsonl", "chosen_reward")):
        one, two = (read_lines(folder / name) for folder in (adapted, by_two / "adapted"))
        expected = [row[column] for row in one]
        np.testing.assert_allclose([row[column] for row in two], expected, rtol=1e-3, atol=1e-3)


def test_an_interrupted_run_of_adapters_ends_the_same_to_the_bit(
    finished, small, adapted, tmp_path
):
    flags = [*small, "--model", finished[0], *ADAPTERS, "--resume"]
    flags += ["--out", tmp_path, "--save-every-steps", "2"]
    for n_steps in (1, 3):
        with stopped_at(n_steps), pytest.raises(rm.CritiqueRMError, match="interrupted"):
            run_here(*flags)
    checkpoint = max((tmp_path / "checkpoints").iterdir())
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    assert checkpoint.name == "step-00000004"
    assert size < 0.3 * (finished[0] / "model.safetensors").stat().st_size  # that is 4 bytes each
    run_here(*flags)
    name = "model.safetensors"
    assert (tmp_path / name).read_bytes() == (adapted / name).read_bytes()
    rows, whole = (read_lines(path / "metrics.jsonl") for path in (tmp_path, adapted))
    assert [row | {"seconds": 0} for row in rows] == [row | {"seconds": 0} for row in whole]


def test_adapters_are_not_resumed_on_other_weights(small, finished, mesh, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(finished[0], base)
    flags = [*small, "--model", base, "--lora-rank", RANK, "--out", tmp_path / "run", "--resume"]
    with stopped_at(1), pytest.raises(rm.CritiqueRMError, match="interrupted"):
        run_here(*flags)
    data = bytearray((base / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (base / "model.safetensors").write_bytes(data)
    with pytest.raises(rm.CritiqueRMError, match="checksum of the model's model.safetensors was"):
        run_here(*flags)


def test_all_blocks_are_compiled_for_the_same_input(finished, mesh):
    """A first block without a gradient doubled the graphs, up to PyTorch's limit of 8."""
    args, model, _, pairs = prepare(finished.folder)
    seen = []
    for block in rm.find_blocks(rm.trunk_and_head(model)[0]):
        block.register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0].requires_grad))
    rm.score_pairs(model, pairs, 512)
    assert len(seen) > 1 and not any(seen)
    seen.clear()
    train.train_step(model, train.make_optimizer(model, args), pairs, 0, args)
    assert len(seen) > 1 and all(seen)


def test_experts_in_one_tensor_get_no_adapter_and_are_counted(make_config, capsys):
    config = make_config("Mixtral", num_local_experts=2)
    model = rm.make_model(config)
    model.compute_dtype = torch.float32
    train.add_adapters(model, arguments("x"))
    train.log_unadapted(model)
    n = sum(p.numel() for name, p in model.named_parameters()
            if "layers" in name and p.dim() > 1 and "attn" not in name)
    assert n > 0
    assert capsys.readouterr().err.startswith(f"{n:,} frozen weights of the blocks are in no")


def test_adapters_of_what_has_no_weights_or_no_linear_layers_are_refused(make_config, capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(["--lora-rank", "4"])
    assert "--lora-rank needs a pretrained --model" in capsys.readouterr().err
    with torch.device("meta"):
        model = rm.make_model(make_config("GPT2", n_embd=32, n_layer=1, n_head=2))
    model.compute_dtype = torch.float32
    with pytest.raises(rm.CritiqueRMError, match="gpt2 model have no layer of torch.nn.Linear"):
        train.add_adapters(model, train.parse_arguments(["--model", "x", "--lora-rank", "4"]))
