"""Devices, dtypes, and several processes, which train and score what one does."""

import ctypes
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.tensor import distribute_tensor

import critique_rm as rm
import train
from conftest import CPU, ROOT, read_lines, run_script


@pytest.fixture
def one_gpu(mesh, monkeypatch):
    """As far as start_processes can see."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(rm.dist, "init_device_mesh", lambda kind, shape: (kind, shape))
    yield
    torch.backends.cuda.enable_cudnn_sdp(True)


def test_where_there_is_a_gpu_it_is_taken_and_cudnns_attention_is_off(one_gpu):
    """It compiles for each shape, and no two micro-batches have the same."""
    assert torch.backends.cuda.cudnn_sdp_enabled()
    assert rm.start_processes() == (torch.device("cuda", 0), ("cuda", (1,)))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_more_processes_than_gpus_are_refused(one_gpu, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(OSError, match="only 1 GPUs here; lower --nproc-per-node"):
        rm.start_processes()


@pytest.mark.parametrize(
    "wanted, capability, hidden_size, expected",
    [
        ("auto", "amx_bf16", 576, torch.bfloat16),
        ("auto", "avx512_bf16", 4096, torch.bfloat16),
        ("auto", "bf16", 576, torch.bfloat16),  # Arm
        ("auto", "avx2", 4096, torch.float32),
        ("auto", "amx_bf16", 128, torch.float32),  # the tiny model: the same on all machines
        ("float32", "amx_bf16", 4096, torch.float32),
        ("bfloat16", "avx2", 128, torch.bfloat16),
    ],
)
def test_dtype_follows_what_the_cpu_can(mesh, monkeypatch, wanted, capability, hidden_size, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx": True, capability: True})
    assert rm.choose_dtype(wanted, CPU, hidden_size) == expected


def test_all_ranks_compute_in_the_dtype_that_the_weakest_can(mesh, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    monkeypatch.setattr(rm.dist, "all_reduce", lambda tensor, op: tensor.zero_())  # another cannot
    assert rm.choose_dtype("auto", CPU, 4096) == torch.float32


def test_replicas_of_shards_train_the_same_model(model_and_pairs, tmp_path):
    args, model, pairs = model_and_pairs
    with pytest.raises(rm.CritiqueRMError, match="1 processes are not groups of 2"):
        rm.start_processes(2)
    twin, _ = train.prepare_model(
        train.parse_arguments(["--shard-group", "1"]), tmp_path, [e.pair for e in pairs]
    )
    twin.load_state_dict(
        {name: distribute_tensor(p.full_tensor(), q.device_mesh, q.placements)
         for (name, q), p in zip(twin.state_dict().items(), model.state_dict().values())}
    )
    assert {p.device_mesh.ndim for p in twin.parameters()} == {2}
    rows = []
    for trained in (model, twin):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.0)
        rows.append(train.train_step(trained, optimizer, pairs, 0, args))
    assert rows[0] == rows[1]


def test_two_processes_train_the_same_model(finished, by_two):
    folders = finished.folder, by_two / "run"
    norms = [[row["grad_norm"] for row in read_lines(f / "metrics.jsonl")] for f in folders]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)
    files = [folder / "scores-test.jsonl" for folder in folders]
    rewards = [[row["chosen_reward"] for row in read_lines(file)] for file in files]
    np.testing.assert_allclose(rewards[0], rewards[1], atol=1e-3)


def test_a_rank_that_does_not_come_is_named(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import critique_rm as rm\n"
        "is_over, over = os.pipe()\n"
        "rank = 0 if os.fork() else 1\n"
        "os.environ |= {'RANK': str(rank), 'WORLD_SIZE': '2', 'MASTER_ADDR': 'localhost'}\n"
        "rm.start_processes()\n"
        "if rank == 1:\n"
        "    os.read(is_over, 1)\n"
        "    os._exit(0)\n"
        "try:\n"
        "    rm.barrier('the start', minutes=0.01)\n"
        "except rm.CritiqueRMError as error:\n"
        "    print(error, flush=True)\n"
        "os.write(over, b'.')\n"
        "os._exit(0)\n"
    )
    with socket.create_server(("localhost", 0)) as probe:
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    _, out, _ = run_script(script)
    assert out.startswith("rank 1 did not come to the start within 0.01 minutes")


def test_a_program_that_ends_leaves_its_process_group_first(tmp_path):
    """Or a thread of the group may abort it: once in 150 times in a script that gathers, then ends."""
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import critique_rm as rm\n"
        "atexit.register(lambda: print(rm.dist.is_initialized()))  # called after those of later\n"
        "rm.start_processes()\n"
        "print(rm.dist.is_initialized())\n"
    )
    code, out, _ = run_script(script)
    assert (code, out.split()) == (0, ["True", "False"])


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc, as on Linux")
def test_a_step_on_a_cpu_gives_freed_memory_back(monkeypatch, model_and_pairs):
    """400 MB in blocks of 64 KB, of which every 64th stays and keeps the heap from shrinking."""

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    blocks = [bytearray(2**16) for _ in range(6400)]
    kept = blocks[::64]
    del blocks
    before = resident_bytes()
    rm.release_memory(torch.device("cuda"))  # whose memory is not the C library's
    assert before - resident_bytes() < 100e6
    rm.release_memory(CPU)
    assert before - resident_bytes() > 300e6 and len(kept) == 100
    devices = []
    monkeypatch.setattr(rm, "release_memory", devices.append)
    args, model, pairs = model_and_pairs
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train.train_step(model, optimizer, pairs, 0, args)
    assert devices == [CPU]
