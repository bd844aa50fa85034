"""Stage 4, training (paper 3.3, 4.1): Algorithm 1 on encoded ImageNet and its composites.

    torchrun --nproc-per-node 8 train.py --model dit --data encoded/train \\
        --augmented encoded/cutmix --out out/dit-i

OUT is a checkpoint for sample.py: config.json, model.safetensors (the averaged weights) and
a model card. Beside it lie log.jsonl, progress.html, sample grids, lasting checkpoints
(step-0050000 and so on) and state.pt. A run that was killed, or stopped by a signal such as
Ctrl-C (it saves first), goes on with the same command.

Every random number of a step is a function of (seed, step, index in the batch): data, times
and noise do not depend on kills, on the number of ranks, of workers, or on the micro-batch.
"""

import collections
import contextlib
import copy
import functools
import gc
import math
import signal
import sys
from pathlib import Path

# First: it keeps Ctrl-C quiet while torch is imported.
from common import (COUNT, SEED, THREADS, Options, UserError, ahead, command_line, complete,
                    contact_sheet, in_batches, jsonl, keep_apart, line_chart, local_device,
                    number, one_line, only_command, rank_and_world, read_jsonl, reading,
                    refuse_other_settings, save_png, write_file, write_jsonl)

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.adamw import adamw
from tqdm import tqdm

import model_cad
from encode import (SAME_ENCODERS, Encoded, load_vae, pad_text, padded_length,
                    refuse_other_encoders, to_images)
from sample import (MODELS, PRECISIONS, autocast, changed_encoders, compile_blocks, ddim,
                    encoders_of, gamma, load_model, save_checkpoint)

# --------------------------------------------------------------------------------------
# Algorithm 1: what a step is trained on

# Each purpose has its own stream of random numbers: default_rng([seed, stream, ...]). There
# was a stream 1 once, and the others kept their numbers.
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
    """Return the order in which an epoch goes through a set (0 originals, 1 composites)."""
    return np.random.default_rng([seed, ORDER_STREAM, which, epoch]).permutation(count)


def read_batch(sets, args, step):
    """Return this rank's share of a step's batch: Algorithm 1, the lines that choose and read.

    sets: originals and, if there are any, composites. Sample number n = step * batch size +
    index has a candidate in each: the n-th picture in that set's shuffled order. Which of the
    two is taken is decided before anything is read, so that the other costs nothing. It is not
    seen in that epoch: with the paper's tau and p, 30% of the originals are passed over.
    """
    # Each rank draws for the whole batch, and keeps its share.
    size = args.batch_size
    rng = np.random.default_rng([args.seed, STEP_STREAM, step])
    t = rng.random(size)                                                 # t ~ U(0, 1)
    from_composites = choose(t, rng, args.tau, args.p)                   # eq. 3
    dropped = rng.random(size) < args.drop                # for classifier-free guidance
    coin = rng.random(size)
    noise_seed = rng.integers(2 ** 63, size=size)

    rank, world = rank_and_world()
    share = size // world
    mine = range(rank * share, (rank + 1) * share)
    picks = []
    for index in mine:
        which = int(from_composites[index])
        data = sets[which]
        epoch, position = divmod(step * size + index, len(data))
        i = int(epoch_order(args.seed, which, epoch, len(data))[position])
        picks.append((data, i))
    return as_batch(picks, t[mine], dropped[mine], coin[mine], noise_seed[mine])


def as_batch(picks, t, dropped, coin, noise_seed):
    """Read samples and return them as a batch, a dict of CPU tensors.

    picks: [(data set, number of the sample)]. dropped (B,) bool: whose caption becomes the
    null prompt. coin (B,), uniform in [0, 1): decides on CAD's self-conditioning. "tokens"
    (sum of L_i, D_text) holds one caption after the other, "lengths" (B,) tells them apart.
    """
    means, stds = zip(*[data.moments(i) for data, i in picks])           # (C, h, w) each
    texts = []
    for (data, i), drop in zip(picks, dropped):
        texts.append(data.null if drop else data.text(i))                # (L_i, D_text)
    batch = {"t": torch.tensor(t).float(),
             "mean": torch.stack(means),
             "std": torch.stack(stds),
             "tokens": torch.cat(texts),
             "lengths": torch.tensor([len(text) for text in texts]),
             "coherence": 1 - torch.tensor(dropped).float(),
             "coin": torch.tensor(coin).float(),
             "noise_seed": torch.tensor(noise_seed)}
    # From pinned memory a GPU fetches it while the CPU goes on.
    if torch.cuda.is_available():
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    return batch


def draw_inputs(batch, scaling_factor, device):
    """Return the network's inputs on the device, for a batch of `read_batch`.

    t (B,), x_0 and eps (B, C, h, w), text (B, L, D_text), mask (B, L), coherence and coin (B,).
    x_0 is drawn anew from its mean and std each time the picture is seen.
    """
    # Seeded for each sample: its noise does not depend on the samples beside it.
    generator = torch.Generator(device)
    noise = []
    for seed in batch["noise_seed"].tolist():
        generator.manual_seed(seed)
        shape = (2, *batch["mean"].shape[1:])
        noise.append(torch.randn(shape, generator=generator, device=device))
    noise_of_x_0, eps = torch.stack(noise, 1)                        # (B, C, h, w) each

    # Looked up while the lengths are still on the CPU, so that it need not wait for the GPU.
    length = padded_length(batch["lengths"])
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    text, mask = pad_text(batch["tokens"], batch["lengths"], length)
    x_0 = (batch["mean"] + batch["std"] * noise_of_x_0) * scaling_factor
    inputs = {name: batch[name] for name in ("t", "coherence", "coin")}
    return inputs | {"x_0": x_0, "eps": eps, "text": text, "mask": mask}


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
    device: reading it here would make the CPU wait for the GPU.
    """
    size = len(inputs["t"])
    total = torch.zeros((), device=inputs["t"].device)
    for start in range(0, size, args.micro_batch):
        end = start + args.micro_batch
        part = {name: tensor[start:end] for name, tensor in inputs.items()}

        # DDP exchanges gradients once, during the backward pass of the last part.
        network.require_backward_grad_sync = end >= size
        with autocast(total.device, args.precision):
            loss = diffusion_losses(network, **part).sum() / size
        loss.backward()
        total += loss.detach()
    return total


# --------------------------------------------------------------------------------------
# The optimiser

class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020); without `trust_ratio` or weight decay a group's steps are AdamW's.

    With m^ and v^ for the moments without bias, u = -(m^ / (sqrt(v^) + eps) + decay * w).
    Each tensor's step is as long as lr times itself: w <- w + lr * |w| / |u| * u.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01,
                 trust_ratio=True):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps,
                                  "weight_decay": weight_decay, "trust_ratio": trust_ratio})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            ws = [w for w in group["params"] if w.grad is not None]
            if not ws:
                continue
            for w in ws:
                if not self.state[w]:
                    self.state[w] = {"m": torch.zeros_like(w), "v": torch.zeros_like(w),
                                     "step": torch.zeros((), device=w.device)}
            states = [self.state[w] for w in ws]
            lr = torch.tensor(group["lr"])                         # in float32, as w is
            decay = group["weight_decay"]
            is_lamb = group["trust_ratio"] and decay > 0

            # At a learning rate of 1 and without decay, torch's AdamW adds -m^ / (sqrt(v^) + eps)
            # to what it is given. For LAMB that is -decay * w, and u comes out.
            us = torch._foreach_mul(ws, -decay) if is_lamb else ws
            adamw(us, [w.grad for w in ws], [state["m"] for state in states],
                  [state["v"] for state in states], [], [state["step"] for state in states],
                  fused=True, amsgrad=False, maximize=False,
                  beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
                  lr=1.0 if is_lamb else lr, weight_decay=0.0 if is_lamb else decay)
            if is_lamb:
                w_norms = torch.stack(torch._foreach_norm(ws))    # (number of tensors,)
                u_norms = torch.stack(torch._foreach_norm(us))
                usable = (w_norms > 0) & (u_norms > 0)
                rates = lr * torch.where(usable, w_norms / u_norms, 1.0)
                for w, u, rate in zip(ws, us, rates):
                    w.addcmul_(u, rate)


def make_optimizer(model, args):
    """Return the optimiser of a model that has just been initialised.

    As in the released configuration, biases and norms have no weight decay, no trust ratio.
    A matrix that starts at zero gets no trust ratio either, or it would stay close to zero:
    its steps would be as small as its norm, and its norm grows by its steps alone.
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
    return Lamb(groups, args.lr, tuple(args.betas))


def lr_at(step, lr, warmup, total, rate):
    """Return the learning rate of a step, 1 to total.

    It rises linearly to lr, then falls along the first part of half a cosine: `rate` is that
    part, 0 for none (a constant learning rate), 1 for all of it (down to zero).
    """
    if step < warmup:
        return lr * step / warmup
    s = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * lr * (1 + math.cos(rate * math.pi * s))


@torch.no_grad()
def update(optimizer, averages, norm, step, args):
    """Make a step, 1 to --steps: clip the gradient, move the weights and their averages.

    averages: {weights: their moving average}. norm: the gradient's, a tensor.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step, args.lr, args.warmup, args.schedule_steps, args.rate)
    times_too_long = 1 / (args.clip / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_div_([w.grad for w in averages], times_too_long)
    optimizer.step()
    # TensorFlow's rule: a young average forgets faster, and soon has lost the random start.
    decay = min(args.ema, step / (9 + step))
    torch._foreach_lerp_(list(averages.values()), list(averages), 1 - decay)


# --------------------------------------------------------------------------------------
# The loop

# A loss that tells of failure: predicting no noise at all costs 1, and CAD as the release starts
# it at most 2.5.
DIVERGED = 10

# From a scheduler, Ctrl-C, a closed terminal, and Slurm before the time is up.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def train(args):
    """Train from the last state, or from the start, until --steps, or until a signal comes."""
    rank, world = rank_and_world()
    run = Run(args)
    first = run.done
    averages = dict(zip(run.model.parameters(), run.ema.parameters()))
    if run.device.type == "cuda" and not args.no_compile:
        compile_blocks(run.model, dynamic=False)
    network = run.model
    if world > 1:
        network = DistributedDataParallel(run.model, gradient_as_bucket_view=True)

    # Other threads read, this one draws the noise.
    read = functools.partial(read_batch, run.sets, args)
    batches = ahead(read, range(first, args.steps), args.workers)
    drawn = (draw_inputs(batch, run.meta["scaling_factor"], run.device) for batch in batches)
    upcoming = next(drawn, None)
    if world > 1 and upcoming:
        # After the first backward pass DDP sums gradients in another order, which rounds
        # differently. One that is thrown away makes it do so from the start: then a resumed
        # run computes the same bits as one that was never stopped.
        add_gradient(network, upcoming, args)
        run.optimizer.zero_grad()
    bar = tqdm(total=args.steps, initial=first, desc="training", unit="step", disable=rank > 0)
    skipped = 0                                                      # steps in a row
    stopping = False
    signals = []

    def receive(number, frame):
        # Until a step has been made there is nothing to save.
        if run.done == first:
            sys.exit(128 + number)
        signals.append(number)

    # Those that are ignored, as nohup does, stay so.
    for one in SIGNALS:
        if signal.getsignal(one) != signal.SIG_IGN:
            signal.signal(one, receive)

    while upcoming and not stopping:
        # Algorithm 1, equations 1 and 2.
        inputs = upcoming
        loss = add_gradient(network, inputs, args)
        gradient_norm = nn.utils.get_total_norm([w.grad for w in averages])

        # All ranks learn the loss, and whether one was told to stop. Here alone the CPU
        # waits for the GPU, when the next batch is on its way there.
        outcome = torch.stack([loss, gradient_norm, torch.full_like(loss, len(signals))])
        if world > 1:
            dist.all_reduce(outcome)
            outcome /= world
        upcoming = next(drawn, None)
        loss, norm, stopping = outcome.tolist()

        # The update, unless a number is not finite.
        run.done += 1
        finite = math.isfinite(loss + norm)
        skipped = 0 if finite else skipped + 1
        if finite:
            update(run.optimizer, averages, gradient_norm, run.done, args)
        run.optimizer.zero_grad()
        run.outcomes.append((loss, norm))
        bar.update()

        if skipped == 10 or finite and loss > DIVERGED:
            run.fail(f"the loss is {loss:.3g}, the norm of its gradient {norm:.3g}")
        what_is_due(run, bar, inputs, stopping)

    bar.close()
    if world > 1:
        # All ranks leave together. DDP must let go of the group before it ends: otherwise it
        # would wait for the group's threads while these wait for Python's lock.
        dist.barrier()
        del network
        gc.collect()
        dist.destroy_process_group()
    if (stopping or signals) and run.done < args.steps:
        # Another rank's signal ends this one too.
        received = signal.Signals(signals[0]) if signals else signal.SIGTERM
        # Where the terminal has been closed, nobody can be told.
        with contextlib.suppress(OSError):
            if rank == 0:
                print(f"train.py: stopped by {received.name}, saved after step {run.done}; "
                      f"the same command goes on")
        sys.exit(128 + received)


# --------------------------------------------------------------------------------------
# Settings

# Where a default comes from, for --help.
PAPER, RELEASE, OURS = "[paper]", "[released CAD-I]", "[ours]"

# What save_checkpoint writes.
CHECKPOINT = ("config.json", "model.safetensors", "README.md")

# Settings that must stay when a run goes on. The weights depend on --lr and --steps, too, but
# these may be changed on purpose.
BINDING = ("model", "preset", "seed", "p", "tau", "drop", "batch_size", "schedule_steps", "clip",
           "optimizer", "betas", "weight_decay", "warmup", "rate", "ema", "precision", "init")


def arguments(argv):
    """Return the settings: the command line, checked, with every default filled in."""
    parser = Options(__doc__, epilog=(
        f"Where a default comes from: {PAPER} the paper; {RELEASE} its released configuration "
        f"(nothing else is known of how these models were optimised); {OURS} this implementation."))

    add = parser.add
    or_none = number(int, 0)
    samples = number(int, 1, 10 ** 6)
    share = number(float, 0, 1)
    positive = number(float, 0)

    # What is trained, on what.
    add("--data", "encoded originals with their captions (encode.py)", required=True)
    add("--augmented", "encoded CutMix composites; without, text augmentation alone")
    add("--val", "encoded pictures on which the loss is only measured")
    add("--out", "folder of checkpoint, state, log and grids", kind=Path, required=True)
    add("--model", f"the network {OURS}", "dit", choices=MODELS)
    sizes = "; ".join(f"{name}: {', '.join(MODELS[name].presets)}" for name in MODELS)
    add("--preset", f"size ({sizes}; default: L/2 and L, {PAPER})")
    add("--init", "checkpoint whose weights to start from; all else is new")
    add("--seed", f"of weights, data, times and noise {OURS}", 0, SEED)

    # The method.
    add("--p", f"chance of a composite where t > tau {PAPER}", 0.5, share)
    add("--tau", f"composites only where t > tau {PAPER}", 0.4, share)
    add("--drop", f"share of null prompts {RELEASE}", 0.1, share)

    # Optimisation. Only for CAD-I a configuration was released; DiT-I uses the same one.
    add("--batch-size", f"samples a step, all ranks {PAPER}", 1024, samples)
    add("--steps", f"training steps {PAPER}", 250_000, COUNT)
    add("--schedule-steps", f"of the learning rate (default: 2 x --steps {RELEASE}, or what the "
        "run was begun with)", kind=COUNT)
    add("--optimizer", f"the optimiser {RELEASE}", "lamb", choices=["lamb", "adamw"])
    add("--lr", f"peak learning rate {RELEASE}", 1e-3, positive)
    below_1 = number(float, 0, math.nextafter(1, 0))
    add("--betas", f"of both optimisers {RELEASE}", [0.9, 0.999], below_1, nargs=2)
    add("--weight-decay", f"none on biases, norms; 0: Adam {RELEASE}", 0.01, positive)
    add("--warmup", f"steps of linear warm-up {RELEASE}", 5000, or_none)
    add("--rate", f"part of a half cosine that is used {RELEASE}", 0.7, share)
    add("--clip", f"bound of the gradient's norm {RELEASE}", 2.0, number(float, 1e-9))
    add("--ema", f"decay of the averaged weights {RELEASE}", 0.9999, share)

    # The machine.
    cuda = torch.cuda.is_available()
    add("--micro-batch", "samples on a device at once; more are added up (default: 64 on CUDA, or "
        f"all {OURS})", 64 if cuda else None, samples)
    add("--precision", "auto: bf16 on CUDA, else fp32 (on CUDA TF32); weights are always float32 "
        f"{OURS}", "auto", choices=PRECISIONS)
    add("--workers", f"threads of a rank that read data {OURS}", 4 if cuda else 0, THREADS)
    parser.flag("--no-compile", "CUDA: no torch.compile")
    parser.flag("--checkpoint-activations",
                "compute them again in the backward pass: slower, less memory")

    # What is looked at and kept.
    add("--log-every", f"steps between rows of the log {OURS}", 100, COUNT)
    add("--save-every", f"steps between saved states {OURS}", 5000, COUNT)
    add("--keep-every", f"steps between lasting checkpoints {OURS}", 50_000, COUNT)
    add("--val-every", f"steps between measurements on --val {OURS}", 5000, COUNT)
    add("--val-images", f"pictures of --val that are used {OURS}", 5000, number(int, 10))
    add("--sample-every", f"steps between grids; 0: none {OURS}", 5000, or_none)
    add("--sample-steps", f"DDIM steps of those grids {OURS}", 50, COUNT)
    add("--guidance", f"of those grids {RELEASE}", 8.0, positive)
    add("--clamp", f"bound of |x_0| in them; 0: none {RELEASE}", 1.2, positive)

    args = parser.parse_args(argv)
    family = MODELS[args.model]
    if args.init and args.preset:
        raise UserError("--preset: with --init the network is the checkpoint's")
    args.preset = args.preset or family.default_preset
    if args.preset not in family.presets:
        raise UserError(f"--preset {args.preset}: {args.model} has {', '.join(family.presets)}")
    # Below --init there is room for what is made of it, but not in its place.
    keep_apart(args.out / "config.json", args.data, args.augmented, args.val,
               args.init and Path(args.init, "config.json"))
    args.micro_batch = args.micro_batch or args.batch_size
    if not args.augmented:
        args.p = 0.0
    return args


# --------------------------------------------------------------------------------------
# A run: its data, its network, its files

class Run:
    """All that a run works on, as it is after `done` steps."""

    def __init__(self, args):
        """Open the data, make the network, load the state, if any. Raises UserError."""
        rank, world = rank_and_world()
        self.args = args
        self.device = local_device()
        # Originals and, if there are any, composites.
        self.sets = [Encoded(folder) for folder in (args.data, args.augmented) if folder]
        self.meta = self.sets[0].meta
        self.val = args.val and Encoded(args.val)
        for other in filter(None, [*self.sets[1:], self.val]):
            refuse_other_encoders(self.sets[0], other)

        self.model, self.optimizer = make_network(args, self.meta)
        self.model.to(self.device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.done = 0
        # (loss, norm of the gradient) of each step since the last row of the log.
        self.outcomes = []
        self.path = args.out / "state.pt"
        if self.path.exists():
            self.load()
        # The paper stops half-way through its schedule.
        args.schedule_steps = args.schedule_steps or 2 * args.steps
        if args.schedule_steps <= args.warmup < args.steps:
            raise UserError(f"--warmup {args.warmup}: must be shorter than the schedule, "
                            f"{args.schedule_steps} steps: at its end the rate would fall at once")
        if self.done > args.steps:
            raise UserError(f"--steps {args.steps}: {self.path} is of step {self.done} already")

        # Loaded before ranks agree: if it is missing, all of them end.
        draws = args.sample_every and rank == 0
        self.vae = load_vae(self.meta["vae"], self.device) if draws else None
        steps = [self.done] * world
        if world > 1:
            dist.all_gather_object(steps, self.done)
        if len(set(steps)) > 1:
            raise UserError(f"{self.path}: ranks found those of steps {steps}: all nodes must "
                            f"share --out")
        if rank == 0:
            self.begin()

    def load(self):
        """Go on from the state. Raises UserError: damaged, or of other settings."""
        with reading(self.path, "a training state that this train.py goes on from"):
            state = torch.load(self.path, map_location=self.device, weights_only=True)
            self.done = state["done"]
            # A run that is prolonged stays on the schedule that it was begun with.
            if self.args.schedule_steps is None:
                self.args.schedule_steps = state["settings"]["schedule_steps"]
            refuse_other_settings(self.path, state["settings"], self.settings())
            self.outcomes = state["outcomes"]
            self.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])

    def begin(self):
        """Take from the log the steps that a kill has lost, and say what begins."""
        args = self.args
        log = args.out / "log.jsonl"
        rows = []
        if log.exists():
            with reading(log, "a log of train.py"):
                rows = [row for row in read_jsonl(log) if row["step"] <= self.done]
        # A run begins with its log: without one, a checkpoint is somebody else's.
        elif not self.path.exists():
            for name in CHECKPOINT:
                path = args.out / name
                if path.exists():
                    raise UserError(f"{path}: not of this run, which would replace it: choose "
                                    f"another --out")
        write_jsonl(log, rows)

        training = self.config()["training"]
        peak = args.lr * min(1, args.steps / max(1, args.warmup))
        print(f"{args.model} {args.preset}: {training['parameters'] / 1e6:.1f} M parameters, "
              f"{training['images']} originals, {training['composites']} composites; "
              f"steps {self.done} to {args.steps} on {rank_and_world()[1]} x {self.device.type}; "
              f"learning rate up to {peak:.2g}")

    def save(self):
        """Write the checkpoint, and the state that the run goes on from."""
        save_checkpoint(self.args.out, self.ema, self.config())
        draw_progress(self.args.out)
        state = {"settings": self.settings(),
                 "done": self.done,
                 "outcomes": self.outcomes,
                 "model": self.model.state_dict(),
                 "ema": self.ema.state_dict(),
                 "optimizer": self.optimizer.state_dict()}
        with complete(self.path) as temporary:
            try:
                torch.save(state, temporary)
            # torch's writer raises no OSError.
            except RuntimeError as error:
                raise UserError(f"{self.path}: cannot be written: is the disk full? "
                                f"({one_line(error)})") from None

    def settings(self):
        """Return all that must stay when a run goes on, its data included."""
        settings = {key: getattr(self.args, key) for key in BINDING}
        settings |= {key: self.meta[key] for key in SAME_ENCODERS}
        lists = [data.meta["list_of_images_and_captions"] for data in self.sets]
        return settings | {"lists_of_images_and_captions": lists}

    def config(self):
        """Return config.json: what sample.py needs, and how the weights were trained."""
        args, meta = self.args, self.meta
        originals, *composites = self.sets
        training = {"TA": meta.get("captions", "long") == "long",
                    "IA": None,
                    "p": args.p,
                    "tau": args.tau,
                    "images": len(originals),
                    "composites": sum(map(len, composites)),
                    "batch_size": args.batch_size,
                    "steps": self.done,
                    "parameters": sum(w.numel() for w in self.model.parameters()),
                    "init": args.init,
                    **encoders_of(meta)}
        # No t exceeds a tau of 1.
        if args.p > 0 and args.tau < 1:
            training["IA"] = " + ".join(composites[0].meta.get("cutmix") or ["unknown"])
        return {"model": args.model,
                "args": self.model.config,
                "vae": meta["vae"],
                "text_encoder": meta["text_encoder"],
                "scaling_factor": meta["scaling_factor"],
                "training": training}

    def fail(self, why):
        """Raise UserError: training has failed, most likely for its learning rate."""
        raise UserError(f"step {self.done}: {why}. With a lower --lr the command goes on from "
                        f"the state saved last; a longer --warmup needs another --out")


def make_network(args, meta):
    """Return the network and the optimiser, as the seed or --init starts them.

    meta: the data's. With --init, the size of the network is the checkpoint's, and
    args.model and args.preset become it. Raises UserError.
    """
    channels, size, _ = meta["latent_shape"]
    of_data = {"channels": channels, "size": size, "text_dim": meta["text_dim"]}
    start = args.init and load_model(args.init)
    if start:
        if changed_encoders(start.checkpoint_config, encoders_of(meta)):
            raise UserError(f"--init {args.init}: the data are of other encoders: use its own")
        args.model = next(name for name in MODELS if isinstance(start, MODELS[name].network))
        args.preset = "as --init"
    family = MODELS[args.model]

    torch.manual_seed(args.seed)
    with reading(args.data, f"data for {args.model} {args.preset}"):
        sizes = start.config if start else family.presets[args.preset]
        model = family.network(**sizes | of_data)
    model.checkpoint_activations = args.checkpoint_activations
    # Before any weights are loaded: the optimiser looks at which of them start at zero.
    optimizer = make_optimizer(model, args)
    if start:
        weights = start.state_dict()
        # CAD learns its positions; DiT's are computed and in no file.
        if "position" in weights:
            weights = model_cad.resize_positions(weights, size, model.patch)
        with reading(args.init, "weights for such data"):
            model.load_state_dict(weights)
    return model, optimizer


# --------------------------------------------------------------------------------------
# What people look at: the log, validation, sample grids, progress.html

def what_is_due(run, bar, inputs, stopping):
    """Log, measure, draw and save what is due after a step, the state last.

    A kill before the state is saved repeats steps, but loses no file.
    """
    args = run.args
    done = run.done

    def due(every):
        return done % every == 0 or done == args.steps

    rows = []
    if due(args.log_every):
        rows.append(log_row(run))
        bar.set_postfix(rows[0])
    if run.val and due(args.val_every):
        bins = validation_losses(run)
        rows.append({"step": done, "val_loss": sum(bins) / len(bins), "val_bins": bins})
    # One rank writes.
    if rank_and_world()[0] > 0:
        return
    with open(args.out / "log.jsonl", "a") as log:
        log.write(jsonl(rows))
    if rows and "skipped" in rows[0]:
        bar.write(f"step {done}: {rows[0]['skipped']} steps were skipped, as they were not "
                  f"finite: does encode.py --check find damaged data?")
    # Not always after the last step, unlike the others: OUT itself is that checkpoint.
    keeping = done % args.keep_every == 0
    saving = stopping or due(args.save_every)
    if keeping or saving:
        refuse_spoilt_weights(run, inputs)
    # Without --sample-every there is no autoencoder either.
    if run.vae and due(args.sample_every):
        save_grid(run)
    if keeping:
        save_checkpoint(args.out / f"step-{done:07d}", run.ema, run.config())
    if saving:
        run.save()


def log_row(run):
    """Return the log's row for the steps since the last one, and forget them."""
    made = [pair for pair in run.outcomes if math.isfinite(sum(pair))]
    skipped = len(run.outcomes) - len(made)
    run.outcomes = []
    row = {"step": run.done}
    # Nothing is known of a loss where all steps were skipped.
    if made:
        row["loss"], row["grad_norm"] = np.mean(made, axis=0).tolist()
    row["lr"] = run.optimizer.param_groups[0]["lr"]
    if skipped:
        row["skipped"] = skipped
    return row


@torch.no_grad()
def refuse_spoilt_weights(run, inputs):
    """Raise UserError if weights or averages may not replace those that were saved last.

    The step's own loss does not tell, because it was computed before the update.
    """
    # If a sample is broken, that is not the weights' fault.
    part = {name: tensor[:run.args.micro_batch].nan_to_num(0, 0, 0)
            for name, tensor in inputs.items()}
    # To compile it also for the case without gradients would take longer than this does.
    with torch.compiler.set_stance("force_eager"), autocast(run.device, run.args.precision):
        losses = [diffusion_losses(each, **part).mean() for each in (run.model, run.ema)]
    if not all(loss < DIVERGED for loss in losses):
        run.fail(f"the loss of its weights is not below {DIVERGED}")


@torch.no_grad()
def validation_losses(run):
    """Return the mean loss of the averaged weights in each of ten bins of t: 10 floats.

    Pictures, times and noise are the same at every call. The pictures are spread evenly over
    the set, and ranks share them. Picture n is measured in bin n % 10.
    """
    args, val = run.args, run.val
    rank, world = rank_and_world()
    # Each bin has a picture: of less than ten, some are in two.
    count = max(10, min(args.val_images, len(val)))
    sums = torch.zeros(10, dtype=torch.float64, device=run.device)
    for numbers in in_batches(range(rank, count, world), args.micro_batch):
        picks, t, seeds = [], [], []
        for n in numbers:
            rng = np.random.default_rng([args.seed, VALIDATION_STREAM, n])
            picks.append((val, n * len(val) // count))
            # At a random place of its bin.
            t.append((n % 10 + rng.random()) / 10)
            seeds.append(int(rng.integers(2 ** 63)))
        # No caption is dropped. A coin of 0: CAD is self-conditioned on all samples.
        zeros = [0] * len(numbers)
        batch = as_batch(picks, t, zeros, zeros, seeds)
        inputs = draw_inputs(batch, run.meta["scaling_factor"], run.device)
        with autocast(run.device, args.precision):
            losses = diffusion_losses(run.ema, **inputs).double()        # (B,)
        sums.index_add_(0, torch.tensor(numbers, device=run.device) % 10, losses)
    if world > 1:
        dist.all_reduce(sums)
    return [total / len(range(k, count, 10)) for k, total in enumerate(sums.tolist())]


def save_grid(run):
    """Draw the averaged weights' DDIM samples of 16 captions spread evenly over the sets."""
    args, device = run.args, run.device
    picks = []
    for data in run.sets:
        distance = math.ceil(len(data) * len(run.sets) / 16)
        picks += [(data, i) for i in range(0, len(data), distance)]

    # Of a batch of these samples, the captions alone are used.
    zeros = [0] * len(picks)
    inputs = draw_inputs(as_batch(picks, zeros, zeros, zeros, zeros), 1, device)
    cond = (inputs["text"], inputs["mask"])                          # (B, L, D_text), (B, L)
    text = run.sets[0].null[None].to(device)                         # (1, 1, D_text)
    null = (text, torch.ones_like(text[:, :, 0], dtype=torch.bool))
    generator = torch.Generator().manual_seed(args.seed)
    noise = torch.randn(len(picks), *run.meta["latent_shape"], generator=generator)
    with autocast(device, args.precision):
        x_0 = ddim(run.ema, noise.to(device), cond, null, args.sample_steps, args.guidance,
                   args.clamp)
    images = to_images(run.vae.decode(x_0 / run.vae.scaling_factor))
    captions = [data.sample(i)[1] for data, i in picks]
    save_png(contact_sheet(images, captions), args.out / f"samples/{run.done:07d}.png")


def draw_progress(out):
    """Draw OUT/progress.html from the log: losses, the learning rate, the latest grid."""
    columns = collections.defaultdict(list)
    for row in read_jsonl(out / "log.jsonl"):
        for key, value in row.items():
            columns[key].append((row["step"], value))
    bins = {}
    for k in range(10):
        name = f"t from {k / 10} to {(k + 1) / 10:.1f}"
        bins[name] = [(step, values[k]) for step, values in columns["val_bins"]]
    charts = {"Loss": {"training": columns["loss"], "validation": columns["val_loss"]},
              "Learning rate": {"learning rate": columns["lr"]},
              "Validation loss by time": bins}
    parts = ["<!doctype html><meta charset='utf-8'><body style='font-family: sans-serif'>"]
    for title, curves in charts.items():
        if any(curves.values()):
            chart = line_chart(curves, "step", title.lower(), log="loss" in title.lower())
            parts.append(f"<h2>{title}</h2>\n{chart}")
    for grid in sorted((out / "samples").glob("*.png"))[-1:]:
        parts.append(f"<h2>Samples: {grid.name}</h2>\n<img src='samples/{grid.name}'>")
    write_file(out / "progress.html", "\n".join([*parts, ""]).encode())


# --------------------------------------------------------------------------------------
# The command

def main(argv=None):
    args = arguments(argv)
    rank, world = rank_and_world()
    if args.batch_size % world:
        raise UserError(f"--batch-size {args.batch_size} cannot be shared by {world} ranks")
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    if world > 1:
        # NCCL between GPUs, gloo between CPUs. It comes first, so that a rank that is refused
        # below takes the others with it: they notice that its connection has closed.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    with contextlib.ExitStack() as at_the_end:
        # For whoever calls this from Python.
        for one in SIGNALS:
            at_the_end.callback(signal.signal, one, signal.getsignal(one))
        # One rank writes.
        if rank == 0:
            at_the_end.enter_context(only_command(args.out))
        train(args)


if __name__ == "__main__":
    command_line(main)
