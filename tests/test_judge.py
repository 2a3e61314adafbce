"""generate.py --task judge."""

import re

from chat_server import Reply, Request, completion, read_rows, write_pairs, write_rows


def test_the_judge_sees_both_orders_and_its_bias_is_reported(serve, run):
    """A judge that knows good from bad in half of the pairs, and takes A in the others."""

    def reply(request: Request, number: int) -> Reply:
        index = int(re.search(r"good (\d+)", request.text)[1])
        knows, first_is_good = index < 5, request.text.index("good") < request.text.index("bad")
        return completion("Because. [[A]]" if first_is_good or not knows else "Because. [[B]]")

    server = serve(reply)
    write_pairs(10)
    result = run(server, "--task", "judge")
    assert result.code == 0 and server.n_requests == 20
    assert "5 of 10 pairs" in result.stderr and "15 of 20" in result.stderr
    right, taken = {"chosen_first": "chosen", "rejected_first": "chosen"}, "rejected"
    for i, row in enumerate(read_rows()):
        assert (row["id"], row["with_critiques"]) == (str(i), False)
        assert row["verdicts"] == (right if i < 5 else right | {"rejected_first": taken})


def test_the_judge_reads_critiques_only_when_told(serve, run):
    server = serve(lambda *_: completion("[[B]]"))
    write_pairs(1, chosen_critique="praise", rejected_critique=["blame", "more"])
    run(server, "--task", "judge")
    assert not any("praise" in request.text for request in server.requests)
    run(server, "--task", "judge", "--with-critiques")
    assert server.n_requests == 4 and read_rows()[0]["with_critiques"] is True
    assert {request.text.partition("=== RESPONSE A")[2] for request in server.requests[2:]} == {
        " ===\ngood 0\n=== CRITIQUE OF A ===\npraise\n"
        "=== RESPONSE B ===\nbad 0\n=== CRITIQUE OF B ===\nblame\n\nmore\n=== END ===",
        " ===\nbad 0\n=== CRITIQUE OF A ===\nblame\n\nmore\n"
        "=== RESPONSE B ===\ngood 0\n=== CRITIQUE OF B ===\npraise\n=== END ===",
    }


def test_pairs_without_critiques_are_skipped_by_the_judge_and_counted(serve, run):
    server = serve(lambda *_: completion("[[A]]"))
    rows = write_pairs(2, chosen_critique="c", rejected_critique="r")
    del rows[1]["rejected_critique"]
    write_rows(rows)
    result = run(server, "--task", "judge", "--with-critiques")
    assert result.code == 1 and "1 of 2 pairs" in result.stderr and server.n_requests == 2
    assert read_rows()[1]["verdicts"] == {"chosen_first": None, "rejected_first": None}
    write_pairs(2)
    result = run(server, "--task", "judge", "--with-critiques")
    assert result.code == 1 and "run generate.py" in result.stderr


def test_an_answer_without_a_verdict_is_missing_and_no_tie(serve, run):
    def reply(request: Request, number: int) -> Reply:
        is_good_first = request.text.index("good") < request.text.index("bad")
        return completion("[[A]] or [[B]], who knows" if is_good_first else "A.")

    write_pairs(1)
    result = run(serve(reply), "--task", "judge")
    assert result.code == 1 and result.counts["failed"] == 1
    assert read_rows()[0]["verdicts"] == {"chosen_first": None, "rejected_first": "rejected"}
    assert [row["reason"] for row in read_rows("out.jsonl.failures.jsonl")] == ["no verdict"]
