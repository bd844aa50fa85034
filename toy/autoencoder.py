"""The toy's autoencoder: how the weights in toy/weights were trained (python -m toy --train-vae MINUTES)."""

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
import train
from toy.world import SIZE, draw, random_scene

SCALE = 0.5     # standard deviation of the scaled latents: below 1, more of training is about whole shapes
VAE = Path(__file__).resolve().parent / "weights"


def train_vae(folder, minutes, seed=0):
    """Trains the toy's AutoencoderKL, on from what is in `folder` already, and saves it there in float16.

    Its pictures are littered with shrunken ones, as cutmix.py pastes them, so that small objects survive. In
    the last third the encoder rests and the decoder learns to draw clean shapes from latents that are a bit
    off, as those of a small diffusion model are."""
    rng = random.Random(seed)
    images = [draw(random_scene(rng)) for _ in range(9000)]
    pool = {side: [np.asarray(image.resize((side, side), Image.Resampling.LANCZOS)) for image in images]
            for side in (SIZE, 32, 21, 16)}

    def picture():
        image, kind = rng.choice(pool[SIZE]).copy(), rng.random()
        for _ in range(8 if kind < 0.4 else 1 if kind < 0.7 else 0):
            side = rng.choice([32, 21, 21, 16, 16])
            x, y = rng.randint(0, SIZE - side), rng.randint(0, SIZE - side)
            image[y:y + side, x:x + side] = rng.choice(pool[side])
        if 0.7 < kind < 0.85:
            half = rng.choice([np.s_[:, 32:], np.s_[32:]])
            image[half] = rng.choice(pool[SIZE])[half]
        return image

    def to_tensor(images):
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, 64, 64)

    torch.manual_seed(seed)
    vae = encode.AutoencoderKL(latent_channels=8, block_out_channels=(32, 32, 64), layers_per_block=1,
                               norm_num_groups=8, patch_size=2)
    if (folder / "config.json").exists():
        vae.load_state_dict(encode.load_vae(folder).state_dict())
    average = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99))
    bar, start = tqdm(desc="autoencoder", unit="step"), time.time()
    while (done := (time.time() - start) / 60 / minutes) < 1:
        whole = done < 2 / 3
        part = done * 1.5 if whole else done * 3 - 2                # of this phase: warm-up, a half cosine
        optimizer.param_groups[0]["lr"] = train.lr_at(part, 2e-3 if whole else 1e-3, 0.02, 1, 1)
        vae.encoder.requires_grad_(whole)
        vae.quant_conv.requires_grad_(whole)
        x = to_tensor([picture() for _ in range(64)])
        with torch.autocast("cpu", torch.bfloat16):
            mean, std = (z.float() for z in vae.encode(x))
            off = 0 if whole else 0.4 * torch.rand(64, 1, 1, 1)
            error = vae.decode(mean + (std ** 2 + off ** 2) ** 0.5 * torch.randn_like(mean)).float() - x
        edges = (x - F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, 1)).abs().mean(1, keepdim=True)
        weight = 1 + 2 * edges / edges.mean()               # what tells shapes apart is at their edges
        loss = (weight * (error.abs() + error ** 2 * whole)).mean() / weight.mean()
        loss = loss + 2e-3 * 0.5 * (mean ** 2 + std ** 2 - 1 - 2 * std.log()).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        for name, tensor in vae.state_dict().items():
            average[name].lerp_(tensor, max(0.002, 20 / (bar.n + 21)))
        bar.set_postfix(L1=f"{error.abs().mean().item():.4f}", refresh=False)
        bar.update()
    bar.close()
    vae.load_state_dict(average)
    with torch.no_grad():
        mean, std = vae.encode(to_tensor(pool[SIZE][:1000]))
    vae.config["scaling_factor"] = round(SCALE * (mean.var() + (std ** 2).mean()).item() ** -0.5, 4)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(vae.half().state_dict(), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"_class_name": "AutoencoderKL", **vae.config}, indent=1) + "\n")
