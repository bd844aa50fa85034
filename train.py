"""Stage 4, training (paper 3.3, 4.1): Algorithm 1 on encoded ImageNet and its encoded CutMix composites.

    torchrun --nproc-per-node 8 train.py --model dit --preset L/2 --data encoded/train \\
        --augmented encoded/cutmix --p 0.5 --tau 0.4 --out out/dit-i

The folder --out is a checkpoint (config.json, model.safetensors: the EMA weights) that sample.py reads. A
killed run, started again with the same command, goes on from the last saved state. Every random number is a
function of (seed, step, index in the batch), so the data, times and noise do not depend on when it was
killed, on the number of workers or on the number of ranks.
"""

import argparse
import contextlib
import functools
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import (HelpFormatter, UserError, at_least, autocast, command_line, complete,
                    contact_sheet, local_device, rank_and_world, read_jsonl, to_images,
                    write_jsonl)
from encode import Encoded, load_vae
from sample import MODELS, ddim, gamma

PRESETS = {name: family.presets for name, family in MODELS.items()}


# ------------------------------------------------------------------------------------------------------------
# Algorithm 1

def choose(t, rng, tau, p):
    """Eq. 3: which samples come from the augmented set. t (B,) in [0, 1] -> bool (B,).

    A composite has seams; noise hides them where t > tau. There a coin of probability p decides for it."""
    t = np.asarray(t)
    return (t > tau) & (rng.random(len(t)) < p)


def pad(texts, longest):
    """Captions' tokens, each (L_i, D) -> text (B, longest, D), zeros behind, and mask (B, longest) bool."""
    text = torch.zeros(len(texts), longest, texts[0].shape[1], dtype=texts[0].dtype)
    for row, tokens in zip(text, texts):
        row[:len(tokens)] = tokens
    return text, torch.arange(longest) < torch.tensor([len(tokens) for tokens in texts])[:, None]


@functools.lru_cache(maxsize=4)                     # two epochs of two sets: a batch may span the end of one
def order(seed, which, epoch, count):
    """Every epoch goes through each set (which: 0 originals, 1 composites) in an order of its own."""
    return np.random.default_rng([seed, 2, which, epoch]).permutation(count)


class Batches(torch.utils.data.Dataset):
    """Algorithm 1, lines that draw: step -> this rank's share of the batch, as a dict of tensors.

    t (B,), x_0 and eps (B, C, h, w), text (B, L, D_text) padded to the data's longest caption, mask (B, L),
    coherence (B,). Which set a sample comes from is decided before anything is read."""

    def __init__(self, original, augmented, args, rank, world):
        self.original, self.augmented, self.args = original, augmented, args
        self.mine = range(rank * args.batch_size // world, (rank + 1) * args.batch_size // world)
        self.longest = max(data.meta["longest"] for data in (original, augmented) if data)

    def __getitem__(self, step):
        a = self.args
        rng = np.random.default_rng([a.seed, 0, step])
        t = rng.random(a.batch_size)                                    # t ~ U(0, 1)
        augmented = choose(t, rng, a.tau, a.p)                          # eq. 3
        dropped = rng.random(a.batch_size) < a.drop                     # for classifier-free guidance
        x_0, eps, texts = [], [], []
        for index in self.mine:
            data = self.augmented if augmented[index] else self.original
            epoch, position = divmod(step * a.batch_size + index, len(data))
            i = int(order(a.seed, int(augmented[index]), epoch, len(data))[position])
            mean, std = data.moments(i)
            generator = np.random.default_rng([a.seed, 1, step, index])
            noise = torch.from_numpy(generator.standard_normal((2, *mean.shape), np.float32))
            x_0.append((mean + std * noise[0]) * data.meta["scaling_factor"])   # a new draw of x_0 every time
            eps.append(noise[1])
            texts.append(data.null if dropped[index] else data.text(i))
        text, mask = pad(texts, self.longest)
        return dict(t=torch.from_numpy(t[self.mine]).float(), x_0=torch.stack(x_0), eps=torch.stack(eps),
                    text=text, mask=mask, coherence=torch.from_numpy(~dropped[self.mine]).float())


def diffusion_loss(model, t, x_0, eps, text, mask, coherence):
    """Eq. 1 and 2: the mean squared error of the predicted noise, unweighted -> scalar."""
    g = gamma(t)[:, None, None, None]
    x_t = g.sqrt() * x_0 + (1 - g).sqrt() * eps                         # eq. 1
    eps_hat = model(x_t, gamma(t), text, mask, coherence)
    return F.mse_loss(eps_hat.float(), eps)                             # eq. 2


# ------------------------------------------------------------------------------------------------------------
# Optimisation

class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020): Adam whose step for each tensor is rescaled to the norm of the tensor itself.

    Only where there is weight decay: biases and norms, which have none, take plain Adam steps."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p].update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                self.state[p]["step"] += 1
            m, v, steps = ([self.state[p][key] for p in params] for key in ("m", "v", "step"))
            grads, (beta1, beta2) = [p.grad for p in params], group["betas"]
            torch._foreach_lerp_(m, grads, 1 - beta1)
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
            root = torch._foreach_div(torch._foreach_sqrt(v), [(1 - beta2 ** n) ** 0.5 for n in steps])
            torch._foreach_add_(root, group["eps"])
            update = torch._foreach_div(torch._foreach_div(m, [1 - beta1 ** n for n in steps]), root)
            if group["weight_decay"]:
                torch._foreach_add_(update, params, alpha=group["weight_decay"])
                w, u = torch.stack(torch._foreach_norm(params)), torch.stack(torch._foreach_norm(update))
                trust = torch.where((w > 0) & (u > 0), w / u, 1.0)      # the layer-wise trust ratio
                torch._foreach_mul_(update, list(trust.unbind()))
            torch._foreach_add_(params, update, alpha=-group["lr"])


def lr_at(step, lr, warmup, total, rate):
    """Learning rate of a step, 1 to total: linear warm-up, then `rate` of a half cosine over the rest."""
    if step < warmup:
        return lr * step / warmup
    s = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * lr * (1 + math.cos(rate * math.pi * s))


def make_optimizer(model, args):
    """No weight decay on biases, norms and other vectors."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.ndim >= 2], "weight_decay": args.weight_decay},
              {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]
    if args.optimizer == "lamb":
        return Lamb(groups, args.lr, tuple(args.betas))
    return torch.optim.AdamW(groups, args.lr, tuple(args.betas), fused=True)


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema <- decay ema + (1 - decay) online; the first steps of a run forget faster than `decay`."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# ------------------------------------------------------------------------------------------------------------
# Settings

def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = functools.partial(parser.add_argument, metavar="X")
    add("--data", help="encoded originals with their captions (encode.py)")
    add("--augmented", help="encoded CutMix composites with theirs; without it, text augmentation alone")
    add("--out", help="folder of the checkpoint, training state, log.jsonl and sample grids")
    add("--model", choices=list(MODELS), default="dit", help="dit or cad")
    add("--preset", help="DiT: S/2, B/2, L/2, toy; CAD: B, L, toy (default: L/2 and L)")
    add("--p", type=float, default=0.5, help="chance of a composite where t > tau")
    add("--tau", type=float, default=0.4, help="composites only where t > tau")
    add("--drop", type=float, default=0.1, help="share of null prompts")
    add("--batch-size", type=int, default=1024, help="of all ranks together")
    add("--micro-batch", type=int, help="samples on a device at once; more are accumulated (default: all)")
    add("--steps", type=int, default=250_000, help="training steps")
    add("--schedule-steps", type=int, help="length of the learning-rate schedule (default: twice --steps)")
    add("--optimizer", choices=["lamb", "adamw"], default="lamb", help="lamb or adamw")
    add("--lr", type=float, default=1e-3, help="peak learning rate")
    add("--betas", type=float, nargs=2, default=[0.9, 0.999], help="of AdamW and LAMB")
    add("--weight-decay", type=float, default=0.01, help="none on biases and norms")
    add("--warmup", type=int, default=5000, help="steps of linear warm-up")
    add("--rate", type=float, default=0.7, help="share of a half cosine that is used")
    add("--clip", type=float, default=2.0, help="bound of the gradient's norm")
    add("--ema", type=float, default=0.9999, help="decay of the averaged weights")
    add("--seed", type=int, default=0, help="of weights, data, times and noise")
    add("--resume", help="training state to go on from (default: OUT/state.pt where there is one)")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 on CUDA, else fp32")
    parser.add_argument("--no-compile", action="store_true", help="CUDA: do not torch.compile the network")
    add("--workers", type=int, help="processes that read data, per rank (default: 4 on CUDA, else 0)")
    add("--log-every", type=int, default=100, help="steps")
    add("--save-every", type=int, default=5000, help="steps")
    add("--keep-every", type=int, default=50_000, help="steps between lasting copies")
    add("--sample-every", type=int, default=5000, help="steps between grids, 0 none")
    add("--sample-steps", type=int, default=50, help="DDIM steps of those grids")
    add("--guidance", type=float, default=8.0, help="of those grids")
    add("--clamp", type=float, default=1.2, help="bound of |x_0| in those grids; 0 is none")
    parser.add_argument("--benchmark", action="store_true", help="only time training steps on random data")
    args = parser.parse_args(argv)
    args.preset = args.preset or MODELS[args.model].default_preset
    args.schedule_steps = args.schedule_steps or 2 * args.steps  # the paper stops half-way through it
    args.micro_batch = args.micro_batch or args.batch_size
    if args.preset not in PRESETS[args.model]:
        raise UserError(f"--preset {args.preset}: {args.model} has {', '.join(PRESETS[args.model])}")
    for name in ("p", "tau", "drop", "ema"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be in [0, 1]")
    at_least(args, batch_size=1, micro_batch=1, steps=1, log_every=1, save_every=1, keep_every=1,
             sample_steps=1)
    if not args.benchmark and not (args.data and args.out):
        raise UserError("--data and --out are needed")
    if args.augmented is None:
        args.p = 0.0
    return args


# What may change between a run and its continuation: everything else would make it another run.
FREE = {"out", "data", "augmented", "resume", "steps", "workers", "log_every", "save_every", "keep_every",
        "micro_batch", "sample_every", "sample_steps", "guidance", "clamp", "no_compile", "benchmark"}


def open_data(args):
    """The originals, and the composites or None; both must come from the same encoders."""
    original = Encoded(args.data)
    augmented = Encoded(args.augmented) if args.augmented else None
    for key in ("text_dim", "latent_shape", "scaling_factor") if augmented else ():
        if original.meta[key] != augmented.meta[key]:
            raise UserError(f"{args.data} and {args.augmented} differ in {key} ({original.meta[key]} and "
                            f"{augmented.meta[key]}): encode both with the same encoders")
    # Which pictures and captions these are: a run does not go on with others.
    args.originals = original.meta.get("list_of_images_and_captions")
    args.composites = augmented and augmented.meta.get("list_of_images_and_captions")
    return original, augmented


# ------------------------------------------------------------------------------------------------------------
# Checkpoints and grids

def save_checkpoint(folder, ema, config):
    with complete(folder / "model.safetensors") as path:
        path.write_bytes(save(ema.state_dict()))
    with complete(folder / "config.json") as path:
        path.write_text(json.dumps(config, indent=1))


def load_state(path, args, device):
    """The training state at `path`, or None where there is none. Raises UserError if it is another run's."""
    if not Path(path).exists():
        if args.resume:
            raise UserError(f"--resume {path}: no such file")
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        settings = state["settings"]
    except Exception as error:
        raise UserError(f"{path}: not a training state ({str(error).splitlines()[0][:100]})")
    for key in ("originals", "composites"):
        if settings[key] != getattr(args, key):
            raise UserError(f"{path} is of a run on other {key}: use the same data, or another --out")
    for key, value in settings.items():
        if key not in FREE and value != getattr(args, key, value):
            raise UserError(f"{path} is of a run with --{key.replace('_', '-')} {value}, not "
                            f"{getattr(args, key)}: use its settings, or another --out")
    return state


def save_grid(path, ema, vae, data, args, device):
    """DDIM samples of the EMA weights for fixed captions, of pictures spread over each set."""
    sets = [d for d in data if d]
    picks = [(d, i) for d in sets for i in range(0, len(d), -(-len(d) * len(sets) // 16))]
    cond = pad([d.text(i) for d, i in picks], max(d.meta["longest"] for d in sets))
    null = pad([sets[0].null], len(sets[0].null))
    cond, null = ([z.to(device) for z in pair] for pair in (cond, null))
    noise = torch.randn(len(picks), *sets[0].meta["latent_shape"],
                        generator=torch.Generator().manual_seed(args.seed))
    with autocast(device, args.precision):
        x_0 = ddim(ema, noise.to(device), cond, null, args.sample_steps, args.guidance,
                   args.clamp or None)
    images = to_images(vae.decode(x_0 / vae.scaling_factor))
    with complete(path) as temporary:
        contact_sheet(images, [d.caption(i) for d, i in picks]).save(temporary, "PNG")


# ------------------------------------------------------------------------------------------------------------
# The run

def main(argv=None):
    args = arguments(argv)
    (rank, world), device = rank_and_world(), local_device()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    if args.benchmark:
        return benchmark(args, device)
    if args.batch_size % world:
        raise UserError(f"--batch-size {args.batch_size} cannot be shared by {world} ranks")
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    out = Path(args.out)
    original, augmented = open_data(args)
    meta = original.meta

    # The network, its moving average, the optimiser: from the seed, or as they were when the run was killed.
    sizes = PRESETS[args.model][args.preset] | dict(
        channels=meta["latent_shape"][0], size=meta["latent_shape"][1], text_dim=meta["text_dim"])
    torch.manual_seed(args.seed)
    model = MODELS[args.model].network(**sizes).to(device)
    ema = MODELS[args.model].network(**sizes).to(device).requires_grad_(False).eval()
    ema.load_state_dict(model.state_dict())
    optimizer = make_optimizer(model, args)
    first, running = 0, torch.zeros(2, device=device)                   # sums of loss and gradient norm
    state = load_state(args.resume or out / "state.pt", args, device)
    if state:
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        first, running = state["step"], state["running"]
    config = {"model": args.model, "args": model.config, "vae": meta["vae"],
              "text_encoder": meta["text_encoder"], "scaling_factor": meta["scaling_factor"]}
    vae = load_vae(meta["vae"], device) if args.sample_every and rank == 0 else None

    network = torch.compile(model) if cuda and not args.no_compile else model
    if world > 1:
        network = DistributedDataParallel(network)
    workers = args.workers if args.workers is not None else 4 * cuda
    batches = torch.utils.data.DataLoader(Batches(original, augmented, args, rank, world), batch_size=None,
                                          sampler=range(first, args.steps), num_workers=workers,
                                          pin_memory=cuda)
    if rank == 0:
        count = sum(p.numel() for p in model.parameters())
        print(f"{args.model} {args.preset}: {count / 1e6:.1f} M parameters, {len(original)} originals, "
              f"{len(augmented) if augmented else 0} composites, steps {first} to {args.steps} "
              f"on {world} x {device.type}")
        out.mkdir(parents=True, exist_ok=True)
        rows = read_jsonl(out / "log.jsonl") if state and (out / "log.jsonl").exists() else []
        write_jsonl(out / "log.jsonl", (row for row in rows if row["step"] <= first))     # of what was saved
    bar = tqdm(total=args.steps, initial=first, desc="training", unit="step", disable=rank > 0)
    clock, since = time.perf_counter(), first

    def due(done, every):
        return every and (done % every == 0 or done == args.steps)

    for step, batch in enumerate(batches, first):
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step + 1, args.lr, args.warmup, args.schedule_steps, args.rate)
        torch.manual_seed((args.seed * 1_000_003 + step) * world + rank)   # what the network itself draws
        size = len(batch["t"])
        for start in range(0, size, args.micro_batch):
            part = {name: tensor[start:start + args.micro_batch] for name, tensor in batch.items()}
            share, last = len(part["t"]) / size, start + args.micro_batch >= size
            with network.no_sync() if world > 1 and not last else contextlib.nullcontext():
                with autocast(device, args.precision):
                    loss = diffusion_loss(network, **part)
                (loss * share).backward()
            running[0] += loss.detach() * share
        running[1] += torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, model, args.ema, step)
        bar.update()

        done = step + 1
        if world > 1 and (due(done, args.log_every) or due(done, args.save_every)):
            dist.all_reduce(running)                        # now the mean over ranks, on each of them
            running /= world
        if due(done, args.log_every):
            mean = running / (done % args.log_every or args.log_every)
            loss, norm = mean.tolist()
            running.zero_()
            if rank == 0:
                rate = args.batch_size * (done - since) / (time.perf_counter() - clock)
                bar.set_postfix(loss=f"{loss:.4f}", lr=f"{group['lr']:.1e}", images_s=f"{rate:.0f}")
                with open(out / "log.jsonl", "a") as log:
                    row = {"step": done, "loss": loss, "grad_norm": norm, "lr": group["lr"]}
                    log.write(json.dumps(row) + "\n")
            if not math.isfinite(loss):
                raise UserError(f"step {done}: the loss is {loss}; lower --lr or raise --warmup")
            clock, since = time.perf_counter(), done
        if rank == 0 and due(done, args.save_every):
            save_checkpoint(out, ema, config)
            with complete(out / "state.pt") as path:
                torch.save({"model": model.state_dict(), "ema": ema.state_dict(), "step": done,
                            "running": running, "optimizer": optimizer.state_dict(),
                            "settings": vars(args)}, path)
        if rank == 0 and done % args.keep_every == 0:
            save_checkpoint(out / f"step-{done:07d}", ema, config)
        if rank == 0 and due(done, args.sample_every):
            save_grid(out / f"samples/{done:07d}.png", ema, vae, (original, augmented), args, device)
    bar.close()
    if world > 1:
        dist.destroy_process_group()


def benchmark(args, device):
    """Milliseconds a step, images a second, the share of a large matmul's speed that the network reaches."""
    from torch.utils.benchmark import Timer
    from torch.utils.flop_counter import FlopCounterMode
    cuda, B = device.type == "cuda", args.micro_batch
    model = MODELS[args.model].network(**PRESETS[args.model][args.preset]).to(device)
    c = model.config
    shape = B, c["channels"], c["size"], c["size"]
    with device:
        batch = dict(t=torch.rand(B), x_0=torch.randn(shape), eps=torch.randn(shape), coherence=torch.ones(B),
                     text=torch.randn(B, 256, c["text_dim"]), mask=torch.ones(B, 256, dtype=torch.bool))
    optimizer = make_optimizer(model, args)
    network = torch.compile(model) if cuda and not args.no_compile else model

    def seconds(function, times):               # warms up, waits for the GPU
        timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
        return timer.timeit(times).mean

    def step():
        with autocast(device, args.precision):
            loss = diffusion_loss(network, **batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()

    with FlopCounterMode(display=False) as counter, autocast(device, args.precision):
        diffusion_loss(model, **batch).backward()
    n = 8192 if cuda else 2048
    a = torch.randn(n, n, device=device)
    with autocast(device, args.precision):
        peak = 2 * n ** 3 / seconds(lambda: a @ a, 10)
    took = seconds(step, 20 if cuda else 3)
    flops = counter.get_total_flops() / took
    memory = f", {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB" if cuda else ""
    print(f"{args.model} {args.preset}, batch {B} on one {device.type}: {1000 * took:.1f} ms a step, "
          f"{B / took:.1f} images/s, {flops / 1e12:.2f} TFLOP/s = {100 * flops / peak:.0f}% of a {n} x {n} "
          f"matmul{memory}")


if __name__ == "__main__":
    command_line(main)
