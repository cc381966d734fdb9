"""Convert HDR video (BT.2100: PQ or HLG, with BT.2020 primaries) to SDR (BT.709).

1. Signal to linear light in units of reference white, which is 203 cd/m² (BT.2408). PQ: the EOTF. HLG: the inverse OETF
   and the OOTF `luminance^0.2` of a display with a peak of 1000 cd/m².
2. BT.2020 to BT.709 primaries (BT.2087). Colors outside of BT.709 are clipped.
3. Tone curve. With m = max(R, G, B), all three are scaled by `curve(m) / m`, which keeps the hue:

       curve(m) = m                                            m ≤ k
       curve(m) = k + (1 − k)·t·(1 + t/T²)/(1 + t)             m > k    (extended Reinhard)

   with k = 0.5, t = (m − k)/(1 − k), and T the t of m = 1000/203. A peak of 1000 cd/m² becomes 1 and reference white
   0.75; all up to half of reference white is unchanged.
4. Linear light to signal with the inverse of BT.1886: L^(1/2.4).
"""

import functools

import numpy as np
from jaxtyping import Float, UInt8, UInt16

TRANSFERS = {16: "PQ", 18: "HLG"}  # by `color_trc` of FFmpeg
REFERENCE_WHITE, PEAK = 203.0, 1000.0  # cd/m²
KNEE = 0.5  # in units of reference white
BT2020_LUMA = np.array([0.2627, 0.6780, 0.0593], np.float32)
BT2020_TO_BT709 = np.array(
    [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]], np.float32
)
ROWS = 64  # of a frame that are converted at a time, so that the intermediate arrays are small


def to_sdr(signal: UInt16[np.ndarray, "H W 3"], transfer: str) -> UInt8[np.ndarray, "H W 3"]:
    """HDR R'G'B', of 16 bits, to SDR. `transfer` is "PQ" or "HLG"."""
    sdr, to_linear = np.empty(signal.shape, np.uint8), _linear_light(transfer)
    for row in range(0, len(signal), ROWS):
        light = to_linear[signal[row : row + ROWS]]
        if transfer == "HLG":
            light *= (light @ BT2020_LUMA)[..., None] ** 0.2
        light = light * np.float32((PEAK if transfer == "HLG" else 1) / REFERENCE_WHITE) @ BT2020_TO_BT709.T
        brightest = light.max(-1, keepdims=True)
        light *= np.where(brightest > KNEE, tone_curve(brightest) / np.maximum(brightest, KNEE), 1)
        sdr[row : row + ROWS] = np.rint(255 * np.clip(light, 0, 1) ** np.float32(1 / 2.4))
    return sdr


def tone_curve(light: Float[np.ndarray, "*s"]) -> Float[np.ndarray, "*s"]:
    t, most = np.maximum(light - KNEE, 0) / (1 - KNEE), (PEAK / REFERENCE_WHITE - KNEE) / (1 - KNEE)
    return np.minimum(light, KNEE) + (1 - KNEE) * t * (1 + t / most**2) / (1 + t)


@functools.cache
def _linear_light(transfer: str) -> Float[np.ndarray, "65536"]:
    """For each signal, PQ: cd/m²; HLG: light of the scene from 0 to 1."""
    signal = np.arange(65536) / 65535
    if transfer == "PQ":
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        root = signal ** (1 / m2)
        light = 10_000 * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)
    else:
        a = 0.17883277
        b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    return light.astype(np.float32)
