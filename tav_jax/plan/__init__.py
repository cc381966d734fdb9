"""`tav plan`: compile the programs of a run with the TPU compiler, without a TPU, and report what they need.

The compiler (`libtpu`) is the one that a TPU machine uses, so its memory numbers are those of a real run.
"""

import importlib.util
import os

from tav_jax.errors import MissingError

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Without these, libtpu asks the cloud's metadata server for the machine type and warns that there is none.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def prepare_environment() -> None:
    """Set the environment variables that JAX and libtpu need here. Call it before JAX is imported."""
    if importlib.util.find_spec("libtpu") is None:
        raise MissingError("`tav plan` needs the TPU compiler, and libtpu is not installed; run `pip install libtpu`")
    os.environ.update(ENVIRONMENT)
