"""The packages; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

# The named configs (`--config=man_skiing`) are in `configs/` of a checkout, and inside the package once it is built.
setup(
    packages=[*find_packages(include=["tav_jax*"]), "tav_jax.configs"],
    package_dir={"tav_jax.configs": "configs"},
)
