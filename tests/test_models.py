"""DiT-I and CAD-I: released numbers, closed forms, what masks, gates and states must (not) do."""

import shutil

import pytest
import torch
from conftest import FIXTURES, relative
from safetensors.torch import load_file

import model_cad
import model_dit
from common import UserError, read_json, write_json
from sample import ddim, load_model

CAD_TINY = FIXTURES / "cad_tiny"
TINY_DIT = dict(size=4, channels=3, patch=2, text_dim=10, depth=2, dim=32, heads=4)
TINY_CAD = dict(size=4, channels=3, patch=2, text_dim=10, num_latents=5, dim=32, data_dim=16,
                depth=2, layers=1, heads=4, read_write_heads=4)
BOTH = pytest.mark.parametrize("network, sizes", [(model_dit.DiT, TINY_DIT), (model_cad.CAD, TINY_CAD)])


def randomize(model):
    """Fill all parameters, so that nothing hides behind a zero of the initialisation."""
    for parameter in model.parameters():
        matrix = parameter.ndim > 1
        parameter.data = torch.randn(parameter.shape) / 5 if matrix else torch.rand(parameter.shape) / 2 + 0.5
    return model


def inputs(batch=2, length=6, size=4):
    """Return x, gamma, text, mask and coherence; the first caption is padded."""
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[0, 4:] = False
    text = torch.randn(batch, length, 10)
    return torch.randn(batch, 3, size, size), torch.rand(batch), text, mask, torch.ones(batch)


def predict(model, x, gamma, text, mask, coherence, state=None):
    """Return the noise that one denoising step predicts."""
    return model.denoise(x, gamma, model.condition(text, mask, coherence), state)[0]


def assert_close(a, b, tolerance=1e-5):
    assert relative(a.detach(), b.detach()) <= tolerance


# ---- The released CAD-I

@torch.no_grad()
def test_the_released_cad_gives_the_released_numbers():
    model = load_model(CAD_TINY)
    recorded = load_file(CAD_TINY / "io.safetensors")
    for name, coherence, state in [("coherent", 1.0, None),
                                   ("incoherent_with_state", 0.0, recorded["state"])]:
        context = model.condition(recorded["text"], recorded["mask"], torch.full((3,), coherence))
        eps, latents = model.denoise(recorded["x"], recorded["gamma"], context, state)
        assert_close(eps, recorded[f"eps_{name}"])
        assert_close(latents, recorded[f"latents_{name}"])
    # With guidance, and latents carried from step to step.
    null = recorded["null_text"][None], torch.ones(1, 1, dtype=torch.bool)
    x_0 = ddim(model, recorded["x"], (recorded["text"], recorded["mask"]), null, 6, 3.0, 1.2)
    assert_close(x_0, recorded["ddim_6_steps_guidance_3_clamp_1_2"])


def test_released_config_keys_of_another_network_are_refused_by_name_and_harmless_ones_are_not(tmp_path):
    shutil.copytree(CAD_TINY, tmp_path, dirs_exist_ok=True)
    config = read_json(CAD_TINY / "config.json", "a config")

    def load(**changes):
        write_json(tmp_path / "config.json", {**config, **changes})
        load_model(tmp_path)

    load(num_cond_tokens=5, weight_init="orthogonal", _name="x", license="mit", unheard_of=0)
    for key, value in [("modulate_conditioning", True), ("use_cond_rin_block", False), ("unheard_of", 3),
                       ("noise_embedding_type", "fourier"), ("time_scaling", 500.0)]:
        with pytest.raises(UserError, match=f"config.json: not .*{key}"):
            load(**{key: value})
    with pytest.raises(UserError, match="model.safetensors: not the weights of the CAD"):
        load(latents_dim=32)


# ---- Inputs, layers, initialisation

@BOTH
@torch.no_grad()
def test_masked_tokens_change_nothing_and_coherence_is_an_input_of_cad_alone(network, sizes):
    model = randomize(network(**sizes))
    x, gamma, text, mask, coherence = inputs()
    before = predict(model, x, gamma, text, mask, coherence)
    other = torch.where(mask[..., None], text, torch.randn_like(text))
    assert torch.equal(before, predict(model, x, gamma, other, mask, coherence))
    short = predict(model, x[:1], gamma[:1], text[:1, :4], mask[:1, :4], coherence[:1])
    assert_close(short, before[:1])
    incoherent = predict(model, x, gamma, text, mask, 0 * coherence)
    assert torch.equal(before, incoherent) == (network is model_dit.DiT)
    text[0, 0] += 1
    assert not torch.allclose(before[0], predict(model, x, gamma, text, mask, coherence)[0])


def test_patches_of_dit_come_back_to_their_places():
    """With identities at both ends and no blocks, every latent returns to where it was."""
    model = model_dit.DiT(**{**TINY_DIT, "depth": 0, "dim": 12, "heads": 2})
    model.patch_embed.weight.data = torch.eye(12)
    model.out.weight.data = torch.eye(12)
    model.position.zero_()
    model.final_norm = torch.nn.Identity()
    model.time_embed[2].weight.data.zero_()
    x, *others = inputs()
    assert_close(predict(model, x, *others), x)


def test_dit_attention_is_softmax_of_normalised_queries_and_keys():
    layer = model_dit.Attention(16, 2)
    layer.q_norm.weight.data.uniform_(0.5, 2)
    x = torch.randn(2, 5, 16)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])

    def normalised(z):
        return z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    q = layer.q(x)
    k, v = layer.kv(x).chunk(2, -1)
    heads = []
    for span in (slice(0, 8), slice(8, 16)):
        query = normalised(q[..., span]) * layer.q_norm.weight
        key = normalised(k[..., span]) * layer.k_norm.weight
        logits = query @ key.mT / 8 ** 0.5
        heads.append(logits.masked_fill(~mask[:, None], -1e30).softmax(-1) @ v[..., span])
    assert_close(layer(x, mask=mask), layer.out(torch.cat(heads, -1)), 1e-6)


@torch.no_grad()
def test_dit_starts_by_predicting_no_noise_and_cad_ignores_its_previous_latents():
    x, gamma, text, mask, coherence = inputs()
    assert not model_dit.DiT(**TINY_DIT)(x, gamma, text, mask, coherence).any()
    cad = model_cad.CAD(**TINY_CAD)
    without = predict(cad, x, gamma, text, mask, coherence)
    assert torch.equal(without, predict(cad, x, gamma, text, mask, coherence, torch.randn(2, 5, 32)))
    # A layer scale of zero switches every branch of DiT off.
    dit = model_dit.DiT(**TINY_DIT, layer_scale=0.0)
    dit.out.weight.normal_()
    assert torch.equal(dit(x, gamma, text, mask, coherence), dit(x, gamma, text + 1, mask, coherence))


@pytest.mark.parametrize("network, sizes, low, high", [
    (model_dit.DiT, model_dit.PRESETS["L/2"], 425, 445), (model_dit.DiT, model_dit.PRESETS["S/2"], 30, 40),
    (model_cad.CAD, model_cad.PRESETS["L"], 331.4, 331.6), (model_cad.CAD, model_cad.PRESETS["B"], 100, 200)])
def test_the_presets_have_the_papers_sizes(network, sizes, low, high):
    with torch.device("meta"):
        model = network(**sizes)
    assert low < sum(parameter.numel() for parameter in model.parameters()) / 1e6 < high


def test_the_coin_decides_which_samples_of_cad_get_a_first_pass_and_the_gradient_sees_only_the_second():
    # At the start previous latents change nothing, and the prediction is 0.
    model = randomize(model_cad.CAD(**TINY_CAD))
    x, gamma, *conditions = inputs(batch=4)
    context = model.condition(*conditions)
    without, state = model.denoise(x, gamma, context)
    from_latents, _ = model.denoise(x, gamma, context, state.detach())
    assert not torch.allclose(without, from_latents)

    eps = model(x, gamma, *conditions, torch.tensor([0.0, 0.89, 0.9, 0.99]))
    assert_close(eps[:2], from_latents[:2])
    assert_close(eps[2:], without[2:])
    expected = torch.cat([from_latents[:2], without[2:]])
    weight = model.patch_embed.weight
    assert_close(*[torch.autograd.grad(out.square().sum(), weight, retain_graph=True)[0]
                   for out in (eps, expected)])
    # Without a coin, the rate decides.
    for rate, expected in [(0.0, without), (1.0, from_latents)]:
        model.self_conditioning = rate
        assert_close(model(x, gamma, *conditions), expected)


# ---- Memory, sizes, compilation

@BOTH
def test_activations_that_are_computed_again_are_not_kept(network, sizes):
    model = network(**{**sizes, "depth": 8})
    kept = {True: 0, False: 0}

    def keep(tensor):
        kept[model.checkpoint_activations] += tensor.numel()
        return tensor

    for model.checkpoint_activations in (True, False):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(*inputs(batch=8), torch.linspace(0, 1, 8))
    assert kept[True] < 0.5 * kept[False]


@BOTH
def test_a_model_of_any_size_predicts_latents_of_that_size_and_others_are_refused(network, sizes):
    for size in (2, 6, 16):
        batch = inputs(size=size)
        assert network(**{**sizes, "size": size})(*batch).shape == batch[0].shape
    for change, message in [({"size": 5}, "not a multiple of patch"), ({"heads": 5}, "a multiple of heads")]:
        with pytest.raises(ValueError, match=message):
            network(**{**sizes, **change})


@torch.no_grad()
def test_positions_of_cad_are_resized_like_a_picture():
    """A ramp over the grid stays a ramp: its values between the ends are known."""
    ramp = torch.arange(4).float().expand(4, 4)
    small = {"position": torch.stack([ramp.T, ramp], -1).reshape(16, 2)}
    resized = model_cad.resize_positions(small, size=16, patch=2)["position"].reshape(8, 8, 2)
    # The new places lie at -0.25, 0.25, 0.75, ... of the old ones. Inside, cubic interpolation of
    # a straight line is exact.
    expected = (torch.arange(8) / 2 - 0.25)[3:5]
    assert_close(resized[3:5, :, 0], expected[:, None].expand(2, 8), 1e-4)
    assert_close(resized[:, 3:5, 1], expected.expand(8, 2), 1e-4)
    assert model_cad.resize_positions(small, size=8, patch=2)["position"] is small["position"]


@BOTH
def test_training_and_denoising_are_each_one_graph_for_torch_compile(network, sizes):
    model = randomize(network(**{**sizes, "depth": 1}))
    model.checkpoint_activations = True
    batch = [*inputs(), torch.tensor([0.1, 0.95])]
    # `fullgraph` raises if Python would have to be returned to in between.
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(*batch), model(*batch))
    context = model.condition(*batch[2:5])
    denoise = torch.compile(model.denoise, fullgraph=True, backend="eager")
    assert_close(denoise(batch[0], batch[1], context)[0], model.denoise(batch[0], batch[1], context)[0])
