"""The paper's experiments on the toy, in one night or table by table.

    python -m toy tables --table 2

Draws the data once, trains every model that the tables compare, samples, scores, and writes one page,
OUT/tables.html, which grows with every model. Models are trained side by side, one thread each. Says
beforehand how long it will take. Killed, it goes on with the same command; tables that share models
share them. Without --table it makes all: 1 (distances), 2 (GenEval), 4 (CutMix settings), 5 (p), tau,
fig5 (little data).
"""

import argparse
import os
import time
from pathlib import Path

from common import HelpFormatter, at_least, begin_or_resume
from toy.data import draw_noise, draw_world, encode_world, make_prompts_and_encoder
from toy.estimate import OVERHEAD, seconds_side_by_side, spoken_time
from toy.experiments import MODEL_NAMES, TABLES, data_of, expected_seconds, job_of, runs_of
from toy.recipe import IMAGES, TAU
from toy.side_by_side import remaining, run_side_by_side
from toy.tables_page import write_tables
from toy.world import SHAPES

# All seeds share the data, which is that of seed 0. Validation pictures and the small set are others.
VALIDATION_SEED = 1_000_000
SMALL_SEED = 2_000_000


def arguments(argv):
    parser = argparse.ArgumentParser(prog="python -m toy tables", description=__doc__,
                                     formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--table", action="append", choices=list(TABLES), metavar="T",
        help="1, 2, 4, 5, tau or fig5; may be given again (default: all)")
    add("--out", default="out/toy-tables", type=Path, metavar="FOLDER", help="where everything goes")
    add("--images", type=int, default=IMAGES, help="pictures to draw; as many composites are made")
    add("--small", type=int, default=600, help="pictures of Fig. 5's small training set")
    add("--val", type=int, default=512, help="pictures of the validation set")
    add("--steps", type=int, default=4000, help="training steps of every model")
    add("--prompts", type=int, default=64, help="prompts for each of the six tasks")
    add("--seeds", type=int, default=2, help="models of each kind")
    add("--jobs", type=int, default=os.cpu_count(), help="models at a time")

    args = parser.parse_args(argv)

    # Composites need pictures to choose from, in the small world, too.
    least = 2 * len(SHAPES)
    at_least(args, images=least, small=least, val=8, steps=1, prompts=1, seeds=1, jobs=1)

    # An option that is repeated cannot have a
    # default: what is given would be added to it.
    args.tables = args.table or list(TABLES)
    return args


def make_data(args, runs):
    """Draw, mix, caption and encode what the runs are trained and measured on, each thing once."""
    out = args.out
    text_encoder = out / "t5"
    # The setting "all" is always made: the T5's words come from its captions, too.
    settings = sorted({run.setting for run in runs if run.setting} | {"all"})

    draw_world(out, args.images, 0, settings)
    draw_noise(out, 0, TAU)
    make_prompts_and_encoder(out, args.prompts, 0)

    # Validation pictures are originals only: composites are for training.
    validation = out / "val"
    draw_world(validation, args.val, VALIDATION_SEED, [])
    encode_world(validation, "images", "captions.jsonl", "encoded", text_encoder)

    if any(run.small for run in runs):
        draw_world(out / "small", args.small, SMALL_SEED)

    # A run names the encoded folders that it needs; each of them says what it is made from.
    needed = []
    for run in runs:
        needed += [folder for folder in data_of(out, run) if folder]
    # Runs share their data, so each folder is encoded once.
    for folder in dict.fromkeys(needed):
        world = folder.parent
        kind = folder.name.removeprefix("encoded").removeprefix("-")
        images = kind if kind.startswith("cutmix") else "images"
        captions = f"captions-{kind}.jsonl" if kind else "captions.jsonl"
        encode_world(world, images, captions, folder.name, text_encoder)


def say_how_long(args, runs, jobs):
    """Print how long the jobs that have something left to do will take on this machine."""
    total = 0.0
    # Each network is timed only if it has something
    # to do: timing takes a while by itself.
    for name in MODEL_NAMES:
        todo = [job for job, run in zip(jobs, runs) if run.model == name and remaining(job)]
        if not todo:
            continue

        # Timed with as many neighbours as the real
        # runs have, since they slow each other down.
        seconds = seconds_side_by_side(name, args.jobs)
        for job in todo:
            total += expected_seconds(job, seconds, args.steps, args.prompts, args.val)

    todo = [job for job in jobs if remaining(job)]
    # There may be fewer jobs than places for them.
    at_once = min(args.jobs, len(todo)) or 1
    print(f"\n{len(todo)} models to train, sample and score, {at_once} at a time: "
          f"{spoken_time(OVERHEAD * total / at_once)} here.", flush=True)


def main(argv=None):
    args = arguments(argv)
    out = args.out
    # What shapes the data and the training must stay the same when
    # the command is repeated. Tables, seeds and jobs may change:
    # they only choose what is made, and how many at a time.
    settings = {name: getattr(args, name) for name in ("images", "small", "val", "steps", "prompts")}
    begin_or_resume(out / "tables.json", out, settings)

    runs = runs_of(args.tables, args.seeds)
    jobs = [job_of(out, run, args.steps, args.tables) for run in runs]

    make_data(args, runs)
    say_how_long(args, runs, jobs)

    begin = time.time()
    todo = [job for job in jobs if remaining(job)]
    ended = []

    def after_job(job):
        ended.append(job)
        used = time.time() - begin

        # The jobs that are left are assumed to take as long as those before.
        left = used / len(ended) * (len(todo) - len(ended))
        print(f"{len(ended)} of {len(todo)}: {job.name}; {spoken_time(used)} used, "
              f"{spoken_time(left)} left", flush=True)

        write_tables(out, args.tables, args.seeds, args.steps)

    run_side_by_side(jobs, args.jobs, after_job)
    # Once more at the end: if there was nothing to run, no job has written the page.
    write_tables(out, args.tables, args.seeds, args.steps)
    print(f"\n{out / 'tables.html'}")
