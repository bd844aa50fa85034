"""`python -m toy`: the paper in miniature; `python -m toy tables`, `play` or `score`: see their --help."""

import importlib
import sys

from common import command_line

COMMANDS = {"tables": "toy.tables", "play": "toy.play", "score": "toy.score"}


def main():
    """Run the command that the first word names; without one, the toy paper itself."""
    words = sys.argv[1:]
    if words and words[0] in COMMANDS:
        importlib.import_module(COMMANDS[words[0]]).main(words[1:])
    else:
        importlib.import_module("toy.run").main(words)


command_line(main)
