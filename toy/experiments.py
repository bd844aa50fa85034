"""The paper's experiments in miniature: which models each table compares, and how a model is made.

A `Run` is one model: its network, captions, composites, p, tau, data and seed. Tables share runs: the
model of "TA + IA" in Table 2 is also the one at tau = 0.4. All runs share their data.
"""

import math
from typing import NamedTuple

from common import read_jsonl
from toy.data import composites_of, quoted
from toy.prompts import TASKS
from toy.recipe import P, TAU, sample_command, train_command
from toy.side_by_side import Command, Job, remaining

PROMPT_KINDS = ("short", "long")
KEPT = 8                            # checkpoints of a run of Fig. 5


class Run(NamedTuple):
    """One model. The defaults are DiT-I with text augmentation alone (TA)."""

    model: str = "dit"
    captions: str = "long"          # or "aio", the paper's 'An image of <class-name>'
    setting: str = ""               # of CutMix: "" is none, "all", "1/4", ...
    p: float = P
    tau: float = TAU
    small: bool = False             # trained on a small part of the data
    seed: int = 0


class Line(NamedTuple):
    """A line of a table: what it is called, and its models, one for each seed."""

    label: str
    runs: list


def name_of(run):
    """Return a run's name, which is also that of its folder."""
    parts = [run.model, run.captions]
    # Without composites p and tau have no effect.
    # They are left out, so that such runs are one.
    if run.setting:
        setting = composites_of(run.setting)
        parts.append(f"{setting}-p{run.p:g}-tau{run.tau:g}")

    if run.small:
        parts.append("small")

    parts.append(f"seed{run.seed}")
    return "-".join(parts)


# --------------------------------------------------------------------------------------------
# Tables

MODEL_NAMES = {"dit": "DiT-I", "cad": "CAD-I"}


def table_2():
    """AIO captions, long captions (TA), and composites in addition (TA + IA), for both networks."""
    lines = {}
    for model, name in MODEL_NAMES.items():
        lines[f"{name} AIO"] = Run(model, captions="aio")
        lines[f"{name} TA"] = Run(model)
        lines[f"{name} TA + IA"] = Run(model, setting="all")
    return lines


def table_4():
    """The settings of CutMix."""
    lines = {}
    # Runs differ in one thing only, so that a table's lines can be compared.
    for setting in ("1/2", "1/4", "1/9", "1/16", "all"):
        lines[f"CM {setting}"] = Run(setting=setting)
    return lines


def table_5():
    """The share p of composites where t > tau, with CM 1/4."""
    # At p = 0 no composite is used, which is the run with
    # text augmentation alone. It is shared with Table 2.
    lines = {"p = 0": Run()}
    for p in (0.25, 0.5, 0.75, 1.0):
        lines[f"p = {p:g}"] = Run(setting="1/4", p=p)
    return lines


def table_tau():
    """The time tau from which on composites are used; at 0 they are used at all times."""
    lines = {}
    for tau in TAUS:
        lines[f"tau = {tau:g}"] = Run(setting="all", tau=tau)
    return lines


TAUS = (0.0, 0.2, 0.4, 0.6, 0.8)


def figure_5():
    """Little data: do composites delay overfitting?"""
    return {"TA": Run(small=True), "TA + IA": Run(setting="all", small=True)}


TABLES = {"1": table_2, "2": table_2, "4": table_4, "5": table_5, "tau": table_tau, "fig5": figure_5}


def lines_of(table, seeds):
    """Return the lines of a table, each with a run for every one of the seeds."""
    lines = []
    # The functions of the tables describe seed 0; the other seeds differ in nothing else.
    for label, run in TABLES[table]().items():
        lines.append(Line(label, [run._replace(seed=seed) for seed in seeds]))
    return lines


def runs_of(tables, seeds):
    """Return every run that the tables need, once, in the order of the tables; seed after seed."""
    runs = []
    for table in tables:
        lines = lines_of(table, seeds)
        # All lines get their first seed before any
        # gets its second: a table can be read early.
        for number in range(len(seeds)):
            runs += [line.runs[number] for line in lines]

    # Unlike a set, the keys of a dict keep their order.
    return list(dict.fromkeys(runs))


# --------------------------------------------------------------------------------------------
# How a run is made

def checkpoint_of(out, run):
    return out / "runs" / name_of(run) / "checkpoint"


def data_of(out, run):
    """Return (encoded originals, encoded composites or None) of a run."""
    # The small set is a world of its own, with folders of the same names.
    world = out / "small" if run.small else out
    originals = world / ("encoded-aio" if run.captions == "aio" else "encoded")
    composites = world / f"encoded-{composites_of(run.setting)}" if run.setting else None
    return originals, composites


def job_of(out, run, steps, tables, first_seed=0):
    """Return the job that trains, samples and scores a run, with all that the tables want to know of it."""
    folder = out / "runs" / name_of(run)
    checkpoint = checkpoint_of(out, run)
    originals, composites = data_of(out, run)
    # Fig. 5 is about the course of training, so its runs measure
    # the validation loss and keep their checkpoints on the way.
    more = ""
    if run.small:
        every = kept_every(steps)
        more = f"--val {quoted(out / 'val/encoded')} --val-every {every} --keep-every {every}"

    options = train_command(run.model, quoted(checkpoint), quoted(originals),
                            quoted(composites) if composites else None,
                            run.p, run.tau, steps, run.seed, more)

    commands = [Command("train", options)]

    # Every run is scored on both kinds of prompts.
    for kind in PROMPT_KINDS:
        samples = folder / f"samples-{kind}"
        prompts = quoted(out / f"prompts-{kind}.jsonl")
        options = sample_command(quoted(checkpoint), prompts, quoted(samples), run.seed)
        commands.append(Command("sample", options))
        scores = quoted(folder / f"scores-{kind}.jsonl")
        commands.append(Command("toy.score", f"--samples {quoted(samples)} --out {scores}"))

    # Distances take many samples, so only the runs of Table 1 are measured. The same
    # run may belong to other tables alone, hence the look at what was asked for.
    if "1" in tables and run in runs_of(["1"], [run.seed]):
        commands += distance_commands(out, run, checkpoint, folder / "distance.json")

    # The page draws Fig. 5 from the first seed only.
    if run.small and run.seed == first_seed:
        for step in kept_steps(steps):
            kept = checkpoint / f"step-{step:07d}"
            commands += distance_commands(out, run, kept, folder / f"distance-{step:07d}.json")

    return Job(name_of(run), folder, commands)


def distance_commands(out, run, checkpoint, scores):
    """Return the commands that measure how far a checkpoint's pictures are from validation pictures.

    The prompts are the captions of those pictures, of the kind that the run was trained on.
    """
    # The samples lie beside their scores, in a folder of the same name.
    samples = scores.with_suffix("")
    kind = "captions-aio" if run.captions == "aio" else "captions"
    prompts = quoted(out / f"val/{kind}.jsonl")

    # Captions are no GenEval prompts, so the plain layout is asked for instead.
    options = sample_command(quoted(checkpoint), prompts, quoted(samples), run.seed, more="")

    real = quoted(out / "val/images")
    return [Command("sample", options),
            Command("toy.score",
                    f"--samples {quoted(samples)} --real {real} --out {quoted(scores)}")]


def kept_every(steps):
    """Return how many steps lie between the checkpoints of a run of Fig. 5."""
    return math.ceil(steps / KEPT)


def kept_steps(steps):
    """Return the steps at which a run of Fig. 5 is measured."""
    every = kept_every(steps)
    return list(range(every, steps + 1, every))


def expected_seconds(job, seconds, steps, prompts, validation):
    """Return how long a job's remaining commands take, from {"training", "sampling"} seconds."""
    total = START_SECONDS
    for command in remaining(job):
        # Only these two stages take long.
        if command.stage == "train":
            total += (steps - steps_made(job)) * seconds["training"]
        if command.stage == "sample":
            # GenEval's layout means the prompts of the
            # tasks, any other the validation captions.
            pictures = len(TASKS) * prompts if "--format geneval" in command.options else validation
            total += pictures * seconds["sampling"]

    return total


def steps_made(job):
    """Return how many steps an interrupted training has made."""
    log = job.folder / "checkpoint/log.jsonl"
    rows = read_jsonl(log) if log.exists() else []
    return rows[-1]["step"] if rows else 0


START_SECONDS = 6           # until a process has loaded torch and transformers
