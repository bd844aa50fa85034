"""The paper's experiments on the toy, in one night or table by table.

    python -m toy tables --table 2

Says how long it will take, draws the data once, trains every model that the tables compare, samples,
scores, and writes one page, OUT/tables.html, which grows with every model and every table. Models are
trained side by side, one thread each. Killed, it goes on with the same command; tables that share
models share them. Without --table it makes all: 1 (distances), 2 (GenEval), 4 (CutMix settings), 5 (p),
tau, fig5 (little data).
"""

import argparse
import time
from pathlib import Path

from common import HelpFormatter, at_least, begin_or_resume, between, default_workers, only_command
from toy.data import draw_noise, draw_world, encode_world, make_prompts_and_encoder
from toy.estimate import OVERHEAD, data_seconds, end_times, seconds_side_by_side, spoken_time
from toy.experiments import MODEL_NAMES, TABLES, data_of, expected_seconds, job_of, runs_of
from toy.recipe import IMAGES, LARGEST_SEED, TAU
from toy.side_by_side import remaining, run_side_by_side
from toy.tables_page import write_tables
from toy.world import SHAPES, world_fingerprint

# All models share the data, which is that of the first seed. Validation pictures and the small
# set are others.
VALIDATION_SEED = 1_000_000
SMALL_SEED = 2_000_000


def parse_arguments(argv):
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
    add("--seed", type=int, default=0, help="the first seed; also of the pictures and the prompts")
    add("--jobs", type=int, default=default_workers(), help="models at a time")

    args = parser.parse_args(argv)

    # Composites need pictures to choose from, in the small world, too.
    least = 2 * len(SHAPES)
    at_least(args, images=least, small=least, val=10, steps=1, prompts=1, seeds=1, jobs=1)
    between(args, 0, LARGEST_SEED, "seed")

    # An option that is repeated cannot have a
    # default: what is given would be added to it.
    args.tables = [name for name in TABLES if name in (args.table or TABLES)]
    return args


def make_data(args, runs):
    """Draw, mix, caption and encode what the runs are trained and measured on, each thing once."""
    out = args.out
    text_encoder = out / "t5"
    # The setting "all" is always made: the T5's words come from its captions, too.
    cuts = sorted({run.setting for run in runs if run.setting} | {"all"})

    draw_world(out, args.images, args.seed, cuts)
    draw_noise(out, args.seed, TAU)
    make_prompts_and_encoder(out, args.prompts, args.seed)

    # Validation pictures are originals only: composites are for training.
    validation = out / "val"
    draw_world(validation, args.val, VALIDATION_SEED + args.seed, [])
    encode_world(validation, "images", "captions.jsonl", "encoded", text_encoder)

    if any(run.small for run in runs):
        draw_world(out / "small", args.small, SMALL_SEED + args.seed)

    for folder in encoded_folders(out, runs):
        world = folder.parent
        kind = folder.name.removeprefix("encoded").removeprefix("-")
        images = kind if kind.startswith("cutmix") else "images"
        captions = f"captions-{kind}.jsonl" if kind else "captions.jsonl"
        encode_world(world, images, captions, folder.name, text_encoder)


def encoded_folders(out, runs):
    """Return the folders of encoded pictures that runs are trained on, each once."""
    folders = []
    # A run names the folders that it needs; each of them says what it is made from.
    for run in runs:
        folders += [folder for folder in data_of(out, run) if folder]
    return list(dict.fromkeys(folders))


def seconds_of_data(args, runs):
    """Return how long the data will take that is not there yet."""
    pictures = 0
    for folder in encoded_folders(args.out, runs):
        if not folder.exists():
            pictures += args.small if folder.parent.name == "small" else args.images
    if not (args.out / "val/encoded").exists():
        pictures += args.val

    # Timing takes a moment by itself.
    return pictures * data_seconds() if pictures else 0.0


def seconds_of_jobs(args, jobs):
    """Return {run: seconds}, how long each of the jobs {run: job} will take on this machine."""
    # Timed with as many neighbours as the real
    # runs have, since they slow each other down.
    at_once = min(args.jobs, len(jobs))
    timed = {name: seconds_side_by_side(name, at_once)
             for name in MODEL_NAMES if any(run.model == name for run in jobs)}

    return {run: OVERHEAD * expected_seconds(job, timed[run.model], args.steps, args.prompts, args.val)
            for run, job in jobs.items()}


def main(argv=None):
    args = parse_arguments(argv)
    with only_command(args.out):
        make_tables(args)


def make_tables(args):
    """Make what the tables need and is not there yet, and write their page."""
    out = args.out
    # What shapes the data and the training must stay the same when
    # the command is repeated. Tables, seeds and jobs may change:
    # they only choose what is made, and how many at a time.
    settings = {name: getattr(args, name)
                for name in ("images", "small", "val", "steps", "prompts", "seed")}
    begin_or_resume(out / "tables.json", out, {**settings, "drawing": world_fingerprint()})

    seeds = range(args.seed, args.seed + args.seeds)
    runs = runs_of(args.tables, seeds)
    jobs = {run: job_of(out, run, args.steps, args.tables, args.seed) for run in runs}

    # What is there from an earlier command is not made again.
    left = {run: job for run, job in jobs.items() if remaining(job)}
    todo = []
    expected = []
    if left:
        seconds = seconds_of_jobs(args, left)
        # The slowest models of a seed come first, or one of them would run alone at the end.
        order = sorted(left, key=lambda run: (run.seed, -seconds[run]))
        todo = [left[run] for run in order]
        expected = end_times([seconds[run] for run in order], args.jobs)
        before = spoken_time(seconds_of_data(args, runs) + max(expected))
        print(f"{len(todo)} models to train, sample and score, {min(args.jobs, len(todo))} at a "
              f"time: {before} here, with their data.", flush=True)

    make_data(args, runs)

    begin = time.time()
    ended = []

    def after_job(job):
        ended.append(job)
        used = time.time() - begin

        # The rest is as much faster or slower than expected as what has
        # ended, if that was long enough to tell.
        so_far = sorted(expected)[len(ended) - 1]
        pace = used / so_far if so_far > 60 else 1.0
        rest = pace * (max(expected) - so_far)
        # Nothing is left after the last job, or after one that ends as late as the last.
        ahead = f", {spoken_time(rest)} left" if rest else ""
        print(f"{len(ended)} of {len(todo)}: {job.name}; {spoken_time(used)} used{ahead}", flush=True)

        write_tables(out, args.tables, seeds, settings)

    run_side_by_side(todo, args.jobs, after_job)
    # Once more at the end: if there was nothing to run, no job has written the page.
    write_tables(out, args.tables, seeds, settings)
    print(f"\n{out / 'tables.html'}")
