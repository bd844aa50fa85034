"""Stage 2, text augmentation (paper 3.1, Appendix B): pictures get captions, short prompts become long ones.

    python caption.py llava --images imagenet/train --out captions.jsonl

aio     'An image of a <class-name>', the baseline: says what, but not how many, which colour or where.
llava   a long caption of every photo, or (--cutmix cutmix-all/cutmix.jsonl) of every composite; LLaVA-NeXT is
        shown only the parts of the picture that matter: fewer tokens, 2.7 times as fast in the paper.
extend  short prompts become long ones, so that a model trained on long captions is asked what it understands.

OUT.<rank>of<world> grows line by line and becomes OUT when all is done; killed, it goes on with the same
command. Under torchrun, or with RANK and WORLD_SIZE set, ranks share the work, and the last to end joins it.
Pictures without a caption are in <OUT less .jsonl>.skipped.jsonl. Options: `python caption.py llava --help`.
"""

import argparse
import json
import math
import os
import re
import time
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from common import (HelpFormatter, UserError, at_least, begin_or_resume, class_of, command_line,
                    complete, list_images, open_image, rank_and_world, read_jsonl,
                    resize_and_crop)

# Appendix B, word for word
PROMPT = "Describe this image"
PROMPT_CUTMIX = ("Describe this image. Consider all the objects in the picture. Describe them, describe "
                 "their position and their relation. Do not consider the image as a composite of images. "
                 "The image is a single scene image")


SETTINGS = {"model", "batch_size", "max_new_tokens", "no_prune", "attempts"}    # what captions depend on


def grow(args, items, key, name, produce, unit):
    """Writes one line for each item to args.out, in order, and goes on where an earlier run was killed.

    `produce(batches)` yields, for each batch of items, their rows: {key: name(item), ...}, with a "reason" if
    the row belongs to <out>.skipped.jsonl. Each rank appends to its part; the last to end makes the same
    files as a single one. Returns whether `out` is complete; if not, other ranks still work on it."""
    rank, world = rank_and_world()
    out, skipped, began = args.out, args.out.with_suffix(".skipped.jsonl"), Path(f"{args.out}.settings")
    parts = [out.with_name(f"{out.name}.{r}of{world}") for r in range(world)]
    batches = [items[i:i + args.batch_size] for i in range(0, len(items), args.batch_size)]
    settings = {name: value for name, value in vars(args).items() if name in SETTINGS}
    other_list = UserError(f"{out}: begun with another list: use another --out, or delete it and its parts")
    if out.exists():
        lines = (line for path in (out, skipped) for line in open(path, "rb"))
        if {json.loads(line).get(key) for line in lines} != set(map(name, items)):
            raise other_list
        for path in (began, *parts):
            path.unlink(missing_ok=True)                # a kill may have left them
        return True
    out.parent.mkdir(parents=True, exist_ok=True)
    for part in out.parent.glob(f"{out.name}.*of*"):
        if not part.name.endswith(f"of{world}"):
            raise UserError(f"{part}: begun with another number of ranks: go on with as many, or delete it")
    begin_or_resume(began, out, settings)

    mine, whole, size = batches[rank::world], 0, 0
    with open(parts[rank], "ab+") as part:
        part.seek(0)
        for batch in mine:                              # done as a whole or again: a caption may depend, in
            lines = list(islice(part, len(batch)))      # the last bits, on what it is batched with
            if len(lines) < len(batch) or not lines[-1].endswith(b"\n"):
                break
            if [json.loads(line)[key] for line in lines] != [name(item) for item in batch]:
                raise other_list
            whole, size = whole + 1, size + sum(map(len, lines))
        part.truncate(size)                             # cuts off a torn line, or half a batch
        initial, total = sum(map(len, mine[:whole])), sum(map(len, mine))
        with tqdm(total=total, initial=initial, desc=out.stem, unit=unit, disable=rank > 0) as bar:
            for rows in produce(mine[whole:]) if whole < len(mine) else ():
                part.write("".join(json.dumps(row) + "\n" for row in rows).encode())
                part.flush()
                bar.update(len(rows))

    with ExitStack() as stack:
        try:
            streams = [stack.enter_context(open(part, "rb")) for part in parts]
        except FileNotFoundError:                       # one has not begun, or another has joined them all
            return out.exists()
        if sum(line.endswith(b"\n") for stream in streams for line in stream) < len(items):
            print(f"rank {rank}: its share is done; the last rank to end writes {out}")
            return False
        for stream in streams:
            stream.seek(0)
        with complete(out) as a, complete(skipped) as b, open(a, "wb") as captions, open(b, "wb") as others:
            for k, batch in enumerate(batches):
                for line in islice(streams[k % world], len(batch)):
                    (others if "reason" in json.loads(line) else captions).write(line)
    for path in (*parts, began):
        path.unlink(missing_ok=True)
    return True


# ----------------------------------------------------------------------------------------------------------
# aio: 'An image of a <class-name>' (paper 3.1)

def class_names(folders, table=None):
    """Names of class folders -> {folder: class name in words}.

    `table`: LOC_synset_mapping.txt ('n01440764 tench, Tinca tinca', the first name counts) or
    imagenet_class_index.json ({"0": ["n01440764", "tench"], ...}); without it folders are named after the
    class. Raises UserError for a folder that is not in the table, or is a WordNet id without one."""
    try:
        text = Path(table).read_text(encoding="utf-8") if table else ""
        if text.startswith("{"):
            names = dict(json.loads(text).values())
        else:
            lines = [line.split(None, 1) for line in text.splitlines() if line.strip()]
            names = {synset: words.split(",")[0] for synset, words in lines}
    except (ValueError, TypeError):
        raise UserError(f"{table}: neither lines 'n01440764 tench, Tinca tinca' nor JSON of such pairs")
    for folder in folders:
        if table and folder not in names:
            raise UserError(f"{table}: has no class {folder!r}")
        if not table and re.fullmatch(r"n\d{8}", folder):
            raise UserError(f"class folder {folder} is a WordNet id: say what it means with --class-names "
                            f"LOC_synset_mapping.txt")
    return {folder: names.get(folder, folder).replace("_", " ").strip() for folder in folders}


def aio_caption(class_name):
    """'An image of a tench', 'An image of an umbrella', 'An image of a unicycle': the article as spoken."""
    vowel = re.match(r"[aeiou]|hour|heir|hono|hones|[fhlmnrsx]-", class_name, re.I)
    y_or_w = re.match(r"eu|ew|uni(?![mn])|us[eu]|ut[ei]|ub[io]|uk|ur[aeio]|u-|onc?e\b", class_name, re.I)
    return f"An image of {'an' if vowel and not y_or_w else 'a'} {class_name}"


def aio(args):
    files = list_images(args.images)
    if flat := next((file for file in files if not class_of(file)), None):
        raise UserError(f"{args.images}: {flat} is in no class folder, so its class is unknown")
    names = class_names(sorted(set(map(class_of, files))), args.class_names)
    if rank_and_world()[0] == 0:                 # seconds for a million: nothing to share
        with complete(args.out) as temporary, open(temporary, "w") as lines:
            lines.writelines(json.dumps({"file": file, "caption": aio_caption(names[class_of(file)])}) + "\n"
                             for file in tqdm(files, desc="aio", unit="captions"))
        print(f"{len(files)} captions of {len(names)} classes in {args.out}")


# ----------------------------------------------------------------------------------------------------------
# llava: long captions, with the visual tokens pruned (paper 4.1)

def kept_patches(setting, box, size):
    """The views of a composite that LLaVA is shown: 0 = whole image, 1..4 = quadrants, row by row.

    A photo (setting None) and 1/2 need only the whole: both things are large. Otherwise also the quadrant(s)
    with most of the small one, several at a tie. `box` in pixels of the composite of side `size`."""
    if setting in (None, "1/2"):
        return [0]
    x0, y0, x1, y1 = (2 * v for v in box)               # doubled: the middle of an odd size is half a pixel
    overlap = [max(0, min(x1, x + size) - max(x0, x)) * max(0, min(y1, y + size) - max(y0, y))
               for y in (0, size) for x in (0, size)]
    return [0] + [1 + k for k in range(4) if overlap[k] == max(overlap)]


def image_tokens(features, kept, newline):
    """What stands for a picture in the language model's input: LLaVA-NeXT's packing, of what is kept only.

    features (views, P * P, D), of the kept views in order; newline (D,) ends each row of the 2 x 2 grid. All
    five views give transformers' own sequence, 5 P^2 + 2 P tokens (2,928). The whole alone gives P^2 + 1
    (577), as transformers packs a picture of one view; a quadrant beside it P (P + 1) more (600)."""
    view = dict(zip(kept, features))
    if kept == [0]:
        return torch.cat([view[0], newline[None]])                                          # (P * P + 1, D)
    side, rows = math.isqrt(features.shape[1]), []
    for left, right in ((1, 2), (3, 4)):
        row = [view[q].unflatten(0, (side, side)) for q in (left, right) if q in view]      # (P, P, D) each
        if row:
            rows.append(torch.cat([*row, newline.expand(side, 1, -1)], dim=1).flatten(0, 1))
    return torch.cat([view[0], *rows])


def view_features(model, pixels):
    """Views (V, 3, H, W) -> (V, P * P, D), as LlavaNextModel.get_image_features does."""
    layers, inner = model.config.vision_feature_layer, model.model
    hidden = inner.vision_tower(pixels, output_hidden_states=True).hidden_states
    features = hidden[layers] if isinstance(layers, int) else torch.cat([hidden[k] for k in layers], dim=-1)
    if model.config.vision_feature_select_strategy == "default":
        features = features[:, 1:]                      # without the class token
    return inner.multi_modal_projector(features)


@torch.inference_mode()
def embed(model, pixels, kept, prompt):
    """B pictures -> inputs_embeds (B, L, D) and attention_mask (B, L), padded on the left.

    pixels: list of (views, 3, H, W); kept: list of kept_patches; prompt: token ids, one of them the image."""
    table, device = model.get_input_embeddings(), model.device
    features = view_features(model, torch.cat(pixels).to(device, model.dtype)).split([len(p) for p in pixels])
    text = table(torch.tensor(prompt, device=device))                                       # (T, D)
    k = prompt.index(model.config.image_token_id)
    images = [image_tokens(f, views, model.model.image_newline) for f, views in zip(features, kept)]
    rows = [torch.cat([text[:k], image.to(text.dtype), text[k + 1:]]) for image in images]
    longest = max(map(len, rows))
    embeds = text.new_zeros(len(rows), longest, text.shape[1])                              # (B, L, D)
    mask = torch.zeros(len(rows), longest, dtype=torch.long, device=device)
    for b, row in enumerate(rows):
        embeds[b, longest - len(row):], mask[b, longest - len(row):] = row, 1
    return embeds, mask


def whole_sentences(text):
    """One line, cut back to its last complete sentence (all of it, if there is none)."""
    text = " ".join(text.split())
    ends = [match.end() for match in re.finditer(r"[.!?][\"'”’)\]]*(?=\s|$)", text)]
    return text[:ends[-1]] if ends else text


def look(batch, folder, processor, side, prune):
    """A batch of (file, setting, box) -> pixels and kept of what can be read; and of each its error, or None.

    Shown smaller, a picture would get a grid of two tiles, one of them padding: the five views that the paper
    counts exist only on the 2 x 2 grid, of `side` pixels."""
    pixels, kept, errors = [], [], []
    for file, setting, box in batch:
        try:
            image = open_image(f"{folder}/{file}", 2 * side)
        except OSError as error:
            errors.append(str(error).removeprefix(f"{folder}/{file}: "))
            continue
        views = processor(images=resize_and_crop(image, side), return_tensors="pt")["pixel_values"][0]
        kept.append(kept_patches(setting, box, min(image.size)) if prune else [0, 1, 2, 3, 4])
        pixels.append(views[kept[-1]])                  # (views, 3, H, W); the others never reach the model
        errors.append(None)
    return pixels, kept, errors


def load(model_class, name):
    """A model, on this rank's device, and its processor or tokenizer; hub id or folder. Raises UserError."""
    import transformers
    device, dtype = "cpu", torch.float32
    if torch.cuda.is_available():
        device, dtype = f"cuda:{os.environ.get('LOCAL_RANK', '0')}", torch.bfloat16
    sees = model_class.startswith("Llava")
    auto = transformers.AutoProcessor if sees else transformers.AutoTokenizer
    try:
        if sees and transformers.AutoConfig.from_pretrained(name).model_type != "llava_next":
            raise UserError(f"--model {name}: not LLaVA-NeXT")
        processor = auto.from_pretrained(name)
        model = getattr(transformers, model_class).from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name}: cannot be loaded ({str(error).splitlines()[0]})")
    if not processor.chat_template:
        raise UserError(f"--model {name}: has no chat template, so it cannot be asked")
    tokenizer = processor.tokenizer if sees else processor
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.pad_token or tokenizer.eos_token, "left"
    return model.to(device).eval(), processor


@torch.inference_mode()
def answer(model, tokenizer, embeds_or_ids, mask, max_new_tokens):
    """Greedy answers, as text. embeds (B, L, D) or ids (B, L); mask (B, L); padded on the left."""
    ids = embeds_or_ids.dim() == 2
    out = model.generate(**{"input_ids" if ids else "inputs_embeds": embeds_or_ids}, attention_mask=mask,
                         do_sample=False, temperature=None, top_p=None, top_k=None,     # not the models' own
                         max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(out[:, embeds_or_ids.shape[1] if ids else 0:], skip_special_tokens=True)


def llava(args):
    if not (args.images or args.cutmix):
        raise UserError("needs --images, or --cutmix")
    folder = args.images or str(Path(args.cutmix).parent)
    if args.cutmix:
        try:
            items = [(row["file"], row["setting"], row["box"]) for row in read_jsonl(args.cutmix)]
        except KeyError as error:
            raise UserError(f"{args.cutmix}: a line without {error}, so not made by cutmix.py")
    else:
        items = [(file, None, None) for file in list_images(folder)]

    model, processor = load("LlavaNextForConditionalGeneration", args.model)
    side, tokenizer = 2 * model.config.vision_config.image_size, processor.tokenizer
    if [side, side] not in [list(point) for point in model.config.image_grid_pinpoints]:
        raise UserError(f"--model {args.model}: no 2 x 2 grid, {side} x {side}, in its image_grid_pinpoints")
    content = [{"type": "image"}, {"type": "text", "text": PROMPT_CUTMIX if args.cutmix else PROMPT}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=not text.startswith(tokenizer.bos_token or "\0"))["input_ids"]

    def produce(batches, prune=not args.no_prune):
        decode = partial(look, folder=folder, processor=processor.image_processor, side=side, prune=prune)
        workers = min(args.workers, len(batches))
        loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=workers, collate_fn=decode)
        for batch, (pixels, kept, errors) in zip(batches, loader):
            said = answer(model, tokenizer, *embed(model, pixels, kept, prompt),
                          args.max_new_tokens) if pixels else []
            captions, rows = map(whole_sentences, said), []
            for (file, _, _), error in zip(batch, errors):
                caption = "" if error else next(captions)
                rows.append({"file": file, "caption": caption} if caption else
                            {"file": file, "reason": error or "the model said nothing"})
            yield rows

    if args.benchmark:
        batches = [items[k * args.batch_size:(k + 1) * args.batch_size] for k in range(args.benchmark + 1)]
        if not batches[-1]:
            raise UserError(f"--benchmark {args.benchmark}: there are only {len(items)} pictures")
        for prune in (True, False):
            work = produce(batches, prune)
            next(work)                                  # warms up
            start = time.perf_counter()
            speed = sum(len(rows) for rows in work) / (time.perf_counter() - start)
            print(f"{'with' if prune else 'without'} pruning {speed:8.2f} captions/s")
    elif grow(args, items, "file", lambda item: item[0], produce, "captions"):
        skipped = len(read_jsonl(beside := args.out.with_suffix(".skipped.jsonl")))
        print(f"{len(items) - skipped} captions in {args.out}, {skipped} skipped (named in {beside})")


# ----------------------------------------------------------------------------------------------------------
# extend: short prompts in the style of the training captions (Appendix B)

INSTRUCTION = """\
You turn a short prompt into one detailed caption of an image, of three to five plain sentences, such as \
'The image features a red apple on a wooden table. The apple is in the centre of the image, and its skin \
is smooth and shiny. The background is a blurred kitchen with soft light.' Keep every object, number, colour \
and position of the prompt, in the same words, and add no other objects of these kinds. Answer with the \
caption only."""
IDLE = {"a", "an", "the", "of", "and", "or", "with", "in", "on", "at", "to", "is", "are", "photo", "image"}
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def forms(word):
    """A word, with numbers as digits, and what it may be the plural of: knives -> knives, knive, knife ..."""
    word = str(NUMBERS.index(word)) if word in NUMBERS else word
    plurals = ("s", ""), ("es", ""), ("ies", "y"), ("ves", "f"), ("ves", "fe")
    return {word} | {word.removesuffix(end) + singular for end, singular in plurals if word.endswith(end)}


def missing_words(prompt, caption):
    """The words of a short prompt (objects, counts, colours, positions) that a long one has lost."""
    there = {form for word in re.findall(r"[^\W_]+", caption.lower()) for form in forms(word)}
    asked = [word for word in re.findall(r"[^\W_]+", prompt.lower()) if word not in IDLE]
    return [word for word in asked if not forms(word) & there]


def extend(args):
    if Path(args.prompts).suffix == ".jsonl":
        rows = read_jsonl(args.prompts)
    else:
        with open(args.prompts, encoding="utf-8") as lines:
            rows = [{"prompt": line.strip()} for line in lines if line.strip()]
    if not rows or not all(isinstance(row.get("prompt"), str) and row["prompt"] for row in rows):
        raise UserError(f"{args.prompts}: empty, or a line without a prompt")
    model, tokenizer = load("AutoModelForCausalLM", args.model)

    def produce(batches):
        for batch in batches:
            long, notes = {}, {row["prompt"]: "" for row in batch}
            for _ in range(args.attempts):
                asked = [prompt for prompt in notes if prompt not in long]
                if not asked:
                    break
                chats = [[{"role": "user", "content": f"{INSTRUCTION}\n\n{prompt}{notes[prompt]}"}]
                         for prompt in asked]
                inputs = tokenizer.apply_chat_template(chats, add_generation_prompt=True, padding=True,
                                                       return_tensors="pt", return_dict=True).to(model.device)
                for prompt, said in zip(asked, answer(model, tokenizer, inputs["input_ids"],
                                                      inputs["attention_mask"], args.max_new_tokens)):
                    caption = whole_sentences(said).strip("\"'“”")
                    lost = missing_words(prompt, caption)
                    if caption and not lost:
                        long[prompt] = caption
                    else:                               # greedy: without a note it would repeat itself
                        notes[prompt] = f"\n\nThe caption must say: {', '.join(lost)}"
            yield [{**row, "prompt": long.get(row["prompt"], row["prompt"]), "short_prompt": row["prompt"]}
                   for row in batch]

    if grow(args, rows, "short_prompt", lambda row: row["prompt"], produce, "prompts"):
        short = [row["prompt"] for row in read_jsonl(args.out) if row["prompt"] == row["short_prompt"]]
        print(f"{len(rows)} prompts in {args.out}, {len(short)} of them kept short", *short[:10], sep="\n  ")


# ----------------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True, metavar="{aio,llava,extend}")

    def stage(name, function):
        sub = stages.add_parser(name, description=__doc__, formatter_class=HelpFormatter)
        sub.set_defaults(function=function)
        return sub.add_argument

    add = stage("aio", aio)
    add("--images", required=True, metavar="FOLDER", help="<class>/<file>")
    add("--class-names", metavar="FILE",
        help="LOC_synset_mapping.txt or imagenet_class_index.json, if the folders are WordNet ids")
    add("--out", type=Path, required=True, metavar="FILE", help="captions.jsonl")

    add = stage("llava", llava)
    add("--images", metavar="FOLDER", help="photos (or composites: the folder of --cutmix)")
    add("--cutmix", metavar="FILE", help="cutmix.jsonl: caption composites, look where the second photo is")
    add("--out", type=Path, required=True, metavar="FILE", help="captions.jsonl")
    add("--model", default="llava-hf/llama3-llava-next-8b-hf", help="hub id or folder of a LLaVA-NeXT")
    add("--batch-size", type=int, default=32, help="pictures at once")
    add("--max-new-tokens", type=int, default=200, help="longest answer")
    add("--workers", type=int, default=8, help="processes that decode pictures; 0: none")
    add("--no-prune", action="store_true", help="show all five views: transformers' own path")
    add("--benchmark", type=int, default=0, metavar="BATCHES",
        help="write nothing, time so many batches with and without pruning")

    add = stage("extend", extend)
    add("--prompts", required=True, metavar="FILE",
        help="text, a prompt a line, or JSONL with a 'prompt' a row, as GenEval's evaluation_metadata.jsonl")
    add("--out", type=Path, required=True, metavar="FILE", help="JSONL: the rows with long prompts")
    add("--model", default="meta-llama/Llama-3.1-8B-Instruct", help="hub id or folder of a chat model")
    add("--batch-size", type=int, default=32, help="prompts at once")
    add("--max-new-tokens", type=int, default=200, help="longest answer")
    add("--attempts", type=int, default=3, help="how often it is asked before the prompt stays short")

    args = parser.parse_args(argv)
    at_least(args, batch_size=1, max_new_tokens=1, attempts=1)
    args.function(args)


if __name__ == "__main__":
    command_line(main)
