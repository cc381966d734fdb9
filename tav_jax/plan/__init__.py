"""`tav plan`: the programs of a run compiled for a TPU that is not there, and what they would need of it.

The compiler is the TPU's own (`libtpu`), so what it says of memory is what the chip would say.
"""

import importlib.util
import os

from tav_jax.errors import MissingError

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # No question to a cloud's metadata server, and no warnings that there is none.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def prepare() -> None:
    """To be called before JAX is imported: it reads its platform once."""
    if importlib.util.find_spec("libtpu") is None:
        raise MissingError("`tav plan` compiles with the TPU's own compiler, which is not here; pip install libtpu")
    os.environ.update(ENVIRONMENT)
