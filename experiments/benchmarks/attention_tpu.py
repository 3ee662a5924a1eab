"""Compares splash attention with the structured XLA path for one layer on a TPU v5p, using the TPU compiler alone.

It needs no TPU, but `libtpu` (pip install -e '.[tpu]'). It compiles forward and backward pass of the layer, projections
included, at the size of the paper on one chip: 4 examples of 256 + 1,024 tokens, 62 heads of 64, bfloat16.

| field                                 | meaning                                                                 |
|---------------------------------------|-------------------------------------------------------------------------|
| flops, bytes_accessed, temporaries_mb | from the compiler, without the inside of splash kernels                 |
| compiler_ms                           | the compiler's lower bound from flops and bytes                         |
| kernels_ms                            | splash kernels, from the instructions that the compiler scheduled       |
| total_ms                              | compiler_ms + kernels_ms                                                |

A kernel spends a fixed number of cycles per grid step, more for a filled block, and more at both ends of a row of
blocks. Memory stalls are not included. The forward kernel splits the heads over the two cores of the chip. The backward
kernels run on one core.

The cases schedule_CHIP_BLOCK print the lines of `splash.SCHEDULES`.
"""

import glob
import os
import re
import sys
import tempfile

FOLDER = tempfile.TemporaryDirectory(prefix="llo_")  # deleted when the process ends
os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={FOLDER.name} --xla_jf_dump_llo_text=true"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # a cached program leaves no schedule
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import _measure as m  # noqa: E402  (first of all that imports jax: it limits the threads)
import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from dalle_jax.distributed.mesh import make_mesh  # noqa: E402
from dalle_jax.distributed.sharding import on_mesh, replicated  # noqa: E402
from dalle_jax.models.attention import splash  # noqa: E402
from dalle_jax.models.attention.patterns import Bidirectional, Column, Convolutional, Full, Row  # noqa: E402
from dalle_jax.models.self_attention import Attention  # noqa: E402
from dalle_jax.models.transformer_options import TransformerOptions  # noqa: E402
from dalle_jax.priors.condition import Text  # noqa: E402
from dalle_jax.token_layout import TokenLayout  # noqa: E402

PATTERNS = {
    "row": Row(), "column": Column(), "convolutional": Convolutional(11), "full": Full(),
    "bidirectional": Bidirectional(),
}  # fmt: skip
CORES, CLOCK = 2, 1.75e9  # v5p: 459e12 bfloat16 operations a second = 2 cores x 4 units x 128 x 128 x 2 x CLOCK
KERNELS = {"fwd": CORES, "dq": 1, "dkv": 1}  # number of cores that share the heads of a kernel


LAYOUT = TokenLayout(Text(16_384, 256), image_vocab=8192, height=32, width=32)


def layer_program(topology: str, pattern, kernel: str, heads: int, batch: int):
    """Compiles forward and backward pass of the layer for one chip. Returns the program and the seconds."""
    options = TransformerOptions(width=64 * heads, depth=64, heads=heads, attention_kernel=kernel)
    layer = Attention(options, LAYOUT, (pattern,))
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(data=1, devices=devices[:1])

    def step(params, x, cotangent):
        out, back = jax.vjp(layer.apply, params, x)
        return out, back(cotangent)

    with on_mesh(mesh):
        whole = replicated(mesh)
        x = jax.ShapeDtypeStruct((batch, LAYOUT.length, options.width), jnp.bfloat16, sharding=whole)
        params = jax.eval_shape(lambda x: nn.meta.unbox(layer.init(jax.random.key(0), x)), x)
        params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16, sharding=whole), params)
        return m.compiled(jax.jit(step), params, x, x)


def run(pattern, kernel: str, runs: int, smoke: bool) -> dict:
    heads, batch = (2, 1) if smoke else (62, 4)
    program, compile_s = layer_program("v5p:2x2x1", pattern, kernel, heads, batch)
    cost = program.cost_analysis()
    line = {
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
        "temporaries_mb": round(program.memory_analysis().temp_size_in_bytes / 2**20),
        "compiler_ms": round(1e3 * cost["optimal_seconds"], 2),
        "compile_s": round(compile_s, 1),
    }
    kernels = kernel_ms(pattern, LAYOUT, batch * heads) if kernel == "splash" else {}
    total = line["compiler_ms"] + sum(kernels.get("kernels_ms", {}).values())
    shape = {"batch": batch, "heads": heads, "head_dim": 64, "text": 256, "image_tokens": [32, 32], "dtype": "bfloat16"}
    return line | kernels | {"total_ms": round(total, 2), "topology": "v5p, one chip", "shape": shape}


def schedule(topology: str, block: int) -> dict:
    """Computes a line of `splash.SCHEDULES`: (step, row, block) of each kernel, for blocks of this size."""
    splash.block_size = lambda mask: block
    _, compile_s = layer_program(topology, Row(), "splash", 2, 1)
    found = {kind: scheduled(kind) for kind in splash.KERNEL_KINDS}
    return {"topology": topology, "block": block, "cycles": found, "compile_s": round(compile_s, 1)}


def kernel_ms(pattern, layout: TokenLayout, heads: int) -> dict:
    """Computes the time of the compiled kernels from their scheduled instructions."""
    mask = splash.kernel_mask(pattern, layout, layout.length)
    block = splash.block_size(mask)
    filled = splash.filled_blocks(mask, block)
    milliseconds, cycles = {}, {}
    for name, cores in KERNELS.items():
        start, row, body = cycles[name] = scheduled(name)
        rows = filled.sum(0 if name == "dkv" else 1)  # filled blocks per row
        per_head = len(rows) * (rows.max() * start + row) + rows.sum() * body
        milliseconds[name] = round(float(1e3 * heads * per_head / cores / CLOCK), 2)
    return {
        "block": block,
        "filled_blocks": [int(filled.sum()), filled.size],
        "cycles": {name: dict(zip(("step", "row", "block"), found)) for name, found in cycles.items()},
        "kernels_ms": milliseconds,
    }


def scheduled(name: str) -> tuple[int, int, int]:
    """Counts the instructions of a kernel per grid step, and in addition per row of blocks and per filled block.

    The schedule is one loop over the grid with three conditional regions: the start of a row, the computation of a
    block, and the end of a row.
    """
    (file,) = (
        f for f in glob.glob(f"{FOLDER.name}/*splash_mha_{name}_*final_bundles.txt") if "schedule-analysis" not in f
    )
    loop, starts, branches = None, {}, []
    with open(file) as lines:
        for line in lines:
            if not (found := re.match(r"\s*0x([0-9a-f]+)\s+(LB)?", line)):
                continue
            address = int(found[1], 16)
            loop = address if found[2] and loop is None else loop
            for region in re.findall(r"[Ss]tart(?:/End empty)? region (\d+)", line):
                starts.setdefault(region, address)
            branches += [(address, region) for region in re.findall(r"target = \$region(\d+)", line)]
    inside = [(at, starts.get(region, 0) - at) for at, region in branches if at > loop]
    length = inside[-1][0] - loop  # the last branch closes the loop
    begin, body, end = [skipped for _, skipped in inside if skipped > 8][-3:]  # earlier regions enclose these three
    return length - begin - body - end, begin + end, body


CASES = {
    f"{name}_{kernel}": lambda runs, smoke, pattern=pattern, kernel=kernel: run(pattern, kernel, runs, smoke)
    for name, pattern in PATTERNS.items()
    for kernel in ("xla", "splash")
} | {
    f"schedule_{topology.partition(':')[0]}_{block}": lambda runs, smoke, how=(topology, block): schedule(*how)
    for topology in ("v5p:2x2x1", "v5e:2x2", "v6e:2x2")
    for block in (128, 256, 512, 640)
}

if __name__ == "__main__":
    sys.exit(m.main(__file__, CASES))
