"""Drawing: MaskGIT with the dVAE's decoder, and the autoregressive prior, with random weights.

All programs are compiled at once, in threads, before the first one is timed.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses

import jax
import jax.numpy as jnp
import models
from recorder import Recorder, memory_gib, seconds

from dalle_jax.image_tokenizers.dvae import DVAETokenizer
from dalle_jax.priors.decoding_weights import for_drawing
from dalle_jax.priors.maskgit import MaskGITPrior
from dalle_jax.priors.token_prior import TokenPrior

STEPS = 8
# Instructions that XLA may record into CUDA graphs. WHILE is one of them, so that a whole loop over the tokens or steps
# can be one graph.
WHOLE_LOOPS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A program that draws images.

    Attributes:
      prior: draws the tokens.
      tokenizer: decodes them to pixels, or None.
      rows: number of images.
      captions: number of captions.
      guidance: of the prior.
      whole_loops: compile with `WHOLE_LOOPS`. This decides whether drawing should set it on GPUs.
    """

    prior: TokenPrior
    tokenizer: DVAETokenizer | None
    rows: int
    captions: int
    guidance: float = 0.0
    whole_loops: bool = False

    def arguments(self) -> tuple:
        """Returns weights, text and keys. It creates no arrays inside `jax.eval_shape`."""
        weights = [models.random_params(model) for model in (self.prior, self.tokenizer) if model]
        weights[0] = for_drawing(self.prior, weights[0], None)[1]  # as `TextToImage.load` converts them
        keys = jax.random.split(jax.random.key(0), self.rows)
        return weights, models.random_text(self.prior, self.captions), keys

    def draw(self, weights: list, text, keys):
        layout = self.prior.layout
        options = {"steps": STEPS} if isinstance(self.prior, MaskGITPrior) else {}
        tokens = self.prior.sample(weights[0], text, keys, guidance=self.guidance, **options)
        if self.tokenizer is None:
            return tokens
        return self.tokenizer.decode(weights[1], tokens.reshape(self.rows, layout.height, layout.width))

    def compile(self):
        options = {"xla_gpu_enable_command_buffer": WHOLE_LOOPS} if self.whole_loops else None
        return jax.jit(self.draw).lower(*jax.eval_shape(self.arguments)).compile(options)

    def time(self, program) -> dict:
        arguments = self.arguments()
        passed = seconds(lambda: program(*arguments), 0.5, calls=1)
        values = {
            "seconds": passed,
            "images_per_s": self.rows / passed,
            "weights_gib": sum(jnp.asarray(x).nbytes for x in jax.tree.leaves(arguments[0])) / 2**30,
            "temporaries_gib": program.memory_analysis().temp_size_in_bytes / 2**30,
            "peak_gib": memory_gib(),
            "rows": self.rows,
        }
        if self.tokenizer is None:
            values["tokens_per_s"] = self.rows * self.prior.layout.image_length / passed
        return values


def drawings(tiny: bool) -> dict[str, Drawing]:
    """Returns the drawings by name, the most important ones first."""

    def maskgit(side: int, rows: int, guidance: float = 0.0) -> Drawing:
        return Drawing(models.maskgit(tiny, side), models.dvae(tiny, 8 * side), rows, rows, guidance)

    def autoregressive(rows: int, captions: int) -> Drawing:
        return Drawing(models.autoregressive(tiny), None, rows, captions)

    def in_one_graph(drawing: Drawing) -> Drawing:
        return dataclasses.replace(drawing, whole_loops=True)

    many, batch, best_of = (4, 4, 8) if tiny else (128, 64, 512)
    return {
        f"maskgit 16x16, {many} images": maskgit(16, many),
        "autoregressive 32x32, 1 image": autoregressive(1, 1),
        f"autoregressive 32x32, {batch} images": autoregressive(batch, batch),
        "maskgit 16x16, 1 image": maskgit(16, 1),
        "autoregressive 32x32, 1 image, its loop in one CUDA graph": in_one_graph(autoregressive(1, 1)),
        "maskgit 16x16, 1 image, its loop in one CUDA graph": in_one_graph(maskgit(16, 1)),
        f"maskgit 16x16 guided, {many} images": maskgit(16, many, guidance=2.0),
        f"autoregressive 32x32, best of {best_of}": autoregressive(best_of, 1),
        f"maskgit 16x16, {2 * many} images": maskgit(16, 2 * many),
        "maskgit 32x32, 1 image": maskgit(32, 1),
    }


def run(record: Recorder) -> None:
    plans = drawings(record.tiny)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = {name: pool.submit(plan.compile) for name, plan in plans.items()}
        concurrent.futures.wait(programs.values(), timeout=0.6 * record.left)
        record.run(
            (name, 5, lambda name=name, plan=plan: plan.time(programs[name].result(timeout=max(record.left, 1))))
            for name, plan in plans.items()
        )
