"""The paper's skier, data/man-skiing.mp4 of github.com/showlab/Tune-A-Video:

tav train --config=configs/man_skiing.py --workdir=runs/man-skiing
"""

from tav_jax.config import get_config as default


def get_config():
    config = default()
    config.clip.path = "data/man-skiing.mp4"
    config.clip.prompt = "a man is skiing"
    config.clip.stride = 2
    config.edit.prompts = (
        "mickey mouse is skiing on the snow",
        "spider man is skiing on the beach, cartoon style",
        "wonder woman, wearing a cowboy hat, is skiing",
        "a man, wearing pink clothes, is skiing at sunset",
    )
    return config
