"""Runs commands of our scripts one after another in processes that start once.

    torchrun --nproc-per-node 2 tests/in_turn.py '[["train", "--out", "RUN"], ["evaluate", "RUN"]]'
"""

import importlib
import json
import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import critique_rm as rm  # noqa: E402


def main() -> int:
    dist.destroy_process_group = lambda: None  # the next command has it again
    for script, *arguments in json.loads(sys.argv[1]):
        sys.argv = [f"{script}.py", *map(str, arguments)]
        code = importlib.import_module(script).main()
        if code:
            return code
    return 0


if __name__ == "__main__":
    rm.leave(main())
