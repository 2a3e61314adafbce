"""generate.py for other programs: critiques from Python."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

import generate
from chat_server import Reply, Request, critique_of, echo, error, question


def test_critiques_are_had_from_python_in_order(serve):
    server = serve()
    endpoint = generate.Endpoint(generate.Settings(server.url, "m"))
    answers = [(f"Question {i % 4}?", f"good {i % 4}") for i in range(20)]
    expected = [critique_of(question(*answer)) for answer in answers]
    assert generate.write_critiques(endpoint, answers) == expected
    assert server.n_requests == 4 and os.listdir() == []
    assert generate.write_critiques(endpoint, answers, "journal") == expected
    assert generate.write_critiques(endpoint, answers, "journal") == expected
    assert server.n_requests == 8
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q"}]
    assert generate.write_critique(endpoint, chat, "R").startswith("Critique")
    assert "=== SYSTEM ===\nBe brief.\n=== USER ===\nQ\n" in server.requests[-1].text


def test_a_critique_that_is_not_had_is_none_or_raises(serve, capsys):
    def refuse(request: Request, number: int) -> Reply:
        return error(400, "no") if "bad" in request.text else echo(request)

    endpoint = generate.Endpoint(generate.Settings(serve(refuse).url, "m"))
    assert generate.write_critiques(endpoint, [("Q", "bad"), ("Q", "good")])[0] is None
    assert "1 critiques missing, the first: status 400 (no)" in capsys.readouterr().err
    with pytest.raises(generate.Failed, match="status 400"):
        generate.write_critique(endpoint, "Q", "bad")


def test_the_critic_may_be_called_from_threads(serve):
    endpoint = generate.Endpoint(generate.Settings(serve().url, "m"))
    asked = [("Q", f"good {n}") for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda answer: generate.write_critiques(endpoint, [answer]), asked))
    assert found == [[critique_of(question(*answer))] for answer in asked]
