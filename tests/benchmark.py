"""How fast training, sampling and reading are: one JSON object each.

    python tests/benchmark.py train --model cad --batch-size 128
    python tests/benchmark.py sample --checkpoint Lucasdegeorge/CAD-I --batch-size 16
    python tests/benchmark.py read --data encoded/train

`train` (on random data) and `sample` take the options of train.py and sample.py. They tell where
the time goes, the counted floating-point operations (FLOPs) of an image, and which share was reached
of a large matrix product's speed, and of a known card's peak. `read` compares training's loader with
a copy of the same bytes.
"""

import json
import resource
import sys
import time
import timeit
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# First: it keeps Ctrl-C quiet while torch is imported.
from common import UserError, command_line, local_device  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils.benchmark import Timer  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import sample  # noqa: E402
import train  # noqa: E402
from encode import Encoded, encode_text  # noqa: E402

CAPTION_TOKENS = 160        # about as many as a caption of LLaVA's has

# Dense bfloat16 multiplications and additions a second, from the makers' data sheets (SXM).
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12}


def seconds_of(function, *arguments, **options):
    """Return the seconds of a call, until the device has done all it was given."""
    begin = time.perf_counter()
    function(*arguments, **options)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def show(args, device, flops, network_seconds, **measured):
    """Print what was measured, and the share of a matrix product's speed that `flops` an image are."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device)
    with sample.autocast(device, args.precision):
        # A product has the precision that it is made in: then nothing but products is timed.
        a = a @ a
        timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
        peak = 2 * n ** 3 / timer.timeit(5).mean
    card = "CPU"
    # Linux reports KiB.
    memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
        memory = torch.cuda.max_memory_allocated(device)
    reached = flops * args.batch_size / network_seconds
    result = {"device": card,
              "batch_size": args.batch_size,
              **measured,
              "gflop_per_image": flops / 1e9,
              "tflop_per_second_of_a_product": peak / 1e12,
              "share_of_that": reached / peak,
              "share_of_the_cards_peak": [reached / PEAK_FLOPS[name] for name in PEAK_FLOPS if name in card],
              "memory_gib": memory / 2 ** 30}
    print(json.dumps(result, indent=1))


# ---- Training

def random_batch(model, B, length):
    """Return random numbers in place of a batch of `train.as_batch`, captions of `length` tokens."""
    config = model.config
    latents = (B, config["channels"], config["size"], config["size"])
    tokens = torch.randn(length * B, config["text_dim"]).bfloat16()
    return {"t": torch.rand(B), "mean": torch.randn(latents), "std": torch.rand(latents),
            "tokens": tokens, "lengths": torch.full((B,), length), "coherence": torch.ones(B),
            "coin": torch.rand(B), "noise_seed": torch.arange(B)}


def time_training(argv):
    """Time steps of train.py: drawing the inputs, the network in both directions, the update."""
    args = train.arguments(["--data", "random numbers", "--out", "nowhere", *argv])
    device = local_device()
    cuda = device.type == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = True
    args.schedule_steps = 2 * args.steps
    torch.manual_seed(args.seed)
    family = sample.MODELS[args.model]
    model = family.network(**family.presets[args.preset])
    optimizer = train.make_optimizer(model, args)
    model.to(device)
    averages = {w: w.detach().clone() for w in model.parameters()}
    batch = random_batch(model, args.batch_size, CAPTION_TOKENS)
    if cuda:
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}

    # Counted without checkpointing: what that computes a second time is no progress.
    inputs = train.draw_inputs(batch, 1.0, device)
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    with FlopCounterMode(display=False) as counter:
        train.add_gradient(model, one, args)
    optimizer.zero_grad()
    model.checkpoint_activations = args.checkpoint_activations
    if cuda and not args.no_compile:
        sample.compile_blocks(model, dynamic=False)

    def update():
        norm = torch.nn.utils.get_total_norm([w.grad for w in averages])
        train.update(optimizer, averages, norm, args.warmup, args)
        optimizer.zero_grad()

    warmup, steps = (5, 20) if cuda else (1, 3)
    parts = []
    for _ in range(warmup + steps):
        parts.append([seconds_of(train.draw_inputs, batch, 1.0, device),
                      seconds_of(train.add_gradient, model, inputs, args),
                      seconds_of(update)])
    parts = np.mean(parts[warmup:], axis=0).tolist()
    seconds = sum(parts)
    names = ("seconds_data", "seconds_forward_backward", "seconds_clipping_optimizer_ema")
    show(args, device, counter.get_total_flops(), seconds, model=args.model, preset=args.preset,
         images_per_second=args.batch_size / seconds, **dict(zip(names, parts)))


# ---- Sampling

def time_sampling(argv):
    """Time one batch of images with the options of sample.py."""
    args = sample.arguments(["--out", "nowhere", "--prompt", "A golden retriever lies on a red sofa.", *argv])
    options = {name: getattr(args, name) for name in
               ("guidance", "clamp", "solver", "spacing", "max_tokens", "precision")}
    device = local_device()
    pipeline = sample.load_pipeline(args.checkpoint, args.vae, args.text_encoder)
    model, vae, tokenizer, t5 = pipeline
    B = args.batch_size
    # An option's own prompt comes after ours.
    prompts = args.prompt[-1:] * B

    # Of an evaluation of the network, before it is compiled. T5, the decoder and `condition` are
    # not counted, and the time of the first two is taken off.
    noise = sample.starting_noise(model, range(B)).to(device)
    ones = torch.ones(B, device=device)
    texts = encode_text(tokenizer, t5, prompts, args.max_tokens)
    with torch.no_grad():
        context = model.condition(*texts, ones)
        with FlopCounterMode(display=False) as counter:
            model.denoise(noise, ones, context)
    # A step with guidance needs two, and the first has none.
    evaluations = args.steps + (args.steps - 1 if args.guidance else 0)
    flops = counter.get_total_flops() / B * evaluations

    if device.type == "cuda" and not args.no_compile:
        sample.compile_blocks(model)
    # Two steps warm up both kinds.
    seconds_of(sample.generate, pipeline, prompts, steps=2, **options)
    total = seconds_of(sample.generate, pipeline, prompts, steps=args.steps, **options)
    text = seconds_of(encode_text, tokenizer, t5, prompts, args.max_tokens)
    decoder = seconds_of(vae.decode, noise)
    network = total - text - decoder
    show(args, device, flops, network, checkpoint=args.checkpoint, steps=args.steps, **options,
         evaluations=evaluations, images_per_second=B / total, seconds_text=text,
         seconds_network=network, seconds_decoder=decoder)


# ---- Reading

def time_reading(argv):
    """Time how a thread of train.py reads batches, beside copying as many bytes."""
    args = train.arguments(["--out", "nowhere", *argv])
    data = Encoded(args.data)
    rows = [tensor for tensor in train.read_batch([data], args, 0).values() if tensor.ndim > 1]

    # CPU time, because other processes hardly change it; the best of eight, once all is in memory.
    def seconds(work):
        return min(timeit.repeat(work, timer=time.process_time, number=1, repeat=8)) / args.batch_size

    read = seconds(lambda: train.read_batch([data], args, 0))
    copy = seconds(lambda: [tensor.clone() for tensor in rows])
    result = {"samples_per_second": 1 / read,
              "bytes_per_sample": sum(tensor.nbytes for tensor in rows) / args.batch_size,
              "seconds_per_sample": read,
              "seconds_of_a_copy": copy,
              "share_of_the_speed_of_a_copy": copy / read}
    print(json.dumps(result, indent=1))


def main():
    sections = {"train": time_training, "sample": time_sampling, "read": time_reading}
    if sys.argv[1:2] and sys.argv[1] in sections:
        return sections[sys.argv[1]](sys.argv[2:])
    raise UserError(f"give one of {', '.join(sections)}, and its options")


if __name__ == "__main__":
    command_line(main)
