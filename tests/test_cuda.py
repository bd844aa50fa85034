"""What needs a GPU: the same numbers as on a CPU, compiled blocks, a default run.

    GPU_TESTS=1 python -m pytest -q tests/test_cuda.py

The rest of the suite runs on the CPU also where there is a GPU.
"""

import os

import numpy as np
import pytest
import torch
from conftest import relative, run

import encode
import sample
import test_train
import train
from benchmark import random_batch
from common import read_json, read_jsonl
from sample import compile_blocks

pytestmark = pytest.mark.skipif(
    os.environ.get("GPU_TESTS") != "1" or not torch.cuda.is_available(),
    reason="needs a GPU: GPU_TESTS=1 python -m pytest tests/test_cuda.py")

MODELS = pytest.mark.parametrize("name", ["dit", "cad"])


def network(name):
    """Return a small network that is not at its start, where most branches write zero."""
    model = sample.MODELS[name].network(**sample.MODELS[name].presets["toy"])
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def gradients(model, device, precision):
    """Return the loss and all gradients, as one vector, of a batch of 16 in parts of 8.

    Of parts of one size, because torch.compile takes a minute for each.
    """
    torch.manual_seed(1)
    inputs = train.draw_inputs(random_batch(model, 16, 20), 1.0, torch.device("cpu"))
    inputs = {key: value.to(device) for key, value in inputs.items()}
    args = train.arguments(["--data", "x", "--out", "y", "--precision", precision, "--micro-batch", "8"])
    model.zero_grad()
    loss = train.add_gradient(model, inputs, args)
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


@MODELS
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_gpu_computes_the_gradient_that_a_cpu_computes_compiled_too(name, checkpoint):
    model = network(name)
    cpu_loss, exact = gradients(model, "cpu", "fp32")
    gpu_loss, gradient = gradients(model.cuda(), "cuda", "fp32")
    assert gpu_loss == pytest.approx(cpu_loss, rel=1e-4)
    assert relative(gradient, exact) < 1e-3
    loss, eager = gradients(model, "cuda", "bf16")
    model.checkpoint_activations = checkpoint
    compile_blocks(model, dynamic=False)
    compiled_loss, compiled = gradients(model, "cuda", "bf16")
    assert compiled_loss == pytest.approx(loss, rel=1e-2)
    # As far from the exact gradient as bfloat16 is, and no farther.
    assert relative(compiled, exact) < 1.5 * relative(eager, exact) + 2e-3


@pytest.mark.parametrize("name", ["lamb", "adamw"])
def test_the_optimiser_makes_the_steps_of_the_formulas(name):
    test_train.test_clipping_rates_steps_and_averages_equal_the_formulas_in_float64(name, 0.1, "cuda")


@MODELS
def test_a_default_run_learns_and_goes_on_where_it_was_stopped(toy_paper, tmp_path, name):
    toy = toy_paper[0]

    def trained(out, steps):
        run("train.py", "--data", toy / "encoded", "--augmented", toy / "encoded-cutmix", "--model", name,
            "--preset", "toy", "--batch-size", 8, "--steps", steps, "--schedule-steps", 160, "--warmup", 5,
            "--log-every", 20, "--sample-every", 80, "--sample-steps", 4, "--out", out, check=True)
        return [row["loss"] for row in read_jsonl(out / "log.jsonl")]

    whole = trained(tmp_path / "whole", 80)
    assert whole[-1] < 0.5
    trained(tmp_path / "parts", 40)
    assert trained(tmp_path / "parts", 80) == pytest.approx(whole, rel=1e-3)


@MODELS
def test_a_gpu_draws_the_pictures_that_a_cpu_draws(toy_paper, tmp_path, name):
    toy = toy_paper[0]
    model = network(name)
    for parameter in model.parameters():
        parameter.data *= 0.5
    config = read_json(toy / "dit/config.json", "the toy's checkpoint")
    sample.save_checkpoint(tmp_path, model, {**config, "model": name, "args": model.config})
    pictures = []
    for device in ("cpu", "cuda"):
        pipeline = sample.load_pipeline(tmp_path, device=torch.device(device))
        pipeline.text_encoder.float()
        if device == "cuda":
            compile_blocks(pipeline.model)
        images = sample.generate(pipeline, ["a red circle", "a blue star"], steps=8, guidance=2,
                                 precision="fp32")
        pictures.append(np.stack(images).astype(float))
    # Grey levels of 255.
    assert abs(pictures[0] - pictures[1]).mean() < 0.5


def test_encoders_on_a_gpu_find_the_latents_and_tokens_that_they_find_on_a_cpu(toy_paper, tmp_path):
    toy = toy_paper[0]
    vae = encode.Encoded(toy / "encoded").meta["vae"]
    sets = []
    for name, gpus in (("cpu", ""), ("cuda", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))):
        run("encode.py", "--images", toy / "images", "--captions", toy / "captions.jsonl", "--size", 64,
            "--vae", vae, "--text-encoder", toy / "t5", "--out", tmp_path / name, "--workers", 0,
            check=True, CUDA_VISIBLE_DEVICES=gpus)
        sets.append(encode.Encoded(tmp_path / name))
    cpu, cuda = sets
    for i in range(len(cpu)):
        for a, b in zip([*cuda.moments(i), cuda.text(i)], [*cpu.moments(i), cpu.text(i)]):
            assert relative(a, b) < 0.02
