"""Turn results.json into the paper's Tables 1 to 5, as Markdown or CSV, beside published rows."""

import csv
import math
import re
from pathlib import Path
from typing import NamedTuple

from common import UserError, complete, read_json

# {name of a score in results.json: heading of its column}. print_tables reads the arrow
# too: ↓ means that the lowest score of a column is the best.
TASKS = {"single_object": "One obj. ↑", "two_object": "Two obj. ↑", "counting": "Count. ↑",
         "colors": "Col. ↑", "position": "Pos. ↑", "color_attr": "Col. attr. ↑"}
QUALITY = {"fid": "FID Inc. ↓", "fid_dino": "FID DINOv2 ↓", "precision": "P ↑", "recall": "R ↑",
           "density": "D ↑", "coverage": "C ↑", "clip": "CLIPScore ↑", "jina": "Jina ↑"}
COCO_QUALITY = {f"COCO {name}": f"COCO {heading}" for name, heading in QUALITY.items()}
GENEVAL = {"overall": "Overall ↑", **TASKS}
DPG = {name: f"{name.capitalize()} ↑"
       for name in ("global", "entity", "attribute", "relation", "other", "overall")}
# Tables 4 and 5 take a few columns of each of the first three.
ABLATION = {"fid": "FID Inc. ↓", "fid_dino": "FID DINOv2 ↓", "clip": "CLIPScore ↑",
            "original overall": "GenEval ◇ ↑", "extended overall": "GenEval ★ ↑",
            "dpg overall": "DPG ↑"}
FACTS = ("Params", "Images", "TA", "IA", "CutMix", "p")


class Table(NamedTuple):
    title: str
    facts: tuple            # of the checkpoint, shown by `compare --paper`
    columns: dict           # {score: heading}
    prefixes: dict          # {how the scores' names begin: mark behind the name of a row}

    def scores(self):
        """Return the names of all scores that have a place in the table."""
        return {prefix + column for prefix in self.prefixes for column in self.columns}


TABLES = [
    Table("Table 1: image quality, alignment (ImageNet, where COCO is not named)", ("TA", "IA"),
          {**COCO_QUALITY, **QUALITY}, {"": ""}),
    Table("Table 2: GenEval (◇ original prompts, ★ extended prompts)", FACTS[:4], GENEVAL,
          {"original ": " ◇", "extended ": " ★"}),
    Table("Table 3: DPG-Bench", FACTS[:4], DPG, {"dpg ": ""}),
    Table("Table 4: settings of CutMix", ("CutMix",), ABLATION, {"": ""}),
    Table("Table 5: probability of composites", ("p",), ABLATION, {"": ""})]

# What a score depends on, by the score's name, or else by its command's. Scores of a column
# are ranked only if they agree in all of these, and in the counts that `conditions` adds.
DEPENDS_ON = {"fid": ("inception", "size", "no_crop"), "fid_dino": ("dino", "size", "no_crop"),
              "quality": ("dino", "size", "no_crop", "chunk", "k", "seed"), "clip": ("clip",),
              "jina": ("jina",), "geneval": ("detector", "clip"), "dpg": ("judge", "questions")}

# Settings of sample.py that do not make it another way of sampling from a checkpoint: its
# benchmarks differ in them by their nature.
OF_BENCHMARKS = ("weights", "prompts", "names", "format", "images_per_prompt", "seed")

# Rows of other people's numbers, each with its source. What is missing may be added there.
PUBLISHED = Path(__file__).with_name("published.csv")


class Score(NamedTuple):
    value: float
    error: float | None = None          # the standard error
    made_with: dict = {}                # what it depends on beside the images
    notes: tuple = ()                   # what is to be said wherever it is printed


class Row(NamedTuple):
    name: str
    scores: dict                        # {"fid": Score, "COCO fid": ..., "original overall": ...}
    facts: dict                         # {"TA": "yes", "p": "0.5", ...}, of the checkpoint
    weights: str | None = None          # the checkpoint's hash
    sampling: dict = {}                 # how the images were sampled from it
    steps: int | None = None            # its training steps
    published: bool = False
    source: str = ""                    # of a published row


def scores_of(path, command, section):
    """Return a section of results.json as {name of the score: Score}. Raises UserError."""
    if command not in ("quality", "clip", "geneval", "dpg"):
        raise UserError(f"{path}: not a results.json of evaluate.py (no command {command!r})")
    found = section["scores"]

    # A prefix keeps apart what has the same name in two tables: FID on COCO and on
    # ImageNet, for instance.
    prefix = ""
    if command == "dpg":
        prefix = "dpg "
    elif section.get("data") == "COCO":
        prefix = "COCO "

    # GenEval has scores of two kinds of prompts, one level deeper than the others.
    if command == "geneval":
        tasks = {}
        for prompts, values in found.items():
            for task, value in values.items():
                tasks[f"{prompts} {task}"] = value
        found = tasks

    # JSON in Python may hold NaN, and True counts as an int: neither belongs in a table.
    for name, value in found.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise UserError(f"{path}: {command}: {name} is {value!r}, which is not a number")

    notes = section.get("notes") or []
    if not isinstance(notes, list):
        raise UserError(f"{path}: {command}: its notes are no list")
    if prefix == "COCO ":
        notes = [f"COCO: {note}" for note in notes]

    # A standard error belongs to its score and is none itself.
    scores = {}
    for name, value in found.items():
        if not name.endswith("_error"):
            error = found.get(f"{name}_error")
            made_with = conditions(command, section, name)
            scores[prefix + name] = Score(value, error, made_with, tuple(map(str, notes)))
    return scores


def conditions(command, section, name):
    """Return what the score `name` of a section depends on beside the images, as a dict."""
    settings = section.get("settings", {})
    weights = section.get("weights", {})
    counts = section.get("counts", {})
    found = {}
    for key in DEPENDS_ON.get(name, DEPENDS_ON[command]):
        # A model is known by the hash of its weights, whatever its folder is called.
        found[key] = weights.get(settings.get(key), settings.get(key))

    if command == "quality":
        real = counts.get("real", 0)
        fake = counts.get("fake", 0)
        found["number of real images"] = two_digits(real)
        found["number of fake images"] = two_digits(fake)

        # The seed fixes what is in a chunk, and changes nothing in a chunk of all images.
        chunk = settings.get("chunk")
        all_at_once = not chunk or 0 < max(real, fake) <= chunk
        if all_at_once:
            found.pop("seed", None)

    if command == "clip":
        found["number of prompts"] = counts.get("samples", 0) + counts.get("skipped", 0)

    if command == "dpg":
        found["number of prompts"] = counts.get("prompts", 0) + counts.get("skipped", 0)

    if command == "geneval":
        kind = name.split()[0]
        of_kind = counts.get(kind, {})
        found["number of prompts"] = of_kind.get("prompts", 0)
        found["number of images"] = two_digits(of_kind.get("images", 0))
        tasks = sorted(set(section["scores"][kind]) - {"overall"})
        found["set of tasks"] = " + ".join(tasks)

        # Detections that nobody put a name to are known by the file that they were in.
        files = settings.get("detections")
        if files and not settings.get("detector"):
            file = files[0]
            if kind == "extended":
                file = files[-1]
            found["detector"] = weights.get(file, file)
    return found


def two_digits(count):
    """Return a number as text, rounded so that a few unreadable images do not matter."""
    return f"{float(f'{count:.2g}'):.0f}"


def read_row(path):
    """Return a results.json as a Row, named after its folder. Raises UserError."""
    results = read_json(path, "a results.json of evaluate.py")
    row = Row(str(Path(path).parent), {}, {})
    try:
        for command, section in results.items():
            row.scores.update(scores_of(path, command, section))

            # Sections come from commands that ran on their own. One that does not know the
            # checkpoint must not erase what another one knew.
            training = (section.get("checkpoint") or {}).get("training") or {}
            sampling = dict(section.get("sampling") or {})
            if sampling:
                weights = sampling.get("weights") or row.weights
                for key in OF_BENCHMARKS:
                    sampling.pop(key, None)
                row = row._replace(weights=weights, sampling=sampling)

            if training.get("steps") is not None:
                row = row._replace(steps=int(training["steps"]))

            for fact, key in (("Params", "parameters"), ("Images", "images")):
                if training.get(key):
                    row.facts[fact] = f"{training[key] / 1e6:.3g}M"

            # IA is the setting of CutMix; it is empty where a model saw photos only.
            if training:
                row.facts["TA"] = "yes" if training.get("TA") else "no"
                row.facts["IA"] = "yes" if training.get("IA") else "no"
                row.facts["CutMix"] = str(training.get("IA") or "none")
                row.facts["p"] = str(training.get("p", ""))
    # Python's JSON knows Infinity, and whole numbers that no float can hold.
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError):
        raise UserError(f"{path}: not a results.json of evaluate.py") from None
    return row


def results_files(place):
    """Return the results.json of a path: itself, in it, or else in its folders."""
    place = Path(place)
    if not place.is_dir():
        return [place]

    # A folder's own results come first; the folders in it are searched without them.
    found = list(place.glob("results.json")) or sorted(place.glob("*/results.json"))
    if not found:
        raise UserError(f"{place}: no results.json in it")
    return found


def joined(rows):
    """Return rows, those of one checkpoint made one unless they share a score.

    Samples that were made with other settings (guidance, steps, ...) are those of another
    model.
    """
    models = []
    for row in rows:
        for i, model in enumerate(models):
            same_weights = row.weights is not None and row.weights == model.weights
            same_model = same_weights and row.sampling == model.sampling
            # Two measurements of one score stay apart, or one would hide the other.
            if same_model and not row.scores.keys() & model.scores.keys():
                models[i] = model._replace(
                    name=f"{model.name} + {row.name}",
                    scores={**model.scores, **row.scores},
                    facts={**model.facts, **row.facts},
                    steps=row.steps if model.steps is None else model.steps)
                break
        else:
            # No earlier row is of this model, or all share a score with this one.
            models.append(row)
    return models


def disagreement(scores):
    """Return the conditions in which the Scores of a column differ, as text; "" if they agree."""
    # A dict and not a set, because it keeps the order of the keys.
    keys = {}
    for score in scores:
        keys.update(dict.fromkeys(score.made_with))

    reasons = []
    for key in keys:
        values = sorted({str(score.made_with.get(key)) for score in scores})
        if len(values) > 1:
            shown = [short_hash(value) for value in values]
            reasons.append(f"{key} ({', '.join(shown)})")
    return ", ".join(reasons)


def short_hash(text):
    """Return the first twelve digits of a hash; any other text as it is."""
    return text[:12] if re.fullmatch("[0-9a-f]{40,}", text) else text


def notes_of(rows, columns):
    """Return {note: names of the rows that have it}, for the notes on the scores `columns`."""
    found = {}
    for row in rows:
        # A dict and not a set, because it keeps the order of the notes.
        notes = {}
        for name, score in row.scores.items():
            if name in columns:
                notes.update(dict.fromkeys(score.notes))
        for note in notes:
            found.setdefault(note, []).append(row.name)
    return found


def cell_texts(scores, rivals, lowest, digits):
    """Return Scores as text. The best of the `rivals` is bold, the second best underlined.

    None is an empty cell.
    """
    # Scores that look the same in print take the same place.
    places = sorted({round(score.value, digits) for score in rivals}, reverse=not lowest)

    texts = []
    for score in scores:
        text = f"{score.value:.{digits}f}" if score else ""
        if score and score.error is not None:
            text += f" ± {score.error:.2f}"

        if score in rivals and len(rivals) > 1:
            place = places.index(round(score.value, digits))
            if place == 0:
                text = f"**{text}**"
            elif place == 1:
                text = f"<u>{text}</u>"
        texts.append(text)
    return texts


def rows_of_table(table, rows, paper):
    """Return the rows that have a score of a table; none if the table is not to be printed."""
    chosen = [row for row in rows if row.scores.keys() & table.scores()]

    if table.columns is ABLATION:
        # Only a study of what varies: two settings of CutMix, or two probabilities.
        [fact] = table.facts
        chosen = [row for row in chosen if fact in row.facts]
        if not paper or len({row.facts[fact] for row in chosen}) < 2:
            return []

    # Published rows are there to be compared with; alone they make no table.
    only_published = all(row.published for row in chosen)
    return [] if only_published else chosen


def print_tables(rows, paper=False):
    """Print rows as the paper's tables, in Markdown; `paper`: with the checkpoints' facts.

    Original and extended prompts are ranked apart. What was published is not ranked, nor
    is a column that was measured in different ways, and a line below the table says in
    which. What is not the paper's about a score stands there too.
    """
    for table in TABLES:
        chosen = rows_of_table(table, rows, paper)
        if not chosen:
            continue
        facts = []
        if paper:
            facts = [fact for fact in table.facts if any(fact in row.facts for row in chosen)]

        # A ranking looks down a column, so the cells are made by column and printed by row.
        names = []
        texts = {heading: [] for heading in table.columns.values()}
        unranked = {}

        for prefix, mark in table.prefixes.items():
            group = []
            for row in chosen:
                if any(prefix + column in row.scores for column in table.columns):
                    name = f"{row.name} (published)" if row.published else row.name
                    names.append([name + mark, *[row.facts.get(fact, "") for fact in facts]])
                    group.append(row)

            for column, heading in table.columns.items():
                scores = [row.scores.get(prefix + column) for row in group]
                rivals = [score for row, score in zip(group, scores)
                          if score and not row.published]
                difference = disagreement(rivals)
                if difference:
                    unranked.setdefault(difference, []).append(heading)
                    rivals = []
                # Shares between 0 and 1 have three digits.
                digits = 3 if heading.split()[-2] in ("P", "R", "D", "C") else 2
                texts[heading] += cell_texts(scores, rivals, "↓" in heading, digits)

        # A column that is empty in every row is not shown.
        shown = [heading for heading in texts if any(texts[heading])]
        print(f"\n{table.title}\n\n| | {' | '.join([*facts, *shown])} |")
        print(f"|---|{'---|' * len(facts)}{'--:|' * len(shown)}")
        for i, name in enumerate(names):
            cells = [texts[heading][i] for heading in shown]
            print(f"| {' | '.join([*name, *cells])} |")
        measured = [row for row in chosen if not row.published]
        for note, names in notes_of(measured, table.scores()).items():
            # Named are only those whose note is not that of all.
            about = "" if len(names) == len(measured) else f"{', '.join(names)}: "
            print(f"\n- {about}{note}")
        for difference, headings in unranked.items():
            print(f"\n- not ranked: {', '.join(headings)}; measured with another {difference}")
        for source in dict.fromkeys(row.source for row in chosen if row.source):
            named = [row.name for row in chosen if row.source == source]
            print(f"\n- published: {', '.join(named)}: from {source}")


def write_csv(path, rows):
    """Write rows as CSV: model, facts of the checkpoint, every score by its name."""
    names = {name: None for row in rows for name in row.scores}

    with complete(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["model", *FACTS, *names])
        writer.writeheader()
        for row in rows:
            values = {name: score.value for name, score in row.scores.items()}
            writer.writerow({"model": row.name, **row.facts, **values})


def read_csv(path):
    """Return rows of a CSV file like that of `write_csv`, as published ones.

    A column `source` may say where they are from. Raises UserError.
    """
    rows = []
    # Spreadsheets put an invisible mark (BOM) first, which this encoding removes.
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for cells in reader:
                rows.append(published_row(cells))
        # UnicodeDecodeError is a ValueError.
        except (KeyError, ValueError, TypeError, csv.Error) as error:
            raise UserError(f"{path} line {reader.line_num}: not a table as compare --csv writes "
                            f"it ({error})") from None
    return rows


def published_row(cells):
    """Return a line of a CSV file, {column: text}, as a published Row.

    Raises ValueError, KeyError or TypeError for what is none.
    """
    name = cells.pop("model")
    source = cells.pop("source", None) or ""
    known = set().union(*[table.scores() for table in TABLES])
    facts = {}
    scores = {}
    for column, text in cells.items():
        # An empty cell is a score that a model does not have, and not a zero.
        if not text:
            continue
        if column in FACTS:
            facts[column] = text
        elif column not in known:
            raise ValueError(f"there is no score or fact {column!r}")
        elif not math.isfinite(float(text)):
            raise ValueError(f"{column} is {text!r}, which is not a number")
        else:
            scores[column] = Score(float(text))
    return Row(name, scores, facts, published=True, source=source)
