"""generate.py, replies: what of them is a critique."""

import json

import pytest

import generate
from chat_server import Reply, Request, completion, echo, read_rows, write_pairs
from critique_rm import read_pairs


@pytest.mark.parametrize("reason, n_requests", [("abort", 4), ("error", 4), ("model_length", 2)])
def test_an_answer_that_is_not_whole_is_no_critique(reason, n_requests, serve, run):
    server = serve(lambda *_: completion("The respo", reason))
    write_pairs(1)
    assert run(server, "--max-retries", "1").code == 1 and server.n_requests == n_requests
    assert [row["reason"] for row in read_rows("out.jsonl.failures.jsonl")] == [reason] * 2


def test_an_answer_cut_off_gets_twice_the_limit_once(serve, run):
    def reply(request: Request, number: int) -> Reply:
        if "good" in request.text and request.body["max_tokens"] == 100:
            return echo(request)
        return completion("The res", "length")

    server = serve(reply)
    write_pairs(1)
    result = run(server, "--max-tokens", "50")
    assert sorted(request.body["max_tokens"] for request in server.requests) == [50, 50, 100, 100]
    (row,) = read_rows()
    assert "chosen_critique" in row and "rejected_critique" not in row
    assert [row["reason"] for row in read_rows("out.jsonl.failures.jsonl")] == ["length"]
    assert result.counts["completion_tokens"] == 4 * 3


def test_reasoning_is_kept_out_of_critiques(serve, run):
    server = serve(
        lambda *_: completion("<think>\nLong.\n</think>\n\nGood.", reasoning_content="Longer.")
    )
    write_pairs(1)
    run(server)
    assert read_rows()[0]["chosen_critique"] == "Good."


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<think>a</think>b", "b"), ("a</think>b", "b"), ("<think>a", ""), ("b", "b"),
        ("<think>a</think>", ""), ("b <think>a</think> c", "b <think>a</think> c"),
        ("It names `<think>` only.", "It names `<think>` only."),
    ],
)
def test_reasoning_is_found_with_either_mark_missing(text, expected):
    assert generate.strip_reasoning(text) == expected


PROSE = [
    "It puts its steps into <think> and </think> tags as told, but the sum is wrong.",
    "It never closes the tag: there is no </think> before the final answer, so a parser fails.",
    "The user asked for no `</think>` in the text, and it keeps to that.",
    "<think> and </think> are used as told.",
    "<thought>, unlike </thought>, is missing.",
    "It ends so:\n```\n</think>\n```\nand that is wrong.",
    "It quotes\n```\n<think>\n2 + 2\n</think>\n```\nin full.",
    "The [THINK] block is empty; <|channel|>analysis is named too.",
    "Its analysis is right. The assistantfinal word is odd.",
]


@pytest.mark.parametrize("text", PROSE)
def test_prose_that_names_a_mark_is_left_alone(text):
    assert generate.strip_reasoning(text) == text
    assert not generate.looks_like_reasoning(text)


HARMONY = "<|channel|>analysis<|message|>Plan.<|end|><|start|>assistant<|channel|>final<|message|>"


@pytest.mark.parametrize(
    "text, expected",
    [
        *((f"{opening}\nPlan.\n{closing}\n\nFine.", "Fine.")
          for opening, closing in generate.REASONING_MARKS),
        *((f"{opening}Plan.{closing}Fine.", "Fine.")
          for opening, closing in generate.REASONING_MARKS),
        *((f"{opening} never closed", "") for opening, _ in generate.REASONING_MARKS),
        *((f"Plan.\n{closing}\n\nFine.", "Fine.") for _, closing in generate.REASONING_MARKS),
        (HARMONY + "Fine.<|return|>", "Fine."),
        ("<|start|>assistant" + HARMONY + "Fine.", "Fine."),
        ("<|channel|>final<|message|>Fine.", "Fine."),
        ("analysisWe need a plan.assistantfinalFine.", "Fine."),
        ("<think>a</think>\n<think>b</think>\nFine.", "Fine."),
        ("Fine.\n<think>\na\n</think>\nTrue.", "Fine.\n\nTrue."),
        ("<THINK>a</THINK>Fine.", "Fine."),
    ],
)
def test_marked_reasoning_is_taken_out(text, expected):
    assert generate.strip_reasoning(text) == expected


@pytest.mark.parametrize("text", ["Okay, so the user wants", "Let me think.", "b <think>a</think> c"])
def test_what_looks_like_reasoning_is_counted(text, serve, run):
    server = serve(lambda request, n: completion(text) if n == 1 else echo(request))
    write_pairs(5)
    assert "warning: 1 of 10 critiques look like a model's reasoning" in run(server).stderr


@pytest.mark.parametrize(
    "usage", ["many", [1], 7, {"prompt_tokens": "unknown"}, {"prompt_tokens": None}, None]
)
def test_an_answer_is_kept_whatever_its_usage_says(usage, serve, run):
    reply = json.loads(completion("Fine.").payload) | {"usage": usage}
    server = serve(lambda *_: Reply(200, json.dumps(reply).encode()))
    write_pairs(1)
    assert run(server).code == 0 and server.n_requests == 2


@pytest.mark.parametrize(
    "reason", ["eos", "", "STOP", "COMPLETE", "<|eot_id|>", None, "FinishReason.STOP", "tool_calls", 1]
)
def test_finish_reasons_are_an_open_world(reason, serve, run):
    write_pairs(1)
    assert run(serve(lambda *_: completion("Fine.", reason))).code == 0
    assert read_rows()[0]["chosen_critique"] == "Fine."


@pytest.mark.parametrize(
    "reason, expected, n_requests",
    [
        ("MAX_TOKENS", "length", 4), ("FinishReason.MAX_TOKENS", "length", 4),
        ("SAFETY", "safety", 2), ("ERROR_TOXIC", "error_toxic", 2),
        ("model_context_window_exceeded", "model_context_window_exceeded", 2),
    ],
)
def test_finish_reasons_that_are_known_are_heeded(reason, expected, n_requests, serve, run):
    server = serve(lambda *_: completion("The res", reason))
    write_pairs(1)
    assert run(server).code == 1 and server.n_requests == n_requests
    assert {row["reason"] for row in read_rows("out.jsonl.failures.jsonl")} == {expected}


@pytest.mark.parametrize("payload", [b"\xef\xbb\xbf%s", b"  \n\n%s\n", b"%s"])
@pytest.mark.parametrize("status", [200, 201, 203])
def test_any_success_with_a_completion_is_an_answer(payload, status, serve, run):
    server = serve(lambda *_: Reply(status, payload % completion("Fine.").payload))
    write_pairs(1)
    assert run(server).code == 0
    assert server.requests[0].body["stream"] is False


def test_what_was_said_in_place_of_an_answer_is_in_the_list_of_failures(serve, run):
    def reply(request: Request, number: int) -> Reply:
        if "good" in request.text:
            return completion(None, refusal="I cannot help with that.")
        return completion("", reasoning_content="Long thoughts.")

    write_pairs(1)
    assert run(serve(reply)).code == 1
    first, second = read_rows("out.jsonl.failures.jsonl")
    assert (first["reason"], first["detail"]) == ("refusal", "I cannot help with that.")
    assert (second["reason"], second["detail"][:16]) == ("empty answer", "reasoning alone;")


def test_content_may_come_in_parts_or_broken(serve, run):
    parts = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "Fine \ud83d."}]
    write_pairs(1)
    run(serve(lambda *_: completion(parts)))
    assert read_pairs("out.jsonl")[0].chosen_critiques == ("Fine ?.",)


@pytest.mark.parametrize(
    "leak",
    ["I give it 8/10.", "**Score:** 8", "Another response errs.", "Both answers err."],
)
def test_leaks_are_warned_of(leak, serve, run):
    write_pairs(20)
    n_leaks = [2]

    def reply(request: Request, number: int) -> Reply:
        return completion(leak) if number <= n_leaks[0] else echo(request)

    assert "warning" not in run(serve(reply)).stderr
    n_leaks[0] = 3
    result = run(serve(reply), output="more.jsonl")
    assert "warning: 3 of 40 critiques hold a grade or mention another" in result.stderr
