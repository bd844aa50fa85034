"""The toy's autoencoder, in Stable Diffusion's stead: how the weights in toy/weights were trained.

    python -m toy --train-vae 60
"""

import json
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

import encode
from common import complete
from train import lr_at
from toy.world import SIZE, draw, random_scene

# The standard deviation of the scaled latents. Below 1, more of training is about whole shapes.
SCALE = 0.5
VAE = Path(__file__).resolve().parent / "weights"

BATCH = 64
PICTURES = 9000
SHRUNKEN_SIDES = [32, 21, 16]       # of what cutmix.py pastes: 1/4, 1/9, 1/16
KL_WEIGHT = 2e-3


def train_vae(folder, minutes, seed=0):
    """Train the toy's AutoencoderKL, on from what `folder` holds, and save it there in float16.

    In the last third the encoder rests, and the decoder learns to draw clean shapes from latents
    that are a bit off, as those of a small diffusion model are.
    """
    # One generator chooses scenes and pastes, torch's makes weights and noise.
    rng = random.Random(seed)
    pictures = make_pictures(rng)

    torch.manual_seed(seed)
    vae = encode.AutoencoderKL(latent_channels=8, block_out_channels=(32, 32, 64),
                               layers_per_block=1, norm_num_groups=8, patch_size=2)

    if (folder / "config.json").exists():
        vae.load_state_dict(encode.load_vae(folder).state_dict())
    # The average over many steps is what is saved in the
    # end: it is smoother than the weights of any one step.
    average = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99))

    bar = tqdm(desc="autoencoder", unit="step")
    start = time.time()
    # Progress is measured in time, not in steps,
    # so that it takes as long as was asked for.
    done = 0.0
    while done < 1:
        whole = done < 2 / 3
        # Each phase has its own warm-up and half a cosine.
        part = done * 1.5 if whole else done * 3 - 2
        peak = 2e-3 if whole else 1e-3
        optimizer.param_groups[0]["lr"] = lr_at(part, peak, 0.02, 1, 1)
        # Latents must not move any more while the decoder gets its finish.
        vae.encoder.requires_grad_(whole)
        vae.quant_conv.requires_grad_(whole)

        x = to_tensor([littered(pictures, rng) for _ in range(BATCH)])
        loss, error = autoencoder_loss(vae, x, whole)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        # The average of the weights forgets fast at first.
        for name, tensor in vae.state_dict().items():
            average[name].lerp_(tensor, max(0.002, 20 / (bar.n + 21)))

        bar.set_postfix(L1=f"{error:.4f}", refresh=False)
        bar.update()
        done = (time.time() - start) / 60 / minutes
    bar.close()

    vae.load_state_dict(average)
    # The variance of a latent is that of the means plus what the
    # encoder leaves open. A scaling factor brings its root to SCALE.
    with torch.no_grad():
        mean, std = vae.encode(to_tensor(pictures[SIZE][:1000]))
    deviation = (mean.var() + (std ** 2).mean()).sqrt().item()
    vae.config["scaling_factor"] = round(SCALE / deviation, 4)

    # Saved as diffusers does it, so that encode.py
    # reads this one like Stable Diffusion's.
    with complete(folder / "diffusion_pytorch_model.safetensors") as path:
        save_file(vae.half().state_dict(), path)
    config = {"_class_name": "AutoencoderKL", **vae.config}
    with complete(folder / "config.json") as path:
        path.write_text(json.dumps(config, indent=1) + "\n")


def make_pictures(rng):
    """Return {side: list of arrays (side, side, 3)}: pictures of the world in CutMix's sizes."""
    # Large objects only: the small ones come from shrinking whole pictures, as in CutMix.
    images = [draw(random_scene(rng, kind="large")) for _ in range(PICTURES)]

    pictures = {}
    for side in (SIZE, *SHRUNKEN_SIDES):
        shrunken = [image.resize((side, side), Image.Resampling.LANCZOS) for image in images]
        pictures[side] = [np.asarray(image) for image in shrunken]
    return pictures


def littered(pictures, rng):
    """Return a picture (64, 64, 3), mostly with shrunken ones on it, so that small objects survive."""
    image = rng.choice(pictures[SIZE]).copy()
    # Many pastes give practice with small objects, one
    # is what CutMix does, and some pictures stay whole.
    kind = rng.random()
    if kind < 0.4:
        pastes = 8
    elif kind < 0.7:
        pastes = 1
    else:
        pastes = 0

    for _ in range(pastes):
        # Small sides come twice, since they are the hardest to draw.
        side = rng.choice([32, 21, 21, 16, 16])
        x = rng.randint(0, SIZE - side)
        y = rng.randint(0, SIZE - side)
        image[y:y + side, x:x + side] = rng.choice(pictures[side])

    if 0.7 < kind < 0.85:
        # CM 1/2: the right or the lower half of another picture.
        half = rng.choice([np.s_[:, 32:], np.s_[32:]])
        image[half] = rng.choice(pictures[SIZE])[half]
    return image


def to_tensor(images):
    """Return arrays (64, 64, 3) of bytes as pixels (B, 3, 64, 64) in [-1, 1]."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)                 # (B, 3, H, W)
    return pixels.float() / 127.5 - 1


def autoencoder_loss(vae, x, whole):
    """Return (loss, mean absolute error) for pixels x (B, 3, 64, 64).

    `whole`: the whole network learns, with squared and absolute errors. Otherwise the decoder
    alone, with absolute errors, from latents with additional noise.
    """
    with torch.autocast("cpu", torch.bfloat16):
        mean, std = vae.encode(x)                                                   # (B, 8, 8, 8)
        mean = mean.float()
        std = std.float()
        deviation = std
        # The additional noise is of another strength in
        # each picture, as errors of a diffusion model are.
        if not whole:
            deviation = (std ** 2 + (0.4 * torch.rand(len(x), 1, 1, 1)) ** 2).sqrt()

        decoded = vae.decode(mean + deviation * torch.randn_like(mean))
    error = decoded.float() - x

    # What tells shapes apart is at their edges: errors there weigh more.
    blurred = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, 1)
    edges = (x - blurred).abs().mean(1, keepdim=True)                               # (B, 1, H, W)
    weight = 1 + 2 * edges / edges.mean()

    distance = error.abs()
    if whole:
        distance = distance + error ** 2
    reconstruction = (weight * distance).mean() / weight.mean()

    kl = 0.5 * (mean ** 2 + std ** 2 - 1 - 2 * std.log()).mean()
    return reconstruction + KL_WEIGHT * kl, error.abs().mean().item()
