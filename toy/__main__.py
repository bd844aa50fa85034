"""`python -m toy`: the paper in miniature; `python -m toy tables`, `play` or `score`: see their --help."""

import importlib
import os
import sys

COMMANDS = ["tables", "play", "score"]

words = sys.argv[1:]
command = words.pop(0) if words and words[0] in COMMANDS else "run"

# Before torch is imported. Threads that wait for each other keep their cores busy, so
# that beside another busy process two of them make a tenth of the steps of one. The toy's
# networks lose little by having one; the page may draw with large ones, and there the
# threads sleep while they wait.
if command == "play":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
else:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from common import command_line  # noqa: E402

# Run the command that the first word names; without one, the toy paper itself.
command_line(lambda: importlib.import_module(f"toy.{command}").main(words))
