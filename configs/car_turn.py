"""The jeep clip of the paper: data/car-turn.mp4 of github.com/showlab/Tune-A-Video, with Stable Diffusion 1.4.

    tav train --config=car_turn --workdir=runs/car-turn

Cost: that of configs/man_skiing.py. Not measured on a GPU or TPU.
Result: four previews in runs/car-turn/previews/step_000500, in which a car turns as in the clip, in the place
or style of the prompt. Not tested, because no weights of Stable Diffusion were available.
"""

from tav_jax.config import get_config as default


def get_config():
    config = default()
    config.clip.path = "data/car-turn.mp4"
    config.clip.prompt = "a jeep car is moving on the road"
    config.clip.stride = 3
    config.edit.prompts = (
        "a jeep car is moving on the beach",
        "a jeep car is moving on the snow",
        "a jeep car is moving on the road, cartoon style",
        "a sports car is moving on the road",
    )
    return config
