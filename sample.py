"""Stage 5, sampling (paper 4.1): images for any prompts, from any checkpoint.

    python sample.py --checkpoint Lucasdegeorge/CAD-I --out out/samples \\
        --prompt "A retriever on a red sofa"

Prompts come from --prompt (which may be repeated), from a text file (one a line), from
JSONL (`prompt` or `caption`; other keys are kept for the benchmarks), from a folder of
.txt files (DPG-Bench's) or from COCO's captions_val2014.json. Image i depends on --seed
+ i alone: another batch size, more ranks under torchrun, or a command that was killed
and started again give the same images.

The estimate x_0 is clamped to +-1.2 at every step, as in the released pipeline: guidance
overshoots, and the error grows from step to step. 1.2 is tight; see --clamp.

From Python, see `generate`.
"""

import argparse
import json
import math
import random
import string
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tqdm import tqdm

import model_cad
import model_dit
from common import (HelpFormatter, UserError, at_least, autocast, begin_or_resume,
                    between, changed_encoders, command_line, compile_blocks, complete,
                    contact_sheet, fetch, is_last_rank, local_device, one_line, only_command,
                    rank_and_world, read_json, read_jsonl, refuse_other_settings, sha256,
                    to_images, write_jsonl)
from encode import encode_text, fingerprint, fingerprint_of_t5, load_text_encoder, load_vae
from metrics.coco import is_coco, read_coco_captions

# Encoders of a checkpoint whose config.json names none, as the released CAD-I's.
VAE = "stabilityai/sd-vae-ft-ema"
TEXT_ENCODER = "google/flan-t5-xl"


# --------------------------------------------------------------------------------------
# The models

class TextToImageModel(Protocol):
    """What sampling and training ask of a network that predicts the noise in latents.

    Its work is in two parts, because sampling repeats only the second one at each step.

    config: the arguments that build the network again, a dict that JSON can store.
    Among them are `channels`, `size` (height and width of the latents) and `text_dim`.
    blocks: the layers that are alike; on a GPU, torch.compile translates them.
    checkpoint_activations: what `train.py --checkpoint-activations` sets.
    """

    config: dict
    blocks: torch.nn.ModuleList
    checkpoint_activations: bool

    def condition(self, text, mask, coherence):
        """Return the context, all that depends on the caption alone, for `denoise`.

        text (B, L, text_dim): T5's last hidden states; mask (B, L) bool: True where
        there is a token; coherence (B,): 1 for a caption, 0 for the null prompt.
        """

    def denoise(self, x, gamma, context, state=None):
        """Return the predicted noise, like x, and the state for the next step.

        x (B, channels, size, size): noisy latents; gamma (B,) in (0, 1]: their signal
        level. state: what the previous step returned, or None at the first step; a
        tensor (B, ...), which sampling can repeat and cut, or None without a memory.
        """

    def forward(self, x, gamma, text, mask, coherence, coin=None):
        """Return the predicted noise in training, where there is no previous step.

        coin (B,), uniform in [0, 1): the only chance that a model may use; None: drawn.
        """


class ModelFamily(NamedTuple):
    """A network and its named sizes."""

    network: type                   # a TextToImageModel
    presets: dict                   # name -> arguments of the class
    default_preset: str


# To add a model, add a line. If something is missing, importing this file says what.
MODELS = {
    "dit": ModelFamily(model_dit.DiT, model_dit.PRESETS, "L/2"),
    "cad": ModelFamily(model_cad.CAD, model_cad.PRESETS, "L"),
}


def check_model_family(name, family):
    """Raise TypeError if an entry of MODELS does not keep the contract above."""
    for method in ("condition", "denoise", "forward"):
        own = getattr(family.network, method, None)
        # Every torch module inherits a `forward` that only raises.
        if own is None or own is getattr(torch.nn.Module, method, None):
            raise TypeError(f"MODELS[{name!r}]: {family.network.__name__} has no `{method}`")
    if family.default_preset not in family.presets:
        raise TypeError(f"MODELS[{name!r}]: the default preset {family.default_preset!r} "
                        f"is not among {', '.join(family.presets)}")


for _name, _family in MODELS.items():
    check_model_family(_name, _family)


# --------------------------------------------------------------------------------------
# The samplers

def gamma(t):
    """Return the signal level of the linear schedule, 1 - t, but never quite 0.

    t: a tensor of any shape, in [0, 1]; 0 is an image, 1 is noise. At t = 1 too, x_0 can be
    computed: it is divided by sqrt(gamma).
    """
    return (1 - t).clamp(min=1e-9)


SPACINGS = ("linear", "cosine")


def times(steps, spacing="linear"):
    """Return the times (steps + 1,) of sampling, from noise to image, in float64.

    "linear": equal steps from t = 1 to 0. "cosine": short steps at both ends; it is the
    schedule of the release's evaluation (`cosine_simple`), gamma = cos^2 of an angle
    that goes from almost 90 to almost 0 degrees. Raises UserError for any other spacing.
    """
    if spacing not in SPACINGS:
        raise UserError(f"spacing {spacing!r}: must be one of {', '.join(SPACINGS)}")
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    if spacing == "linear":
        return u
    # The release's two small numbers keep gamma a little away from 0 and 1.
    angle = math.pi / 2 * (u + 0.0002) / 1.00025
    # t = 1 - gamma.
    return angle.sin() ** 2


def is_within(t, interval):
    """Tell whether low <= t <= high, up to rounding: 1 - 0.7 is more than 0.3."""
    low, high = interval
    return low - 1e-9 <= t <= high + 1e-9


class GuidedModel:
    """The network with classifier-free guidance (Ho and Salimans 2022), for one batch.

    Calling it with x_t and t gives the estimates of x_0 and of the noise. The texts are
    processed once, here, because they are the same at every step. Between calls it
    remembers the model's state (CAD's latents).
    """

    def __init__(self, model, cond, null, noise, guidance, clamp, interval):
        """Process the texts. The arguments are those of `ddim`."""
        self.model = model
        self.guidance = guidance
        self.clamp = clamp
        self.interval = interval
        self.state = None

        # A caption has coherence 1, whatever guidance leads away from has 0.
        B = len(noise)
        ones = torch.ones(B, device=noise.device)
        text, mask = repeat(cond, B)                            # (B, L, D), (B, L)
        self.context = model.condition(text, mask, ones)
        # What a context holds is the model's own affair, so it cannot be cut in half: a step
        # without guidance needs the captions' alone, one with guidance both.
        if guidance:
            text, mask = join(cond, null, B)                    # (2 B, L, D), (2 B, L)
            coherence = torch.cat([ones, 0 * ones])             # (2 B,)
            self.guided_context = model.condition(text, mask, coherence)

    def __call__(self, x, t, first):
        """Return x_0 and eps at the time t, both like x: (B, C, H, W) in float64.

        There is no guidance outside of its interval (Kynkäänniemi et al. 2024) and none
        at the first step, as in the release: there x_0 is divided by sqrt(gamma) = 3e-5, and
        guidance would multiply the network's error in addition.
        """
        if self.guidance and not first and is_within(t, self.interval):
            x_twice = torch.cat([x, x])                         # (2 B, C, H, W)
            both = self.predict_noise(x_twice, t, self.guided_context)
            eps_cond, eps_null = both.chunk(2)
            eps = eps_cond + self.guidance * (eps_cond - eps_null)
        else:
            eps = self.predict_noise(x, t, self.context)

        # Solved for x_0: x_t = sqrt(gamma) x_0 + sqrt(1 - gamma) eps.
        g = gamma(t)
        x_0 = (x - (1 - g).sqrt() * eps) / g.sqrt()
        if self.clamp:
            x_0 = x_0.clamp(-self.clamp, self.clamp)
            # The noise that agrees with the clamped x_0.
            eps = (x - g.sqrt() * x_0) / (1 - g).sqrt()
        return x_0, eps

    def predict_noise(self, x, t, context):
        """Return the noise predicted for x, of B or 2 B rows as its context has."""
        rows = len(x)
        state = self.state
        # After a step without guidance, the captions' state serves both halves.
        if state is not None and len(state) < rows:
            state = torch.cat([state, state])
        # After a step with guidance, the captions go on from their half.
        elif state is not None:
            state = state[:rows]
        # Filled on the device: copying a number to a GPU would make the CPU wait for it.
        g = torch.full((rows,), float(gamma(t)), device=x.device)
        eps, self.state = self.model.denoise(x.float(), g, context, state)
        return eps.double()


def repeat(texts, batch):
    """Return texts (1 or B, L, D), mask (1 or B, L) with B rows."""
    text, mask = texts
    return text.expand(batch, -1, -1), mask.expand(batch, -1)


def join(cond, null, batch):
    """Return captions and null prompts as one batch: text (2 B, L, D), mask (2 B, L).

    They are padded to the same length.
    """
    longest = max(cond[0].shape[1], null[0].shape[1])
    texts = []
    masks = []
    for pair in (cond, null):
        text, mask = repeat(pair, batch)
        missing = longest - text.shape[1]
        texts.append(F.pad(text, (0, 0, 0, missing)))           # (B, longest, D)
        masks.append(F.pad(mask, (0, missing)))                 # (B, longest)
    return torch.cat(texts), torch.cat(masks)


@torch.no_grad()
def ddim(model, noise, cond, null, steps=250, guidance=8.0, clamp=1.2,
         spacing="linear", interval=(0.0, 1.0), on_step=None):
    """Return x_0 (B, C, H, W) for noise (B, C, H, W) by DDIM (Song et al. 2021), eta = 0.

    cond, null: (text, mask) of the captions and of the null prompt, each with 1 or B
    rows. steps: at least 1. guidance: w of eps = eps_cond + w (eps_cond - eps_null); 0
    is none. clamp: bound of |x_0| at every step; 0 or None is none. spacing: see `times`.
    interval: (low, high) in t, guidance is used only there. on_step(step, x, x_0) is
    called after every step.
    """
    t = times(steps, spacing)
    predict = GuidedModel(model, cond, null, noise, guidance, clamp, interval)
    # In float64, because the first step divides by sqrt(gamma) = 3e-5. The network keeps
    # its own precision.
    x = noise.double()
    for i in range(steps):
        x_0, eps = predict(x, t[i], first=(i == 0))
        # The same image and the same noise, mixed as at the next time.
        g_next = gamma(t[i + 1])
        x = g_next.sqrt() * x_0 + (1 - g_next).sqrt() * eps
        if on_step:
            on_step(i, x, x_0)
    return x.float()


@torch.no_grad()
def dpm_solver(model, noise, cond, null, steps=250, guidance=8.0, clamp=1.2,
               spacing="linear", interval=(0.0, 1.0), on_step=None):
    """Return x_0 (B, C, H, W) by DPM-Solver++ (2M) (Lu et al. 2022, Algorithm 2).

    The arguments are those of `ddim`, and so is the cost: one evaluation a step. DDIM
    takes x_0 to be constant during a step; this solver extends the line through the
    last two estimates, as a function of lambda, half the logarithm of the
    signal-to-noise ratio.

    Without guidance and with cosine spacing its error falls almost with the square of the
    number of steps, DDIM's only in proportion. With guidance both fall in proportion: the
    first step has none, and that alone is an error of the size of one step.
    """
    t = times(steps, spacing)
    alpha = gamma(t).sqrt()
    sigma = (1 - gamma(t)).sqrt()
    # Infinite at t = 0.
    lam = (alpha / sigma).log()
    predict = GuidedModel(model, cond, null, noise, guidance, clamp, interval)
    x = noise.double()
    x_0_before = None
    for i in range(steps):
        x_0, _ = predict(x, t[i], first=(i == 0))
        h = lam[i + 1] - lam[i]
        # The first step knows no earlier estimate, and the last one is so long in lambda
        # that the line would lead nowhere. Both are steps of DDIM.
        if i == 0 or i == steps - 1:
            D = x_0
        else:
            # The line, half a step ahead.
            r = (lam[i] - lam[i - 1]) / h
            D = x_0 + (x_0 - x_0_before) / (2 * r)
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * torch.expm1(-h) * D
        x_0_before = x_0
        if on_step:
            on_step(i, x, x_0)
    return x.float()


SOLVERS = {"ddim": ddim, "dpm++": dpm_solver}
PRECISIONS = ("auto", "fp32", "bf16")


# --------------------------------------------------------------------------------------
# A checkpoint and its encoders

def read_config(path_or_repo):
    """Return the config.json of a checkpoint as a dict. Raises UserError."""
    return read_json(fetch(path_or_repo, "config.json"), "the config.json of a checkpoint")


def load_model(path_or_repo, device="cpu"):
    """Return the model of a checkpoint folder or hub repository, in eval mode.

    Its config.json is `model.checkpoint_config`. Reads our format ({"model": "dit" or "cad",
    "args": {...}}) and the released CAD-I. Raises UserError.
    """
    config = read_config(path_or_repo)
    # safetensors holds numbers and names only: unlike a pickle, it cannot run code.
    try:
        weights = load_file(fetch(path_or_repo, "model.safetensors"))
    except SafetensorError as error:
        raise UserError(f"{path_or_repo}: model.safetensors is damaged ({one_line(error)})")

    try:
        # The released CAD-I has keys and tensor names of its own.
        if "latents_dim" in config:
            kind = "cad"
            sizes, weights = model_cad.from_released(config, weights)
        else:
            kind = config["model"]
            sizes = config["args"]
        model = MODELS[kind].network(**sizes)
    except KeyError as error:
        raise UserError(f"{path_or_repo}: config.json is not that of {' or '.join(MODELS)} "
                        f"(no {error})")
    # A size of 0, a text instead of a number, ...: torch raises almost anything.
    except Exception as error:  # noqa: BLE001
        raise UserError(f"{path_or_repo}: config.json describes no model "
                        f"({one_line(error)})")

    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = one_line(str(error).split(":", 1)[-1], 150)
        raise UserError(f"{path_or_repo}: model.safetensors does not fit config.json "
                        f"({reason} ...)")
    model.checkpoint_config = config
    return model.eval().requires_grad_(False).to(device)


def save_checkpoint(folder, model, config):
    """Write a checkpoint folder, which `load_model` reads and which is ready for the hub.

    model: the network whose weights are saved; config: of config.json (train.py's).
    """
    with complete(folder / "model.safetensors", durable=True) as path:
        path.write_bytes(save(model.state_dict()))
    with complete(folder / "config.json", durable=True) as path:
        path.write_text(json.dumps(config, indent=1), encoding="utf-8")
    with complete(folder / "README.md") as path:
        path.write_text(model_card(config), encoding="utf-8")


def model_card(config):
    """Return README.md of a checkpoint folder, as the Hugging Face hub shows it."""
    training = config["training"]
    captions = "long captions (TA)" if training["TA"] else "'An image of <class-name>' (AIO)"
    composites = "none"
    if training["IA"]:
        composites = (f"{training['composites']} of CutMix, setting {training['IA']} (IA), where "
                      f"t > {training['tau']}, with probability {training['p']}")
    start = f", beginning with the weights of {training['init']}" if training.get("init") else ""
    return f"""---
pipeline_tag: text-to-image
---
# {config["model"]}, {training["parameters"] / 1e6:.0f} M parameters, text-to-image

Trained after *How far can we go with ImageNet for Text-to-Image generation?* (arXiv
2502.21318), on {training["images"]} pictures with {captions}. Composites: {composites}.
{training["steps"]} steps of {training["batch_size"]} samples{start}.

Autoencoder: {config["vae"]}. Text encoder: {config["text_encoder"]}. Sample with:

    python sample.py --checkpoint FOLDER_OR_REPOSITORY --prompt "..." --out samples

The two encoders are not included and have licences of their own. The terms of the training
pictures apply too: ImageNet's are for non-commercial research and education.
"""


def encoder_names(path_or_repo, config, vae=None, text_encoder=None):
    """Return folders or hub names of a checkpoint's autoencoder and T5, as a pair.

    In this order: what the caller names, what the checkpoint was trained with, the
    paper's. Raises UserError.
    """
    names = (vae or config.get("vae") or VAE,
             text_encoder or config.get("text_encoder") or TEXT_ENCODER)
    for name in names:
        if not isinstance(name, str):
            raise UserError(f"{path_or_repo}: config.json: {name!r} is no encoder's name")
    return names


class Pipeline(NamedTuple):
    """All networks that make an image from a prompt; `load_pipeline` loads them."""

    model: torch.nn.Module              # a TextToImageModel
    vae: torch.nn.Module
    tokenizer: object
    text_encoder: torch.nn.Module


def load_pipeline(path_or_repo, vae=None, text_encoder=None, device=None):
    """Return the Pipeline of a checkpoint folder or hub repository, ready for `generate`.

    vae, text_encoder: folders or hub repositories; without, those the checkpoint was
    trained with, which must not have changed since. device: without, this process's
    GPU, or the CPU. Raises UserError.
    """
    device = device or local_device()
    model = load_model(path_or_repo, device)
    names = encoder_names(path_or_repo, model.checkpoint_config, vae, text_encoder)
    autoencoder = load_vae(names[0], device)
    # Not float16, in which T5's activations overflow.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer, t5 = load_text_encoder(names[1], device, dtype)
    pipeline = Pipeline(model, autoencoder, tokenizer, t5)
    check_encoders(path_or_repo, pipeline, vae, text_encoder)
    return pipeline


def fingerprints(pipeline):
    """Return what tells a pipeline's encoders from others, whatever T5's precision.

    The keys are those of `training` in a checkpoint's config.json.
    """
    vae = pipeline.vae
    return {
        "vae_fingerprint": fingerprint([vae.config], vae.state_dict().items()),
        "T5": fingerprint_of_t5(pipeline.tokenizer, pipeline.text_encoder),
    }


def check_encoders(path_or_repo, pipeline, vae=None, text_encoder=None):
    """Raise UserError if a checkpoint was trained with other encoders than a pipeline's.

    vae, text_encoder: what the user named, or None; of these only the size must fit.
    """
    model, autoencoder, _, t5 = pipeline
    sizes = [("--vae", autoencoder.config["latent_channels"], model.config["channels"]),
             ("--text-encoder", t5.config.d_model, model.config["text_dim"])]
    for option, size, wanted in sizes:
        if size != wanted:
            raise UserError(f"{path_or_repo}: its encoder has {wanted} channels, and not "
                            f"{size}: give {option} the one it was trained with")

    found = fingerprints(pipeline)
    options = {"vae_fingerprint": ("--vae", vae), "T5": ("--text-encoder", text_encoder)}
    for key in changed_encoders(model.checkpoint_config, found):
        option, named = options[key]
        if not named:
            before = model.checkpoint_config["training"][key]
            raise UserError(f"{path_or_repo}: its encoder has changed ({key} {before}, now "
                            f"{found[key]}): give {option} the one it was trained with")


@torch.no_grad()
def generate(pipeline, prompts, seeds=None, steps=250, guidance=8.0, clamp=1.2,
             solver="ddim", spacing="linear", guidance_interval=(0.0, 1.0),
             negative_prompts=("",), max_tokens=256, precision="auto", on_step=None):
    """Return PIL images for prompts, all made as one batch (a GPU holds some 16 to 64).

    seeds: one number an image; without, 0, 1, 2, ... The same prompt and seed give the
    same image in any batch. negative_prompts: what guidance leads away from, one text
    for all or one for each prompt; it is the null prompt "" unless given. max_tokens: a
    longer prompt loses its end. precision: "auto" (bf16 on CUDA), "fp32" or "bf16".
    solver: a key of SOLVERS. The other arguments are those of `ddim`. Raises UserError.

        >>> pipeline = load_pipeline("out/toy/dit")
        >>> generate(pipeline, ["a red star"], steps=50, guidance=3)[0].save("star.png")
    """
    # A text is a list of letters to Python, and would give an image for each.
    if isinstance(prompts, str) or isinstance(negative_prompts, str):
        raise TypeError("prompts, negative_prompts: give lists of texts, not one text")
    check_options(steps=steps, guidance=guidance, clamp=clamp, max_tokens=max_tokens,
                  solver=solver, precision=precision, guidance_interval=guidance_interval)
    count = len(prompts)
    seeds = range(count) if seeds is None else seeds
    if not count or len(seeds) != count or len(negative_prompts) not in (1, count):
        raise UserError(f"{count} prompts, {len(seeds)} seeds, {len(negative_prompts)} "
                        f"negative prompts: these numbers do not fit each other")
    model, vae, tokenizer, t5 = pipeline
    cond = encode_text(tokenizer, t5, prompts, max_tokens)      # (B, L, D), (B, L)
    null = encode_text(tokenizer, t5, negative_prompts, max_tokens)
    noise = starting_noise(model, seeds).to(t5.device)          # (B, C, h, w)
    with autocast(noise.device, precision):
        x_0 = SOLVERS[solver](model, noise, cond, null, steps, guidance, clamp, spacing,
                              guidance_interval, on_step)       # (B, C, h, w)
    # The model's latents are the autoencoder's times a factor.
    return to_images(vae.decode(x_0 / vae.scaling_factor))


def check_options(**options):
    """Raise UserError if arguments of `generate`, given by name, mean nothing."""
    at_least(argparse.Namespace(**options), steps=1, guidance=0, clamp=0, max_tokens=1)
    for name, allowed in (("solver", SOLVERS), ("precision", PRECISIONS)):
        if options[name] not in allowed:
            raise UserError(f"{name} {options[name]!r}: must be one of {', '.join(allowed)}")
    low, high = options["guidance_interval"]
    if not 0 <= low <= high <= 1:
        raise UserError(f"guidance interval {low} {high}: not in [0, 1], the lower first")


def starting_noise(model, seeds):
    """Return noise (B, C, h, w) of the model's size, each image's from its own seed."""
    shape = (model.config["channels"], model.config["size"], model.config["size"])
    noise = []
    for seed in seeds:
        # On the CPU: the numbers are the same whatever device they go to.
        generator = torch.Generator().manual_seed(seed)
        noise.append(torch.randn(shape, generator=generator))
    return torch.stack(noise)


def random_letters(seed):
    """Return a prompt that means nothing: 3 to 6 words of 3 to 7 random letters.

    The release's pipeline takes a new one as the negative prompt of each image.
    """
    rng = random.Random(seed)
    words = []
    for _ in range(rng.randint(3, 6)):
        words.append("".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 7))))
    return " ".join(words)


# --------------------------------------------------------------------------------------
# Prompts, and the files of their images

def read_prompts(path, limit=None, seed=0):
    """Return the prompts of a file or folder as dicts with the key `prompt`.

    path: JSONL, COCO's captions, a folder of .txt files, or a text file (one a line).
    limit: at most so many, chosen by `seed`, in the file's order. Raises UserError.
    """
    path = Path(path)
    if is_coco(path):
        return read_coco_captions(path, limit, seed)
    if path.is_dir():
        rows = []
        # Hidden files are those of editors and of macOS.
        for file in sorted(path.glob("[!.]*.txt")):
            row = {"prompt": read_text(file).strip(), "name": file.stem}
            rows.append({**row, "prompt_file": str(file)})
    elif not path.is_file():
        raise UserError(f"{path}: no such file or folder of prompts")
    elif path.suffix in (".jsonl", ".json"):
        rows = read_jsonl(path)
        for number, row in enumerate(rows, 1):
            row["prompt"] = row.get("prompt", row.get("caption"))
            if not isinstance(row["prompt"], str):
                raise UserError(f"{path} line {number}: neither `prompt` nor `caption`")
    else:
        lines = read_text(path).splitlines()
        rows = [{"prompt": line.strip()} for line in lines if line.strip()]
    if not rows:
        raise UserError(f"{path}: no prompts in it")

    # Not the first ones: files are sorted by class or task.
    if limit is not None and limit < len(rows):
        chosen = random.Random(seed).sample(range(len(rows)), limit)
        rows = [rows[i] for i in sorted(chosen)]
    return rows


def read_text(path):
    """Return the text of a UTF-8 file. Raises UserError."""
    # Some editors put a mark (BOM) before the text; utf-8-sig takes it off.
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})")


def collect_prompts(args):
    """Return the prompts of --prompt and --prompts as dicts. Raises UserError."""
    rows = [{"prompt": prompt} for prompt in args.prompt or []]
    if args.prompts:
        rows += read_prompts(args.prompts, args.limit, args.seed)
    if not rows:
        raise UserError("no prompts: give --prompt or --prompts")
    for number, row in enumerate(rows, 1):
        check_text(f"prompt {number}", row["prompt"])
    return rows


def check_text(what, text):
    """Raise UserError if a text is not one that UTF-8 can write."""
    # JSON's "\\ud83d" is half a character. The tokenizer would fail on it.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{what}: character {error.start + 1} is not one (not UTF-8)")


def file_names(rows, per_prompt, layout):
    """Return the files of each prompt's images, relative to --out: a list of lists.

    layout: "flat", "named" (flat, called after the prompt's `name`, as COCO's images),
    "geneval" or "dpg". Raises UserError for a name that is no file name or comes twice.
    """
    names = []
    seen = set()
    for p, row in enumerate(rows):
        files = [file_name(row, p, k, per_prompt, layout) for k in range(per_prompt)]
        # A second prompt of the same name would find the first one's images and keep them.
        if not seen.isdisjoint(files):
            raise UserError(f"prompt {p + 1}: its images would replace those of another "
                            f"prompt of the same name ({files[0]})")
        seen.update(files)
        names.append(files)
    return names


def file_name(row, p, k, per_prompt, layout):
    """Return the file of prompt p's image k; see `file_names`."""
    if layout == "geneval":
        return f"{p:05d}/samples/{k:04d}.png"
    if layout == "flat":
        return f"{p * per_prompt + k:06d}.png"
    where = row.get("prompt_file", f"prompt {p + 1}")
    stem = file_stem(row.get("name", f"{p:05d}"), where)
    if layout == "dpg":
        return f".tiles/{stem}_{k}.png"
    return f"{stem}.png" if per_prompt == 1 else f"{stem}_{k}.png"


def file_stem(name, where):
    """Return a prompt's name if it can begin a file's. Raises UserError, with `where`."""
    if not isinstance(name, str):
        raise UserError(f"{where}: has the name {name!r}: not a text")
    check_text(f"{where}: the name {name!r}", name)
    empty = not name.strip()
    # Names come from outside: "../../x" must not lead out of the folder.
    leads_elsewhere = "/" in name or "\\" in name or name.startswith(".")
    # File systems allow 255 bytes, and we add an ending.
    too_long = len(name.encode()) > 200
    # The sheet of all samples is called so.
    taken = name == "sheet"
    if empty or leads_elsewhere or too_long or taken or not name.isprintable():
        raise UserError(f"{where}: has the name {name[:80]!r}: not a name for a file")
    return name


class Job(NamedTuple):
    """An image to make: its file relative to --out, its prompt, its seed."""

    file: str
    prompt: str
    seed: int


def list_jobs(rows, names, first_seed):
    """Return a Job for each image; the seeds count up from `first_seed`."""
    jobs = []
    for row, files in zip(rows, names):
        for file in files:
            jobs.append(Job(file, row["prompt"], first_seed + len(jobs)))
    return jobs


# --------------------------------------------------------------------------------------
# The command

def arguments(argv):
    """Return the checked options. Raises UserError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = partial(parser.add_argument, metavar="X")
    flag = partial(parser.add_argument, action="store_true")
    add("--checkpoint", required=True, help="folder or hub repository with config.json and model.safetensors")
    add("--out", help="folder for the images, samples.jsonl and sheet.png")
    add("--prompt", action="append", help="a prompt (may be given again)")
    add("--prompts", help=".txt or .jsonl file, COCO's captions, folder of .txt files")
    add("--limit", type=int, help="at most so many of --prompts, chosen by --seed")
    add("--images-per-prompt", type=int, default=1, help="GenEval and DPG use 4")
    add("--format", choices=["flat", "geneval", "dpg"], default="flat", metavar="F",
        help="flat, geneval (its tools' folders) or dpg (one 2 x 2 grid a prompt)")

    # The sampler: DDIM with 250 steps is the paper's, guidance and clamp the release's.
    add("--solver", choices=list(SOLVERS), default="ddim",
        help="ddim, or dpm++: of second order without guidance, with cosine spacing")
    add("--steps", type=int, default=250, help="steps of the solver")
    add("--spacing", choices=SPACINGS, default="linear",
        help="linear in t, or cosine: short steps at both ends")
    add("--guidance", type=float, default=8.0, help="w; 0 is none")
    add("--guidance-interval", type=float, nargs=2, default=[0.0, 1.0],
        metavar=("LOW", "HIGH"),
        help="guidance only where LOW <= t <= HIGH (t = 1 is noise)")
    add("--negative-prompt", default="",
        help="what guidance leads away from; without, the null prompt of training")
    flag("--random-negative-prompt",
         help="random letters, others for each image, as in the release's pipeline")
    add("--clamp", type=float, default=1.2,
        help="bound of |x_0| at every step, 0 is none; 1.2 cuts a fifth of the values of "
             "ImageNet's latents (calculated), 3 cuts under 1%%")
    add("--max-tokens", type=int, default=256,
        help="tokens of a prompt that are read (paper: 256, released CAD-I: 128)")
    add("--seed", type=int, default=0, help="image i has seed + i")
    add("--precision", choices=PRECISIONS, default="auto", help="auto: bf16 on CUDA, else fp32")

    # The rest changes no image, unless --vae or --text-encoder names other weights.
    add("--vae", help=f"folder or hub repository (default: the checkpoint's own, or {VAE})")
    add("--text-encoder", help=f"folder or hub repository (default: likewise, {TEXT_ENCODER})")
    add("--batch-size", type=int, default=16, help="images at once")
    flag("--no-compile", help="CUDA: do not torch.compile the network")
    flag("--benchmark", help="only time one batch with these options; needs no --out")
    args = parser.parse_args(argv)

    # Infinity and NaN are refused, too: they fail every one of these checks.
    at_least(args, images_per_prompt=1, batch_size=1, limit=1)
    between(args, 0, 2 ** 62, "seed")
    check_options(**vars(args))
    if args.limit and not args.prompts:
        raise UserError("--limit: chooses among --prompts, which are not given")
    if args.format == "dpg" and args.images_per_prompt != 4:
        raise UserError("--format dpg makes 2 x 2 grids: give --images-per-prompt 4")
    if args.negative_prompt and args.random_negative_prompt:
        raise UserError("--negative-prompt and --random-negative-prompt: give only one")
    check_text("--negative-prompt", args.negative_prompt)
    if not args.out and not args.benchmark:
        raise UserError("--out is needed")
    return args


def sampling_options(args):
    """Return the arguments of `generate` that the command line sets, as a dict."""
    auto = "bf16" if local_device().type == "cuda" else "fp32"
    return {
        "steps": args.steps,
        "guidance": args.guidance,
        "clamp": args.clamp or None,
        "solver": args.solver,
        "spacing": args.spacing,
        "guidance_interval": args.guidance_interval,
        "max_tokens": args.max_tokens,
        "precision": auto if args.precision == "auto" else args.precision,
    }


def settings_of(args, rows):
    """Return all that the images of a folder depend on, as a dict. Raises UserError."""
    config = read_config(args.checkpoint)
    vae, text_encoder = encoder_names(args.checkpoint, config, args.vae, args.text_encoder)
    random_text = "(random letters)" if args.random_negative_prompt else None
    names = [row.get("name") for row in rows]
    return {
        **sampling_options(args),
        "negative_prompt": random_text or args.negative_prompt,
        "seed": args.seed,
        "images_per_prompt": args.images_per_prompt,
        "format": args.format,
        "vae": vae,
        "text_encoder": text_encoder,
        "weights": sha256(fetch(args.checkpoint, "model.safetensors")),
        "prompts": [row["prompt"] for row in rows],
        "names": names if any(names) else [],
    }


def main(argv=None):
    """Make the images that are not there yet, then the files that list them."""
    args = arguments(argv)
    if args.benchmark:
        # Imported here, because it imports this file in turn.
        from metrics.speed import time_sampling
        return time_sampling(args)
    rank, world = rank_and_world()
    out = Path(args.out)

    # Each prompt gets files, each file a job.
    rows = collect_prompts(args)
    layout = args.format
    # COCO's images, and prompts that caption.py extended from them, have both.
    if layout == "flat" and all("name" in row and "file" in row for row in rows):
        layout = "named"
    names = file_names(rows, args.images_per_prompt, layout)
    jobs = list_jobs(rows, names, args.seed)

    settings = settings_of(args, rows)

    # Ranks share the jobs; the last one to end describes the whole.
    with only_command(out):
        # What is in the folder already is kept, if it was made with the same settings.
        refuse_other_images(out, jobs, settings)
        todo = [job for job in jobs[rank::world] if not (out / job.file).exists()]
        if todo:
            make_images(args, out, todo, settings, show_progress=(rank == 0))
        paths = [out / job.file for job in jobs]
        if is_last_rank(rank, paths, out / "samples.jsonl"):
            describe(out, rows, names, jobs, layout)


def refuse_other_images(out, jobs, settings):
    """Raise UserError if images in the folder `out` were not made with these settings."""
    # The images first: another rank may write settings.json, and then its images.
    images = [job.file for job in jobs if (out / job.file).exists()]
    path = out / "settings.json"
    if path.exists():
        before = read_json(path, "the settings of an output")
        # Without the fingerprints: `make_images` compares them with the loaded encoders'.
        refuse_other_settings(out, {key: before.get(key) for key in settings}, settings)
    elif images:
        raise UserError(f"{out}: {images[0]} is there, but no settings.json that says how "
                        f"it was made: choose another --out, or delete it")


def make_images(args, out, todo, settings, show_progress):
    """Generate the images of the jobs `todo` and save each in the folder `out`."""
    pipeline = load_pipeline(args.checkpoint, args.vae, args.text_encoder)
    settings = settings | fingerprints(pipeline)
    # Compiling takes a while: not for a few images.
    worth_compiling = len(todo) >= 4 * args.batch_size
    if local_device().type == "cuda" and not args.no_compile and worth_compiling:
        compile_blocks(pipeline.model)

    bar = tqdm(total=len(todo) * args.steps, desc="sampling", disable=not show_progress,
               bar_format="{l_bar}{bar}| [{elapsed}<{remaining}{postfix}]")

    for start in range(0, len(todo), args.batch_size):
        batch = todo[start:start + args.batch_size]
        prompts = [job.prompt for job in batch]
        seeds = [job.seed for job in batch]
        negative_prompts = [args.negative_prompt]
        if args.random_negative_prompt:
            negative_prompts = [random_letters(seed) for seed in seeds]

        images = generate(pipeline, prompts, seeds, negative_prompts=negative_prompts,
                          on_step=partial(show_speed, bar, len(batch), args.steps),
                          **sampling_options(args))

        if start == 0:
            # Written only now, so that a command that fails does not reserve the folder.
            begin_or_resume(out / "settings.json", out, settings)
            # Where the images come from, for the tables of evaluate.py.
            with complete(out / "checkpoint.json") as temporary:
                temporary.write_bytes(fetch(args.checkpoint, "config.json").read_bytes())
        for job, image in zip(batch, images):
            with complete(out / job.file) as temporary:
                image.save(temporary, "PNG")
    bar.close()


def show_speed(bar, images, steps, *_):
    """Move the progress bar on by one step of a batch of `images`."""
    bar.update(images)
    if not bar.disable:
        done = bar.n / steps
        seconds = max(bar.format_dict["elapsed"], 1e-9)
        speed = f"{done / seconds:.2f} images/s, {seconds / done:.2f} s/image"
        bar.set_postfix_str(speed, refresh=False)


def describe(out, rows, names, jobs, layout):
    """Write what is about all samples: samples.jsonl, the sheet, the benchmarks' files."""
    for row, files in zip(rows, names):
        # GenEval's tools look up in the metadata what a prompt asks for.
        if layout == "geneval":
            folder = (out / files[0]).parent.parent
            write_jsonl(folder / "metadata.jsonl", [row])
        # DPG-Bench's tools cut a grid into its four images.
        if layout == "dpg":
            tiles = [Image.open(out / file) for file in files]
            stem = Path(files[0]).name.rsplit("_", 1)[0]
            with complete(out / f"{stem}.png") as temporary:
                contact_sheet(tiles, columns=2, gap=0).save(temporary, "PNG")

    # The list of samples: evaluate.py takes these files, and not the sheet. By the names
    # it finds COCO's own images.
    samples = [job._asdict() for job in jobs]
    if layout == "named":
        per_prompt = len(names[0])
        for number, sample in enumerate(samples):
            sample["name"] = rows[number // per_prompt]["name"]
    write_jsonl(out / "samples.jsonl", samples)
    # DPG-Bench's tools take every picture of the folder for a grid: no sheet there.
    if layout == "dpg":
        print(f"{len(rows)} grids in {out}")
        return
    shown = jobs[:64]
    images = [Image.open(out / job.file) for job in shown]
    with complete(out / "sheet.png") as temporary:
        contact_sheet(images, [job.prompt for job in shown]).save(temporary, "PNG")
    print(f"{len(jobs)} images in {out}, the first {len(shown)} on {out / 'sheet.png'}")


if __name__ == "__main__":
    command_line(main)
