"""The paper's experiments on the toy, in one night or table by table.

    python -m toy tables --table 2

Draws the data once, trains every model that the tables compare, samples, scores, and
writes one page, OUT/tables.html, which grows with every model and every table. Models are
made side by side, each by the real commands on one thread. Killed, it goes on with the
same command; tables that share models share them. Without --table it makes all: 1
(distances), 2 (GenEval), 4 (CutMix settings), 5 (p), tau, fig5 (little data).
"""

import contextlib
import ctypes
import math
import os
import shlex
import signal
import subprocess
import sys
from itertools import product

# First: it keeps Ctrl-C quiet while torch is imported.
from common import (COUNT, Options, UserError, ahead, default_workers, line_chart,
                    only_command, progress, read_jsonl)

from cutmix import CUTS
from toy.data import bind, draw_world, encode_world, make_prompts_and_encoder
from toy.prompts import TASKS
from toy.recipe import Variant, model_commands, quoted, sample_command
from toy.report import (SCORES, about_the_data, mean_and_spread, report, table, verdict_card,
                        write_page)
from toy.run import add_options
from toy.score import columns_of

# --------------------------------------------------------------------------------------------
# What each table compares

TABLE_2 = {
    "DiT-I AIO": Variant(captions="-aio"),
    "DiT-I TA": Variant(),
    "DiT-I TA + IA": Variant(setting="all"),
    "CAD-I AIO": Variant("cad", captions="-aio"),
    "CAD-I TA": Variant("cad"),
    "CAD-I TA + IA": Variant("cad", setting="all"),
}
# The lines of a table differ in one thing only, and tables share the models they have in
# common.
TABLES = {
    "1": TABLE_2,
    "2": TABLE_2,
    "4": {f"CM {setting}": Variant(setting=setting) for setting in (*CUTS, "all")},
    "5": {"p = 0": Variant(),
          **{f"p = {p}": Variant(setting="1/4", p=p) for p in (0.25, 0.5, 0.75, 1)}},
    "tau": {f"tau = {tau}": Variant(setting="all", tau=tau) for tau in (0, 0.2, 0.4, 0.6, 0.8)},
    "fig5": {"TA": Variant(world="small"), "TA + IA": Variant(setting="all", world="small")},
}
TITLES = {
    "1": "Table 1: distance to validation pictures",
    "2": "Table 2: captions, composites and networks",
    "4": "Table 4: CutMix settings, DiT-I, p = 0.5",
    "5": "Table 5: the share p of composites, DiT-I, CM 1/4",
    "tau": "tau: from which noise on composites are used, DiT-I",
    "fig5": "Fig. 5: a small training set, DiT-I",
}
KEPT = 8                            # checkpoints of a run of Fig. 5


# --------------------------------------------------------------------------------------------
# What they are made from

# All models share the data, which is that of the first seed. Validation pictures and the
# small training set of Fig. 5 are others.
VALIDATION = 512                    # pictures
VALIDATION_SEED = 1_000_000
SMALL = 600
SMALL_SEED = 2_000_000


def make_data(args, runs):
    """Draw, mix, caption and encode what the runs are trained and measured on, each once."""
    out = args.out
    # The setting "all" is always made: the T5's words come from its captions, too.
    settings = {run.setting for run in runs} - {""} | {"all"}
    draw_world(out, args.images, args.seed, sorted(settings))
    make_prompts_and_encoder(out, args.prompts, args.seed)
    # Validation pictures are originals only: composites are for training.
    draw_world(out / "val", VALIDATION, VALIDATION_SEED + args.seed, [])
    draw_world(out / "small", SMALL, SMALL_SEED + args.seed)

    # These two are for measuring, and for the page.
    encoded = {("val", ""), ("", "-cutmix")}.union(*[run.data() for run in runs])
    for world, kind in sorted(encoded):
        encode_world(out / world, kind, out / "t5")


# --------------------------------------------------------------------------------------------
# How a model is made: real commands, each as a user types it

def commands_of(args, run, seed):
    """Return the command lines that train, sample and score a model."""
    out = args.out
    folder = out / run.folder(seed)
    checkpoint = folder / "checkpoint"
    # Fig. 5 is about the course of training: it measures on the way.
    every = math.ceil(args.steps / KEPT)
    more = ""
    if run.world:
        more = f"--val {quoted(out / 'val/encoded')} --val-every {every} --keep-every {every}"

    commands = model_commands(run, out, checkpoint, args.steps, seed, more)

    # Distances take many samples: measured are the models of Table 1, and one of each
    # line of Fig. 5.
    measured = {}
    if "1" in args.tables and run in TABLE_2.values():
        measured["distance"] = checkpoint
    if run.world and seed == args.seed:
        for step in range(every, args.steps + 1, every):
            measured[f"distance-{step:07d}"] = checkpoint / f"step-{step:07d}"

    # The prompts are the captions of the validation pictures, of the kind that it was
    # trained on.
    prompts = out / f"val/captions{run.captions}.jsonl"
    real = quoted(out / "val/images")
    for name, model in measured.items():
        samples = folder / name
        commands += [sample_command(model, prompts, samples, seed, more=""),
                     f"-m toy score --samples {quoted(samples)} --real {real} "
                     f"--out {quoted(folder / f'{name}.jsonl')}"]
    return commands


def run_aside(command, log, running):
    """Run a command line in a process of its own, its messages in a file.

    running: the list of all processes, to which this one is added. Raises UserError if it
    fails.
    """
    # One thread each: with more, the models would take the cores from each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "a") as messages:
        print(f"\n$ python {command}", file=messages, flush=True)
        process = subprocess.Popen([sys.executable, *shlex.split(command)],
                                   stdout=messages, stderr=messages,
                                   env=environment, preexec_fn=end_with_parent)
    running.append(process)

    if process.wait():
        # A progress bar writes over its own line: what stands behind the last "\r" was
        # seen. To Python that ends a line, too.
        last = log.read_text(errors="replace").splitlines()[-1]
        raise UserError(f"{last} (more in {log})")


LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1


def end_with_parent():
    """Let Linux kill this process when the one that started it ends, even by kill -9."""
    # Otherwise it would still write to its folder when the same command is given again.
    with contextlib.suppress(AttributeError):
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


# --------------------------------------------------------------------------------------------
# The page

INTRODUCTION = """
<p>Mean &plusmn; standard deviation between seeds, which lead to their pictures. {steps} training
steps on {images} pictures (and as many composites). {prompts} prompts a task: of a task's score of
one seed, the standard error from these alone is up to {error:.2f}. World and prompts are those of
seed {seed}, so &plusmn; tells only how much the training varies.</p>
"""
# What stands above the scores of each file.
HEADINGS = {
    "distance.jsonl": """
<p>Of samples for the captions of validation pictures (AIO captions for AIO), on the toy
autoencoder's latents: mean and deviation of each channel in each quarter of a picture, 64
numbers.</p>
""",
    "scores-long.jsonl": "<h3>long prompts</h3>",
    "scores-short.jsonl": "<h3>short prompts</h3>",
}


def write_tables(args):
    """Write OUT/tables.html: the tables of which a model has been made, by whatever command."""
    error = 0.5 / math.sqrt(args.prompts)
    parts = [SCORES, INTRODUCTION.format(error=error, **vars(args))]
    for name, lines in TABLES.items():
        files = ["scores-long.jsonl", "scores-short.jsonl"]
        if name == "1":
            files = ["distance.jsonl"]
        # Each line's first model, of those that are made.
        folders = {label: args.out / run.folder(args.seed) for label, run in lines.items()}
        models = {label: folder for label, folder in folders.items()
                  if (folder / files[0]).exists()}
        if not models:
            continue

        parts.append(f"<h2>{TITLES[name]}</h2>")
        if name == "fig5":
            parts += overfitting_charts(models)
        for file in files:
            parts += [HEADINGS[file], score_table(args.out, lines, file)]
        if name != "1":
            parts += ["<h3>The same long prompts, drawn by all models</h3>",
                      same_prompts(models)]

    parts.append(about_the_data(args.out))
    write_page(args.out / "tables.html", "The paper's experiments in miniature", parts)


def score_table(out, lines, file):
    """Return the scores of a table's lines, with links to the pictures of each seed."""
    rows = [[]]
    for label, run in lines.items():
        scores = {}
        # Whichever command made them.
        for path in sorted(out.glob(f"{run.folder('*')}/{file}")):
            seed = path.parent.name.rpartition("seed")[2]
            # Somebody may keep a copy of a model beside it, "...-seed0.bak".
            if seed.isdecimal():
                link = f'<a href="{run.folder(seed)}/report.html">{seed}</a>'
                columns = columns_of(read_jsonl(path))
                scores[link] = columns.values()
                # All files have the same columns.
                rows[0] = ["", *columns, "seeds"]

        cells = [mean_and_spread(*values) for values in zip(*scores.values())]
        rows.append([label, *cells, " ".join(scores) or "not yet"])
    return table(rows)


def same_prompts(models):
    """Return pictures of two prompts of each task, a row for each model: {label: its folder}."""
    rows = []
    for label, folder in models.items():
        verdicts = read_jsonl(folder / "scores-long.jsonl")
        # All models got the same prompts in the same order.
        step = len(verdicts) // (2 * len(TASKS)) or 1
        shown = [verdict_card(folder / "samples-long", row) for row in verdicts[::step]]
        rows.append([label, *shown])
    return table(rows)


def points_of(log, key):
    """Return [(step, value)] of the lines of train.py's log.jsonl that have this key."""
    # Not every line has the loss of validation.
    return [(row["step"], row[key]) for row in read_jsonl(log) if key in row]


def overfitting_charts(models):
    """Return Fig. 5: the losses, and the distance to validation pictures, against steps."""
    losses = {}
    distances = {}
    for label, folder in models.items():
        log = folder / "checkpoint/log.jsonl"
        # The gap between both losses shows overfitting, so they share one chart. Somebody may
        # have removed the checkpoint, for its size.
        if log.exists():
            losses[f"{label}, validation"] = points_of(log, "val_loss")
            losses[f"{label}, training"] = points_of(log, "loss")
        distances[label] = []
        for path in sorted(folder.glob("distance-*.jsonl")):
            step = int(path.stem.split("-")[1])
            distances[label].append((step, read_jsonl(path)[0]["distance"]))

    return [line_chart(losses, "step", "loss", log=True),
            line_chart(distances, "step", "distance to validation pictures", log=True)]


# --------------------------------------------------------------------------------------------

def arguments(argv):
    """Return the settings."""
    parser = Options(__doc__, prog="python -m toy tables")
    add_options(parser, "out/toy-tables", 64)
    add = parser.add
    add("--table", "1, 2, 4, 5, tau or fig5; may be given again (default: all)",
        action="append", dest="tables", choices=TABLES)
    add("--seeds", "models of each kind", 2, COUNT)
    add("--jobs", "models at a time", default_workers(), COUNT)
    args = parser.parse_args(argv)
    args.tables = args.tables or list(TABLES)
    return args


def main(argv=None):
    """Make what the tables need and is not there yet, and write their page."""
    args = arguments(argv)
    with only_command(args.out):
        # Tables, seeds and jobs may change: they only choose what is made, and how many at a
        # time.
        bind(args.out / "tables.json", images=args.images, small=SMALL, val=VALIDATION,
             steps=args.steps, prompts=args.prompts, seed=args.seed)
        runs = set()
        for name in args.tables:
            runs.update(TABLES[name].values())
        make_data(args, runs)

        # In the order of names CAD-I, which takes longer, comes before DiT-I: at the end it
        # would run alone.
        models = list(product(range(args.seed, args.seed + args.seeds), sorted(runs)))
        running = []

        def make(model):
            seed, run = model
            folder = args.out / run.folder(seed)
            folder.mkdir(parents=True, exist_ok=True)
            for command in commands_of(args, run, seed):
                run_aside(command, folder / "commands.log", running)
            return folder

        try:
            for folder in progress(ahead(make, models, args.jobs), len(models), "model", "models"):
                report(folder, folder.name, most=args.prompts)
                write_tables(args)
        finally:
            # Where one has failed, the others go on next time.
            for process in running:
                process.kill()
        print(f"\n{args.out / 'tables.html'}")
