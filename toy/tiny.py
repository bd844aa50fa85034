"""The method on one page: Algorithm 1, equations 1 to 3, the optimiser, EMA, DDIM with guidance.

    python -m toy.tiny

Trains a small DiT-I on what `python -m toy` has encoded, which must have run before, and
draws a picture for the caption of each of 16 composites. train.py and sample.py do the same
with all that a lab needs in addition: epochs, for example, and biases without weight decay.
"""

import copy
import math
from pathlib import Path

# First: it keeps Ctrl-C quiet while torch is imported.
from common import (COUNT, Options, UserError, command_line, contact_sheet, progress,
                    save_png)

import torch
from torch.nn.utils.rnn import pad_sequence

from encode import Encoded, load_vae, to_images
from model_dit import PRESETS, DiT
from toy.recipe import BATCH, GUIDANCE, LR, P, SAMPLE_STEPS, STEPS, TAU

DROP = 0.1              # the share of captions that become the empty prompt
WARMUP = 50             # steps in which the learning rate rises


def pad(texts):
    """Return captions, (L_i, D) each, as text (B, L, D) and mask (B, L), True where there is a token."""
    text = pad_sequence(texts, batch_first=True)
    # Padding is all zeros, and no token is.
    return text, text.any(2)


def draw_batch(photos, composites):
    """Return t (B,), x_0 (B, C, h, w), text (B, L, D) and mask (B, L): Algorithm 1 chooses and reads."""
    t = torch.rand(BATCH)                                               # t ~ U(0, 1)
    from_composites = (t > TAU) & (torch.rand(BATCH) < P)               # eq. 3
    latents = []
    texts = []
    for is_composite in from_composites.tolist():
        data = composites if is_composite else photos
        i = int(torch.randint(len(data), ()))
        mean, std = data.moments(i)
        latents.append(mean + std * torch.randn_like(mean))
        is_dropped = torch.rand(()) < DROP                              # for guidance
        texts.append(data.null if is_dropped else data.text(i))
    x_0 = torch.stack(latents) * photos.meta["scaling_factor"]
    return t, x_0, *pad(texts)


def loss_of(model, t, x_0, eps, text, mask):
    """Return the mean squared error of the predicted noise."""
    gamma = (1 - t)[:, None, None, None]
    x_t = gamma.sqrt() * x_0 + (1 - gamma).sqrt() * eps                 # eq. 1
    eps_hat = model(x_t, 1 - t, text, mask)
    return (eps_hat - eps).square().mean()                              # eq. 2


def train(model, photos, composites, steps):
    """Train a model in place, and return the moving average of its weights, a model too."""
    ema = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), LR,
                                  betas=(0.9, 0.98), weight_decay=0.01)

    for step in progress(range(1, steps + 1), steps, "step", "training"):
        t, x_0, text, mask = draw_batch(photos, composites)
        eps = torch.randn_like(x_0)
        loss = loss_of(model, t, x_0, eps, text, mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

        # The learning rate rises, then falls to zero along half a cosine.
        falling = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        lr = LR * min(step / WARMUP, falling)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        # A young average forgets faster, and soon has forgotten the random start.
        decay = min(0.99, step / (step + 9))
        for average, weight in zip(ema.parameters(), model.parameters()):
            average.data.lerp_(weight.data, 1 - decay)
    return ema.eval()


@torch.no_grad()
def ddim(model, x, cond, null, steps=SAMPLE_STEPS, w=GUIDANCE):
    """Return x_0 (B, C, h, w) for noise x. cond, null: (text, mask) of captions and of empty prompts."""
    # In float64: the first step divides by almost nothing.
    x = x.double()
    gamma = torch.linspace(0, 1, steps + 1, dtype=torch.float64).clamp(min=1e-9)
    for g, g_next in zip(gamma, gamma[1:]):
        level = g.float().expand(len(x))
        eps = model(x.float(), level, *cond)
        # No guidance at the first step, where x is noise alone.
        if g > 1e-9:
            eps_null = model(x.float(), level, *null)
            eps = eps + w * (eps - eps_null)

        x_0 = (x - (1 - g).sqrt() * eps) / g.sqrt()
        x_0 = x_0.clamp(-1.2, 1.2)
        eps = (x - g.sqrt() * x_0) / (1 - g).sqrt()
        x = g_next.sqrt() * x_0 + (1 - g_next).sqrt() * eps
    return x_0.float()


def main(argv=None):
    parser = Options(__doc__, prog="python -m toy.tiny")
    add = parser.add
    add("--data", "folder of python -m toy", "out/toy", Path)
    add("--steps", "training steps", STEPS, COUNT)
    add("--out", "the picture", "out/tiny.png", Path)
    args = parser.parse_args(argv)
    if not (args.data / "encoded-cutmix").exists():
        raise UserError(f"{args.data}: no encoded-cutmix in it: python -m toy makes it")

    # Threads that wait for each other would lose more than they gain.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    photos = Encoded(args.data / "encoded")
    composites = Encoded(args.data / "encoded-cutmix")
    model = DiT(**PRESETS["toy"])
    ema = train(model, photos, composites, args.steps)

    # All of them from noise, each with its own caption.
    picks = [i * len(composites) // 16 for i in range(16)]
    cond = pad([composites.text(i) for i in picks])
    null = pad([composites.null] * 16)
    noise = torch.randn(16, *composites.meta["latent_shape"])
    x_0 = ddim(ema, noise, cond, null)

    vae = load_vae(composites.meta["vae"])
    images = to_images(vae.decode(x_0 / vae.scaling_factor))
    captions = [composites.sample(i)[1] for i in picks]
    sheet = contact_sheet(images, captions)
    save_png(sheet, args.out)
    print(args.out)


if __name__ == "__main__":
    command_line(main)
