"""The toy paper, run once with a handful of steps through the real stages: what several tests look at."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = Path(__file__).resolve().parent / "fixtures"
TOY = ["--images", "36", "--steps", "8", "--prompts", "1"]


def run(*words, **environment):
    """A stage's command as a user types it -> the finished process, its output as text."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=environment, text=True,
                          capture_output=True, timeout=300)


def refused(*words):
    """Runs a command that must be refused -> its one line on stderr, without warnings and progress bars."""
    done = run(*words)
    lines = [line for line in done.stderr.splitlines() if line.startswith(f"{Path(words[0]).name}:")]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture(scope="session")
def toy_paper(tmp_path_factory):
    """-> (folder of the finished toy paper, what it printed)."""
    out = tmp_path_factory.mktemp("toy")
    done = run("toy.py", "--out", out, *TOY)
    assert done.returncode == 0, done.stderr
    return out, done.stdout
