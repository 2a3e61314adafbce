"""Prints the twenty functions of the four files that hold the most syntax in a line.

    python tests/density.py

Nodes of the syntax tree a line of code, of a function's body without its docstring; comments and
blank lines are no lines of code. The first places to look when the code is to become easier to read.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("critique_rm.py", "train.py", "generate.py", "evaluate.py")


def measure_density(function: ast.FunctionDef, lines: list[str]) -> float:
    body = function.body[1:] if ast.get_docstring(function) else function.body
    if not body:
        return 0.0
    n_nodes = sum(1 for statement in body for _ in ast.walk(statement))
    texts = [line.strip() for line in lines[body[0].lineno - 1 : function.end_lineno]]
    n_lines = sum(1 for text in texts if text and not text.startswith("#"))
    return n_nodes / n_lines


def main() -> None:
    rows = []
    for name in FILES:
        source = (ROOT / name).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                density = measure_density(node, source.splitlines())
                rows.append((density, f"{name}:{node.lineno} {node.name}"))
    for density, place in sorted(rows, reverse=True)[:20]:
        print(f"{density:5.1f} {place}")


if __name__ == "__main__":
    main()
