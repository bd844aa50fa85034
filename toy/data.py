"""The toy's data: a world is drawn, mixed, captioned and encoded by the real stages.

A world is a folder with images/, captions.jsonl (long ones), captions-aio.jsonl, and for every
setting of CutMix that was asked for cutmix*/, captions-cutmix*.jsonl and, encoded, encoded-cutmix*/.
"""

import shlex
from pathlib import Path

import caption
import cutmix
import encode
from common import complete, read_jsonl
from toy.autoencoder import VAE
from toy.prompts import make_prompts
from toy.text_encoder import make_text_encoder
from toy.world import SIZE, caption_composites, caption_originals, make_world


def run(stage, command):
    """Print a stage's command as a user would type it, and run it."""
    # The stage gets the very words that are printed, so that a user can run them alone.
    words = shlex.split(command)
    print(f"\n$ python {stage.__name__}.py {shlex.join(words)}", flush=True)
    stage.main(words)


def quoted(path):
    """Return a path as a shell wants it, relative to the working folder if it lies in it."""
    path = Path(path)
    # Short paths make the printed commands readable.
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())

    return shlex.quote(str(path))


def composites_of(setting):
    """Return the name of the folder of composites: cutmix for all settings, cutmix-1-4 for 1/4."""
    # A setting such as 1/4 has a slash, which a folder's name cannot have.
    return "cutmix" if setting == "all" else f"cutmix-{setting.replace('/', '-')}"


def draw_world(world, count, seed, settings=("all",)):
    """Draw `count` originals, and as many composites for each setting, all with captions."""
    print(f"A toy ImageNet of {count} pictures in {world}, drawn", flush=True)
    images = quoted(world / "images")
    # Originals come first: composites are mixed from them.
    make_world(world, count, seed)

    # Each setting gets a folder of its own, since Table 4 trains a model on each.
    for setting in settings:
        name = composites_of(setting)
        run(cutmix, f"--images {images} --size {SIZE} --seed {seed} --setting {setting} "
                    f"--out {quoted(world / name)} --workers 0")

    run(caption, f"aio --images {images} --out {quoted(world / 'captions-aio.jsonl')}")

    print("\nLong captions from the scenes, in LLaVA's stead", flush=True)
    caption_originals(world, seed)

    for setting in settings:
        name = composites_of(setting)
        caption_composites(world, name, f"captions-{name}.jsonl", seed)


def draw_noise(world, seed, tau):
    """Draw the world's noise strips, the paper's Fig. 7, with a line where t passes tau."""
    run(cutmix, f"--images {quoted(world / 'images')} --size {SIZE} --seed {seed} "
                f"--out {quoted(world / 'cutmix-look')} --noise --tau {tau}")


def make_prompts_and_encoder(out, prompts, seed):
    """Write short and long prompts, `prompts` of each task, and the tiny T5 that knows all words."""
    make_prompts(out, prompts, seed)

    # Encoded captions rest on this T5, so one that exists is kept.
    if (out / "t5").exists():
        return

    # A word missing from these texts would be unknown to the tokenizer,
    # so the prompts are among them. Captions and prompts have other keys.
    texts = []
    for name in ("captions", "captions-cutmix", "captions-aio", "prompts-short", "prompts-long"):
        for row in read_jsonl(out / f"{name}.jsonl"):
            texts.append(row.get("caption") or row["prompt"])

    # A folder that bears its final name is whole,
    # which is what the check above relies on.
    with complete(out / "t5") as folder:
        make_text_encoder(folder, texts, seed)


def encode_world(world, images, captions, encoded, text_encoder):
    """Encode a folder of pictures of a world, with its captions."""
    # The pictures are so small that worker processes would cost more than they save.
    run(encode, f"--images {quoted(world / images)} --captions {quoted(world / captions)} "
                f"--out {quoted(world / encoded)} --vae {quoted(VAE)} "
                f"--text-encoder {quoted(text_encoder)} --size {SIZE} --workers 0")
