"""DiT-I and CAD-I: released numbers, closed forms, what masks, gates and states must (not) do."""

import json
import shutil

import pytest
import torch
from conftest import FIXTURES
from safetensors.torch import load_file

import model_cad
import model_dit
from common import UserError
from sample import ddim, load_model

CAD_TINY = FIXTURES / "cad_tiny"
TINY_DIT = dict(size=4, channels=3, patch=2, text_dim=10, depth=2, dim=32, heads=4)
TINY_CAD = dict(size=4, channels=3, patch=2, text_dim=10, num_latents=5, dim=32, data_dim=16,
                depth=2, layers=1, heads=4, read_write_heads=4)


def tiny(name, **changes):
    """Return a small model, "dit" or "cad", with some arguments changed."""
    if name == "dit":
        return model_dit.DiT(**{**TINY_DIT, **changes})
    return model_cad.CAD(**{**TINY_CAD, **changes})


def randomize(model):
    """Fill all parameters, so that nothing hides behind a zero of the initialisation."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1)
    return model


@pytest.fixture(params=["dit", "cad"])
def model(request):
    torch.manual_seed(0)
    return randomize(tiny(request.param)).eval()


def inputs(batch=2, length=6, size=4):
    """Return x, gamma, text, mask and coherence; the first caption is padded."""
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[0, 4:] = False
    x = torch.randn(batch, 3, size, size)
    gamma = torch.rand(batch)
    text = torch.randn(batch, length, 10)
    return x, gamma, text, mask, torch.ones(batch)


def predict(model, x, gamma, text, mask, coherence, state=None):
    """Return the noise that one denoising step predicts."""
    return model.denoise(x, gamma, model.condition(text, mask, coherence), state)[0]


def assert_close(a, b, tolerance=1e-5):
    error = (a - b).norm() / b.norm()
    assert error <= tolerance, f"{error.item():.1e}"


# --------------------------------------------------------------------------------------
# The released CAD-I

@pytest.mark.parametrize("name, coherence, with_state", [
    ("coherent", 1.0, False), ("incoherent_with_state", 0.0, True)])
@torch.no_grad()
def test_the_released_cad_gives_the_released_numbers(name, coherence, with_state):
    model = load_model(CAD_TINY)
    recorded = load_file(CAD_TINY / "io.safetensors")
    state = recorded["state"] if with_state else None
    context = model.condition(recorded["text"], recorded["mask"], torch.full((3,), coherence))
    eps, latents = model.denoise(recorded["x"], recorded["gamma"], context, state)
    assert_close(eps, recorded[f"eps_{name}"])
    assert_close(latents, recorded[f"latents_{name}"])


def test_ddim_with_guidance_and_carried_latents_gives_the_released_pictures():
    model = load_model(CAD_TINY)
    recorded = load_file(CAD_TINY / "io.safetensors")
    captions = recorded["text"], recorded["mask"]
    null = recorded["null_text"][None], torch.ones(1, 1, dtype=torch.bool)
    x_0 = ddim(model, recorded["x"], captions, null, steps=6, guidance=3.0, clamp=1.2)
    assert_close(x_0, recorded["ddim_6_steps_guidance_3_clamp_1_2"])


def test_released_config_keys_of_another_network_are_refused_by_name_and_harmless_ones_are_not(
        tmp_path):
    shutil.copytree(CAD_TINY, tmp_path / "cad")
    config = json.loads((CAD_TINY / "config.json").read_text())

    def load(**changes):
        (tmp_path / "cad/config.json").write_text(json.dumps({**config, **changes}))
        return load_model(tmp_path / "cad")

    load(num_cond_tokens=5, weight_init="orthogonal", _name="x", license="mit", unheard_of=0)
    another_network = {"modulate_conditioning": True, "use_cond_rin_block": False,
                       "time_scaling": 500.0, "noise_embedding_type": "fourier",
                       "an_unheard_of_key": 3}
    for key, value in another_network.items():
        with pytest.raises(UserError, match=key):
            load(**{key: value})
    with pytest.raises(UserError, match="does not fit"):
        load(latents_dim=32)


def test_the_presets_have_the_papers_sizes():
    with torch.device("meta"):
        models = {"dit": model_dit.DiT(**model_dit.PRESETS["L/2"]),
                  "dit-s": model_dit.DiT(**model_dit.PRESETS["S/2"]),
                  "cad": model_cad.CAD(**model_cad.PRESETS["L"]),
                  "cad-b": model_cad.CAD(**model_cad.PRESETS["B"])}
    millions = {}
    for name, model in models.items():
        millions[name] = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions["cad"] == pytest.approx(331.5, abs=0.1)
    assert 425 < millions["dit"] < 445
    assert millions["dit-s"] < 40
    assert millions["cad-b"] < 200


# --------------------------------------------------------------------------------------
# Inputs

@torch.no_grad()
def test_masked_tokens_change_nothing_and_real_ones_do(model):
    x, gamma, text, mask, coherence = inputs()
    before = predict(model, x, gamma, text, mask, coherence)
    other = torch.where(mask[..., None], text, torch.randn_like(text))
    assert torch.equal(before, predict(model, x, gamma, other, mask, coherence))
    short = predict(model, x[:1], gamma[:1], text[:1, :4], mask[:1, :4], coherence[:1])
    assert_close(short, before[:1])
    text[0, 0] += 1
    after = predict(model, x, gamma, text, mask, coherence)
    assert not torch.allclose(before[0], after[0])


@torch.no_grad()
def test_coherence_is_an_input_of_cad_alone(model):
    x, gamma, text, mask, coherence = inputs()
    a = predict(model, x, gamma, text, mask, coherence)
    b = predict(model, x, gamma, text, mask, 0 * coherence)
    assert torch.equal(a, b) == isinstance(model, model_dit.DiT)


def test_the_patches_of_dit_come_back_to_their_places():
    """With identities at both ends and no blocks, every latent returns to where it was."""
    model = tiny("dit", depth=0, dim=12, heads=2)
    model.patch_embed.weight.data = torch.eye(12)
    model.out.weight.data = torch.eye(12)
    model.position.zero_()
    model.final_norm = torch.nn.Identity()
    model.time_embed[2].weight.data.zero_()
    x, *others = inputs()
    assert_close(predict(model, x, *others), x)


def test_the_patches_of_cad_come_back_to_their_places():
    """As above; the convolution's inputs come as (C, p1, p2), the output's as (p1, p2, C)."""
    model = tiny("cad", depth=0, data_dim=12)
    order = torch.arange(12).reshape(3, 2, 2).permute(1, 2, 0).flatten()
    model.patch_embed.weight.data = torch.eye(12)[order].reshape(12, 3, 2, 2)
    model.data_norm = torch.nn.Identity()
    model.position.data.zero_()
    model.out[0] = torch.nn.Identity()
    model.out[1].weight.data = torch.eye(12)
    x, *others = inputs()
    assert_close(predict(model, x, *others), x)


# --------------------------------------------------------------------------------------
# Layers and initialisation

def test_dit_attention_is_softmax_of_normalised_queries_and_keys():
    torch.manual_seed(0)
    layer = model_dit.Attention(16, 2).double()
    layer.q_norm.weight.data.uniform_(0.5, 2)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
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
        weights = logits.masked_fill(~mask[:, None], -1e30).softmax(-1)
        heads.append(weights @ v[..., span])
    assert_close(layer(x, mask=mask), layer.out(torch.cat(heads, -1)), 1e-6)


@torch.no_grad()
def test_layer_scale_zero_switches_every_branch_of_dit_off():
    model = tiny("dit", layer_scale=0.0)
    model.out.weight.data.normal_()
    x, gamma, text, mask, coherence = inputs()
    a = model(x, gamma, text, mask, coherence)
    b = model(x, gamma, text + 1, mask, coherence)
    assert torch.equal(a, b)


def test_dit_starts_by_predicting_no_noise_and_cad_ignores_its_previous_latents():
    x, *others = inputs()
    assert not tiny("dit")(x, *others).any()
    cad = tiny("cad")
    without = predict(cad, x, *others)
    assert torch.equal(without, predict(cad, x, *others, state=torch.randn(2, 5, 32)))


# --------------------------------------------------------------------------------------
# CAD's self-conditioning

def test_self_conditioning_is_two_passes_and_the_gradient_sees_the_second():
    torch.manual_seed(0)
    # At the start previous latents change nothing, and the prediction is 0.
    model = randomize(tiny("cad"))
    x, gamma, text, mask, coherence = inputs()
    context = model.condition(text, mask, coherence)
    for rate in (0.0, 1.0):
        model.self_conditioning = rate
        with torch.no_grad():
            state = model.denoise(x, gamma, context)[1] * rate
        model.zero_grad()
        expected = model.denoise(x, gamma, context, state)[0]
        expected.square().sum().backward(retain_graph=True)
        gradient = model.patch_embed.weight.grad.clone()
        model.zero_grad()
        eps = model(x, gamma, text, mask, coherence)
        eps.square().sum().backward()
        assert_close(eps, expected)
        assert_close(model.patch_embed.weight.grad, gradient)


@torch.no_grad()
def test_the_coin_decides_for_each_sample_whether_it_starts_from_latents():
    torch.manual_seed(0)
    model = randomize(tiny("cad", self_conditioning=0.9))
    x, gamma, text, mask, coherence = inputs(batch=4)
    context = model.condition(text, mask, coherence)
    without, state = model.denoise(x, gamma, context)
    from_latents, _ = model.denoise(x, gamma, context, state)
    coin = torch.tensor([0.0, 0.89, 0.9, 0.99])
    eps = model(x, gamma, text, mask, coherence, coin)
    assert_close(eps[:2], from_latents[:2])
    assert_close(eps[2:], without[2:])
    assert not torch.allclose(without, from_latents)


@torch.no_grad()
def test_with_given_coins_a_prediction_depends_on_its_own_sample_alone(model):
    batch = [*inputs(batch=4), torch.tensor([0.5, 0.95, 0.1, 0.99])]
    whole = model(*batch)
    for i in range(4):
        alone = model(*[tensor[i:i + 1] for tensor in batch])
        assert_close(alone, whole[i:i + 1])


def test_without_coins_a_tenth_of_the_samples_start_without_latents(monkeypatch):
    torch.manual_seed(0)
    model = tiny("cad")
    states = []
    denoise = model.denoise

    def recording(x, gamma, context, state=None):
        states.append(state)
        return denoise(x, gamma, context, state)

    monkeypatch.setattr(model, "denoise", recording)
    model(*inputs(batch=2000, length=5))
    first, second = states
    assert first is None
    without = (second == 0).all((1, 2)).float().mean().item()
    # Four standard errors.
    assert without == pytest.approx(0.1, abs=0.03)


# --------------------------------------------------------------------------------------
# Memory, sizes, compilation

def test_recomputed_activations_give_the_same_loss_and_gradients(model):
    batch = [*inputs(), torch.tensor([0.1, 0.95])]
    results = []
    for recompute in (False, True):
        model.checkpoint_activations = recompute
        model.zero_grad()
        loss = model(*batch).square().sum()
        loss.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        results.append([loss.detach(), *gradients])
    for plain, recomputed in zip(*results):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("name", ["dit", "cad"])
def test_recomputed_activations_are_not_kept_for_the_backward_pass(name):
    def kept(depth, recompute):
        model = tiny(name, depth=depth)
        model.checkpoint_activations = recompute
        sizes = []

        def keep(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(*inputs(batch=8))
        return sum(sizes)

    of_two_blocks = kept(4, False) - kept(2, False)
    assert kept(4, True) - kept(2, True) < 0.3 * of_two_blocks


@pytest.mark.parametrize("name", ["dit", "cad"])
@pytest.mark.parametrize("size", [2, 6, 16])
@torch.no_grad()
def test_a_model_of_any_size_predicts_latents_of_that_size(name, size):
    model = tiny(name, size=size)
    x, *others = inputs(size=size)
    assert model(x, *others).shape == (2, 3, size, size)


def test_sizes_that_do_not_go_together_are_refused():
    for name in ("dit", "cad"):
        with pytest.raises(ValueError, match="size 5 is not a multiple of patch 2"):
            tiny(name, size=5)
        with pytest.raises(ValueError, match="dim 32 must be a multiple of heads 5"):
            tiny(name, heads=5)
    with pytest.raises(ValueError, match="read_write_heads 3"):
        tiny("cad", read_write_heads=3)


def test_positions_of_cad_are_resized_like_a_picture():
    """A ramp over the grid stays a ramp: its values between the ends are known."""
    small = tiny("cad", size=8).state_dict()
    n = 4
    ramp = torch.arange(n).float()
    small["position"] = torch.stack([ramp[:, None].expand(n, n), ramp.expand(n, n)], -1)
    small["position"] = small["position"].repeat(1, 1, 8).reshape(16, 16)
    resized = model_cad.resize_positions(small, size=16, patch=2)
    tiny("cad", size=16).load_state_dict(resized)
    grid = resized["position"].reshape(8, 8, 16)
    # The new places lie at -0.25, 0.25, 0.75, ... of the old ones. Inside, cubic
    # interpolation of a straight line is exact.
    expected = torch.arange(8) / 2 - 0.25
    for i in range(3, 5):
        assert_close(grid[i, :, 0], expected[i].expand(8), 1e-4)
        assert_close(grid[:, i, 1], expected[i].expand(8), 1e-4)
    # Everything else is as it was, and so are the positions of the same size.
    assert resized["latents"] is small["latents"]
    same = model_cad.resize_positions(small, size=8, patch=2)
    assert same["position"] is small["position"]
    with pytest.raises(ValueError, match="size 15 is not a multiple of patch 2"):
        model_cad.resize_positions(small, size=15, patch=2)


@torch.no_grad()
def test_the_released_cad_goes_on_at_twice_the_size():
    small = load_model(CAD_TINY)
    weights = model_cad.resize_positions(small.state_dict(), 2 * small.size, small.patch)
    large = model_cad.CAD(**{**small.config, "size": 2 * small.size})
    large.load_state_dict(weights)
    recorded = load_file(CAD_TINY / "io.safetensors")
    x = torch.nn.functional.interpolate(recorded["x"], scale_factor=2)
    eps = predict(large, x, recorded["gamma"], recorded["text"], recorded["mask"], torch.ones(3))
    assert eps.shape == x.shape
    assert eps.isfinite().all()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["dit", "cad"])
def test_training_and_denoising_are_each_one_graph_for_torch_compile(name, recompute):
    torch.manual_seed(0)
    model = randomize(tiny(name, depth=1))
    model.checkpoint_activations = recompute
    batch = [*inputs(), torch.tensor([0.1, 0.95])]
    # `fullgraph` raises if Python would have to be returned to in between.
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(*batch), model(*batch))
    context = model.condition(*batch[2:5])
    denoise = torch.compile(model.denoise, fullgraph=True, backend="eager")
    eps, _ = denoise(batch[0], batch[1], context)
    assert_close(eps, model.denoise(batch[0], batch[1], context)[0])
