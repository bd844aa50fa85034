"""Stage 6, evaluation (paper 4.1): every number of Tables 1, 2 and 3, from any folder of images.

    python evaluate.py geneval --images samples/geneval
"""

import numpy as np

# ---------------------------------------------------------------------------------------------------------------
# GenEval (Table 2): do the detected objects say what the prompt says?

NEAR, TURN = 0.1, 0.5           # GenEval's thresholds: how far apart in sizes, and how much of the offset an axis carries


def relations(a, b):
    """Where box `a` lies relative to box `b` ([x0, y0, x1, y1], y downwards) -> set of relation names."""
    a, b = np.asarray(a[:4], float).reshape(2, 2), np.asarray(b[:4], float).reshape(2, 2)
    offset = a.mean(0) - b.mean(0)                                          # (2,) x, y
    sides = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - NEAR * sides, 0)
    if (np.abs(shrunk) < 1e-3).all():
        return set()
    x, y = shrunk / np.linalg.norm(offset)                                  # the norm is the unshrunk one's
    held = {"left of": x < -TURN, "right of": x > TURN, "above": y < -TURN, "below": y > TURN}
    return {name for name, holds in held.items() if holds}


def geneval_verdict(objects, metadata, color_of):
    """GenEval's rules for one image (as in its evaluate_images.py).

    objects: {class: [{"box": [x0, y0, x1, y1], ...}, ...]}, most confident first; metadata: the benchmark's line
    ("include" and "exclude" clauses); color_of(object, class) -> name of its colour, asked only where a clause
    names a colour and its count is met. Returns (correct, reason), the reason empty when correct."""
    wrong, matched = [], []                        # matched: per include clause its objects, or None if it failed
    for clause in metadata.get("include", []):
        name, count = clause["class"], clause["count"]
        found, faults = objects.get(name, [])[:count], []
        if len(found) < count:
            faults.append(f"expected {name}>={count}, found {len(found)}")
        elif "color" in clause:
            colors = [color_of(thing, name) for thing in found]
            if colors.count(clause["color"]) < count:
                faults.append(f"expected {clause['color']} {name}>={count}, found {', '.join(colors) or 'none'}")
        if "position" in clause and not faults:
            relation, target = clause["position"]
            if matched[target] is None:
                faults.append(f"no target for {name} to be {relation}")
            elif not all(relation in relations(thing["box"], other["box"])
                         for thing in found for other in matched[target]):
                faults.append(f"expected {name} {relation} {metadata['include'][target]['class']}")
        matched.append(None if faults else found)
        wrong += faults
    for clause in metadata.get("exclude", []):
        found = len(objects.get(clause["class"], []))
        if found >= clause["count"]:
            wrong.append(f"expected {clause['class']}<{clause['count']}, found {found}")
    return not wrong, "; ".join(wrong)
