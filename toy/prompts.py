"""The toy's GenEval: prompts of the benchmark's six tasks, once short and once long."""

import random
from itertools import product

from common import write_jsonl
from toy.world import (MIDDLE, SHAPES, cell_relations, corner_places, counted,
                       describe_background, describe_object, join, long_caption,
                       look_at, make_scene, place_at)

TASKS = ["single_object", "two_object", "counting", "colors", "position", "color_attr"]


def make_prompts(out, count, seed):
    """Write OUT/prompts-short.jsonl and OUT/prompts-long.jsonl: `count` prompts for each task.

    Each row has GenEval's metadata (`tag`, `include`, `exclude`), the `prompt`, and as
    `layout` where the scene that it describes has its objects.
    """
    pairs = []
    for task, n in product(TASKS, range(count)):
        # Each prompt has a generator of its own: asking
        # for more of them does not change the first ones.
        pairs.append(make_prompt(task, random.Random(f"{seed} {task} {n}")))
    short, long = zip(*pairs)
    write_jsonl(out / "prompts-short.jsonl", short)
    write_jsonl(out / "prompts-long.jsonl", long)


def scene_to_ask_for(task, rng):
    """Return (scene, layout) that a prompt of a task describes.

    Two objects stand in two corners, or a small one in a corner before a large one. No
    original shows either: these are of one class.
    """
    one, two = rng.sample(SHAPES, 2)
    # Where one object is asked for, or several of one class, originals
    # show the like. Two classes are what only composites show.
    shapes = [one, two]
    layout = "corners"
    if task in ("single_object", "colors"):
        shapes = [one]
        layout = rng.choice(["large", "corner"])
    elif task == "counting":
        shapes = [one] * rng.choice([2, 3])
    elif task != "position":
        layout = rng.choice(["corners", "1/4"])

    # One place for each object, in different corners. A large object takes the
    # first place, and being first in the scene it lies behind the small one.
    places = corner_places(rng, len(shapes))
    if layout in ("large", "1/4"):
        places[0] = place_at(rng, MIDDLE, 2)

    scene = make_scene(shapes, places, rng)
    # Grounds once had patterns. Without this draw, prompts would be other ones than those
    # reported.
    rng.choice(["plain"])
    return scene, layout


def make_prompt(task, rng):
    """Return a random prompt for one task twice: a row with the short text, one with the long."""
    scene, layout = scene_to_ask_for(task, rng)
    things = look_at(scene["objects"])
    detailed = long_caption(things, scene, rng)

    # What the short prompt and GenEval's rules ask for: shapes, in two tasks with colours.
    # All objects are of one class, or each is of another.
    classes = {thing["shape"]: thing for thing in things}
    count = len(things) // len(classes)
    names = []
    include = []
    for shape, thing in classes.items():
        name = shape
        clause = {"class": shape, "count": count}
        if task in ("colors", "color_attr"):
            name = f"{thing['color']} {shape}"
            clause["color"] = thing["color"]
        names.append(counted(count, name))
        include.append(clause)
    metadata = {"tag": task, "include": include, "layout": layout}
    brief = join(names)

    # As in GenEval, one too many is excluded: without it, three would pass for two.
    if task == "counting":
        metadata["exclude"] = [{**include[0], "count": count + 1}]

    # GenEval names the object that the other's place is seen from first.
    if task == "position":
        # Objects in opposite corners have two relations, of which a prompt names
        # one. The long prompt must name the same one, so it is written here again.
        words = rng.choice(cell_relations(*things))
        metadata["include"] = [include[1], {**include[0], "position": [words, 0]}]
        brief = join(names, words)
        phrases = [describe_object(thing) for thing in things]
        detailed = f"{join(phrases, f', {words}')} {describe_background(scene, rng)}"
    return {**metadata, "prompt": f"a photo of {brief}"}, {**metadata, "prompt": detailed}
