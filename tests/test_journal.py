"""generate.py, the journal: nothing is lost, nothing asked twice, and what made an answer."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import generate
from chat_server import (
    Reply,
    Request,
    arguments,
    completion,
    critique_of,
    echo,
    error,
    fork,
    question,
    read_rows,
    write_pairs,
    write_rows,
)
from conftest import ROOT
from critique_rm import digest, read_pairs


def test_equal_questions_are_asked_once(serve, run):
    server = serve()
    write_pairs(10, prompt="Q", chosen="the same")
    result = run(server)
    assert server.n_requests == 11  # ten rejected responses, one chosen
    assert (result.counts["requested"], result.counts["reused"]) == (11, 9)
    assert "9 of 20 calls saved" in result.stderr
    critique = critique_of(question("Q", "the same"))
    assert {row["chosen_critique"] for row in read_rows()} == {critique}
    counts = run(server).counts
    assert (counts["requested"], counts["reused"], server.n_requests) == (0, 20, 11)


def test_raising_k_asks_for_the_new_critiques_only(serve, run):
    server = serve(lambda request, number: completion(f"number {number}"))
    write_pairs(5)
    run(server)
    first = read_rows()
    result = run(server, "--n-critiques", "3")
    assert server.n_requests == 30 and result.counts["requested"] == 20
    for before, after in zip(first, read_rows(), strict=True):
        assert len(set(after["chosen_critique"])) == 3
        assert after["chosen_critique"][0] == before["chosen_critique"]
    run(server)
    assert read_rows() == first and server.n_requests == 30


def test_other_settings_are_other_questions(serve, run):
    server = serve()
    write_pairs(1)
    for flags in ([], ["--temperature", "0"], ["--max-tokens", "9"], ["--extra-body", '{"a": 1}']):
        assert run(server, *flags).counts["requested"] == 2


def test_max_requests_leaves_the_rest_for_the_next_run(serve, run):
    server = serve()
    write_pairs(5)
    first = run(server, "--max-requests", "3")
    assert (first.code, first.counts["requested"], first.counts["failed"]) == (1, 3, 0)
    assert [("chosen_critique" in row) + ("rejected_critique" in row) for row in read_rows()] == [
        2, 1, 0, 0, 0,
    ]
    second = run(server)
    assert (second.code, second.counts["requested"], server.n_requests) == (0, 7, 10)


def test_each_answer_is_on_disk_before_its_worker_asks_again(serve, run, monkeypatch):
    synced, on_disk_at_request = [0], []
    server = serve(lambda *_: on_disk_at_request.append(synced[0]) or completion("fine"))
    fsync = os.fsync

    def count_lines(file):
        fsync(file)
        synced[0] = Path("out.jsonl.journal").read_bytes().count(b"\n")

    monkeypatch.setattr(os, "fsync", count_lines)
    write_pairs(10)
    run(server, "--workers", "1")
    assert on_disk_at_request == list(range(20))


def test_a_torn_last_line_is_dropped_reported_and_asked_again(serve, run):
    server = serve()
    write_pairs(3)
    run(server)
    whole, journal = Path("out.jsonl").read_text(), Path("out.jsonl.journal")
    lines = journal.read_bytes()
    for n_lost_bytes in (20, 1):
        journal.write_bytes(lines[:-n_lost_bytes])
        result = run(server)
        assert result.code == 0 and result.counts["requested"] == 1
        assert "out.jsonl.journal: 1 torn line(s) dropped" in result.stderr
        assert Path("out.jsonl").read_text() == whole
        assert journal.read_bytes() == lines


def test_a_second_process_is_refused(serve, run):
    write_pairs(1)
    server = serve()
    with generate.Journal("out.jsonl.journal").file:
        result = run(server)
    assert result.code == 1 and server.n_requests == 0
    assert result.stderr.count("\n") == 1 and "out.jsonl.journal: locked" in result.stderr


def test_the_input_and_foreign_files_are_never_overwritten(serve, run):
    write_pairs(1)
    os.symlink("pairs.jsonl", "link.jsonl")
    Path("foreign.jsonl").write_text("mine\n")
    before = Path("pairs.jsonl").read_text()
    for output in ("pairs.jsonl", "link.jsonl", "foreign.jsonl"):
        result = run(serve(), output=output)
        assert result.code == 1 and result.stderr.startswith(f"generate.py: {output}: ")
    assert Path("pairs.jsonl").read_text() == before
    assert Path("foreign.jsonl").read_text() == "mine\n"


def test_a_full_disk_ends_the_run_and_leaves_the_journal_whole(serve, run):
    server = serve(lambda request, number: completion("x" * 1000))
    write_pairs(20)
    child = fork(server, "--workers", "4", file_size_bytes=10_500)
    child.start()
    child.join()
    stderr = Path("stderr.txt").read_text()
    assert child.exitcode == 1 and "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("generate.py: out.jsonl.journal: File too large")
    n_kept = len(read_rows("out.jsonl.journal"))
    assert 5 <= n_kept <= 10
    assert run(server).counts["requested"] == 40 - n_kept


def test_killed_twice_the_output_is_that_of_one_run(serve, run):
    n_pairs, workers, running = 60, 8, []

    def reply(request: Request, number: int) -> Reply:
        if number in (30, 75):
            running[-1].kill()
        return echo(request)

    server = serve(reply)
    write_pairs(n_pairs)
    for _ in range(2):
        running.append(fork(server, "--workers", str(workers)))
        running[-1].start()
        running[-1].join()
        assert running[-1].exitcode == -signal.SIGKILL
    n_before = len(Path("out.jsonl.journal").read_bytes().splitlines())
    result = run(server, "--workers", str(workers))
    assert result.code == 0 and result.counts["requested"] >= 2 * n_pairs - n_before
    assert server.n_requests <= 2 * n_pairs + 2 * workers
    keys = [row["key"] for row in read_rows("out.jsonl.journal")]
    assert len(keys) == len(set(keys)) == 2 * n_pairs
    run(server, output="reference.jsonl")
    assert Path("out.jsonl").read_bytes() == Path("reference.jsonl").read_bytes()


def test_ctrl_c_ends_within_two_seconds_and_says_how_to_continue(serve, run):
    running, is_sent = [], threading.Event()

    def reply(request: Request, number: int) -> Reply:
        if number > 20:
            if number == 24:
                running[0].send_signal(signal.SIGINT)
                is_sent.set()
            server.is_over.wait()
        return echo(request)

    server = serve(reply)
    write_pairs(20)
    command = [sys.executable, ROOT / "generate.py", *arguments(server.url), "--workers", "4"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        running.append(process)
        is_sent.wait()
        sent_at = time.monotonic()
        assert process.wait() == 130
        assert time.monotonic() - sent_at < 2
        assert "the same command continues" in process.stderr.read()
    assert len(read_rows("out.jsonl.journal")) == 20
    server.reply, before = echo, signal.getsignal(signal.SIGINT)
    assert run(server).counts["requested"] == 20
    assert signal.getsignal(signal.SIGINT) == before


def test_journal_and_output_say_what_made_an_answer(serve, run, monkeypatch):
    def reply(request: Request, number: int) -> Reply:
        data = json.loads(echo(request).payload) | {"model": "m-2026-01"}
        return Reply(200, json.dumps(data).encode())

    server = serve(reply)
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}?api-key=query-secret-2")
    write_pairs(1)
    run(None, "--temperature", "0.5", "--extra-body", '{"top_p": 0.9}')
    (made_by,) = read_rows()[0]["metadata"]["made_by"]
    assert made_by == {
        "endpoint": server.url.removeprefix("http://") + "/chat/completions", "model": "m",
        "task": "critique", "instruction": digest(generate.INSTRUCTIONS["critique"]),
        "max_tokens": 512, "temperature": 0.5, "extra_body": {"top_p": 0.9},
        "answered_by": "m-2026-01", "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    assert [row["made_by"] for row in read_rows("out.jsonl.journal")] == [made_by] * 2
    assert read_pairs("out.jsonl")[0].chosen_critiques


def test_old_journals_are_read_and_what_stays_unused_is_said(serve, run):
    server = serve()
    write_pairs(3)
    run(server)
    old = [{"key": row["key"], "answer": row["answer"]} for row in read_rows("out.jsonl.journal")]
    write_rows(old, "out.jsonl.journal")
    result = run(server)
    assert result.counts["reused"] == 6 and "made with" not in result.stderr
    result = run(server, "--temperature", "1")
    told = "out.jsonl.journal: 6 answers made with what they do not say are not used"
    assert result.counts["requested"] == 6 and told in result.stderr


def test_another_model_endpoint_or_instruction_is_said_before_it_asks(serve, run):
    server, said = serve(), []
    write_pairs(3)
    run(server)
    server.reply = lambda *_: said.append(1) or error(402, "no credit")
    Path("instruction.txt").write_text("Be harsh.")
    stale = "until this run ends out.jsonl stays as it was"
    result = run(server, "--prompt-file", "instruction.txt")
    assert f"6 answers made with another instruction are not used; {stale}" in result.stderr
    other = serve()
    result = run(other, "--extra-body", '{"a": 1}')
    changes = f"endpoint {server.url[7:]}/chat/completions (now {other.url[7:]}/chat/completions)"
    assert f"6 answers made with {changes} and extra_body {{}} (now {{'a': 1}})" in result.stderr
    result = run(other)
    assert result.counts["requested"] == 0
    assert f"6 answers made with {changes} are used; another --output asks anew" in result.stderr


def test_output_of_another_model_is_said_to_be_there_still(serve, run, capsys):
    server = serve()
    write_pairs(10)
    run(server)
    server.reply = lambda request, n: error(402, "no credit") if n > 25 else echo(request)
    arguments_of_other = ["--base-url", server.url, "--model", "strong", "--workers", "2"]
    assert generate.main(["pairs.jsonl", "--output", "out.jsonl", *arguments_of_other]) == 1
    first, *_, last = capsys.readouterr().err.splitlines()
    assert "20 answers made with model m (now strong) are not used; until this run ends " in first
    assert last.endswith(": 402 no credit; check the URL, --model, OPENAI_API_KEY")
    assert {row["metadata"]["made_by"][0]["model"] for row in read_rows()} == {"m"}
    server.reply = lambda request, _: completion("") if "bad" in request.text else echo(request)
    assert generate.main(["pairs.jsonl", "--output", "out.jsonl", *arguments_of_other]) == 1
    assert not any("rejected_critique" in row for row in read_rows()[5:])
    assert {row["metadata"]["made_by"][0]["model"] for row in read_rows()} == {"strong"}


def test_raising_the_limit_asks_again_for_what_was_cut_off_alone(serve, run):
    def reply(request: Request, number: int) -> Reply:
        is_short = "Question 7?" in request.text and request.body["max_tokens"] < 4000
        return completion("Half", "length") if is_short else echo(request)

    server = serve(reply)
    write_pairs(10)
    assert run(server).counts["failed"] == 2
    result = run(server, "--max-tokens", "4096")
    assert (result.code, result.counts["requested"]) == (0, 2)
    assert "18 answers made with max_tokens 512 (now 4096) are used" in result.stderr
    assert all("chosen_critique" in row for row in read_rows())
    assert run(server, "--max-tokens", "100").counts["requested"] == 20  # lower: other answers


def test_a_disk_without_locks_is_named(serve, run, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(generate.fcntl, "flock", flock)
    write_pairs(1)
    result = run(serve())
    assert result.code == 1 and result.stderr.count("\n") == 1
    assert "out.jsonl.journal: its file system has no locks (No locks available)" in result.stderr


def test_a_link_in_place_of_the_output_is_followed(serve, run):
    write_pairs(1)
    os.mkdir("big")
    for name in ("out.jsonl", "out.jsonl.journal", "out.jsonl.failures.jsonl"):
        os.symlink(f"big/{name}", name)
    assert run(serve()).code == 0
    assert all(Path(name).is_symlink() for name in ("out.jsonl", "out.jsonl.journal"))
    assert "chosen_critique" in read_rows("big/out.jsonl")[0]
    os.symlink("missing/train.jsonl", "lost.jsonl")
    result = run(serve(), output="lost.jsonl")
    assert result.code == 1 and "lost.jsonl: there is no folder" in result.stderr


def test_a_reader_of_stderr_that_goes_away_does_not_end_the_run(serve):
    server = serve()
    write_pairs(5, prompt="the same")
    command = [sys.executable, ROOT / "generate.py", *arguments(server.url)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stderr.close()
        assert process.wait() == 0
    assert len(read_rows()) == 5
