"""Any training config for any TPU topology: does it fit, and what does it cost? No TPU is needed.

    pip install -e '.[tpu]'
    python -m dalle_jax.main --config=configs/compile.py --config.target=configs/prior.py:paper \
        --config.topology=v5p:8x8x8 --config.overrides="mesh.data=8,batch_size=2048"
    python -m dalle_jax.main --config=configs/compile.py --config.target=configs/maskgit.py:paper --config.what=sample \
        --config.topology=v5e:2x4 --config.rows=64

Prints bytes, operations and exchanges of each chip, the step time of a roofline, and writes them to `compile.json`.
Ends with an error, which says what would help, where the program does not fit.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.job = "compile"
    config.workdir = "runs/compiled"

    config.target = "configs/prior.py:paper"  # a training's config and its variant
    config.topology = "v5p:4x4x8"  # TPUs: generation and chips along each axis; v5e:16x16, v6e:16x16
    config.overrides = ""  # of the target's keys: "mesh.data=4,batch_size=512"
    config.what = "train"  # its update; or "sample": a prior drawing pictures
    config.rows = 64  # pictures to draw at once
    config.effort = "full"  # as training compiles; "low": in a fifth of the time, to see whether it fits
    return config
