"""The toy's report: one page with everything in it, and the pieces that pages are made of."""

import base64
import html
import math
import mimetypes

from common import complete, read_jsonl
from metrics.charts import line_chart
from toy.prompts import TASKS
from toy.recipe import TAU
from toy.score import TWO_OBJECTS, one_background, task_scores

# The style is part of every page, so that a page is one file that can be sent to someone.
STYLE = """
body { font: 14px sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em }
h2 { margin-top: 2em }
img { max-width: 100% }
figure { margin: 0; width: 128px; font-size: 11px }
figure img { width: 128px; image-rendering: pixelated }
.cards { display: flex; flex-wrap: wrap; gap: 12px }
table { border-collapse: collapse }
td { padding: 3px 10px; text-align: right }
tr:first-child { font-weight: bold }
td:first-child { text-align: left }
.right { color: #080 }
.wrong { color: #b00 }
"""


# --------------------------------------------------------------------------------------------
# Pieces of pages

def write_page(path, title, body):
    """Write an HTML page. `body` is HTML, `title` plain text."""
    # The title is plain text and may hold any character. The body is HTML already.
    title = html.escape(title)
    page = (f'<!doctype html><meta charset="utf-8"><title>{title}</title>\n'
            f"<style>{STYLE}</style>\n<h1>{title}</h1>\n{body}\n")

    # Somebody may reload the page just now: it is replaced as a whole.
    with complete(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def picture(path, note=""):
    """Return an <img> with the bytes of a file in it; the note appears when one points at it."""
    # The bytes stand in the page itself, so it
    # shows its pictures wherever it is moved to.
    kind = mimetypes.guess_type(path)[0]
    data = base64.b64encode(path.read_bytes()).decode()

    return f'<img title="{html.escape(note)}" src="data:{kind};base64,{data}">'


def card(path, caption, note=""):
    """Return a picture with a caption, which is HTML, below it."""
    return f"<figure>{picture(path, note)}<figcaption>{caption}</figcaption></figure>"


def cards(items):
    """Return cards side by side."""
    return f'<div class="cards">{"".join(items)}</div>'


def table(rows):
    """Return rows of HTML cells as a table; the first row is its head."""
    # Cells are not escaped: some hold links or pictures.
    # Whoever makes one from plain text escapes it.
    lines = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return "<table>" + "\n".join(lines) + "</table>"


def share_text(value):
    """Return a share as text, "-" for none."""
    # NaN stands for no pictures to count, which is not the same as a share of 0.
    return "-" if math.isnan(value) else f"{value:.2f}"


def spoken(task):
    """Return a task's name in words: "single_object" -> "single object"."""
    return task.replace("_", " ")


def verdict_card(folder, row):
    """Return the card of a scored picture: verdict and prompt below, the reason when pointed at."""
    # Words, and not colours alone: red and green look alike to some.
    kind = "right" if row["right"] else "wrong"
    caption = f'<b class="{kind}">{kind}</b> {html.escape(row["prompt"])}'
    if row["tag"] in TWO_OBJECTS:
        caption += " <i>one background</i>" if row["one_background"] else " <i>a seam</i>"

    return card(folder / row["file"], caption, row["reason"])


def verdicts(folder, rows, most=12):
    """Return the scored pictures of a folder, at most `most` of each task, under a heading each."""
    parts = []
    for task in TASKS:
        # The first ones are shown, not the best ones: a page must not flatter the model.
        chosen = [row for row in rows if row["tag"] == task][:most]

        # The heading's id is what the cells of the tables' page link to.
        parts.append(f'<h3 id="{task}">{spoken(task)}</h3>')
        parts.append(cards([verdict_card(folder, row) for row in chosen]))

    return "\n".join(parts)


def examples(folder, captions, count=8):
    """Return some pictures of a folder, spread over the data, with their captions."""
    rows = read_jsonl(captions)
    # Neighbours in a data set may be alike, so the rows in between are passed over.
    step = max(1, len(rows) // count)
    return cards([card(folder / row["file"], html.escape(row["caption"]), row["file"])
                  for row in rows[::step][:count]])


def loss_curve(log):
    """Return the training loss in train.py's log.jsonl as an SVG picture."""
    # The log has lines of other kinds, too, without a loss.
    points = [(row["step"], row["loss"]) for row in read_jsonl(log) if "loss" in row]
    return line_chart({"training": points}, "step", "loss", log=True)


# --------------------------------------------------------------------------------------------
# The report of one run

def score_rows(scores):
    """Return the table of scores, {"short": rows, "long": rows} of `score`, as rows of texts."""
    # The names in the head are in the order of `task_scores`.
    lines = [["", *map(spoken, TASKS), "overall", "one background"]]
    for kind, rows in scores.items():
        shares = [share_text(value) for value in task_scores(rows).values()]
        lines.append([f"{kind} prompts", *shares, share_text(one_background(rows))])

    return lines


def report(out, scores):
    """Write OUT/report.html: scores, samples beside their prompts, the data, the noise, the loss."""
    # Both kinds of prompts have the same number of pictures.
    many = len(scores["long"])
    body = f"""
<p>One DiT-I with long captions (TA) and CutMix composites (IA), trained by <code>python -m toy</code>.</p>

<h2>Scores</h2>
{table(score_rows(scores))}
<p>A miniature of GenEval: share of pictures that are as asked, of {many} for each kind of prompt. The
last column is the share of pictures with no seam, that is, with one background, among the pictures of
two objects that are right.</p>

<h2>Samples for long prompts</h2>
<p>Point at a picture for the reason of its verdict.</p>
{verdicts(out / "samples-long", scores["long"])}

<h2>Samples for short prompts</h2>
{verdicts(out / "samples-short", scores["short"], most=4)}

<h2>Originals and their long captions</h2>
{examples(out / "images", out / "captions.jsonl")}

<h2>CutMix composites and theirs</h2>
{examples(out / "cutmix", out / "captions-cutmix.jsonl")}

<h2>What noise hides</h2>
<p>Composites are only used right of the line, at tau = {TAU}, where noise hides their seams. The toy's
latents have half the standard deviation of the paper's, so training sees more noise at the same t.</p>
{picture(out / "cutmix-look/noise.png")}

<h2>Training loss</h2>
{loss_curve(out / "dit/log.jsonl")}
"""
    write_page(out / "report.html", "How far can we go with a toy ImageNet?", body)
