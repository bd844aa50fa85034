"""Stage 0, the toy paper: a toy ImageNet that is drawn, and the whole method run on it in minutes.

    python -m toy

The world: 64 x 64 pictures of one class each, which is a shape: mostly one large object, often several
smaller ones. Colours, sizes and backgrounds vary and are not in the class name, as with ImageNet's
photos. The stages are the real ones, each command is printed before it runs. Only three things stand
in for what a laptop cannot run: a captioner that knows what was drawn (for LLaVA), a small autoencoder
(for Stable Diffusion's) and a tiny random T5. Ends with a miniature GenEval and OUT/report.html.
Killed, it goes on with the same command.

`python -m toy tables` runs the paper's experiments, `python -m toy play` lets you type prompts;
`--help` behind them says more.
"""

import argparse
from pathlib import Path

import sample
import train
from common import HelpFormatter, at_least, begin_or_resume, between, only_command, write_jsonl
from toy.autoencoder import VAE, train_vae
from toy.data import draw_noise, draw_world, encode_world, make_prompts_and_encoder, quoted, run
from toy.estimate import OVERHEAD, data_seconds, sampling_seconds, spoken_time, training_seconds
from toy.prompts import TASKS
from toy.recipe import IMAGES, LARGEST_SEED, P, PROMPTS, STEPS, TAU, sample_command, train_command
from toy.report import report, score_rows
from toy.score import score
from toy.world import SHAPES, world_fingerprint


def estimate(images, steps, prompts):
    """Return the seconds that the whole run takes on this machine, by timing its parts."""
    # Each task has short and long prompts, and there is a composite for every original.
    pictures = 2 * len(TASKS) * prompts
    seconds = 2 * images * data_seconds()
    seconds += steps * training_seconds("dit")
    seconds += pictures * sampling_seconds("dit")

    return OVERHEAD * seconds


def main(argv=None):
    # Without abbreviations: "--train 5" must not replace the autoencoder's weights.
    parser = argparse.ArgumentParser(prog="python -m toy", description=__doc__, allow_abbrev=False,
                                     formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--out", default="out/toy", metavar="FOLDER", help="where everything goes")
    add("--images", type=int, default=IMAGES, help="pictures to draw; as many composites are made")
    add("--steps", type=int, default=STEPS, help="training steps")
    add("--prompts", type=int, default=PROMPTS, help="prompts for each of the six tasks")
    add("--seed", type=int, default=0, help="of the world, the training and the samples")
    add("--train-vae", type=float, metavar="MINUTES",
        help="only train the autoencoder in toy/weights again")
    args = parser.parse_args(argv)

    # The autoencoder's weights come with the project. Training them
    # again is another task, which needs none of the checks below.
    if args.train_vae is not None:
        at_least(args, train_vae=0.01)
        train_vae(VAE, args.train_vae)
        return

    # With a handful of pictures there is little to be mixed, and nothing to be learned.
    at_least(args, images=2 * len(SHAPES), steps=1, prompts=1)
    between(args, 0, LARGEST_SEED, "seed")

    with only_command(args.out):
        make_toy_paper(args)


def make_toy_paper(args):
    """Run all stages, and write the report."""
    out = Path(args.out)

    # These settings fix the data. The number of steps is not among them.
    settings = {"images": args.images, "prompts": args.prompts, "seed": args.seed,
                "drawing": world_fingerprint()}
    begin_or_resume(out / "toy.json", out, settings)
    # Timing the parts takes a while. After a complete run it would be of no use.
    if not (out / "report.html").exists():
        seconds = estimate(args.images, args.steps, args.prompts)
        print(f"From the beginning this takes {spoken_time(seconds)} here, most of it training.")

    # Stages 1 to 3: composites, captions, latents and tokens.
    draw_world(out, args.images, args.seed)
    draw_noise(out, args.seed, TAU)
    make_prompts_and_encoder(out, args.prompts, args.seed)
    encode_world(out, "images", "captions.jsonl", "encoded", out / "t5")
    encode_world(out, "cutmix", "captions-cutmix.jsonl", "encoded-cutmix", out / "t5")

    # Stage 4: Algorithm 1.
    checkpoint = quoted(out / "dit")
    run(train, train_command("dit", checkpoint, quoted(out / "encoded"), quoted(out / "encoded-cutmix"),
                             P, TAU, args.steps, args.seed))

    # Stages 5 and 6: samples and scores.
    scores = {}
    for kind in ("short", "long"):
        samples = out / f"samples-{kind}"
        prompts = quoted(out / f"prompts-{kind}.jsonl")
        run(sample, sample_command(checkpoint, prompts, quoted(samples), args.seed))
        # Scores are kept as files, too, so that a
        # verdict can be looked up without the page.
        scores[kind] = score(samples)
        write_jsonl(out / f"scores-{kind}.jsonl", scores[kind])

    report(out, scores)
    print()
    # The same table as on the page, for those who stay in the terminal.
    for row in score_rows(scores):
        print("".join(f"{word:>15}" for word in row))

    print(f"\n{out / 'report.html'}")
