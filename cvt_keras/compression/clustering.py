"""Clustering: each kernel has few distinct values, which are trained (Han et al., arXiv 1510.00149)."""

from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from cvt_keras.compression import tfmot
from cvt_keras.compression.kernels import Zeros, all_kernels, describe, kernels, share_of_zeros
from cvt_keras.compression.options import Clustering, Layers
from cvt_keras.errors import RecipeError, RunError
from cvt_keras.training.compressor import Compressor

ITERATIONS = 10  # steps of Lloyd's algorithm, after k-means++ has chosen the first centroids


class WeightClustering(Compressor):
    """Clusters kernels with tfmot's centroids and assignment.

    Each clustered weight has a float weight behind it. After a training step, the step's change is added to the float weights,
    and its mean over the members of a centroid to that centroid. Then each weight becomes the centroid nearest to its float
    weight.

    Args:
        clusters: distinct values in each kernel, at least 2.
        keep_zeros: whether the zeros of a pruned run stay zero. 0 is then one of the values.
        layers: names, a predicate or `None`, as in `kernels`.
        after: `settings` of the compression that the starting weights come from, or `None`.

    Raises:
        RecipeError: for an argument out of range.
    """

    refused: ClassVar = {
        "cluster": "start from the run that it was made from",
        "qat": "its ranges are fixed. Cluster the run that it was made from, then run qat",
    }

    def __init__(
        self, clusters: int = 16, keep_zeros: bool = False, layers: Layers = None, after: dict[str, Any] | None = None
    ) -> None:
        Clustering(clusters=clusters, layers=layers).require()  # type: ignore[arg-type]  # a predicate has no flag
        settings = {"method": "cluster", "clusters": clusters, "keep_zeros": keep_zeros, "layers": describe(layers)}
        super().__init__(settings, after)
        self.clusters = clusters
        self.keep_zeros = keep_zeros
        self.layers = layers
        self.parts = tfmot.load()
        self._zeros = Zeros({})

    def require(self, recipe):
        super().require(recipe)
        if recipe.ema:
            raise RecipeError(
                f"`ema` must be 0 with clustering: an average over steps has more distinct values. Received: ema={recipe.ema}",
                argument="ema",
            )

    def start(self, classifier, batches, steps, epochs):
        self._clustered = []
        every_kernel = all_kernels(classifier)
        # All kernels, as the pruning may have had other `layers`.
        self._zeros = Zeros(every_kernel if self.keep_zeros else {})
        for path, kernel in kernels(classifier, self.layers).items():
            distinct = len(np.unique(np.asarray(kernel)))
            if distinct < self.clusters:
                raise RecipeError(
                    f"`clusters` must be at most {distinct}, the number of distinct values in {path}. "
                    f"Received: clusters={self.clusters}",
                    argument="clusters",
                    hint="Give fewer --clusters, or other --layers",
                )
            self._clustered.append(_ClusteredKernel(kernel, self.clusters, self._zeros.masks.get(path), self.parts))
        self.variables = [variable for clustered in self._clustered for variable in clustered.variables]
        self.variables += self._zeros.masks.values()

        @tf.function(autograph=False)
        def project():
            for clustered in self._clustered:
                clustered.project()
            self._zeros.hold(every_kernel)

        self._project = project
        project()  # so that the first step sees few values, too

    def on_train_batch_end(self, batch, logs=None):
        self._project()

    def check(self, classifier):
        self._zeros.check(all_kernels(classifier))
        chosen = kernels(classifier, self.layers)
        values_by_layer = {path: len(np.unique(np.asarray(kernel))) for path, kernel in chosen.items()}
        for path, values in values_by_layer.items():
            if values != self.clusters:
                raise RunError(
                    f"{path} has {values} distinct values instead of {self.clusters}, so no model was written",
                    argument="clusters",
                    hint="Cluster again in another --run-dir, with fewer --clusters",
                )
        return {"values_by_layer": values_by_layer, "sparsity": float(share_of_zeros(chosen.values()))}


class _ClusteredKernel:
    """A kernel, the float weights behind it, the centroids, and the index of each weight's centroid.

    Args:
        mask: 0 where a weight stays 0, and 1 elsewhere; one centroid then stays 0. `None` means that no weight stays 0.
    """

    def __init__(self, kernel, clusters, mask, parts):
        keep_zeros = mask is not None
        self.kernel = kernel.value
        self.clusters = clusters
        initial = parts.KmeansPlusPlusCentroidsInitialisation(
            tf.convert_to_tensor(self.kernel), clusters, preserve_sparsity=keep_zeros
        ).get_cluster_centroids()
        self.weights = tf.Variable(self.kernel, trainable=False, name="weights")
        self.centroids = tf.Variable(tf.sort(initial), trainable=False, name="centroids")
        # 0 for what stays fixed: the zeros of a pruned kernel, and their centroid.
        self.moving = mask if keep_zeros else tf.ones_like(self.kernel)
        moving_centroids = tf.cast(self.centroids != 0, tf.float32) if keep_zeros else tf.ones_like(self.centroids)
        self.moving_centroids = tf.Variable(moving_centroids, trainable=False, name="moving_centroids")
        self.algorithm = parts.ClusteringAlgorithm(self.centroids, parts.GradientAggregation.AVG)
        self.members = tf.Variable(self.algorithm.get_pulling_indices(self.weights), trainable=False, name="members")
        for _ in range(ITERATIONS):
            self._move_centroids(self.weights - tf.gather(self.centroids, self.members))
            self.members.assign(self._nearest())
        # `project` computes the step's change as the difference from this.
        self.kernel.assign(tf.gather(self.centroids, self.members))
        self.variables = [self.weights, self.centroids, self.moving_centroids, self.members]

    def project(self):
        change = (self.kernel - tf.gather(self.centroids, self.members)) * self.moving
        self.weights.assign_add(change)
        self._move_centroids(change)
        self.members.assign(self._nearest())
        self.kernel.assign(self.algorithm.get_clustered_weight(self.members, self.weights))

    def _move_centroids(self, change):
        """Moves each centroid by the mean change of its members."""
        members = tf.reshape(self.members, (-1,))
        total = tf.math.unsorted_segment_sum(tf.reshape(change * self.moving, (-1,)), members, self.clusters)
        moved = tf.math.unsorted_segment_sum(tf.reshape(self.moving, (-1,)), members, self.clusters)
        self.centroids.assign_add(tf.math.divide_no_nan(total, moved) * self.moving_centroids)

    def _nearest(self):
        """Returns the index of the centroid nearest to each weight.

        A centroid without members takes the weight nearest to it, so that each kernel keeps its number of values.
        """
        nearest = self.algorithm.get_pulling_indices(self.weights)
        weights, moving = tf.reshape(self.weights, (-1,)), tf.reshape(self.moving, (-1,)) > 0

        def sizes(members):
            return tf.math.bincount(tf.cast(members, tf.int32), minlength=self.clusters, maxlength=self.clusters)

        def fill_one(members):
            empty = tf.argmin(sizes(members))
            may_leave = moving & (tf.gather(sizes(members), members) > 1)
            distance = tf.where(may_leave, tf.abs(weights - self.centroids[empty]), weights.dtype.max)
            return tf.tensor_scatter_nd_update(members, [[tf.argmin(distance)]], [empty])

        flat = tf.reshape(nearest, (-1,))
        # NaN weights all get the same centroid, so the loop could never fill the others. `HaltOnNaN` ends such a training.
        [flat] = tf.while_loop(
            lambda members: tf.reduce_any(sizes(members) == 0), fill_one, [flat], maximum_iterations=self.clusters
        )
        return tf.reshape(flat, nearest.shape)
