"""Sets of pictures through the eyes of a network: Inception-v3 for FID and the Inception score, or a CLIP in its place.

judges = [inception(path), clip(scorer)]
real, drawn = (PictureSet(judges, total, radii=(0, 1, 2)) for total in (len(a), len(b)))
real.add(a), drawn.add(b)                        # in any number of pieces: nothing but statistics is kept
drawn.figures(real)                              # {"fid": …, "inception_score": …, "fid_clip": …, …}

B pictures    H, W their size    D features    C classes
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from dalle_jax.distributed.chunks import in_chunks
from dalle_jax.distributed.sharding import replicated
from dalle_jax.metrics import frechet, inception_score, precision_recall
from dalle_jax.metrics.blur import gaussian_blur
from dalle_jax.models import inception as networks
from dalle_jax.pretrained import inception as weights
from dalle_jax.pytree import fingerprint
from dalle_jax.text_to_image.clip_scorer import ClipScorer


@dataclasses.dataclass(frozen=True)
class Judge:
    """A network that looks at pictures.

    Attributes:
      name: "inception", "clip": it makes the metrics' names.
      width: D.
      look: uint8 [B, H, W, 3] of any B to features, float32 [B, D], and class logits without the last layer's bias,
        float32 [B, C], or None where the network has no classes.
      description: for the report: whose weights, and what was done to the pictures.
    """

    name: str
    width: int
    look: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]
    description: dict[str, str]


def inception(
    path: str | os.PathLike,
    resize: str = "bilinear_tf1",
    rows_at_once: int = 64,
    mesh: Mesh | None = None,
) -> Judge:
    """FID's Inception-v3.

    Args:
      path: the file of its weights, see `pretrained/inception.py`.
      resize: how pictures become 299 x 299, a key of `models.inception.RESIZES`.
      rows_at_once: pictures that go through it in one go.
      mesh: over whose devices they are split; None: the default device.

    Raises:
      PretrainedError: no such file, or one of another network.
      ConfigError: an unknown `resize`.
    """
    networks.resize_matrix(1, 1, resize)  # refuses an unknown one before the weights are read
    params = weights.load(path)
    params = params if mesh is None else jax.device_put(params, replicated(mesh))

    def look(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen = in_chunks(lambda rows: networks.extract(params, rows, resize), images, rows_at_once, mesh)
        return seen.pool, seen.unbiased_logits

    about = {"inception": fingerprint(params), "inception_resize": resize}
    return Judge(frechet.INCEPTION, networks.WIDTH, look, about)


def clip(scorer: ClipScorer) -> Judge:
    """A CLIP's image tower; its FID is `fid_clip`, which compares only with that of the same CLIP."""
    look = lambda images: (scorer.image_features(images), None)
    return Judge("clip", scorer.clip.options.embed_dim, look, {"clip": scorer.fingerprint()})


class PictureSet:
    """Statistics of a set of pictures, by every judge and at every blur radius."""

    def __init__(self, judges: Sequence[Judge], total: int, radii: Sequence[float] = (0,)):
        """
        Args:
          judges: who looks.
          total: how many pictures there will be.
          radii: of the Gaussian blur, pixels; 0, the pictures as they are, is among them in any case.
        """
        self._judges, self.radii = judges, tuple(dict.fromkeys((0, *radii)))
        self._total, self._count = total, 0
        self._features = {(j.name, r): frechet.empty(j.width, j.name) for j in judges for r in self.radii}
        self._points = {j.name: precision_recall.empty(j.width, j.name) for j in judges}
        self._classes = {}

    def add(self, images: np.ndarray) -> None:
        """Takes pictures in, uint8 [B, H, W, 3]."""
        places = self._count + np.arange(len(images))
        self._count += len(images)
        for radius in self.radii:
            blurred = np.asarray(gaussian_blur(images, radius)) if radius else images
            for judge in self._judges:
                features, logits = judge.look(blurred)
                key = judge.name, radius
                self._features[key] = frechet.add(self._features[key], features)
                if radius == 0:
                    self._points[judge.name] = precision_recall.add(self._points[judge.name], features)
                if logits is not None:
                    if key not in self._classes:
                        splits = min(10, self._total)
                        self._classes[key] = inception_score.empty(self._total, splits, logits.shape[1])
                    self._classes[key] = inception_score.add(self._classes[key], logits, places)

    def features(self, name: str) -> np.ndarray:
        """What the judge of that name saw without blur, float32 [pictures, D], in the order in which they came."""
        return self._points[name].values

    def distances(self, real: PictureSet, radius: float = 0) -> dict[str, float]:
        """FID by each judge, and the Inception score of those that have classes.

        Args:
          real: what these pictures are compared with.
          radius: of the blur on both sides.

        Raises:
          DataError: too few pictures.
        """
        figures = {}
        for judge in self._judges:
            key = judge.name, radius
            figures |= frechet.compute(real._features[key], self._features[key])
            if key in self._classes:
                figures |= inception_score.compute(self._classes[key])
        return figures

    def precision_recall(self, real: PictureSet) -> dict[str, float]:
        """Precision and recall by each judge, without blur. Arguments and errors as `distances`."""
        figures = {}
        for judge in self._judges:
            figures |= precision_recall.compute(real._points[judge.name], self._points[judge.name])
        return figures
