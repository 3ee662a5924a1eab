"""Guidance: the arithmetic, its schedules over the steps, and what they do to the tokens that are drawn."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prior_cases import PRIORS, N, params_of, rows

from dalle_jax.errors import ConfigError
from dalle_jax.priors.guidance import NAMES, Guidance, guide
from dalle_jax.priors.sampling import SamplingOptions

STEPS = 4
# The schedule of each prior that is used by default, and its options for drawing in a few steps.
CASES = {"autoregressive": ("constant", {}), "diagonal": ("constant", {"steps": STEPS}), "maskgit": ("linear", {})}
every_case = pytest.mark.parametrize("name", CASES)


def draw(name, **options):
    """Draws two candidates of two captions, int32 [4, N]."""
    text, _ = rows(2)
    keys = jax.random.split(jax.random.key(0), 4)
    return np.asarray(PRIORS[name].sample(params_of(PRIORS[name]), text, keys, **CASES[name][1], **options))


def test_guidance():
    conditional, null = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    np.testing.assert_allclose(guide(conditional, null, 0.0), conditional, rtol=1e-6)
    np.testing.assert_allclose(guide(conditional, null, 2.0), 3 * conditional - 2 * null, rtol=1e-5)
    np.testing.assert_allclose(guide(null, null, 5.0), null, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "schedule, shares",  # at r = 1/4, 1/2 and 1: the first, middle and last of four steps
    [
        ("constant", (1, 1, 1)),
        ("linear", (1 / 4, 1 / 2, 1)),
        ("cosine", ((1 - math.sqrt(1 / 2)) / 2, 1 / 2, 1)),
        ("cosine2", ((1 - math.cos(math.pi / 16)) / 2, (1 - math.sqrt(1 / 2)) / 2, 1)),
        ("pow2", (1 / 16, 1 / 4, 1)),
        ("pow0.5", (1 / 2, math.sqrt(1 / 2), 1)),
    ],
)
def test_schedules_at_the_first_middle_and_last_step(schedule, shares):
    at = jax.jit(lambda guidance, step: guidance.at((step + 1) / STEPS))
    found = [at(Guidance(jnp.float32(3.0), schedule), step) for step in (0, 1, 3)]
    np.testing.assert_allclose(found, 3.0 * np.array(shares), rtol=1e-5)


@every_case
def test_each_prior_has_its_default(name):
    default, _ = CASES[name]
    usual = draw(name, guidance=3.0)
    np.testing.assert_array_equal(draw(name, guidance=3.0, guidance_schedule=default), usual)
    other = "linear" if default == "constant" else "constant"
    assert (draw(name, guidance=3.0, guidance_schedule=other) != usual).any()


# The most tokens that the last step draws: of 12 tokens in 4 steps, MaskGIT leaves ⌊12·cos(3π/8)⌋ = 4 of them.
LAST = {"autoregressive": 1, "diagonal": 3, "maskgit": 4}


@every_case
def test_a_schedule_without_early_guidance_changes_the_last_step_only(name):
    """r^1000 is 0 in float32 except at the last step, where it is 1."""
    unguided = draw(name, temperature=0.0)
    late, full = (
        draw(name, guidance=100.0, guidance_schedule=schedule, temperature=0.0) for schedule in ("pow1000", "constant")
    )
    early = N - LAST[name]
    assert (late == unguided).sum(-1).min() >= early and (late != unguided).any() and (late != full).any()
    if name == "autoregressive":
        np.testing.assert_array_equal(late[:, :early], unguided[:, :early])


@pytest.mark.parametrize("name", ["cosines", "power", "pow", "pow0", "powinf", "pownan", "constant2", "", "linear2"])
def test_wrong_names_are_rejected_with_the_list(name):
    with pytest.raises(ConfigError, match="guidance_schedule") as error:
        SamplingOptions(guidance=1.0, guidance_schedule=name)
    assert all(known in str(error.value) for known in NAMES)


def test_a_schedule_needs_guidance():
    with pytest.raises(ConfigError, match="sampling.guidance"):
        SamplingOptions(guidance_schedule="cosine")


@pytest.mark.parametrize("name", PRIORS)
def test_options_that_a_prior_does_not_have_are_rejected_by_every_way_of_drawing(name):
    """Every prior checks its options itself: `sample` and `watch` reject what `check_sampling` rejects."""
    prior = PRIORS[name]
    text, _ = rows(1)
    key = jax.random.split(jax.random.key(0), 1)
    assert set(prior.absent_options) <= {field.name for field in dataclasses.fields(SamplingOptions)}
    wrong = {"order": "upwards"} | dict.fromkeys(prior.absent_options, 1) | {"steps": N + 1}
    for option, value in wrong.items():
        given = {option: float(value) if option == "choice_temperature" else value}
        for draw in (prior.sample, lambda *args, **given: next(prior.watch(*args, **given))):
            with pytest.raises(ConfigError, match=option):
                draw({}, text, key, **given)
        with pytest.raises(ConfigError, match=option):
            prior.check_sampling(SamplingOptions(**given))
