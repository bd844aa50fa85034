"""Stage 4, training (paper 3.3, 4.1): Algorithm 1 on encoded ImageNet and its composites.

    torchrun --nproc-per-node 8 train.py --model dit --data encoded/train \\
        --augmented encoded/cutmix --out out/dit-i

OUT is a checkpoint for sample.py: config.json, model.safetensors (the averaged weights) and a
model card. Beside it lie log.jsonl, progress.html, sample grids, lasting checkpoints (step-0050000
and so on) and state.pt. A run that was killed or stopped (Ctrl-C and SIGTERM save first) goes on
with the same command.

Every random number is a function of (seed, step, index in the batch): the data, times and
noise do not depend on kills, on the number of ranks, of workers, or on the micro-batch.
"""

import argparse
import contextlib
import copy
import functools
import gc
import math
import sys
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.adamw import adamw
from tqdm import tqdm

import model_cad
from common import (HelpFormatter, StopRequest, UserError, append_jsonl, at_least, autocast,
                    between, changed_encoders, command_line, compile_blocks, complete,
                    contact_sheet, encoders_of, end_workers, local_device, on_any_rank, one_line,
                    only_command, pad_text, padded_length, rank_and_world, read_jsonl,
                    refuse_other_settings, report_lost_rank, signals_wait, to_images, write_jsonl)
from cutmix import SETTINGS
from encode import Encoded, load_vae, refuse_other_encoders
from metrics.charts import draw_progress
from sample import MODELS, ddim, gamma, load_model, save_checkpoint

# --------------------------------------------------------------------------------------
# Algorithm 1: what a step is trained on

# Each purpose has its own stream of random numbers: default_rng([seed, stream, ...]).
STEP_STREAM, ORDER_STREAM, VALIDATION_STREAM = 0, 2, 3


def choose(t, rng, tau, p):
    """Return which samples come from the augmented set (eq. 3). t (B,) in [0, 1] -> bool (B,).

    A composite has seams, and noise hides them only where t > tau. There, a coin of
    probability p decides: with the paper's tau = 0.4 and p = 0.5, 30% of all samples.
    """
    t = np.asarray(t)
    return (t > tau) & (rng.random(len(t)) < p)


# Two sets, and a batch may span two epochs of each: four orders.
@functools.lru_cache(maxsize=4)
def epoch_order(seed, which, epoch, count):
    """Return the order in which an epoch goes through a set (which: 0 originals, 1 composites)."""
    return np.random.default_rng([seed, ORDER_STREAM, which, epoch]).permutation(count)


class Batches(torch.utils.data.Dataset):
    """Algorithm 1, the lines that choose and read: a step -> this rank's share of its batch.

    Sample number n = step * batch size + index has a candidate in each set: the n-th picture in
    that set's shuffled order. Which of the two is taken is decided before anything is read, so
    that the other costs nothing. The other is not seen in that epoch: with the paper's tau and p,
    30% of the originals are passed over in each epoch.
    """

    def __init__(self, original, augmented, args, rank, world):
        self.original = original
        self.augmented = augmented
        self.args = args
        share = args.batch_size // world
        self.mine = range(rank * share, (rank + 1) * share)

    def __getitem__(self, step):
        args = self.args
        size = args.batch_size

        # Each rank draws for the whole batch, and keeps its share.
        rng = np.random.default_rng([args.seed, STEP_STREAM, step])
        t = rng.random(size)                                             # t ~ U(0, 1)
        from_composites = choose(t, rng, args.tau, args.p)               # eq. 3
        dropped = rng.random(size) < args.drop               # for classifier-free guidance
        coin = rng.random(size)
        noise_seed = rng.integers(2 ** 63, size=size)

        picks = []
        for index in self.mine:
            which = int(from_composites[index])
            data = self.augmented if which else self.original
            epoch, position = divmod(step * size + index, len(data))
            i = int(epoch_order(args.seed, which, epoch, len(data))[position])
            picks.append((data, i))

        mine = self.mine
        return as_batch(picks, t[mine], dropped[mine], coin[mine], noise_seed[mine])


def as_batch(picks, t, dropped, coin, noise_seed):
    """Read samples and return them as a batch, a dict of CPU tensors.

    picks: [(data set, number of the sample)]. dropped (B,) bool: whose caption becomes the
    null prompt. coin (B,), uniform in [0, 1): decides on CAD's self-conditioning. All captions
    stand one after the other in "tokens" (sum of L_i, D_text), "lengths" (B,) tells them apart.
    """
    means, stds, texts = [], [], []
    for (data, i), drop in zip(picks, dropped):
        mean, std = data.moments(i)                                      # each (C, h, w)
        means.append(mean)
        stds.append(std)
        texts.append(data.null if drop else data.text(i))                # (L_i, D_text)
    return {"t": torch.from_numpy(t).float(),
            "mean": torch.stack(means),
            "std": torch.stack(stds),
            "tokens": torch.cat(texts),
            "lengths": torch.tensor([len(text) for text in texts]),
            "coherence": torch.from_numpy(~dropped).float(),
            "coin": torch.from_numpy(coin).float(),
            "noise_seed": torch.from_numpy(noise_seed)}


def draw_inputs(batch, scaling_factor, device):
    """Return the network's inputs on the device, for a batch of `Batches`.

    t (B,), x_0 and eps (B, C, h, w), text (B, L, D_text), mask (B, L), coherence and coin (B,).
    x_0 is drawn anew from its mean and std each time the picture is seen.
    """
    # A generator for each sample: its noise does not depend on the samples beside it.
    generator = torch.Generator(device)
    noise = []
    for seed in batch["noise_seed"].tolist():
        generator.manual_seed(seed)
        shape = (2, *batch["mean"].shape[1:])
        noise.append(torch.randn(shape, generator=generator, device=device))
    noise = torch.stack(noise)                                           # (B, 2, C, h, w)
    noise_of_x_0 = noise[:, 0]
    eps = noise[:, 1]

    # Looked up while the lengths are still on the CPU, so that it need not wait for the GPU.
    length = padded_length(batch["lengths"])
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    text, mask = pad_text(batch["tokens"], batch["lengths"], length)
    x_0 = (batch["mean"] + batch["std"] * noise_of_x_0) * scaling_factor
    return {"t": batch["t"],
            "x_0": x_0,
            "eps": eps,
            "text": text,
            "mask": mask,
            "coherence": batch["coherence"],
            "coin": batch["coin"]}


# --------------------------------------------------------------------------------------
# Equations 1 and 2, and the gradient of a batch

def diffusion_losses(model, t, x_0, eps, text, mask, coherence, coin):
    """Return each sample's mean squared error of the predicted noise (eq. 1 and 2): (B,).

    t, coherence, coin: (B,). x_0, eps: (B, C, h, w). text: (B, L, D_text). mask: (B, L) bool.
    """
    signal_level = gamma(t)                                              # (B,)
    g = signal_level[:, None, None, None]                                # (B, 1, 1, 1)
    x_t = g.sqrt() * x_0 + (1 - g).sqrt() * eps                          # eq. 1
    eps_hat = model(x_t, signal_level, text, mask, coherence, coin)
    return (eps_hat.float() - eps).square().flatten(1).mean(1)           # eq. 2


def add_gradient(network, inputs, args):
    """Add the gradient of a batch's mean loss to the parameters, and return that loss.

    The batch goes through the network in parts of --micro-batch. The loss stays on the
    device: reading it here would make the CPU wait for the GPU at every step.
    """
    size = len(inputs["t"])
    total = torch.zeros((), device=inputs["t"].device)
    for start in range(0, size, args.micro_batch):
        end = min(start + args.micro_batch, size)
        part = {name: tensor[start:end] for name, tensor in inputs.items()}

        # Ranks exchange their gradients once, during the backward pass of the last part.
        exchange_or_not = contextlib.nullcontext()
        if end < size and isinstance(network, DistributedDataParallel):
            exchange_or_not = network.no_sync()
        with exchange_or_not:
            with autocast(total.device, args.precision):
                loss = diffusion_losses(network, **part).sum() / size
            loss.backward()
        total += loss.detach()
    return total


# --------------------------------------------------------------------------------------
# The optimiser

class Numbers(NamedTuple):
    """The numbers of one step, as tensors without dimensions on the weights' device.

    Some of them only the GPU knows: to ask for them, the CPU would have to wait for it.
    """

    lr: torch.Tensor
    scale: torch.Tensor         # of the gradient: below 1 where it is clipped
    go: torch.Tensor            # 1, or 0 for a step that is skipped
    updates: torch.Tensor       # steps made, this one included, without skipped ones


def trust_ratio(w_norm, u_norm):
    """Return LAMB's layer-wise rate |w| / |u|; 1 where one of the two is zero."""
    usable = (w_norm > 0) & (u_norm > 0)
    return torch.where(usable, w_norm / u_norm, 1.0)


def adamw_update(ws, gs, ms, vs, numbers, beta1, beta2, eps, decay):
    """Make one step of AdamW for lists of tensors, in place: torch's own, in one pass.

    ws: the weights; gs: the gradients, which are multiplied by `numbers.scale`; ms, vs: their
    moments.
    """
    # torch divides the gradients by grad_scale, and changes nothing where found_inf is 1. It wants
    # a number of steps for each tensor, to which it adds 1 itself.
    updates = list((numbers.updates - 1).repeat(len(ws)).unbind())
    adamw(ws, gs, ms, vs, [], updates, fused=True, grad_scale=1 / numbers.scale,
          found_inf=1 - numbers.go, amsgrad=False, beta1=beta1, beta2=beta2, lr=numbers.lr,
          weight_decay=decay, eps=eps, maximize=False)


def lamb_update(ws, gs, ms, vs, us, numbers, beta1, beta2, eps, decay):
    """Make one step of LAMB (You et al. 2020) for lists of tensors, in place.

    With m^ and v^ for the moments without their bias, u = -(m^ / (sqrt(v^) + eps) + decay * w).
    Each tensor's step is as long as lr times the tensor itself: w <- w + lr * |w| / |u| * u.

    ws, gs, ms, vs: as for `adamw_update`. us: tensors of the same shapes, which are overwritten.
    """
    # At a learning rate of 1 and without decay, torch's AdamW adds -m^ / (sqrt(v^) + eps) to what it
    # is given. Here that is -decay * w, and u comes out.
    for w, u in zip(ws, us):
        torch.mul(w, -decay, out=u)
    at_rate_1 = numbers._replace(lr=torch.ones_like(numbers.lr))
    adamw_update(us, gs, ms, vs, at_rate_1, beta1, beta2, eps, 0.0)

    w_norms = torch.stack(torch._foreach_norm(ws))                       # (number of tensors,)
    u_norms = torch.stack(torch._foreach_norm(us))
    rates = numbers.go * numbers.lr * trust_ratio(w_norms, u_norms)
    for w, u, rate in zip(ws, us, rates.unbind()):
        w.addcmul_(u, rate)


class Lamb(torch.optim.Optimizer):
    """LAMB; a group without `trust_ratio` or weight decay gets AdamW, as in the release."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01,
                 trust_ratio=True):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps,
                                  "weight_decay": weight_decay, "trust_ratio": trust_ratio})

    @torch.no_grad()
    def step(self, scale=1.0, go=True):
        """Make a step, with gradients times `scale`, if `go` (both may be tensors)."""
        device = self.param_groups[0]["params"][0].device

        def as_tensor(value):
            # Filling, unlike copying a number to a GPU, does not wait for it.
            if isinstance(value, torch.Tensor):
                return value.float()
            return torch.full((), float(value), device=device)

        go = as_tensor(go)
        updates = as_tensor(self.state.get("updates", 0)) + go
        self.state["updates"] = updates

        for group in self.param_groups:
            tensors = [self.tensors_of(w) for w in group["params"] if w.grad is not None]
            if not tensors:
                continue
            numbers = Numbers(as_tensor(group["lr"]), as_tensor(scale), go, updates)
            constants = (*group["betas"], group["eps"], group["weight_decay"])
            ws, gs, ms, vs = (list(part) for part in zip(*tensors))
            if not group["trust_ratio"] or group["weight_decay"] == 0:
                adamw_update(ws, gs, ms, vs, numbers, *constants)
            elif device.type == "cuda":
                us = [torch.empty_like(w) for w in ws]
                lamb_update(ws, gs, ms, vs, us, numbers, *constants)
            else:
                # One by one, and all in the same memory: what the step of a matrix reads then stays
                # in the CPU's cache, and memory that is new to a process is slow to touch.
                memory = ws[0].new_empty(max(w.numel() for w in ws))
                for w, g, m, v in tensors:
                    u = memory[:w.numel()].view_as(w)
                    lamb_update([w], [g], [m], [v], [u], numbers, *constants)

    def tensors_of(self, w):
        """Return (weights, gradient, m, v) of a parameter."""
        state = self.state[w]
        if not state:
            state["m"] = torch.zeros_like(w)
            state["v"] = torch.zeros_like(w)
        return w.detach(), w.grad, state["m"], state["v"]


@torch.no_grad()
def update_averages(averages, forget):
    """Move the averages, {weights: their moving average}, towards the weights, in place.

    forget: 1 - decay, or 0 for a step that is skipped: a tensor without dimensions.
    """
    if forget.device.type == "cpu":
        torch._foreach_lerp_(list(averages.values()), list(averages), float(forget))
        return
    # One by one: for a list, torch wants a Python number, and the CPU would wait for it.
    for w, average in averages.items():
        average.lerp_(w, forget)


def make_optimizer(model, args):
    """Return the optimiser of a model that has just been initialised.

    As in the released configuration, biases and norms have no weight decay and no trust ratio.
    A matrix that starts at zero gets no trust ratio either, or it would stay close to zero: its
    steps would be as small as its norm, and its norm grows by its steps alone.
    """
    norms = (nn.LayerNorm, nn.RMSNorm)
    plain, zeros, decayed = [], [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, norms) or "bias" in name:
                plain.append(parameter)
            elif not parameter.any():
                zeros.append(parameter)
            else:
                decayed.append(parameter)
    lamb = args.optimizer == "lamb"
    groups = [{"params": decayed, "weight_decay": args.weight_decay, "trust_ratio": lamb},
              {"params": zeros, "weight_decay": args.weight_decay, "trust_ratio": False},
              {"params": plain, "weight_decay": 0.0, "trust_ratio": False}]
    return Lamb([group for group in groups if group["params"]], args.lr, tuple(args.betas))


def lr_at(step, lr, warmup, total, rate):
    """Return the learning rate of a step, 1 to total.

    It rises linearly to lr, then falls along the first part of half a cosine: `rate` is that part,
    0 for none (a constant learning rate), 1 for all of it (down to zero).
    """
    if step < warmup:
        return lr * step / warmup
    s = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * lr * (1 + math.cos(rate * math.pi * s))


def finish_step(optimizer, averages, loss, step, args):
    """Clip the gradient, update the weights and their moving average.

    Returns [loss, gradient norm, 1, 0] as a tensor on the device, or [0, 0, 0, 1] if the step
    was skipped because its loss or gradient is not finite: what is added to LOSS, GRAD_NORM, MADE
    and SKIPPED. The loss is that of all ranks, and DDP gave them one gradient, so that all decide
    alike.
    """
    gradients = [p.grad for p in averages if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    scale = (args.clip / (norm + 1e-6)).clamp(max=1.0)
    go = loss.isfinite() & norm.isfinite()
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step + 1, args.lr, args.warmup, args.schedule_steps, args.rate)
    # TensorFlow's rule: a young average forgets faster, and soon has forgotten the random start.
    decay = min(args.ema, (1 + step) / (10 + step))
    optimizer.step(scale, go)
    optimizer.zero_grad()
    update_averages(averages, go * (1 - decay))
    made = go.double()
    return torch.stack([torch.where(go, loss, 0.0).double(),
                        torch.where(go, norm, 0.0).double(), made, 1 - made])   # (4,)


# --------------------------------------------------------------------------------------
# Settings

# Where a default comes from, for --help.
PAPER, RELEASE, OURS = "[paper]", "[released CAD-I]", "[ours]"


def arguments(argv):
    """Return the settings: the command line, checked, with every default filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter,
        epilog=f"Where a default comes from: {PAPER} the paper; {RELEASE} its released configuration "
               f"(nothing else is known of how these models were optimised); {OURS} this "
               f"implementation.")
    add = functools.partial(parser.add_argument, metavar="X")

    # What is trained, on what.
    add("--data", help="encoded originals with their captions (encode.py)")
    add("--augmented", help="encoded CutMix composites; without them, text augmentation alone")
    add("--val", help="encoded pictures on which the loss is only measured")
    add("--out", help="folder of the checkpoint, state.pt, log.jsonl and sample grids")
    add("--model", choices=list(MODELS), default="dit", help=f"dit or cad {OURS}")
    sizes = "; ".join(f"{name}: {', '.join(MODELS[name].presets)}" for name in MODELS)
    add("--preset", help=f"size ({sizes}; default: L/2 and L, {PAPER})")
    add("--init", help="checkpoint whose weights to start from; all else is new")
    add("--resume", help="training state to begin from, where OUT/state.pt does not exist yet")
    add("--seed", type=int, default=0, help=f"of weights, data, times and noise {OURS}")

    # The method.
    add("--p", type=float, default=0.5, help=f"chance of a composite where t > tau {PAPER}")
    add("--tau", type=float, default=0.4, help=f"composites only where t > tau {PAPER}")
    add("--drop", type=float, default=0.1, help=f"share of null prompts {RELEASE}")

    # Optimisation. Only for CAD-I a configuration was released; DiT-I uses the same one.
    add("--batch-size", type=int, default=1024, help=f"samples a step, all ranks {PAPER}")
    add("--steps", type=int, default=250_000, help=f"training steps {PAPER}")
    add("--schedule-steps", type=int, help=f"of the learning rate (default: 2 x --steps {RELEASE})")
    add("--optimizer", choices=["lamb", "adamw"], default="lamb", help=f"lamb or adamw {RELEASE}")
    add("--lr", type=float, default=1e-3, help=f"peak learning rate {RELEASE}")
    add("--betas", type=float, nargs=2, default=[0.9, 0.999], help=f"of both optimisers {RELEASE}")
    add("--weight-decay", type=float, default=0.01,
        help=f"none on biases and norms; 0 turns LAMB into Adam {RELEASE}")
    add("--warmup", type=int, default=5000, help=f"steps of linear warm-up {RELEASE}")
    add("--rate", type=float, default=0.7, help=f"part of a half cosine that is used {RELEASE}")
    add("--clip", type=float, default=2.0, help=f"bound of the gradient's norm {RELEASE}")
    add("--ema", type=float, default=0.9999, help=f"decay of the averaged weights {RELEASE}")

    # The machine.
    add("--micro-batch", type=int,
        help=f"samples on a device at once; more are added up (default: 64 on CUDA, or all {OURS})")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto",
        help=f"auto: bf16 on CUDA, else fp32 (on CUDA in TF32); weights are always float32 {OURS}")
    add("--workers", type=int, help=f"processes of a rank that read data (default: 4 on CUDA, else 0 {OURS})")
    parser.add_argument("--no-compile", action="store_true", help="CUDA: no torch.compile")
    parser.add_argument("--checkpoint-activations", action="store_true",
                        help="compute them again in the backward pass: slower, less memory")

    # What is looked at and kept.
    add("--log-every", type=int, default=100, help=f"steps between rows of the log {OURS}")
    add("--save-every", type=int, default=5000, help=f"steps between saved states {OURS}")
    add("--keep-every", type=int, default=50_000, help=f"steps between lasting checkpoints {OURS}")
    add("--val-every", type=int, default=5000, help=f"steps between measurements on --val {OURS}")
    add("--val-images", type=int, default=5000, help=f"pictures of --val that are used {OURS}")
    add("--sample-every", type=int, default=5000, help=f"steps between grids; 0: none {OURS}")
    add("--sample-steps", type=int, default=50, help=f"DDIM steps of those grids {OURS}")
    add("--guidance", type=float, default=8.0, help=f"of those grids {RELEASE}")
    add("--clamp", type=float, default=1.2, help=f"bound of |x_0| in them; 0: none {RELEASE}")
    parser.add_argument("--benchmark", action="store_true",
                        help="only time training steps, on random data")

    args = parser.parse_args(argv)
    check(args)
    args.own_schedule = args.schedule_steps is not None
    if not args.own_schedule:
        # The paper stops half-way through its schedule.
        args.schedule_steps = 2 * args.steps
    if args.preset is None:
        args.preset = MODELS[args.model].default_preset
    if not args.augmented:
        args.p = 0.0
    return args


def check(args):
    """Raise UserError for settings that mean nothing."""
    between(args, 0, 1, "p", "tau", "drop", "ema", "rate")
    between(args, 0, 2 ** 63 - 1, "seed")
    at_least(args, batch_size=1, micro_batch=1, steps=1, schedule_steps=1, warmup=0, workers=0,
             lr=0, weight_decay=0, log_every=1, save_every=1, keep_every=1, val_every=1,
             val_images=10, sample_every=0, sample_steps=1, guidance=0, clamp=0, clip=0)
    if args.clip == 0:
        raise UserError("--clip 0: must be above 0; a large number is no clipping")
    if not all(0 <= beta < 1 for beta in args.betas):
        raise UserError(f"--betas {args.betas[0]} {args.betas[1]}: must be in [0, 1)")
    if args.init and args.preset is not None:
        raise UserError("--preset: with --init the network is the checkpoint's")
    presets = MODELS[args.model].presets
    if args.preset is not None and args.preset not in presets:
        raise UserError(f"--preset {args.preset}: {args.model} has {', '.join(presets)}")
    if not args.benchmark and not (args.data and args.out):
        raise UserError("--data and --out are needed")


# Settings that may change when a run is resumed; a change of any other is refused.
MAY_CHANGE = {
    "out", "data", "augmented", "val", "init", "resume", "steps", "lr", "workers", "log_every",
    "save_every", "keep_every", "val_every", "val_images", "micro_batch", "checkpoint_activations",
    "sample_every", "sample_steps", "guidance", "clamp", "no_compile", "benchmark", "own_schedule",
}


# --------------------------------------------------------------------------------------
# What a run works on

class Run(NamedTuple):
    """All that a run works on. model, ema, optimizer and sums change in place."""

    args: argparse.Namespace
    rank: int
    world: int                  # number of ranks
    device: torch.device
    original: Encoded
    augmented: Encoded | None
    val: Encoded | None
    vae: nn.Module | None       # draws the grids, on rank 0
    model: nn.Module
    ema: nn.Module              # the moving average of the model's weights
    optimizer: Lamb
    first: int                  # steps that were made before: the state's, or 0
    sums: torch.Tensor          # (5,), see LOSS below


# The places in Run.sums. Of the steps since the last row of the log: the sum of their losses and of
# their gradient norms, how many were made and how many skipped. And the steps skipped in a row.
LOSS, GRAD_NORM, MADE, SKIPPED, IN_A_ROW = range(5)


def open_data(args):
    """Return the originals, the composites or None, and the validation set or None.

    Notes in args what they are, for the state. Raises UserError if they do not come from the same
    encoders.
    """
    original = Encoded(args.data)
    augmented = Encoded(args.augmented) if args.augmented else None
    val = Encoded(args.val) if args.val else None
    for other in (augmented, val):
        if other:
            refuse_other_encoders(original, other)
    if val and len(val) < 10:
        raise UserError(f"--val {args.val}: {len(val)} pictures; ten bins of t need 10 at least")
    # Which pictures and captions these are: a run is not resumed on others.
    args.originals = original.meta.get("list_of_images_and_captions")
    args.composites = augmented and augmented.meta.get("list_of_images_and_captions")
    args.encoders = {name: original.meta.get(name)
                     for name in ("autoencoder", "T5", "scaling_factor", "latent_shape")}
    return original, augmented, val


def make_network(args, meta):
    """Return the network and the optimiser, as the seed or --init starts them.

    meta: the data's. With --init, the size of the network is the checkpoint's, and
    args.model and args.preset become it. Raises UserError.
    """
    channels, size, _ = meta["latent_shape"]
    data_sizes = {"channels": channels, "size": size, "text_dim": meta["text_dim"]}
    start = None
    if args.init:
        start = load_model(args.init)
        for name in ("channels", "text_dim"):
            if start.config[name] != data_sizes[name]:
                raise UserError(f"--init {args.init}: its {name} is {start.config[name]}, the "
                                f"data's is {data_sizes[name]}: encode with its encoders")
        changed = changed_encoders(start.checkpoint_config, encoders_of(meta))
        if changed:
            name = changed[0].replace("vae_fingerprint", "autoencoder")
            raise UserError(f"--init {args.init}: its {name} is not the data's: encode with its encoders")
        args.model = next(name for name, family in MODELS.items()
                          if isinstance(start, family.network))
        args.preset = "as --init"
        sizes = start.config | data_sizes
    else:
        sizes = MODELS[args.model].presets[args.preset] | data_sizes

    torch.manual_seed(args.seed)
    try:
        model = MODELS[args.model].network(**sizes)
    except ValueError as error:
        raise UserError(f"{args.data}: {error}") from None
    model.checkpoint_activations = args.checkpoint_activations
    # Before any weights are loaded: the optimiser looks at which of them start at zero.
    optimizer = make_optimizer(model, args)
    if start:
        weights = start.state_dict()
        # CAD learns its positions; DiT's are computed and in no file.
        if "position" in weights:
            weights = model_cad.resize_positions(weights, sizes["size"], sizes["patch"])
        model.load_state_dict(weights)
    return model, optimizer


# --------------------------------------------------------------------------------------
# Files: checkpoints, the training state, the log

def state_path(args):
    """Return where a run keeps the state that it goes on from."""
    return Path(args.out) / "state.pt"


def checkpoint_config(run, step):
    """Return config.json: what sample.py needs, and how the weights were trained."""
    args, meta, augmented = run.args, run.original.meta, run.augmented
    training = {"TA": meta.get("captions", "long") == "long",
                "IA": None, "p": args.p, "tau": args.tau, "images": len(run.original),
                "composites": len(augmented or ()),
                "batch_size": args.batch_size, "steps": step,
                "parameters": sum(p.numel() for p in run.model.parameters()),
                "init": args.init, **encoders_of(meta)}
    if augmented and args.p > 0:
        settings = augmented.meta.get("cutmix") or ["unknown"]
        training["IA"] = "all" if set(settings) == set(SETTINGS) else " + ".join(settings)
    return {"model": args.model, "args": run.model.config, "vae": meta["vae"],
            "text_encoder": meta["text_encoder"], "scaling_factor": meta["scaling_factor"],
            "training": training}


def save_state(run, step):
    """Write what a run goes on from. The state before stays until this one is whole."""
    path = state_path(run.args)
    state = {"model": run.model.state_dict(),
             "ema": run.ema.state_dict(),
             "optimizer": run.optimizer.state_dict(),
             "step": step,
             "sums": run.sums,
             "settings": vars(run.args)}
    with complete(path, durable=True) as temporary:
        try:
            with open(temporary, "wb") as file:
                torch.save(state, file)
        # On a full disk, torch's writer raises errors of many kinds.
        except (OSError, RuntimeError) as error:
            if isinstance(error, OSError):
                reason = error.strerror
            else:
                reason = f"{one_line(error)}: is the disk full?"
            raise UserError(f"{path}: cannot be written ({reason}); the state before it is "
                            f"whole") from None


def load_state(path, args, device):
    """Return the training state at `path`.

    args.schedule_steps becomes the state's, unless it was given. Raises UserError if the state is
    damaged or that of another run.
    """
    needed = ("model", "ema", "optimizer", "step", "sums", "settings")
    try:
        # torch itself does not look at the checksums that are in the file.
        if zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location=device, weights_only=True)
        state = {key: state[key] for key in needed}
        before = dict(state["settings"])
        if type(state["step"]) is not int or state["step"] < 0 or state["sums"].shape != (5,):
            raise ValueError("no step, or no sums")
        if "lr" not in before:
            raise ValueError("no learning rate")
    except FileNotFoundError:
        raise UserError(f"--resume {path}: no such file") from None
    # Empty, cut off, text, a picture: torch raises almost anything.
    except Exception as error:  # noqa: BLE001
        raise UserError(f"{path}: not a training state ({one_line(error, 100)})") from None

    # A run that is prolonged stays on the schedule that it was begun with.
    if not args.own_schedule:
        args.schedule_steps = before.get("schedule_steps", args.schedule_steps)
    now = {key: getattr(args, key) for key in before if key not in MAY_CHANGE and hasattr(args, key)}
    refuse_other_settings(path, {key: before[key] for key in now}, now)
    return state


def restore(state, path, model, ema, optimizer):
    """Put a training state into the network, its average and optimiser. Raises UserError."""
    try:
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        for parameter in model.parameters():
            moments = optimizer.state[parameter]
            if moments and not parameter.shape == moments["m"].shape == moments["v"].shape:
                raise ValueError("moments of another shape")
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: does not fit this network ({one_line(error, 100)})") from None


def begin_log(path, state, args):
    """Cut the log back to the step of the state, and note a learning rate that has changed."""
    rows = []
    if state and path.exists():
        rows = read_jsonl(path)
        if not all(isinstance(row.get("step"), int) for row in rows):
            raise UserError(f"{path}: a line of it has no step: not a log of train.py")
        rows = [row for row in rows if row["step"] <= state["step"]]
        # Learning rates that were tried from this very state, and did not last.
        rows = [row for row in rows if "lr_changed" not in row or row["step"] < state["step"]]
    if state and state["settings"]["lr"] != args.lr:
        before = state["settings"]["lr"]
        note = {"step": state["step"], "lr_changed": [before, args.lr]}
        rows.append(note)
        print(f"the peak learning rate was {before} and is {args.lr} from here on")
    write_jsonl(path, rows)


# --------------------------------------------------------------------------------------
# The run

# A loss that tells of failure: predicting no noise at all costs 1, and a network that has learned
# nothing up to 2.5.
DIVERGED = 10

# Seconds to wait for a batch. Without a limit, a worker that found no shared memory left would be
# waited for for ever.
DATA_TIMEOUT = 600


def main(argv=None):
    args = arguments(argv)
    rank, world = rank_and_world()
    device = local_device()
    cuda = device.type == "cuda"
    if args.micro_batch is None:
        args.micro_batch = 64 if cuda else args.batch_size
    if args.workers is None:
        args.workers = 4 if cuda else 0
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    if args.benchmark:
        # Imported here, because it imports this file in turn.
        from metrics.speed import time_training
        return time_training(args, device)
    if args.batch_size % world:
        raise UserError(f"--batch-size {args.batch_size} cannot be shared by {world} ranks")
    with contextlib.ExitStack() as stack, report_lost_rank(rank, world):
        train(args, rank, world, device, stack)


def train(args, rank, world, device, stack):
    """Train from the last state, or from the start, until --steps.

    What must be undone at the end, however it comes, is put on the ExitStack `stack`.
    """
    stop = stack.enter_context(StopRequest())
    if world > 1:
        # NCCL between GPUs, gloo between CPUs. It comes first, so that a rank that is refused below
        # takes the others with it: they notice that its connection has closed.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    run = start_or_resume(args, rank, world, device, stack)
    out = Path(args.out)
    scaling_factor = run.original.meta["scaling_factor"]
    averages = dict(zip(run.model.parameters(), run.ema.parameters()))

    if device.type == "cuda" and not args.no_compile:
        compile_blocks(run.model, dynamic=False)
    network = run.model
    if world > 1:
        network = DistributedDataParallel(run.model, gradient_as_bucket_view=True)
    reader = read_ahead(run, stack)
    bar = tqdm(total=args.steps, initial=run.first, desc="training", unit="step", disable=rank > 0)
    stopping = False
    clock, since = time.perf_counter(), run.first
    # `step` counts from 0; `done` is the number of steps that have been made.
    for step, batch in enumerate(reader, run.first):
        # The step: Algorithm 1, equations 1 and 2, the optimiser.
        inputs = draw_inputs(batch, scaling_factor, device)
        if world > 1 and step == run.first:
            # After the first backward pass DDP sums gradients in another order, which rounds
            # differently. One whose result is thrown away makes it do so from the start: then a
            # resumed run computes the same bits as one that was never stopped.
            add_gradient(network, inputs, args)
            run.optimizer.zero_grad()
        loss = add_gradient(network, inputs, args)
        if world > 1:
            dist.all_reduce(loss)
            loss /= world
        outcome = finish_step(run.optimizer, averages, loss, step, args)

        add_outcome(run.sums, outcome)
        done = step + 1
        bar.update()

        # What is due after this step.
        stopping = on_any_rank(bool(stop.name), world)
        # From now on, a signal has something to save.
        stop.worth_saving = True
        logging = due(done, args.log_every, args)
        saving = stopping or due(done, args.save_every, args)
        # Not always after the last step, unlike the others: OUT itself is that checkpoint.
        keeping = done % args.keep_every == 0
        # The sums are read only now and then, because the CPU has to wait for the GPU.
        if done % 10 == 0 or logging or saving or keeping:
            refuse_divergence(run, done)
        if (saving or keeping) and not fit_to_save(run, inputs, done):
            saving = keeping = False

        rows = []
        if logging:
            row = take_log_row(run, done)
            rows.append(row)
            images_s = args.batch_size * (done - since) / (time.perf_counter() - clock)
            bar.set_postfix(loss=f"{row.get('loss', math.nan):.4f}", lr=f"{row['lr']:.1e}",
                            images_s=f"{images_s:.0f}")
            clock, since = time.perf_counter(), done
        if run.val and due(done, args.val_every, args):
            bins = validation_losses(run)
            rows.append({"step": done, "val_loss": sum(bins) / len(bins), "val_bins": bins})
        if rank == 0 and rows:
            append_jsonl(out / "log.jsonl", rows)

        # The state comes last: a kill before it repeats steps, but loses no file.
        if run.vae and due(done, args.sample_every, args):
            save_grid(run, done)
        if rank == 0 and keeping:
            save_checkpoint(out / f"step-{done:07d}", run.ema, checkpoint_config(run, done))
        if rank == 0 and saving:
            save_checkpoint(out, run.ema, checkpoint_config(run, done))
            draw_progress(out)
            save_state(run, done)
        if stopping:
            break

    bar.close()
    if stopping and rank == 0:
        saved = f"saved after step {done}" if saving else f"step {done} was not saved"
        print(f"train.py: stopped by {stop.name or 'a signal'}, {saved}; the same command goes on")
    if world > 1:
        # All ranks leave together. DDP must let go of the group before it ends: otherwise it would
        # wait for the group's threads while these wait for Python's lock.
        dist.barrier()
        del network
        gc.collect()
        dist.destroy_process_group()
    if stopping:
        sys.exit(0)         # also of a program that called `main`, as the toy does


def start_or_resume(args, rank, world, device, stack):
    """Return the Run: open the data, make the network, load the last state if there is one."""
    original, augmented, val = open_data(args)
    model, optimizer = make_network(args, original.meta)

    # From here on the folder is this run's: no other one writes the state that is read now.
    if rank == 0:
        stack.enter_context(only_command(args.out))

    # --resume is for the first start only: a run that has a state of its own goes on from that.
    begin_from = state_path(args)
    if args.resume and not begin_from.exists():
        begin_from = args.resume
    state = None
    if args.resume or begin_from.exists():
        state = load_state(begin_from, args, device)

    # The network, its average and its optimiser as they were after that state's step.
    model.to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    first = 0
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    if state:
        restore(state, begin_from, model, ema, optimizer)
        first = state["step"]
        if first > args.steps:
            raise UserError(f"--steps {args.steps}: {begin_from} is of step {first} already")
        sums = state["sums"]

    # Loaded before ranks agree: if it is missing, all of them end.
    vae = load_vae(original.meta["vae"], device) if args.sample_every and rank == 0 else None
    if world > 1:
        of_rank_0 = torch.tensor(first)
        dist.broadcast(of_rank_0, 0)
        if on_any_rank(int(of_rank_0) != first, world):
            raise UserError(f"{begin_from}: ranks found different states; all nodes must share --out")

    # One rank writes.
    if rank == 0:
        begin_log(Path(args.out) / "log.jsonl", state, args)
        weights = sum(p.numel() for p in model.parameters())
        print(f"{args.model} {args.preset}: {weights / 1e6:.1f} M parameters, {len(original)} "
              f"originals, {len(augmented or ())} composites, steps {first} to {args.steps} on "
              f"{world} x {device.type}")
        if args.warmup >= args.steps:
            print(f"--warmup {args.warmup} is not over by --steps {args.steps}: the learning rate "
                  f"reaches {lr_at(args.steps, args.lr, args.warmup, args.schedule_steps, args.rate):.2g}, "
                  f"not {args.lr:.2g}")
    return Run(args, rank, world, device, original, augmented, val, vae, model=model, ema=ema,
               optimizer=optimizer, first=first, sums=sums)


def read_ahead(run, stack):
    """Return an iterator of this rank's batches; workers, if any, read while the network computes."""
    args = run.args
    batches = torch.utils.data.DataLoader(
        Batches(run.original, run.augmented, args, run.rank, run.world), batch_size=None,
        sampler=range(run.first, args.steps), num_workers=args.workers,
        pin_memory=run.device.type == "cuda", timeout=DATA_TIMEOUT if args.workers else 0)
    # Ctrl-C reaches all processes at once, but the end of the workers is this one's to decide.
    with signals_wait():
        reader = iter(batches)
    stack.callback(end_workers, reader)
    return reader


def due(done, every, args):
    """Tell whether something is due after a step: every so many, and after the last (0: never)."""
    return every > 0 and (done % every == 0 or done == args.steps)


def add_outcome(sums, outcome):
    """Add the outcome of a step (see finish_step) to the sums (see Run), in place."""
    sums[:IN_A_ROW] += outcome
    # Once it has reached ten, the number skipped in a row stays there: a good step must not hide
    # it before refuse_divergence looks.
    in_a_row = sums[IN_A_ROW]
    skipped = outcome[SKIPPED]
    sums[IN_A_ROW] = torch.where(in_a_row < 10, (in_a_row + 1) * skipped, in_a_row)


def take_log_row(run, done):
    """Return the log's row for the steps since the last one, and set their sums to zero."""
    sums = run.sums.tolist()
    run.sums[:IN_A_ROW] = 0
    row = {"step": done}
    # Nothing is known of a loss where all steps were skipped.
    if sums[MADE]:
        row["loss"] = sums[LOSS] / sums[MADE]
        row["grad_norm"] = sums[GRAD_NORM] / sums[MADE]
    row["lr"] = run.optimizer.param_groups[0]["lr"]
    if sums[SKIPPED]:
        row["skipped"] = int(sums[SKIPPED])
        if run.rank == 0:
            print(f"step {done}: {sums[SKIPPED]:.0f} steps were skipped, as their loss or gradient was not "
                  f"finite; `encode.py --check` tells whether the data are damaged")
    return row


@torch.no_grad()
def fit_to_save(run, inputs, done):
    """Tell whether the weights and their average may replace those that were saved last.

    They may if their loss is below DIVERGED; the step's own loss was computed before the update,
    and does not tell. All ranks call this, and get the same answer. Raises UserError after the
    last step, when no later one could be saved.
    """
    # If a sample is broken, that is not the weights' fault.
    part = {name: tensor[:run.args.micro_batch].nan_to_num(0, 0, 0)
            for name, tensor in inputs.items()}
    # To compile the network also for the case without gradients would take longer than this does.
    not_compiled = contextlib.nullcontext()
    if run.device.type == "cuda":
        not_compiled = torch.compiler.set_stance("force_eager")
    with not_compiled, autocast(run.device, run.args.precision):
        losses = [diffusion_losses(network, **part).mean() for network in (run.model, run.ema)]
    bad = on_any_rank(not all(loss < DIVERGED for loss in losses), run.world)
    if bad and done == run.args.steps:
        raise UserError(f"step {done}: the weights' loss is not below {DIVERGED}; {what_to_do(run.args)}")
    if bad and run.rank == 0:
        print(f"step {done}: not saved, as the weights' loss is not below {DIVERGED}")
    return not bad


def refuse_divergence(run, done):
    """Raise UserError if training has failed: the weights that were saved last are better."""
    sums = run.sums.tolist()
    mean_loss = sums[LOSS] / max(1, sums[MADE])
    if sums[IN_A_ROW] >= 10:
        raise UserError(f"step {done}: for {sums[IN_A_ROW]:.0f} steps in a row the loss or its gradient was "
                        f"not finite, and they were skipped; {what_to_do(run.args)}")
    if mean_loss > DIVERGED:
        raise UserError(f"step {done}: the loss is {mean_loss:.3g}; {what_to_do(run.args)}")


def what_to_do(args):
    """Return the advice for a run that has failed, most likely because of its learning rate."""
    advice = "nothing has been saved: choose a lower --lr or a longer --warmup"
    if state_path(args).exists():
        advice = ("the state saved last is kept: the same command with a lower --lr goes on from "
                  "there (or choose a longer --warmup and another --out)")
    return advice


# --------------------------------------------------------------------------------------
# What people look at: validation and sample grids

@torch.no_grad()
def validation_losses(run):
    """Return the mean loss of the averaged weights in each of ten bins of t: 10 floats.

    Pictures, times and noise are the same at every call. The pictures are spread evenly over the
    set, and ranks share them. Picture n is measured in bin n % 10.
    """
    args, val, device = run.args, run.val, run.device
    count = min(args.val_images, len(val))
    mine = np.arange(run.rank, count, run.world)
    sums = torch.zeros(2, 10, dtype=torch.float64, device=device)        # of losses, of ones
    for start in range(0, len(mine), args.micro_batch):
        numbers = mine[start:start + args.micro_batch]                   # (B,)
        picks = [(val, int(n) * len(val) // count) for n in numbers]
        draws = [np.random.default_rng([args.seed, VALIDATION_STREAM, n]) for n in numbers]
        bins = numbers % 10                                              # (B,)
        place_in_bin = np.array([rng.random() for rng in draws])         # (B,) in [0, 1)
        t = (bins + place_in_bin) / 10
        seeds = np.array([rng.integers(2 ** 63) for rng in draws])
        dropped = np.zeros(len(numbers), bool)
        # Below every share: CAD is self-conditioned on all samples.
        coin = np.zeros(len(numbers))
        batch = as_batch(picks, t, dropped, coin, seeds)
        inputs = draw_inputs(batch, val.meta["scaling_factor"], device)
        with autocast(device, args.precision):
            losses = diffusion_losses(run.ema, **inputs).double()        # (B,)
        bins = torch.from_numpy(bins).to(device)
        sums[0].index_add_(0, bins, losses)
        sums[1].index_add_(0, bins, torch.ones_like(losses))
    if run.world > 1:
        dist.all_reduce(sums)
    return (sums[0] / sums[1].clamp(min=1)).tolist()


def save_grid(run, done):
    """Draw DDIM samples of the averaged weights, for 16 captions spread evenly over the sets."""
    args = run.args
    sets = [data for data in (run.original, run.augmented) if data]
    picks = []
    for data in sets:
        distance = math.ceil(len(data) * len(sets) / 16)
        picks += [(data, i) for i in range(0, len(data), distance)]
    texts = [data.text(i) for data, i in picks]
    lengths = torch.tensor([len(text) for text in texts])
    text, mask = pad_text(torch.cat(texts), lengths, padded_length(lengths))
    cond = (text.to(run.device), mask.to(run.device))
    null_text = run.original.null[None].to(run.device)                   # (1, L, D_text)
    null = (null_text, torch.ones(null_text.shape[:2], dtype=torch.bool, device=run.device))
    generator = torch.Generator().manual_seed(args.seed)
    noise = torch.randn(len(picks), *sets[0].meta["latent_shape"], generator=generator)
    with autocast(run.device, args.precision):
        x_0 = ddim(run.ema, noise.to(run.device), cond, null, args.sample_steps,
                   args.guidance, args.clamp or None)
    images = to_images(run.vae.decode(x_0 / run.vae.scaling_factor))
    with complete(Path(args.out) / f"samples/{done:07d}.png") as temporary:
        contact_sheet(images, [data.caption(i) for data, i in picks]).save(temporary, "PNG")


if __name__ == "__main__":
    command_line(main)
