"""The page of the experiments: tables, curves, and the pictures that each score stands for."""

import html
import math
import re
import statistics

from common import read_json, read_jsonl
from metrics.charts import line_chart
from toy.experiments import PROMPT_KINDS, checkpoint_of, kept_steps, lines_of, name_of
from toy.prompts import TASKS
from toy.recipe import TAU
from toy.report import card, picture, share_text, spoken, table, verdicts, write_page
from toy.score import TWO_OBJECTS, one_background, task_scores

TITLES = {
    "1": "Table 1: distance to validation pictures",
    "2": "Table 2: captions, composites and networks",
    "4": "Table 4: CutMix settings, DiT-I, p = 0.5",
    "5": "Table 5: the share p of composites, DiT-I, CM 1/4",
    "tau": "tau: from which noise on composites are used, DiT-I",
    "fig5": "Fig. 5: a small training set, DiT-I",
}
INTRODUCTION = """
<p>GenEval in miniature: the share of pictures that are as asked, mean &plusmn; standard deviation between
seeds. Below it stand the seeds' own scores, which lead to their pictures. <i>One background</i>: the share of
pictures with no seam, among the two-object pictures (of three tasks) that are right.</p>
<p>{steps} training steps on {images} pictures (and as many composites). {prompts} prompts a task: of a task's
score of one seed, the standard error from these alone is up to {error:.2f}. World and prompts are those of
seed {seed}, so &plusmn; tells only how much the training varies.</p>
"""

NOISE = f"""
<h2>Fig. 7: what noise hides</h2>
<p>The line is at the toy's tau = {TAU}. The toy's latents have half the standard deviation of the paper's, so
training sees more noise at the same t.</p>
"""


# --------------------------------------------------------------------------------------------
# Scores of the runs that have ended so far

def scores_file(out, run, kind):
    """Return the path of the verdicts on a run's samples for short or long prompts."""
    return out / "runs" / name_of(run) / f"scores-{kind}.jsonl"


def read_scores(out, run, kind):
    """Return the verdicts on a run's samples for short or long prompts, or None: not yet there."""
    # The page is made after every run, while the scores of others are still missing.
    path = scores_file(out, run, kind)
    return read_jsonl(path) if path.exists() else None


def columns_of(rows):
    """Return {column: value} of a run's verdicts: the tasks, "overall" and "one background"."""
    return {**task_scores(rows), "one background": one_background(rows)}


def ended_runs(out, line, kind):
    """Return the runs of a table's line whose samples have been scored."""
    return [run for run in line.runs if scores_file(out, run, kind).exists()]


def line_columns(out, line, kind):
    """Return {column: [a value for each seed]} of a table's line; empty if no run has ended."""
    # Seeds that have not ended are passed over: the mean is over those that have.
    values = {}
    for run in ended_runs(out, line, kind):
        for column, value in columns_of(read_scores(out, run, kind)).items():
            values.setdefault(column, []).append(value)

    return values


def without_nan(values):
    """Return the values that are numbers, of which there may be none."""
    # A seed with no right two-object picture has no share of one background.
    return [value for value in values if not math.isnan(value)]


def mean_and_spread(values):
    """Return values of several seeds as text: "0.52 &plusmn; 0.03"."""
    values = without_nan(values)
    if not values:
        return "-"

    # A deviation needs two values; one seed alone is shown without.
    text = share_text(statistics.mean(values))
    if len(values) > 1:
        text += f" &plusmn; {statistics.stdev(values):.2f}"

    return text


# --------------------------------------------------------------------------------------------
# Pieces

def score_table(out, lines):
    """Return the lines' scores for long and short prompts; every score is a link to its pictures."""
    rows = [["", "prompts", *map(spoken, TASKS), "overall", "one background"]]
    # Long prompts come first: most models were trained on captions like them.
    for kind in reversed(PROMPT_KINDS):
        for line in lines:
            runs = ended_runs(out, line, kind)
            columns = line_columns(out, line, kind)
            cells = [f"{mean_and_spread(values)}<br>{links(runs, values, kind, column)}"
                     for column, values in columns.items()]
            rows.append([label_of(line, len(runs)), kind, *(cells or ["not yet"])])
    return table(rows)


def label_of(line, ended):
    """Return a line's label, with how many of its runs have ended if that is not all of them."""
    # A mean over fewer seeds than the others must not be taken for more.
    if 0 < ended < len(line.runs):
        return f"{line.label} ({ended} of {len(line.runs)} seeds)"
    return line.label


def links(runs, values, kind, column):
    """Return the scores of single runs, each a link to its pictures."""
    # A page has a heading for each task, and none for the columns over several tasks.
    place = f"#{column}" if column in TASKS else ""
    parts = [f'<a href="runs/{name_of(run)}/pictures-{kind}.html{place}">{share_text(value)}</a>'
             for run, value in zip(runs, values)]
    return f"<small>{' '.join(parts)}</small>"


def score_chart(out, lines):
    """Return curves over the number in the lines' labels ("tau = 0.4"): scores and one background."""
    curves = {"overall": [], "two object": [], "color attr": [], "one background": []}

    # The labels carry the x axis: its name, and each line's number.
    name = lines[0].label.split(" = ")[0]
    for line in lines:
        x = float(line.label.split(" = ")[1])
        columns = line_columns(out, line, "long")

        for curve, points in curves.items():
            # Tasks have underscores in their names, the other columns have spaces.
            values = without_nan(columns.get(curve.replace(" ", "_"), columns.get(curve, [])))
            if values:
                points.append((x, statistics.mean(values)))
    return line_chart(curves, name, "long prompts: share of pictures")


def trade_chart(out, lines):
    """Return the share of two-object pictures that are right against that of one background among
    them: a point a line.
    """
    points = []
    for line in lines:
        scores = []
        shares = []
        for run in ended_runs(out, line, "long"):
            rows = [row for row in read_scores(out, run, "long") if row["tag"] in TWO_OBJECTS]
            scores.append(statistics.mean(row["right"] for row in rows))
            shares.append(one_background(rows))
        shares = without_nan(shares)
        if shares:
            points.append((statistics.mean(shares), statistics.mean(scores)))
    return line_chart({f"{lines[0].label} to {lines[-1].label}": points},
                      "share of right pictures of two objects with one background",
                      "share of pictures of two objects that are right")


def same_prompts(out, lines, kind="long", of_each_task=2):
    """Return pictures of the same prompts, side by side, by each line's model of the first seed."""
    # Only lines whose first model has ended get a column.
    shown = []
    for line in lines:
        rows = read_scores(out, line.runs[0], kind)
        if rows:
            shown.append((line, rows))

    if not shown:
        return ""

    rows = [["prompt", *(line.label for line, _ in shown)]]
    for task in TASKS:
        # All models got the same prompts in the same
        # order, so a number stands for one prompt.
        numbers = [n for n, row in enumerate(shown[0][1]) if row["tag"] == task]

        for n in numbers[:of_each_task]:
            cells = [html.escape(shown[0][1][n]["prompt"])]
            for line, verdicts_of_line in shown:
                row = verdicts_of_line[n]
                samples = out / "runs" / name_of(line.runs[0]) / f"samples-{kind}"
                mark = "right" if row["right"] else "wrong"
                cells.append(card(samples / row["file"], f'<span class="{mark}">{mark}</span>',
                                  row["reason"]))

            rows.append(cells)
    return table(rows)


def distance_file(out, run):
    """Return the path of a run's distance to the validation pictures."""
    return out / "runs" / name_of(run) / "distance.json"


def distance_table(out, lines):
    """Return Table 1: the Fréchet distance and P/R/D/C of each line, mean and spread."""
    names = ["distance", "precision", "recall", "density", "coverage"]
    rows = [["", *names, "pictures"]]
    for line in lines:
        # As above, a line's mean is over the seeds that have ended.
        found = []
        sheets = []
        for run in line.runs:
            path = distance_file(out, run)
            if path.exists():
                found.append(read_json(path, "the scores of a run"))
                sheets.append(f'<a href="runs/{name_of(run)}/distance/sheet.png">{run.seed}</a>')

        cells = [mean_and_spread([scores[name] for scores in found]) for name in names]
        label = label_of(line, len(found))
        rows.append([label, *([*cells, " ".join(sheets)] if found else ["not yet"])])
    return table(rows)


def overfitting_charts(out, lines, steps):
    """Return Fig. 5: the validation loss, and the distance to validation pictures, against steps."""
    # The gap between both losses shows overfitting, so they share one chart.
    losses = {}
    distances = {}
    sheets = []
    for line in lines:
        # Only the first seed's checkpoints were measured on the way.
        run = line.runs[0]
        log = checkpoint_of(out, run) / "log.jsonl"
        if not log.exists():
            continue

        # A log has separate lines for the training loss and for the validation loss.
        rows = read_jsonl(log)
        losses[f"{line.label}, validation"] = points_of(rows, "val_loss")
        losses[f"{line.label}, training"] = points_of(rows, "loss")

        distances[line.label] = []
        for step in kept_steps(steps):
            path = out / "runs" / name_of(run) / f"distance-{step:07d}.json"
            if path.exists():
                scores = read_json(path, "the scores of a checkpoint")
                distances[line.label].append((step, scores["distance"]))
                sheet = f"runs/{name_of(run)}/distance-{step:07d}/sheet.png"
                sheets.append(f'<a href="{sheet}">{line.label}, {step}</a>')

    return (line_chart(losses, "step", "loss", log=True)
            + line_chart(distances, "step", "distance to validation pictures", log=True)
            + f"<p>Their pictures: {'; '.join(sheets)}</p>")


def points_of(rows, key):
    return [(row["step"], row[key]) for row in rows if key in row]


# --------------------------------------------------------------------------------------------
# The page

def section(out, name, seeds, steps):
    """Return one table's part of the page."""
    lines = lines_of(name, seeds)
    parts = [f"<h2>{TITLES[name]}</h2>"]

    # Distances have a table of their own, and no verdicts for the pieces below.
    if name == "1":
        parts.append("<p>Of samples for the captions of validation pictures (AIO captions for AIO), on "
                     "the toy autoencoder's latents: mean and deviation of each channel in each quarter of a "
                     "picture, 64 numbers.</p>")
        parts.append(distance_table(out, lines))
        return "\n".join(parts)

    if name == "fig5":
        parts.append(overfitting_charts(out, lines, steps))

    # These two vary a number, which can be an axis. The other tables compare names.
    if name in ("5", "tau"):
        parts.append(score_chart(out, lines))
    if name == "tau":
        parts.append(trade_chart(out, lines))

    parts.append(score_table(out, lines))
    parts.append("<h3>The same prompts, drawn by all models</h3>")
    parts.append(same_prompts(out, lines))

    return "\n".join(parts)


def is_there(out, name, seeds):
    """Tell whether every line of a table has a result, from this command or an earlier one."""
    # Tables share runs, so a table that nobody asked for may have some of its lines.
    lines = lines_of(name, seeds)
    if name == "1":
        return all(any(distance_file(out, run).exists() for run in line.runs) for line in lines)
    return all(ended_runs(out, line, "long") for line in lines)


def seeds_there(out):
    """Return the seeds of all runs that were begun in a folder."""
    seeds = set()
    for folder in (out / "runs").glob("*-seed*"):
        # Somebody may keep a copy of a run beside it, under a name such as "...-seed0.bak".
        name = re.fullmatch(r".*-seed(\d+)", folder.name)
        if name:
            seeds.add(int(name[1]))
    return seeds


def write_tables(out, tables_wanted, seeds, settings):
    """Write OUT/tables.html, and for each run that has ended the pages of its pictures.

    tables_wanted: names of tables. seeds: asked for, too. What else an earlier command has made stays on
    the page. settings: the "steps", "images", "prompts" and "seed" of all runs.
    """
    seeds = sorted({*seeds, *seeds_there(out)})
    # The whole page is written anew each time, from what lies in the folders.
    error = 0.5 / math.sqrt(settings["prompts"])
    parts = [INTRODUCTION.format(error=error, **settings)]
    for name in TITLES:
        if name not in tables_wanted and not is_there(out, name, seeds):
            continue
        parts.append(section(out, name, seeds, settings["steps"]))
        for line in lines_of(name, seeds):
            for run in line.runs:
                write_pictures(out, run)

    parts.append(NOISE)
    parts.append(picture(out / "cutmix-look/noise.png"))

    write_page(out / "tables.html", "The paper's experiments in miniature", "\n".join(parts))


def write_pictures(out, run):
    """Write the pages with all pictures of a run and their verdicts, once its scores are there."""
    folder = out / "runs" / name_of(run)
    for kind in PROMPT_KINDS:
        scores = scores_file(out, run, kind)
        page = folder / f"pictures-{kind}.html"
        # Written again only where the samples were judged again.
        if scores.exists() and modified(page) < modified(scores):
            rows = read_jsonl(scores)
            body = verdicts(folder / f"samples-{kind}", rows, most=len(rows))
            write_page(page, f"{name_of(run)}, {kind} prompts", body)


def modified(path):
    """Return when a file was written last, in seconds; 0 for one that is not there."""
    return path.stat().st_mtime if path.exists() else 0
