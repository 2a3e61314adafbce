"""Speed, CPU time and memory of generate.py against a local server that answers after 200 ms.

    python tests/bench_generate.py [--requests 2000 20000] [--workers 64]

Prints a Markdown table with a row for each number of requests. The client is a process of its own:
memory and CPU time are its alone, CPU time without its imports.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time

from chat_server import arguments, completion, generate, write_pairs

ANSWER_SECONDS = 0.2
ANSWER = completion("The response follows the instruction, is correct, and reads well. " * 8).payload


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--requests", type=int, nargs="+", default=[2000])
    parser.add_argument("--workers", type=int, default=64)
    args = parser.parse_args()
    context, urls = multiprocessing.get_context("fork"), multiprocessing.SimpleQueue()
    server = context.Process(target=serve, args=(urls,), daemon=True)
    server.start()
    url = urls.get()
    print("| requests | requests/s | share of ideal | CPU ms/request | peak memory MB |")
    print("|---|---|---|---|---|", flush=True)
    for n_requests in args.requests:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            write_pairs(n_requests // 2)
            client = context.Process(target=measure, args=(url, n_requests, args.workers))
            client.start()
            client.join()
    server.terminate()


def serve(urls: multiprocessing.SimpleQueue) -> None:
    """A server that takes little of the machine: the client is to be measured."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):  # the client left
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(re.search(rb"(?i)content-length: (\d+)", head)[1]))
                await asyncio.sleep(ANSWER_SECONDS)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(ANSWER) + ANSWER)

    async def listen() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        urls.put(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
        await server.serve_forever()

    asyncio.run(listen())


def measure(url: str, n_requests: int, workers: int) -> None:
    """Runs the command in this process and prints its row of the table."""
    stdout, sys.stdout = sys.stdout, open("counts.json", "w")
    cpu_before = time.process_time()
    code = generate.main([*arguments(url), "--workers", str(workers)])
    cpu_ms = 1000 * (time.process_time() - cpu_before) / n_requests
    sys.stdout.close()
    counts = json.load(open("counts.json"))
    assert code == 0 and counts["requested"] == n_requests, counts
    rate = n_requests / counts["seconds"]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    share = rate * ANSWER_SECONDS / workers
    row = f"| {n_requests} | {rate:.0f} | {share:.0%} | {cpu_ms:.2f} | {memory:.0f} |"
    print(row, file=stdout, flush=True)


if __name__ == "__main__":
    main()
