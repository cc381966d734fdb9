"""Two-branch editing: the source is denoised beside the edits, which take attention and features from it.

The rows of a batch are the source, on the latents of its inversion, and the rows of guidance for P prompts. The
methods, each of which is switched on for the first steps of the loop:

- self-attention injection and feature injection: Plug-and-Play (arXiv 2211.12572);
- cross-attention control: prompt-to-prompt (arXiv 2208.01626);
- blending: outside a mask, the latents after each step are the source's. The mask is given, or found from the
  attention to words.

The source row has the latents of the inversion in every step (direct inversion, arXiv 2310.01506), so errors of its
predictions do not accumulate.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tav_jax.diffusion.alignment import TokenizedPrompt, align, blend_tokens, equalizers
from tav_jax.diffusion.guidance import guide
from tav_jax.diffusion.network import Network
from tav_jax.diffusion.samplers import AfterStep, Denoiser
from tav_jax.diffusion.schedule import Steps
from tav_jax.models import AttentionControls, Conditioning, UNetConfig
from tav_jax.models.resnet import resize_nearest
from tav_jax.models.unet import level_size

MASK_THRESHOLD = 0.3  # of the largest value of a word's map


class StepControls(NamedTuple):
    """What differs from step to step: the field `controls` of `Steps`."""

    self_attention: Bool[Array, "*N"]
    features: Bool[Array, "*N"]
    cross_attention: Bool[Array, "*N"]
    blend: Bool[Array, "*N"]
    source: Float[Array, "*N 1 F h w c"]  # the source's latents before the step
    next_source: Float[Array, "*N 1 F h w c"]  # and after it


class Editing(NamedTuple):
    """What is the same in all steps."""

    mapping: Float[Array, "P L L"]  # these three: see `AttentionControls`
    shared: Float[Array, "P L"]
    equalizer: Float[Array, "P L"]
    words: Float[Array, "S L"]  # tokens of the words that may change, of the source and of each prompt
    word_mask: Bool[Array, ""]  # whether `words` restrict the edit
    mask: Float[Array, "1 F h w 1"]  # 1 where the edit may change the source

    def initial_state(self, config: UNetConfig) -> "EditingState":
        _, frames, height, width, _ = self.mask.shape
        tokens = math.prod(level_size(height, width, config.word_map_level(height, width)))
        return EditingState(jnp.zeros((len(self.words), frames, tokens), jnp.float32))


class EditingState(NamedTuple):
    word_maps: Float[Array, "S F T"]  # sums over the steps so far
    network: Any = None  # carry of the network


def two_branch(
    network: Network, conditioning: Conditioning, editing: Editing, scale: Float[Array, ""] | None
) -> tuple[Denoiser, AfterStep]:
    """The denoiser of the edits, and what is applied to their latents after each step. `conditioning` has the rows
    [source; unconditional; conditional], without guidance (`scale` None) [source; conditional]."""
    prompts = len(editing.mapping)

    def denoise(latents, step: Steps, carry: EditingState):
        now: StepControls = step.controls
        rows = [now.source, latents] if scale is None else [now.source, latents, latents]
        source_words, edit_words = editing.words[:1], editing.words[1:]
        words = [source_words, edit_words] if scale is None else [source_words, 0 * edit_words, edit_words]
        controls = AttentionControls(
            now.self_attention,
            now.features,
            now.cross_attention,
            editing.mapping,
            editing.shared,
            editing.equalizer,
            jnp.concatenate(words),
        )
        controlled = conditioning._replace(controls=controls)
        output, cache = network(jnp.concatenate(rows), step, controlled, carry.network)
        maps: Any = output.word_maps
        carry = EditingState(carry.word_maps + maps, cache)
        edited = output.prediction[1:]
        return (edited if scale is None else guide(edited[:prompts], edited[prompts:], scale)), carry

    def blend(latents, step: Steps, carry: EditingState):
        now: StepControls = step.controls
        mask = edit_mask(carry.word_maps, editing)
        blended = mask * latents + (1 - mask) * now.next_source
        return jnp.where(now.blend, blended, latents)

    return denoise, blend


def edit_mask(word_maps: Float[Array, "S F T"], editing: Editing) -> Float[Array, "P F h w 1"]:
    """1 where an edit may change the source: inside the given mask and, if words are given, where the source or the
    edit shows them. `word_maps`: of the source and of each prompt, S = 1 + P."""
    size = editing.mask.shape[2], editing.mask.shape[3]
    level = next(i for i in range(3) if math.prod(level_size(*size, i)) == word_maps.shape[-1])
    height, width = level_size(*size, level)
    maps = word_maps.reshape(*word_maps.shape[:2], height, width, 1)  # [1 + P, F, h2, w2, 1]
    window = (1, 1, 3, 3, 1)
    maps = jax.lax.reduce_window(maps, -jnp.inf, jax.lax.max, window, (1,) * 5, "SAME")
    maps = resize_nearest(maps, size)  # [1 + P, F, h, w, 1]
    largest = jnp.max(maps, axis=(2, 3), keepdims=True)
    shown = (maps > MASK_THRESHOLD * largest) & (largest > 0)
    allowed = shown[:1] | shown[1:] | ~editing.word_mask  # [P, F, h, w, 1]
    return editing.mask * allowed


def make_editing(
    source: TokenizedPrompt,
    prompts: Sequence[TokenizedPrompt],
    mask: Float[Array, "1 F h w 1"],
    *,
    equalizer: Mapping[str, Any],
    blend_words: Sequence[str],
) -> Editing:
    """The arrays for edits of a source prompt. `equalizer`: factors on the attention to words of the prompts;
    `blend_words`: words of any of the prompts, outside of which the source is kept."""
    alignments = [align(source, prompt) for prompt in prompts]
    return Editing(
        jnp.asarray(np.stack([alignment.mapping for alignment in alignments])),
        jnp.asarray(np.stack([alignment.shared for alignment in alignments])),
        jnp.asarray(equalizers(prompts, equalizer)),
        jnp.asarray(blend_tokens(source, prompts, blend_words)),
        jnp.asarray(bool(blend_words)),
        mask,
    )


def step_controls(
    trajectory: Float[Array, "K 1 F h w c"],
    *,
    self_attention_steps: float,
    feature_steps: float,
    cross_attention_steps: float,
    blend_start: float,
) -> StepControls:
    """`trajectory`: the source's latents before the first step and after each of N steps, K = N + 1. Each of the
    others is a share of the steps: the controls apply in the first ones, blending after the step at `blend_start`."""
    steps = len(trajectory) - 1

    def count(share: float) -> float:
        return round(share * steps, 6)  # in floating point, 0.55 · 20 is above 11

    index = np.arange(steps)
    return StepControls(
        jnp.asarray(index < count(self_attention_steps)),
        jnp.asarray(index < count(feature_steps)),
        jnp.asarray(index < count(cross_attention_steps)),
        jnp.asarray(index >= math.floor(count(blend_start))),
        trajectory[:-1],
        trajectory[1:],
    )
