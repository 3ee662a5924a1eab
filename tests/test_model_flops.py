"""Operations counted from sizes, against those of compiled programs."""

import jax
import jax.numpy as jnp
import pytest

from dalle_jax import keys, model_flops, parallel, tasks
from dalle_jax.compile import load_target
from dalle_jax.program import Program

SMALL = "model.trunk.depth=3,model.trunk.scan=False,model.trunk.remat=none,batch_size=4"


def program_of(config, flags=None):
    """The loss and its gradients, unrolled, on one CPU device."""
    task, batch = tasks.abstract(config)
    params = tasks.zeros_like(task.init, jax.random.key(0))

    def update(params, frozen, batch):
        return jax.value_and_grad(task.loss, has_aux=True)(
            params, frozen, batch, keys.stream(jax.random.key(0), "x"), 0
        )

    shapes = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    lowered = jax.jit(update).lower(shapes(params), shapes(task.frozen), batch)
    return task, lowered


def counted(lowered):
    return Program(lowered.compiler_ir("hlo").as_hlo_module().to_string()).flops


@pytest.mark.parametrize(
    "target, overrides, slack",
    [
        ("configs/maskgit.py", SMALL, 0.01),  # its attention computes just what it needs
        ("configs/maskgit.py:folder", f"{SMALL},data.image_size=32", 0.01),
        ("configs/prior.py", SMALL, 0.15),  # its groups of queries compute masked pairs too
        ("configs/clip.py", "batch_size=8", 0.05),  # so does its text tower
        ("configs/dvae.py", "batch_size=8", 0.10),  # every eighth row is decoded once more, for the log
        ("configs/dvae.py:folder", "batch_size=8,data.image_size=32,model.hidden=16", 0.10),
    ],
)
def test_against_the_program(target, overrides, slack):
    config = load_target(target, overrides)
    task, lowered = program_of(config)
    wanted, found = model_flops.training(task, config.batch_size), counted(lowered)
    assert wanted <= found * 1.001
    assert wanted >= found * (1 - slack)


def test_scan_and_remat_change_the_program_not_the_model():
    plain, again = (
        load_target("configs/prior.py", f"model.trunk.depth=9,batch_size=4,model.trunk.{how}")
        for how in ("scan=False", "scan=True,model.trunk.remat=full")
    )
    task, lowered = program_of(plain)
    unrolled = counted(lowered)
    other, lowered = program_of(again)
    assert model_flops.training(task, 4) == model_flops.training(other, 4)
    text = lowered.compile().as_text()  # trip counts are known after optimisation
    assert 1.2 < Program(text).flops / unrolled < 1.4  # the forward pass twice
    assert lowered.compile().cost_analysis()["flops"] < unrolled  # XLA's own count: the body once
