"""Feature extractors for image metrics, and the statistics of a set of images under them.

    extractors = [inception(path), clip(scorer)]
    real, drawn = (ImageSet(extractors, total, radii=(0, 1, 2)) for total in (len(a), len(b)))
    real.add(a), drawn.add(b)                        # in any number of pieces; images are not kept
    real, drawn = (x.of_all_hosts() for x in (real, drawn))
    drawn.distances(real)                            # {"fid": …, "inception_score": …, "fid_clip": …, …}
    drawn.precision_recall(real)                     # {"precision_inception": …, "recall_inception": …, …}

Inception-v3 gives FID and the Inception score. CLIP's image tower gives `fid_clip`.

Images travel to the devices once, as uint8. They are blurred there, and only features come back.

B images    H, W their size    D features    C classes
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dalle_jax.distributed.chunks import in_chunks
from dalle_jax.distributed.exchange import from_all_hosts
from dalle_jax.distributed.sharding import replicated
from dalle_jax.metrics import frechet, inception_score, precision_recall
from dalle_jax.metrics.blur import gaussian_blur
from dalle_jax.models import inception as networks
from dalle_jax.pretrained import inception as weights
from dalle_jax.pytree import fingerprint
from dalle_jax.text_to_image.clip_scorer import ClipScorer


@dataclasses.dataclass(frozen=True)
class FeatureExtractor:
    """A network that extracts features from images.

    Attributes:
      name: "inception" or "clip"; part of the metrics' names.
      width: D.
      network: converts images on the devices, uint8 [B, H, W, 3], to features, float32 [B, D], and class logits without
        the last layer's bias, float32 [B, C]. The logits are None if the network has no classes.
      description: for the report: fingerprint of the weights and preprocessing of the images.
      rows_at_once: images that pass through the network at once.
      mesh: devices that share these images, or None for the default device.
    """

    name: str
    width: int
    network: Callable[[jax.Array], tuple[jax.Array, jax.Array | None]]
    description: dict[str, str]
    rows_at_once: int = 64
    mesh: Mesh | None = None

    def extract(self, images: np.ndarray, radii: Sequence[float] = (0,)) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Extracts the features of images after a Gaussian blur.

        Args:
          images: uint8 [B, H, W, 3] for any B. They are copied to the devices once, whatever the number of radii.
          radii: radii of the blur, pixels.

        Returns:
          For each radius, features, float32 [B, D], and class logits, float32 [B, C], or None.
        """

        def of_all_radii(rows: np.ndarray | jax.Array) -> list[tuple[jax.Array, jax.Array | None]]:
            rows = jnp.asarray(rows)
            return [self.network(gaussian_blur(rows, radius)) for radius in radii]

        return in_chunks(of_all_radii, images, self.rows_at_once, self.mesh)


def inception(
    path: str | os.PathLike,
    resize: str = "bilinear_tf1",
    rows_at_once: int = 64,
    mesh: Mesh | None = None,
) -> FeatureExtractor:
    """Loads FID's Inception-v3.

    Args:
      path: the file of its weights, see `pretrained/inception.py`.
      resize: how images are resized to 299 x 299, a key of `models.inception.RESIZES`.
      rows_at_once: images that pass through the network at once.
      mesh: devices that share these images, or None for the default device.

    Returns:
      An extractor of 2048 features and 1008 class logits per image.

    Raises:
      PretrainedError: no such file, or weights of another network.
      ConfigError: an unknown `resize`.
    """
    networks.resize_matrix(1, 1, resize)  # rejects an unknown name before the weights are read
    params = weights.load(path)
    params = params if mesh is None else jax.device_put(params, replicated(mesh))

    def network(images: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = networks.extract(params, images, resize)
        return found.pool, found.unbiased_logits

    about = {"inception": fingerprint(params), "inception_resize": resize}
    return FeatureExtractor(frechet.INCEPTION, networks.WIDTH, network, about, rows_at_once, mesh)


def clip(scorer: ClipScorer) -> FeatureExtractor:
    """Wraps a CLIP's image tower. `fid_clip` values are comparable only under the same CLIP."""
    network = lambda images: (scorer.encode_images(images), None)
    about = {"clip": scorer.fingerprint()}
    return FeatureExtractor("clip", scorer.clip.options.embed_dim, network, about, scorer.rows_at_once, scorer.mesh)


class ImageSet:
    """Statistics of a set of images, for every feature extractor and every blur radius."""

    def __init__(
        self,
        extractors: Sequence[FeatureExtractor],
        total: int,
        radii: Sequence[float] = (0,),
        part: range | None = None,
    ):
        """
        Args:
          extractors: the feature extractors.
          total: number of images in the set.
          radii: radii of the Gaussian blur, pixels. Radius 0, no blur, is always included.
          part: places of the images that are added on this host, or None for all of them.
        """
        self._extractors, self.radii = extractors, tuple(dict.fromkeys((0, *radii)))
        part = range(total) if part is None else part
        self._total, self._next = total, part.start
        self._features = {(e.name, r): frechet.empty(e.width, e.name) for e in extractors for r in self.radii}
        self._points = {e.name: precision_recall.empty(e.width, e.name, len(part)) for e in extractors}
        self._classes: dict[tuple[str, float], inception_score.ScoreStatistics] = {}

    def add(self, images: np.ndarray) -> None:
        """Adds images, uint8 [B, H, W, 3]."""
        places = self._next + np.arange(len(images))
        self._next += len(images)
        for extractor in self._extractors:
            found = extractor.extract(images, self.radii)
            for radius, (features, logits) in zip(self.radii, found):
                key = extractor.name, radius
                self._features[key] = frechet.add(self._features[key], features)
                if radius == 0:
                    self._points[extractor.name] = precision_recall.add(self._points[extractor.name], features)
                if logits is not None:
                    if key not in self._classes:
                        splits = min(10, self._total)
                        self._classes[key] = inception_score.empty(self._total, splits, logits.shape[1])
                    self._classes[key] = inception_score.add(self._classes[key], logits, places)

    def of_all_hosts(self) -> ImageSet:
        """Returns the statistics of the images of all hosts. Every host must call it, after its part was added."""
        if jax.process_count() == 1:
            return self
        whole = ImageSet(self._extractors, self._total, self.radii)
        for key, mine in self._features.items():
            given = from_all_hosts({"count": np.int64(mine.count), "mean": mine.mean, "scatter": mine.scatter})
            for part in given:
                theirs = frechet.FeatureStatistics(mine.features, int(part["count"]), part["mean"], part["scatter"])
                whole._features[key] = frechet.merge(whole._features[key], theirs)
        for name, mine in self._points.items():
            for part in from_all_hosts({"values": mine.values}):
                whole._points[name] = precision_recall.add(whole._points[name], part["values"])
        for key, mine in self._classes.items():
            sums = ("counts", "probabilities", "negative_entropies")
            parts = [
                inception_score.ScoreStatistics(self._total, *(part[name] for name in sums))
                for part in from_all_hosts({name: getattr(mine, name) for name in sums})
            ]
            whole._classes[key] = functools.reduce(inception_score.merge, parts)
        return whole

    def with_statistics(self, statistics: frechet.FeatureStatistics) -> ImageSet:
        """Returns the set with other statistics of the features without blur, which `distances` then uses."""
        found = ImageSet(self._extractors, self._total, self.radii)
        found._features, found._points = dict(self._features), self._points
        found._classes = self._classes
        found._features[statistics.features, 0] = statistics
        return found

    def features(self, name: str) -> np.ndarray:
        """Returns the features of the images without blur, float32 [images, D], in the order of `add`.

        Args:
          name: the extractor's name.
        """
        return self._points[name].values

    def distances(self, real: ImageSet, radius: float = 0) -> dict[str, float]:
        """Computes FID for every extractor, and the Inception score for those with classes.

        Args:
          real: the images to compare with.
          radius: radius of the blur of both sets.

        Returns:
          "fid", "inception_score", "fid_clip" and so on, by name.

        Raises:
          DataError: too few images.
        """
        metrics = {}
        for extractor in self._extractors:
            key = extractor.name, radius
            metrics |= frechet.compute(real._features[key], self._features[key])
            if key in self._classes:
                metrics |= inception_score.compute(self._classes[key])
        return metrics

    def precision_recall(self, real: ImageSet) -> dict[str, float]:
        """Computes precision and recall for every extractor, without blur. Arguments and errors as `distances`."""
        metrics = {}
        for extractor in self._extractors:
            metrics |= precision_recall.compute(real._points[extractor.name], self._points[extractor.name])
        return metrics
