"""Linear classifiers on fixed features: multinomial logistic regression, trained to convergence.

The features are standardised first, because their scale differs from layer to layer. L-BFGS then finds the minimum of
the mean cross-entropy plus ½ λ ‖W‖². The bias is not penalised. CLIP (arXiv 2103.00020, appendix A.3) measures its
features this way, too. There λ is chosen on a validation split, as `accuracy` does.

    n images    D features    K classes
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Array, ArrayLike, Float, Int, Shaped

from dalle_jax.errors import DataError

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # λ, from the strongest
_MOST_ITERATIONS = 1000


@dataclasses.dataclass(frozen=True)
class LinearClassifier:
    """A trained classifier. Create one with `fit`.

    Attributes:
      mean, scale: of the features in training, float32 [D] each.
      weights: float32 [D + 1, K]; the last row is the bias.
    """

    mean: Float[np.ndarray, " D"]
    scale: Float[np.ndarray, " D"]
    weights: Float[np.ndarray, "_ K"]

    def predict(self, features: Float[np.ndarray, "n D"]) -> Int[np.ndarray, " n"]:
        """Returns the most likely class of each row."""
        return np.argmax(_standardised(features, self.mean, self.scale) @ self.weights, axis=1)


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """The result of `accuracy`.

    Attributes:
      accuracy: share of right classes on the test rows, in [0, 1].
      chance: the same for a classifier that always answers with the most frequent class of the training rows.
      penalty: the chosen λ.
    """

    accuracy: float
    chance: float
    penalty: float


def fit(
    features: Float[np.ndarray, "n D"],
    labels: Int[np.ndarray, " n"],
    classes: int,
    penalty: float,
    start: LinearClassifier | None = None,
) -> LinearClassifier:
    """Trains a classifier to convergence.

    Args:
      features: one row for each image.
      labels: classes in [0, K).
      classes: K.
      penalty: λ, above 0.
      start: a classifier of the same features, from which the search begins; None begins at zero weights.
    """
    mean = features.mean(axis=0)
    scale = np.maximum(features.std(axis=0), 1e-6)
    rows, targets = jnp.asarray(_standardised(features, mean, scale)), jnp.asarray(labels)
    shape = (rows.shape[1], classes)

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        loss, gradient = _loss(jnp.asarray(flat.reshape(shape), jnp.float32), rows, targets, jnp.float32(penalty))
        return float(loss), np.asarray(gradient, np.float64).ravel()

    first = np.zeros(shape) if start is None else start.weights
    options = {"maxiter": _MOST_ITERATIONS, "maxcor": 20, "ftol": 1e-9, "gtol": 1e-6}
    found = scipy.optimize.minimize(
        value, first.astype(np.float64).ravel(), jac=True, method="L-BFGS-B", options=options
    )
    return LinearClassifier(mean, scale, found.x.reshape(shape).astype(np.float32))


def accuracy(
    features: Float[np.ndarray, "n D"],
    labels: Shaped[np.ndarray, " n"],
    test_features: Float[np.ndarray, "m D"],
    test_labels: Shaped[np.ndarray, " m"],
    penalties: Sequence[float] = PENALTIES,
    seed: int = 0,
) -> Accuracy:
    """Measures how well a linear classifier of some features predicts labels.

    A fifth of the training rows, drawn at random, chooses λ. The classifier is then trained on all training rows.

    Args:
      features: of the training images.
      labels: of the training images, names or numbers.
      test_features: of the test images.
      test_labels: of the test images. A label that no training image has counts as wrong.
      penalties: the values of λ to choose from.
      seed: of the draw.

    Raises:
      DataError: fewer than two classes, or fewer than ten training images.
    """
    names, numbers = np.unique(labels, return_inverse=True)
    if len(names) < 2 or len(labels) < 10 or not len(test_labels):
        raise DataError(
            f"{len(labels)} training and {len(test_labels)} test images of {len(names)} classes; a linear classifier "
            "needs at least 10 training images of 2 classes, and a test image."
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    held, kept = np.split(order, [len(order) // 5])
    classifier, rights = None, []
    for penalty in sorted(penalties, reverse=True):
        classifier = fit(features[kept], numbers[kept], len(names), penalty, classifier)
        rights.append((np.mean(classifier.predict(features[held]) == numbers[held]), penalty, classifier))
    _, penalty, classifier = max(rights, key=lambda right: right[:2])  # of equally good ones the strongest λ
    classifier = fit(features, numbers, len(names), penalty, classifier)
    frequent = names[np.bincount(numbers).argmax()]
    return Accuracy(
        float(np.mean(names[classifier.predict(test_features)] == test_labels)),
        float(np.mean(test_labels == frequent)),
        penalty,
    )


def _standardised(features: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Returns standardised features with a column of ones, float32 [n, D + 1]."""
    rows = (features - mean[None]) / scale[None]
    return np.concatenate([rows, np.ones((len(rows), 1))], axis=1).astype(np.float32)


@jax.jit
@jax.value_and_grad
def _loss(
    weights: Float[ArrayLike, "_ K"],
    rows: Float[ArrayLike, "n _"],
    labels: Int[ArrayLike, " n"],
    penalty: Float[ArrayLike, ""],
) -> Float[Array, ""]:
    logits = jnp.matmul(rows, weights, precision=jax.lax.Precision.HIGHEST)
    nats = jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return jnp.mean(nats) + penalty / 2 * jnp.sum(jnp.square(weights[:-1]))
