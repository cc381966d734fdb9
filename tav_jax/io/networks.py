"""`Networks`: the networks of a pipeline on a mesh, with what they encode and decode."""

import contextlib
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from tav_jax.diffusion import programs
from tav_jax.diffusion.alignment import TokenizedPrompt
from tav_jax.diffusion.schedule import NoiseSchedule
from tav_jax.distributed import memory, processes, sharding
from tav_jax.io import tokenizer, validation
from tav_jax.io.validation import Frames, Values
from tav_jax.io.weights import Components
from tav_jax.models import Conditioning
from tav_jax.training.train_step import Posterior


class Networks:
    """The text encoder, VAE, UNet and noise schedule of a pipeline."""

    def __init__(self, components: Components, dtype: Any, mesh: Mesh | None = None):
        self.components = components
        self.mesh = mesh
        self.dtype = jnp.dtype(dtype)
        for module in (components.unet, components.vae, components.text_encoder):
            nnx.update(module, sharding.device_put(nnx.state(module), mesh))
        self.schedule = NoiseSchedule.from_config(components.layout.configs["scheduler"])

    def describe(self) -> str:
        """The source, the sizes and the devices, for `repr`."""
        parts = {name: getattr(self.components, name) for name in ("unet", "vae", "text_encoder")}
        sizes = {name: sum(x.size for x in jax.tree.leaves(part)) / 1e6 for name, part in parts.items()}
        return (
            f"({self.components.layout.source!r}, dtype={self.dtype.name})\n"
            f"  parameters: {', '.join(f'{name} {size:.2f} M' for name, size in sizes.items())}\n"
            f"  devices: {self.mesh.size if self.mesh else 1} × {jax.devices()[0].device_kind}"
        )

    @functools.cached_property
    def tokenizer(self) -> Any:
        return tokenizer.load_tokenizer(self.components.layout.root / "tokenizer")

    def tokenize(self, texts: Sequence[str]) -> Int[np.ndarray, "n L"]:
        """Token ids, padded as the model expects. A text that is too long is truncated, with a warning."""
        encoder = self.components.layout.text_encoder
        return tokenizer.tokenize(self.tokenizer, texts, encoder.max_position_embeddings, encoder.vocab_size)

    def tokenize_words(self, text: str) -> TokenizedPrompt:
        """The tokens of a prompt and the words that they belong to."""
        return tokenizer.tokenize_words(
            self.tokenizer, self.components.layout.text_encoder.max_position_embeddings, text
        )

    def encode_text(self, texts: str | Sequence[str]) -> Float[Array, "n L e"]:
        """Text embeddings, one row for each text."""
        ids = self.tokenize([texts] if isinstance(texts, str) else texts)
        with self.jit_context():
            return programs.encode_text(self.components.text_encoder, jnp.asarray(ids))

    def encode_video(self, frames: Frames) -> Float[Array, "1 F h w c"]:
        """Scaled latents: the mean of the VAE's posterior."""
        return self.posterior(frames).mean

    def posterior(self, frames: Frames) -> Posterior:
        """Mean and standard deviation of the scaled latents. Tuning samples from them at every step."""
        frames = validation.frames(frames, self._downsampling)
        if processes.is_multiprocess():
            processes.check_same({"the clip": hashlib.blake2b(frames.tobytes(), digest_size=8).hexdigest()})
        workload, batch_size = self._vae_workload("encoding", *frames.shape[:3])
        with memory.checked(workload), self.jit_context():
            mean, std = programs.encode_frames(self.components.vae, jnp.asarray(frames), batch_size=batch_size)
        return Posterior(mean[None], std[None])  # [1, F, h, w, 4]

    def decode_video(self, latents: Float[Values, "n F h w c"]) -> Float[Array, "n F H W 3"]:
        """Frames in [0, 1] from scaled latents."""
        latents, factor = jnp.asarray(latents, jnp.float32), self._downsampling
        n, frames, height, width, _ = latents.shape
        workload, batch_size = self._vae_workload("decoding", n * frames, height * factor, width * factor)
        with memory.checked(workload), self.jit_context():
            return jax.block_until_ready(programs.decode_frames(self.components.vae, latents, batch_size=batch_size))

    def unet(
        self, latents: Float[Values, "B F h w c"], timesteps: Int[Values, "B"], text: Float[Values, "B L e"]
    ) -> Float[Array, "B F h w c"]:
        """One call of the video UNet."""
        latents, timesteps = jnp.asarray(latents, jnp.float32), jnp.asarray(timesteps)
        with self.jit_context():
            return programs.call_unet(self.components.unet, latents, timesteps, Conditioning(jnp.asarray(text)))

    @property
    def _downsampling(self) -> int:
        return self.components.vae.config.downsampling

    @property
    def _channels(self) -> int:
        return self.components.unet.config.in_channels

    @property
    def memory_estimator(self) -> memory.Estimator:
        return memory.Estimator.of(self.components.unet, self.components.vae, self.dtype, self.mesh)

    def jit_context(self) -> contextlib.AbstractContextManager[None]:
        """The context of every jitted call: the mesh, and the precision of matrix products."""
        return programs.jit_context(self.dtype, self.mesh)

    def _vae_workload(self, name: str, frames: int, height: int, width: int) -> tuple[memory.Workload, int]:
        """What the VAE needs for a clip, and how many frames it processes at a time."""
        batch_size = functools.partial(programs.vae_batch_size, mesh=self.mesh)
        workload = self.memory_estimator.autoencoding(name, memory.Shape(frames, height, width), batch_size)
        return workload, batch_size(frames, height, width)
