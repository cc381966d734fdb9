"""The network as the denoising loop calls it.

A network is a function of the latents of all rows of a batch, one step, and the conditioning of the rows. What changes
how the UNet is called (windows over a long clip, reuse of features) takes a network and returns a network; guidance
and editing take a network and return a denoiser.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tav_jax.diffusion.schedule import Steps
from tav_jax.distributed.sharding import CLIP, constrain
from tav_jax.models import Conditioning
from tav_jax.models.unet import level_size


class NetworkOutput(NamedTuple):
    prediction: Float[Array, "R F h w c"]  # noise or velocity, in float32
    word_maps: Float[Array, "M F T"] | None = None  # see `AttentionControls`; None without controls
    features: Float[Array, "R F H W C"] | None = None  # see `UNet.__call__`


# (latents [R, F, h, w, c], one step, conditioning of R rows, carry) → (output, carry)
Network = Callable[[Float[Array, "R F h w c"], Steps, Conditioning, Any], tuple[NetworkOutput, Any]]


def unet_network(unet: Any, *, return_features: bool = False) -> Network:
    """One call of the UNet. `unet` is a `UNet`, or a module that wraps one and has the same call. The features are
    returned by a whole call, and make the next call one of the last layer if the conditioning has them."""
    # Split here and merged in the loop: what layers store in a module is only accessible where the module was created.
    graph, weights = nnx.split(unet)

    def network(latents, step, conditioning, carry):
        module = nnx.merge(graph, weights)
        timesteps = jnp.broadcast_to(step.timestep, latents.shape[:1])
        whole = conditioning.features is None
        options = {"return_features": True} if return_features and whole else {}
        result = module(constrain(latents, CLIP), timesteps, conditioning, **options)
        prediction, features = result if options else (result, None)
        output = NetworkOutput(prediction.astype(jnp.float32), features=features)
        if conditioning.controls is None:
            return output, carry
        size = latents.shape[2], latents.shape[3]
        height, width = level_size(*size, module.config.word_map_level(*size))
        # Those of one level, without the middle block: in Stable Diffusion, of 2 layers on the way down and 3 up.
        stored = nnx.to_flat_state(nnx.pop(module, nnx.Intermediate))
        if not whole:  # the last layer alone has maps of another level
            return output, carry
        maps = [x for path, x in stored if "mid_block" not in path for x in jax.tree.leaves(x)]  # [M, F, T] each
        maps = [x for x in maps if x.shape[-1] == height * width]
        return output._replace(word_maps=jnp.mean(jnp.stack(maps), axis=0)[:, : latents.shape[1]]), carry

    return network
