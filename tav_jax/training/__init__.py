"""Training on one clip: the jitted step, the loop of `tav train`, and the run directory with its checkpoints."""
