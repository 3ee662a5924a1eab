"""The losses of the VQGAN, and the gradients of both players, equal those of the authors' code.

The originals are in taming transformers, see `taming_originals.py`. Their module of losses imports torchvision.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import taming_originals
from torchvision_on_cpu import import_torchvision

from dalle_jax.image_tokenizers import adversarial
from dalle_jax.image_tokenizers.discriminator import Discriminator, DiscriminatorOptions
from dalle_jax.image_tokenizers.relaxation import kl_to_uniform
from dalle_jax.image_tokenizers.signed_pixels import to_signed
from dalle_jax.image_tokenizers.vqgan import VQGANOptions, VQGANTokenizer
from dalle_jax.optim.schedules import Constant
from dalle_jax.pretrained import vqgan
from dalle_jax.tasks.vqgan import VQGANTask
from dalle_jax.tasks.vqgan_losses import VQGANObjectiveOptions

pytestmark = pytest.mark.skipif(not taming_originals.AVAILABLE, reason=taming_originals.REASON)
OPTIONS = {**taming_originals.CASES["nearest"][0], "image_size": 32}


@pytest.fixture(scope="module")
def originals():
    """The authors' module of losses."""
    import_torchvision()
    from taming.modules.losses import vqperceptual

    return vqperceptual


def last(tensor):
    """Moves channels to the end."""
    return tensor.detach().permute(0, 2, 3, 1).numpy()


def first(array):
    import torch

    return torch.tensor(np.asarray(array)).permute(0, 3, 1, 2)


def discriminator_params(arrays, layers):
    """Converts arrays by the authors' names to parameters of `Discriminator` with batch normalisation."""
    params, place = {}, 0
    for layer in range(layers + 1):
        params[f"conv_{layer}"] = {"kernel": arrays[f"main.{place}.weight"].transpose(2, 3, 1, 0)}
        if layer:
            norm = {"scale": arrays[f"main.{place + 1}.weight"], "bias": arrays[f"main.{place + 1}.bias"]}
            params[f"norm_{layer}"] = norm
        else:
            params["conv_0"]["bias"] = arrays["main.0.bias"]
        place += 3 if layer else 2
    kernel = arrays[f"main.{place}.weight"].transpose(2, 3, 1, 0)
    return params | {"output": {"kernel": kernel, "bias": arrays[f"main.{place}.bias"]}}


def numpy_of(module, gradients=False):
    values = {name: p.grad if gradients else p for name, p in module.named_parameters()}
    return {name: value.detach().numpy() for name, value in values.items()}


@pytest.mark.parametrize(("layers", "filters", "side"), [(2, 8, 24), (3, 4, 40)])
def test_the_discriminator_and_its_gradients(layers, filters, side):
    import torch
    from taming.modules.discriminator.model import NLayerDiscriminator, weights_init

    torch.manual_seed(0)
    module = NLayerDiscriminator(ndf=filters, n_layers=layers).apply(weights_init).train()
    ours = Discriminator(DiscriminatorOptions(layers=layers, filters=filters))
    params = discriminator_params(numpy_of(module), layers)
    pixels = np.random.RandomState(0).uniform(-1, 1, (3, side, side, 3)).astype(np.float32)
    shapes = jax.eval_shape(ours.init, jax.random.key(0), pixels)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, jax.tree.map(lambda x: x.value, shapes,
                                                           is_leaf=lambda x: hasattr(x, "value")))  # fmt: skip

    def squares(params, x):
        logits = ours.apply({"params": params}, x)
        return jnp.sum(logits**2), logits

    given = first(pixels).requires_grad_()
    logits = module(given)
    (logits**2).sum().backward()
    grads, found = jax.jit(jax.grad(squares, (0, 1), has_aux=True))(params, pixels)
    np.testing.assert_allclose(found, last(logits)[..., 0], atol=1e-4)
    np.testing.assert_allclose(grads[1], last(given.grad), atol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        grads[0],
        discriminator_params(numpy_of(module, gradients=True), layers),
    )


def test_losses_of_logits(originals):
    import torch

    real, fake = np.random.RandomState(0).standard_normal((2, 3, 5, 5)).astype(np.float32) * 2
    for kind, theirs in (("hinge", originals.hinge_d_loss), ("vanilla", originals.vanilla_d_loss)):
        expected = theirs(torch.tensor(real), torch.tensor(fake)).item()
        assert adversarial.discriminator_loss(kind, real, fake) == pytest.approx(expected, abs=1e-4), kind
        assert adversarial.generator_loss(kind, fake) == pytest.approx(-fake.mean(), abs=1e-4)
    both = adversarial.discriminator_loss("non_saturating", real, fake)
    assert both == pytest.approx(2 * float(adversarial.discriminator_loss("vanilla", real, fake)), abs=1e-4)


class Originals:
    """The authors' network and losses with random weights, and a batch. The perceptual loss is off."""

    def __init__(self, originals, disc_loss="hinge"):
        import torch
        from torch import nn

        self.module = taming_originals.original(OPTIONS)
        shapes = taming_originals.shapes_of(self.module)
        self.arrays = taming_originals.random_arrays(shapes)
        self.module.load_state_dict({name: torch.tensor(array) for name, array in self.arrays.items()})
        torch.manual_seed(1)
        loss = originals.VQLPIPSWithDiscriminator.__new__(originals.VQLPIPSWithDiscriminator)
        nn.Module.__init__(loss)  # its own would download VGG-16
        loss.perceptual_weight, loss.codebook_weight, loss.disc_factor = 0.0, 1.0, 1.0
        loss.discriminator_weight, loss.discriminator_iter_start, loss.disc_conditional = 0.8, 5, False
        loss.disc_loss = getattr(originals, f"{disc_loss}_d_loss")
        loss.discriminator = originals.NLayerDiscriminator(ndf=8, n_layers=2).apply(originals.weights_init)
        for parameter in loss.discriminator.parameters():  # larger logits, as in the middle of a training
            parameter.data *= 4
        self.loss, self.images = loss, taming_originals.images_of(32, 32)

    def update(self, step):
        """Returns scalars of both players, and the gradients of each for its parameters."""
        module, loss = self.module, self.loss
        loss.discriminator.train()
        pixels = first(self.images) / 127.5 - 1
        vectors, codebook_loss, _ = module.quantize(module.quant_conv(module.encoder(pixels)))
        reconstruction = module.decoder(module.post_quant_conv(vectors))
        weight = module.decoder.conv_out.weight
        total, log = loss(codebook_loss, pixels, reconstruction, 0, step, last_layer=weight)
        module.zero_grad(), total.backward()
        generator = numpy_of(module, gradients=True)
        total, other = loss(codebook_loss, pixels, reconstruction, 1, step, last_layer=weight)
        loss.discriminator.zero_grad(), total.backward()
        scalars = {name.partition("/")[2]: float(value) for name, value in {**log, **other}.items()}
        return scalars, generator, numpy_of(loss.discriminator, gradients=True)


@pytest.mark.parametrize(("disc_loss", "step"), [("hinge", 4), ("hinge", 5), ("vanilla", 5)])
def test_both_players_of_an_update(originals, disc_loss, step):
    """Equal losses, adaptive weight and gradients, before and after the discriminator starts."""
    theirs = Originals(originals, disc_loss)
    expected, generator, discriminator = theirs.update(step)
    options = VQGANOptions(**OPTIONS)
    on = Constant(float(step >= 5))
    objective = VQGANObjectiveOptions(
        perceptual_weight=0.0,
        adversarial=disc_loss,
        codebook=0.25,
        commitment=1.0,  # as their `legacy` has it
    )
    task = VQGANTask(
        VQGANTokenizer(options), objective, DiscriminatorOptions(layers=2, filters=8),
        {"adversarial_weight": lambda step: 0.8 * on(step), "discriminator_weight": on},
    )  # fmt: skip
    params = vqgan.convert(theirs.arrays, options)
    convert = lambda arrays: discriminator_params(arrays, 2)
    running = {"real": 0.0, "fake": 0.0, "uses": np.ones(40, np.float32), "errors": np.zeros(40, np.float32)}
    params |= {"discriminator": convert(numpy_of(theirs.loss.discriminator)), "running": running}
    update = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    (loss, found), grads = update(params, {}, {"image": theirs.images}, jax.random.key(0), 0)

    assert loss == pytest.approx(expected["total_loss"], abs=1e-4)
    assert found["pixel_loss"] == pytest.approx(expected["nll_loss"], abs=1e-4)
    quantisation = 0.25 * found["codebook_loss"] + found["commitment"]
    assert quantisation == pytest.approx(expected["quant_loss"], abs=1e-4)
    if step >= 5:
        assert 0.8 * found["adaptive_weight"] == pytest.approx(expected["d_weight"], rel=1e-3)
        assert found["generator_loss"] == pytest.approx(expected["g_loss"], abs=1e-4)
        assert found["discriminator_loss"] == pytest.approx(expected["disc_loss"], abs=1e-4)
        for name in ("logits_real", "logits_fake"):
            assert found[name] == pytest.approx(expected[name], abs=1e-4)
        assert abs(expected["logits_real"] - expected["logits_fake"]) > 1e-3 and expected["d_weight"] > 1e-3

    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, np.abs(b).max()))
    own = {name: grads[name] for name in grads if name not in ("discriminator", "running")}
    jax.tree.map(close, own, vqgan.convert(generator, options))
    jax.tree.map(close, grads["discriminator"], convert(discriminator))
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(grads["running"]))


def test_the_kl_of_gumbelvq():
    """Its weight is that of the mean over positions, in nats."""
    import torch
    from taming.modules.vqvae.quantize import GumbelQuantize

    torch.manual_seed(0)
    module = GumbelQuantize(6, 4, 20, kl_weight=0.5).train()
    features = np.random.RandomState(0).standard_normal((2, 3, 3, 6)).astype(np.float32) * 3
    _, expected, _ = module(first(features))
    logits = last(module.proj(first(features)))
    assert 0.5 * jnp.mean(kl_to_uniform(logits)) == pytest.approx(expected.item(), abs=1e-4)


def test_pixels_are_those_of_the_authors():
    images = taming_originals.images_of(4, 4)
    np.testing.assert_allclose(to_signed(images), images / 127.5 - 1, atol=1e-6)
