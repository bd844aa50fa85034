"""The toy's data: a world is drawn, mixed, captioned and encoded by the real stages.

A world is a folder with images/, captions.jsonl (long ones), captions-aio.jsonl, and for
every setting of CutMix that was asked for cutmix*/, captions-cutmix*.jsonl and, encoded,
encoded-cutmix*/.
"""

import importlib
import json
import shlex

# First: it keeps Ctrl-C quiet while torch is imported.
from common import (UserError, complete, read_json, read_jsonl, refuse_other_settings,
                    write_json)

from toy.prompts import make_prompts
from toy.recipe import VAE, kind_of, quoted
from toy.text_encoder import make_text_encoder
from toy.world import SIZE, caption_composites, make_world, what_a_world_is_made_by


def run(command):
    """Print the command line of a stage as a user would type it, and run it in this process."""
    print(f"\n$ python {command}", flush=True)
    # Its first word is "train.py", or "toy.score" in place of "-m toy score".
    stage, *options = shlex.split(command.replace("-m toy ", "toy."))
    importlib.import_module(stage.removesuffix(".py")).main(options)


def bind(path, **settings):
    """Remember in a file what its folder is made with.

    Raises UserError if it was made with other settings, or holds somebody's own files.
    """
    folder = path.parent
    # As JSON gives them back: a tuple becomes a list.
    settings = json.loads(json.dumps({**settings, **what_a_world_is_made_by()}))
    if path.exists():
        refuse_other_settings(folder, read_json(path, "the settings of a toy"), settings)
    elif list(folder.glob("[!.]*")):
        raise UserError(f"{folder}: holds files, and not the toy's: choose another --out")
    write_json(path, settings)


def draw_world(world, count, seed, settings=("all",)):
    """Draw `count` originals, and as many composites for each setting, all with captions."""
    print(f"A toy ImageNet of {count} pictures in {world}, drawn", flush=True)
    images = quoted(world / "images")
    # Originals come first: composites are mixed from them.
    make_world(world, count, seed)
    run(f"caption.py aio --images {images} --out {quoted(world / 'captions-aio.jsonl')}")

    # Each setting gets a folder of its own, since Table 4 trains a model on each.
    for setting in settings:
        kind = kind_of(setting)
        out = quoted(world / kind.removeprefix("-"))
        run(f"cutmix.py --images {images} --size {SIZE} --seed {seed} --setting {setting} "
            f"--out {out} --workers 0")
        caption_composites(world, kind, seed)


def make_prompts_and_encoder(out, prompts, seed):
    """Write short and long prompts, `prompts` of each task, and a tiny T5 that knows all words."""
    make_prompts(out, prompts, seed)
    # Encoded captions rest on this T5, so one that exists is kept.
    if (out / "t5").exists():
        return

    # A word missing from these texts would be unknown to the tokenizer,
    # so the prompts are among them. Captions and prompts have other keys.
    texts = []
    for name in ("captions", "captions-cutmix", "captions-aio",
                 "prompts-short", "prompts-long"):
        for row in read_jsonl(out / f"{name}.jsonl"):
            texts.append(row.get("caption") or row["prompt"])
    # A folder that bears its final name is whole, which the check above relies on.
    with complete(out / "t5") as folder:
        make_text_encoder(folder, texts, seed)


def encode_world(world, kind, text_encoder):
    """Encode pictures of a world to encoded`kind`, with their captions in captions`kind`.jsonl.

    kind: "" for originals, "-aio" for originals with AIO captions, "-cutmix", ... for
    composites.
    """
    images = kind.removeprefix("-") if "cutmix" in kind else "images"
    # The pictures are so small that threads would cost more than they save.
    run(f"encode.py --images {quoted(world / images)} "
        f"--captions {quoted(world / f'captions{kind}.jsonl')} "
        f"--out {quoted(world / f'encoded{kind}')} --vae {quoted(VAE)} "
        f"--text-encoder {quoted(text_encoder)} --size {SIZE} --workers 0")
