"""The device mesh and sharding, memory estimates, runs of several processes, and the compilation cache."""
