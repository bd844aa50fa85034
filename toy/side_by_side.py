"""Run jobs side by side, one thread each: that trains more small models an hour than one after the other
on all threads.

A job is a list of the real stages' commands, which run one after the other in a process of the job's
own. What has ended is remembered, so that after a kill only the rest is run; a command that was
interrupted goes on by itself, as every stage does.
"""

import functools
import hashlib
import importlib
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from common import UserError, command_line, complete

POLL_SECONDS = 0.2


class Command(NamedTuple):
    """A stage (the name of its module, "train" or "toy.score") and its options as a user types them."""

    stage: str
    options: str

    def as_typed(self):
        """Return the command line that a user would type."""
        # The toy's own stages are subcommands, the others are files.
        if self.stage.startswith("toy."):
            return f"python -m toy {self.stage.removeprefix('toy.')} {self.options}"
        return f"python {self.stage}.py {self.options}"

    def remembered_as(self):
        """Return how done.json names the command once it has ended well."""
        # Where the detector or the rules have changed, samples are judged again.
        judge = f"  # judge {judges()}" if self.stage == "toy.score" else ""
        return self.as_typed() + judge


# What decides on scores, beside the pictures themselves.
JUDGES = ["toy/detector.py", "toy/score.py", "toy/world.py", "metrics/geneval.py", "metrics/distances.py"]


@functools.cache
def judges():
    """Return a short hash of the code that decides on scores."""
    root = Path(__file__).resolve().parent.parent
    sources = b"".join((root / name).read_bytes() for name in JUDGES)
    return hashlib.sha256(sources).hexdigest()[:12]


class Job(NamedTuple):
    """Commands to run one after the other, and the folder for their messages and for what is done."""

    name: str
    folder: Path
    commands: list


def remaining(job):
    """Return the commands of a job that have not ended well before, with just these options."""
    # Whole command lines are compared: a command
    # with another option counts as another one.
    done = read_done(job.folder)
    return [command for command in job.commands if command.remembered_as() not in done]


def read_done(folder):
    """Return the command lines of a job that have ended well."""
    path = folder / "done.json"
    return json.loads(path.read_text()) if path.exists() else []


def run_side_by_side(jobs, processes, after_job):
    """Run jobs, at most `processes` at once, and call `after_job(job)` when one has ended.

    Raises UserError if a command fails; the jobs that run then are stopped, and go on next time.
    """
    # A job with nothing left is not started, and `after_job` is not called for it.
    waiting = [job for job in jobs if remaining(job)]
    running = []                # of (job, process)
    try:
        while waiting or running:
            # Every free place is filled before the next pause.
            while waiting and len(running) < processes:
                job = waiting.pop(0)
                running.append((job, start(job)))

            # Looking now and then costs nothing beside jobs
            # of minutes, and needs no thread for each.
            time.sleep(POLL_SECONDS)
            ended = [(job, process) for job, process in running if process.poll() is not None]

            for job, process in ended:
                running.remove((job, process))
                # A training that was asked to stop ends well, but has not ended.
                if process.returncode != 0 or remaining(job):
                    raise UserError(f"{job.name}: {last_line(log_of(job))} (more in {log_of(job)})")
                after_job(job)
    finally:
        # Killed, not asked to stop: train.py would save, end well, and seem to be done.
        for _, process in running:
            process.kill()
            process.wait()


def log_of(job):
    return job.folder / "commands.log"


def last_line(path):
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    written = [line for line in lines if line.strip()]
    # A progress bar writes over its own line: only what
    # stands behind the last "\r" was visible in the end.
    return written[-1].split("\r")[-1]


def start(job):
    """Start a process that runs what remains of a job."""
    job.folder.mkdir(parents=True, exist_ok=True)

    # The process reads its commands from a file; what has ended before is not in it.
    with complete(job.folder / "job.json") as path:
        path.write_text(json.dumps(remaining(job), indent=1))

    words = [sys.executable, "-m", "toy.side_by_side", str(os.getpid()), str(job.folder)]
    # One thread each: with more, the models would take the cores from each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with open(log_of(job), "a", encoding="utf-8") as log:
        # In a session of its own, Ctrl-C reaches the parent alone, which then ends its children.
        return subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                env=environment, start_new_session=True)


# --------------------------------------------------------------------------------------------
# In the process of a job

def leave_with(parent):
    """End this process when its parent has ended, even by kill -9: the next run starts its own."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    # `sys.exit` would end this thread alone, while the training went on.
    os._exit(1)


def run_job(folder):
    """Run the commands in a job's folder, and remember each that has ended well."""
    for words in json.loads((folder / "job.json").read_text()):
        command = Command(*words)
        print(f"\n$ {command.as_typed()}", flush=True)

        # Error messages begin with the name of the program, which is the stage's here.
        sys.argv[0] = f"{command.stage}.py"
        importlib.import_module(command.stage).main(shlex.split(command.options))

        # Written after each command, so that a kill
        # costs at most the one that is running.
        done = [*read_done(folder), command.remembered_as()]
        with complete(folder / "done.json") as path:
            path.write_text(json.dumps(done, indent=1))


def main():
    """Run one job: `python -m toy.side_by_side PARENT FOLDER`."""
    parent, folder = sys.argv[1:]
    # A daemon thread, since this process has to end as soon as its job is done.
    threading.Thread(target=leave_with, args=(int(parent),), daemon=True).start()

    command_line(lambda: run_job(Path(folder)))


if __name__ == "__main__":
    main()
