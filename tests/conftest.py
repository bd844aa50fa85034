"""What several test files use: commands as a user types them, tiny pictures, one run of the toy paper."""

import contextlib
import importlib
import io
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

# Before torch is imported: the networks here are tiny, and a second thread would only make a
# busy machine much slower.
os.environ["OMP_NUM_THREADS"] = "1"
# A shell starts what it runs in the background deaf to Ctrl-C, and nohup deafens to a closed terminal:
# commands that tests start would inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# The numbers that are expected are a CPU's. test_cuda.py, run alone, sees the GPU.
if os.environ.get("GPU_TESTS") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from common import UserError, command_line  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = Path(__file__).resolve().parent / "fixtures"
# The toy paper in seconds instead of minutes.
TOY = ["--images", "36", "--steps", "8", "--prompts", "1"]


def run(*words, check=False, **environment):
    """Run a command as a user types it (`run("train.py", "--steps", 3)`) and return the finished process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=environment, text=True,
                          capture_output=True, timeout=300)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def refused(stage, *words):
    """Run a command that must be refused, `refused("train.py", "--p", 2)`, and return its one error line."""
    module = importlib.import_module("toy.run" if stage == "toy" else stage.removesuffix(".py"))
    stderr = io.StringIO()
    with mock.patch.object(sys, "argv", [stage]), contextlib.redirect_stderr(stderr):
        with pytest.raises(SystemExit) as stop:
            command_line(lambda: module.main([str(word) for word in words]))
    assert stop.value.code == 2, stderr.getvalue()
    # Progress bars also write to stderr, and must have ended their line.
    lines = [line for line in stderr.getvalue().splitlines() if line.startswith(f"{stage}:")]
    assert len(lines) == 1, stderr.getvalue()
    return lines[0]


def refusal(function, *arguments):
    """Return the one line with which a function refuses its arguments."""
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def stopped(number, owner, name, call, function):
    """Run a function in a process that gets a signal at this call of `owner.name` -> its exit code."""
    real = getattr(owner, name)
    calls = itertools.count(1)

    def real_or_signal(*values):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return real(*values)

    with mock.patch.object(owner, name, real_or_signal):
        process = multiprocessing.get_context("fork").Process(target=function, daemon=True)
        process.start()
        process.join(300)
    return process.exitcode


def relative(a, b):
    """Return the error of tensor a against b, relative to b's norm."""
    a = a.cpu().double()
    b = b.cpu().double()
    return float((a - b).norm() / b.norm())


def contents(folder):
    """Return {path: bytes} of all files below a folder, hidden and temporary ones too."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def photo(seed, size=(60, 45)):
    """Return a PIL image of smooth random colours, different for each seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(autouse=True)
def the_same_random_numbers():
    """Let no test depend on which ones ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def toy_paper(tmp_path_factory):
    """Run the toy paper once for all tests -> (its folder, what it printed)."""
    out = tmp_path_factory.mktemp("toy")
    done = run("-m", "toy", "--out", out, *TOY, check=True)
    return out, done.stdout
