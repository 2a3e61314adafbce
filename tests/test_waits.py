"""generate.py, the endpoint: what is tried again, and when."""

import collections
import email.utils
import os
import random
import re
import signal
import threading
import time

import pytest

import generate
from chat_server import (
    DRIP,
    Reply,
    Request,
    completion,
    critique_of,
    echo,
    error,
    question,
    read_rows,
    write_pairs,
)

FAULTS = {
    "408": lambda _: error(408),
    "409": lambda _: error(409),
    "429": lambda _: error(429, headers={"Retry-After": "0.02"}),
    "429 with a date": lambda _: error(429, headers={"Retry-After": email.utils.formatdate()}),
    "500": lambda _: error(500),
    "503": lambda _: error(503, headers={"Retry-After": "0.01"}),
    "html": lambda _: Reply(502, b"<html><h1>Bad gateway</h1></html>"),
    "html as 200": lambda _: Reply(200, b"<html>Welcome</html>"),
    "error as 200": lambda _: error(200, "overloaded", code=502),
    "no choices": lambda _: Reply(200, b'{"choices": []}'),
    "reset": lambda _: Reply(200, b"", ending="reset"),
    "truncated": lambda _: completion("x" * 500)._replace(ending="truncated"),
    "timeout": lambda server: server.is_over.wait(1) or completion("late"),
    "too long": lambda _: error(400, "maximum context length is 8", code="context_length_exceeded"),
    "moderated": lambda _: error(403, "flagged by moderation"),
    "empty": lambda _: completion(None),
    "only thoughts": lambda _: completion("<think>hm"),
    "cut off": lambda _: completion("The resp", "length"),
    "filtered": lambda _: completion("The", "content_filter"),
}
FINAL_FAULTS = {  # by the reason that stands in the list of failures
    "status 400 context_length_exceeded", "status 403", "empty answer", "length", "content_filter",
}


def test_a_server_with_thirty_percent_faults_loses_nothing(serve, run):
    dice, counts, cut_off = random.Random(0), collections.Counter(), {}

    def reply(request: Request, number: int) -> Reply:
        with server.lock:
            fault = dice.choice([*FAULTS]) if dice.random() < 0.3 else None
            fault = cut_off.get(request.text, fault)  # again, when asked with a longer limit
            if fault == "cut off":
                cut_off[request.text] = fault
        counts[fault] += 1
        return FAULTS[fault](server) if fault else echo(request)

    server = serve(reply)
    write_pairs(250)
    result = run(server, "--timeout-seconds", "0.3")
    assert len(counts) == len(FAULTS) + 1
    rows = read_rows("out.jsonl.failures.jsonl")
    failures = {(row["id"], row["side"]): row["reason"] for row in rows}
    assert set(failures.values()) == FINAL_FAULTS
    assert result.code == 1 and result.counts["failed"] == len(failures)
    for row in read_rows():
        for side in ("chosen", "rejected"):
            if (row["id"], side) in failures:
                assert f"{side}_critique" not in row
            else:
                assert row[f"{side}_critique"] == critique_of(question(row["prompt"], row[side]))
    keys = [row["key"] for row in read_rows("out.jsonl.journal")]
    assert len(keys) == len(set(keys)) == 500 - len(failures)
    server.reply = echo
    assert run(server).code == 0 and not read_rows("out.jsonl.failures.jsonl")


def test_a_429_slows_all_workers(serve, run):
    """While the wait lasts, no request arrives from anyone."""
    limited_at = []

    def reply(request: Request, number: int) -> Reply:
        if number == 8:
            limited_at.append(time.monotonic())
            return error(429, headers={"Retry-After": "1"})
        return echo(request)

    server = serve(reply)
    write_pairs(40)
    assert run(server, "--workers", "8").code == 0
    waits = [request.time - limited_at[0] for request in server.requests]
    assert not [wait for wait in waits if 0.3 < wait < 0.99]
    assert sum(wait > 0.99 for wait in waits) > 40


def test_a_rate_limit_is_met_by_spacing_requests_out(serve, run):
    """40 requests/s at most, no hint how long to wait: all are answered, few are refused."""
    allowed_at = [0.0]

    def reply(request: Request, number: int) -> Reply:
        with server.lock:
            if request.time < allowed_at[0]:
                return error(429)
            allowed_at[0] = request.time + 0.025
        return echo(request)

    server = serve(reply)
    write_pairs(25)
    assert run(server).counts["failed"] == 0
    assert server.n_requests < 125


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_seconds_are_waited_exactly(status, serve, run):
    refusal = error(status, headers={"Retry-After": "0.5"})
    server = serve(lambda request, number: refusal if number == 1 else echo(request))
    write_pairs(1)
    assert run(server, "--workers", "1").code == 0
    first, second = [request.time for request in server.requests][:2]
    assert 0.5 <= second - first < 1


def test_retry_after_may_be_a_date(monkeypatch):
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 98 < generate.read_retry_after(date) <= 100
    assert generate.read_retry_after("7") == 7
    assert generate.read_retry_after(email.utils.formatdate(0)) == 0
    assert generate.read_retry_after("soon") is None
    with monkeypatch.context() as patch:  # a date in UTC is one wherever the client is
        patch.setenv("TZ", "America/New_York")
        time.tzset()
        assert 98 < generate.read_retry_after(email.utils.formatdate(time.time() + 100)) <= 100
    time.tzset()


@pytest.mark.parametrize("value", ["0", "0.05", "Thu, 01 Jan 1970 00:00:00 GMT", ""])
@pytest.mark.parametrize("status", [429, 503])
def test_each_wait_of_a_call_is_longer_than_the_one_before(value, status, serve, run, monkeypatch):
    monkeypatch.setattr(generate, "BACKOFF_SECONDS", 0.03)
    refusal = error(status, headers={"Retry-After": value} if value else {})
    server = serve(lambda request, number: refusal if number < 6 else echo(request))
    write_pairs(1)
    assert run(server, "--workers", "1", "--max-requests", "1").counts["failed"] == 0
    times = [request.time for request in server.requests]
    waits = [after - before for before, after in zip(times, times[1:])]
    assert waits == sorted(waits) and waits[0] >= 0.03 and waits[-1] > 8 * 0.03


def test_a_long_wait_is_said_once_and_how_to_go_on(serve, run):
    """A limit of tokens a day, met by all workers; then Ctrl-C."""

    def reply(request: Request, number: int) -> Reply:
        if number == 5:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        if number >= 5:
            return error(429, "Limit of tokens per day", headers={"Retry-After": "7664"})
        return echo(request)

    write_pairs(50)
    result = run(serve(reply), "--workers", "8")
    assert result.code == 130 and result.stderr.count("Limit of tokens per day") == 1
    line = next(line for line in result.stderr.splitlines() if "Limit" in line)
    assert re.search(r"status 429 \(Limit of tokens per day\): waits 766\d s, until ... ..:..:..", line)
    assert "start the same command" in line


def test_a_server_that_drips_for_ever_ends(serve, run, monkeypatch):
    """Its call is listed, and asked last by the next run, also after an interruption."""
    monkeypatch.setattr(generate, "SLOW_TOKENS_PER_SECOND", 1e6)

    def reply(request: Request, number: int) -> Reply:
        return DRIP if "good 0" in request.text else echo(request)

    server = serve(reply)
    write_pairs(3)
    result = run(server, "--timeout-seconds", "0.2", "--max-retries", "1")
    assert result.code == 1 and len(read_rows("out.jsonl.journal")) == 5
    (row,) = read_rows("out.jsonl.failures.jsonl")
    assert (row["id"], row["reason"]) == ("0", "drips") and "--timeout-seconds" in row["detail"]
    write_pairs(4)
    server.requests.clear()
    run(server, "--timeout-seconds", "0.2", "--max-retries", "1", "--workers", "1")
    assert "good 0" in server.requests[2].text


def test_calls_that_time_out_while_others_succeed_make_it_ask_less_at_a_time(serve, run):
    """One slot, 0.1 s an answer, and a server that works on what was given up: 16 at once never end."""
    slot = threading.Lock()

    def reply(request: Request, number: int) -> Reply:
        with slot:
            server.is_over.wait(0.1)
        return echo(request)

    server = serve(reply)
    write_pairs(10)
    result = run(server, "--timeout-seconds", "0.5", "--workers", "16")
    assert result.code == 0 and server.n_requests < 80
    assert "calls time out: 8 at a time now, 16 were asked for" in result.stderr


def test_pace_lowers_by_half_and_rises_by_one_in_a_round():
    pace = generate.Pace(16)
    began = [pace.enter(0) for _ in range(16)]
    for time_began in began[:4]:
        pace.leave(time_began, True, False)
    for time_began in began[4:]:
        pace.leave(time_began, False, True)
    assert pace.n_at_a_time == 8  # twelve that were late together count once
    for _ in range(8):
        pace.leave(pace.enter(0), True, False)
    assert 8.9 < pace.n_at_a_time < 9
    for _ in range(100):
        pace.leave(pace.enter(0), True, False)
    before = pace.n_at_a_time
    pace.leave(pace.enter(0), False, True)
    assert pace.n_at_a_time == before  # one in a hundred is chance


def test_retries_are_bounded(serve, run):
    server = serve(lambda *_: error(500, "broken"))
    write_pairs(1)
    result = run(server, "--max-retries", "3")
    assert result.code == 1 and server.n_requests == 8
    row = {"id": "0", "side": "chosen", "sample": 0, "reason": "status 500", "detail": "broken"}
    assert read_rows("out.jsonl.failures.jsonl") == [row, row | {"side": "rejected"}]
    assert "2 status 500" in result.stderr
