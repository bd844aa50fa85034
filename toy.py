"""Stage 0, the toy paper: a toy ImageNet that is drawn, and the whole method run on it in minutes.

    python toy.py

The world: 64 x 64 pictures of one centred, frame-filling object. Its class is its shape; colour, size and
background vary and are not in the class name, as with ImageNet's photos. The stages are the real ones, each
command is printed before it runs. Only three things stand in for what a laptop cannot run: a captioner that
knows what was drawn (for LLaVA), a small autoencoder (for Stable Diffusion's) and a tiny random T5. Ends with
a miniature GenEval and OUT/report.html. Killed, it goes on with the same command.
"""

import argparse
import base64
import html
import json
import math
import mimetypes
import random
import shlex
import time
from functools import lru_cache
from itertools import combinations, product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from scipy import ndimage
from tqdm import tqdm

import caption
import cutmix
import encode
import sample
import train
from cutmix import UserError, command_line, complete, read_jsonl, write_jsonl
from evaluate import geneval_verdict

SIZE = 64
SHAPES = ["circle", "cross", "ring", "square", "star", "triangle"]              # the classes
COLORS = {"red": (222, 40, 40), "yellow": (240, 205, 30), "green": (30, 165, 60), "cyan": (30, 190, 205),
          "blue": (45, 75, 225), "purple": (160, 50, 185)}
GREYS = {"dark": 60, "grey": 128, "light": 205}
BACKGROUNDS = ["plain", "striped", "checkered"]
SCALE = 0.5     # standard deviation of the scaled latents: below 1, more of training is about whole shapes
TAU = 0.14      # with it the signal-to-noise ratio, SCALE^2 (1 - t) / t, is that of the paper's 0.4
VAE = Path(__file__).resolve().parent / "assets" / "toy-vae"


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
# The autoencoder (python toy.py --train-vae makes assets/toy-vae again)

def train_vae(folder, minutes, seed=0):
    """Trains the toy's AutoencoderKL, on from what is in `folder` already, and saves it there in float16.

    Its pictures are littered with shrunken ones, as cutmix.py pastes them, so that small objects survive. In
    the last third the encoder rests and the decoder learns to draw clean shapes from latents that are a bit
    off, as those of a small diffusion model are."""
    rng = random.Random(seed)
    images = [draw(random_scene(rng)) for _ in range(9000)]
    pool = {side: [np.asarray(image.resize((side, side), Image.Resampling.LANCZOS)) for image in images]
            for side in (SIZE, 32, 21, 16)}

    def picture():
        image, kind = rng.choice(pool[SIZE]).copy(), rng.random()
        for _ in range(8 if kind < 0.4 else 1 if kind < 0.7 else 0):
            side = rng.choice([32, 21, 21, 16, 16])
            x, y = rng.randint(0, SIZE - side), rng.randint(0, SIZE - side)
            image[y:y + side, x:x + side] = rng.choice(pool[side])
        if 0.7 < kind < 0.85:
            half = rng.choice([np.s_[:, 32:], np.s_[32:]])
            image[half] = rng.choice(pool[SIZE])[half]
        return image

    def to_tensor(images):
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, 64, 64)

    torch.manual_seed(seed)
    vae = encode.AutoencoderKL(latent_channels=8, block_out_channels=(32, 32, 64), layers_per_block=1,
                               norm_num_groups=8, patch_size=2)
    if (folder / "config.json").exists():
        vae.load_state_dict(encode.load_vae(folder).state_dict())
    average = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99))
    bar, start = tqdm(desc="autoencoder", unit="step"), time.time()
    while (done := (time.time() - start) / 60 / minutes) < 1:
        whole = done < 2 / 3
        part = done * 1.5 if whole else done * 3 - 2                # of this phase: warm-up, a half cosine
        optimizer.param_groups[0]["lr"] = train.lr_at(part, 2e-3 if whole else 1e-3, 0.02, 1, 1)
        vae.encoder.requires_grad_(whole)
        vae.quant_conv.requires_grad_(whole)
        x = to_tensor([picture() for _ in range(64)])
        with torch.autocast("cpu", torch.bfloat16):
            mean, std = (z.float() for z in vae.encode(x))
            off = 0 if whole else 0.4 * torch.rand(64, 1, 1, 1)
            error = vae.decode(mean + (std ** 2 + off ** 2) ** 0.5 * torch.randn_like(mean)).float() - x
        edges = (x - F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, 1)).abs().mean(1, keepdim=True)
        weight = 1 + 2 * edges / edges.mean()               # what tells shapes apart is at their edges
        loss = (weight * (error.abs() + error ** 2 * whole)).mean() / weight.mean()
        loss = loss + 2e-3 * 0.5 * (mean ** 2 + std ** 2 - 1 - 2 * std.log()).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        for name, tensor in vae.state_dict().items():
            average[name].lerp_(tensor, max(0.002, 20 / (bar.n + 21)))
        bar.set_postfix(L1=f"{error.abs().mean().item():.4f}", refresh=False)
        bar.update()
    bar.close()
    vae.load_state_dict(average)
    with torch.no_grad():
        mean, std = vae.encode(to_tensor(pool[SIZE][:1000]))
    vae.config["scaling_factor"] = round(SCALE * (mean.var() + (std ** 2).mean()).item() ** -0.5, 4)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(vae.half().state_dict(), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"_class_name": "AutoencoderKL", **vae.config}, indent=1) + "\n")


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


# ------------------------------------------------------------------------------------------------------------
# The detector, without a network: patches of colour against all shapes in all sizes, also half hidden ones

CHROMA = np.array(list(COLORS.values()), float) @ (np.eye(3) - 1 / 3)             # colours without their grey
RADII = np.linspace(2.1, 5.3, 40) ** 2
THRESHOLD = 0.7
BOX3 = np.ones((3, 3))
U = np.uint64             # a mask's row is one 64-bit word, bit i is column i: 64 pixels are compared at once


def pack(mask):
    return np.packbits(mask, -1, bitorder="little").view(U)[..., 0]               # (..., 64, 64) -> (..., 64)


def count(words):
    return np.bitwise_count(words).sum(-1, dtype=int)


def bounds(mask):
    return Image.fromarray(mask).getbbox()                                        # x0, y0, x1, y1


def grow(words):
    """Masks, a pixel wider in all eight directions."""
    w = np.pad(words | words << U(1) | words >> U(1), [(0, 0), (1, 1)])
    return w[:, :-2] | w[:, 1:-1] | w[:, 2:]


def unmix(image):
    """Each pixel's nearest palette colour and its share of the pixel (linear: greys have no chroma)."""
    x = np.asarray(image.convert("RGB"), float) @ (np.eye(3) - 1 / 3)
    color = (x @ (CHROMA / np.linalg.norm(CHROMA, axis=1, keepdims=True)).T).argmax(2)
    return color, (x * CHROMA[color]).sum(2) / (CHROMA ** 2).sum(1)[color]


@lru_cache
def templates():
    """All shapes and sizes at the upper left, 4 half-pixel shifts of each -> masks, eroded masks, shapes,
    widths, heights, areas."""
    scenes = [dict(shape=shape, radius=radius, y=y, x=x, color="red", grey="dark", background="plain")
              for shape, radius, y, x in product(SHAPES, RADII, (32, 32.5), (32, 32.5))]
    masks = [unmix(draw(scene))[1] > 0.5 for scene in scenes]
    x0, y0, x1, y1 = np.array([bounds(mask) for mask in masks]).T
    masks = np.array([np.roll(mask, (-y, -x), (0, 1)) for mask, x, y in zip(masks, x0, y0)])
    eroded = ndimage.binary_erosion(masks, BOX3[None])
    shapes = np.array([SHAPES.index(scene["shape"]) for scene in scenes])
    return pack(masks), pack(eroded), shapes, x1 - x0, y1 - y0, masks.sum((1, 2))


def compare(mask, t, x, y):
    """Scores of the templates number t (n,) with corners at x, y (n,) for a mask: their IoU outside of a
    rectangle that may hide a part of the object, less for hiding much and for wrong edges."""
    words, eroded, _, width, height, _ = templates()
    x, y = x.clip(0, SIZE - width[t])[:, None].astype(U), y.clip(0, SIZE - height[t])
    at, t = np.arange(SIZE) - y[:, None], t[:, None]            # above the object: a row from the empty end
    whole, core = words[t, at] << x, eroded[t, at] << x                 # (n, 64)
    missing = core & ~grow(mask[None])      # what the mask lacks, as one rectangle: from its first row ...
    rows = np.logical_or.accumulate(missing, 1) & np.logical_or.accumulate(missing[:, ::-1], 1)[:, ::-1]
    columns = np.maximum(np.bitwise_or.reduce(missing, 1), U(1))[:, None]
    columns = (U(2) << np.log2(columns).astype(U)) - (columns & -columns)         # ... and column to its last
    longest = np.maximum(rows.sum(1, keepdims=True), np.bitwise_count(columns))
    hidden = np.where(rows & (longest > np.where(width[t] < 32, 10, 3)), columns, U(0))
    around = grow(hidden)
    right = count(whole & mask & ~hidden)
    wrong = count(mask & (~whole | hidden)) + count(whole & ~mask & ~around)
    share, edge = count(whole & around & ~mask) / count(whole), count(whole & ~core & ~around) + 1
    return right / (right + wrong) - 0.1 * share - 0.25 * wrong / edge - (share > 0.78)


def fit(mask):
    """A patch of colour -> (score, shape): templates at its corners, then near the best ones."""
    _, _, shapes, width, height, area = templates()
    (x0, y0, x1, y1), words = bounds(mask), pack(mask)
    part, shift = mask.sum() / area, np.arange(len(area)) % 4
    t = (width > x1 - x0 - 3) & (height > y1 - y0 - 3) & (part > 0.2) & (part < 1.3)
    t = np.nonzero(t & (shift % np.where(area < 300, 3, 4) == 0))[0]
    if not len(t):
        return 0.0, ""
    t, i = np.repeat(t, 6), np.tile(np.arange(6), len(t))
    x = np.choose(i % 3, (x0, x1 - width[t], (x0 + x1 - width[t]) // 2))
    y = np.where(i < 3, y0, y1 - height[t])
    scores = compare(words, t, x, y).reshape(-1, 6)
    best = (6 * np.arange(len(scores)) + scores.argmax(1))[np.argsort(-scores.max(1))]
    best = np.concatenate([best[shapes[t[best]] == shape][:3] for shape in range(len(SHAPES))])
    (t, x, y), i = (np.repeat(v[best], 36) for v in (t // 4 * 4, x, y)), np.tile(np.arange(36), len(best))
    scores = compare(words, t + i // 9, x + i % 3 - 1, y + i // 3 % 3 - 1)
    return float(scores.max()), SHAPES[shapes[t[scores.argmax()]]]


def detect(image):
    """RGB image, 64 x 64 -> {shape: [{"box": [x0, y0, x1, y1] of what is visible, "score", "color"}, ...]},
    most confident first, as GenEval's. Two patches of a colour may be one object with something across it."""
    (color, share), found, objects, used = unmix(image), [], {}, np.zeros((SIZE, SIZE), bool)
    for number, name in enumerate(COLORS):
        labels = ndimage.label((color == number) & (share > 0.5), BOX3)[0]
        area = np.bincount(labels.ravel())
        patches = [i for i in np.argsort(-area) if i and area[i] >= 12][:3]
        masks = [np.isin(labels, some) for n in (1, 2, 3) for some in combinations(patches, n)]
        found += [(*fit(mask), name, mask) for mask in masks]
    pale = ndimage.binary_erosion((share > 0.2) & (share < 0.65), BOX3)    # a clean object has no faint areas
    for score, shape, name, mask in sorted(found, key=lambda one: -one[0]):
        x0, y0, x1, y1 = bounds(mask)
        if score > THRESHOLD and not (mask & used).any() and pale[y0:y1, x0:x1].sum() < 0.1 * mask.sum():
            used |= mask
            objects.setdefault(shape, []).append({"box": [x0, y0, x1, y1], "score": score, "color": name})
    return objects


# ------------------------------------------------------------------------------------------------------------
# Scores, and the report: one page, nothing outside of it

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
<p>One DiT-I with long captions (TA) and CutMix composites (IA), trained by <code>python toy.py</code>.</p>
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


# ------------------------------------------------------------------------------------------------------------
# The line

def run(stage, command):
    """Prints a stage's command as a user would type it, and runs it."""
    words = shlex.split(command)
    print(f"\n$ python {stage.__name__}.py {shlex.join(words)}", flush=True)
    stage.main(words)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cutmix.Help)
    add = parser.add_argument
    add("--out", default="out/toy", metavar="FOLDER", help="where everything goes")
    add("--images", type=int, default=6000, help="pictures to draw; as many composites are made")
    add("--steps", type=int, default=4500, help="training steps")
    add("--prompts", type=int, default=32, help="prompts for each of the six tasks")
    add("--seed", type=int, default=0, help="of the world, the training and the samples")
    add("--train-vae", type=float, metavar="MINUTES", help="only train the autoencoder in assets/ again")
    args = parser.parse_args(argv)
    if args.train_vae:
        return train_vae(VAE, args.train_vae)
    if args.images < 2 * len(SHAPES) or args.steps < 1 or args.prompts < 1:
        raise UserError(f"--images must be at least {2 * len(SHAPES)}, --steps and --prompts at least 1")
    out, seed = Path(args.out), args.seed
    settings = {"images": args.images, "prompts": args.prompts, "seed": seed}
    if (out / "toy.json").exists() and json.loads((out / "toy.json").read_text()) != settings:
        raise UserError(f"{out} has other settings (in toy.json); use them or choose another --out")
    with complete(out / "toy.json") as path:
        path.write_text(json.dumps(settings))
    vae = VAE.relative_to(Path.cwd()) if VAE.is_relative_to(Path.cwd()) else VAE
    o, vae = shlex.quote(str(out)), shlex.quote(str(vae))               # as a shell wants them

    print(f"A toy ImageNet of {args.images} pictures in {out}, drawn", flush=True)
    make_world(out, args.images, seed)
    mixed = f"--images {o}/images --size {SIZE} --seed {seed} --out {o}/cutmix"
    run(cutmix, f"{mixed} --workers 0")
    run(cutmix, f"{mixed}-look --noise")
    run(caption, f"aio --images {o}/images --out {o}/captions-aio.jsonl")
    print("\nLong captions from the scenes (in LLaVA's stead), short and long prompts, a tiny T5", flush=True)
    make_captions(out, seed)
    make_prompts(out, args.prompts, seed)
    if not (out / "t5").exists():
        names = ["captions", "captions-cutmix", "captions-aio", "prompts-short", "prompts-long"]
        rows = [row for name in names for row in read_jsonl(out / f"{name}.jsonl")]
        with complete(out / "t5") as folder:
            make_text_encoder(folder, [row.get("caption") or row["prompt"] for row in rows], seed)
    for images, more in (("images", ""), ("cutmix", "-cutmix")):
        run(encode, f"--images {o}/{images} --captions {o}/captions{more}.jsonl --out {o}/encoded{more} "
                    f"--vae {vae} --text-encoder {o}/t5 --size {SIZE} --workers 0")
    run(train, f"""--model dit --preset toy --data {o}/encoded --augmented {o}/encoded-cutmix --p 0.5
        --tau {TAU} --out {o}/dit --steps {args.steps} --batch-size 32 --optimizer adamw --lr 0.004
        --betas 0.9 0.98 --warmup 50 --schedule-steps {args.steps} --rate 1 --clip 1 --ema 0.99 --seed {seed}
        --log-every 20 --save-every 100 --sample-every 1000 --guidance 3""")
    table = [["", *TASKS, "overall"]]
    for kind in ("short", "long"):
        run(sample, f"""--checkpoint {o}/dit --prompts {o}/prompts-{kind}.jsonl --out {o}/samples-{kind}
            --format geneval --steps 50 --guidance 3 --batch-size 64 --seed {seed}""")
        results = score(out / f"samples-{kind}", read_jsonl(out / f"prompts-{kind}.jsonl"))
        scores = [np.mean([right for _, row, right, _ in results if row["tag"] == task]) for task in TASKS]
        table.append([f"{kind} prompts", *(f"{value:.2f}" for value in [*scores, np.mean(scores)])])
    report(out, table, results)
    print()
    for row in table:
        print("".join(f"{word:>14}" for word in row))
    print(f"\n{out / 'report.html'}")


if __name__ == "__main__":
    command_line(main)
