"""The toy paper, run once with a handful of steps through the real stages: what several tests look at."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from cutmix import command_line

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = Path(__file__).resolve().parent / "fixtures"
TOY = ["--images", "36", "--steps", "8", "--prompts", "1"]


def run(*words, **environment):
    """A stage's command as a user types it -> the finished process, its output as text."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=environment, text=True,
                          capture_output=True, timeout=300)


def refused(*words):
    """Runs a command that must be refused -> its one line on stderr (beside progress bars)."""
    stage, stderr = importlib.import_module(words[0].removesuffix(".py")), io.StringIO()
    with mock.patch.object(sys, "argv", [words[0]]), contextlib.redirect_stderr(stderr), \
            pytest.raises(SystemExit) as stop:
        command_line(lambda: stage.main([str(word) for word in words[1:]]))
    lines = [line for line in stderr.getvalue().splitlines() if line.startswith(f"{words[0]}:")]
    assert stop.value.code == 2 and len(lines) == 1, stderr.getvalue()
    return lines[0]


@pytest.fixture(scope="session")
def toy_paper(tmp_path_factory):
    """-> (folder of the finished toy paper, what it printed)."""
    out = tmp_path_factory.mktemp("toy")
    done = run("toy.py", "--out", out, *TOY)
    assert done.returncode == 0, done.stderr
    return out, done.stdout
