"""Stage 2, text augmentation (paper 3.1, Appendix B): pictures get captions, short prompts become long ones.

    python caption.py llava --images imagenet/train --out captions.jsonl

aio     'An image of a <class-name>', the baseline: says what, but not how many, which colour or where.
llava   a long caption of every photo, or (--cutmix cutmix-all/cutmix.jsonl) of every composite, from LLaVA-NeXT,
        which is shown only the parts of the picture that matter: fewer tokens, 2.7 times the speed in the paper.
extend  short prompts become long ones, so that a model trained on long captions is asked what it understands.

OUT grows line by line and in order; killed, it goes on with the same command. Under torchrun, or with RANK and
WORLD_SIZE set, each rank writes OUT.<rank>of<world>, and the last to end joins them. Pictures without a caption
are in <OUT less .jsonl>.skipped.jsonl, with the reason. Options: `python caption.py llava --help`.
"""

import argparse
import json
import math
import os
import re
import time
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

import cutmix
from cutmix import UserError, class_of, complete, read_jsonl

# Appendix B, word for word
PROMPT = "Describe this image"
PROMPT_CUTMIX = ("Describe this image. Consider all the objects in the picture. Describe them, describe their "
                 "position and their relation. Do not consider the image as a composite of images. "
                 "The image is a single scene image")


# ---------------------------------------------------------------------------------------------------------------
# Captions on disk

def read_captions(path):
    """captions.jsonl, or the .tsv of the paper's own captioner (file without its folder) -> {file: caption}.

    Raises UserError, with its number, for a line without file or caption, or a file with two captions."""
    if Path(path).suffix == ".tsv":
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8'}")
        torn = lines.pop()                              # empty, unless a kill tore the last line
        rows = [line.rstrip("\r").partition("\t") for line in lines + [torn] * ("\t" in torn)]
        rows = [(file, caption.strip()) for file, _, caption in rows if file or caption]
    else:
        rows = [(row.get("file"), row.get("caption")) for row in read_jsonl(path)]
    captions = {}
    for number, (file, caption) in enumerate(rows, 1):
        if not (isinstance(file, str) and isinstance(caption, str) and file and caption):
            raise UserError(f"{path}, caption {number}: needs a file and a caption")
        if captions.setdefault(file, caption) != caption:
            raise UserError(f"{path}, caption {number}: {file} had another caption before (a name in two "
                            f"folders? then the captions must name the folder too)")
    return captions


def whole_lines(lines):
    """(row, offset of its end) of each line of a JSONL file opened in binary, up to a torn one."""
    offset = 0
    for line in lines:
        if not line.endswith(b"\n"):
            return
        offset += len(line)
        yield json.loads(line), offset


def finished(paths, batches, key, name):
    """How far an earlier run came, from its captions and skipped files -> (whole batches, their bytes in each).

    A batch is done as a whole or again: a caption may depend, in the last bits, on what it is batched with."""
    done, at = (0, [0, 0]), [0, 0]
    with ExitStack() as stack:
        streams = [whole_lines(stack.enter_context(open(path, "rb")) if path.exists() else ()) for path in paths]
        heads = [next(stream, None) for stream in streams]
        for b, batch in enumerate(batches):
            for item in batch:
                k = next((k for k in (0, 1) if heads[k] and heads[k][0].get(key) == name(item)), None)
                if k is None:
                    if heads[0]:
                        raise UserError(f"{paths[0]}: has {heads[0][0].get(key)!r} where {name(item)!r} belongs, "
                                        f"it was begun with another list: use another --out, or delete it")
                    return done
                at[k], heads[k] = heads[k][1], next(streams[k], None)
            done = b + 1, list(at)
    return done


def grow(out, items, batch_size, key, produce, unit, name=lambda item: item):
    """Appends one line for each item to `out`, in order, and goes on where an earlier run was killed.

    `produce(batches)` yields, for each batch of items, their rows: {key: name(item), ...}, with a "reason" if the
    row belongs to the skipped file. Returns whether `out` is complete; if not, other ranks still work on it."""
    rank, world = cutmix.rank_and_world()
    batches = [items[i:i + batch_size] for i in range(0, len(items), batch_size)]
    finals = [out, out.with_suffix(".skipped.jsonl")]
    parts = [[path.with_name(f"{path.name}.{r}of{world}") for path in finals] for r in range(world)]
    out.parent.mkdir(parents=True, exist_ok=True)
    for other in out.parent.glob(f"{out.name}.*of*"):
        if not other.name.endswith(f"of{world}"):
            raise UserError(f"{other}: begun with another number of ranks: go on with as many, or delete it")
    if world == 1:
        parts = [finals]
    elif out.exists():
        if finished(finals, batches, key, name)[0] < len(batches):
            raise UserError(f"{out}: begun by a single process: finish it with one, or delete it")
        return True

    mine = batches[rank::world]
    whole, sizes = finished(parts[rank], mine, key, name)
    total, before = sum(map(len, mine)), sum(map(len, mine[:whole]))
    with ExitStack() as stack:
        files = [stack.enter_context(open(path, "ab")) for path in parts[rank]]
        for file, size in zip(files, sizes):
            file.truncate(size)                         # cuts off a torn line, or half a batch
        bar = stack.enter_context(tqdm(total=total, initial=before, desc=out.stem, unit=unit, disable=rank > 0))
        for rows in produce(mine[whole:]) if whole < len(mine) else ():
            for file, skipped in zip(files[::-1], (True, False)):       # `finished` wants captions never ahead
                lines = [json.dumps(row) + "\n" for row in rows if ("reason" in row) == skipped]
                file.write("".join(lines).encode())
                file.flush()
            bar.update(len(rows))
    if world == 1:
        return True
    if any(finished(parts[r], batches[r::world], key, name)[0] < len(batches[r::world]) for r in range(world)):
        print(f"rank {rank}: its share is done; the last rank to end writes {out}")
        return False
    return join(finals, parts, batches, key, name)


def join(finals, parts, batches, key, name):
    """The ranks' parts, batch by batch in turn -> the files that a single process would have written."""
    with ExitStack() as stack:
        try:
            opened = [[stack.enter_context(open(path, "rb")) for path in pair] for pair in parts]
        except FileNotFoundError:                       # another rank ended at the same moment, and joined them
            return finals[0].exists()
        streams = [[whole_lines(file) for file in pair] for pair in opened]
        heads = [[next(stream, None) for stream in pair] for pair in streams]
        targets = [stack.enter_context(open(stack.enter_context(complete(path)), "w")) for path in finals]
        for b, batch in enumerate(batches):
            r = b % len(parts)
            for item in batch:
                k = next(k for k in (0, 1) if heads[r][k] and heads[r][k][0].get(key) == name(item))
                targets[k].write(json.dumps(heads[r][k][0]) + "\n")
                heads[r][k] = next(streams[r][k], None)
    for pair in parts:
        for path in pair:
            path.unlink(missing_ok=True)
    return True


# ---------------------------------------------------------------------------------------------------------------
# aio: 'An image of a <class-name>' (paper 3.1)

def class_names(folders, table=None):
    """Names of class folders -> {folder: class name in words}.

    `table`: LOC_synset_mapping.txt ('n01440764 tench, Tinca tinca', the first name counts) or
    imagenet_class_index.json ({"0": ["n01440764", "tench"], ...}); without it folders are named after the class.
    Raises UserError for a folder that the table does not have, or whose name is a WordNet id."""
    names = {}
    try:
        text = Path(table).read_text(encoding="utf-8") if table else ""
        if table and Path(table).suffix == ".json":
            names = {synset: name for synset, name in json.loads(text).values()}
        else:
            lines = [line.split(None, 1) for line in text.splitlines() if line.strip()]
            names = {synset: words.split(",")[0] for synset, words in lines}
    except OSError as error:
        raise UserError(f"{table}: {error.strerror}")
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{table}: neither lines 'n01440764 tench, Tinca tinca' nor a JSON object of such pairs")
    for folder in folders:
        if table and folder not in names:
            raise UserError(f"{table}: has no class {folder!r}")
        if not table and re.fullmatch(r"n\d{8}", folder):
            raise UserError(f"class folder {folder} is a WordNet id: say what it means with --class-names "
                            f"LOC_synset_mapping.txt")
    return {folder: names.get(folder, folder).replace("_", " ").strip() for folder in folders}


def aio_caption(class_name):
    """'An image of a tench', 'An image of an umbrella', 'An image of a unicycle', 'An image of an hourglass'."""
    vowel = re.match(r"[aeiou]|hour|heir|hono|hones|[fhlmnrsx]-", class_name, re.IGNORECASE)
    y_or_w = re.match(r"eu|ew|uni(?![mn])|us[eu]|ut[ei]|ub[io]|uk|ur[aeio]|u-|onc?e\b", class_name, re.IGNORECASE)
    return f"An image of {'an' if vowel and not y_or_w else 'a'} {class_name}"


def aio(args):
    files = cutmix.list_images(args.images)
    if flat := next((file for file in files if not class_of(file)), None):
        raise UserError(f"{args.images}: {flat} is in no class folder, so its class is unknown")
    names = class_names(sorted(set(map(class_of, files))), args.class_names)
    if cutmix.rank_and_world()[0] == 0:                        # seconds for a million: nothing to share
        with complete(args.out) as temporary, open(temporary, "w") as lines:
            lines.writelines(json.dumps({"file": file, "caption": aio_caption(names[class_of(file)])}) + "\n"
                             for file in tqdm(files, desc="aio", unit="captions"))
        print(f"{len(files)} captions of {len(names)} classes in {args.out}")


# ---------------------------------------------------------------------------------------------------------------
# llava: long captions, with the visual tokens pruned (paper 4.1)

def kept_patches(setting, box, size):
    """The views of a composite that LLaVA is shown: 0 = whole image, 1..4 = quadrants, row by row.

    A photo (setting None) and 1/2 need only the whole: both things are large. Otherwise also the quadrant that
    holds most of the small one, or those, at a tie. `box` in pixels of the composite of side `size`."""
    if setting in (None, "1/2"):
        return [0]
    x0, y0, x1, y1 = (2 * v for v in box)               # doubled: the middle of an odd size is not a whole pixel
    overlap = [max(0, min(x1, x + size) - max(x0, x)) * max(0, min(y1, y + size) - max(y0, y))
               for y in (0, size) for x in (0, size)]
    return [0] + [1 + k for k in range(4) if overlap[k] == max(overlap)]


def image_tokens(features, kept, newline):
    """What stands for a picture in the language model's input: LLaVA-NeXT's packing, without what is not kept.

    features (views, P * P, D), of the kept views in order; newline (D,) ends each row of the 2 x 2 grid.
    All five views give transformers' own sequence, 5 P^2 + 2 P tokens (2,928). The whole alone gives P^2 + 1 (577),
    which is how transformers packs a picture of one view; a quadrant beside it P (P + 1) more (600)."""
    import torch
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
    """Views (V, 3, H, W) -> (V, P * P, D): vision tower, projector; as LlavaNextModel.get_image_features does."""
    import torch
    layers, inner = model.config.vision_feature_layer, model.model
    hidden = inner.vision_tower(pixels, output_hidden_states=True).hidden_states
    features = hidden[layers] if isinstance(layers, int) else torch.cat([hidden[k] for k in layers], dim=-1)
    if model.config.vision_feature_select_strategy == "default":
        features = features[:, 1:]                      # without the class token
    return inner.multi_modal_projector(features)


def embed(model, pixels, kept, prompt):
    """B pictures -> inputs_embeds (B, L, D) and attention_mask (B, L), padded on the left.

    pixels: list of (views, 3, H, W); kept: list of kept_patches; prompt: token ids, one of them the image's."""
    import torch
    table, device = model.get_input_embeddings(), model.device
    features = view_features(model, torch.cat(pixels).to(device, model.dtype)).split([len(p) for p in pixels])
    text = table(torch.tensor(prompt, device=device))                                       # (T, D)
    k = prompt.index(model.config.image_token_id)
    rows = [torch.cat([text[:k], image_tokens(f, views, model.model.image_newline).to(text.dtype), text[k + 1:]])
            for f, views in zip(features, kept)]
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


class Pictures:
    """Batches of pictures for a DataLoader, whose workers decode them: [k] -> (pixels, kept, errors), lists."""

    def __init__(self, batches, where, processor, side, prune):
        self.batches, self.where, self.processor, self.side, self.prune = batches, where, processor, side, prune

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, k):
        pixels, kept, errors = [], [], []
        for file in self.batches[k]:
            path, setting, box = self.where(file)
            try:
                image = cutmix.open_image(path, 2 * self.side)
            except OSError as error:
                errors.append(str(error).removeprefix(f"{path}: "))
                continue
            # Shown smaller, a picture would get a grid of two tiles, one of them padding: the five views that
            # the paper counts exist only on the 2 x 2 grid.
            views = self.processor(images=cutmix.fit(image, self.side), return_tensors="pt")["pixel_values"][0]
            kept.append(kept_patches(setting, box, min(image.size)) if self.prune else list(range(5)))
            pixels.append(views[kept[-1]])              # (views, 3, H, W); the others never reach the vision tower
            errors.append(None)
        return pixels, kept, errors


def load(model_class, name):
    """A model and its processor or tokenizer, by hub id or folder, on this rank's device. Raises UserError."""
    import torch
    import transformers
    device, dtype = "cpu", torch.float32
    if torch.cuda.is_available():
        device, dtype = f"cuda:{os.environ.get('LOCAL_RANK', '0')}", torch.bfloat16
    auto = transformers.AutoProcessor if "Llava" in model_class else transformers.AutoTokenizer
    try:
        kind = transformers.AutoConfig.from_pretrained(name).model_type
        if "Llava" in model_class and kind != "llava_next":
            raise UserError(f"--model {name}: is a {kind!r} model, not LLaVA-NeXT")
        processor = auto.from_pretrained(name)
        model = getattr(transformers, model_class).from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name}: cannot be loaded ({str(error).splitlines()[0]})")
    if not processor.chat_template:
        raise UserError(f"--model {name}: has no chat template, so it cannot be asked")
    return model.to(device).eval(), processor


def answer(model, tokenizer, embeds_or_ids, mask, max_new_tokens):
    """Greedy answers, as text. embeds (B, L, D) or ids (B, L); mask (B, L); padded on the left."""
    import torch
    ids = embeds_or_ids.dim() == 2
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.inference_mode():                        # greedy: the models' own settings would sample
        out = model.generate(**{"input_ids" if ids else "inputs_embeds": embeds_or_ids}, attention_mask=mask,
                             do_sample=False, temperature=None, top_p=None, top_k=None,
                             max_new_tokens=max_new_tokens, pad_token_id=pad)
    return tokenizer.batch_decode(out[:, embeds_or_ids.shape[1] if ids else 0:], skip_special_tokens=True)


def llava(args):
    import torch
    rows = read_jsonl(args.cutmix) if args.cutmix else []
    folder = args.images or (str(Path(args.cutmix).parent) if args.cutmix else None)
    if folder is None:
        raise UserError("needs --images, or --cutmix")
    for number, row in enumerate(rows, 1):
        if not {"file", "setting", "box"} <= row.keys():
            raise UserError(f"{args.cutmix} line {number}: not a composite (no file, setting or box)")
    cuts = {row["file"]: (row["setting"], tuple(row["box"])) for row in rows}
    files = list(cuts) if args.cutmix else cutmix.list_images(folder)
    del rows

    model, processor = load("LlavaNextForConditionalGeneration", args.model)
    side, tokenizer = 2 * model.config.vision_config.image_size, processor.tokenizer
    if [side, side] not in [list(point) for point in model.config.image_grid_pinpoints]:
        raise UserError(f"--model {args.model}: no 2 x 2 grid ({side} x {side}) among its image_grid_pinpoints")
    content = [{"type": "image"}, {"type": "text", "text": PROMPT_CUTMIX if args.cutmix else PROMPT}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=not text.startswith(tokenizer.bos_token or "\0"))["input_ids"]
    if prompt.count(model.config.image_token_id) != 1:
        raise UserError(f"--model {args.model}: its chat template does not show the picture exactly once")

    def produce(batches, prune=not args.no_prune):
        pictures = Pictures(batches, lambda file: (f"{folder}/{file}", *cuts.get(file, (None, None))),
                            processor.image_processor, side, prune)
        workers = min(args.workers, len(batches))
        loader = torch.utils.data.DataLoader(pictures, batch_size=None, num_workers=workers)
        for batch, (pixels, kept, errors) in zip(batches, loader):
            with torch.inference_mode():
                said = iter(answer(model, tokenizer, *embed(model, pixels, kept, prompt), args.max_new_tokens)
                            if pixels else [])
            yield [{"file": file, "reason": error} if error
                   else {"file": file, "caption": caption} if (caption := whole_sentences(next(said)))
                   else {"file": file, "reason": "the model said nothing"} for file, error in zip(batch, errors)]

    if args.benchmark:
        speed = {}
        batches = [files[k * args.batch_size:(k + 1) * args.batch_size] for k in range(args.benchmark + 1)]
        if not batches[1]:
            raise UserError(f"--benchmark needs more than one batch, there are {len(files)} pictures")
        for prune in (True, False):
            work = produce(batches, prune)
            next(work)                                  # warms up
            start = time.perf_counter()
            for _ in tqdm(work, total=len(batches) - 1, desc="with" if prune else "without", unit="batches"):
                pass
            speed[prune] = sum(map(len, batches[1:])) / (time.perf_counter() - start)
            print(f"{'with' if prune else 'without'} pruning {speed[prune]:8.2f} captions/s")
        print(f"pruning makes it {speed[True] / speed[False]:.2f} times as fast")
    elif grow(args.out, files, args.batch_size, "file", produce, "captions"):
        report(args.out)


def report(out):
    captions, skipped = (path.read_bytes().count(b"\n") for path in (out, out.with_suffix(".skipped.jsonl")))
    print(f"{captions} captions in {out}, {skipped} skipped" + f" ({out.stem}.skipped.jsonl)" * bool(skipped))


# ---------------------------------------------------------------------------------------------------------------
# extend: short prompts in the style of the training captions (Appendix B)

INSTRUCTION = """\
You turn a short prompt into one detailed caption of an image, of three to five plain sentences, such as 'The image \
features a red apple on a wooden table. The apple is in the centre of the image, and its skin is smooth and shiny. \
The background is a blurred kitchen with soft light.' Keep every object, number, colour and position of the prompt, \
in the same words, and add no other objects of these kinds. Answer with the caption only."""
IDLE = {"a", "an", "the", "of", "and", "or", "with", "in", "on", "at", "to", "is", "are", "photo", "image"}
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def forms(word):
    """A word and what it may be the plural of, with numbers as digits: knives -> knives, knive, kniv, knif, knife."""
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
        try:
            lines = Path(args.prompts).read_text(encoding="utf-8").split("\n")
            rows = [{"prompt": line.strip()} for line in lines if line.strip()]
        except OSError as error:
            raise UserError(f"{args.prompts}: {error.strerror}")
    for number, row in enumerate(rows, 1):
        if not (isinstance(row.get("prompt"), str) and row["prompt"]):
            raise UserError(f"{args.prompts} line {number}: no prompt")
    if not rows:
        raise UserError(f"{args.prompts}: no prompts in it")
    model, tokenizer = load("AutoModelForCausalLM", args.model)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.pad_token or tokenizer.eos_token, "left"

    def produce(batches):
        for batch in batches:
            long = {}
            chats = {row["prompt"]: [{"role": "user", "content": f"{INSTRUCTION}\n\n{row['prompt']}"}]
                     for row in batch}
            for _ in range(args.attempts):
                asked = [prompt for prompt in chats if prompt not in long]
                if not asked:
                    break
                inputs = tokenizer.apply_chat_template([chats[prompt] for prompt in asked], padding=True,
                                                       add_generation_prompt=True, return_tensors="pt",
                                                       return_dict=True).to(model.device)
                answers = answer(model, tokenizer, inputs["input_ids"], inputs["attention_mask"],
                                 args.max_new_tokens)
                for prompt, said in zip(asked, answers):
                    caption = whole_sentences(said).strip("\"'“”")
                    if caption and not (lost := missing_words(prompt, caption)):
                        long[prompt] = caption
                    elif caption:                       # greedy: it would repeat itself if not told what is wrong
                        chats[prompt] += [{"role": "assistant", "content": said},
                                          {"role": "user", "content": f"Say it again with: {', '.join(lost)}"}]
            yield [{**row, "prompt": long.get(row["prompt"], row["prompt"]), "short_prompt": row["prompt"]}
                   for row in batch]

    if grow(args.out, rows, args.batch_size, "short_prompt", produce, "prompts", lambda row: row["prompt"]):
        short = [row["prompt"] for row in read_jsonl(args.out) if row["prompt"] == row["short_prompt"]]
        print(f"{len(rows)} prompts in {args.out}, {len(short)} of them kept short", *short[:10], sep="\n  ")


# ---------------------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cutmix.Help)
    stages = parser.add_subparsers(dest="stage", required=True, metavar="{aio,llava,extend}")

    def stage(name, function):
        sub = stages.add_parser(name, help=function.__doc__, description=__doc__, formatter_class=cutmix.Help)
        sub.set_defaults(function=function)
        return sub.add_argument

    add = stage("aio", aio)
    add("--images", required=True, metavar="FOLDER", help="<class>/<file>")
    add("--class-names", metavar="FILE",
        help="LOC_synset_mapping.txt or imagenet_class_index.json, if the folders are WordNet ids")
    add("--out", type=Path, required=True, metavar="FILE", help="captions.jsonl")

    add = stage("llava", llava)
    add("--images", metavar="FOLDER", help="photos (or composites: the folder of --cutmix)")
    add("--cutmix", metavar="FILE", help="cutmix.jsonl: caption composites, and look where the second photo is")
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
        help="text, a prompt a line, or JSONL with a 'prompt' a row, such as GenEval's evaluation_metadata.jsonl")
    add("--out", type=Path, required=True, metavar="FILE", help="JSONL: the rows with long prompts")
    add("--model", default="meta-llama/Llama-3.1-8B-Instruct", help="hub id or folder of a chat model")
    add("--batch-size", type=int, default=32, help="prompts at once")
    add("--max-new-tokens", type=int, default=200, help="longest answer")
    add("--attempts", type=int, default=3, help="how often it is asked before the prompt stays short")

    args = parser.parse_args(argv)
    for name in ("batch_size", "max_new_tokens", "attempts"):
        if getattr(args, name, 1) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    args.function(args)


if __name__ == "__main__":
    cutmix.command_line(main)
