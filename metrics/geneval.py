"""GenEval and DPG-Bench (Tables 2 and 3): what networks see -> is it what the prompt asks for?"""

import functools
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

# GenEval's constants, by the names that it gives them.
THRESHOLD = 0.3             # a detection counts if its score is higher
COUNTING_THRESHOLD = 0.9    # the same in the task "counting"
MAX_OBJECTS = 16            # of one class, the most confident ones
POSITION_THRESHOLD = 0.1    # times both boxes' sizes: the offset that still counts as none
DIRECTION = 0.5             # "left of": x is beyond this share of the offset's length

RELATIONS = ("left of", "right of", "above", "below")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")

# COCO's classes in their order. GenEval calls COCO's mouse, remote and keyboard otherwise.
CLASSES = """\
person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,
stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,
backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,
baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,
fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,
cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,computer mouse,
tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,
clock,vase,scissors,teddy bear,hair drier,toothbrush""".replace("\n", "").split(",")

# Mean and standard deviation of the pixels that networks were trained with.
IMAGENET_PIXELS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))      # DINOv2, Mask2Former
CLIP_PIXELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def pixels_of(image):
    """Return an RGB PIL image as (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalised(pixels, mean, std):
    """Return pixels (..., 3, H, W), 0..255, as float32 less `mean` and divided by `std`.

    Both are those of the network's training data, for pixels of 0..1.
    """
    mean = torch.tensor(mean, device=pixels.device)[:, None, None]
    std = torch.tensor(std, device=pixels.device)[:, None, None]
    return (pixels.float() / 255 - mean) / std


@torch.no_grad()
def detect(model, image):
    """Return what Mask2Former sees: {class: [{"box", "score", "mask" (H, W) bool}, ...]}.

    As in mmdet, with which GenEval was made: the 100 best (query, class) pairs; the score
    is the probability of the class times the mean probability of the mask's pixels; masks
    may overlap; boxes are drawn around them, right and bottom exclusive. Above 800 pixels the
    input differs a little: mmdet's resize does not average where it shrinks.
    """
    scale = min(800 / min(image.size), 1333 / max(image.size))
    w = int(image.width * scale + 0.5)
    h = int(image.height * scale + 0.5)
    resized = pixels_of(image.resize((w, h), Image.Resampling.BILINEAR))
    x = normalised(resized, *IMAGENET_PIXELS)
    x = F.pad(x, (0, -w % 32, 0, -h % 32))[None].to(model.device)      # (1, 3, H', W')
    output = model(pixel_values=x)
    classes = output.class_queries_logits[0].float().softmax(-1)[:, :-1]    # (Q, C)
    best, which = classes.flatten().topk(min(100, classes.numel()))

    # Resize those masks to the image's own size. The mask can only lower a score, so pairs
    # below the threshold are left out beforehand.
    found = {}
    for probability, index in zip(best[best > THRESHOLD].tolist(), which.tolist()):
        query, label = divmod(index, classes.shape[1])
        logits = output.masks_queries_logits[0, query].float()[None, None]
        logits = F.interpolate(logits, x.shape[2:], mode="bilinear")[:, :, :h, :w]
        logits = F.interpolate(logits, (image.height, image.width), mode="bilinear")[0, 0]
        mask = logits > 0                                              # (H, W)
        score = probability * float(logits.sigmoid()[mask].sum() / (mask.sum() + 1e-6))
        if score > THRESHOLD:
            mask = mask.cpu().numpy()
            box = Image.fromarray(mask).getbbox()
            found.setdefault(CLASSES[label], []).append(
                {"box": list(box), "score": score, "mask": mask})
    return found


@torch.no_grad()
def clip_images(clip, images):
    """Return the unit vectors (B, D), on the CPU, that a CLIP gives PIL images.

    clip: the model and its tokenizer.
    """
    model, _ = clip
    size = model.config.vision_config.image_size                       # 224
    prepared = []
    for image in images:
        # Shorter side to 224, then centre crop, rounded as torchvision does for OpenAI's
        # CLIP and GenEval's open_clip; transformers rounds the crop down.
        short = min(image.size)
        sides = [int(size * side / short) for side in image.size]
        image = image.resize(sides, Image.Resampling.BICUBIC)
        left, top = [round((side - size) / 2) for side in sides]
        prepared.append(pixels_of(image.crop((left, top, left + size, top + size))))
    pixels = normalised(torch.stack(prepared).to(model.device), *CLIP_PIXELS)
    pooled = model.vision_model(pixels).pooler_output
    return F.normalize(model.visual_projection(pooled), dim=-1).cpu()


@torch.no_grad()
def clip_texts(clip, texts):
    """Return the unit vectors (B, D), on the CPU, of texts, cut after 77 tokens."""
    model, tokenizer = clip
    length = model.config.text_config.max_position_embeddings          # 77
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt",
                       max_length=length).to(model.device)
    pooled = model.text_model(tokens.input_ids, tokens.attention_mask).pooler_output
    return F.normalize(model.text_projection(pooled), dim=-1).cpu()


@functools.cache
def color_texts(clip, class_name):
    """Return the ten colours of a thing of a class as embeddings (10, D)."""
    means = []
    for color in COLORS:
        texts = [f"a photo of a {color} {class_name}", f"a photo of a {color}-colored {class_name}",
                 f"a photo of a {color} object"]
        means.append(clip_texts(clip, texts).mean(0))
    return F.normalize(torch.stack(means), dim=-1)


def color_of_object(load_clip, image, thing, class_name):
    """Return the colour of an object, kept as thing["color"], that CLIP finds most likely.

    It sees the object's box alone, grey (#999) outside its mask. load_clip() returns `clip`.
    """
    if not thing.get("color"):
        if "mask" in thing:
            grey = Image.new("RGB", image.size, "#999")
            image = Image.composite(image, grey, Image.fromarray(thing["mask"]))
        x0, y0, x1, y1 = map(round, thing["box"][:4])
        piece = image.crop((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)))
        clip = load_clip()
        vector = clip_images(clip, [piece])[0]                         # (D,)
        likeness = color_texts(clip, class_name) @ vector              # (10,)
        thing["color"] = COLORS[int(likeness.argmax())]
    return thing["color"]


def refuse_strange_clauses(metadata):
    """Raise ValueError, KeyError or TypeError for a clause that GenEval's metadata never has."""
    clauses = metadata["include"]
    for clause in [*clauses, *metadata.get("exclude", [])]:
        relation, target = clause.get("position") or ("above", 0)
        usual = (clause["class"] in CLASSES and clause["count"] >= 1
                 and (clause.get("color") or "red") in COLORS
                 and relation in RELATIONS and 0 <= target < len(clauses))
        if not usual:
            raise ValueError(f"no clause of GenEval's: {clause}")


def confident(things, tag):
    """Return those objects of one class that count in the task `tag`, the most confident first.

    Raises ValueError or TypeError for what is no object.
    """
    for thing in things:
        x0, y0, x1, y1 = thing["box"][:4]
        if not (math.isfinite(x0 + y0 + x1 + y1) and 0 <= thing["score"] <= 1):
            raise ValueError(f"box {thing['box']}, score {thing['score']}")
        if thing.get("color") and thing["color"] not in COLORS:
            raise ValueError(f"color {thing['color']!r}, and GenEval has {', '.join(COLORS)}")
    # In float32, and the last of two objects of equal score first, as GenEval sorts them.
    threshold = np.float32(COUNTING_THRESHOLD if tag == "counting" else THRESHOLD)
    scores = np.array([thing["score"] for thing in things], np.float32)
    best_first = np.argsort(scores, kind="stable")[::-1]
    return [things[i] for i in best_first if scores[i] > threshold][:MAX_OBJECTS]


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


def dpg_score(answers, dependency):
    """Return the share of DPG-Bench's questions that are answered yes, and whose parents are too.

    answers: {id: bool}; dependency: {id: [ids of parents]}, 0 for none. Questions are
    taken in ascending order of ids, so that a no reaches grandchildren.
    """
    score = {question: float(answer) for question, answer in answers.items()}
    for question in sorted(score):
        parents = [parent for parent in dependency.get(question, ()) if parent != 0]
        if any(score.get(parent, 1) == 0 for parent in parents):
            score[question] = 0.0
    return sum(score.values()) / len(score)
