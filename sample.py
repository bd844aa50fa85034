"""Stage 5, sampling (paper 4.1): DDIM with classifier-free guidance, from any checkpoint and any prompts.

    python sample.py --checkpoint Lucasdegeorge/CAD-I --prompt "A retriever on a red sofa" --out out/samples

Prompts come from --prompt (again and again), from a text file (one a line), from JSONL (`prompt` or
`caption`, other keys are kept for the benchmarks), or from a folder of .txt files (DPG-Bench's). Image i
depends on --seed + i alone, so another batch size, more ranks under torchrun or a run that was killed and
started again give the same images.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

import model_cad
import model_dit
from common import (HelpFormatter, UserError, at_least, autocast, command_line, complete,
                    contact_sheet, fetch, local_device, rank_and_world, read_jsonl, sha256,
                    to_images)
from encode import encode_text, load_text_encoder, load_vae

VAE, TEXT_ENCODER = "stabilityai/sd-vae-ft-ema", "google/flan-t5-xl"  # where a checkpoint names none


# ------------------------------------------------------------------------------------------------------------
# The models

class TextToImageModel(Protocol):
    """What sampling and training ask of a network. A new one is written to this contract.

    A model predicts the noise in noisy latents from a caption. Its work is in two parts, because sampling
    repeats only the second one at each of its steps.

    config: the arguments that build the network again, a dict that JSON can store. Among them are `channels`,
    `size` (the latents' height and width) and `text_dim`.
    """

    config: dict

    def condition(self, text, mask, coherence):
        """Return the context: all that depends on the caption alone, such as attention's keys and values.

        text (B, L, text_dim): T5's last hidden states; mask (B, L) bool: True where there is a token;
        coherence (B,): 1 for a caption, 0 for the null prompt. Only `denoise` looks into the context.
        """

    def denoise(self, x, gamma, context, state=None):
        """Return the predicted noise (B, channels, size, size) and the state that the next step begins with.

        x (B, channels, size, size): noisy latents; gamma (B,) in (0, 1]: their signal level. `state` is what
        the step before returned, None at the first step. It is None for ever, or a tensor whose first
        dimension is the batch's: where captions and null prompts share a batch, sampling repeats and cuts it.
        """

    def forward(self, x, gamma, text, mask, coherence, coin=None):
        """Return the predicted noise in training, where there is no step before.

        coin (B,) uniform in [0, 1), one number a sample: the only chance a model may use. None: drawn inside.
        """


class ModelFamily(NamedTuple):
    """A network, and the sizes that have a name."""

    network: type                   # the class, a TextToImageModel
    presets: dict                   # name -> arguments of the class
    default_preset: str


# To add a model, add a line here. What is missing from it is told as soon as this file is imported.
MODELS = {
    "dit": ModelFamily(model_dit.DiT, model_dit.PRESETS, "L/2"),
    "cad": ModelFamily(model_cad.CAD, model_cad.PRESETS, "L"),
}


def check_model_family(name, family):
    """Raise TypeError if an entry of MODELS does not keep the contract of `TextToImageModel`."""
    for method in ("condition", "denoise", "forward"):
        own = getattr(family.network, method, None)
        # Every torch module inherits a `forward` that only raises.
        if own is None or own is getattr(torch.nn.Module, method, None):
            raise TypeError(f"MODELS[{name!r}]: {family.network.__name__} has no `{method}`")
    if family.default_preset not in family.presets:
        raise TypeError(f"MODELS[{name!r}]: the default preset {family.default_preset!r} is none of "
                        f"{', '.join(family.presets)}")


for _name, _family in MODELS.items():
    check_model_family(_name, _family)


# ------------------------------------------------------------------------------------------------------------
# The sampler

def gamma(t):
    """Signal level of the linear schedule: t in [0, 1] -> 1 - t, never quite 0. Any shape."""
    return (1 - t).clamp(min=1e-9)


def batch_texts(cond, null, batch):
    """Captions and null prompts, each (text (B or 1, L, D), mask (B or 1, L)) -> one pair with 2 B rows."""
    length = max(cond[0].shape[1], null[0].shape[1])
    rows = [(F.pad(text, (0, 0, 0, length - text.shape[1])).expand(batch, -1, -1),
             F.pad(mask, (0, length - mask.shape[1])).expand(batch, -1)) for text, mask in (cond, null)]
    return torch.cat([text for text, _ in rows]), torch.cat([mask for _, mask in rows])


@torch.no_grad()
def ddim(model, noise, cond, null, steps=250, guidance=8.0, clamp=1.2, progress=iter):
    """Deterministic DDIM (Song et al. 2021) with guidance: noise (B, C, H, W) -> x_0 (B, C, H, W).

    cond, null: (text, mask) of the captions and of the null prompt (B or 1 rows); guidance 0 is none; clamp:
    bound of |x_0| at every step, None for none. Needs steps >= 1. `progress` wraps the range of steps."""
    B, device = len(noise), noise.device
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=device)
    # The first step divides by sqrt(gamma) = 3e-5: hence float64; the network keeps its own precision.
    x = noise.double()
    one = torch.ones(B, device=device)
    captions = model.condition(*(z.expand(B, *z.shape[1:]) for z in cond), one)
    if guidance:
        both = model.condition(*batch_texts(cond, null, B), torch.cat([one, 0 * one]))
    state = None
    for i in progress(range(steps)):
        g, g_next = gamma(t[i]), gamma(t[i + 1])
        if guidance and i > 0:
            eps, state = model.denoise(torch.cat([x, x]).float(), g.float().expand(2 * B), both, state)
            eps_cond, eps_null = eps.double().chunk(2)
            eps = eps_cond + guidance * (eps_cond - eps_null)
        else:   # pure noise has nothing to amplify: no guidance in step 1; its latents serve both halves
            eps, state = model.denoise(x.float(), g.float().expand(B), captions, state)
            eps = eps.double()
            if guidance and state is not None:
                state = torch.cat([state, state])
        x_0 = (x - (1 - g).sqrt() * eps) / g.sqrt()
        if clamp is not None:
            x_0 = x_0.clamp(-clamp, clamp)
            eps = (x - g.sqrt() * x_0) / (1 - g).sqrt()         # the noise that agrees with the clamped x_0
        x = g_next.sqrt() * x_0 + (1 - g_next).sqrt() * eps
    return x.float()


# ------------------------------------------------------------------------------------------------------------
# Checkpoints

def load_model(path_or_repo, device="cpu"):
    """A checkpoint folder or hub repository -> the model in eval mode, its config.json as `model.checkpoint`.

    Reads our format ({"model": "dit" | "cad", "args": {...}}) and the released CAD-I. Raises UserError."""
    try:
        config = json.loads(fetch(path_or_repo, "config.json").read_text())
        weights = load_file(fetch(path_or_repo, "model.safetensors"))
        if "latents_dim" in config:                             # the released CAD-I's own keys and names
            kind = "cad"
            args, weights = model_cad.from_released(config, weights)
        else:
            kind, args = config["model"], config["args"]
        model = MODELS[kind].network(**args)
        model.load_state_dict(weights)
    except KeyError as error:
        raise UserError(f"{path_or_repo}: config.json is not that of a DiT or CAD (no {error})")
    except (ValueError, TypeError, SafetensorError) as error:
        message = str(error).replace("DiT.__init__() ", "").replace("CAD.__init__() ", "")
        raise UserError(f"{path_or_repo}: {message}")
    except RuntimeError as error:
        raise UserError(f"{path_or_repo}: model.safetensors does not fit config.json "
                        f"({' '.join(str(error).split(':', 1)[-1].split())[:150]} ...)")
    model.checkpoint = config
    return model.eval().requires_grad_(False).to(device)


# ------------------------------------------------------------------------------------------------------------
# Prompts and pictures

def read_prompts(path):
    """A .jsonl file, a folder of .txt files or a text file -> list of dicts, each with a `prompt`."""
    path = Path(path)
    if path.is_dir():
        rows = [{"prompt": file.read_text(encoding="utf-8").strip(), "name": file.stem}
                for file in sorted(path.glob("*.txt"))]
    elif not path.is_file():
        raise UserError(f"{path}: no such file or folder of prompts")
    elif path.suffix in (".jsonl", ".json"):
        rows = read_jsonl(path)
        for number, row in enumerate(rows, 1):
            row["prompt"] = row.get("prompt", row.get("caption"))
            if not isinstance(row["prompt"], str):
                raise UserError(f"{path} line {number}: neither `prompt` nor `caption`")
    else:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [{"prompt": line.strip()} for line in lines if line.strip()]
    if not rows:
        raise UserError(f"{path}: no prompts in it")
    return rows


def file_names(rows, per_prompt, layout):
    """Where the images of each prompt go: list (prompts) of lists (images) of paths relative to --out."""
    if layout == "geneval":
        return [[f"{p:05d}/samples/{k:04d}.png" for k in range(per_prompt)] for p in range(len(rows))]
    if layout == "dpg":
        return [[f".tiles/{row.get('name', f'{p:05d}')}_{k}.png" for k in range(4)]
                for p, row in enumerate(rows)]
    return [[f"{p * per_prompt + k:06d}.png" for k in range(per_prompt)] for p in range(len(rows))]


# ------------------------------------------------------------------------------------------------------------
# The command

def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = partial(parser.add_argument, metavar="X")
    add("--checkpoint", required=True, help="folder or hub repository with config.json and model.safetensors")
    add("--prompt", action="append", default=[], help="a prompt (may be given again)")
    add("--prompts", help=".txt or .jsonl file, or a folder of .txt files")
    add("--out", required=True, help="folder for the images, samples.jsonl and sheet.png")
    add("--images-per-prompt", type=int, default=1, help="GenEval and DPG use 4")
    add("--steps", type=int, default=250, help="DDIM steps")
    add("--guidance", type=float, default=8.0, help="w; 0 is none")
    add("--clamp", type=float, default=1.2, help="bound of |x_0|; 0 is none")
    add("--seed", type=int, default=0, help="image i has seed + i")
    add("--batch-size", type=int, default=16, help="images at once")
    add("--format", choices=["flat", "geneval", "dpg"], default="flat", metavar="F",
        help="flat, geneval (its tools' folders) or dpg (one 2 x 2 grid a prompt)")
    add("--vae", help=f"folder or hub repository (default: the one the checkpoint was trained on, or {VAE})")
    add("--text-encoder", help=f"folder or hub repository (default: likewise, or {TEXT_ENCODER})")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 on CUDA, else fp32")
    parser.add_argument("--no-compile", action="store_true", help="CUDA: do not torch.compile the network")
    args = parser.parse_args(argv)
    at_least(args, images_per_prompt=1, steps=1, batch_size=1)
    if args.guidance < 0 or args.clamp < 0:
        raise UserError("--guidance and --clamp must not be negative")
    if args.format == "dpg" and args.images_per_prompt != 4:
        raise UserError("--format dpg makes 2 x 2 grids: give --images-per-prompt 4")
    return args


def count_steps(bar, images, steps):
    """Yields from `steps` and moves the bar by `images` after each."""
    for step in steps:
        yield step
        bar.update(images)


def main(argv=None):
    args = arguments(argv)
    rank, world = rank_and_world()
    device = local_device()
    rows = [{"prompt": prompt} for prompt in args.prompt]
    rows += read_prompts(args.prompts) if args.prompts else []
    if not rows:
        raise UserError("no prompts: give --prompt or --prompts")
    names = file_names(rows, args.images_per_prompt, args.format)
    jobs = [(file, rows[p]["prompt"], args.seed + n) for n, (p, file) in
            enumerate((p, file) for p, files in enumerate(names) for file in files)]

    # A folder belongs to one command: what is there already is kept, other settings are refused.
    out = Path(args.out)
    settings = {key: getattr(args, key) for key in
                ("steps", "guidance", "clamp", "seed", "format", "vae", "text_encoder")}
    settings["prompts"] = [row["prompt"] for row in rows]
    settings["weights"] = sha256(fetch(args.checkpoint, "model.safetensors"))
    if (out / "settings.json").exists() and json.loads((out / "settings.json").read_text()) != settings:
        raise UserError(f"{out}: holds samples of other settings or weights (see its settings.json); "
                        "choose another --out")
    todo = [job for job in jobs[rank::world] if not (out / job[0]).exists()]

    if todo:
        model = load_model(args.checkpoint, device)
        source = model.checkpoint
        vae = load_vae(args.vae or source.get("vae") or VAE, device)
        tokenizer, t5 = load_text_encoder(
            args.text_encoder or source.get("text_encoder") or TEXT_ENCODER, device,
            torch.bfloat16 if device.type == "cuda" else torch.float32)
        if t5.config.d_model != model.config["text_dim"]:
            raise UserError(f"the text encoder is {t5.config.d_model} wide, the checkpoint wants "
                            f"{model.config['text_dim']}: give --text-encoder the one it was trained with")
        if vae.config["latent_channels"] != model.config["channels"]:
            raise UserError(f"the autoencoder has {vae.config['latent_channels']} channels, the checkpoint "
                            f"{model.config['channels']}: give --vae the one it was trained with")
        if device.type == "cuda" and not args.no_compile and len(todo) >= 4 * args.batch_size:
            model.denoise = torch.compile(model.denoise)
        with complete(out / "settings.json") as path:       # only now: a command that fails claims nothing
            path.write_text(json.dumps(settings, indent=1))
        null = encode_text(tokenizer, t5, [""])
        shape = (model.config["channels"], model.config["size"], model.config["size"])
        bar = tqdm(total=len(todo) * args.steps, desc="sampling", unit="step", disable=rank > 0)
        for start in range(0, len(todo), args.batch_size):
            files, prompts, seeds = zip(*todo[start:start + args.batch_size])
            cond = encode_text(tokenizer, t5, list(prompts))
            noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                                 for seed in seeds])
            progress = partial(count_steps, bar, len(files))
            with autocast(device, args.precision):
                x_0 = ddim(model, noise.to(device), cond, null, args.steps, args.guidance, args.clamp or None,
                           progress)
            images = to_images(vae.decode(x_0 / vae.scaling_factor))
            for file, image in zip(files, images):
                with complete(out / file) as path:
                    image.save(path, "PNG")
        bar.close()

    # Whoever finds everything there writes what describes the whole: under torchrun, the last rank to end.
    if all((out / file).exists() for file, _, _ in jobs):
        finish(out, rows, names, jobs, args.format)


def finish(out, rows, names, jobs, layout):
    """The files about all samples: samples.jsonl, sheet, what GenEval's and DPG-Bench's tools look for."""
    for row, files in zip(rows, names):
        if layout == "geneval":
            with complete((out / files[0]).parent.parent / "metadata.jsonl") as path:
                path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        if layout == "dpg":
            tiles = [Image.open(out / file) for file in files]
            with complete(out / f"{Path(files[0]).name.rsplit('_', 1)[0]}.png") as path:
                contact_sheet(tiles, columns=2, gap=0).save(path, "PNG")
    with complete(out / "samples.jsonl") as path:
        path.write_text("".join(json.dumps({"file": f, "prompt": p, "seed": s}, ensure_ascii=False) + "\n"
                                for f, p, s in jobs), encoding="utf-8")
    if layout == "dpg":                # its tools take every picture of the folder for a grid: no sheet there
        return print(f"{len(rows)} grids in {out}")
    shown = jobs[:64]
    images, prompts = [Image.open(out / file) for file, _, _ in shown], [prompt for _, prompt, _ in shown]
    with complete(out / "sheet.png") as path:
        contact_sheet(images, prompts).save(path, "PNG")
    print(f"{len(jobs)} images in {out}, the first {len(shown)} on {out / 'sheet.png'}")


if __name__ == "__main__":
    command_line(main)
