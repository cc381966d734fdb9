"""The skiing clip of the paper: data/man-skiing.mp4 of github.com/showlab/Tune-A-Video, with Stable Diffusion 1.4.

    tav train --config=man_skiing --workdir=runs/man-skiing

Cost: that of configs/default.py and, every 100 steps, an inversion and four previews of 50 steps each. Not measured on
a GPU or TPU.
Result: four previews in runs/man-skiing/previews/step_000500, in which the figure of each prompt skis with the
posture and the path of the man in the clip. Not tested, because no weights of Stable Diffusion were available.
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
