"""Kills generate.py at random moments, lets it finish, and compares with an undisturbed run.

    python tests/kill_generate.py [--kills 50] [--pairs 1000] [--workers 16] [--seed 0]

The server answers at once, and the same question always in the same way. Exits with 1 unless both
outputs are the same bytes, the journal holds each key once, and no question was asked again but
those that were on their way at a kill.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
from pathlib import Path

from chat_server import Reply, Request, Server, echo, fork, read_rows, write_pairs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_pairs(args.pairs)
        server = Server(echo, keep_requests=False)  # one for both: OUT names the endpoint
        n_requests = run_with_kills(args, server)
        killed = Path("out.jsonl").read_bytes()
        keys = [row["key"] for row in read_rows("out.jsonl.journal")]
        Path("out.jsonl.journal").unlink()
        Path("out.jsonl").unlink()
        run_with_kills(argparse.Namespace(**vars(args) | {"kills": 0}), server)
        server.stop()
        is_same = killed == Path("out.jsonl").read_bytes()
    n_again = n_requests - 2 * args.pairs
    print(
        f"{args.kills} kills: {len(keys)} answers for {len(set(keys))} keys, {n_again} questions "
        f"asked again, output {'identical' if is_same else 'DIFFERENT'}"
    )
    is_once = len(keys) == len(set(keys)) == 2 * args.pairs
    return 0 if is_same and is_once and n_again <= args.kills * args.workers else 1


def run_with_kills(args: argparse.Namespace, server: Server) -> int:
    """Starts the command until it was killed often enough, then once more; counts requests."""
    dice, last, process = random.Random(args.seed), [0], None

    def reply(request: Request, number: int) -> Reply:
        if number == last[0]:
            threading.Timer(dice.uniform(0, 0.01), process.kill).start()
        return echo(request)

    server.reply = reply
    for _ in range(args.kills):
        last[0] = server.n_requests + dice.randint(1, 3 * args.pairs // args.kills)
        process = fork(server, "--workers", str(args.workers))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "finished too early: use more pairs"
    process = fork(server, "--workers", str(args.workers))
    process.start()
    process.join()
    assert process.exitcode == 0, Path("stderr.txt").read_text()
    return server.n_requests


if __name__ == "__main__":
    sys.exit(main())
