"""train.py --compile: the same numbers from compiled blocks."""

import sys

import pytest
import torch
import torch._dynamo
import torch._inductor.config

import critique_rm as rm
import train


def test_compiled_blocks_compute_the_same_without_compiling_again(tmp_path):
    """Rewards and gradients, of rows of any number and length; two codes, for one row and more."""
    args = train.parse_arguments(["--batch-pairs", "8"])
    pairs = rm.read_pairs(args.train)[:16]
    model, encoder = train.prepare_model(args, tmp_path, pairs)
    encoded = encoder.encode_pairs(pairs, "pairs")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def measure() -> dict[str, list[float]]:
        found = {"loss": [], "margin": [], "grad_norm": []}
        for n_tokens, step in ((300, encoded[:8]), (700, encoded[5:]), (2000, encoded[:3])):
            args.micro_batch_tokens = n_tokens
            row = train.train_step(model, optimizer, step, 0, args)
            for name, values in found.items():
                values.append(row[name])
        return found

    plain = measure()
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    rm.compile_blocks(model)
    rm.warm_up(model, True, 600)
    assert all(p.grad is None for p in model.parameters())
    compiled = measure()
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    for name, values in plain.items():
        assert compiled[name] == pytest.approx(values, rel=1e-5, abs=1e-5), name


def test_compiling_without_a_compiler_is_one_line(tmp_path, small, mesh, monkeypatch, capsys):
    out = tmp_path / "run"
    flags = [*small, "--compile", "--out", out]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with torch._inductor.config.patch("cpp.cxx", ("/no/such/compiler",)):
        assert train.main() == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("train.py: --compile needs a model that torch can compile")
    assert "C++ compiler" in last
    assert not out.exists()
