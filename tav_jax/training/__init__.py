"""Training on one clip: the jitted step, the loop of `tav train`, and what a run keeps in its directory."""
