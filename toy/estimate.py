"""How long the toy will take on this machine: its parts are timed for a moment, the rest is arithmetic."""

import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

import encode
import train
from common import UserError, complete
from metrics.speed import random_batch
from sample import MODELS
from toy.autoencoder import VAE, to_tensor
from toy.detector import detect
from toy.recipe import BATCH, P, SAMPLE_STEPS, TAU, train_command
from toy.world import draw, random_scene

CAPTION_TOKENS = 20         # about as many as the toy's long captions have
# A factor for what is not timed below: reading data for training, writing files, logging.
OVERHEAD = 1.15


def median_seconds(function, least=1.0):
    """Return the seconds that one call takes: the median of calls that take `least` seconds together.

    A machine that is busy for a moment does not spoil a median.
    """
    # The first call is slower than the others, and not counted:
    # memory is reserved, and kernels are chosen.
    function()

    times = []
    # Three calls at least, so that a median means
    # something even where one takes very long.
    while sum(times) < least or len(times) < 3:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def data_seconds():
    """Return the seconds that one picture takes to be drawn, saved, read and encoded."""
    rng = random.Random(0)

    vae = encode.load_vae(VAE)
    # One call encodes a batch, as in the real stage;
    # its time is divided by the pictures in it.
    pixels = to_tensor([draw(random_scene(rng)) for _ in range(64)])
    with torch.no_grad():
        encoding = median_seconds(lambda: vae.encode(pixels)) / 64

    with tempfile.TemporaryDirectory() as folder:
        def draw_and_read():
            path = Path(folder) / "picture.png"
            # Drawing includes the choice of a scene, as in the real run.
            with complete(path) as temporary:
                draw(random_scene(rng)).save(temporary, "PNG")
            with Image.open(path) as image:
                image.convert("RGB")

        return encoding + median_seconds(draw_and_read, 0.3)


def make_model(name):
    family = MODELS[name]
    return family.network(**family.presets["toy"])


def random_text(model, batch):
    # Values do not matter for the time, only shapes do, so noise stands in for texts.
    text = torch.randn(batch, CAPTION_TOKENS, model.config["text_dim"])
    return text, torch.ones(batch, CAPTION_TOKENS, dtype=torch.bool)


def random_latents(model, batch):
    size = model.config["size"]
    return torch.randn(batch, model.config["channels"], size, size)


def training_seconds(name):
    """Return the seconds of one training step of a toy model."""
    model = make_model(name)
    # The very steps of train.py, on random data. Nothing is read or written.
    command = train_command(name, "unused", "unused", None, P, TAU, steps=1, seed=0)
    args = train.arguments(shlex.split(command))
    args.micro_batch = args.batch_size
    optimizer = train.make_optimizer(model, args)
    averages = {parameter: parameter.detach().clone() for parameter in model.parameters()}
    batch = random_batch(model, BATCH, CAPTION_TOKENS)

    def step():
        inputs = train.draw_inputs(batch, 1.0, torch.device("cpu"))
        loss = train.add_gradient(model, inputs, args)
        train.finish_step(optimizer, averages, loss, 0, args)

    return median_seconds(step, 1.5)


@torch.no_grad()
def sampling_seconds(name):
    """Return the seconds that one picture takes to be sampled, decoded and scored."""
    model = make_model(name).eval()

    batch = 64
    # Guidance: every picture twice, once with its caption and once without.
    x = random_latents(model, 2 * batch)
    context = model.condition(*random_text(model, 2 * batch), torch.ones(2 * batch))
    gamma = torch.full((2 * batch,), 0.5)

    # Only the first step of a picture has no state of
    # the step before, so one that has it is timed.
    _, state = model.denoise(x, gamma, context, None)
    denoising = median_seconds(lambda: model.denoise(x, gamma, context, state)) / batch

    # What follows the last step is done once for each picture.
    vae = encode.load_vae(VAE)
    decoding = median_seconds(lambda: vae.decode(x[:batch]), 0.5) / batch

    # The detector looks at one picture at a time. Its first call,
    # which draws its templates, is left out by `median_seconds`.
    image = draw(random_scene(random.Random(0)))
    detecting = median_seconds(lambda: detect(image), 0.3)

    return SAMPLE_STEPS * denoising + decoding + detecting


def spoken_time(seconds):
    """Return a time in words: "about 3 minutes"."""
    # The limits lie well above a minute and an hour, so that it never says "about 1 minutes".
    if seconds < 90:
        return f"about {seconds:.0f} seconds"
    if seconds < 5400:
        return f"about {seconds / 60:.0f} minutes"
    return f"about {seconds / 3600:.1f} hours"


# --------------------------------------------------------------------------------------------
# Several models side by side

def main(argv=None):
    """Print the seconds of a training step and of a picture: `python -m toy.estimate dit`."""
    name = (argv or sys.argv[1:])[0]
    print(json.dumps({"training": training_seconds(name), "sampling": sampling_seconds(name)}))


def seconds_side_by_side(name, processes):
    """Return {"training", "sampling"}, in seconds, when `processes` models run at once, a thread each."""
    command = [sys.executable, "-m", "toy.estimate", name]
    # One thread for each model, as `side_by_side` runs them. All are started before
    # any is waited for: they are to be timed while they compete for the machine.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # Each has a session of its own, so that Ctrl-C reaches only this process, which then ends them.
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                env=environment, text=True, start_new_session=True)
               for _ in range(processes)]
    try:
        written = [process.communicate()[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    if any(process.returncode for process in running):
        raise UserError(f"{' '.join(command[1:])}: failed; run it alone to see why")
    outputs = [json.loads(text) for text in written]

    seconds = {}
    for key in ("training", "sampling"):
        seconds[key] = sum(output[key] for output in outputs) / len(outputs)
    return seconds


def end_times(seconds, places):
    """Return when each job ends, if jobs of these lengths start in order as soon as a place is free."""
    free_at = [0.0] * places
    ends = []
    for length in seconds:
        # The place that is free first takes the next job.
        place = free_at.index(min(free_at))
        free_at[place] += length
        ends.append(free_at[place])
    return ends


if __name__ == "__main__":
    main()
