"""Stage 0, the toy paper: a toy ImageNet that is drawn, and the whole method run on it in minutes.

    python -m toy

The world: 64 x 64 pictures of one class each, which is a shape: one large object, several
smaller ones, or both. Colours, sizes and backgrounds vary and are not in the class
name, as with ImageNet's photos. The stages are the real ones, each command is printed
before it runs. Four things stand in for what a laptop cannot run: a captioner that knows
what was drawn (for LLaVA), a small autoencoder (for Stable Diffusion's), a tiny random
T5, and a detector without a network (for Mask2Former). Ends with a miniature GenEval and
OUT/report.html. Killed, it goes on with the same command.

`python -m toy tables` runs the paper's experiments, `python -m toy play` lets you type
prompts; `--help` behind them says more. `python -m toy.tiny` is the method on one page.
"""

from pathlib import Path

# First: it keeps Ctrl-C quiet while torch is imported.
from common import COUNT, SEED, Options, number, only_command

from toy.data import bind, draw_world, encode_world, make_prompts_and_encoder, run
from toy.recipe import IMAGES, PROMPTS, STEPS, Variant, model_commands
from toy.report import about_the_data, report
from toy.world import SHAPES

# With fewer there is little to be mixed.
PICTURES = number(int, 2 * len(SHAPES))


def add_options(parser, out, prompts):
    """Add the options that `python -m toy` and its tables have in common."""
    add = parser.add
    add("--out", "folder where everything goes", out, Path)
    add("--images", "pictures to draw; as many composites are made", IMAGES, PICTURES)
    add("--steps", "training steps of every model", STEPS, COUNT)
    add("--prompts", "prompts for each of the six tasks", prompts, COUNT)
    add("--seed", "of the world, the training and the samples; of several models the first one",
        0, SEED)


def main(argv=None):
    parser = Options(__doc__, prog="python -m toy")
    add_options(parser, "out/toy", PROMPTS)
    args = parser.parse_args(argv)
    out = args.out
    with only_command(out):
        # What fixes the data. The number of steps does not.
        bind(out / "toy.json",
             images=args.images, prompts=args.prompts, seed=args.seed)

        # Stages 1 to 3: composites, captions, latents and tokens.
        draw_world(out, args.images, args.seed)
        make_prompts_and_encoder(out, args.prompts, args.seed)
        model = Variant(setting="all")
        for world, kind in model.data():
            encode_world(out / world, kind, out / "t5")

        # Stage 4: Algorithm 1. Stages 5 and 6: samples and scores.
        for command in model_commands(model, out, out / "dit", args.steps, args.seed):
            run(command)

        title = "How far can we go with a toy ImageNet? One DiT-I, TA + IA"
        rows = report(out, title, most=12,
                      more=about_the_data(out))
        print()
        # For those who stay in the terminal.
        for row in rows:
            print("".join(f"{word:>15}" for word in row))
        print(f"\n{out / 'report.html'}")
