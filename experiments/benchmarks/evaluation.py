"""Times the host's part of an evaluation at the paper's size, with a feature extractor that costs next to nothing.

N real images are added at five blur radii, and N other images without blur, in batches of 64. Then both sets are
compared. The fake extractor has Inception's widths: 2,048 features and 1,008 classes. The images have 32 x 32 pixels.

| field                      | meaning                                                            |
|----------------------------|--------------------------------------------------------------------|
| add, distances, neighbors  | CPU seconds of `add`, of `distances` and of `precision_recall`     |
| wall_s                     | seconds of all three; other processes prolong them                 |
| peak_rss_mb                | peak memory of the process                                         |
| metrics                    | the values, which show that two versions compute the same          |

CPU seconds count all threads, so that they do not depend on what else the machine does.
"""

import resource
import sys
import time

import _measure as m  # first: it limits the threads
import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.evaluation.feature_extractors import FeatureExtractor, ImageSet
from dalle_jax.metrics import blur

SIZE, WIDTH, CLASSES, BATCH = 32, 2048, 1008, 64


def fake_extractor() -> FeatureExtractor:
    """Returns an extractor that multiplies the means of 4 x 4 pixels with a random matrix."""
    kernel = np.random.default_rng(0).normal(size=(SIZE * SIZE * 3 // 16, WIDTH)).astype(np.float32) / 8

    @jax.jit
    def network(images: jax.Array) -> tuple[jax.Array, jax.Array]:
        cells = images.reshape(-1, SIZE // 4, 4, SIZE // 4, 4, 3).astype(jnp.float32).mean((2, 4)) / 64 - 2
        features = jnp.tanh(cells.reshape(len(images), -1) @ kernel)
        return features, features[:, :CLASSES] * 4

    return FeatureExtractor("fake", WIDTH, network, {}, BATCH)


def images(seed: int, shift: int) -> np.ndarray:
    """Returns a batch of images, uint8 [BATCH, SIZE, SIZE, 3]: random patches of 8 x 8 pixels, with noise."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(shift, 200, (BATCH, SIZE // 8, 1, SIZE // 8, 1, 3), np.uint8)
    shown = np.broadcast_to(patches, (BATCH, SIZE // 8, 8, SIZE // 8, 8, 3)).reshape(BATCH, SIZE, SIZE, 3)
    return shown + rng.integers(0, 32, shown.shape, np.uint8)


def case(count: int, smoke: bool) -> dict:
    count, extractors, seconds = BATCH * 3 if smoke else count, [fake_extractor()], {}
    began = time.perf_counter()

    def timed(name, function):
        start = time.process_time()
        result = function()
        seconds[name] = round(time.process_time() - start, 2)
        return result

    def add(radii, shift, seed):
        added = ImageSet(extractors, count, radii)
        for start in range(0, count, BATCH):
            added.add(images(seed + start, shift)[: count - start])
        return added

    real, drawn = timed("add", lambda: (add(blur.RADII, 0, 0), add((0,), 4, 10**6)))
    metrics = timed("distances", lambda: drawn.distances(real))
    metrics |= timed("neighbors", lambda: drawn.precision_recall(real))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    shape = {"images": count, "radii": len(blur.RADII), "width": WIDTH, "classes": CLASSES}
    wall = time.perf_counter() - began
    return seconds | {"wall_s": round(wall, 1), "peak_rss_mb": round(peak), "metrics": metrics, "shape": shape}


CASES = {f"n{count}": lambda runs, smoke, count=count: case(count, smoke) for count in (3000, 30_000)}

if __name__ == "__main__":
    sys.exit(m.main(__file__, CASES))
