"""Compares the seconds per image of MaskGIT and the autoregressive prior, for 16x16 and 32x32 tokens.

Both have random weights, float32, width 512, depth 8, 64 text tokens and 8,192 image tokens. MaskGIT runs 8 steps. The
process times them in alternation. `ratio` is the median of autoregressive / MaskGIT over the rounds.
"""

import statistics
import sys

import _measure as m  # first: it limits the threads
import _prior
import jax
import jax.numpy as jnp
import numpy as np

STEPS = 8


def run(side: int, rows: int, default_runs: int, runs: int, smoke: bool) -> dict:
    lines, seconds = {}, {}
    for kind in ("autoregressive", "maskgit"):
        prior = _prior.build(smoke=smoke, kind=kind, side=side)
        params, text = _prior.random_params(prior), jnp.asarray(_prior.random_text(prior, rows))
        knobs = {"steps": STEPS} if kind == "maskgit" else {}
        sample = jax.jit(lambda params, text, keys, prior=prior, knobs=knobs: prior.sample(params, text, keys, **knobs))
        keys = jax.random.split(jax.random.key(0), rows)
        program, compile_s = m.compiled(sample, params, text, keys)
        lines[kind] = (
            (lambda program=program, params=params, text=text, keys=keys: program(params, text, keys)),
            compile_s,
        )
        assert np.asarray(lines[kind][0]()).shape == (rows, prior.layout.image_length)
        seconds[kind] = []
    for _ in range(runs or default_runs):
        for kind, (draw, _) in lines.items():
            line = m.measure(draw, 1, warmup=0)
            seconds[kind].append(line["median_ms"] / 1e3 / rows)
    ratios = [a / b for a, b in zip(seconds["autoregressive"], seconds["maskgit"])]
    return line | {
        "seconds_per_image": {kind: round(statistics.median(times), 4) for kind, times in seconds.items()},
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "steps": {"autoregressive": prior.layout.image_length, "maskgit": STEPS},
        "compile_s": {kind: round(compile_s, 2) for kind, (_, compile_s) in lines.items()},
        "shape": _prior.shape(prior, rows),
    }


CASES = {
    f"{side}x{side}_b{rows}": lambda runs, smoke, side=side, rows=rows: run(
        side, rows, 3 if side == 16 else 2, runs, smoke
    )
    for side in (16, 32)
    for rows in (1, 16)
}

if __name__ == "__main__":
    sys.exit(m.main(__file__, CASES))
