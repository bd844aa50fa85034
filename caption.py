"""Stage 2, text augmentation (paper 3.1, Appendix B): caption pictures, extend prompts.

    python caption.py llava --images imagenet/train --out captions.jsonl

aio     'An image of <class-name>', the paper's baseline: it says what there is, but
        not how many, in which colour or where.
llava   A long caption of every photo, or of every composite (--cutmix
        cutmix-all/cutmix.jsonl). LLaVA-NeXT is shown only those parts of the picture
        that matter: fewer tokens, 2.7 times as fast in the paper.
extend  Short prompts become long ones, so that a model that was trained on long
        captions is asked in a language it understands.

Rows are appended to OUT.<rank>of<world>, which becomes OUT when all are there. If it
was killed, start it again: it goes on where it was. Under torchrun, or with RANK and
WORLD_SIZE set, ranks share the work, and the last one to end joins their parts.
Pictures without a caption are named in <OUT less .jsonl>.skipped.jsonl. Each command
has options of its own: `python caption.py llava --help`.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import time
from collections import Counter
from functools import partial
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from common import (IMAGE_SUFFIXES, LFS_POINTER, HelpFormatter, UserError, at_least,
                    begin_or_resume, class_of, command_line, complete, is_lfs_pointer, list_images,
                    local_device, one_line, only_command, open_image, rank_and_world, read_json,
                    read_jsonl, reading, resize_and_crop, shorten)

# --------------------------------------------------------------------------------------
# aio: 'An image of <class-name>' (paper 3.1)

def aio(args):
    """Write the baseline's caption for every photo in a class folder.

    Raises UserError if a photo is in none, or if it is unknown what a folder means.
    """
    files = list_images(args.images)

    # Without this check, such a photo would be captioned 'An image of ' and no more.
    for file in files:
        if not class_of(file):
            raise UserError(f"{args.images}: {file} is in no class folder, so its class "
                            "is unknown")

    classes = sorted({class_of(file) for file in files})
    names = class_names(classes, args.class_names)

    # It takes seconds for a million photos, so there is nothing to share among ranks.
    rank, _ = rank_and_world()
    if rank > 0:
        return

    # json.dumps writes ASCII, so even a file name that is not UTF-8 survives.
    with complete(args.out) as temporary, open(temporary, "w") as lines:
        for file in tqdm(files, desc="aio", unit="captions"):
            caption = aio_caption(names[class_of(file)])
            lines.write(json.dumps({"file": file, "caption": caption}) + "\n")
    print(f"{len(files)} captions of {len(names)} classes in {args.out}")


def aio_caption(class_name):
    """Return the caption of the baseline: no article, as the paper writes it."""
    return f"An image of {class_name}"


def class_names(folders, table=None):
    """Return the names of class folders as a dict: {folder: class name in words}.

    `table` is a file that says what folders mean, see read_class_table; without it
    folders are named after their classes. Raises UserError for a folder that is not in
    the table, or is a WordNet id without a table.
    """
    meanings = read_class_table(table) if table else {}
    names = {}
    for folder in folders:
        if table and folder not in meanings:
            raise UserError(f"{table}: has no class {folder!r}")
        # A caption 'An image of n01440764' would teach a model nothing.
        if not table and re.fullmatch(r"n\d{8}", folder):
            raise UserError(f"class folder {folder} is a WordNet id: say what it means "
                            "with --class-names LOC_synset_mapping.txt")

        # imagenet_class_index.json writes "great_white_shark", and so do many folders.
        name = meanings.get(folder, folder)
        names[folder] = name.replace("_", " ").strip()
    return names


def read_class_table(path):
    """Return what WordNet ids mean as a dict: {"n01440764": "tench", ...}.

    Reads LOC_synset_mapping.txt ('n01440764 tench, Tinca tinca': the first name counts)
    and imagenet_class_index.json ({"0": ["n01440764", "tench"], ...}). Raises UserError
    if it is neither.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        meanings = {}

        # The first character tells the formats apart: an id begins with n.
        if text.startswith("{"):
            for wordnet_id, name in json.loads(text).values():
                meanings[wordnet_id] = str(name)
            return meanings

        for line in text.splitlines():
            if line.strip():
                wordnet_id, synonyms = line.split(None, 1)
                meanings[wordnet_id] = synonyms.split(",")[0]
        return meanings
    except (ValueError, TypeError):
        raise UserError(f"{path}: neither lines 'n01440764 tench, Tinca tinca' nor JSON "
                        "of such pairs")


# --------------------------------------------------------------------------------------
# llava: long captions, with the visual tokens pruned (paper 3.1, Appendix B)

# Appendix B, word for word.
PROMPT = "Describe this image"
PROMPT_CUTMIX = (
    "Describe this image. Consider all the objects in the picture. Describe them, "
    "describe their position and their relation. Do not consider the image as a "
    "composite of images. The image is a single scene image")

ALL_VIEWS = [0, 1, 2, 3, 4]


def kept_patches(setting, box, size):
    """Return the views of a composite that LLaVA is shown, as a list of numbers.

    The paper calls these views patches; below, a view is cut into P x P smaller patches.
    0 is the whole image, 1 to 4 are its quadrants, row by row. A photo (setting None)
    and 1/2 need only the whole: what they show is large. All others also need the
    quadrant with most of the small photo, or several if they have equal shares. `box`
    is in pixels of the composite, which is `size` x `size`.
    """
    if setting in (None, "1/2"):
        return [0]

    # In half pixels, because that is where the middle of an odd size lies.
    x0, y0, x1, y1 = (2 * v for v in box)

    # A quadrant is then `size` wide. Its share is the area that it has in common with the
    # box; a negative width or height says that they do not meet.
    shares = []
    for top in (0, size):
        for left in (0, size):
            width = min(x1, left + size) - max(x0, left)
            height = min(y1, top + size) - max(y0, top)
            shares.append(max(0, width) * max(0, height))

    # Shares are whole numbers, so those of a photo in the middle compare as equal.
    return [0] + [1 + k for k in range(4) if shares[k] == max(shares)]


def image_tokens(features, kept, newline):
    """Return what stands for a picture in the language model's input, (tokens, D).

    It is LLaVA-NeXT's packing, of the kept views only: the whole, then the rows of the
    2 x 2 grid of quadrants, each with a newline at its end. With P x P patches a view,
    all five give transformers' own sequence, 5 P^2 + 2 P tokens (2,928). The whole alone
    gives P^2 + 1 (577), as transformers packs a picture of one view. Beside quadrants it
    gives P^2 (576), each quadrant as many, and each row of quadrants of which one is kept P
    newlines (24).

    features: (views, P * P, D), the kept views in order; newline: (D,).
    """
    view = dict(zip(kept, features))                                    # each (P * P, D)

    # transformers gives a picture of one view a single newline, not one for each row.
    if kept == [0]:
        return torch.cat([view[0], newline[None]])

    # The quadrants: each row of patches runs through those that stand side by side.
    side = math.isqrt(features.shape[1])                                              # P
    tokens = [view[0]]
    for left, right in ((1, 2), (3, 4)):
        row = []
        for quadrant in (left, right):
            if quadrant in view:
                row.append(view[quadrant].unflatten(0, (side, side)))         # (P, P, D)
        # Where no quadrant of a row is kept, its newlines are left out too.
        if row:
            row.append(newline.expand(side, 1, -1))
            tokens.append(torch.cat(row, dim=1).flatten(0, 1))
    return torch.cat(tokens)


def view_features(model, views):
    """Return the features of views (V, 3, H, W) that the language model sees.

    They are (V, P * P, D), as transformers' LlavaNextModel.get_image_features has them.
    """
    layers = model.config.vision_feature_layer
    hidden = model.model.vision_tower(views, output_hidden_states=True).hidden_states

    # A configuration names one layer of the tower, or several to put side by side.
    if isinstance(layers, int):
        features = hidden[layers]
    else:
        features = torch.cat([hidden[k] for k in layers], dim=-1)

    if model.config.vision_feature_select_strategy == "default":
        # Without the class token.
        features = features[:, 1:]
    return model.model.multi_modal_projector(features)


@torch.inference_mode()
def embed_question(model, pixels, kept, prompt):
    """Return LLaVA's input for B pictures: embeddings (B, L, D) and mask (B, L).

    Shorter ones are padded on the left. pixels: for each picture its views, each
    (V, 3, H, W); kept: for each picture which views these are; prompt: token ids, one
    of them `<image>`, whose place the picture takes.
    """
    # All views of all pictures go through the vision tower at once.
    device = model.device
    views = torch.cat(pixels).to(device, model.dtype)
    features = view_features(model, views).split([len(views) for views in pixels])

    # All pictures are asked the same, so the words are embedded once for the batch.
    text = model.get_input_embeddings()(torch.tensor(prompt, device=device))     # (T, D)
    place = prompt.index(model.config.image_token_id)

    # The words before the picture, the picture, the words after it.
    rows = []
    for picture, numbers in zip(features, kept):
        image = image_tokens(picture, numbers, model.model.image_newline)
        rows.append(torch.cat([text[:place], image.to(text.dtype), text[place + 1:]]))

    # The answer continues a row at its right end, so the padding goes to the left.
    longest = max(len(row) for row in rows)
    embeddings = text.new_zeros(len(rows), longest, text.shape[1])            # (B, L, D)
    mask = torch.zeros(len(rows), longest, dtype=torch.long, device=device)      # (B, L)
    for b, row in enumerate(rows):
        embeddings[b, longest - len(row):] = row
        mask[b, longest - len(row):] = 1
    return embeddings, mask


class Picture(NamedTuple):
    """A picture to caption: a photo, or a composite with its row of cutmix.jsonl."""
    file: str
    setting: str | None = None          # None: a photo
    box: list | None = None


class LoadedPicture(NamedTuple):
    """What LLaVA is shown of a picture, or why it cannot be shown."""
    file: str
    pixels: torch.Tensor | None = None  # (V, 3, H, W), its views
    kept: list | None = None            # which ones these are, see kept_patches
    error: str | None = None


def load_pictures(pictures, folder, processor, side, prune):
    """Return a batch of Pictures as LoadedPictures.

    LLaVA-NeXT cuts a picture into tiles, as many as its size and shape suggest. The
    five views that the paper counts exist for 2 x 2 tiles only, so every picture is
    shown as a square of `side` pixels, which has just these.
    """
    loaded = []
    for file, setting, box in pictures:
        try:
            # Decoding may shrink a large JPEG, but not below twice the size that is needed,
            # so the resampling below still has pixels to average.
            path = f"{folder}/{file}"
            image = open_image(path, 2 * side)
            # The box counts the pixels of the file, not of what was decoded.
            with Image.open(path) as header:
                file_side = min(header.size)
        except OSError as error:
            # One broken file must not end the whole run. Its row names the file, so the
            # reason need not do so again.
            reason = str(error).removeprefix(f"{folder}/{file}: ")
            loaded.append(LoadedPicture(file, error=reason))
            continue

        square = resize_and_crop(image, side)
        views = processor(images=square, return_tensors="pt")["pixel_values"][0]

        # Only a composite has a box, and composites are square.
        kept = kept_patches(setting, box, file_side) if prune else ALL_VIEWS
        # The other views never reach the model.
        loaded.append(LoadedPicture(file, views[kept], kept))
    return loaded


def describe(batches, prune, model, tokenizer, prompt, load, workers, max_new_tokens):
    """Yield the rows of each batch of Pictures: "file" and "caption", or "reason".

    prompt: token ids; load: load_pictures with all arguments but the batch and `prune`.
    Pictures are loaded by `workers` processes, ahead of the model.
    """
    # Each element is a whole batch, so the DataLoader shall not form any (batch_size=None).
    # Its workers call `load` as the collate function, and the order of the batches is kept.
    loader = DataLoader(batches, batch_size=None, collate_fn=partial(load, prune=prune),
                        num_workers=min(workers, len(batches)))

    for loaded in loader:
        # The model gets the pictures that could be read, and that may be none.
        shown = [picture for picture in loaded if picture.error is None]
        captions = {}
        if shown:
            pixels = [picture.pixels for picture in shown]
            kept = [picture.kept for picture in shown]
            embeddings, mask = embed_question(model, pixels, kept, prompt)
            answers = greedy_answers(model, tokenizer, mask, max_new_tokens,
                                     inputs_embeds=embeddings)
            for picture, answer in zip(shown, answers):
                captions[picture.file] = whole_sentences(answer)

        # Every picture gets a row: its caption, or the reason why there is none.
        rows = []
        for picture in loaded:
            caption = captions.get(picture.file)
            if caption:
                rows.append({"file": picture.file, "caption": caption})
            else:
                reason = picture.error or "the model said nothing"
                rows.append({"file": picture.file, "reason": reason})
        yield rows


def llava(args):
    """Caption photos or composites with LLaVA-NeXT. Raises UserError."""
    pictures, folder = pictures_to_caption(args)
    model, processor = load_chat_model("LlavaNextForConditionalGeneration", args.model)

    # A view has the size of the vision tower's input.
    side = 2 * model.config.vision_config.image_size
    grids = [list(grid) for grid in model.config.image_grid_pinpoints]
    # Without this grid, the processor would cut the square in another way, and views 1 to
    # 4 would not be its quadrants.
    if [side, side] not in grids:
        raise UserError(f"--model {args.model}: no 2 x 2 grid, {side} x {side}, in its "
                        "image_grid_pinpoints")

    # Two functions with all arguments set but some: `load` still takes a picture and the views to
    # keep, `describe_pictures` the batches of pictures and whether to prune.
    load = partial(load_pictures, folder=folder, processor=processor.image_processor,
                   side=side)
    prompt = prompt_tokens(processor, PROMPT_CUTMIX if args.cutmix else PROMPT)
    describe_pictures = partial(
        describe, model=model, tokenizer=processor.tokenizer, prompt=prompt, load=load,
        workers=args.workers, max_new_tokens=args.max_new_tokens)

    if args.benchmark:
        time_captions(pictures, args.batch_size, args.benchmark, describe_pictures)
        return

    produce = partial(describe_pictures, prune=not args.no_prune)

    # Captions depend on these, so a run can only be resumed with the same ones.
    settings = {"model": args.model, "batch_size": args.batch_size,
                "max_new_tokens": args.max_new_tokens, "no_prune": args.no_prune}
    out = SharedFile(args.out, "file", pictures, attrgetter("file"), args.batch_size)

    if out.write(produce, settings, "captions"):
        skipped = len(read_jsonl(out.skipped))
        print(f"{len(pictures) - skipped} captions in {args.out}, {skipped} skipped "
              f"(named in {out.skipped})")


def pictures_to_caption(args):
    """Return the Pictures that the options ask for, and their folder.

    Raises UserError if there are none, or if a file is not what it should be.
    """
    if not (args.images or args.cutmix):
        raise UserError("needs --images, or --cutmix")

    pictures = []
    if args.cutmix:
        # cutmix.py names its composites relative to the folder of cutmix.jsonl.
        folder = args.images or str(Path(args.cutmix).parent)
        for row in read_jsonl(args.cutmix):
            try:
                pictures.append(Picture(row["file"], row["setting"], row["box"]))
            except KeyError as error:
                raise UserError(f"{args.cutmix}: a line without {error}, so not made "
                                "by cutmix.py")
    else:
        folder = args.images
        for file in list_images(folder):
            pictures.append(Picture(file))

    # Captioning is the slow stage: what others have captioned need not be done again.
    if args.captioned:
        pictures = without_caption(pictures, args.captioned)
    return pictures, folder


def without_caption(pictures, caption_files):
    """Return the Pictures that have no caption in any of the files.

    A caption that names its picture without the folder, as the authors' do, counts if
    there is only one picture of this name; encode.py does the same. Raises UserError if
    nothing is left.
    """
    captions = {}
    for path in caption_files:
        captions.update(read_captions(path)[0])

    # A bare name that two pictures share does not tell which of them it describes.
    names = Counter(os.path.basename(picture.file) for picture in pictures)
    missing = []
    for picture in pictures:
        name = os.path.basename(picture.file)
        named_alone = name in captions and names[name] == 1
        if picture.file not in captions and not named_alone:
            missing.append(picture)

    if not missing:
        raise UserError(f"--captioned: all {len(pictures)} pictures have captions")
    captioned = len(pictures) - len(missing)
    print(f"{captioned} pictures have captions, {len(missing)} need one")
    return missing


def prompt_tokens(processor, question):
    """Return the token ids of a question about a picture, `<image>` among them."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)

    # Most templates write the token that begins a text, and it must not be there twice.
    begins = processor.tokenizer.bos_token
    has_begin = begins is not None and text.startswith(begins)
    return processor.tokenizer(text, add_special_tokens=not has_begin)["input_ids"]


def time_captions(pictures, batch_size, count, describe_pictures):
    """Print how many captions a second are made with and without pruning.

    Times `count` batches after one that warms up. Raises UserError if there are fewer.
    """
    batches = in_batches(pictures, batch_size)[:count + 1]
    if len(batches) <= count:
        raise UserError(f"--benchmark {count}: there are only {len(pictures)} pictures")
    for prune in (True, False):
        # The first batch is not timed, because it also waits for the workers to start.
        work = describe_pictures(batches, prune)
        next(work)

        # The rows are text, so the GPU has finished with them when the clock is read.
        start = time.perf_counter()
        made = sum(len(rows) for rows in work)
        speed = made / (time.perf_counter() - start)
        print(f"{'with' if prune else 'without'} pruning {speed:8.2f} captions/s")


# --------------------------------------------------------------------------------------
# extend: short prompts in the style of the training captions (Appendix B)

INSTRUCTION = (
    "You turn a short prompt into one detailed caption of an image, of three to five plain "
    "sentences, such as 'The image features a red apple on a wooden table. The apple is in "
    "the centre of the image, and its skin is smooth and shiny. The background is a "
    "blurred kitchen with soft light.' Keep every object, number, colour and position of "
    "the prompt, in the same words, and add no other objects of these kinds. Answer with "
    "the caption only.")

# Words of a prompt that a long caption may lose.
FILLER_WORDS = set("a an the of and or with in on at to is are photo image".split())
NUMBERS = "zero one two three four five six seven eight nine ten".split()
# How a plural ends, and its singular instead.
PLURALS = [("s", ""), ("es", ""), ("ies", "y"), ("ves", "f"), ("ves", "fe")]


def extend(args):
    """Make short prompts long with a chat model. Raises UserError."""
    rows, _ = read_prompts(args.prompts, args.limit, args.seed)
    model, tokenizer = load_chat_model("AutoModelForCausalLM", args.model)

    produce = partial(lengthen, model=model, tokenizer=tokenizer,
                      attempts=args.attempts, max_new_tokens=args.max_new_tokens)
    out = SharedFile(args.out, "short_prompt", rows, itemgetter("prompt"),
                     args.batch_size)
    settings = {"model": args.model, "batch_size": args.batch_size,
                "max_new_tokens": args.max_new_tokens, "attempts": args.attempts}
    if out.write(produce, settings, "prompts"):
        # A user should see which prompts the model did not make longer.
        short = []
        for row in read_jsonl(args.out):
            if row["prompt"] == row["short_prompt"]:
                short.append(row["prompt"])
        print(f"{len(rows)} prompts in {args.out}, {len(short)} of them kept short")
        for prompt in short[:10]:
            print(f"  {prompt}")


def lengthen(batches, model, tokenizer, attempts, max_new_tokens):
    """Yield for each batch of rows the same rows with long prompts.

    The short one is kept as "short_prompt". It also stays the prompt where the model
    loses some of its words again and again, `attempts` times.
    """
    for batch in batches:
        # A prompt that occurs twice in a batch is asked once.
        short = list(dict.fromkeys(row["prompt"] for row in batch))
        long = {}
        # What to say beside a prompt when it is asked again.
        notes = dict.fromkeys(short, "")

        # Each attempt asks only about prompts that have no good answer yet.
        for _ in range(attempts):
            asked = [prompt for prompt in short if prompt not in long]
            if not asked:
                break

            questions = []
            for prompt in asked:
                questions.append(f"{INSTRUCTION}\n\n{prompt}{notes[prompt]}")
            answers = ask(model, tokenizer, questions, max_new_tokens)
            for prompt, answer in zip(asked, answers):
                # Some models put the caption in quotation marks.
                caption = whole_sentences(answer).strip("\"'“”")
                lost = missing_words(prompt, caption)
                if caption and not lost:
                    long[prompt] = caption
                else:
                    # Without a note a greedy model would repeat itself.
                    notes[prompt] = f"\n\nThe caption must say: {', '.join(lost)}"

        # What else a row holds is kept: GenEval's evaluation needs its metadata.
        rows = []
        for row in batch:
            prompt = row["prompt"]
            caption = long.get(prompt, prompt)
            rows.append({**row, "prompt": caption, "short_prompt": prompt})
        yield rows


def ask(model, tokenizer, questions, max_new_tokens):
    """Return a chat model's answers to a list of questions."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt",
        return_dict=True).to(model.device)                                       # (B, L)
    return greedy_answers(model, tokenizer, inputs["attention_mask"], max_new_tokens,
                          input_ids=inputs["input_ids"])


def missing_words(prompt, caption):
    """Return the words of a short prompt that a long one has lost.

    Words are objects, counts, colours and positions: all but FILLER_WORDS. Which colour belongs
    to which object is not checked.
    """
    # Words are runs of letters and digits in any script, so "well-lit" is two of them.
    # Both texts are compared by all forms: "dog" is found in "dogs" and "dogs" in "dog".
    there = set()
    for word in re.findall(r"[^\W_]+", caption.lower()):
        there |= word_forms(word)
    missing = []
    for word in re.findall(r"[^\W_]+", prompt.lower()):
        if word not in FILLER_WORDS and not word_forms(word) & there:
            missing.append(word)
    return missing


def word_forms(word):
    """Return a word and all words that it may be the plural of.

    "knives" gives knives, knive, knif and knife. Numbers become digits: "two" is "2".
    """
    if word in NUMBERS:
        word = str(NUMBERS.index(word))

    # A form that is no word does little harm, as it is found in no other text either.
    forms = {word}
    for plural, singular in PLURALS:
        if word.endswith(plural):
            forms.add(word.removesuffix(plural) + singular)
    return forms


# --------------------------------------------------------------------------------------
# Captions and prompts, in the formats in which users have them

# What a column, or a key of JSON, may be called, in capitals too. The first that is there counts.
FILE = ("file", "image_path", "file_path", "file_name", "filename", "image", "path")
CAPTION = ("caption", "text")
PROMPT = ("prompt", "caption", "text")


def read_captions(path):
    """Return ({file: caption}, skipped rows); every file is a path below the folder of images.

    The suffix tells the format, see read_rows. The captions that the paper's authors have
    published leave out an image's folder. A caption without a word is a skipped row, {"file",
    "reason"}. Raises UserError: a row without file or caption, a file with two captions.
    """
    captions = {}
    skipped = []
    for number, row in enumerate(read_rows(path), 1):
        where = f"{path} row {number}"
        file = text_of(row, FILE, where)
        caption = text_of(row, CAPTION, where)
        if not file.strip():
            raise UserError(f"{where}: a caption without a file")
        if not has_word(caption, where):
            skipped.append({"file": file, "reason": "its caption has no word"})
        elif captions.setdefault(file, caption) != caption:
            raise UserError(f"{where}: {file} had another caption before (a name in two "
                            f"folders? then the captions must name the folder too)")
    if not captions:
        raise UserError(f"{path}: no caption in it")
    return captions, skipped


def read_prompts(path, limit=None, seed=0):
    """Return (rows with the key "prompt", skipped rows) of a file or folder of prompts.

    path: a folder of .txt files, as DPG-Bench has them (rows get its "name"); COCO's captions,
    captions_val2014.json; or a file of read_rows. Whatever else a row holds stays in it. limit:
    at most so many, chosen by `seed`, in the file's order. A prompt without a word is a skipped
    row: {"file": "prompts.txt row 3", "reason"}. Raises UserError.
    """
    path = Path(path)
    unit = "row"
    if path.is_dir():
        unit = "file"
        found = read_folder(path)
    elif is_coco(path):
        unit = "image"
        found = read_coco(path)
    else:
        found = dict(enumerate(read_rows(path), 1))

    rows = {}
    skipped = []
    for key, row in found.items():
        where = f"{path} {unit} {key}"
        prompt = text_of(row, PROMPT, where)
        if has_word(prompt, where):
            rows[key] = {**row, "prompt": prompt}
        else:
            skipped.append({"file": f"{path.name} {unit} {key}", "reason": "it has no word"})
    if not rows:
        raise UserError(f"{path}: no prompts in it")

    # An image of COCO's draws a lot that depends on nothing but `seed` and its id, and the lowest
    # lots are taken: a lower limit gives a part of what a higher one gives.
    def lot(image_id):
        return hashlib.sha256(f"{seed} {image_id}".encode()).digest()

    chosen = list(rows)
    if limit is not None and limit < len(rows):
        if unit == "image":
            chosen = sorted(rows, key=lot)[:limit]
        else:
            # Not the first ones: files are sorted by class or task.
            chosen = random.Random(seed).sample(chosen, limit)
    chosen = set(chosen)
    return [row for key, row in rows.items() if key in chosen], skipped


def text_of(row, names, where):
    """Return the text that a row has under the first of `names`. Raises UserError."""
    name = column(tuple(row), names)
    if name is None:
        raise UserError(f"{where}: has {shorten(', '.join(row)) or 'nothing'}, but needs one of "
                        f"{', '.join(names)}")
    if not isinstance(row[name], str):
        raise UserError(f"{where}: its {name} is {shorten(row[name])}, not a text")
    return row[name]


# Remembered, because the rows of a file have the same columns.
@functools.lru_cache
def column(columns, names):
    """Return that one of `columns` which bears the first of `names`, in any case, or None."""
    spelled = {}
    for given in columns:
        spelled.setdefault(given.strip().lower(), given)
    return next((spelled[name] for name in names if name in spelled), None)


def has_word(text, where):
    """Tell whether a text has a letter or a digit. Raises UserError for half a character."""
    try:
        # JSON can write half a character, which no tokenizer takes: "\\ud83d".
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: character {error.start + 1} is half a character, which UTF-8 "
                        f"cannot write") from None
    return re.search(r"\w", text) is not None


def read_rows(path):
    """Return the rows of a file of captions or prompts as dicts. Raises UserError.

    The suffix tells the format. JSONL: an object a line. CSV and TSV begin with a line that names
    the columns, but for the TSV of the authors' captioner: file, tab, caption, and no such line.
    All else is text with a prompt a line. Lines end at \\n only, not at U+2028 and its like.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if is_lfs_pointer(path):
        raise UserError(f"{path}: {LFS_POINTER}")
    if suffix in (".jsonl", ".json"):
        return read_jsonl(path)
    if suffix == ".csv":
        return read_table(path, ",", csv.QUOTE_MINIMAL)
    if suffix == ".tsv":
        return read_tsv(path)
    if suffix == ".parquet":
        raise UserError(f"{path}: Parquet is not read here; save it as JSONL or CSV, for "
                        'instance with load_dataset(...).to_json("captions.jsonl")')
    return read_text(path)


def read_table(path, delimiter, quoting):
    """Return the rows of a table with named columns."""
    with (reading(path, "a table in UTF-8"),
          open(path, encoding="utf-8-sig", newline="\n") as lines):
        rows = list(csv.DictReader(lines, delimiter=delimiter, quoting=quoting, strict=True,
                                   restval=""))
        for number, row in enumerate(rows, 1):
            if None in row:
                raise ValueError(f"row {number} has more cells than there are columns")
    if not rows:
        raise UserError(f"{path}: no rows below its first line")
    return rows


def read_tsv(path):
    """Return the rows of a TSV, with named columns or of the authors' captioner."""
    with (reading(path, "a table in UTF-8"),
          open(path, encoding="utf-8-sig", newline="\n") as lines):
        pairs = [line.partition("\t") for line in lines if line.strip()]
    if pairs and Path(pairs[0][0]).suffix.lower() in IMAGE_SUFFIXES:
        return [{"file": file, "caption": caption.strip()} for file, _, caption in pairs]
    try:
        return read_table(path, "\t", csv.QUOTE_MINIMAL)
    except UserError:
        # Most TSVs do without quoting: a cell may begin with a word in quotation marks.
        return read_table(path, "\t", csv.QUOTE_NONE)


def read_text(path):
    """Return the lines of a text file as rows with a "prompt"."""
    with reading(path, "text in UTF-8"):
        text = path.read_bytes().decode("utf-8-sig").rstrip()
        if "\0" in text:
            raise ValueError("binary data; of tables, JSONL, CSV and TSV are read")

    # What another program wrote: its punctuation must not become prompts.
    first = text.lstrip().partition("\n")[0]
    is_json = re.match(r'[\[{]\s*(["{\[]|$)', first)
    if is_json or "\t" in first or column(tuple(re.split("[,;]", first)), PROMPT):
        raise UserError(f"{path}: begins like JSON or a table, not like text with a prompt a "
                        f"line: call it .jsonl, .csv or .tsv if it is that")
    return [{"prompt": line.strip()} for line in text.split("\n")]


def read_folder(folder):
    """Return {name: row} of a folder with a prompt in each .txt file."""
    rows = {}
    # Hidden files are those of editors and of macOS.
    for file in sorted(folder.glob("[!.]*.txt")):
        with reading(file, "text in UTF-8"):
            prompt = file.read_text(encoding="utf-8-sig").strip()
        rows[file.name] = {"prompt": prompt, "name": file.stem, "prompt_file": str(file)}
    return rows


def is_coco(path):
    """Tell whether a file is COCO's: one JSON object with `annotations`, and not JSONL."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    with open(path, "rb") as lines:
        first = lines.readline()
    try:
        row = json.loads(first)
    # An object of several lines, or a damaged one.
    except (ValueError, RecursionError):
        return True
    return isinstance(row, dict) and "annotations" in row


def read_coco(path):
    """Return COCO's captions (captions_val2014.json) as {id of an image: row}, in order of ids.

    A row is {"prompt", "name", "file"}; `name` is the file's name without its suffix. Of an image's
    captions the one with the smallest id that has a word becomes the prompt.
    """
    data = read_json(path, "COCO's captions")
    with reading(path, "COCO's captions"):
        files = {image["id"]: image["file_name"] for image in data["images"]}
        prompts = dict.fromkeys(sorted(files), "")
        for annotation in sorted(data["annotations"], key=itemgetter("id")):
            image_id = annotation["image_id"]
            if not re.search(r"\w", prompts[image_id]):
                prompts[image_id] = annotation["caption"].strip()

        rows = {}
        for image_id, prompt in prompts.items():
            file = files[image_id]
            rows[image_id] = {"prompt": prompt, "name": Path(file).stem, "file": file}
        # Samples are saved under these names.
        names = {row["name"] for row in rows.values()}
        if len(names) < len(data["images"]):
            raise ValueError("two images have the same id or name")
    return rows


# --------------------------------------------------------------------------------------
# Loading a chat model

def load_chat_model(model_class, name):
    """Return a model on this rank's device, and its processor.

    The processor of a model for text only is its tokenizer. model_class: a class of
    transformers; name: a folder, or a hub id. Raises UserError.
    """
    # It takes seconds to import, and neither `--help` nor aio needs it.
    import transformers

    device = local_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    reads_images = model_class.startswith("Llava")
    try:
        if reads_images:
            # A wrong model is refused by its small configuration, before gigabytes are read.
            config = transformers.AutoConfig.from_pretrained(name)
            if config.model_type != "llava_next":
                raise UserError(f"--model {name}: not LLaVA-NeXT")
            processor = transformers.AutoProcessor.from_pretrained(name)
            tokenizer = processor.tokenizer
        else:
            processor = transformers.AutoTokenizer.from_pretrained(name)
            tokenizer = processor
        model = getattr(transformers, model_class).from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name}: cannot be loaded ({one_line(error)})")
    if not processor.chat_template:
        raise UserError(f"--model {name}: has no chat template, so it cannot be asked")

    # Batches are padded on the left, so that all answers begin at the same place.
    # Some tokenizers, Llama's among them, have no token for padding. Any token will do,
    # because the padding is masked.
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    return model.to(device).eval(), processor


@torch.inference_mode()
def greedy_answers(model, tokenizer, mask, max_new_tokens, **inputs):
    """Return a model's most likely answers as a list of B texts.

    inputs: either input_ids (B, L) or inputs_embeds (B, L, D), padded on the left; mask
    (B, L) is 0 at the padding.
    """
    # None: what a model's own configuration says of sampling does not apply.
    tokens = model.generate(
        **inputs, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
        temperature=None, top_p=None, top_k=None, pad_token_id=tokenizer.pad_token_id)
    if "input_ids" in inputs:
        # Then the answer comes behind the question.
        # Given embeddings instead, generate() returns the answer alone.
        tokens = tokens[:, inputs["input_ids"].shape[1]:]
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


def whole_sentences(text):
    """Return a text as one line, cut after its last complete sentence.

    If no sentence is complete, all of it is returned.
    """
    text = " ".join(text.split())

    # An answer that reached --max-new-tokens stops in the middle of a sentence. A full
    # stop counts only at the end of a word, so "2.5" ends no sentence.
    ends = [match.end() for match in re.finditer(r"[.!?][\"'”’)\]]*(?=\s|$)", text)]
    return text[:ends[-1]] if ends else text


# --------------------------------------------------------------------------------------
# A file that ranks write together

class SharedFile:
    """A JSONL file with one row for each item, in order, that all ranks write together.

    Rank r has batches r, r + world, r + 2 world ... and appends their rows to a part of
    its own, OUT.<r>of<world>. The last rank to end joins the parts: rows with a
    "reason" go to <OUT less .jsonl>.skipped.jsonl, all others to OUT. Both files are
    the same as those of a single rank, no matter how often the work was interrupted.
    """

    def __init__(self, out, key, items, name_of, batch_size):
        """`name_of(item)` is what the row of an item has under `key`."""
        self.rank, self.world = rank_and_world()
        self.out = out
        self.skipped = out.with_suffix(".skipped.jsonl")
        self.settings = Path(f"{out}.settings")
        # The number of ranks is in the name because it decides which rows a part has.
        self.parts = [out.with_name(f"{out.name}.{rank}of{self.world}")
                      for rank in range(self.world)]

        self.key = key
        self.items = items
        self.name_of = name_of
        self.batches = in_batches(items, batch_size)

    def write(self, produce, settings, unit):
        """Write what is missing, and return whether `out` is complete.

        If it is not, other ranks are still at work. `produce(batches)` yields the rows
        of each batch of items; `settings` are what rows depend on. Raises UserError if
        `out` or its parts belong to other items, settings or ranks.
        """
        # Started once more, a finished command only makes sure that it means the same rows. (A file
        # that came without settings, from another machine say, is taken as it is.)
        if self.out.exists():
            self.refuse_other_items()
            if self.settings.exists():
                begin_or_resume(self.settings, self.out, settings)
            self.remove_parts()
            return True

        with only_command(self.out.parent, self.out.name):
            self.refuse_other_ranks()
            begin_or_resume(self.settings, self.out, settings)
            self.append_my_share(produce, unit)
            return self.join_parts()

    def refuse_other_items(self):
        """Raise UserError unless the finished files are about the same items."""
        names = set()
        for path in (self.out, self.skipped):
            with open(path, "rb") as lines:
                for line in lines:
                    names.add(self.name_in(line, path))

        # Sets, because skipped pictures stand in a file of their own, out of order.
        if names != {self.name_of(item) for item in self.items}:
            raise self.other_items_error()

    def name_in(self, line, path):
        """Return the name in a line of a file. Raises UserError if it has none."""
        try:
            return json.loads(line)[self.key]
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}: not a file that this command writes: use another "
                            "--out, or delete it")

    def other_items_error(self):
        """Return the error that says that `out` is about other items."""
        return UserError(f"{self.out}: begun with another list: use another --out, or "
                         "delete it and its parts")

    def refuse_other_ranks(self):
        """Raise UserError if there are parts of another number of ranks."""
        # Another number of ranks deals the batches out differently: its parts do not fit.
        for part in self.out.parent.glob(f"{self.out.name}.*of*"):
            if not part.name.endswith(f"of{self.world}"):
                raise UserError(f"{part}: begun with another number of ranks: go on with "
                                "as many, or delete it")

    def append_my_share(self, produce, unit):
        """Append the missing rows of this rank's batches to its part."""
        mine = self.batches[self.rank::self.world]

        # This mode creates the part if it is missing, lets it be read, and appends.
        with open(self.parts[self.rank], "ab+") as part:
            done, size = self.whole_batches(part, mine)
            # A torn line, or half a batch, is cut off.
            part.truncate(size)
            if done == len(mine):
                return

            total = sum(len(batch) for batch in mine)
            there = sum(len(batch) for batch in mine[:done])

            with tqdm(total=total, initial=there, desc=self.out.stem, unit=unit,
                      disable=self.rank > 0) as bar:
                for rows in produce(mine[done:]):
                    lines = [json.dumps(row) + "\n" for row in rows]
                    part.write("".join(lines).encode())
                    # A kill then costs no more than the batch in hand.
                    part.flush()
                    bar.update(len(rows))

    def whole_batches(self, part, batches):
        """Return how many of `batches` an open part holds, and their size in bytes.

        Only whole batches count, and partial ones are done again: a caption can depend,
        in its last bits, on the batch it was made in. Raises UserError for rows of
        other items.
        """
        part.seek(0)
        done = 0
        size = 0
        for batch in batches:
            lines = list(itertools.islice(part, len(batch)))
            is_torn = len(lines) < len(batch) or not lines[-1].endswith(b"\n")
            if is_torn:
                break

            # Otherwise rows of another list would end in `out`, and some items have none.
            for line, item in zip(lines, batch):
                if self.name_in(line, self.parts[self.rank]) != self.name_of(item):
                    raise self.other_items_error()

            done += 1
            size += sum(len(line) for line in lines)
        return done, size

    def join_parts(self):
        """Write `out` from the parts if all are whole; return whether it is there."""
        # Two ranks that end together may both join the parts. They write the same bytes, and
        # what one of them has opened it can read even when the other has removed it.
        with contextlib.ExitStack() as stack:
            try:
                streams = [stack.enter_context(open(part, "rb")) for part in self.parts]
            except FileNotFoundError:
                # A rank has not begun, or another one has joined the parts already.
                return self.out.exists()

            # A rank that is still at work has fewer rows in its part than its share.
            rows = sum(count_whole_lines(stream) for stream in streams)
            if rows < len(self.items):
                print(f"rank {self.rank}: its share is done; the last rank to end "
                      f"writes {self.out}")
                return False

            # `out` is the sign that all is done, so it is the last to get its name.
            with (complete(self.out) as out, complete(self.skipped) as skipped,
                  open(out, "wb") as good, open(skipped, "wb") as bad):
                for k, batch in enumerate(self.batches):
                    # Batch k was made by rank k % world: taking turns restores the order.
                    for line in itertools.islice(streams[k % self.world], len(batch)):
                        has_reason = "reason" in json.loads(line)
                        (bad if has_reason else good).write(line)
        self.remove_parts()
        return True

    def remove_parts(self):
        """Remove the parts, which are of no use once `out` is complete; a kill may have left them."""
        for path in self.parts:
            path.unlink(missing_ok=True)


def in_batches(items, batch_size):
    """Return a list cut into lists of `batch_size`; the last one may be shorter."""
    return [items[i:i + batch_size] for i in range(0, len(items), batch_size)]


def count_whole_lines(stream):
    """Return how many lines of an open file have a newline, and go back to its start."""
    count = sum(line.endswith(b"\n") for line in stream)
    stream.seek(0)
    return count


# --------------------------------------------------------------------------------------

def main(argv=None):
    args = parse_arguments(argv)
    at_least(args, batch_size=1, max_new_tokens=1, attempts=1, workers=0, benchmark=0,
             limit=1, seed=0)
    args.function(args)


def parse_arguments(argv):
    """Return the command's options; `function` is the one of the chosen sub-command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(dest="stage", required=True,
                                     metavar="{aio,llava,extend}")

    # `add = sub_command(...)` begins a sub-command, and `add(...)` gives it an option.
    def sub_command(name, function):
        sub = commands.add_parser(name, description=__doc__,
                                  formatter_class=HelpFormatter)
        sub.set_defaults(function=function)
        return sub.add_argument

    add = sub_command("aio", aio)
    add("--images", required=True, metavar="FOLDER", help="<class>/<file>")
    add("--class-names", metavar="FILE", help="LOC_synset_mapping.txt or "
        "imagenet_class_index.json, if the folders are WordNet ids")
    add("--out", type=Path, required=True, metavar="FILE", help="captions.jsonl")

    add = sub_command("llava", llava)
    add("--images", metavar="FOLDER",
        help="photos (or composites: the folder of --cutmix)")
    add("--cutmix", metavar="FILE",
        help="cutmix.jsonl: caption composites, look where the second photo is")
    add("--captioned", nargs="+", metavar="FILE",
        help="captions that exist, the authors' for instance: leave out their pictures")
    add("--out", type=Path, required=True, metavar="FILE", help="captions.jsonl")
    add("--model", default="llava-hf/llama3-llava-next-8b-hf",
        help="hub id or folder of a LLaVA-NeXT")
    add("--batch-size", type=int, default=32, help="pictures at once")
    add("--max-new-tokens", type=int, default=200, help="longest answer")
    add("--workers", type=int, default=8,
        help="processes that decode pictures; 0: none")
    add("--no-prune", action="store_true",
        help="show all five views: transformers' own path")
    add("--benchmark", type=int, default=0, metavar="BATCHES",
        help="write nothing, time so many batches with and without pruning")

    add = sub_command("extend", extend)
    add("--prompts", required=True, metavar="FILE",
        help="text, a prompt a line; or JSONL with a 'prompt' a row, as GenEval's "
        "evaluation_metadata.jsonl; or COCO's annotation file, captions_val2014.json")
    add("--limit", type=int, metavar="N", help="only so many of COCO's images")
    add("--seed", type=int, default=0, help="chooses the images of --limit")
    add("--out", type=Path, required=True, metavar="FILE",
        help="JSONL: the rows with long prompts")
    add("--model", default="meta-llama/Llama-3.1-8B-Instruct",
        help="hub id or folder of a chat model")
    add("--batch-size", type=int, default=32, help="prompts at once")
    add("--max-new-tokens", type=int, default=200, help="longest answer")
    add("--attempts", type=int, default=3,
        help="how often it is asked before the prompt stays short")
    return parser.parse_args(argv)


if __name__ == "__main__":
    command_line(main)
