"""generate.py, the endpoint: addresses, settings, credentials, and messages with the cause."""

import socket
import time
from pathlib import Path

import pytest

import generate
from chat_server import (
    KEY,
    Reply,
    Request,
    arguments,
    completion,
    echo,
    error,
    read_rows,
    write_pairs,
)
from critique_rm import CritiqueRMError


@pytest.mark.parametrize(
    "base, expected",
    [
        ("http://h/v1", "http://h/v1/chat/completions"),
        ("http://h/v1/", "http://h/v1/chat/completions"),
        ("http://h:1/v1/chat/completions/", "http://h:1/v1/chat/completions"),
        ("https://h/d/x?api-version=1", "https://h/d/x/chat/completions?api-version=1"),
    ],
)
def test_base_urls_are_completed(base, expected):
    assert generate.chat_url(base) == expected


def test_a_model_that_wants_max_completion_tokens_gets_it(serve, run):
    def refuse_max_tokens(request, number):
        if "max_tokens" in request.body:
            return error(400, "Unsupported parameter: use 'max_completion_tokens' instead.")
        return echo(request)

    server = serve(refuse_max_tokens)
    write_pairs(3)
    ended = run(server, "--max-tokens", "9", "--workers", "1")
    assert ended.code == 0 and len(server.requests) == 7  # one refusal for six answers
    assert all(request.body["max_completion_tokens"] == 9 for request in server.requests[1:])
    assert run(server, "--max-tokens", "9").code == 0 and len(server.requests) == 7


def test_requests_carry_settings_headers_and_query(serve, run, monkeypatch):
    server = serve()
    write_pairs(1)
    Path("instruction.txt").write_text("Be harsh.\n")
    monkeypatch.setenv("AZURE_KEY", "azure-secret-1")
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}?api-version=2")
    flags = "--temperature 0.5 --max-tokens 9"
    extra = ["--extra-body", '{"top_p": 0.9, "seed": 5}', "--prompt-file", "instruction.txt"]
    headers = ["--header", "api-key:$AZURE_KEY", "--header", "X-Title: mine"]
    assert run(None, *flags.split(), *extra, *headers, "--n-critiques", "2").code == 0
    assert {request.path for request in server.requests} == {
        "/v1/chat/completions?api-version=2"
    }
    assert sorted(request.body["seed"] for request in server.requests) == [5, 5, 6, 6]
    request = server.requests[0]
    body = {name: request.body[name] for name in ("model", "temperature", "top_p", "max_tokens")}
    assert body == {"model": "m", "temperature": 0.5, "top_p": 0.9, "max_tokens": 9}
    assert request.text.startswith("Be harsh.\n\n=== USER ===")
    assert request.headers["api-key"] == "azure-secret-1" and request.headers["X-Title"] == "mine"
    assert "Authorization" not in request.headers  # the key is for another endpoint then
    assert run(server, "--header", "X-Trace:$AZURE_KEY", "--max-tokens", "8").code == 0
    assert server.requests[-1].headers["Authorization"] == f"Bearer {KEY}"


def test_help_does_not_show_the_secret_of_a_base_url(run, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1/v1?api-key={KEY}")
    with pytest.raises(SystemExit):
        run(None, "--help")
    assert KEY not in capsys.readouterr().out


def test_two_credentials_are_both_sent_and_both_named(serve, run, monkeypatch):
    monkeypatch.setenv("HELICONE_API_KEY", "sk-helicone-aaaaaaa-1")
    server = serve(lambda *_: error(401))
    write_pairs(1)
    result = run(server, "--header", "Helicone-Auth:Bearer $HELICONE_API_KEY")
    sent = server.requests[0].headers
    assert sent["Authorization"] == f"Bearer {KEY}"
    assert sent["Helicone-Auth"] == "Bearer sk-helicone-aaaaaaa-1"
    assert result.stderr.endswith("check the URL, --model, HELICONE_API_KEY and OPENAI_API_KEY\n")


@pytest.mark.parametrize(
    "proxy, message",
    [
        ("socks5://127.0.0.1:1", "SOCKS takes a package: pip install pysocks; check"),
        ("http://user:password-1@127.0.0.1:1", "unreachable again and again: the proxy 127.0.0.1:1: "
         "[Errno 111] Connection refused"),
    ],
)
def test_a_proxy_is_named_without_its_login(proxy, message, run, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", proxy)
    write_pairs(1)
    result = run(None, "--base-url", "http://critic.invalid/v1")
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert "proxy" in result.stderr and "ALL_PROXY" in result.stderr
    assert "password-1" not in result.stderr


def test_a_reset_has_a_reason(serve, run):
    write_pairs(1)
    run(serve(lambda *_: Reply(200, b"", ending="reset")), "--max-retries", "1")
    row = read_rows("out.jsonl.failures.jsonl")[0]
    assert (row["reason"], row["detail"]) == ("connection lost", "[Errno 104] Connection reset by peer")


@pytest.mark.parametrize("host", ["127.0.0.1:1", "no-such-host.invalid"])
def test_a_wrong_address_is_one_line_soon(host, run, monkeypatch):
    resolve = socket.getaddrinfo

    def look_up(name: str, *rest, **options) -> list:
        if name == "no-such-host.invalid":  # a resolver without a network may take seconds to say so
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(name, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    write_pairs(20)
    started_at = time.monotonic()
    result = run(None, "--base-url", f"http://{host}/v1")
    assert result.code == 1 and time.monotonic() - started_at < 5
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert result.stderr.startswith(f"generate.py: http://{host}/v1/chat/completions: ")
    assert "OPENAI_API_KEY" in result.stderr


def test_a_debugging_developer_sees_the_traceback_of_an_error(run, monkeypatch):
    monkeypatch.setenv("CRITIQUE_RM_DEBUG", "1")
    result = run(None, "--base-url", "http://127.0.0.1:1/v1", pairs="missing.jsonl")
    assert result.code == 1 and "Traceback" in result.stderr
    assert result.stderr.endswith("generate.py: missing.jsonl: no such file\n")


def test_a_failure_says_its_reason_and_detail():
    assert str(generate.Failed("content_filter", "x")) == "content_filter: x"
    assert str(generate.Stopped("stopped")) == "stopped"


def test_a_server_that_was_reached_before_is_waited_for_longer():
    args = generate.parse_arguments(arguments("http://127.0.0.1:1"))
    endpoint, problem = generate.Endpoint(args), generate.Retry("unreachable", "refused")
    assert endpoint.back_off(problem, 2) <= 60
    with pytest.raises(CritiqueRMError, match="unreachable again and again: refused;"):
        endpoint.back_off(problem, 3)
    endpoint.is_reached = True
    assert endpoint.back_off(problem, 8) <= 60
    with pytest.raises(CritiqueRMError, match="refused"):
        endpoint.back_off(problem, 9)


def test_a_redirect_to_another_host_gets_neither_key_nor_prompt(serve, run):
    other = serve()
    target = {"Location": f"{other.url}/chat/completions?token=1"}
    server = serve(lambda *_: Reply(307, b"", target))
    write_pairs(3)
    result = run(server)
    assert result.code == 1 and other.n_requests == 0
    assert result.stderr.count("\n") == 1
    assert f"307, moved to {other.url}/chat/completions;" in result.stderr


def test_the_key_is_sent_and_struck_from_all_but_answers(serve, run):
    """An answer is data: it is never altered. Messages and lists of failures are not."""

    def reply(request: Request, number: int) -> Reply:
        told = f"Your key is {request.headers['Authorization']}"
        if "good 0" in request.text:
            return completion(told)
        return error(400, told) if "bad 0" in request.text else completion(told, "content_filter")

    server = serve(reply)
    write_pairs(2)
    result = run(server)
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"
    failures = Path("out.jsonl.failures.jsonl").read_text()
    assert KEY not in failures + result.stdout + result.stderr
    assert failures.count("Your key is Bearer ***") == 3
    assert read_rows()[0]["chosen_critique"] == f"Your key is Bearer {KEY}"


def test_only_credentials_are_secrets(serve, run, monkeypatch):
    server = serve(lambda *_: error(400, "version 2024-10-21-preview, signature sig-0123456789"))
    query = "api-version=2024-10-21-preview&signature=sig-0123456789"
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}?{query}")
    write_pairs(1)
    run(None)
    row = read_rows("out.jsonl.failures.jsonl")[0]
    assert row["detail"] == "version 2024-10-21-preview, signature ***"


def test_a_placeholder_in_place_of_a_key_is_no_secret(serve, run, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "anything")
    write_pairs(1)
    run(serve(lambda *_: completion("It says anything.")))
    assert read_rows()[0]["chosen_critique"] == "It says anything."


def test_after_a_stop_no_call_is_made(serve):
    """Else an answer cut off would be paid for twice after Ctrl-C."""
    server = serve()
    endpoint = generate.Endpoint(generate.parse_arguments(arguments(server.url)))
    endpoint.stop.set()
    with pytest.raises(generate.Failed, match="stopped"):
        endpoint.complete({"max_tokens": 1})
    assert server.n_requests == 0


def test_netrc_does_not_replace_the_key(serve, run, monkeypatch):
    Path("netrc").write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", "netrc")
    server = serve()
    write_pairs(1)
    run(server)
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


def test_a_local_server_needs_no_key(serve, run, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    server = serve()
    write_pairs(1)
    assert run(server).code == 0
    assert "Authorization" not in server.requests[0].headers
