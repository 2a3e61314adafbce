"""Speed, CPU time and memory of generate.py against a local server that answers after 200 ms.

    python tests/bench_generate.py [--requests 2000 20000] [--workers 64]

Prints a Markdown table with a row for each number of requests. The client is a process of its own:
memory and CPU time are its alone, CPU time without its imports.
"""

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time

from test_generate import Reply, Request, Server, arguments, completion, generate, write_pairs

ANSWER_SECONDS = 0.2
ANSWER = completion("The response follows the instruction, is correct, and reads well. " * 8)


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
    def answer_slowly(request: Request, number: int) -> Reply:
        time.sleep(ANSWER_SECONDS)
        return ANSWER

    server = Server(answer_slowly, keep_requests=False)
    urls.put(server.url)
    server.is_over.wait()


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
