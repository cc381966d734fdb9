"""What a denoising step depends on besides the latents and the timestep."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float


class Conditioning(NamedTuple):
    """Passed from the UNet through its blocks to every attention layer. All fields are arrays, so new values compile
    nothing. A new kind of control adds a field here and reads it in the layer that it changes."""

    text: Float[Array, "B L e"]  # text embeddings, one row for each row of the latents
    frame_mask: Bool[Array, "F"] | None = None  # real frames of a padded clip; None: all. Set by the UNet
