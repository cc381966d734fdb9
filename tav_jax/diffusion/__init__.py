"""Noise schedule, samplers, guidance and inversion: pure functions over arrays, in float32."""
