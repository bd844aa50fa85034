"""The rules of GenEval: objects in an image, and what its prompt asks for -> right or wrong (Table 2)."""

import itertools

import numpy as np

POSITION_THRESHOLD = 0.1    # times both boxes' sizes: the offset that still counts as none
DIRECTION = 0.5             # "left of": x is beyond this share of the offset's length


def relations(a, b):
    """Return the names of the relations in which box `a` [x0, y0, x1, y1] is to `b`."""
    a = np.asarray(a[:4], float).reshape(2, 2)                         # two corners (x, y)
    b = np.asarray(b[:4], float).reshape(2, 2)
    offset = a.mean(0) - b.mean(0)
    sides = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - POSITION_THRESHOLD * sides, 0)
    if (np.abs(shrunk) < 1e-3).all():
        return set()
    # Divided by the length of the whole offset, not of the shrunk one.
    x, y = shrunk / np.linalg.norm(offset)
    holds = {"left of": x < -DIRECTION, "right of": x > DIRECTION,
             "above": y < -DIRECTION, "below": y > DIRECTION}
    return {name for name in holds if holds[name]}


def clause_fault(clause, found, clauses, matched, color_of):
    """Return what is wrong with the objects `found` for an "include" clause, "" if nothing.

    A position refers to an earlier one of `clauses`, whose objects are in `matched`, None if it
    failed.
    """
    name = clause["class"]
    count = clause["count"]
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}"

    if clause.get("color"):
        colors = [color_of(thing, name) for thing in found]
        if colors != [clause["color"]] * count:
            return f"expected {clause['color']} {name}>={count}, found {', '.join(colors)}"

    if clause.get("position"):
        relation, target = clause["position"]
        if matched[target] is None:
            return f"no target for {name} to be {relation}"
        for thing, other in itertools.product(found, matched[target]):
            if relation not in relations(thing["box"], other["box"]):
                return f"expected {name} {relation} {clauses[target]['class']}"
    return ""


def geneval_verdict(objects, metadata, color_of):
    """Return (correct, reason) for one image by GenEval's rules (its evaluate_images.py).

    objects: {class: [{"box": [x0, y0, x1, y1], ...}, ...]}, the most confident first.
    metadata: the benchmark's line, of "include" and "exclude" clauses. color_of(object,
    class) -> name of its colour, asked only where a clause names a colour and its count
    is met.
    """
    faults = []
    clauses = metadata.get("include", [])
    # The objects of each clause; None for one that failed.
    matched = []
    for clause in clauses:
        found = objects.get(clause["class"], [])[:clause["count"]]
        fault = clause_fault(clause, found, clauses, matched, color_of)
        matched.append(None if fault else found)
        if fault:
            faults.append(fault)
    for clause in metadata.get("exclude", []):
        found = len(objects.get(clause["class"], []))
        if found >= clause["count"]:
            faults.append(f"expected {clause['class']}<{clause['count']}, found {found}")
    return not faults, "; ".join(faults)
