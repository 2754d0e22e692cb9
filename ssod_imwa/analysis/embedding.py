"""Features in two dimensions, to be looked at."""

from __future__ import annotations

import numpy as np


def balanced_sample(
    labels: np.ndarray, per_class: int, generator: np.random.Generator
) -> np.ndarray:
    """Positions of up to `per_class` images of each class, drawn without replacement, in order.

    Args:
        labels: (N,).
        per_class: at least 1; a class with fewer images gives all it has.
        generator: draws.

    Raises:
        ValueError: `per_class` is below 1.

    Example:
        >>> balanced_sample(np.array([0, 0, 0, 1]), 3, np.random.default_rng(0))
        array([0, 1, 2, 3])
    """
    if per_class < 1:
        raise ValueError(f"per_class = {per_class} is not allowed (must be at least 1)")
    chosen = [np.zeros(0, dtype=np.int64)]  # of no class there are none
    for c in np.unique(labels):
        positions = np.flatnonzero(labels == c)
        chosen.append(generator.permutation(positions)[:per_class])
    return np.sort(np.concatenate(chosen))


def spread_classes(counts: np.ndarray, number: int) -> np.ndarray:
    """Up to `number` classes from the most to the least frequent, evenly by rank.

    Example:
        >>> spread_classes(np.array([1, 50, 9, 30, 7]), 3)
        array([1, 2, 0])
    """
    order = np.argsort(-np.asarray(counts), kind="stable")
    at = np.linspace(0, len(order) - 1, min(number, len(order))).round().astype(int)
    return order[at]


def tsne(features: np.ndarray, *, seed: int, perplexity: float = 30.0) -> np.ndarray:
    """t-SNE of features by scikit-learn: neighbors stay neighbors, distances mean nothing.

    Args:
        features: (N, d), N at least 3 and d at least 2.
        seed: of the optimization, 0..2³² − 1.
        perplexity: about how many neighbors count; cut to (N − 1) / 3 for small N, as its authors
            advise.

    Returns:
        float32 (N, 2).

    Raises:
        ValueError: there are fewer images, or their features are not finite or all the same.

    Source: van der Maaten and Hinton, Visualizing Data using t-SNE (JMLR 9, 2008).
    """
    from sklearn.manifold import TSNE  # a second to import

    if len(features) < 3:
        raise ValueError(f"{len(features)} images are not allowed (must be at least 3)")
    if not np.isfinite(features).all():
        raise ValueError("features that are not finite are not allowed (did the run diverge?)")
    if (features == features[0]).all():  # scikit-learn would divide by 0, and crash the process
        raise ValueError("features that are all the same are not allowed (no image is near others)")
    perplexity = min(perplexity, (len(features) - 1) / 3)
    embedding = TSNE(2, perplexity=perplexity, init="pca", random_state=seed)
    return embedding.fit_transform(np.asarray(features, dtype=np.float32))
