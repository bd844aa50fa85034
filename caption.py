"""Stage 2, text augmentation (paper 3.1, Appendix B): caption pictures, extend prompts.

    python caption.py llava --images imagenet/train --out captions.jsonl

aio     'An image of <class-name>', the paper's baseline: it says what there is, but
        not how many, in which colour or where.
llava   A long caption of every photo, or of every composite (--cutmix FILE). LLaVA-NeXT is
        shown only the views that matter: fewer tokens, 2.7 times as fast in the paper.
extend  Short prompts become long ones, so that a model that was trained on long
        captions is asked in a language it understands.

Whatever has no caption is named in <OUT less .jsonl>.skipped.jsonl. A killed command goes
on when it is started again, from the files in OUT.parts. Under torchrun, or with RANK and
WORLD_SIZE set, ranks share the work; the last one to end joins it. OUT.settings says how
OUT was made. Each command has options of its own: `python caption.py llava --help`.
"""

import contextlib
import csv
import hashlib
import io
import itertools
import json
import math
import operator
import os
import random
import re
import shutil
from collections import Counter
from pathlib import Path

# First: it keeps Ctrl-C quiet while torch is imported.
from common import (BATCH_SIZE, COUNT, IMAGE_SUFFIXES, SEED, THREADS, Options, UserError,
                    ahead, command_line, fingerprint, has_content, in_batches, join_rows,
                    keep_apart, lfs_pointer, list_images, load_image, local_device, make_rows,
                    pretrained, read_json, read_jsonl, reading, refuse_other_settings,
                    refuse_to_replace, shorten, write_json)

import torch
from PIL import Image

from cutmix import CUTS, class_of

# --------------------------------------------------------------------------------------
# aio: 'An image of <class-name>' (paper 3.1)

def aio(args):
    """Write the baseline's caption for every photo in a class folder. Raises UserError."""
    keep_apart(args.out, args.images, args.class_names)
    files = list_images(args.images)
    names = class_names(sorted({class_of(file) for file in files}), args.class_names)
    settings = {"command": "aio", "class_names": names, "list": fingerprint(files)}

    def baseline(files):
        for file in files:
            # No article, as the paper writes it.
            yield {"file": file, "caption": f"An image of {names[class_of(file)]}"}

    write_together(args.out, settings, files, 50_000, baseline)


def class_names(folders, table=None):
    """Return the names of class folders as a dict: {folder: class name in words}.

    table: a file that says what folders mean, see read_class_table; without it they are named
    after their classes. Raises UserError for a folder whose meaning is not known.
    """
    meanings = read_class_table(table) if table else dict(zip(folders, folders))
    names = {}
    for folder in folders:
        # imagenet_class_index.json writes "great_white_shark", and so do many folders.
        name = meanings.get(folder, "").replace("_", " ").strip()
        # 'An image of n01440764' would teach a model nothing, and 'An image of ' neither.
        if re.fullmatch(r"(n\d{8})?", name):
            raise UserError(f"photos in {folder or 'no class folder'}: of which class are they? "
                            f"Neither the folder's name says it nor --class-names "
                            f"{table or 'LOC_synset_mapping.txt, which is not given'}")
        names[folder] = name
    return names


def read_class_table(path):
    """Return what WordNet ids mean as a dict: {"n01440764": "tench", ...}.

    Reads LOC_synset_mapping.txt ('n01440764 tench, Tinca tinca': the first name counts) and
    imagenet_class_index.json ({"0": ["n01440764", "tench"], ...}). Raises UserError otherwise.
    """
    meanings = {}
    with reading(path, "lines 'n01440764 tench, Tinca tinca', nor JSON of such pairs"):
        text = read_utf8(path)
        # The first character tells the formats apart: an id begins with n.
        if text.startswith("{"):
            pairs = json.loads(text).values()
        else:
            pairs = [line.split(None, 1) for line in text.split("\n") if line.strip()]
        for wordnet_id, synonyms in pairs:
            name = synonyms.split(",")[0].strip()
            # Other tables have a number there, a mark or more columns: no image is one
            # 'of 5 tench'.
            is_name = re.fullmatch(r"(?!.*\s\d+$)[^\W\d_][\w '’.&/()-]*", name)
            if not is_name or meanings.setdefault(wordnet_id, name) != name:
                raise ValueError(f"{wordnet_id} would mean {name!r}")
    return meanings


# --------------------------------------------------------------------------------------
# llava: long captions, with the visual tokens pruned (paper 3.1, Appendix B)

# Appendix B, word for word.
PROMPT = "Describe this image"
PROMPT_CUTMIX = (
    "Describe this image. Consider all the objects in the picture. Describe them, describe their "
    "position and their relation. Do not consider the image as a composite of images. The image "
    "is a single scene image")

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
    2 x 2 grid of quadrants, each with a newline at its end. With P x P patches a view, all
    five give transformers' own sequence, 5 P^2 + 2 P tokens (2,928). The whole alone gives
    P^2 + 1 (577), as transformers packs a picture of one view. Beside quadrants it gives
    P^2 (576), each quadrant as many, and each row of quadrants of which one is kept P
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
    hidden = model.model.vision_tower(views, output_hidden_states=True).hidden_states
    # Without the class token.
    features = hidden[model.config.vision_feature_layer][:, 1:]
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


def load_views(batch, folder, processor, side, prune):
    """Return [(file, views, kept), ...] of a batch of pictures, and its skipped rows.

    batch: (file, setting, box) of each, the last two None for a photo. views:
    (V, 3, H, W); kept: which ones these are. LLaVA-NeXT cuts a picture into tiles, as many
    as its size and shape suggest. The five views that the paper counts exist for 2 x 2
    tiles only, so every picture is shown as a square of `side` pixels, which has just these.
    """
    shown = []
    skipped = []
    for file, setting, box in batch:
        path = f"{folder}/{file}"
        try:
            square = load_image(path, side)
            # The box counts the pixels of the file, not of what was decoded.
            with Image.open(path) as header:
                file_side = min(header.size)
        except OSError as error:
            # One broken file must not end the whole run.
            skipped.append({"file": file, "reason": error.strerror})
            continue
        views = processor(images=square, return_tensors="pt")["pixel_values"][0]
        kept = kept_patches(setting, box, file_side) if prune else ALL_VIEWS
        # The other views never reach the model.
        shown.append((file, views[kept], kept))
    return shown, skipped


def llava(args):
    """Caption photos or composites with LLaVA-NeXT. Raises UserError."""
    keep_apart(args.out, args.images, args.cutmix, *args.captioned)
    pictures, folder = pictures_to_caption(args)
    question = PROMPT_CUTMIX if args.cutmix else PROMPT
    settings = {"command": "llava", "model": args.model, "question": question,
                "no_prune": args.no_prune, "batch_size": args.batch_size,
                "max_new_tokens": args.max_new_tokens, "list": fingerprint(pictures)}

    def ask_llava(pictures):
        model, processor, side, prompt = load_llava(args.model, question)

        def load(batch):
            return load_views(batch, folder, processor.image_processor, side,
                              not args.no_prune)

        batches = in_batches(pictures, args.batch_size)
        for shown, skipped in ahead(load, batches, args.workers):
            yield from skipped
            # All pictures of a batch may be broken.
            if not shown:
                continue
            files, views, kept = zip(*shown)
            embeddings, mask = embed_question(model, views, kept, prompt)
            answers = greedy_answers(model, processor.tokenizer, mask, args.max_new_tokens,
                                     inputs_embeds=embeddings)

            for file, answer in zip(files, answers):
                caption = whole_sentences(answer)
                row = {"caption": caption} if caption else {"reason": "the model said nothing"}
                yield {"file": file, **row}

    # A caption can depend, in its last bits, on its batch: units are whole batches.
    write_together(args.out, settings, pictures, 8 * args.batch_size, ask_llava)


def load_llava(name, question):
    """Return a LLaVA-NeXT, its processor, the side of 2 x 2 views, and a question's tokens."""
    model, processor = load_chat_model("LlavaNextForConditionalGeneration", "AutoProcessor",
                                       name)
    # A view has the size of the vision tower's input.
    view = model.config.vision_config.image_size
    with reading(name, "a model that can be asked about pictures"):
        # Without a grid of 2 x 2, a square would be cut in another way, and views 1 to 4
        # would not be its quadrants.
        square = Image.new("RGB", (2 * view, 2 * view))
        views = processor.image_processor(square, return_tensors="pt")["pixel_values"][0]
        if views.shape != (5, 3, view, view):
            raise ValueError(f"no 2 x 2 grid of views of {view} pixels in its image processor")
        prompt = prompt_tokens(processor, question)
        if model.config.image_token_id not in prompt:
            raise ValueError("no <image> in its chat template")
    return model, processor, 2 * view, prompt


def pictures_to_caption(args):
    """Return [(file, setting, box), ...] and the pictures' folder. Raises UserError."""
    if not (args.images or args.cutmix):
        raise UserError("needs --images, or --cutmix")
    folder = args.images
    if args.cutmix:
        # cutmix.py names its composites relative to the folder of cutmix.jsonl.
        folder = folder or str(Path(args.cutmix).parent)
        pictures = read_composites(args.cutmix)
    else:
        pictures = [(file, None, None) for file in list_images(folder)]
    # Captioning is the slow stage: what others have captioned need not be done again.
    captions = map(read_captions, args.captioned)
    captioned, _ = match([file for file, _, _ in pictures], *captions)
    pictures = [picture for picture in pictures if picture[0] not in captioned]
    if args.captioned:
        print(f"{len(captioned)} pictures have captions, {len(pictures)} need one")
    if not pictures:
        raise UserError(f"{args.cutmix or folder}: no picture in it needs a caption")
    return pictures, folder


def read_composites(path):
    """Return [(file, setting, box), ...] of a cutmix.jsonl. Raises UserError."""
    composites = []
    for k, row in enumerate(read_jsonl(path), 1):
        with reading(f"{path} row {k}", "a composite of cutmix.py"):
            # Four whole numbers: no text, no NaN.
            x0, y0, x1, y1 = map(operator.index, row["box"])
            is_box = 0 <= x0 < x1 and 0 <= y0 < y1
            if row["setting"] not in CUTS or not isinstance(row["file"], str) or not is_box:
                raise ValueError(shorten(row))
            composites.append((row["file"], row["setting"], (x0, y0, x1, y1)))
    return composites


# --------------------------------------------------------------------------------------
# extend: short prompts in the style of the training captions (Appendix B)

INSTRUCTION = (
    "You turn a short prompt into one detailed caption of an image, of three to five plain "
    "sentences, such as 'The image features a red apple on a wooden table. The apple is in the "
    "centre of the image, and its skin is smooth and shiny. The background is a blurred kitchen "
    "with soft light.' Keep every object, number, colour and position of the prompt, in the same "
    "words, and add no other objects of these kinds. Answer with the caption only.")

# Words of a prompt that a long caption may lose.
FILLER_WORDS = set("a an the of and or with in on at to is are photo image".split())
NUMBERS = "zero one two three four five six seven eight nine ten".split()
# How a plural ends, and its singular instead.
PLURALS = [("s", ""), ("es", ""), ("ies", "y"), ("ves", "f"), ("ves", "fe")]


def extend(args):
    """Make short prompts long with a chat model. Raises UserError."""
    keep_apart(args.out, args.prompts)
    rows, skipped = read_prompts(args.prompts, args.limit, args.seed)
    # The skipped ones pass through, so that they are listed.
    rows += skipped
    settings = {"command": "extend", "model": args.model, "attempts": args.attempts,
                "batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens,
                "list": fingerprint(rows)}

    def make_long(rows):
        model, tokenizer = load_chat_model("AutoModelForCausalLM", "AutoTokenizer", args.model)
        # A model that cannot be asked is refused before its work begins.
        with reading(args.model, "a model that can be asked"):
            ask(model, tokenizer, [INSTRUCTION], 1)
        for batch in in_batches(rows, args.batch_size):
            yield from lengthen(batch, model, tokenizer, args.attempts, args.max_new_tokens)

    if write_together(args.out, settings, rows, 2 * args.batch_size, make_long):
        # A user should see which prompts the model did not make longer.
        rows = read_jsonl(args.out)
        short = [row["prompt"] for row in rows if row["prompt"] == row["short_prompt"]]
        print(f"{len(short)} of {len(rows)} prompts were kept short", *short[:10], sep="\n  ")


def lengthen(batch, model, tokenizer, attempts, max_new_tokens):
    """Yield a batch's rows with long prompts, and its skipped rows as they are.

    The short one is kept as "short_prompt". It also stays the prompt where the model loses some
    of its words again and again, `attempts` times.
    """
    # What has no good answer yet, and what to say beside it. Equal prompts are asked once.
    notes = {row["prompt"]: "" for row in batch if "prompt" in row}
    long = {}
    for _ in range(attempts):
        if not notes:
            break
        questions = [f"{INSTRUCTION}\n\n{prompt}{note}" for prompt, note in notes.items()]
        answers = ask(model, tokenizer, questions, max_new_tokens)
        for prompt, answer in zip(list(notes), answers):
            # Some models put the caption in quotation marks.
            caption = whole_sentences(answer).strip("\"'“”")
            lost = missing_words(prompt, caption)
            if caption and not lost:
                long[prompt] = caption
                del notes[prompt]
            else:
                # Without a note a greedy model would repeat itself.
                notes[prompt] = f"\n\nThe caption must say: {', '.join(lost)}"

    # What else a row holds is kept: GenEval's evaluation needs its metadata.
    for row in batch:
        if "prompt" in row:
            prompt = row["prompt"]
            row = {**row, "prompt": long.get(prompt, prompt), "short_prompt": prompt}
        yield row


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
# Asking a chat model

def load_chat_model(kind, companion, name):
    """Return a model (of transformers' class `kind`), and its processor or tokenizer."""
    dtype = torch.bfloat16 if local_device().type == "cuda" else torch.float32
    model, processor = pretrained(name, kind, companion, dtype=dtype)
    # Batches are padded on the left, so that all answers begin at the same place. Any token
    # will do, because the padding is masked; some tokenizers, as Llama's, have none for it.
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    return model, processor


def prompt_tokens(processor, question):
    """Return the token ids of a question about a picture, `<image>` among them."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    # Most templates write the token that begins a text, and it must not be there twice.
    begins = processor.tokenizer.bos_token
    has_begin = begins is not None and text.startswith(begins)
    return processor.tokenizer(text, add_special_tokens=not has_begin)["input_ids"]


def ask(model, tokenizer, questions, max_new_tokens):
    """Return a chat model's answers to a list of questions."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt",
        return_dict=True).to(model.device)                                       # (B, L)
    return greedy_answers(model, tokenizer, inputs["attention_mask"], max_new_tokens,
                          input_ids=inputs["input_ids"])


@torch.inference_mode()
def greedy_answers(model, tokenizer, mask, max_new_tokens, **inputs):
    """Return a model's most likely answers as a list of B texts.

    inputs: either input_ids (B, L) or inputs_embeds (B, L, D), padded on the left; mask
    (B, L) is 0 at the padding.
    """
    # Some models' configurations lack the token that ends an answer in their own chat template.
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    tokens = model.generate(
        **inputs, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=sorted(ends - {None}) or None)
    if "input_ids" in inputs:
        # The answer comes behind the question; given embeddings, it comes alone.
        tokens = tokens[:, inputs["input_ids"].shape[1]:]
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


def whole_sentences(text):
    """Return a text as one line, cut after its last complete sentence, if there is one."""
    text = " ".join(text.split())
    # An answer that reached --max-new-tokens stops in the middle of a sentence. A full
    # stop counts only at the end of a word, so "2.5" ends no sentence.
    sentences = re.match(r".*[.!?][\"'”’)\]]*(?=\s|$)", text)
    return sentences[0] if sentences else text


# --------------------------------------------------------------------------------------
# Captions and prompts, in the formats in which users have them

# What a column, or a key of JSON, may be called, in capitals too. The first one counts.
FILE_COLUMNS = ("file", "image_path", "file_path", "file_name", "filename", "image", "path")
CAPTION_COLUMNS = ("caption", "text")
PROMPT_COLUMNS = ("prompt", "caption", "text")


def read_captions(path):
    """Return {file: caption}; every file is a path below the folder of images.

    The captions that the paper's authors have published leave out an image's folder. A
    caption without a word is none. Formats: see read_rows. Raises UserError: a row that
    lacks one of the two, a file with two captions for an image, or with none at all.
    """
    captions = {}
    for k, row in enumerate(read_rows(path), 1):
        where = f"{path} row {k}"
        file = text_of(row, FILE_COLUMNS, where)
        caption = text_of(row, CAPTION_COLUMNS, where)
        if has_word(caption, where) and captions.setdefault(file, caption) != caption:
            raise UserError(f"{where}: {file} had another caption before (a name in "
                            f"two folders? then the captions must name the folder too)")
    if not captions:
        raise UserError(f"{path}: no captions in it")
    return captions


def match(files, *sources):
    """Return {file: caption} of all `files` that have one, in order, and skipped rows.

    sources: {file: caption} each; a later one wins. One that names a file without its folder,
    as the authors' do, goes to the only file of this name. Skipped rows, {"file", "reason"},
    are about files without a caption and then about captions without a file.
    """
    found = {}
    no_image = {}           # {file: why}
    files_called = Counter(os.path.basename(file) for file in files)
    for captions in sources:
        unused = dict(captions)
        for file in files:
            # A bare name that several files share does not tell which of them is meant.
            name = os.path.basename(file)
            key = file if file in captions or files_called[name] > 1 else name
            if key in unused:
                found[file] = unused.pop(key)
        for file in unused:
            several = files_called[file] > 1
            no_image[file] = "images of this name in several folders" if several else "no such image"

    matched = {file: found[file] for file in files if file in found}
    skipped = [{"file": file, "reason": "no caption"} for file in files if file not in found]
    skipped += [{"file": file, "reason": f"caption, but {why}"} for file, why in no_image.items()]
    return matched, skipped


def read_prompts(path, limit=None, seed=0):
    """Return (rows with the key "prompt", skipped rows) of a file or folder of prompts.

    path: COCO's captions_val2014.json, or see read_rows. A row keeps whatever else it holds.
    limit: at most so many, chosen by `seed`, in the file's order. A prompt without a word is a
    skipped row: {"file": "prompts.txt row 3", "reason"}. Raises UserError.
    """
    path = Path(path)
    of_coco = is_coco(path)
    found = read_coco(path) if of_coco else dict(enumerate(read_rows(path), 1))
    rows = {}
    skipped = []
    for key, row in found.items():
        name = row.get("name", f"row {key}")
        prompt = text_of(row, PROMPT_COLUMNS, f"{path} {name}")
        if has_word(prompt, f"{path} {name}"):
            rows[key] = {**row, "prompt": prompt}
        else:
            skipped.append({"file": f"{path.name} {name}", "reason": "no word in it"})
    if not rows:
        raise UserError(f"{path}: no prompts in it")
    limit = min(limit or len(rows), len(rows))
    # Not the first ones: files are sorted by class or task.
    chosen = random.Random(seed).sample(list(rows), limit)
    if of_coco:
        # An image draws a lot that depends on `seed` and its id alone, and the lowest are
        # taken: a lower limit gives a part of what a higher one gives.
        lots = {key: hashlib.sha256(f"{seed} {key}".encode()).digest() for key in rows}
        chosen = sorted(rows, key=lots.get)[:limit]
    return [rows[key] for key in sorted(chosen)], skipped


def text_of(row, names, where):
    """Return the text that a row has under the first of `names`. Raises UserError."""
    for name in names:
        for key, value in row.items():
            if key.strip().lower() == name and isinstance(value, str):
                return value
    raise UserError(f"{where}: needs a text called {' or '.join(names)}, and has "
                    f"{shorten(', '.join(row))}")


def has_word(text, where):
    """Tell whether a text has a letter or a digit. Raises UserError for half a character."""
    # JSON can write one, "\\ud83d", and no tokenizer takes it.
    with reading(where, "text that UTF-8 can write"):
        text.encode()
    return re.search(r"\w", text) is not None


def read_rows(path):
    """Return the rows of a file of captions or prompts as dicts. Raises UserError.

    The suffix tells the format. JSONL: an object a line. CSV and TSV: a line with the
    names of the columns comes first. All else is text with a prompt a line, or a folder
    of .txt files with a prompt each, as DPG-Bench has them. Lines end at \\n only, not at
    U+2028 and its like.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if path.is_dir():
        # Hidden files are those of editors and of macOS. A named pipe would be waited for.
        files = [file for file in sorted(path.glob("[!.]*"))
                 if file.suffix.lower() == ".txt" and file.is_file()]
        return [{"prompt": read_utf8(file).strip(), "name": file.stem, "prompt_file": str(file)}
                for file in files]
    if suffix in (".jsonl", ".json"):
        return read_jsonl(path)
    text = read_utf8(path).strip("\n")
    if suffix == ".csv":
        return read_table(path, text, ",")
    if suffix == ".tsv":
        return read_tsv(path, text)
    # What another program wrote: its columns and brackets must not become prompts.
    lines = text.split("\n")
    is_json = re.match(r'[\[{]\s*(["{\[]|$)', lines[0])
    is_table = re.search(r"\t|(^|[,;])\s*(prompt|caption|text)\s*([,;]|$)", lines[0], re.I)
    if is_json or is_table:
        raise UserError(f"{path}: begins like a table or JSON, not like text with a prompt a "
                        f"line: call it .csv, .tsv or .jsonl, or save it as one of them")
    return [{"prompt": line.strip()} for line in lines]


def read_utf8(path):
    """Return the text of a file, without the mark (BOM) that some editors put before it."""
    with reading(path, "text in UTF-8 (JSONL, CSV, TSV or a prompt a line)"):
        text = Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
        # `reading` says that it is one.
        if lfs_pointer(path):
            raise ValueError
        # UTF-16 without its mark, or another program's numbers.
        if "\0" in text:
            raise ValueError("it holds bytes of 0")
    # As old Macs end lines, and Excel still offers to.
    return text if "\n" in text else text.replace("\r", "\n")


def read_tsv(path, text):
    """Return the rows of a TSV: with named columns, or as the authors' captioner writes it."""
    # Theirs has no line of names: file, tab, caption.
    first_cell = re.match(r"[^\t\n]*", text)[0]
    if first_cell.lower().endswith(IMAGE_SUFFIXES):
        pairs = [line.partition("\t") for line in text.split("\n") if line]
        return [{"file": file, "caption": caption.strip()} for file, _, caption in pairs]
    with contextlib.suppress(UserError):
        rows = read_table(path, text, "\t")
        if not any("\t" in cell for row in rows for cell in row.values()):
            return rows
    # Most TSVs do without quoting: a cell may begin with a word in quotation marks. Up to the
    # next such word, rows would become one cell, with their tabs in it.
    return read_table(path, text, "\t", csv.QUOTE_NONE)


def read_table(path, text, delimiter, quoting=csv.QUOTE_MINIMAL):
    """Return the rows of a table whose first line names the columns."""
    with reading(path, "a table of cells"):
        rows = list(csv.DictReader(io.StringIO(text), delimiter=delimiter, quoting=quoting,
                                   strict=True, restval=""))
        for k, row in enumerate(rows, 1):
            # The key of cells that have no column.
            if None in row:
                raise ValueError(f"row {k} has more cells than there are columns")
    return rows


def is_coco(path):
    """Tell whether a file is COCO's: one object with `annotations`, and not JSONL."""
    if path.suffix != ".json":
        return False
    with open(path, "rb") as lines:
        first = lines.readline().rstrip()
    return b'"annotations"' in first or not first.endswith(b"}")


def read_coco(path):
    """Return COCO's captions as {id of an image: row}.

    A row is {"prompt", "name", "file"}; `name` is the file's, without suffix. The caption with
    the smallest id that has a word is the image's prompt. Raises UserError.
    """
    data = read_json(path, "COCO's captions")
    rows = {}
    with reading(path, "COCO's captions"):
        for image in data["images"]:
            file = image["file_name"]
            rows[image["id"]] = {"prompt": "", "name": Path(file).stem, "file": file}
        for annotation in sorted(data["annotations"], key=operator.itemgetter("id")):
            row = rows[annotation["image_id"]]
            if not re.search(r"\w", row["prompt"]):
                row["prompt"] = annotation["caption"].strip()
    return rows


# --------------------------------------------------------------------------------------
# A file that ranks make together

def write_together(out, settings, items, unit, rows_of):
    """Make OUT, JSONL, with a row for each of `items`; return whether it is complete.

    rows_of(items) yields their rows; those with a "reason" are skipped ones. It is called,
    and loads its model, only where rows are missing. `unit` rows are a file in OUT.parts,
    from which a killed command goes on. Raises UserError.
    """
    parts = Path(f"{out}.parts")
    record = Path(f"{out}.settings")
    skipped = Path(str(out).removesuffix(".jsonl") + ".skipped.jsonl")
    units = {f"{k:05d}.jsonl": some for k, some in enumerate(in_batches(items, unit))}

    def rows_of_all(missing):
        return rows_of(list(itertools.chain(*missing)))

    # Our record comes before our OUT.
    if os.path.lexists(out) and not record.exists():
        refuse_to_replace(out)
    try:
        if not has_content(out):
            # Beside our record, they are of an OUT that was deleted.
            products = () if record.exists() else (skipped,)
            if not make_rows(parts, settings, units, rows_of_all, products):
                return False
            # Before OUT, which is the sign that all is done.
            write_json(record, settings)
            join_rows(parts, units, out, skipped)
    except (UserError, FileNotFoundError):
        # Two ranks that end together both join the units. What one of them then misses, the
        # other has joined and removed: OUT is there.
        if not has_content(out):
            raise

    refuse_other_settings(out, read_json(record, "the settings of captions"), settings)
    shutil.rmtree(parts, ignore_errors=True)
    print(f"{out}: complete")
    return True


# --------------------------------------------------------------------------------------

def main(argv=None):
    parser = Options(__doc__)
    commands = parser.add_subparsers(required=True, metavar="{aio,llava,extend}")

    def sub_command(name, function, model=None):
        sub = commands.add_parser(name, description=__doc__)
        sub.set_defaults(function=function)
        sub.add("--out", "the file of captions to make, JSONL", kind=Path, required=True)
        if model:
            sub.add("--model", "hub id or folder", model)
            sub.add("--batch-size", "pictures or prompts that are asked about at once", 32, BATCH_SIZE)
            sub.add("--max-new-tokens", "longest answer", 200, COUNT)
        return sub

    sub = sub_command("aio", aio)
    sub.add("--images", "folder of photos: <class>/<file>", required=True)
    sub.add("--class-names", "LOC_synset_mapping.txt or imagenet_class_index.json, if folders "
            "are WordNet ids")

    sub = sub_command("llava", llava, "llava-hf/llama3-llava-next-8b-hf")
    sub.add("--images", "folder of photos (or of composites: --cutmix's own)")
    sub.add("--cutmix", "cutmix.jsonl: caption its composites")
    sub.add("--captioned", "files of captions that exist already", [], nargs="+")
    sub.add("--workers", "threads that decode pictures; 0: none", 8, THREADS)
    sub.flag("--no-prune", "show all five views: transformers' own path")

    sub = sub_command("extend", extend, "meta-llama/Llama-3.1-8B-Instruct")
    sub.add("--prompts", "text, JSONL, CSV, TSV; a folder of .txt; COCO's captions_val2014.json",
            required=True)
    sub.add("--limit", "only so many of them", kind=COUNT)
    sub.add("--seed", "chooses the prompts of --limit", 0, SEED)
    sub.add("--attempts", "times to ask before it stays short", 3, COUNT)
    args = parser.parse_args(argv)
    args.function(args)


if __name__ == "__main__":
    command_line(main)
