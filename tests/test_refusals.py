"""generate.py, refusals: what costs an answer, and what ends the run."""

import os
import random
import re

import pytest

import generate
from chat_server import KEY, Reply, Request, echo, error, read_rows, write_pairs


@pytest.mark.parametrize(
    "reply, expected",
    [
        (error(401, f"Incorrect key {KEY}"), "401 Incorrect key ***"),
        (error(403, "Country not supported"), "403 Country not supported"),
        (error(404, "No such model"), "404 No such model"),
        (error(400, "API key not valid"), "400 API key not valid"),
        (error(429, "Pay first", code="insufficient_quota"), "429 Pay first"),
        (error(403, "Your account was flagged"), "403 Your account was flagged"),
        (Reply(404, b"<html>\n<h1>Not\x1b[31m found</h1>"), "404 Not [31m found"),
    ],
)
def test_hopeless_errors_stop_the_run_with_one_line(reply, expected, serve, run):
    server = serve(lambda request, number: reply if number > 10 else echo(request))
    write_pairs(50)
    result = run(server, "--workers", "2")
    assert result.code == 1 and server.n_requests <= 10 + generate.MIN_GIVEN_UP + 6
    assert result.stderr == (
        f"generate.py: {server.url}/chat/completions: {expected}; "
        "check the URL, --model, OPENAI_API_KEY\n"
    )
    assert len(read_rows("out.jsonl.journal")) == 10 and not os.path.exists("out.jsonl")


def test_the_variable_that_holds_the_key_is_named(serve, run, monkeypatch):
    monkeypatch.setenv("AZURE_KEY", "azure-secret-1")
    write_pairs(1)
    result = run(serve(lambda *_: error(401)), "--header", "api-key:$AZURE_KEY")
    assert result.stderr.endswith(": 401 no; check the URL, --model, AZURE_KEY\n")


def test_a_key_in_the_query_is_shown_nowhere(serve, run, monkeypatch):
    server = serve(lambda request, _: Reply(404, f"Cannot POST {request.path}".encode()))
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}?api-key=query-secret-2")
    write_pairs(1)
    assert ": 404 Cannot POST /v1/chat/completions?api-key=***; check" in run(None).stderr


def test_a_gateway_that_stays_down_ends_the_run(serve, run):
    """Calls out of tries in a row: five after five answers are the server's end, not theirs."""
    server = serve(lambda request, number: error(502) if number > 5 else echo(request))
    write_pairs(50)
    result = run(server, "--workers", "1", "--max-retries", "1")
    assert (result.code, server.n_requests) == (1, 5 + 2 * generate.MIN_GIVEN_UP)
    assert "status 502 again and again: no; check the URL" in result.stderr


def test_a_dry_run_after_failures_alone_does_not_lock_the_output(serve, run):
    write_pairs(1)
    assert run(serve(lambda *_: error(400))).code == 1
    assert run(serve(), "--dry-run").code == 0
    assert run(serve()).code == 0


def test_a_refusal_cannot_write_to_the_terminal(serve, run):
    server = serve(lambda *_: error(400, "no\x1b[2J", code="a\nb\x1b[31m"))
    write_pairs(1)
    result = run(server)
    assert result.stderr.count("\n") == 1 and "\x1b" not in result.stderr
    assert "2 status 400 a b [31m (first: no [2J)" in result.stderr


REFUSED = {
    "firewall": Reply(403, b"<html><title>Attention Required!</title>You are blocked</html>"),
    "filter": error(400, "Content blocked: generic_api_key pattern detected", code="400"),
    "stray 404": error(404, "Not found"),
    "stray 401": error(401, "Unauthorized"),
    "redirect": Reply(302, b"", {"Location": "http://127.0.0.1/login"}),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refusal_of_one_prompt_costs_its_answer_alone(kind, serve, run):
    """Whether it comes first or later; the answer that failed is asked for last the next time."""
    server = serve(lambda request, _: REFUSED[kind] if "good 0" in request.text else echo(request))
    write_pairs(20)
    result = run(server, "--workers", "1")
    assert result.code == 1 and result.counts["failed"] == 1 and len(read_rows()) == 20
    assert [row["id"] for row in read_rows("out.jsonl.failures.jsonl")] == ["0"]
    write_pairs(21)
    server.requests.clear()
    assert run(server, "--workers", "1").counts["requested"] == 3
    assert "good 0" in server.requests[-1].text


@pytest.mark.parametrize("workers", [1, 16])
def test_a_part_of_the_data_that_is_refused_does_not_end_the_run(workers, serve, run):
    """A filter that refuses the first 30 of 60 prompts in the same words."""

    def reply(request: Request, number: int) -> Reply:
        index = int(re.search(r"Question (\d+)", request.text)[1])
        return error(403, "flagged by moderation") if index < 30 else echo(request)

    write_pairs(60)
    random.seed(0)
    result = run(serve(reply), "--workers", str(workers))
    assert result.counts["failed"] == 60 and len(read_rows("out.jsonl.journal")) == 60
    assert run(serve(reply), "--workers", str(workers)).counts["failed"] == 60


@pytest.mark.parametrize(
    "reply, message",
    [
        (error(401, "Incorrect key"), "401 Incorrect key"),
        (error(400, "Invalid model name passed in model=m"), "400 Invalid model name passed in"),
        (error(400, "Your credit balance is too low"), "400 Your credit balance is too low"),
        (error(422, "no such thing, request 7f3a21"), "422 no such thing"),
        (Reply(400, b'{"detail": "Unknown"}'), "400 Unknown"),
        (Reply(400, b'[{"error": {"code": 400, "message": "API key not valid"}}]'), "400 API key"),
        (error(200, "No quota", code="403"), "403 No quota"),
        (error(429, "Pay", type="exceeded_current_quota_error"), "429 Pay"),
    ],
)
def test_what_refuses_everything_ends_the_run_after_few_calls(reply, message, serve, run):
    for n_answered in (0, 20):
        server = serve(lambda request, n: reply if n > n_answered else echo(request))
        write_pairs(200)
        result = run(server, output=f"out{n_answered}.jsonl")
        assert result.code == 1 and server.n_requests <= n_answered + 60
        assert f"{server.url}/chat/completions: {message}" in result.stderr
        assert result.stderr.endswith("; check the URL, --model, OPENAI_API_KEY\n")


def test_numbers_in_a_refusal_do_not_make_it_another(serve, run):
    server = serve(lambda _, n: error(422, f"request req_{n}a2 is not allowed at 12:0{n % 10}"))
    write_pairs(100)
    assert run(server).code == 1 and server.n_requests < 60


def test_answers_on_their_way_at_a_stop_are_kept(serve, run, monkeypatch):
    """Twelve calls are refused while three others take their time; they are waited for, and said."""
    monkeypatch.setattr(generate, "GRACE_SECONDS", 0.05)

    def reply(request: Request, number: int) -> Reply:
        index = int(re.search(r"Question (\d+)", request.text)[1])
        if index == 0 or "good 1\n" in request.text:
            server.is_over.wait(0.5)
            return echo(request)
        return error(402, "no credit")

    server = serve(reply)
    write_pairs(100)
    result = run(server, "--workers", "6")
    assert len(read_rows("out.jsonl.journal")) == 3
    assert "answers on their way, 326 s at most" in result.stderr
