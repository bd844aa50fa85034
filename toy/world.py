"""The toy world: what is drawn, the captioner that knows it, the prompts, and the tiny T5 that reads them."""

import math
import random
from itertools import product

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import cutmix
from common import complete, read_jsonl, write_jsonl

SIZE = 64
SHAPES = ["circle", "cross", "ring", "square", "star", "triangle"]              # the classes
COLORS = {"red": (222, 40, 40), "yellow": (240, 205, 30), "green": (30, 165, 60), "cyan": (30, 190, 205),
          "blue": (45, 75, 225), "purple": (160, 50, 185)}
GREYS = {"dark": 60, "grey": 128, "light": 205}
BACKGROUNDS = ["plain", "striped", "checkered"]


# ------------------------------------------------------------------------------------------------------------
# The world

POLYGONS = {    # their corners in a disc of radius 1, y downwards
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "triangle": [(1.08 * math.sin(a), 0.2 - 1.08 * math.cos(a))
                 for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)],
    "star": [(r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5))
             for i, r in enumerate([1.0, 0.5] * 5)],
    "cross": [(-0.3, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3), (0.3, 0.3), (0.3, 0.95),
              (-0.3, 0.95), (-0.3, 0.3), (-0.95, 0.3), (-0.95, -0.3), (-0.3, -0.3)]}


def draw(scene, scale=4):
    """A scene (shape, color, radius, x, y in pixels, grey, background) -> 64 x 64 RGB image, antialiased."""
    grey, (row, column) = GREYS[scene["grey"]], np.indices((8, 8))
    odd = {"plain": 0 * row, "striped": row % 2, "checkered": (row + column) % 2}[scene["background"]]
    image = Image.fromarray(np.uint8(grey + (14 if grey < 128 else -14) * odd)).convert("RGB")      # 8 x 8
    image = image.resize((SIZE * scale, SIZE * scale), Image.Resampling.NEAREST)
    mask, (x, y, r) = Image.new("L", image.size), (scene[key] * scale for key in ("x", "y", "radius"))
    pen = ImageDraw.Draw(mask)
    if scene["shape"] in POLYGONS:
        pen.polygon([(x + r * a, y + r * b) for a, b in POLYGONS[scene["shape"]]], fill=255)
    else:
        for part, fill in (0.92 * r, 255), (0.42 * r, 0 if scene["shape"] == "ring" else 255):
            pen.ellipse([x - part, y - part, x + part, y + part], fill=fill)
    image.paste(COLORS[scene["color"]], (0, 0), mask)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def random_scene(rng, shape=None):
    radius, x, y = rng.uniform(22, 28), 32 + rng.uniform(-2, 2), 32 + rng.uniform(-2, 2)
    return {"shape": shape or rng.choice(SHAPES), "color": rng.choice(list(COLORS)),
            "radius": round(radius, 1), "x": round(x, 1), "y": round(y, 1),
            "grey": rng.choice(list(GREYS)), "background": rng.choice(BACKGROUNDS)}


def make_world(out, count, seed):
    """OUT/images in ImageNet's layout and OUT/scenes.jsonl, what is in each picture."""
    scenes = []
    for i in tqdm(range(count), desc="drawing", unit="img"):
        shape = SHAPES[i % len(SHAPES)]
        file, scene = f"{shape}/{shape}_{i:05d}.png", random_scene(random.Random(f"{seed} {i}"), shape)
        if not (out / "images" / file).exists():
            with complete(out / "images" / file) as path:
                draw(scene).save(path, "PNG")
        scenes.append({"file": file, **scene})
    write_jsonl(out / "scenes.jsonl", scenes)


# ------------------------------------------------------------------------------------------------------------
# The captioner: knows the scene, writes it down in ever other words

def background(rng, scene):
    kind = f"{scene['background']} {scene['grey']} grey".replace("grey grey", "grey")
    return rng.choice([f"before a {kind} wall .", f"on {kind} ground ."])


def caption_of(scene, rng):
    """A long caption of a picture with one object, as the captioner would write it for an original."""
    size = "huge" if scene["radius"] > 26 else "large" if scene["radius"] > 24 else "big"
    thing = f"a {size} {scene['color']} {scene['shape']}"
    first = rng.choice([f"the image shows {thing}", f"{thing} fills the picture",
                        f"in the center there is {thing}", f"a single object , {thing}"])
    return f"{first} {background(rng, scene)}"


PLACES = {(0, 0): "in the top left corner", (1, 0): "at the top edge", (2, 0): "in the top right corner",
          (0, 1): "at the left edge", (2, 1): "at the right edge",
          (0, 2): "in the bottom left corner", (1, 2): "at the bottom edge",
          (2, 2): "in the bottom right corner"}
RELATIONS = {(0, 1): "left of", (2, 1): "right of", (1, 0): "above", (1, 2): "below"}
WHERE = {"1/2": [(2, 1), (1, 2)], "1/4": [(0, 0), (2, 0), (0, 2), (2, 2)],    # CutMix pastes; 1/16: in all
         "1/9": [(1, 0), (0, 1), (2, 1), (1, 2)]}


def composite_caption(base, paste, setting, place, rng):
    """A long caption of a picture with two objects: `paste` stands at `place` (column, row of a 3 x 3 grid).

    It speaks of one scene, as LLaVA is asked to, not of a composite."""
    one, two = f"{base['color']} {base['shape']}", f"{paste['color']} {paste['shape']}"
    if setting == "1/2":
        side, other = ("left", "right") if place == (2, 1) else ("top", "bottom")
        choices = [f"a {one} on the {side} and a {two} on the {other}",
                   f"the image shows a {two} on the {other} , a {one} on the {side}"]
    else:
        one, two = f"large {one}", f"{ {'1/4': 'small', '1/9': 'little', '1/16': 'tiny'}[setting]} {two}"
        choices = [f"a {one} with a {two} {PLACES[place]}",
                   f"{PLACES[place]} there is a {two} , next to a {one}"]
    if place in RELATIONS:
        choices.append(f"a {two} {RELATIONS[place]} a {one}")
    return f"{rng.choice(choices)} {background(rng, base)}"


def make_captions(out, seed):
    """Captions of originals and composites, from the scenes and from where cutmix.py says it pasted what."""
    scenes = {scene["file"]: scene for scene in read_jsonl(out / "scenes.jsonl")}
    write_jsonl(out / "captions.jsonl", [
        {"file": file, "caption": caption_of(scene, random.Random(f"{seed} {file}"))}
        for file, scene in scenes.items()])
    rows = []
    for row in read_jsonl(out / "cutmix/cutmix.jsonl"):
        (x0, y0, x1, y1), rng = row["box"], random.Random(f"{seed} {row['file']}")
        place = 3 * (x0 + x1) // (2 * SIZE), 3 * (y0 + y1) // (2 * SIZE)
        text = composite_caption(scenes[row["base"]], scenes[row["paste"]], row["setting"], place, rng)
        rows.append({"file": row["file"], "caption": text})
    write_jsonl(out / "captions-cutmix.jsonl", rows)


def make_text_encoder(folder, texts, seed, dim=128):
    """A tiny random T5 and a tokenizer of the words in `texts`, saved as any T5 on the hub is."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel
    words = ["<pad>", "</s>", "<unk>", *sorted({word for text in texts for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                            unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(seed)
    t5 = T5EncoderModel(T5Config(vocab_size=len(words), d_model=dim, d_kv=32, d_ff=2 * dim, num_layers=2,
                                 num_heads=4, decoder_start_token_id=0))
    # Trained heads look at neighbours, random ones everywhere: a caption would be a bag of words.
    # T5 has a bias for each distance: 1, 2 are one and two words back, 17, 18 one and two words ahead.
    bias = t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight            # (32, heads)
    bias.data.zero_()[[1, 2, 17, 18], range(4)] = 6.0
    t5.save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------
# A miniature GenEval: the benchmark's six tasks, once as its short prompts and once as long ones

TASKS = ["single_object", "two_object", "counting", "colors", "position", "color_attr"]


def make_prompts(out, count, seed):
    """OUT/prompts-short.jsonl and OUT/prompts-long.jsonl, with GenEval's metadata (`tag`, `include`, ...)."""
    short, long = [], []
    for task, n in product(TASKS, range(count)):
        rng = random.Random(f"{seed} {task} {n}")
        one, two = (random_scene(rng, shape) for shape in rng.sample(SHAPES, 2))
        one["color"], two["color"] = rng.sample(list(COLORS), 2)
        s1, s2, c1, c2 = one["shape"], two["shape"], one["color"], two["color"]
        include = [{"class": s1, "count": 1}, {"class": s2, "count": 1}]
        row = {"tag": task, "include": include}
        setting, place = rng.choice(cutmix.SETTINGS), rng.choice(sorted(PLACES))
        if setting in WHERE:
            place = rng.choice(WHERE[setting])
        if task == "position":
            setting = rng.choice(["1/2", "1/9"])
            place = rng.choice(WHERE["1/2"] if setting == "1/2" else list(RELATIONS))
            include[1]["position"] = [RELATIONS[place], 0]
        if task in ("colors", "color_attr"):
            include[0]["color"], include[1]["color"] = c1, c2
        if task in ("single_object", "colors"):
            del include[1]
            brief, detailed = f"a {c1} {s1}" if task == "colors" else f"a {s1}", caption_of(one, rng)
        elif task == "counting":
            many, word = rng.choice([(2, "two"), (3, "three")])
            plural = s1 + ("es" if s1 == "cross" else "s")
            include[:], row["exclude"] = [{"class": s1, "count": many}], [{"class": s1, "count": many + 1}]
            brief = f"{word} {plural}"
            detailed = f"the image shows {word} {c1} {plural} {background(rng, one)}"
        else:
            brief = {"two_object": f"a {s1} and a {s2}", "color_attr": f"a {c1} {s1} and a {c2} {s2}",
                     "position": f"a {s2} {RELATIONS.get(place)} a {s1}"}[task]
            detailed = composite_caption(one, two, setting, place, rng)
            row["layout"] = {"colors": [c1, c2], "setting": setting, "place": place}
        short.append({**row, "prompt": f"a photo of {brief}"})
        long.append({**row, "prompt": detailed})
    write_jsonl(out / "prompts-short.jsonl", short)
    write_jsonl(out / "prompts-long.jsonl", long)
