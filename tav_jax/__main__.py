"""`python -m tav_jax` is `tav`."""

from tav_jax.cli.main import entry

if __name__ == "__main__":
    entry()
