"""Any clip, with the paper's settings:

    tav train --config=configs/default.py --workdir=runs/mine \
        --config.clip.path=mine.mp4 --config.clip.prompt="a man is skiing"
"""

from tav_jax.config import get_config

__all__ = ["get_config"]
