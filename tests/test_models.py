"""DiT-I and CAD-I: the released numbers, closed forms, and what a mask, a gate and a state must (not) do."""

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
TINY = {
    "dit": lambda **more: model_dit.DiT(**{**dict(
        size=4, channels=3, patch=2, text_dim=10, depth=2, dim=32, heads=4), **more}),
    "cad": lambda **more: model_cad.CAD(**{**dict(
        size=4, channels=3, patch=2, text_dim=10, num_latents=5, dim=32, data_dim=16, depth=2, layers=1,
        heads=4, read_write_heads=4), **more}),
}


@pytest.fixture(params=["dit", "cad"])
def model(request):
    torch.manual_seed(0)
    model = TINY[request.param]().eval()
    for parameter in model.parameters():                # nothing may hide behind a zero of the initialisation
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1)
    return model


def inputs(batch=2, length=6):
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[0, 4:] = False
    x, gamma, text = torch.randn(batch, 3, 4, 4), torch.rand(batch), torch.randn(batch, length, 10)
    return x, gamma, text, mask, torch.ones(batch)


def close(a, b, tolerance=1e-5):
    assert (a - b).norm() <= tolerance * b.norm(), f"{((a - b).norm() / b.norm()).item():.1e}"


@torch.no_grad()
def test_the_released_cad_gives_the_released_numbers():
    model, io = load_model(CAD_TINY), load_file(CAD_TINY / "io.safetensors")
    for name, coherence, state in (("coherent", 1.0, None), ("incoherent_with_state", 0.0, io["state"])):
        context = model.condition(io["text"], io["mask"], torch.full((3,), coherence))
        eps, latents = model.denoise(io["x"], io["gamma"], context, state)
        close(eps, io[f"eps_{name}"])
        close(latents, io[f"latents_{name}"])


def test_ddim_with_guidance_and_carried_latents_gives_the_released_pictures():
    model, io = load_model(CAD_TINY), load_file(CAD_TINY / "io.safetensors")
    null = io["null_text"][None], torch.ones(1, 1, dtype=torch.bool)
    close(ddim(model, io["x"], (io["text"], io["mask"]), null, steps=6, guidance=3.0, clamp=1.2),
          io["ddim_6_steps_guidance_3_clamp_1_2"])


def test_released_config_keys_that_mean_another_network_are_refused_by_name_and_harmless_ones_are_not(
        tmp_path):
    shutil.copytree(CAD_TINY, tmp_path / "cad")
    config = json.loads((CAD_TINY / "config.json").read_text())

    def load(**changed):
        (tmp_path / "cad/config.json").write_text(json.dumps({**config, **changed}))
        return load_model(tmp_path / "cad")
    load(num_cond_tokens=5, weight_init="orthogonal", _name="x", license="mit")
    for key, value in {"modulate_conditioning": True, "use_cond_rin_block": False, "time_scaling": 500.0,
                       "noise_embedding_type": "fourier", "an_unheard_of_key": 3}.items():
        with pytest.raises(UserError, match=key):
            load(**{key: value})
    with pytest.raises(UserError, match="does not fit"):
        load(latents_dim=32)


def test_the_presets_have_the_papers_sizes():
    with torch.device("meta"):
        models = {"dit": model_dit.DiT(**model_dit.PRESETS["L/2"]),
                  "cad": model_cad.CAD(**model_cad.PRESETS["L"]),
                  "dit-s": model_dit.DiT(**model_dit.PRESETS["S/2"]),
                  "cad-b": model_cad.CAD(**model_cad.PRESETS["B"])}
    count = {name: sum(p.numel() for p in model.parameters()) / 1e6 for name, model in models.items()}
    assert count["cad"] == pytest.approx(331.5, abs=0.1)
    assert 425 < count["dit"] < 445
    assert count["dit-s"] < 40 and count["cad-b"] < 200


@torch.no_grad()
def test_masked_tokens_change_nothing_and_real_ones_do(model):
    x, gamma, text, mask, coherence = inputs()
    before = model.denoise(x, gamma, model.condition(text, mask, coherence))[0]
    other = torch.where(mask[..., None], text, torch.randn_like(text))
    assert torch.equal(before, model.denoise(x, gamma, model.condition(other, mask, coherence))[0])
    short = model.denoise(x[:1], gamma[:1], model.condition(text[:1, :4], mask[:1, :4], coherence[:1]))[0]
    close(short, before[:1])
    text[0, 0] += 1
    after = model.denoise(x, gamma, model.condition(text, mask, coherence))[0]
    assert not torch.allclose(before[0], after[0])


@torch.no_grad()
def test_coherence_is_an_input_of_cad_alone(model):
    x, gamma, text, mask, coherence = inputs()
    a, b = (model.denoise(x, gamma, model.condition(text, mask, c))[0] for c in (coherence, 0 * coherence))
    assert torch.equal(a, b) == isinstance(model, model_dit.DiT)


@pytest.mark.parametrize("name", ["dit", "cad"])
def test_the_pieces_of_a_patch_come_back_to_their_places(name):
    """With the network cut out (depth 0) and identities at both ends, every pixel returns to where it was."""
    width = 12                                                          # 3 channels x 2 x 2 pixels
    model = TINY[name](depth=0, **({"dim": width, "heads": 2} if name == "dit" else {"data_dim": width}))
    identity = torch.eye(width)
    if name == "dit":
        model.patch_embed.weight.data, model.out.weight.data = identity, identity
        model.position.zero_()
        model.final_norm = torch.nn.Identity()
        model.time_embed[2].weight.data.zero_()
    else:       # the convolution's inputs come as (C, p1, p2), the output's features as (p1, p2, C)
        order = torch.arange(12).reshape(3, 2, 2).permute(1, 2, 0).flatten()
        model.patch_embed.weight.data = identity[order].reshape(12, 3, 2, 2)
        model.data_norm, model.out[0] = torch.nn.Identity(), torch.nn.Identity()
        model.out[1].weight.data = identity
        model.position.data.zero_()
    x, gamma, text, mask, coherence = inputs()
    close(model.denoise(x, gamma, model.condition(text, mask, coherence))[0], x)


def test_dit_attention_is_softmax_of_normalised_queries_and_keys():
    torch.manual_seed(0)
    layer, x = model_dit.Attention(16, 2).double(), torch.randn(2, 5, 16, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    layer.q_norm.weight.data.uniform_(0.5, 2)
    q, (k, v) = layer.q(x), layer.kv(x).chunk(2, -1)
    heads = []
    for h in range(2):
        span = slice(8 * h, 8 * h + 8)
        qh, kh = (z[..., span] / (z[..., span].square().mean(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
        logits = (qh * layer.q_norm.weight) @ (kh * layer.k_norm.weight).mT / 8 ** 0.5
        heads.append(logits.masked_fill(~mask[:, None], -1e30).softmax(-1) @ v[..., span])
    close(layer(x, mask=mask), layer.out(torch.cat(heads, -1)), 1e-6)


@torch.no_grad()
def test_layer_scale_zero_switches_every_branch_of_dit_off():
    model = TINY["dit"](layer_scale=0.0)
    model.out.weight.data.normal_()
    x, gamma, text, mask, coherence = inputs()
    a, b = (model(x, gamma, z, mask, coherence) for z in (text, text + 1))
    assert torch.equal(a, b)


def test_dit_starts_by_predicting_no_noise_and_cad_ignores_its_previous_latents():
    x, gamma, text, mask, coherence = inputs()
    assert not TINY["dit"]()(x, gamma, text, mask, coherence).any()
    cad = TINY["cad"]()
    context = cad.condition(text, mask, coherence)
    a, b = (cad.denoise(x, gamma, context, state)[0] for state in (None, torch.randn(2, 5, 32)))
    assert torch.equal(a, b)


def test_self_conditioning_is_two_passes_and_the_gradient_sees_the_second():
    torch.manual_seed(0)
    model = TINY["cad"]()
    model.previous_norm.weight.data.uniform_(0.5, 1)        # at the start it is 0
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
        close(eps, expected)
        close(model.patch_embed.weight.grad, gradient)


def test_a_tenth_of_the_samples_start_without_latents():
    model = TINY["cad"]()
    seen = []
    denoise = model.denoise

    def spy(x, gamma, context, state=None):
        seen.append(state)
        return denoise(x, gamma, context, state)
    model.denoise = spy
    x, gamma, text, mask, coherence = inputs(batch=2000, length=2)
    model(x, gamma, text, torch.ones_like(mask), coherence)
    assert seen[0] is None
    without = (seen[1] == 0).all((1, 2)).float().mean().item()
    assert without == pytest.approx(0.1, abs=0.03)          # four standard errors
