"""Reuse of deep features, against a plain loop that calls the whole UNet and its last layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tav_jax import InputError, TuneAVideo
from tav_jax.demo.edits import MODEL
from tav_jax.diffusion import programs
from tav_jax.diffusion.schedule import ddim_step
from tav_jax.models import Conditioning

LATENTS = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 16, 16, 4)), jnp.float32)


@pytest.fixture(scope="module")
def demo() -> TuneAVideo:
    return TuneAVideo.from_pretrained(MODEL, dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize("interval", [2, 3])
def test_reuse_equals_a_plain_loop(demo, interval):
    """5 steps, so that K does not divide them, in one call and in chunks; and in windows of the whole clip."""
    unet, steps, guidance = demo.components.unet, demo.schedule.sampling_steps(5), 3.0
    text = demo.encode_text(["", "a red circle on grass"])

    @jax.jit
    def whole(unet, x, t):
        return unet(x, t, Conditioning(text), return_features=True)

    @jax.jit
    def last_layer(unet, x, t, features):
        return unet(x, t, Conditioning(text, features=features))

    x, features = LATENTS, None
    with demo.jit_context():
        for i, (t, alpha, next_alpha) in enumerate(zip(*steps[:3], strict=True)):
            arguments = (unet, jnp.concatenate([x, x]), jnp.full(2, t))
            if i % interval == 0:
                output, features = whole(*arguments)
                # With features of the same step, the last layer is the whole network.
                np.testing.assert_allclose(last_layer(*arguments, features), output, atol=1e-5)
            else:
                output = last_layer(*arguments, features)
            unconditional, conditional = output
            guided = unconditional + guidance * (conditional - unconditional)
            x = ddim_step(x, guided[None], alpha, next_alpha, "epsilon")
    options = {"latents": LATENTS, "steps": 5, "guidance": guidance, "feature_reuse": interval}
    plain = demo.sample("a red circle on grass", **options)
    np.testing.assert_allclose(plain.latents, x, atol=1e-4 * float(jnp.abs(x).max()))
    chunks = demo.sample("a red circle on grass", progress=lambda done: None, **options)
    np.testing.assert_allclose(chunks.latents, plain.latents, rtol=1e-5, atol=1e-5)
    compiled = programs.denoise_loop._cache_size(), programs.empty_cache._cache_size()
    demo.sample("a blue star", **options | {"latents": 2 * LATENTS, "guidance": 5.0})
    assert (programs.denoise_loop._cache_size(), programs.empty_cache._cache_size()) == compiled


@pytest.mark.slow
def test_an_interval_of_1_is_off(sd1):
    tav = sd1.tav
    plain = tav.sample("red", latents=sd1.latents, steps=2, guidance=3.0).latents
    compiled = programs.denoise_loop._cache_size()
    assert np.array_equal(tav.sample("red", latents=sd1.latents, steps=2, guidance=3.0, feature_reuse=1).latents, plain)
    assert programs.denoise_loop._cache_size() == compiled


@pytest.mark.slow
def test_reuse_with_editing_strength_and_windows(sd1):
    """A mask of zeros returns the source; word maps are those of the last whole step."""
    source = jnp.asarray(np.random.default_rng(1).normal(size=(4, 1, 4, 8, 8, 4)), jnp.float32)
    options = {"source": source, "source_prompt": "a red square", "steps": 3, "guidance": 3.0, "strength": 0.7}
    options |= {"feature_reuse": 2, "window": (3, 1), "latents": source[-1]}
    edit = sd1.tav.sample("a blue square", mask=np.zeros((8, 8)), blend_start=0.0, **options)
    np.testing.assert_allclose(edit.latents, source[0], atol=1e-6)
    free = sd1.tav.sample("a blue square", blend_words=("blue",), **options)
    assert np.isfinite(free.latents).all()


@pytest.mark.parametrize("interval", [0, 101, True])
def test_an_interval_out_of_range_is_refused(sd1, interval):
    with pytest.raises(InputError, match=r"feature_reuse is .*; it must be a whole number from 1 to 100"):
        sd1.tav.sample("red", latents=sd1.latents, steps=2, feature_reuse=interval)
