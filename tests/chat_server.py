"""A chat endpoint on localhost for the tests of generate.py, and what is asked of it.

Without PyTorch, as generate.py is: the scripts that measure generate.py import this too.
"""

import json
import multiprocessing
import os
import resource
import socket
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import generate  # noqa: E402
from critique_rm import Message, digest  # noqa: E402

KEY = "sk-very-secret-0123456789"


class Reply(NamedTuple):
    status: int
    payload: bytes
    headers: dict[str, str] = {}
    ending: str = "whole"  # or "truncated", "reset"


class Request(NamedTuple):
    time: float
    path: str
    headers: dict[str, str]
    body: dict

    @property
    def text(self) -> str:
        return self.body["messages"][-1]["content"]


class Server(ThreadingHTTPServer):
    """A chat endpoint; `reply(request, number)` answers its requests, numbered from 1."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, reply, keep_requests: bool = True):
        self.reply, self.keep_requests = reply, keep_requests
        self.lock, self.n_requests, self.requests = threading.Lock(), 0, []
        self.is_over = threading.Event()  # what a reply may wait for instead of sleeping
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.is_over.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        pass  # clients that are killed leave broken pipes


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body in one packet

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request = Request(time.monotonic(), self.path, dict(self.headers.items()), body)
        with self.server.lock:
            self.server.n_requests += 1
            number = self.server.n_requests
            if self.server.keep_requests:
                self.server.requests.append(request)
        self.send(self.server.reply(request, number))

    def send(self, reply: Reply) -> None:
        if reply is DRIP:
            drip(self, 60)
            return
        if reply.ending == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        self.send_response_only(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.payload)))
        self.end_headers()
        if reply.ending == "truncated":
            self.wfile.write(reply.payload[: len(reply.payload) // 2])
            self.close_connection = True
        else:
            self.wfile.write(reply.payload)


DRIP = Reply(200, b"", ending="never")


def completion(content, finish_reason: str = "stop", **message) -> Reply:
    choice = {"message": {"content": content, **message}, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 10, "completion_tokens": 3}
    return Reply(200, json.dumps({"choices": [choice], "usage": usage}).encode())


def error(status: int, message: str = "no", headers: dict[str, str] = {}, **fields) -> Reply:
    return Reply(status, json.dumps({"error": {"message": message, **fields}}).encode(), headers)


def echo(request: Request, number: int = 0) -> Reply:
    """A critique that depends on the question alone."""
    return completion(critique_of(request.text))


def critique_of(question: str) -> str:
    return f"Critique {digest(question)}"


def write_pairs(n: int, path="pairs.jsonl", **fields) -> list[dict]:
    rows = [
        {"id": str(i), "prompt": f"Question {i}?", "chosen": f"good {i}", "rejected": f"bad {i}"}
        for i in range(n)
    ]
    return write_rows([row | fields for row in rows], path)


def write_rows(rows: list[dict], path="pairs.jsonl") -> list[dict]:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def read_rows(path="out.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def fork(server: Server, *flags: str, file_size_bytes: int = -1) -> multiprocessing.Process:
    """The command as a process to be started; a fork, for the imports take seconds."""

    def run_command() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_bytes, file_size_bytes))
        sys.stdout, sys.stderr = open(os.devnull, "w"), open("stderr.txt", "w")
        sys.exit(generate.main([*arguments(server.url), *flags]))

    return multiprocessing.get_context("fork").Process(target=run_command)


def arguments(url: str) -> list[str]:
    return ["pairs.jsonl", "--output", "out.jsonl", "--base-url", url, "--model", "m"]


def question(prompt: str, response: str) -> str:
    prompt = (Message("user", prompt),)
    instruction = generate.INSTRUCTIONS["critique"]
    return generate.build_critique_messages(prompt, response, instruction)[0].content


def drip(handler: Handler, seconds: float) -> None:
    """Blank lines for so long, and no answer."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    handler.wfile.write(head)
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at and not handler.server.is_over.is_set():
        handler.wfile.write(b"1\r\n\n\r\n")
        handler.wfile.flush()
        handler.server.is_over.wait(0.02)
