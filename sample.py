"""Stage 5, sampling (paper 4.1): images for any prompts, from any checkpoint.

    python sample.py --checkpoint Lucasdegeorge/CAD-I --out out/samples \\
        --prompt "A retriever on a red sofa"

Prompts come from --prompt (which may be repeated) or from any file of captions
or prompts that `caption.read_prompts` understands: text (one a line), JSONL,
CSV, TSV, a folder of .txt files (DPG-Bench's) or COCO's captions_val2014.json.
Image i starts from the noise of seed --seed + i: another batch size, more ranks
under torchrun, or a command that was killed and started again give the same
images, up to rounding (a grey level, now and then, in batches of another size).

The estimate x_0 is clamped to +-1.2 at every step, as in the released pipeline:
guidance overshoots, and the error grows from step to step. 1.2 is tight; see
--clamp.

From Python, see `generate`.
"""

import contextlib
import io
import math
import random
import re
import string
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

# First: it keeps Ctrl-C quiet while torch is imported.
from common import (BATCH_SIZE, COUNT, SEED, Options, UserError, command_line, contact_sheet, fetch,
                    fingerprint, in_batches, local_device, make_together, number, open_image,
                    rank_and_world, read_json, reading, refuse_not_finite, save_png, sha256,
                    write_file, write_json, write_jsonl)

import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import model_cad
import model_dit
from caption import read_prompts
from encode import (encode_text, fingerprint_of_t5, load_text_encoder, load_vae,
                    to_images, with_unknown_words)

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
    blocks: a ModuleList of the layers that are alike; torch.compile translates them.
    checkpoint_activations: a bool, which `train.py --checkpoint-activations` sets.
    """

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

        coin (B,), uniform in [0, 1): what a network decides at random in training, it
        decides by these, so that a run can be repeated; None: it draws them.
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


def check_models(models):
    """Raise TypeError if an entry of MODELS does not keep the contract above."""
    # Every torch module inherits a `forward` that only raises.
    missing = torch.nn.Module.forward
    for name, (network, presets, default) in models.items():
        for method in ("condition", "denoise", "forward"):
            if getattr(network, method, missing) is missing:
                raise TypeError(f"MODELS[{name!r}]: {network.__name__} has no `{method}`")
        if default not in presets:
            raise TypeError(f"MODELS[{name!r}]: has no default preset {default!r}")


check_models(MODELS)


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


class GuidedModel:
    """The network with classifier-free guidance (Ho and Salimans 2022), for one batch.

    Calling it with x_t and t gives the estimates of x_0 and of the noise. The
    texts are processed once, here, because they are the same at every step.
    Between calls it remembers the model's state (CAD's latents).
    """

    def __init__(self, model, cond, null, noise, guidance, clamp):
        """Process the texts. The arguments are those of `ddim`."""
        self.model = model
        self.guidance = guidance
        self.clamp = clamp
        self.state = None

        # A caption has coherence 1, whatever guidance leads away from has 0.
        B = len(noise)
        ones = torch.ones(B, device=noise.device)
        text = cond[0].expand(B, -1, -1)                        # (B, L, D)
        mask = cond[1].expand(B, -1)                            # (B, L)
        self.context = model.condition(text, mask, ones)
        # What a context holds is the model's own affair, so it cannot be cut in half: the
        # first step needs the captions' alone, the later ones both.
        if guidance:
            # The null prompts behind the captions, all padded to the length of the longest.
            texts = [*text, *null[0].expand(B, -1, -1)]
            masks = [*mask, *null[1].expand(B, -1)]
            text = pad_sequence(texts, batch_first=True)        # (2 B, L, D)
            mask = pad_sequence(masks, batch_first=True)        # (2 B, L)
            coherence = torch.cat([ones, 0 * ones])             # (2 B,)
            self.guided_context = model.condition(text, mask, coherence)

    def __call__(self, x, t, first):
        """Return x_0 and eps at the time t, both like x: (B, C, H, W) in float64.

        There is no guidance at the first step, as in the release: there x_0 is
        divided by sqrt(gamma) = 3e-5, and guidance would multiply the network's
        error in addition.
        """
        if self.guidance and not first:
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
        state = self.state
        # After the first step, which has no guidance, the captions' state serves both halves.
        if state is not None and len(state) < len(x):
            state = torch.cat([state, state])
        # Filled on the device: copying a number to a GPU would make the CPU wait for it.
        g = torch.full((len(x),), float(gamma(t)), device=x.device)
        eps, self.state = self.model.denoise(x.float(), g, context, state)
        return eps.double()


@torch.no_grad()
def ddim(model, noise, cond, null, steps=250, guidance=8.0, clamp=1.2,
         spacing=None, on_step=None):
    """Return x_0 (B, C, H, W) for noise (B, C, H, W) by DDIM (Song et al. 2021), eta = 0.

    cond, null: (text, mask) of the captions and of the null prompt, each with 1
    or B rows. steps: at least 1. guidance: w of eps = eps_cond + w (eps_cond -
    eps_null); 0 is none. clamp: bound of |x_0| at every step; 0 or None is
    none. spacing: see `times`; without, linear. on_step(step, x, x_0) is called
    after every step.
    """
    t = times(steps, spacing or "linear")
    predict = GuidedModel(model, cond, null, noise, guidance, clamp)
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
               spacing=None, on_step=None):
    """Return x_0 (B, C, H, W) by DPM-Solver++ (2M) (Lu et al. 2022, Algorithm 2).

    The arguments are those of `ddim`, and so is the cost: one evaluation a
    step. DDIM takes x_0 to be constant during a step; this solver extends the
    line through the last two estimates, as a function of lambda, half the
    logarithm of the signal-to-noise ratio.

    Without guidance its error falls almost with the square of the number of
    steps, DDIM's only in proportion. That needs the cosine spacing, its
    default: the first and the last step of the linear one are too long in
    lambda. With guidance both fall in proportion: the first step has none, and
    that alone is an error of the size of one step.
    """
    t = times(steps, spacing or "cosine")
    alpha = gamma(t).sqrt()
    sigma = (1 - gamma(t)).sqrt()
    # Infinite at t = 0.
    lam = (alpha / sigma).log()
    predict = GuidedModel(model, cond, null, noise, guidance, clamp)
    x = noise.double()
    x_0_before = None
    for i in range(steps):
        x_0, _ = predict(x, t[i], first=(i == 0))
        h = lam[i + 1] - lam[i]
        D = x_0
        # The first step knows no earlier estimate, and the last one is so long in lambda
        # that the line would lead nowhere. Both are steps of DDIM.
        if 0 < i < steps - 1:
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
# A checkpoint becomes a pipeline

def load_model(path_or_repo, device="cpu"):
    """Return the model of a checkpoint folder or hub repository, in eval mode.

    Its config.json is `model.checkpoint_config`. Reads our format ({"model": "dit" or "cad",
    "args": {...}}) and the released CAD-I. Raises UserError.
    """
    config_file = fetch(path_or_repo, "config.json")
    weights_file = fetch(path_or_repo, "model.safetensors")
    config = read_json(config_file, "the config.json of a checkpoint")
    with reading(weights_file, "the weights of a network"):
        # safetensors holds numbers and names only: unlike a pickle, it cannot run code.
        weights = load_file(weights_file)
        refuse_not_finite(weights_file, weights.items())

    with reading(config_file, f"the config.json of {' or '.join(MODELS)}"):
        # The released CAD-I has keys and tensor names of its own.
        if "latents_dim" in config:
            kind = "cad"
            sizes, weights = model_cad.from_released(config, weights)
        else:
            kind = config["model"]
            sizes = config["args"]
        # What no checkpoint of ours would say. Blocks by the million would take hours.
        if not 0 < config.get("scaling_factor", 1) < math.inf:
            raise ValueError("its scaling_factor is not a positive number")
        if not isinstance(config.get("training", {}), dict):
            raise ValueError("training is no JSON object")
        if max(sizes.values(), default=0) > 4096:
            raise ValueError("a size above 4,096")
        model = MODELS[kind].network(**sizes)

    with reading(weights_file, f"the weights of the {type(model).__name__} in its config.json"):
        model.load_state_dict(weights)
    model.checkpoint_config = config
    return model.eval().requires_grad_(False).to(device)


def save_checkpoint(folder, model, config):
    """Write a checkpoint folder, which `load_model` reads and which is ready for the hub.

    model: the network whose weights are saved; config: of config.json (train.py's).
    """
    write_file(folder / "model.safetensors", save(model.state_dict()))
    write_json(folder / "config.json", config)
    write_file(folder / "README.md", model_card(config).encode())


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
    config = model.checkpoint_config
    autoencoder = load_vae(str(vae or config.get("vae") or VAE), device)
    t5_name = str(text_encoder or config.get("text_encoder") or TEXT_ENCODER)
    tokenizer, t5 = load_text_encoder(t5_name, device)
    pipeline = Pipeline(model, autoencoder, tokenizer, t5)
    check_encoders(path_or_repo, pipeline, vae, text_encoder)
    # Training scaled the latents by it, whatever an autoencoder named here says.
    autoencoder.scaling_factor = config.get("scaling_factor", autoencoder.scaling_factor)
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
    found = fingerprints(pipeline)
    changed = changed_encoders(model.checkpoint_config, found)
    encoders = [("--vae", vae, "vae_fingerprint", autoencoder.config["latent_channels"],
                 model.config["channels"]),
                ("--text-encoder", text_encoder, "T5", t5.config.d_model,
                 model.config["text_dim"])]
    for option, named, key, size, wanted in encoders:
        if size != wanted or (key in changed and not named):
            raise UserError(f"{path_or_repo}: its encoder has changed ({wanted} channels, "
                            f"{key} {changed.get(key)}; now {size}, {found[key]}): "
                            f"give {option} the one it was trained with")


def encoders_of(meta):
    """Return the fingerprints in an encoded set's meta.json, named as in a config.json."""
    return {"vae_fingerprint": meta["autoencoder"], "T5": meta["T5"]}


def changed_encoders(checkpoint, found):
    """Return {key: the checkpoint's} of fingerprints `found` that its config contradicts."""
    # Old checkpoints, and those from elsewhere, have no fingerprints.
    training = checkpoint.get("training") or {}
    return {key: training[key] for key, value in found.items()
            if value and training.get(key) not in (None, value)}


def autocast(device, precision):
    """Return the context for `--precision` auto, fp32 or bf16; auto is bf16 on CUDA."""
    use_bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=use_bf16)


def compile_blocks(model, dynamic=None):
    """Let torch.compile translate a network: the captions' part, then block by block.

    Equal blocks are translated only once. And DDP sends a gradient as soon as
    it is there: those of a compiled block are sent while the backward pass goes
    on below it. A network compiled as a whole hands over all of them at its
    end, and torch's way of splitting it for DDP knows neither activation
    checkpoints nor CAD's first pass without gradients.

    dynamic: False makes one version for each batch size and length of text;
    None, torch's default, makes a version for all of them when the second one
    comes.
    """
    # In this process. A signal to the whole job would end compiler processes, and the step
    # would wait for them for ever.
    torch._inductor.config.compile_threads = 1
    # Blocks are small enough for DDP: torch need not cut them up once more.
    torch._dynamo.config.optimize_ddp = False
    # One version for each length of text, with and without gradients.
    torch._dynamo.config.recompile_limit = 64
    model.condition = torch.compile(model.condition, dynamic=dynamic)
    for block in model.blocks:
        block.compile(dynamic=dynamic)


# --------------------------------------------------------------------------------------
# Prompts become images

@torch.no_grad()
def generate(pipeline, prompts, seeds=None, steps=250, guidance=8.0, clamp=1.2,
             solver="ddim", spacing=None, negative_prompts=("",), max_tokens=256,
             precision="auto", on_step=None):
    """Return PIL images for prompts, all made as one batch (a GPU holds some 16 to 64).

    seeds: one number an image; without, 0, 1, 2, ... The same prompt and seed
    give the same image in any batch, up to rounding. negative_prompts: what
    guidance leads away from, one text for all or one for each prompt; it is the
    null prompt "" unless given. max_tokens: a longer prompt loses its end.
    precision: "auto" (bf16 on CUDA), "fp32" or "bf16". solver: a key of SOLVERS.
    spacing: without, the solver's own. The other arguments are those of `ddim`.
    Raises UserError.

        >>> pipeline = load_pipeline("out/toy/dit")
        >>> images = generate(pipeline, ["a large red circle on dark ground"], guidance=1.5)
        >>> images[0].save("circle.png")
    """
    count = len(prompts)
    seeds = range(count) if seeds is None else seeds
    # A text is a list of letters to Python, and would give an image for each.
    valid = (not isinstance(prompts, str) and count == len(seeds) > 0
             and len(negative_prompts) in (1, count) and solver in SOLVERS
             and precision in PRECISIONS and steps >= 1 and max_tokens >= 1
             and guidance >= 0 and (clamp or 0) >= 0)
    if not valid:
        raise UserError("needs a list of prompts, as many seeds, one negative prompt or as many, "
                        "a known solver and precision, at least 1 for steps and max_tokens, "
                        "at least 0 for guidance and clamp")

    model, vae, tokenizer, t5 = pipeline
    cond = encode_text(tokenizer, t5, prompts, max_tokens)      # (B, L, D), (B, L)
    null = encode_text(tokenizer, t5, negative_prompts, max_tokens)
    noise = starting_noise(model, seeds).to(t5.device)          # (B, C, h, w)
    with autocast(noise.device, precision):
        x_0 = SOLVERS[solver](model, noise, cond, null, steps, guidance, clamp,
                              spacing, on_step)                 # (B, C, h, w)
    # The model's latents are the autoencoder's times a factor.
    return to_images(vae.decode(x_0 / vae.scaling_factor))


def starting_noise(model, seeds):
    """Return noise (B, C, h, w) of the model's size, each image's from its own seed."""
    shape = (model.config["channels"], model.config["size"], model.config["size"])
    # On the CPU: the numbers are the same whatever device they go to.
    rng = torch.Generator()
    noise = [torch.randn(shape, generator=rng.manual_seed(seed)) for seed in seeds]
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
# Prompts become files

# The file in --out of prompt p's image k, which is image i of all, for each --format.
FORMATS = {
    "flat": "{i:06d}.png",
    "geneval": "{p:05d}/samples/{k:04d}.png",           # as GenEval's tools expect them
    "dpg": ".tiles/{name}_{k}.png",                     # its tools want grids of these
}


def list_samples(args, rows):
    """Return {file: its line of samples.jsonl} for all prompts, dicts. Raises UserError."""
    per_prompt = args.images_per_prompt
    pattern = FORMATS[args.format]
    # COCO's images, and prompts that caption.py extended from them, have both.
    of_coco = all("name" in row and "file" in row for row in rows)
    if of_coco and args.format == "flat":
        pattern = "{name}.png" if per_prompt == 1 else "{name}_{k}.png"

    samples = {}
    for p, row in enumerate(rows):
        name = name_of(row, p) if "{name}" in pattern else None
        for k in range(per_prompt):
            i = len(samples)
            file = pattern.format(p=p, k=k, i=i, name=name)
            # A second prompt of that name would find the first one's images and keep them.
            if file in samples:
                raise UserError(f"prompt {p + 1}: its images would replace those of another "
                                f"prompt of the same name ({file})")
            own = {"file": file, "prompt": row["prompt"], "seed": args.seed + i}
            # In a row of COCO's, "file" is the photo's.
            samples[file] = own | row | own
    return samples


def name_of(row, p):
    """Return the name of prompt p's files. Raises UserError for what cannot be one."""
    name = row.get("name", f"{p:05d}")
    # Names come from outside: "../../x" must not lead out of the folder. The sheet of all
    # samples is called "sheet".
    valid = isinstance(name, str) and re.fullmatch(r"[^./\\\s][^/\\]{0,199}", name)
    if not valid or not name.isprintable() or name == "sheet":
        raise UserError(f"{row.get('prompt_file', f'prompt {p + 1}')}: has the name "
                        f"{str(name)[:80]!r}: not a name for a file")
    return name


def png_is_whole(path):
    """Tell whether a PNG file need not be made: it is there, and neither cut nor damaged."""
    # Pillow raises almost any exception on broken bytes.
    with contextlib.suppress(Exception), Image.open(path, formats=["PNG"]) as image:
        image.verify()
        return True
    return False


def make_images(args, pipeline, missing):
    """Yield the `missing` samples' PNG files as bytes, made in batches of --batch-size."""
    texts = [args.negative_prompt, *[sample["prompt"] for sample in missing]]
    unknown = with_unknown_words(pipeline.tokenizer, texts)
    if unknown:
        print(f"{len(unknown)} of {len(texts)} prompts hold words that the text encoder does "
              f"not know; the first: {unknown[0][:200]!r}", file=sys.stderr)

    # Compiling takes a while: not for a few images.
    worth_compiling = len(missing) >= 4 * args.batch_size
    if local_device().type == "cuda" and not args.no_compile and worth_compiling:
        compile_blocks(pipeline.model)

    batches = in_batches(missing, args.batch_size)
    bar = tqdm(total=len(batches) * args.steps, desc="sampling", unit="step",
               disable=rank_and_world()[0] > 0)
    for batch in batches:
        seeds = [sample["seed"] for sample in batch]
        negative_prompts = [args.negative_prompt]
        if args.random_negative_prompt:
            negative_prompts = [random_letters(seed) for seed in seeds]
        images = generate(pipeline, [sample["prompt"] for sample in batch], seeds,
                          args.steps, args.guidance, args.clamp, args.solver, args.spacing,
                          negative_prompts, args.max_tokens, args.precision,
                          on_step=lambda *_: bar.update())
        for image in images:
            file = io.BytesIO()
            image.save(file, "PNG")
            yield file.getvalue()
    bar.close()


def write_lists(args, rows, samples):
    """Write what is about all samples: the benchmarks' files, the sheet, samples.jsonl."""
    out = Path(args.out)
    for p, files in enumerate(in_batches(list(samples), args.images_per_prompt)):
        # GenEval's tools look up in the metadata what a prompt asks for.
        if args.format == "geneval":
            write_jsonl(out / f"{p:05d}/metadata.jsonl", [rows[p]])
        # DPG-Bench's tools cut a grid into its four images.
        if args.format == "dpg":
            tiles = [open_image(out / file, 0) for file in files]
            name = name_of(rows[p], p)
            save_png(contact_sheet(tiles, columns=2, gap=0), out / f"{name}.png")

    # DPG-Bench's tools take every picture of the folder for a grid: no sheet there.
    if args.format != "dpg":
        shown = list(samples)[:64]
        images = [open_image(out / file, 0) for file in shown]
        prompts = [samples[file]["prompt"] for file in shown]
        save_png(contact_sheet(images, prompts), out / "sheet.png")
    # evaluate.py takes the files of this list, and finds COCO's own images by their names.
    write_jsonl(out / "samples.jsonl", samples.values())
    print(f"{out}: {len(samples)} images of {len(rows)} prompts")


# --------------------------------------------------------------------------------------
# The command

def utf8(text):
    """Return an option's text. Raises ValueError if it holds half a character."""
    # As "\ud83d" is one. The tokenizer would fail on it.
    text.encode("utf-8")
    return text


def arguments(argv):
    """Return the checked options. Raises UserError."""
    parser = Options(__doc__)
    add = parser.add
    add("--checkpoint", "folder or hub repository with config.json and model.safetensors",
        required=True)
    add("--out", "folder for the images, samples.jsonl and sheet.png", required=True)
    add("--prompt", "a prompt (may be given again)", kind=utf8, action="append")
    add("--prompts", "text, JSONL, CSV, TSV, COCO's captions, or a folder of .txt files")
    add("--limit", "at most so many of --prompts, chosen by --seed", kind=COUNT)
    add("--images-per-prompt", "GenEval and DPG take 4", 1, number(int, 1, 10_000))
    add("--format", "flat, geneval (its tools' folders) or dpg (one 2 x 2 grid a prompt)", "flat",
        choices=FORMATS)

    # The sampler: DDIM with 250 steps is the paper's, guidance and clamp the release's.
    add("--solver", "ddim, or dpm++: of second order without guidance", "ddim", choices=SOLVERS)
    add("--steps", "steps of the solver", 250, number(int, 1, 100_000))
    add("--spacing", "linear in t, or cosine: short steps at both ends (default: linear for ddim, "
        "cosine for dpm++)", choices=SPACINGS)
    add("--guidance", "w; 0 is none", 8.0, number(float, 0))
    add("--negative-prompt", "what guidance leads away from; without, the null prompt of training",
        "", utf8)
    parser.flag("--random-negative-prompt",
                "random letters, others for each image, as in the release's pipeline")
    add("--clamp", "bound of |x_0| at every step, 0 is none; 1.2 cuts a fifth of the values of "
        "ImageNet's latents (calculated), 3 cuts under 1%%", 1.2, number(float, 0))
    add("--max-tokens", "tokens of a prompt that are read (paper: 256, released CAD-I: 128)", 256,
        number(int, 1, 100_000))
    add("--seed", "image i has seed + i", 0, SEED)
    add("--precision", "auto (bf16 on CUDA, else fp32), fp32 or bf16", "auto", choices=PRECISIONS)

    # The rest changes no image, unless --vae or --text-encoder names other weights.
    add("--vae", f"folder or hub repository (default: the checkpoint's own, or {VAE})")
    add("--text-encoder", f"folder or hub repository (default: likewise, {TEXT_ENCODER})")
    add("--batch-size", "images at once", 16, BATCH_SIZE)
    parser.flag("--no-compile", "CUDA: do not torch.compile the network")
    args = parser.parse_args(argv)

    if not args.prompt and not args.prompts:
        parser.error("no prompts: give --prompt or --prompts")
    if args.limit and not args.prompts:
        parser.error("--limit: chooses among --prompts, which are not given")
    if args.format == "dpg" and args.images_per_prompt != 4:
        parser.error("--format dpg makes 2 x 2 grids: give --images-per-prompt 4")
    if args.negative_prompt and args.random_negative_prompt:
        parser.error("--negative-prompt and --random-negative-prompt: give only one")
    # What it means here belongs to the images.
    if args.precision == "auto":
        args.precision = "bf16" if local_device().type == "cuda" else "fp32"
    return args


# All other options belong to a folder of images: with another one, they would be others.
CHANGES_NO_IMAGE = ("checkpoint", "out", "prompt", "prompts", "limit", "batch_size", "no_compile")


def main(argv=None):
    """Make the images that are not there yet, then the files that list them."""
    args = arguments(argv)
    out = Path(args.out)
    # Images may go below a checkpoint's folder, but not among an input's files or in its place.
    taken = {out.resolve(), (out / "samples.jsonl").resolve()}
    for given in (args.checkpoint, args.vae, args.text_encoder, args.prompts):
        if given and Path(given).resolve() in taken:
            raise UserError(f"--out {out}: {given} is an input of this command: choose another")

    rows = [{"prompt": prompt} for prompt in args.prompt or []]
    skipped = []
    if args.prompts:
        read, skipped = read_prompts(args.prompts, args.limit, args.seed)
        rows += read
    samples = list_samples(args, rows)

    pipeline = None
    # Where all images are there, nothing is loaded: the encoders are those of the images.
    if all(png_is_whole(out / file) for file in samples):
        encoders = read_json(out / "settings.json", "these images' settings").get("encoders")
    else:
        pipeline = load_pipeline(args.checkpoint, args.vae, args.text_encoder)
        encoders = fingerprints(pipeline)

    # All that the images depend on.
    settings = {name: value for name, value in vars(args).items()
                if name not in CHANGES_NO_IMAGE}
    settings["encoders"] = encoders
    settings["weights"] = sha256(fetch(args.checkpoint, "model.safetensors"))
    settings["prompts"] = fingerprint([row["prompt"], row.get("name")] for row in rows)
    make = partial(make_images, args, pipeline)
    products = [out / name for name in
                ("samples.jsonl", "skipped.jsonl", "checkpoint.json", "sheet.png")]
    if make_together(out, settings, samples, make, png_is_whole, products):
        if skipped:
            write_jsonl(out / "skipped.jsonl", skipped)
            print(f"{len(skipped)} prompts skipped ({out / 'skipped.jsonl'}), the first: "
                  f"{skipped[0]['file']}: {skipped[0]['reason']}", file=sys.stderr)
        # Where the images come from, for the tables of evaluate.py.
        config = fetch(args.checkpoint, "config.json")
        write_file(out / "checkpoint.json", config.read_bytes())
        write_lists(args, rows, samples)


if __name__ == "__main__":
    command_line(main)
