"""Triton kernel that gathers, augments and normalizes a batch of images.

Arguments in capitals are compile-time constants: NAME_N, NAME_C, ... are the strides of `name` in elements along that
dimension. N alone is not: clients have different numbers of samples, and each would be compiled anew.
"""

import triton
import triton.language as tl

GATHER_TILE = (1024, 4)
"""BLOCK and warps: 8 elements a thread, one store of 16 bytes in 16-bit types, two in fp32. Not yet timed."""


# The slices of an epoch's permutation are not all aligned; read one element a program, they need not be.
@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["labels", "indices", "augmentation"])
def gather_kernel(
    images,  # [N, C, H, W] uint8
    labels,  # [N] int64
    indices,  # [B] integer
    mean,  # [C] fp32
    std,  # [C] fp32
    augmentation,  # [B, 3] int32: dy, dx, flip; or None
    x,  # [B, C, H, W] out, contiguous or, with CHANNELS_LAST, in the order [B, H, W, C]
    y,  # [B] int64 out, contiguous
    N,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    IMAGES_N: tl.constexpr,
    IMAGES_C: tl.constexpr,
    IMAGES_H: tl.constexpr,
    IMAGES_W: tl.constexpr,
    LABELS_N: tl.constexpr,
    INDICES_B: tl.constexpr,
    MEAN_C: tl.constexpr,
    STD_C: tl.constexpr,
    AUGMENTATION_B: tl.constexpr,
    AUGMENTATION_K: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program owns BLOCK neighbours in memory of one sample's x; the first of a sample also owns its y."""
    SIZE: tl.constexpr = C * H * W
    CHUNKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    sample = (tl.program_id(0) // CHUNKS).to(tl.int64)  # B · SIZE may pass 2³¹
    chunk = tl.program_id(0) % CHUNKS
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    if CHANNELS_LAST:
        c, h, w = at % C, at // (C * W), at // C % W
    else:
        c, h, w = at // (H * W), at // W % H, at % W

    index = tl.load(indices + sample * INDICES_B).to(tl.int64)
    known = (index >= 0) & (index < N)
    live = at < SIZE
    inside = at < tl.where(known, SIZE, 0)  # not `live & known`: the interpreter makes integers of that
    if augmentation is not None:
        drawn = augmentation + sample * AUGMENTATION_B
        flip = tl.load(drawn + 2 * AUGMENTATION_K)
        h += tl.load(drawn)
        w = tl.where(flip != 0, W - 1 - w, w) + tl.load(drawn + AUGMENTATION_K)
        inside &= (h >= 0) & (h < H) & (w >= 0) & (w < W)
    place = c.to(tl.int64) * IMAGES_C + h.to(tl.int64) * IMAGES_H + w.to(tl.int64) * IMAGES_W
    pixel = tl.load(images + index * IMAGES_N + place, mask=inside, other=0).to(tl.float32)
    m = tl.load(mean + c * MEAN_C, mask=live, other=0.0)
    s = tl.load(std + c * STD_C, mask=live, other=1.0)
    # Rounded divisions, as PyTorch's on the CPU: the default one is off by up to 2 ulp.
    value = tl.div_rn(tl.div_rn(pixel, tl.full([BLOCK], 255, tl.float32)) - m, s)
    value = tl.where(known, value, float("nan"))
    tl.store(x + sample * SIZE + at, value.to(x.dtype.element_ty), mask=live)
    if chunk == 0:
        tl.store(y + sample, tl.load(labels + index * LABELS_N, mask=known, other=-1))
