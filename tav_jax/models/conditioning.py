"""What a denoising step depends on besides the latents and the timestep."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float

from tav_jax.models.controls import AttentionControls


class Conditioning(NamedTuple):
    """Passed from the UNet to every resnet and transformer block. All fields are arrays: new values do not cause a
    compilation. To add a kind of control, add a field here and read it in the layer that it changes."""

    text: Float[Array, "B L e"]  # text embeddings, one row for each row of the latents
    frame_mask: Bool[Array, "F"] | None = None  # False for frames that are not part of the clip; None without such
    controls: AttentionControls | None = None  # for two-branch editing
    features: Float[Array, "B F H W c"] | None = None  # of an earlier step, see `UNet.__call__`
