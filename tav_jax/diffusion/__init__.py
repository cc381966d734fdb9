"""Noise schedule, one step, and the loop: three separate things, all pure and in float32."""

from tav_jax.diffusion.sampling import guided, walk
from tav_jax.diffusion.schedule import Ladder, Schedule, add_noise, move, velocity

__all__ = ["Ladder", "Schedule", "add_noise", "guided", "move", "velocity", "walk"]
