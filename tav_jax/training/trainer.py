"""`Trainer`: the training state of a pipeline, its step function, and the loop of `TuneAVideo.tune`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from tav_jax.config import TRAINABLE, remat_name
from tav_jax.distributed import memory, processes, sharding
from tav_jax.io import validation
from tav_jax.io.progress import MeanLoss, progress_bar
from tav_jax.models import Conditioning
from tav_jax.models.arguments import FlatTree, Static
from tav_jax.training import nonfinite, train_step
from tav_jax.training.train_step import Hyperparameters, Posterior, Replay, StepMetrics, TrainState, trainable_filter

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
        seed: Any = 33,
        trainable: Sequence[str] = TRAINABLE,
        remat: str | bool = "auto",
        fsdp: bool = False,
        window: int = 0,
    ):
        """Start from the pipeline's weights. With `fsdp` the state is sharded over all devices. `window`: the frames of
        a random window that each step trains on; 0: all. `remat`: see `models/remat.py`; with "auto", the choice is
        the attribute `remat`."""
        train_step.check_trainable(tav.components.unet, trainable)
        self.tav, self.data, self.trainable, self.key = tav, data, trainable, validation.random_key(seed)
        graph, params, frozen = nnx.split(tav.components.unet, trainable_filter(trainable), ...)
        self.graph, self.frozen = Static(graph), FlatTree(frozen)  # flattened and hashed once, not in every step
        self.arguments: dict[str, Any] = {
            "conditioning": Conditioning(text),
            "alphas_cumprod": jnp.asarray(tav.schedule.alphas_cumprod),
            "hyper": Hyperparameters(*(jnp.float32(x) for x in hyper)),
            "prediction": tav.schedule.prediction,
            "fsdp": fsdp,
        }
        self.parameters = sum(x.size for x in jax.tree.leaves(params))
        self.window = validation.training_window(window, data[0].shape[1])

        def workload(remat: str) -> memory.Workload:
            options = {"remat": remat, "fsdp": fsdp, "window": self.window}
            return tav.memory_estimator.tuning(data[0], self.parameters, **options)

        if (remat := remat_name(remat)) == "auto":
            remat = memory.choose_remat(workload, memory.capacity(), memory.margin(), processes.any_process)
        self.remat = self.arguments["remat"] = remat
        self.workload = workload(remat)
        with memory.checked(self.workload):
            self.state = sharding.device_put(TrainState.create(params), tav.mesh, fsdp=fsdp)

    def step_fn(self, state: TrainState, step: int) -> tuple[TrainState, StepMetrics]:
        """One jitted training step. `step` counts from 0."""
        graph, frozen, data = self.graph, self.frozen, self.data
        with memory.out_of_memory_errors(self.workload), self.tav.jit_context():
            if isinstance(data, Posterior):
                arguments = (graph, state, frozen, self.key, jnp.int32(step), *data)
                return train_step.tune_step(*arguments, **self.arguments, window=self.window)
            example = train_step.TrainExample(data.latents, data.noise[step][None], data.timesteps[step])
            return train_step.replay_step(graph, state, frozen, example, **self.arguments)

    def run(self, steps: int, *, show_bar: bool | None = None) -> TuningResult:
        """Train for `steps` steps and load the trained weights into the pipeline's UNet, if they are finite."""
        metrics = []
        advice = "the pipeline keeps its weights. Use a lower learning_rate, or load the model with dtype='float32'."
        with progress_bar(steps, "tuning", show_bar) as bar:
            loss = MeanLoss(bar)
            for progress in train_step.run_steps(self.step_fn, self.state, 0, steps):
                self.state = progress.state
                for step, values in progress.metrics:
                    nonfinite.check_metrics(
                        step, {"loss": float(values.loss), "grad_norm": float(values.grad_norm)}, advice
                    )
                    loss.step(float(values.loss))
                    metrics.append(values)
            nonfinite.check_state(steps, self.state, advice)
        self.load_into_unet()
        return TuningResult(*np.array(metrics).reshape(-1, 2).T)

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
