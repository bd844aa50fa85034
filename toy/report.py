"""The toy's report: one page with everything in it, and the pieces of such pages."""

import base64
import html
import math
import statistics

from common import read_jsonl, save_png, write_file
from encode import Encoded, draw_noise, load_vae
from toy.detector import has_one_background
from toy.prompts import TASKS
from toy.recipe import TAU, VAE
from toy.score import columns_of, open_picture

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

def write_page(path, title, parts):
    """Write an HTML page; its title and parts are HTML."""
    body = "\n".join(parts)
    page = (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
            f"<style>{STYLE}</style>\n<h1>{title}</h1>\n{body}\n")

    # Somebody may reload the page just now: it is replaced as a whole.
    write_file(path, page.encode())


def data_url(content):
    """Return the bytes of a picture's file as a data: URL."""
    return "data:image;base64," + base64.b64encode(content).decode()


def img(path, note=""):
    """Return an <img> with a file's bytes in it; the note appears when one points at it."""
    # In the page itself, so that it shows its pictures wherever it is moved to.
    data = data_url(path.read_bytes())
    # GenEval's reasons have a < in them; the toy's captions and prompts are just words.
    note = html.escape(note)
    return f'<img alt="{note}" title="{note}" src="{data}">'


def card(path, caption, note):
    """Return a picture with a caption, which is HTML, below it."""
    return f"<figure>{img(path, note)}<figcaption>{caption}</figcaption></figure>"


def cards(items):
    """Return cards side by side."""
    return f'<div class="cards">{"".join(items)}</div>'


def table(rows):
    """Return rows of cells, which are HTML, as a table; the first row is its head."""
    lines = []
    # STYLE makes the first line bold.
    for row in rows:
        cells = "</td><td>".join(row)
        lines.append(f"<tr><td>{cells}</td></tr>")
    return "<table>" + "\n".join(lines) + "</table>"


def mean_and_spread(*values):
    """Return numbers as text, "0.52 &plusmn; 0.03"; a single one as it is, and "-" for none."""
    # NaN stands for no pictures to count, which is not the same as a share of 0.
    known = list(filter(math.isfinite, values))
    if not known:
        return "-"
    mean = f"{statistics.mean(known):.2f}"
    return f"{mean} &plusmn; {statistics.stdev(known):.2f}" if len(known) > 1 else mean


def verdict_card(folder, row):
    """Return the card of a scored picture: verdict and prompt below, the reason when pointed at."""
    # Words, and not colours alone: red and green look alike to some.
    kind = "right" if row["right"] else "wrong"
    caption = f'<b class="{kind}">{kind}</b> {row["prompt"]}'

    if not row["one_background"]:
        caption += " <i>two backgrounds</i>"
    if row["bitten"]:
        caption += " <i>bitten</i>"
    return card(folder / row["file"], caption, row["reason"])


def examples(folder, captions):
    """Return eight pictures of a folder, spread over the data, with their captions."""
    rows = read_jsonl(captions)
    # Neighbours in a data set may be alike, so the rows in between are passed over.
    step = max(1, len(rows) // 8)
    chosen = rows[::step][:8]
    return cards(card(folder / row["file"], row["caption"], row["file"]) for row in chosen)


# --------------------------------------------------------------------------------------------
# The report of one run

SCORES = """
<p>A miniature of GenEval: the share of pictures that are as asked. Two kinds of seams:
<i>one background</i> is the share of pictures with one grey, among the pictures of two objects
that are right; <i>bitten</i> the share of pictures in which background shows between a large
object and a smaller one before it, among all pictures with two such objects.</p>
"""
HINT = """
<p>Point at a picture for the reason of its verdict. How the training went, loss by loss, is in
progress.html, beside the checkpoint.</p>
"""


def report(folder, title, most, more=""):
    """Write FOLDER/report.html, scores and samples of a model, and return its table of scores.

    most: pictures of each task. more: HTML.
    """
    # The head of the table is known when the first scores are.
    scores = [[]]
    samples = []
    for kind in ("long", "short"):
        rows = read_jsonl(folder / f"scores-{kind}.jsonl")
        columns = columns_of(rows)
        scores[0] = ["", *columns]
        scores.append([f"{kind} prompts", *map(mean_and_spread, columns.values())])

        samples.append(f"<h2>Samples for {kind} prompts</h2>")
        for task in TASKS:
            # The first ones are shown, not the best ones: a page must not flatter the model.
            chosen = [row for row in rows if row["tag"] == task][:most]
            shown = (verdict_card(folder / f"samples-{kind}", row) for row in chosen)
            samples += [f"<h3>{task}</h3>", cards(shown)]

    parts = [table(scores), SCORES, HINT, *samples, more]
    write_page(folder / "report.html", title, parts)
    return scores


def about_the_data(out):
    """Return the toy's data as HTML: originals, composites, and Fig. 7."""
    composites = Encoded(out / "encoded-cutmix")

    # One of each setting, whose seam is plain to see: its two greys differ.
    chosen = {}
    for i, row in enumerate(read_jsonl(out / "cutmix/cutmix.jsonl")):
        title = f"CM {row['setting']}"
        path = out / "cutmix" / row["file"]
        if title not in chosen and not has_one_background(open_picture(path)):
            chosen[title] = i
    save_png(draw_noise(composites, load_vae(VAE), chosen), out / "fig7.png")
    return f"""
<h2>Originals and their long captions</h2>
{examples(out / "images", out / "captions.jsonl")}
<h2>CutMix composites and theirs</h2>
{examples(out / "cutmix", out / "captions-cutmix.jsonl")}
<h2>Fig. 7: what noise hides</h2>
<p>Composites of two greys, noised as latents and decoded. They are only used where
t &gt; tau = {TAU}. The toy's latents have half the standard deviation of the paper's, so training
sees more noise at the same t.</p>
{img(out / "fig7.png")}
"""
