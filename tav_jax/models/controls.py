"""Two-branch editing inside the UNet: the edits take intermediate results from the source, a row of the same batch."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tav_jax.kernels import attention_batch_size


class AttentionControls(NamedTuple):
    """What the edits take from the source in one step.

    The batch has R rows: the source; with guidance, an unconditional row for each of P prompts; a row for each prompt.
    A batch may hold several clips that are edited alike: then it has a multiple of R rows, first all source rows.
    """

    self_attention: Bool[Array, ""]  # queries and keys of spatial attention in the decoder
    features: Bool[Array, ""]  # the residual of one resnet in the decoder
    cross_attention: Bool[Array, ""]  # attention to the tokens of the prompt, by the three fields below
    mapping: Float[Array, "P L L"]  # from tokens of the source prompt to tokens of each prompt
    shared: Float[Array, "P L"]  # 1 for a token whose attention is the source's, 0 for one that keeps its own
    equalizer: Float[Array, "P L"]  # factor on the attention to each token
    words: Float[Array, "R L"]  # 1 for tokens whose attention maps the network returns; 0 in unconditional rows

    @property
    def rows(self) -> int:
        return len(self.words)


def take_from_source(x: Float[Array, "B *rest"], switch: Bool[Array, ""], rows: int) -> Float[Array, "B *rest"]:
    """The source's rows of x in place of all rows where the switch is on; `rows` is R."""
    source = x[: len(x) // rows]  # [clips, ...]
    return jnp.where(switch, jnp.tile(source, (rows,) + (1,) * (x.ndim - 1)), x)


def controlled_cross_attention(
    q: Float[Array, "B F T N D"], k: Float[Array, "B L N D"], v: Float[Array, "B L N D"], controls: AttentionControls
) -> tuple[Float[Array, "B F T N D"], Float[Array, "M F T"]]:
    """Cross-attention with prompt-to-prompt control, and the attention maps of `controls.words`.

    With the softmax P_s of the source and P of an edit, the edit uses `(P_s @ mapping · shared + P · (1 − shared)) ·
    equalizer`. The maps, of the source and of each prompt, are the probabilities that are used, averaged over heads and
    summed over words. Prompts are short, so the softmax is materialized, for some frames at a time.
    """
    b, f, t, n, d = q.shape
    rows, (prompts, tokens, _) = controls.rows, controls.mapping.shape
    clips = b // rows
    k, v = (x.reshape(rows, clips, *x.shape[1:]) for x in (k, v))

    def frame(q: Float[Array, "B T N D"]):
        q = q.reshape(rows, clips, t, n, d)
        scores = jnp.einsum("rctnd,rclnd->rcntl", q, k, preferred_element_type=jnp.float32) / math.sqrt(d)
        probabilities = jax.nn.softmax(scores, axis=-1)  # [R, clips, N, T, L]
        source, own = probabilities[0], probabilities[rows - prompts :]  # [clips, N, T, L], [P, clips, N, T, L]
        mapped = jnp.einsum("cntl,plm->pcntm", source, controls.mapping, precision="highest")
        shared, equalizer = (x[:, None, None, None] for x in (controls.shared, controls.equalizer))
        edited = (mapped * shared + own * (1 - shared)) * equalizer
        edited = jnp.where(controls.cross_attention, edited, own)
        probabilities = jnp.concatenate([probabilities[: rows - prompts], edited])
        out = jnp.einsum("rcntl,rclnd->rctnd", probabilities.astype(v.dtype), v)
        shown = jnp.concatenate([probabilities[:1], edited])  # [1 + P, clips, N, T, L]
        words = jnp.concatenate([controls.words[:1], controls.words[rows - prompts :]])
        maps = jnp.einsum("rcntl,rl->rct", shown, words, precision="highest") / n
        return out.reshape(b, t, n, d), maps.reshape(-1, t)

    batch_size = attention_batch_size(2 * b * t, tokens, n)  # scores, and the probabilities made of them
    frames_first = jax.lax.map(frame, jnp.swapaxes(q, 0, 1), batch_size=min(batch_size, f))
    return tuple(jnp.swapaxes(x, 0, 1) for x in frames_first)  # pyright: ignore[reportReturnType]
