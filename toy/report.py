"""The toy's scores, and its report: one page, nothing outside of it."""

import base64
import html
import math
import mimetypes

import numpy as np
from PIL import Image

from common import complete, read_jsonl
from evaluate import geneval_verdict
from toy.detector import detect
from toy.world import TASKS

TAU = 0.14      # with it the signal-to-noise ratio, SCALE^2 (1 - t) / t, is that of the paper's 0.4


def score(folder, rows):
    """GenEval's verdict on the image of each prompt -> [(file, row, right, reason), ...]."""
    files = [folder / f"{p:05d}/samples/0000.png" for p in range(len(rows))]
    return [(file, row, *geneval_verdict(detect(Image.open(file)), row, lambda thing, shape: thing["color"]))
            for file, row in zip(files, rows)]


def embed(path, title=""):
    """<img> with the bytes of a file in it."""
    kind, data = mimetypes.guess_type(path)[0], base64.b64encode(path.read_bytes()).decode()
    return f'<img title="{html.escape(title)}" src="data:{kind};base64,{data}">'


def cards(items):
    """(file, HTML, note) of pictures -> them side by side, the HTML below each."""
    figures = "".join(f"<figure>{embed(file, note)}<figcaption>{text}</figcaption></figure>"
                      for file, text, note in items)
    return f'<div class="cards">{figures}</div>'


def curve(rows):
    """The training loss as an inline SVG, steps to the right, loss upwards (logarithmic)."""
    steps, losses = np.array([(row["step"], math.log10(row["loss"])) for row in rows]).T
    low, high = losses.min() - 0.02, losses.max() + 0.02
    x, y = 50 + 660 * steps / steps[-1], 10 + 180 * (high - losses) / (high - low)
    points, ticks = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y)), ""
    for k in range(5):
        loss, step = 10 ** (high - (high - low) * k / 4), steps[-1] * k / 4
        ticks += (f'<text x="45" y="{14 + 45 * k}" text-anchor="end">{loss:.3f}</text>'
                  f'<text x="{50 + 165 * k}" y="210" text-anchor="middle">{step:.0f}</text>')
    return (f'<svg width="720" height="220" font-size="11"><polyline fill="none" stroke="#36c" '
            f'stroke-width="1.5" points="{points}"/>{ticks}</svg>')


def report(out, table, results):
    """OUT/report.html: the data, the noise strips, the loss, samples beside their prompts, the scores."""
    def examples(folder, captions):
        rows = read_jsonl(out / captions)
        return cards((out / folder / row["file"], html.escape(row["caption"]), row["file"])
                     for row in rows[::max(1, len(rows) // 8)][:8])

    scores, shown = "".join(f"<tr><td>{'<td>'.join(row).replace('_', ' ')}" for row in table), ""
    verdict = {True: '<b class="right">right</b>', False: '<b class="wrong">wrong</b>'}
    for task in TASKS:
        some = [result for result in results if result[1]["tag"] == task][:12]
        shown += f"<h3>{task.replace('_', ' ')}</h3>" + cards(
            (file, f"{verdict[right]} {html.escape(row['prompt'])}", why) for file, row, right, why in some)
    page = f"""<!doctype html><meta charset="utf-8"><title>The toy paper</title>
<style>body {{ font: 14px sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em }}
h2 {{ margin-top: 2em }} img {{ max-width: 100% }} figure img {{ width: 128px; image-rendering: pixelated }}
.cards {{ display: flex; flex-wrap: wrap; gap: 12px }} figure {{ margin: 0; width: 128px; font-size: 11px }}
td {{ padding: 3px 10px; text-align: right }} tr:first-child {{ font-weight: bold }}
td:first-child {{ text-align: left }} .right {{ color: #080 }} .wrong {{ color: #b00 }} </style>
<h1>How far can we go with a toy ImageNet?</h1>
<p>One DiT-I with long captions (TA) and CutMix composites (IA), trained by <code>python -m toy</code>.</p>
<h2>Scores</h2><table>{scores}</table>
<p>A miniature of GenEval: share of images that are as asked, of {len(results)} for each kind of prompt.</p>
<h2>Samples for long prompts</h2><p>Point at an image for the reason of its verdict.</p>{shown}
<h2>Originals and their long captions</h2>{examples("images", "captions.jsonl")}
<h2>CutMix composites and theirs</h2>{examples("cutmix", "captions-cutmix.jsonl")}
<h2>What noise hides</h2><p>Composites are only used right of the line, where their seams are hidden: at the
paper's tau = 0.4. The toy's latents have half the scale: this noise ratio comes at tau = {TAU} already.</p>
{embed(out / "cutmix-look/noise.png")}
<h2>Training loss</h2>{curve(read_jsonl(out / "dit/log.jsonl"))}
"""
    with complete(out / "report.html") as path:
        path.write_text(page)
