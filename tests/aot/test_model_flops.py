"""Operations counted from sizes agree with those of compiled programs."""

import jax
import pytest

from dalle_jax import keys
from dalle_jax.aot import model_flops
from dalle_jax.aot.program import Program
from dalle_jax.aot.target import load_target
from dalle_jax.tasks.registry import abstract
from dalle_jax.tasks.task import zeros_like

SMALL = "model.trunk.depth=3,model.trunk.scan=False,model.trunk.remat=none,batch_size=4"
TINY_VQGAN = "model.hidden=16,model.vocab_size=64"
SIZES = "steps=10,text.vocab_size=300,text.length=16"  # those that follow the data set


def program_of(config):
    """Returns a task, its batch, and its loss with gradients, lowered for one CPU device."""
    task, batch = abstract(config)
    params = zeros_like(task.init, jax.random.key(0))

    def update(params, frozen, batch):
        return jax.value_and_grad(task.loss, has_aux=True)(
            params, frozen, batch, keys.stream(jax.random.key(0), "x"), 0
        )

    shapes = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    lowered = jax.jit(update).lower(shapes(params), shapes(task.frozen), batch)
    return task, batch, lowered


def counted(lowered):
    return Program(lowered.compiler_ir("hlo").as_hlo_module().to_string()).flops


@pytest.mark.parametrize(
    # Bounds relative to the program, which leaves out the padded borders of convolutions.
    "target, overrides, less, more",
    [
        ("configs/maskgit.py", SMALL, 0.01, 0.0),  # its attention computes no masked pairs
        (
            "configs/maskgit.py:folder",
            f"{SMALL},data.image_size=32,steps=10,text.vocab_size=300,text.length=16",
            0.0,
            0.3,
        ),
        ("configs/prior.py", SMALL, 0.15, 0.0),  # its groups of queries also compute masked pairs
        ("configs/prior.py", f"{SMALL},model.start_tokens=True", 0.15, 0.0),
        ("configs/prior.py", f"{SMALL},model.encoder_depth=2,model.attention=full", 0.15, 0.0),
        ("configs/maskgit.py", f"{SMALL},model.encoder_depth=2,model.trunk.activation=geglu", 0.01, 0.0),
        ("configs/beit.py", "batch_size=8,model.trunk.depth=1", 0.05, 0.05),
        ("configs/beit.py", "batch_size=8,model.trunk.depth=1,model.target=pixels", 0.05, 0.05),
        ("configs/clip.py", "batch_size=8", 0.05, 0.0),  # its text tower also computes masked pairs
        ("configs/clip.py", "batch_size=8,negatives.spoiled=0,model.image_readout=class_token", 0.05, 0.0),
        ("configs/dvae.py", "batch_size=8", 0.1, 0.1),  # every eighth row is decoded again for the log
        ("configs/dvae.py:folder", "batch_size=8,data.image_size=64,model.hidden=16,steps=10", 0.1, 0.1),
        ("configs/dvae.py:small", "batch_size=8,data.source=folder,data.path=.,steps=10", 0.0, 0.25),
        ("configs/vqgan.py", f"batch_size=2,{TINY_VQGAN}", 0.05, 0.2),
        (
            "configs/vqgan.py",
            f"batch_size=2,{TINY_VQGAN},objective.perceptual_weight=1",
            0.05,
            0.25,
        ),  # the program leaves out LPIPS's padded borders
    ],
)
def test_against_the_program(target, overrides, less, more):
    config = load_target(target, overrides)
    task, batch, lowered = program_of(config)
    expected, found = model_flops.training(task, batch), counted(lowered)
    assert (1 - less) * 0.999 <= expected / found <= (1 + more) * 1.001


def test_scan_and_remat_change_the_program_not_the_model():
    plain, again = (
        load_target("configs/maskgit.py", f"model.trunk.depth=4,batch_size=4,model.trunk.{how}")
        for how in ("scan=False", "scan=True,model.trunk.remat=full")
    )
    task, batch, lowered = program_of(plain)
    unrolled = counted(lowered)
    other, _, lowered = program_of(again)
    assert model_flops.training(task, batch) == model_flops.training(other, batch)
    compiled = lowered.compile()  # trip counts are known after optimisation
    assert 1.2 < Program(compiled.as_text()).flops / unrolled < 1.4  # the forward pass runs twice
    assert compiled.cost_analysis()["flops"] < 0.7 * unrolled  # XLA counts the body once
