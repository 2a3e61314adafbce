"""generate.py on single answers in place of pairs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from chat_server import (
    Reply,
    Request,
    completion,
    critique_of,
    echo,
    question,
    read_rows,
    write_rows,
)
from critique_rm import read_answers


def write_answers(n: int, **fields) -> list[dict]:
    rows = [{"id": str(i), "prompt": f"Question {i}?", "response": f"fine {i}"} for i in range(n)]
    return write_rows([row | fields for row in rows])


def test_single_answers_are_written_back_with_their_critique(serve, run):
    rows = write_answers(20)
    server = serve()
    result = run(server)
    assert (result.code, result.counts["responses"], result.counts["requested"]) == (0, 20, 20)
    assert sorted(r.text for r in server.requests) == sorted(question(r["prompt"], r["response"]) for r in rows)
    for before, after in zip(rows, read_rows(), strict=True):
        assert after.pop("metadata")["made_by"][0]["model"] == "m"
        assert after == before | {"critique": critique_of(question(before["prompt"], before["response"]))}
    assert run(server).counts["reused"] == 20 and server.n_requests == 20


def test_k_critiques_of_a_single_answer_read_back_with_conversations_and_tools(serve, run):
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    rows = [
        {"id": "a", "prompt": "Q", "response": "", "tools": [{"name": "weather"}]},
        {"id": "b", "prompt": [{"role": "system", "content": "Be brief."}, talk[0]], "response": [talk[1]]},
        {"id": "c", "messages": talk, "critique": "old"},
    ]
    write_rows(rows)
    before = read_answers("pairs.jsonl")
    server = serve()
    result = run(server, "--n-critiques", "3")
    assert result.code == 0 and server.n_requests == 3 * 3
    assert "pairs.jsonl: 1 answers have critiques, which out.jsonl will not hold" in result.stderr
    after = read_answers("out.jsonl")
    assert [len(answer.critiques) for answer in after] == [3, 3, 3]
    bare = [replace(answer, critiques=()) for answer in after]
    assert bare == [replace(answer, critiques=()) for answer in before]


def test_equal_answers_get_ids_of_their_own_and_are_asked_about_once(serve, run):
    rows = [{"prompt": "Q", "response": response} for response in ("a", "b", "a")]
    write_rows(rows)
    server = serve()
    result = run(server)
    assert result.code == 0 and server.n_requests == 2
    assert "pairs.jsonl: 1 answers repeat an earlier one exactly" in result.stderr
    out = read_rows()
    assert [row["response"] for row in out] == ["a", "b", "a"]
    assert out[2]["id"] == out[0]["id"] + "-2" and out[2]["critique"] == out[0]["critique"]
    write_rows([row | {"id": "x"} for row in rows])
    result = run(server, output="other.jsonl")
    assert result.code == 1 and "pairs.jsonl:2: id 'x' was already used" in result.stderr


def test_a_single_answer_without_a_critique_is_in_the_list_of_failures(serve, run):
    write_answers(3)

    def refuse_one(request: Request, number: int) -> Reply:
        return completion("") if "fine 1" in request.text else echo(request)

    server = serve(refuse_one)
    result = run(server)
    assert (result.code, result.counts["failed"]) == (1, 1)
    (failure,) = read_rows("out.jsonl.failures.jsonl")
    assert (failure["id"], failure["side"], failure["sample"]) == ("1", "response", 0)
    assert ["critique" in row for row in read_rows()] == [True, False, True]
    server.reply = echo
    result = run(server)
    assert (result.code, result.counts["requested"], result.counts["reused"]) == (0, 1, 2)
    assert all("critique" in row for row in read_rows())
    assert read_rows("out.jsonl.failures.jsonl") == []


def test_a_dry_run_of_single_answers_counts_them(run):
    write_answers(5)
    result = run(None, "--dry-run", "--n-critiques", "2", "--base-url", "http://localhost:9/v1")
    assert (result.code, result.counts["responses"], result.counts["requested"]) == (0, 5, 10)
    shown = json.loads(result.stdout.rpartition("]")[0] + "]")
    assert shown[0]["messages"][0]["content"] == question("Question 0?", "fine 0")
    assert not Path("out.jsonl").exists()


PAIR = {"prompt": "P", "chosen": "c", "rejected": "r"}
SINGLE = {"prompt": "P", "response": "x"}


@pytest.mark.parametrize(
    "rows, flags, message",
    [
        ([PAIR, PAIR, SINGLE, PAIR], [], "3: a single answer in a file that begins with a pair; put"),
        ([SINGLE, PAIR, SINGLE], [], "2: a pair in a file that begins with a single answer; put"),
        ([{"prompt": "P"}, SINGLE, PAIR], ["--skip-bad"], "3: a pair in a file that begins with a"),
        ([SINGLE, SINGLE], ["--task", "judge"], "1: a single answer; --task judge needs pairs"),
        ([{"prompt": "P", "response": ["x", "y"]}], [], "1: 'response' is a list; write a record for"),
    ],
)
def test_what_holds_neither_pairs_nor_answers_alone_is_refused(rows, flags, message, serve, run):
    write_rows(rows)
    server = serve()
    result = run(server, *flags)
    assert (result.code, server.n_requests) == (1, 0) and not Path("out.jsonl").exists()
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"generate.py: pairs.jsonl:{message}")
