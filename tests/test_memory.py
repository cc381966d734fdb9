"""Memory: estimates against the device's capacity, the changes that are suggested, and allocation failures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tav_jax import Clip
from tav_jax.diffusion import programs
from tav_jax.distributed import memory
from tav_jax.errors import InputError, OutOfMemoryError
from tav_jax.training import train_step
from tav_jax.training.train_step import Hyperparameters, Posterior
from tav_jax.training.trainer import Trainer

CLIP = Clip(np.zeros((24, 64, 64, 3), np.uint8), 8.0)
LATENTS = jnp.zeros((1, 24, 16, 16, 4))


def error_of(call, *args) -> str:
    with pytest.raises(OutOfMemoryError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def set_capacity(monkeypatch, size: int) -> None:
    monkeypatch.setenv(memory.OVERRIDE, str(size / 2**30))


def trainer(tav) -> Trainer:
    return Trainer(tav, Posterior(LATENTS, LATENTS), tav.encode_text(""), hyper=Hyperparameters())


def test_every_suggestion_fits_and_the_next_larger_one_does_not(sd1, monkeypatch):
    workload = sd1.tav.memory_estimator.tuning(LATENTS, 10_000, remat="block", fsdp=False)
    shape, needed = memory.Shape, workload.bytes_needed
    whole = needed(workload.shape, 1)
    for share in (0.99, 0.7, 0.4):
        limit = int(whole * share)
        set_capacity(monkeypatch, limit)
        message = error_of(memory.check, workload)
        assert message.startswith("tuning on 24 frames of 64×64 takes ")
        assert memory.OVERRIDE in message
        frames = int(message.split("use ")[1].split(" frame")[0])
        assert needed(shape(frames, 64, 64), 1) <= limit < needed(shape(frames + 1, 64, 64), 1)
        side = int(message.split(" or ")[1 + ("more on" in message)].split("×")[0])
        assert side % 4 == 0
        assert needed(shape(24, side, side), 1) <= limit < needed(shape(24, side + 4, side + 4), 1)
        devices = int(message.split(" devices")[0].split()[-1])
        assert needed(workload.shape, devices) <= limit < needed(workload.shape, devices - 1)
    set_capacity(monkeypatch, whole + 1000)
    memory.check(workload)


def test_without_remat_it_is_suggested(sd1, monkeypatch):
    none, block = (
        sd1.tav.memory_estimator.tuning(LATENTS, 10_000, remat=remat, fsdp=False) for remat in ("none", "block")
    )
    limit = block.bytes_needed(block.shape, 1)
    assert limit < none.bytes_needed(none.shape, 1)
    set_capacity(monkeypatch, limit + 1000)
    assert 'remat="block"' in error_of(memory.check, none)


def test_remat_is_none_where_it_fits_with_a_margin(sd1, monkeypatch):
    """Else `block`, or `level` where not even the lower bound for `block` fits; the same in all processes."""

    def estimate(remat: str) -> memory.Workload:
        return sd1.tav.memory_estimator.tuning(LATENTS, 10_000, remat=remat, fsdp=False)

    def chosen(total, *anywhere) -> str:
        return memory.choose_remat(estimate, total, 1.5, *anywhere)

    needed = {name: estimate(name).bytes_needed(estimate(name).shape, 1) for name in ("none", "block", "level")}
    assert needed["none"] > needed["block"] > needed["level"]
    limits = (int(1.5 * needed["none"]) + 1, int(1.5 * needed["none"]) - 1, needed["block"], needed["block"] - 1)
    assert [chosen(limit) for limit in limits] == ["none", "block", "block", "level"]
    assert chosen(None) == "block"
    assert chosen(limits[0], lambda flag: True) == "level"  # another process has less memory
    tuning = trainer(sd1.tav)
    assert (tuning.remat, tuning.arguments["remat"]) == ("none", "none")
    set_capacity(monkeypatch, int(2.9 * tuning.workload.bytes_needed(tuning.workload.shape, 1)))
    assert trainer(sd1.tav).remat == "block"  # on a CPU, the margin is larger


def workloads(tav, step) -> dict:
    return {
        "tuning on": step,
        "inverting": lambda: tav.invert(LATENTS, steps=2),
        "sampling": lambda: tav.sample("x", latents=LATENTS, steps=2),
        "encoding": lambda: tav.posterior(CLIP),
        "decoding": lambda: tav.decode_video(LATENTS),
    }


def test_every_computation_is_checked_before_it_begins(sd1, monkeypatch):
    tav = sd1.tav
    text = tav.encode_text("")
    set_capacity(monkeypatch, 107_374)
    monkeypatch.setattr(tav, "encode_text", lambda _: text)
    for name, call in workloads(tav, lambda: trainer(tav)).items():
        assert error_of(call).startswith(f"{name} 24 frames of 64×64 takes")
    assert "the weights of " in error_of(sd1.load)


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), MemoryError()])
def test_an_allocation_failure_is_one_sentence_with_suggestions(sd1, monkeypatch, error):
    def fail(*_, **__):
        raise error

    for name in ("denoise_loop", "decode_frames", "encode_frames"):
        monkeypatch.setattr(programs, name, fail)
    monkeypatch.setattr(train_step, "tune_step", fail)
    tuning = trainer(sd1.tav)
    for name, call in workloads(sd1.tav, lambda: tuning.step_fn(tuning.state, 0)).items():
        message = error_of(call)
        assert message.startswith(f"memory ran out while {name} 24 frames of 64×64 on this cpu; use ")


def test_other_device_errors_are_not_caught(sd1, monkeypatch):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(programs, "denoise_loop", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        sd1.tav.invert(np.zeros((1, 2, 8, 8, 4), np.float32), steps=2)


@pytest.mark.parametrize("value", ["much", "0", "-3", "nan", "inf"])
def test_an_invalid_override_is_refused(monkeypatch, value):
    monkeypatch.setenv(memory.OVERRIDE, value)
    with pytest.raises(InputError, match=memory.OVERRIDE):
        memory.capacity()


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    monkeypatch.delenv(memory.OVERRIDE, raising=False)
    (tmp_path / "memory.max").write_text(f"{64 << 20}\n")
    monkeypatch.setattr(memory, "LIMITS", (tmp_path / "memory.max", tmp_path / "nowhere"))
    assert memory.capacity() == (64 << 20) // jax.local_device_count()
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.capacity() > 64 << 20
