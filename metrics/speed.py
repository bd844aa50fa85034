"""How fast training and sampling are: `train.py --benchmark` and `sample.py --benchmark`.

Both print a line for people and one of JSON: images a second, where the time goes, the counted
floating-point operations (FLOPs) of an image, and the share of the device's peak that was reached.
"""

import json
import resource
import time

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import sample
import train
from common import compile_blocks, local_device, peak_flops
from encode import encode_text

CAPTION_TOKENS = 160        # about as many as a caption of LLaVA's has


def peak_memory(device):
    """Return the most memory that this process has used on the device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Of a CPU process, Linux reports KiB.
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --------------------------------------------------------------------------------------
# Training

def random_batch(model, B, length):
    """Return a batch of random numbers in place of `train.as_batch`'s, with captions of `length` tokens."""
    latents = (B, model.config["channels"], model.config["size"], model.config["size"])
    return {"t": torch.rand(B),
            "mean": torch.randn(latents),
            "std": torch.rand(latents),
            "tokens": torch.randn(length * B, model.config["text_dim"]).bfloat16(),
            "lengths": torch.full((B,), length),
            "coherence": torch.ones(B),
            "coin": torch.rand(B),
            "noise_seed": torch.arange(B)}


def time_training(args, device):
    """Time training steps on random data, with the settings of train.py, and print the result."""
    cuda = device.type == "cuda"
    B = args.batch_size
    torch.manual_seed(args.seed)
    family = sample.MODELS[args.model]
    model = family.network(**family.presets[args.preset])
    optimizer = train.make_optimizer(model, args)
    model.to(device)
    averages = {p: p.detach().clone() for p in model.parameters()}
    batch = random_batch(model, B, CAPTION_TOKENS)
    if cuda:
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}

    # Counted without checkpointing: what that computes a second time is no progress.
    flops = flops_of_training(model, batch, args, device)
    model.checkpoint_activations = args.checkpoint_activations
    if cuda and not args.no_compile:
        compile_blocks(model, dynamic=False)

    warmup, steps = (5, 20) if cuda else (1, 3)
    ticks = []
    for step in range(warmup + steps):
        ticks.append(now(cuda))
        inputs = train.draw_inputs(batch, 1.0, device)
        ticks.append(now(cuda))
        loss = train.add_gradient(model, inputs, args)
        ticks.append(now(cuda))
        train.finish_step(optimizer, averages, loss, step, args)
    ticks.append(now(cuda))
    if cuda:
        torch.cuda.synchronize()
        ticks = [ticks[0].elapsed_time(tick) / 1000 for tick in ticks]

    parts = np.diff(ticks).reshape(-1, 3)                                # (steps, 3), in seconds
    data_time, network_time, update_time = parts[warmup:].mean(axis=0).tolist()
    seconds = data_time + network_time + update_time
    peak, peak_source = peak_flops(device, args.precision)
    share = flops * B / seconds / peak
    memory = peak_memory(device)

    print(f"{args.model} {args.preset}, batch {B} on {device.type}: {B / seconds:.1f} images/s; "
          f"{1e3 * seconds:.0f} ms a step: {1e3 * data_time:.0f} data, {1e3 * network_time:.0f} forward + "
          f"backward, {1e3 * update_time:.0f} optimiser + clipping + EMA; {flops / 1e9:.1f} GFLOP an "
          f"image: {share:.0%} of {peak_source}; {memory / 2 ** 30:.2f} GiB")
    print(json.dumps({
        "model": args.model,
        "preset": args.preset,
        "device": device.type,
        "batch_size": B,
        "images_per_second": B / seconds,
        "seconds": seconds,
        "seconds_data": data_time,
        "seconds_forward_backward": network_time,
        "seconds_optimizer_clipping_ema": update_time,
        "flops_per_image": flops,
        "peak_flops": peak,
        "share_of_peak": share,
        "peak_memory_bytes": memory,
    }))


def now(cuda):
    """Return the time in seconds, or on a GPU an event that will hold it.

    As in training, the CPU does not wait for the GPU, which looks at its clock itself.
    """
    if cuda:
        tick = torch.cuda.Event(enable_timing=True)
        tick.record()
        return tick
    return time.perf_counter()


def flops_of_training(model, batch, args, device):
    """Return the operations of forward and backward of one image."""
    inputs = train.draw_inputs(batch, 1.0, device)
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    with FlopCounterMode(display=False) as counter:
        train.add_gradient(model, one, args)
    model.zero_grad()
    return counter.get_total_flops()


# --------------------------------------------------------------------------------------
# Sampling

def time_sampling(args):
    """Time one batch of samples, with the settings of sample.py, and print the result."""
    device = local_device()
    options = sample.sampling_options(args)
    pipeline = sample.load_pipeline(args.checkpoint, args.vae, args.text_encoder)
    model, vae, tokenizer, t5 = pipeline
    B = args.batch_size
    sentences = args.prompt or ["A golden retriever lies on a red sofa beside a cushion."]
    prompts = (sentences * B)[:B]

    # Count the operations of one evaluation of the network, before it is compiled. Those of T5 and
    # of the decoder are not counted, and their time is taken off. Those of `condition` are not
    # counted either, but its time stays in: it runs once a caption, before many evaluations.
    noise = sample.starting_noise(model, range(B)).to(device)
    ones = torch.ones(B, device=device)
    texts = encode_text(tokenizer, t5, prompts, args.max_tokens)
    with torch.no_grad():
        context = model.condition(*texts, ones)
        with FlopCounterMode(display=False) as counter:
            model.denoise(noise, ones, context)
    evaluations = count_evaluations(args)
    flops = counter.get_total_flops() / B * evaluations

    if device.type == "cuda" and not args.no_compile:
        compile_blocks(model)
    # Two steps warm up both kinds: the first has no guidance, the second has, at t = 0.5.
    two_steps = {**options, "steps": 2, "guidance_interval": (0.0, 1.0)}
    seconds_of(device, sample.generate, pipeline, prompts, **two_steps)
    total = seconds_of(device, sample.generate, pipeline, prompts, **options)
    text_time = seconds_of(device, encode_text, tokenizer, t5, prompts, args.max_tokens)
    decoder_time = seconds_of(device, vae.decode, noise)
    network_time = total - text_time - decoder_time
    peak, peak_source = peak_flops(device, options["precision"])
    share = flops * B / network_time / peak
    memory = peak_memory(device) / 2 ** 30

    print(f"{B / total:.3g} images/s; T5 {text_time / total:.0%}, network "
          f"{network_time / total:.0%}, decoder {decoder_time / total:.0%}; {evaluations} "
          f"evaluations = {flops / 1e12:.3g} TFLOP an image, at {share:.0%} of "
          f"{peak_source}; {memory:.1f} GiB")
    print(json.dumps({
        "benchmark": "sample",
        "checkpoint": args.checkpoint,
        "device": device.type,
        "batch_size": B,
        **options,
        "evaluations": evaluations,
        "images_per_second": B / total,
        "seconds_per_image": total / B,
        "seconds_text": text_time / B,
        "seconds_network": network_time / B,
        "seconds_decoder": decoder_time / B,
        "flops_per_image": flops,
        "share_of_peak": share,
        "peak": peak_source,
        "memory_gib": memory,
    }))


def count_evaluations(args):
    """Return how often an image needs the network; a step with guidance needs it twice."""
    # Without the first step, which has no guidance, and without t = 0, which is no step.
    later = sample.times(args.steps, args.spacing)[1:-1]
    guided = [t for t in later if args.guidance and sample.is_within(t, args.guidance_interval)]
    return args.steps + len(guided)


def seconds_of(device, function, *arguments, **options):
    """Return the seconds of a call, until the device has done all it was given."""
    begin = time.perf_counter()
    function(*arguments, **options)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
