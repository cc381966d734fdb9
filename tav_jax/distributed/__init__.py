"""Devices and processes: mesh and sharding, memory, several processes, the compilation cache."""
