"""Reuse of deep features between steps (DeepCache, arXiv 2312.00858).

Every K-th step computes the whole UNet and stores the input of its last layer. The steps between compute the last layer
on the stored input, with their own latents and timestep. The features of neighboring steps are similar; how much this
changes a sample depends on K and on the number of steps.
"""

from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from tav_jax.diffusion.network import Network, NetworkOutput
from tav_jax.distributed.sharding import CLIP, REPLICATED, constrain


class FeatureCache(NamedTuple):
    """The carry of the network. Windows have a cache each, along a first axis."""

    features: Float[Array, "*W R F H W2 C"]
    word_maps: Float[Array, "*W M F T"] | None

    def constrain(self) -> "FeatureCache":
        """Sharded as the activations of the network are."""
        windows = (None,) * (self.features.ndim - 5)
        word_maps = None if self.word_maps is None else constrain(self.word_maps, REPLICATED)
        return FeatureCache(constrain(self.features, P(*windows, *CLIP)), word_maps)


def reuse_features(network: Network, interval: int) -> Network:
    """A network that calls `network` as a whole in steps 0, K, 2K, … and where there is no cache yet (carry None)."""

    def reusing(latents, step, conditioning, carry):
        def whole(_):
            output, _ = network(latents, step, conditioning, None)
            features: Any = output.features
            return output._replace(features=None), FeatureCache(features, output.word_maps).constrain()

        def last_layer(cache: FeatureCache):
            output, _ = network(latents, step, conditioning._replace(features=cache.features), None)
            return NetworkOutput(output.prediction, cache.word_maps), cache

        return whole(None) if carry is None else jax.lax.cond(step.step % interval == 0, whole, last_layer, carry)

    return reusing
