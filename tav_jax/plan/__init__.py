"""`tav plan`: compile the programs of a run with the TPU compiler, without a TPU, and report what they need.

`libtpu`, the compiler, is the same on a TPU machine, so a real run needs the memory that it reports.
"""

import importlib.util
import os

from tav_jax.errors import MissingError

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Without these, libtpu queries the cloud's metadata server for the machine type, and warns if there is no server.
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
