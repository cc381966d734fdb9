"""Any clip, with the paper's settings: Stable Diffusion 1.4, 24 frames of 512², 500 steps.

    tav train --config=default --workdir=runs/mine \
        --config.clip.path=mine.mp4 --config.clip.prompt="a man is skiing"

Cost: 4.2 GB per chip on a v5e-8 for tuning, according to the TPU compiler (benchmarks/TPU_PLAN.md). A checkpoint
takes 0.9 GB. Time was not measured on a GPU or TPU; the paper reports 10 minutes for tuning and 1 minute for an edit on
an A100.
Result: checkpoints at steps 400 and 500. `tav edit --workdir=runs/mine --prompt=…` writes videos with the motion of the
clip to runs/mine/edits.
"""

from tav_jax.config import get_config

__all__ = ["get_config"]
