"""train.py, memory: what a plan says, and the micro-batches that fit."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

import critique_rm as rm
import train


def test_out_of_memory_is_one_line_of_advice(monkeypatch, capsys):
    monkeypatch.setattr(train, "run", lambda args: torch.empty(2**52))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert train.main() == 1
    assert capsys.readouterr().err.startswith("train.py: out of memory; lower --micro-batch-tokens")


@pytest.mark.parametrize("platform, unit", [("linux", 1024), ("darwin", 1)])
def test_measured_memory_is_in_the_unit_of_the_plan(mesh, monkeypatch, platform, unit):
    monkeypatch.setattr(sys, "platform", platform)
    usage = SimpleNamespace(ru_maxrss=2_500_000_000 // unit)
    monkeypatch.setattr(train.resource, "getrusage", lambda who: usage)
    assert train.peak_memory_gb() == 2.5


def test_a_plan_counts_what_a_real_model_keeps():
    size = ["--micro-batch-tokens", "96", "--max-length-tokens", "48"]
    args = train.parse_arguments([*size, "--nproc", "4"])
    found = train.plan(args)
    model = LlamaForSequenceClassification(train.tiny_config(args))
    n = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    kept = train.activation_bytes(model, 96, 48)
    assert found["parameters_gb"] == round(n / 1e9, 3)
    assert found["optimizer_gb"] == round(2 * n / 1e9, 3)
    assert found["gathered_gb"] == round(8 * (n - block) / 1e9, 3)
    assert found["reduced_gb"] == round(12 * (n - 2 * block) / 1e9, 3)
    alone = train.plan(train.parse_arguments(size))
    assert alone["gathered_gb"] == round(8 * n / 1e9, 3)
    assert found["activations_gb"] == round(1.5 * kept / 1e9, 3) > 0
    # by hand, the feed-forward part of a layer: six tensors of 384 for each token
    assert kept > 2 * 96 * 6 * 384 * 4
    assert train.activation_bytes(model, 192, 48) == pytest.approx(2 * kept, rel=0.01)
    checked = train.plan(train.parse_arguments([*size, "--activation-checkpointing"]))
    assert checked["activations_gb"] < found["activations_gb"] and found["fits"]
    assert not train.plan(train.parse_arguments([*size, "--device-gb", "0.01"]))["fits"]
    with pytest.raises(rm.CritiqueRMError, match="4 processes are not groups of 3"):
        train.plan(train.parse_arguments(["--nproc", "4", "--shard-group", "3"]))


def test_a_plan_for_adapters_of_eight_billion_fits_a_gpu_of_24_gb(tmp_path, capsys, monkeypatch):
    """Llama 3 8B: 8,030,261,248 weights, less 128,256 x 4,096 of the head of the language model."""
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    shape |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    LlamaConfig(**shape, max_position_embeddings=8192).save_pretrained(tmp_path)
    monkeypatch.setattr(rm, "find_weights", lambda folder: [])
    size = ["--micro-batch-tokens", "2048", "--device-gb", "24", "--lora-rank", "16"]
    flags = ["--plan", "--model", str(tmp_path), "--activation-checkpointing", *size]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    monkeypatch.setattr(train.dist, "destroy_process_group", lambda: None)
    assert train.main() == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    inputs_and_outputs = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)  # of a block
    n_trained = 32 * 16 * inputs_and_outputs + 4096
    assert found["frozen_gb"] == round(2 * (8_030_261_248 - 128_256 * 4096) / 1e9, 3) == 15.01
    assert found["parameters_gb"] == round(4 * n_trained / 1e9, 3) == 0.168
    assert found["optimizer_gb"] == round(8 * n_trained / 1e9, 3)
    assert found["gathered_gb"] == round(6 * n_trained / 1e9, 3)  # nothing that is frozen
    assert found["activations_gb"] > 32 * 2048 * 4096 * 2 / 1e9  # the blocks' inputs
    assert found["total_gb"] < 0.9 * 24 and found["fits"]
    rows = dict(line.split(" | ")[1::-1] for line in lines[2:-1])
    assert {name: value.strip("| ") for name, value in rows.items()} == {
        name.removesuffix("_gb"): f"{value:.3f}"
        for name, value in found.items()
        if name.endswith("_gb") and value
    }


def test_micro_batches_fit_the_memory_of_the_device():
    """Automatic sizes are halved until they fit, from the largest that saves time."""
    small = ["--plan", "--max-length-tokens", "48"]
    found = train.plan(train.parse_arguments(small))
    assert found["micro_batch_tokens"] == 2048  # on a CPU
    found = train.plan(train.parse_arguments([*small, "--device-gb", "80"]))
    assert found["micro_batch_tokens"] == 16384 and found["fits"]  # on a GPU
    room = str(found["total_gb"])  # of which the allocator leaves gaps
    halved = train.plan(train.parse_arguments([*small, "--device-gb", room]))
    assert halved["micro_batch_tokens"] == 8192 and halved["fits"]
    whole = train.plan(
        train.parse_arguments([*small, "--device-gb", room, "--micro-batch-tokens", "16384"])
    )
    assert whole["total_gb"] == found["total_gb"] and not whole["fits"]


def test_a_model_that_cannot_be_planned_is_trained_all_the_same(mesh, make_config, capsys):
    """PyTorch computes a mixture of experts in fp32 on a CPU, but not without storage."""
    config = make_config("Mixtral", num_local_experts=4)
    args = train.parse_arguments([])
    assert train.choose_micro_batch(args, config, torch.float32, 1) == 2048
    assert capsys.readouterr().err.splitlines()[-1].endswith("--micro-batch-tokens is 2048")
    assert train.choose_micro_batch(args, config, torch.bfloat16, 1) == 2048
    assert "no memory was planned" not in capsys.readouterr().err
