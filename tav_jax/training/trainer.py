"""`Trainer`: the training state of a pipeline, its step function, and the loop of `TuneAVideo.tune`."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from tav_jax.config import TRAINABLE, remat_name
from tav_jax.distributed import memory, sharding
from tav_jax.io.progress import progress_bar
from tav_jax.training.train_step import (
    Hyperparameters,
    Posterior,
    Replay,
    TrainState,
    check_trainable,
    make_step_function,
    run_steps,
    trainable_filter,
)

if TYPE_CHECKING:
    from tav_jax.pipeline import TuneAVideo


class TuningResult(NamedTuple):
    losses: Float[np.ndarray, "N"]
    grad_norms: Float[np.ndarray, "N"]  # before clipping


class Trainer:
    def __init__(
        self,
        tav: "TuneAVideo",
        data: Posterior | Replay,
        text: Float[Array, "1 L e"],
        *,
        hyper: Hyperparameters,
        seed: int = 33,
        trainable: Sequence[str] = TRAINABLE,
        remat: str | bool = "block",
        fsdp: bool = False,
    ):
        """Start from the pipeline's weights. With `fsdp` the state is sharded over all devices."""
        remat = remat_name(remat)
        check_trainable(tav.components.unet, trainable)
        graph, params, frozen = nnx.split(tav.components.unet, trainable_filter(trainable), ...)
        self.parameters = sum(x.size for x in jax.tree.leaves(params))
        self.workload = tav.memory_estimator.tuning(data[0], self.parameters, remat=remat, fsdp=fsdp)
        self.tav, self.trainable = tav, trainable

        @contextlib.contextmanager
        def context() -> Iterator[None]:
            with memory.out_of_memory_errors(self.workload), tav.jit_context():
                yield

        options = {"seed": seed, "remat": remat, "fsdp": fsdp, "context": context}
        self.step_fn = make_step_function(graph, frozen, data, text, tav.schedule, hyper, **options)
        with memory.checked(self.workload):
            self.state = sharding.device_put(TrainState.create(params), tav.mesh, fsdp=fsdp)

    def run(self, steps: int, *, show_bar: bool | None = None) -> TuningResult:
        """Train for `steps` steps and load the trained weights into the pipeline's UNet."""
        metrics = []
        with progress_bar(steps, "tuning", show_bar) as bar:
            for progress in run_steps(self.step_fn, self.state, 0, steps):
                self.state = progress.state
                for _, values in progress.metrics:
                    bar.set_postfix(loss=f"{values.loss:.4f}", refresh=False)
                    bar.update()
                    metrics.append(values)
        self.load_into_unet()
        return TuningResult(*np.array(metrics).T)

    def load_into_unet(self) -> None:
        """Update the pipeline's UNet. Its weights are valid until the next step, which donates their buffers."""
        nnx.update(self.tav.components.unet, sharding.device_put(self.state.params, self.tav.mesh))

    def offload(self) -> None:
        """Move the weights that training does not use to host memory: those of the VAE and the text encoder, and the
        UNet's own copy of the trained ones. A call that needs them transfers them again."""
        components = self.tav.components
        for module in (components.vae, components.text_encoder):
            nnx.update(module, jax.device_get(nnx.state(module)))
        nnx.update(components.unet, jax.device_get(nnx.state(components.unet, trainable_filter(self.trainable))))
