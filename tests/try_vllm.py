"""Asks a vLLM server for the rewards of the pairs in a file, and compares them with our own.

    vllm serve RUN --served-model-name RUN --runner pooling --dtype float32 --port 8123
    python tests/try_vllm.py RUN --data PAIRS [--url http://localhost:8123]

The server gets token ids, made here: what the data hold then never becomes a control token, and long
texts are cut as in training. Prints the largest difference; exits with 1 if it is above 1e-4 of the
rewards' size.
"""

import argparse
import sys
from pathlib import Path

import requests

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import critique_rm as rm  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="folder of train.py, as the server has it")
    parser.add_argument("--data", required=True, help="pairs with one critique a response")
    parser.add_argument("--url", default="http://localhost:8123")
    args = parser.parse_args()
    model, encoder = rm.load_reward_model(args.run, dtype="float32")
    answers = [answer for pair in rm.read_pairs(args.data) for answer in pair.answers]
    expected = rm.score_answers(model, encoder, answers)
    sequences = [encoded[0].tolist() for encoded in encoder.encode_singles(answers)]
    request = {"model": args.run, "input": sequences, "use_activation": False}
    reply = requests.post(f"{args.url}/classify", json=request, timeout=600)
    reply.raise_for_status()
    served = [item["probs"][0] for item in reply.json()["data"]]  # raw rewards, without a sigmoid
    differences = [abs(a - b) for a, b in zip(served, expected, strict=True)]
    largest = max(map(abs, expected))
    print(f"{len(served)} answers, rewards up to {largest:.3f}: at most {max(differences):.1e} apart")
    return int(max(differences) > 1e-4 * largest)


if __name__ == "__main__":
    sys.exit(main())
