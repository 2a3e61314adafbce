"""train.py as its users run it: what it prints, what it leaves, how it stops and goes on."""

import fcntl
import hashlib
import json
import math
import shutil
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed.tensor import distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification, pipeline

import critique_rm as rm
import train
from conftest import VISIBLE_GPUS, run_script, start_script

ROOT = Path(__file__).parent.parent


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def fingerprint(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="session")
def model_and_pairs(tmp_path_factory):
    """The tiny model in this process, and 8 encoded pairs."""
    rm.start_processes()
    args = train.parse_arguments(["--batch-pairs", "8", "--micro-batch-tokens", "512"])
    pairs = rm.read_pairs(args.train)[:8]
    model, encoder = train.prepare_model(args, tmp_path_factory.mktemp("tiny"), pairs)
    return args, model, encoder.encode_pairs(pairs, "pairs")


# --------------------------------------------------------------------------------------------------
# What a run leaves


def test_last_line_of_stdout_is_the_summary(finished):
    folder, out, _ = finished
    summary = json.loads(out.splitlines()[-1])
    assert list(summary) == [
        *("out", "steps", "pairs", "seconds", "pairs_per_second", "tokens_per_second"),
        *("peak_memory_gb", "test_accuracy"),
    ]
    assert (summary["out"], summary["steps"], summary["pairs"]) == (str(folder), 6, 20)
    assert summary == json.loads((folder / "run.json").read_text())["summary"]


def test_metrics_have_one_line_a_step(finished):
    rows = read_lines(finished[0] / "metrics.jsonl")
    assert list(rows[0]) == [
        *("step", "epoch", "loss", "accuracy", "margin"),
        *("min_reward", "mean_reward", "max_reward", "grad_norm", "lr"),
        *("n_pairs", "n_tokens", "padding_share", "seconds"),
    ]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert [row["n_pairs"] for row in rows] == [4, 4, 2, 4, 4, 2]
    assert all(0 <= row["padding_share"] < 0.25 for row in rows)


def test_accuracy_in_the_summary_is_that_of_the_scores(finished):
    folder, out, _ = finished
    scores = read_lines(folder / "scores-test.jsonl")
    right = [row["chosen_reward"] > row["rejected_reward"] for row in scores]
    assert len(scores) == 12
    assert json.loads(out.splitlines()[-1])["test_accuracy"] == sum(right) / 12
    pair = rm.read_pairs(str(ROOT / "data" / "test.jsonl"))[0]
    assert scores[0]["id"] == pair.id
    assert scores[0]["chosen_words"] == len(pair.chosen.split())
    assert scores[0]["rejected_critique_words"] == len(pair.rejected_critiques[0].split())


@pytest.mark.skipif(
    not torch.version.cuda or not list(Path("/dev").glob("nvidia[0-9]*")), reason="needs a GPU"
)
def test_gpu_computes_in_bf16_what_the_cpu_does_in_fp32(
    finished, small, test_file, tmp_path, monkeypatch
):
    """Losses of the same steps, and the rewards of one model, differ by rounding, but do differ."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if VISIBLE_GPUS is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", VISIBLE_GPUS)
    folder, scores = tmp_path / "run", tmp_path / "scores.jsonl"
    code, _, err = run_script("train.py", *small, "--out", folder)
    assert code == 0, err
    code, _, err = run_script("evaluate.py", finished[0], "--data", test_file, "--save-scores", scores)
    assert code == 0, err
    losses = [[row["loss"] for row in read_lines(f / "metrics.jsonl")] for f in (finished[0], folder)]
    files = finished[0] / "scores-test.jsonl", scores
    rewards = [[row["chosen_reward"] for row in read_lines(file)] for file in files]
    for cpu, gpu in (losses, rewards):
        assert 0 < np.abs(np.subtract(cpu, gpu)).max() < 0.05
    devices = [json.loads((f / "run.json").read_text())["device"] for f in (finished[0], folder)]
    assert devices[0] != devices[1]


def test_run_is_a_plain_hugging_face_folder(finished):
    folder, _, _ = finished
    pair = rm.read_pairs(str(ROOT / "data" / "test.jsonl"))[0]
    expected = read_lines(folder / "scores-test.jsonl")[0]["chosen_reward"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = rm.Encoder(tokenizer, 2048, True).render(
        (*pair.prompt, rm.Message("assistant", pair.chosen + rm.SEPARATOR + pair.chosen_critiques[0]))
    )
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    assert model(**inputs).logits.item() == pytest.approx(expected, abs=1e-5)
    score = pipeline("text-classification", str(folder))
    assert score(text, add_special_tokens=False)[0]["score"] == pytest.approx(expected, abs=1e-5)


def test_model_card_scores_as_it_says(finished, monkeypatch):
    folder, _, _ = finished
    pair = rm.read_pairs(str(ROOT / "data" / "test.jsonl"))[0]
    code = (folder / "README.md").read_text().split("```")[1].removeprefix("python\n")
    names = {"prompt": pair.prompt[0].content, "response": pair.chosen}
    names |= {"critique": pair.chosen_critiques[0], "print": lambda value: names.update(out=value)}
    exec(code.replace("THIS_FOLDER", str(folder)), names)
    expected = read_lines(folder / "scores-test.jsonl")[0]["chosen_reward"]
    assert names["out"] == pytest.approx(expected, abs=1e-5)


def test_nothing_is_left_over(finished):
    names = {path.name for path in finished[0].iterdir()}
    assert names.isdisjoint({"sharded", "draft", "checkpoints", "tokenizer"})
    assert {"run.json", "metrics.jsonl", "scores-test.jsonl", "config.json", "README.md"} <= names


def test_the_tiny_tokenizer_saw_the_pairs_of_the_run_alone(finished):
    pairs = rm.read_pairs(str(ROOT / "data" / "train.jsonl"))
    order = np.random.default_rng(0).permutation(len(pairs))[:10]
    expected = train.train_tokenizer([pairs[n] for n in order], train.parse_arguments([]))
    tokenizer = AutoTokenizer.from_pretrained(finished[0])
    assert tokenizer.get_vocab() == expected.get_vocab()


# --------------------------------------------------------------------------------------------------
# Run folders


def run_here(*arguments: object) -> dict:
    return train.run(train.parse_arguments([str(argument) for argument in arguments]))


def test_an_existing_run_is_refused_and_left_as_it_was(finished, small, mesh):
    folder, _, _ = finished
    before = fingerprint(folder)
    with pytest.raises(rm.CritiqueRMError) as refusal:
        run_here(*small, "--out", folder)
    advice = "choose another --out, or add --resume or --overwrite"
    assert str(refusal.value) == f"{folder} exists; {advice}"
    assert fingerprint(folder) == before


def test_resuming_a_finished_run_gives_its_summary(finished, small, mesh):
    folder, out, _ = finished
    before = fingerprint(folder)
    assert run_here(*small, "--out", folder, "--resume") == json.loads(out.splitlines()[-1])
    assert fingerprint(folder) == before


def test_resuming_a_finished_run_with_something_else_is_refused(finished, small, mesh):
    with pytest.raises(rm.CritiqueRMError, match="arguments 'lr' was 0.001 and is now 0.1"):
        run_here(*small, "--out", finished[0], "--resume", "--lr", "0.1")


def test_resuming_a_finished_run_with_other_data_is_refused(finished, small, mesh, tmp_path):
    shutil.copytree(finished[0], copy := tmp_path / "copy")
    record = json.loads((copy / "run.json").read_text())
    record["data"] = dict.fromkeys(record["data"], "another")
    (copy / "run.json").write_text(json.dumps(record))
    with pytest.raises(rm.CritiqueRMError, match="data .*train.jsonl' was 'another' and is now"):
        run_here(*small, "--out", copy, "--resume")


def test_overwrite_does_not_start_anew_at_each_restart(finished, small, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(rm.CritiqueRMError, match="exists; choose another"):
        train.claim_folder(train.parse_arguments(["--out", str(finished[0]), "--overwrite"]))


def test_resume_without_out_or_with_overwrite_is_a_usage_error(capsys):
    for extra in ([], ["--out", "x", "--overwrite"]):
        with pytest.raises(SystemExit) as stop:
            train.parse_arguments(["--resume", *extra])
        assert stop.value.code == 2
    assert "--resume needs --out" in capsys.readouterr().err


def test_a_damaged_run_json_is_not_taken_for_a_new_run(tmp_path, small, mesh):
    (tmp_path / "run.json").write_text('{"argum')
    with pytest.raises(rm.CritiqueRMError, match="run.json is damaged; start anew with --overwrite"):
        run_here(*small, "--out", tmp_path, "--resume")


def test_each_test_file_has_its_own_scores(model_and_pairs, tmp_path):
    args, model, pairs = model_and_pairs
    names = ("a/test.jsonl", "b/test.jsonl", "c/test-2.jsonl")
    tests = {name: [pair] for name, pair in zip(names, pairs)}
    train.score_tests(model, tests, tmp_path, args)
    found = {path.name: read_lines(path)[0]["id"] for path in tmp_path.iterdir()}
    stems = ("test", "test-2", "test-2-2")
    assert found == {f"scores-{s}.jsonl": e.pair.id for s, e in zip(stems, pairs)}


def test_a_folder_of_something_else_is_never_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    args = train.parse_arguments(["--out", str(tmp_path), "--overwrite"])
    with pytest.raises(rm.CritiqueRMError, match="something else than a run"):
        train.claim_folder(args)


def test_runs_without_a_name_take_the_next_free_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = train.parse_arguments([])
    assert [str(train.claim_folder(args)) for _ in range(2)] == ["runs/001", "runs/002"]


def test_a_run_that_cannot_start_deletes_nothing_and_leaves_nothing(finished, small, tmp_path, mesh):
    folder, _, _ = finished
    before = fingerprint(folder)
    with pytest.raises(rm.CritiqueRMError, match="no usable config.json"):
        run_here(*small, "--model", tmp_path, "--out", folder, "--overwrite")
    with pytest.raises(rm.CritiqueRMError, match="is --model too"):
        run_here(*small, "--model", folder, "--out", folder, "--overwrite")
    assert fingerprint(folder) == before
    with pytest.raises(rm.CritiqueRMError, match="no usable config.json"):
        run_here(*small, "--model", tmp_path, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("option", [["--lr", "-1"], ["--lr", "nan"], ["--seed", "-1"], ["--epochs", "0"]])
def test_a_number_out_of_range_is_a_usage_error(option, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_arguments(option)
    assert stop.value.code == 2 and option[0] in capsys.readouterr().err


def test_a_locked_folder_is_refused(tmp_path, small, mesh):
    folder = tmp_path / "run"
    folder.mkdir()
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        with pytest.raises(rm.CritiqueRMError, match="run is in use by another run"):
            run_here(*small, "--out", folder, "--resume")


def test_a_folder_that_is_not_that_of_rank_zero_is_refused(tmp_path, mesh, monkeypatch):
    with pytest.raises(rm.CritiqueRMError, match="all machines share"):
        train.lock_folder(tmp_path / "missing")
    monkeypatch.setattr(rm, "on_rank_zero", lambda function: "written elsewhere")
    with pytest.raises(rm.CritiqueRMError, match="all machines share"):
        train.lock_folder(tmp_path)


def test_too_little_disk_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(train.shutil, "disk_usage", lambda folder: SimpleNamespace(free=35e9))
    with torch.device("meta"):
        model = torch.nn.Linear(1000, 970_000, bias=False)
        train.check_disk(tmp_path, model, keeps_best=False)
        model.add_module("more", torch.nn.Linear(1000, 30_000, bias=False))
        with pytest.raises(rm.CritiqueRMError, match="35.0 GB are free, 36.0 GB are needed"):
            train.check_disk(tmp_path, model, keeps_best=False)
        model.more.requires_grad_(False)  # it is in the result, not in checkpoints
        with pytest.raises(rm.CritiqueRMError, match="35.0 GB are free, 35.0 GB are needed"):
            train.check_disk(tmp_path, model, keeps_best=False)


def test_resume_names_what_differs():
    old = {"arguments": {"lr": 1e-3, "out": "a"}, "data": {"a.jsonl": "1"}, "template": "t"}
    train.check_same_run(old, {**old, "arguments": {"lr": 1e-3, "out": "b"}})
    with pytest.raises(rm.CritiqueRMError, match="arguments 'lr' was 0.001 and is now 0.1"):
        train.check_same_run(old, {**old, "arguments": {"lr": 0.1}})
    with pytest.raises(rm.CritiqueRMError, match="data 'a.jsonl' was '1' and is now '2'"):
        train.check_same_run(old, {**old, "data": {"a.jsonl": "2"}})
    with pytest.raises(rm.CritiqueRMError, match="--dtype was 'bfloat16' and is now 'float32'"):
        train.check_same_run(old | {"dtype": "bfloat16"}, old | {"dtype": "float32"})


# --------------------------------------------------------------------------------------------------
# Interrupted equals uninterrupted; two processes equal one


def test_interrupted_and_resumed_equals_uninterrupted_to_the_bit(finished, small, tmp_path):
    folder = tmp_path / "run"
    command = [*small, "--out", folder, "--save-every-steps", "2", "--eval-every-steps", "1", "--resume"]
    for number, step in ((signal.SIGTERM, "step 1:"), (signal.SIGKILL, "step 3:")):
        process = start_script("train.py", *command)
        for line in process.stderr:
            if step in line:
                process.send_signal(number)
                break
        _, err = process.communicate()
        if number == signal.SIGTERM:
            assert process.returncode == 1
            assert f"--out {folder} --resume" in err.splitlines()[-1]
            assert "Traceback" not in err
        assert len(read_lines(folder / "metrics.jsonl")) < 6
    code, _, err = run_script("train.py", *command)
    assert code == 0, err
    expected = weights(finished[0])
    assert all(torch.equal(value, expected[name]) for name, value in weights(folder).items())
    rows, whole = (read_lines(path / "metrics.jsonl") for path in (folder, finished[0]))
    assert [row | {"seconds": 0} for row in rows] == [row | {"seconds": 0} for row in whole]


@pytest.mark.parametrize("damage", ["byte", "cut", "gone", "no checksums"])
def test_a_damaged_checkpoint_is_passed_over(model_and_pairs, tmp_path, capsys, damage):
    _, model, _ = model_and_pairs
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    head = model.score.weight
    with torch.no_grad():
        for step in (0, 7, 9):
            head.fill_(step)
            train.save_checkpoint(tmp_path, step, model, optimizer)
        head.fill_(-1)
    folders = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in folders] == ["step-00000007", "step-00000009"]

    def spoil(folder: Path) -> None:
        path = next(folder.glob("*.safetensors"))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        {
            "byte": lambda: path.write_bytes(data),
            "cut": lambda: path.write_bytes(data[:-1]),
            "gone": path.unlink,
            "no checksums": (folder / "checksums.json").unlink,
        }[damage]()

    spoil(folders[1])
    assert train.load_checkpoint(tmp_path, model, optimizer) == 7
    assert "step-00000009 is damaged" in capsys.readouterr().err and not folders[1].exists()
    assert torch.all(head.full_tensor() == 7)
    spoil(folders[0])
    with pytest.raises(rm.CritiqueRMError, match="no checkpoint is whole"):
        train.load_checkpoint(tmp_path, model, optimizer)


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


def test_two_processes_train_the_same_model(finished, small, tmp_path):
    code, _, err = run_script("train.py", *small, "--out", tmp_path / "run", processes=2)
    assert code == 0, err
    one, two = (read_lines(path / "metrics.jsonl") for path in (finished[0], tmp_path / "run"))
    norms = [[row["grad_norm"] for row in rows] for rows in (one, two)]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)
    one, two = (read_lines(p / "scores-test.jsonl") for p in (finished[0], tmp_path / "run"))
    rewards = [[row["chosen_reward"] for row in rows] for rows in (one, two)]
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


# --------------------------------------------------------------------------------------------------
# The step


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
    args.average_critiques = False
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = [train.train_step(model, optimizer, pairs, 0, args)["loss"] for _ in range(10)]
    assert losses[-1] < 0.2 < losses[0]


def test_a_loss_that_is_not_finite_stops_before_the_update(model_and_pairs):
    args, model, pairs = model_and_pairs
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    head = model.score.weight
    saved = head.detach().clone()
    with torch.no_grad():
        head.fill_(math.inf)
    before = [p.full_tensor().clone() for p in model.model.parameters()]
    with pytest.raises(rm.CritiqueRMError, match="not both finite; nothing was updated"):
        train.train_step(model, optimizer, pairs, 0, args)
    assert all(torch.equal(a, p.full_tensor()) for a, p in zip(before, model.model.parameters()))
    with torch.no_grad():
        head.copy_(saved)
    optimizer.zero_grad()


def test_rewards_that_stay_equal_end_the_run(model_and_pairs, tmp_path, monkeypatch):
    args, model, pairs = model_and_pairs
    row = {"loss": math.log(2), "accuracy": 0.0, "margin": 0.0, "n_pairs": 8}
    monkeypatch.setattr(train, "train_step", lambda *_: row)
    args = train.parse_arguments(["--epochs", "100", "--batch-pairs", "8"])
    with pytest.raises(rm.CritiqueRMError, match="all rewards were equal for 20 steps"):
        train.train(model, pairs, [], {}, tmp_path, args)
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 10 + 20  # a tenth is warm-up


def test_out_of_memory_is_one_line_of_advice(monkeypatch, capsys):
    monkeypatch.setattr(train, "run", lambda args: torch.empty(2**52))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert train.main() == 1
    assert capsys.readouterr().err.startswith("train.py: out of memory; lower --micro-batch-tokens")


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


def test_compiling_without_a_compiler_is_one_line(tmp_path, small, monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    code, _, err = run_script("train.py", *small, "--compile", "--out", tmp_path / "run")
    last = err.splitlines()[-1]
    assert code == 1 and last.startswith("train.py: --compile needs a model that torch can compile")
    assert "C++ compiler" in last and "Traceback" not in err
    assert not (tmp_path / "run").exists()


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


class Board:
    """Stands for TensorBoard's writer, which need not be installed."""

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step = folder, purge_step
        self.rows: dict[int, dict[str, float]] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.rows.setdefault(step, {})[name] = value

    def flush(self) -> None:
        pass


def test_tensorboard_is_given_the_rows_of_the_metrics(tmp_path, monkeypatch):
    boards = []

    def open_board(*args, **options) -> Board:
        boards.append(Board(*args, **options))
        return boards[-1]

    monkeypatch.setattr(train, "import_tensorboard", lambda: open_board)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    write_row = train.open_metrics(tmp_path, 1, for_tensorboard=True)
    write_row({"step": 2, "loss": 0.5})
    write_row({"step": 3, "loss": 0.25, "valid_accuracy": 1.0})
    assert boards[0].folder == str(tmp_path / "tensorboard") and boards[0].purge_step == 2
    assert [{"step": 1}, *boards[0].rows.values()] == read_lines(tmp_path / "metrics.jsonl")


def test_tensorboard_that_is_missing_is_one_line(small, tmp_path, mesh, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(rm.CritiqueRMError, match="needs a package: pip install tensorboard"):
        run_here(*small, "--tensorboard", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------
# Bad input: one line of ours, exit code not 0, nothing written


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "no preference pair in it"),
        (b"\x1f\x8b\x08\x00cut", "cannot be read"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "not UTF-8 text"),
        (b'{"prompt": "a", "chosen": "b"}\n', "pairs.jsonl:1: no field 'rejected'"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "run generate.py on it first"),
    ],
)
def test_bad_pairs_are_refused_in_one_line(tmp_path, capsys, monkeypatch, content, complaint):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    out = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["train.py", "--train", str(path), "--out", str(out)])
    assert train.main() == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert complaint in captured.err.splitlines()[-1]
    assert captured.err.splitlines()[-1].startswith("train.py: ")


def test_bad_model_is_refused_in_one_line_without_a_traceback(tmp_path):
    code, out, err = run_script("train.py", "--model", tmp_path, "--out", tmp_path / "run")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith(f"train.py: {tmp_path}: no usable config.json")
    assert "Traceback" not in err
