"""The paper's jeep, data/car-turn.mp4 of github.com/showlab/Tune-A-Video:

tav train --config=configs/car_turn.py --workdir=runs/car-turn
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
