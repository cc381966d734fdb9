"""`python -m tav_jax`, the same as `tav`."""

from tav_jax.cli import entry

if __name__ == "__main__":
    entry()
