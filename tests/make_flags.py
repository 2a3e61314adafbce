"""Prints docs/flags.md: every flag of the three scripts, as their parsers have it.

    python tests/make_flags.py > docs/flags.md

test_readme.py fails if the page and the parsers differ.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import critique_rm as rm  # noqa: E402
import evaluate  # noqa: E402
import generate  # noqa: E402
import train  # noqa: E402

HEAD = """\
# Flags

`python tests/make_flags.py > docs/flags.md` made this page from the parsers; a test keeps them equal. Each
script says the same with `--help`.
"""


class Tables(rm.HelpFormatter):
    """Writes the help of a parser as Markdown, a table for each group of arguments."""

    def __init__(self, prog: str, **options) -> None:
        super().__init__(prog, **options)
        self.lines: list[str] = []

    def start_section(self, heading: str) -> None:
        self.heading = heading

    def end_section(self) -> None:
        pass

    def add_arguments(self, actions: Iterable[argparse.Action]) -> None:
        rows = [write_row(action, self._expand_help(action)) for action in actions if action.dest != "help"]
        if rows:
            self.lines += ["", f"**{self.heading[0].upper()}{self.heading[1:]}**", ""]
            self.lines += ["| argument | what it does | default |", "|---|---|---|", *rows]

    def format_help(self) -> str:
        return "\n".join(self.lines)


def write_row(action: argparse.Action, text: str) -> str:
    """A row of the table; `text` is the help, with the default at its end."""
    meaning, _, default = text.partition(" (default: ")
    if action.choices:
        choices = ", ".join(f"`{choice}`" for choice in action.choices)
        meaning = f"{choices}: {meaning}"
    default = "required" if action.required else default.removesuffix(")")
    cells = [f"`{write_usage(action)}`", meaning, default]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write_usage(action: argparse.Action) -> str:
    """What to type: the flag, and names for its values."""
    words = [*action.option_strings]
    if action.metavar:
        n_values = action.nargs if isinstance(action.nargs, int) else 1
        words += [action.metavar] * n_values
    return " ".join(words) + (" ..." if action.nargs == "+" else "")


def make_page() -> str:
    sections = [HEAD]
    for script in (train, generate, evaluate):
        parser = script.make_parser()
        parser.formatter_class = Tables
        sections.append(f"\n## {script.__name__}.py\n\n{parser.description}\n{parser.format_help()}\n")
    return "".join(sections)


if __name__ == "__main__":
    print(make_page(), end="")
