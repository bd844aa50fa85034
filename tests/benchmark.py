"""How fast training, sampling and reading are: a line for people, and one of JSON.

    python tests/benchmark.py train --model cad --batch-size 128
    python tests/benchmark.py sample --checkpoint Lucasdegeorge/CAD-I --batch-size 16
    python tests/benchmark.py read --data encoded/train

`train` (on random data) and `sample` take the options of train.py and sample.py. They print where
the time goes, the counted floating-point operations (FLOPs) of an image, and the share of the
device's peak that was reached. `read` compares training's loader with a copy of the same bytes.
"""

import json
import resource
import sys
import time
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
from sample import autocast  # noqa: E402

CAPTION_TOKENS = 160        # about as many as a caption of LLaVA's has

# Dense bfloat16 multiplications and additions a second, from the makers' data sheets. The first
# name that is part of the card's own name counts.
PEAK_FLOPS = {
    "GB200": 2500e12, "B200": 2250e12, "H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12,
    "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12,
}


def peak_flops(device, precision):
    """Return a device's peak in FLOP/s, and in words what it was taken from.

    Cards in PEAK_FLOPS have their maker's figure. Of any other device, a large matrix product
    is timed in the precision that `autocast` takes for `precision`.
    """
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for name, peak in PEAK_FLOPS.items():
        if name in card and precision != "fp32":
            return peak, f"the peak of {name}"
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device)
    with autocast(device, precision):
        # A product has the precision that it is made in: then nothing but products is timed.
        a = a @ a
        timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
        seconds = timer.timeit(5).mean
    return 2 * n ** 3 / seconds, f"a {n} x {n} matrix product"


def peak_memory(device):
    """Return the most memory that this process has used on the device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Of a CPU process, Linux reports KiB.
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def seconds_of(function, *arguments, **options):
    """Return the seconds of a call, until the device has done all it was given."""
    begin = time.perf_counter()
    function(*arguments, **options)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


# --------------------------------------------------------------------------------------
# Training

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
    B = args.batch_size
    torch.manual_seed(args.seed)
    family = sample.MODELS[args.model]
    model = family.network(**family.presets[args.preset])
    optimizer = train.make_optimizer(model, args)
    model.to(device)
    averages = {w: w.detach().clone() for w in model.parameters()}
    batch = random_batch(model, B, CAPTION_TOKENS)
    if cuda:
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}

    # Counted without checkpointing: what that computes a second time is no progress.
    inputs = train.draw_inputs(batch, 1.0, device)
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    with FlopCounterMode(display=False) as counter:
        train.add_gradient(model, one, args)
    optimizer.zero_grad()
    flops = counter.get_total_flops()
    model.checkpoint_activations = args.checkpoint_activations
    if cuda and not args.no_compile:
        sample.compile_blocks(model, dynamic=False)

    def finish():
        norm = torch.nn.utils.get_total_norm([w.grad for w in averages])
        train.update(optimizer, averages, norm, args.warmup, args)
        optimizer.zero_grad()

    warmup, steps = (5, 20) if cuda else (1, 3)
    parts = []
    for _ in range(warmup + steps):
        parts.append([seconds_of(train.draw_inputs, batch, 1.0, device),
                      seconds_of(train.add_gradient, model, inputs, args),
                      seconds_of(finish)])
    data, network, update = np.mean(parts[warmup:], axis=0).tolist()
    seconds = data + network + update
    peak, source = peak_flops(device, args.precision)
    share = flops * B / seconds / peak
    memory = peak_memory(device)

    print(f"{args.model} {args.preset}, batch {B} on {device.type}: {B / seconds:.1f} images/s; "
          f"{1e3 * seconds:.0f} ms a step: {1e3 * data:.0f} data, {1e3 * network:.0f} forward + "
          f"backward, {1e3 * update:.0f} clipping + optimiser + EMA; {flops / 1e9:.1f} GFLOP an "
          f"image: {share:.0%} of {source}; {memory / 2 ** 30:.2f} GiB")
    print(json.dumps({
        "benchmark": "train", "model": args.model, "preset": args.preset, "device": device.type,
        "batch_size": B, "images_per_second": B / seconds, "seconds": seconds, "seconds_data": data,
        "seconds_forward_backward": network, "seconds_optimizer_clipping_ema": update,
        "flops_per_image": flops, "peak_flops": peak, "share_of_peak": share,
        "peak_memory_bytes": memory}))


# --------------------------------------------------------------------------------------
# Sampling

def time_sampling(argv):
    """Time one batch of images with the options of sample.py, and print the result."""
    args = sample.arguments(["--out", "nowhere", "--prompt", "A golden retriever lies on a red sofa.", *argv])
    options = {name: getattr(args, name) for name in
               ("guidance", "clamp", "solver", "spacing", "max_tokens", "precision")}
    device = local_device()
    pipeline = sample.load_pipeline(args.checkpoint, args.vae, args.text_encoder)
    model, vae, tokenizer, t5 = pipeline
    B = args.batch_size
    # The options' own prompts come after ours.
    prompts = (args.prompt[1:] or args.prompt) * B
    prompts = prompts[:B]

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
    peak, source = peak_flops(device, args.precision)
    share = flops * B / network / peak
    memory = peak_memory(device) / 2 ** 30

    print(f"{B / total:.3g} images/s; T5 {text / total:.0%}, network {network / total:.0%}, decoder "
          f"{decoder / total:.0%}; {evaluations} evaluations = {flops / 1e12:.3g} TFLOP an image, at "
          f"{share:.0%} of {source}; {memory:.1f} GiB")
    print(json.dumps({
        "benchmark": "sample", "checkpoint": args.checkpoint, "device": device.type, "batch_size": B,
        "steps": args.steps, **options, "evaluations": evaluations, "images_per_second": B / total,
        "seconds_per_image": total / B, "seconds_text": text / B, "seconds_network": network / B,
        "seconds_decoder": decoder / B, "flops_per_image": flops, "share_of_peak": share,
        "peak": source, "memory_gib": memory}))


# --------------------------------------------------------------------------------------
# Reading

def time_reading(argv):
    """Time how a thread of train.py reads batches, beside copying as many bytes; print both."""
    args = train.arguments(["--out", "nowhere", *argv])
    data = Encoded(args.data)
    B = args.batch_size
    rows = [tensor for tensor in train.read_batch([data], args, 0).values() if tensor.ndim > 1]

    # CPU time, because other processes hardly change it; the best of six, once all is in memory.
    best = {}
    for name, work in (("read", lambda step: train.read_batch([data], args, step % 2)),
                       ("copy", lambda step: [tensor.clone() for tensor in rows])):
        seconds = []
        for step in range(8):
            begin = time.process_time()
            work(step)
            seconds.append(time.process_time() - begin)
        best[name] = min(seconds[2:]) / B
    size = sum(tensor.nbytes for tensor in rows) / B
    print(f"loader, one thread: {1e6 * best['read']:.0f} us a sample of {size / 1000:.0f} kB, "
          f"{1 / best['read']:.0f} samples/s; copying these bytes {1e6 * best['copy']:.0f} us: "
          f"{best['copy'] / best['read']:.0%} of the speed of a copy")
    print(json.dumps({"benchmark": "read", "samples_per_second": 1 / best["read"], "bytes": size,
                      "seconds_per_sample": best["read"], "seconds_of_a_copy": best["copy"]}))


def main():
    sections = {"train": time_training, "sample": time_sampling, "read": time_reading}
    if sys.argv[1:2] and sys.argv[1] in sections:
        return sections[sys.argv[1]](sys.argv[2:])
    raise UserError(f"give one of {', '.join(sections)}, and its options")


if __name__ == "__main__":
    command_line(main)
