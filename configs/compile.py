"""Memory and step time of any training config on any TPU topology, from the TPU compiler. Needs no TPU.

    pip install -e '.[tpu]'
    python -m dalle_jax.main --config=configs/compile.py --config.target=configs/prior.py:paper \
        --config.topology=v5p:8x8x8 --config.overrides="mesh.data=8,batch_size=2048"
    python -m dalle_jax.main --config=configs/compile.py --config.target=configs/maskgit.py:paper --config.what=sample \
        --config.topology=v5e:2x4 --config.rows=64

Prints memory, operations and exchanges of each chip, and the step time by a roofline. Writes them to `compile.json`.
A program that does not fit ends with an error that lists remedies.
"""

from ml_collections import ConfigDict

from dalle_jax.aot.target import CompileOptions
from dalle_jax.configuration.sections import section

KEYS = {
    "workdir": "directory of compile.json",
    "target": "training config with its variant",
    "topology": "TPU generation and chips along each axis: v5p:4x4x8, v5e:16x16, v6e:16x16",
    "overrides": 'keys of the target: "mesh.data=4,batch_size=512"',
    "what": '"train": the update; "sample": a prior that draws images',
    "rows": "images to draw at once",
    "effort": '"full": as training compiles; "low": in a fifth of the time, to see whether it fits',
}


def get_config() -> ConfigDict:
    config = section(CompileOptions, target="configs/prior.py:paper", topology="v5p:4x4x8")
    config.job = "compile"
    config.workdir = "runs/compiled"
    return config
