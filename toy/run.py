"""Stage 0, the toy paper: a toy ImageNet that is drawn, and the whole method run on it in minutes.

    python -m toy

The world: 64 x 64 pictures of one centred, frame-filling object. Its class is its shape; colour, size and
background vary and are not in the class name, as with ImageNet's photos. The stages are the real ones, each
command is printed before it runs. Only three things stand in for what a laptop cannot run: a captioner that
knows what was drawn (for LLaVA), a small autoencoder (for Stable Diffusion's) and a tiny random T5. Ends with
a miniature GenEval and OUT/report.html. Killed, it goes on with the same command.
"""

import argparse
import shlex
from pathlib import Path

import numpy as np

import caption
import cutmix
import encode
import sample
import train
from common import HelpFormatter, UserError, begin_or_resume, complete, read_jsonl
from toy.autoencoder import VAE, train_vae
from toy.report import TAU, report, score
from toy.world import SHAPES, SIZE, TASKS, make_captions, make_prompts, make_text_encoder, make_world


def run(stage, command):
    """Prints a stage's command as a user would type it, and runs it."""
    words = shlex.split(command)
    print(f"\n$ python {stage.__name__}.py {shlex.join(words)}", flush=True)
    stage.main(words)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--out", default="out/toy", metavar="FOLDER", help="where everything goes")
    add("--images", type=int, default=6000, help="pictures to draw; as many composites are made")
    add("--steps", type=int, default=4500, help="training steps")
    add("--prompts", type=int, default=32, help="prompts for each of the six tasks")
    add("--seed", type=int, default=0, help="of the world, the training and the samples")
    add("--train-vae", type=float, metavar="MINUTES", help="only train the autoencoder in toy/weights again")
    args = parser.parse_args(argv)
    if args.train_vae:
        return train_vae(VAE, args.train_vae)
    if args.images < 2 * len(SHAPES) or args.steps < 1 or args.prompts < 1:
        raise UserError(f"--images must be at least {2 * len(SHAPES)}, --steps and --prompts at least 1")
    out, seed = Path(args.out), args.seed
    settings = {"images": args.images, "prompts": args.prompts, "seed": seed}
    begin_or_resume(out / "toy.json", out, settings)
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
