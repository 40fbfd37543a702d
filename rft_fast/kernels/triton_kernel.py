# mypy: ignore-errors
"""The Triton kernel: Philox, the mapping to noise, and the write, in Triton's language.

Imported by ``triton.py`` alone, and only when Triton is requested: TRITON_INTERPRET decides at that moment
whether its functions are compiled or interpreted. Algorithms and constants are those of ``csrc/element.h``,
which explains them.

Each product and sum of the formula is rounded on its own (the launch passes enable_fp_fusion=False), as in
every backend. ``tl.fma`` is used in the polynomials, because normals are specified to 2e-6 and not to the
bit, and for products with a power of two, which are exact.
"""

import triton
import triton.language as tl

# The purpose words of contract.py.
NOISE_PURPOSE = tl.constexpr(0)
MASK_PURPOSE = tl.constexpr(1)


@triton.jit
def philox(c0, c1, c2, c3, key0, key1):
    """Philox4x32-10: a counter of four words and a key of two -> four words, all uint32."""
    for _ in tl.static_range(10):
        # One wide multiplication each (IMAD.WIDE.U32); tl.umulhi and * would be two (IMAD.HI, IMAD).
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ key0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c3 = p0.to(tl.uint32)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def words(block, draw, purpose, key0, key1):
    """The four words of each block. block: int64 [n]; draw, purpose, keys: uint32 scalars."""
    low = block.to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    c2 = tl.zeros_like(low) + draw
    c3 = tl.zeros_like(low) + purpose
    return philox(low, high, c2, c3, key0, key1)


@triton.jit
def in_order(x0, x1, x2, x3):
    """Four values per block, each [n] -> [4 n], in the order of the elements.

    The thread that computes a block then owns four consecutive elements, which one wide access reads or
    writes: the joins and reshapes only rename registers. Four strided accesses per block would avoid them,
    but each would touch all memory sectors of the tile.
    """
    return tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))


@triton.jit
def radius(x):
    """sqrt(-2 ln((x + 1/2) / 2^32)), x: int32 words."""
    g = tl.fma(x.to(tl.float32), 2.0**-32, 2.0**-33)
    u = tl.where(x < 0, g + 1.0, g)
    bits = u.to(tl.int32, bitcast=True) - 0x3F3504F3
    exponent = bits >> 23
    m = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    f = tl.where(exponent == 0, g, m - 1.0)
    q = tl.fma(f, 0.20213786, -0.3244516)
    q = tl.fma(q, f, 0.3450166)
    q = tl.fma(q, f, -0.3980033)
    q = tl.fma(q, f, 0.49939817)
    q = tl.fma(q, f, -0.6667012)
    q = tl.fma(q, f, 1.0000073)
    q = tl.fma(q, f, -1.9999999)
    # A GPU's root is within 2^-23 (relative) of the true one, and so a normal within 1.93e-6 in the worst
    # case. The correctly rounded root, for 1.57e-6, adds an eighth to the whole kernel's instructions.
    return tl.sqrt(tl.fma(q, f, exponent.to(tl.float32) * -1.3862944))


@triton.jit
def turn(x):
    """(cos, sin) of 2 pi (x + 1/2) / 2^32, x: int32 words."""
    t = tl.fma((x << 2).to(tl.float32), 2.0**-34, 2.0**-33)
    z = t * t
    s = tl.fma(z, -75.264832, 81.588852)
    s = tl.fma(s, z, -41.341633)
    s = tl.fma(s, z, 6.283185) * t
    c = tl.fma(z, -83.592613, 64.92125)
    c = tl.fma(c, z, -19.739153)
    c = tl.fma(c, z, 1.0)
    quarter = x.to(tl.uint32, bitcast=True) + 0x20000000
    odd = (quarter & 0x40000000) != 0
    cos = tl.where(odd, s, c).to(tl.uint32, bitcast=True) ^ ((quarter + 0x40000000) & 0x80000000)
    sin = tl.where(odd, c, s).to(tl.uint32, bitcast=True) ^ (quarter & 0x80000000)
    return cos.to(tl.float32, bitcast=True), sin.to(tl.float32, bitcast=True)


@triton.jit
def uniform(x):
    """2 (x + 1/2) / 2^32 - 1, x: uint32 words."""
    centred = (x ^ 0x80000000).to(tl.int32, bitcast=True).to(tl.float32)
    return tl.fma(centred, 2.0**-31, 2.0**-32)


@triton.jit
def rademacher(x):
    """+1 where the top bit is set, else -1, x: uint32 words."""
    return ((x & 0x80000000) ^ 0xBF800000).to(tl.float32, bitcast=True)


@triton.jit
def noise_pair(xa, xb, NOISE: tl.constexpr):
    """Two uint32 words to two noise values."""
    if NOISE == "normal":
        r = radius(xa.to(tl.int32, bitcast=True))
        cos, sin = turn(xb.to(tl.int32, bitcast=True))
        a, b = cos * r, sin * r
    elif NOISE == "uniform":
        a, b = uniform(xa), uniform(xb)
    else:
        a, b = rademacher(xa), rademacher(xb)
    return a, b


@triton.jit
def lerp(w0, w1, k, BASE: tl.constexpr, MIXED: tl.constexpr):
    w = w1 if BASE else w0
    if MIXED:
        w = w + (w1 - w0) * k
    return w


@triton.jit
def lerp_by_row(w0, w1, k, base):
    """The same where k and base are of the row. An end keeps its bits: it is selected, not computed."""
    w = tl.where(base != 0, w1, w0)
    return tl.where(k != 0, w + (w1 - w0) * k, w)


@triton.jit
def perturbed(w, scale, eps, FACTOR: tl.constexpr):
    if FACTOR == "abs":
        w = w + tl.abs(w) * scale * eps
    elif FACTOR == "square":
        w = w + w * w * scale * eps
    else:
        w = w + scale * eps
    return w


@triton.jit
def noise_at(block, lane, draw, key0, key1, NOISE: tl.constexpr):
    """The noise of single elements: a Philox block for each, of which one of four values is used."""
    x0, x1, x2, x3 = words(block, draw, NOISE_PURPOSE, key0, key1)
    first, second = noise_pair(tl.where(lane < 2, x0, x2), tl.where(lane < 2, x1, x3), NOISE)
    return tl.where((lane & 1) != 0, second, first)


@triton.jit
def mask_at(block, lane, key0, key1):
    """The mask word of single elements."""
    x0, x1, x2, x3 = words(block, 0, MASK_PURPOSE, key0, key1)
    return tl.where(lane < 2, tl.where(lane == 0, x0, x1), tl.where(lane == 2, x2, x3))


@triton.jit
def positions(row, index):
    """Where the noise of elements lies behind the row's first block.

    row: the place's start, four sizes, four strides. index: int64 [n], elements in the order of memory.
    """
    at = tl.zeros_like(index) + tl.load(row)
    for d in tl.static_range(4):
        size = tl.load(row + 4 - d)
        outer = index // size
        at += (index - outer * size) * tl.load(row + 8 - d)
        index = outer
    return at


@triton.jit
def read(pointer, offsets, size, WHOLE: tl.constexpr):
    """Weights of any storage type, as float32. WHOLE: no offset lies beyond the tensor's end."""
    if WHOLE:
        w = tl.load(pointer + offsets)
    else:
        w = tl.load(pointer + offsets, mask=offsets < size, other=0)
    if w.dtype == tl.bfloat16:
        # By its bits: as cheap as a cast, and the interpreter's cast breaks subnormals (Triton 3.9).
        w = (w.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return w.to(tl.float32)


@triton.jit
def narrowed(w, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 to a storage type, rounded to nearest, ties to even."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        # The interpreter's cast truncates (Triton 3.9). A GPU's is right, and half an instruction.
        bits = w.to(tl.uint32, bitcast=True)
        bits = tl.where(w == w, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        narrow = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        narrow = w.to(DTYPE)
    return narrow


@triton.jit
def write_tile(
    out, zeroshot, finetuned, place, start, size, block, k, scale, threshold, flags, key0, key1, draw,
    BASE: tl.constexpr, MIXED: tl.constexpr, NOISE: tl.constexpr, FACTOR: tl.constexpr,
    INTERPOLATED: tl.constexpr, FILL: tl.constexpr, BY_ROW: tl.constexpr, PLACED: tl.constexpr,
    TILE: tl.constexpr, WHOLE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Writes the min(size, TILE) elements at the three pointers, whose first block is ``block``.

    place, start: the row's place, and the tile's first element in the row. PLACED: ``block`` is the row's.
    """
    offsets = tl.arange(0, TILE)
    if PLACED and (NOISE != "none" or FILL != "none"):
        at = positions(place, start + offsets.to(tl.int64))
        blocks = block + (at >> 2)
        lane = at & 3
    else:
        blocks = block + tl.arange(0, TILE // 4)
        lane = 0
    # Weights that cannot reach the output are not read: at alpha = 1 w0, at alpha = 0 w1.
    if BASE == 0 or MIXED or FILL == "zeroshot" or NOISE == "operand":
        w0 = read(zeroshot, offsets, size, WHOLE)
    else:
        w0 = tl.zeros((TILE,), tl.float32)
    if BASE == 1 or MIXED:
        w1 = read(finetuned, offsets, size, WHOLE)
    else:
        w1 = w0
    if FILL != "none":
        if PLACED:
            kept = mask_at(blocks, lane, key0, key1) < threshold
        else:
            x0, x1, x2, x3 = words(blocks, 0, MASK_PURPOSE, key0, key1)
            kept = in_order(x0, x1, x2, x3) < threshold
        if BY_ROW:
            kept = kept | ((flags & 4) == 0)
        w1 = tl.where(kept, w1, w0 if FILL == "zeroshot" else 0.0)
    if NOISE == "operand":
        eps = w0
    elif NOISE != "none":
        if PLACED:
            eps = noise_at(blocks, lane, draw, key0, key1, NOISE)
        else:
            x0, x1, x2, x3 = words(blocks, draw, NOISE_PURPOSE, key0, key1)
            e0, e1 = noise_pair(x0, x1, NOISE)
            e2, e3 = noise_pair(x2, x3, NOISE)
            eps = in_order(e0, e1, e2, e3)
    if BY_ROW:
        # A row without noise keeps its bits, -0 and infinity included.
        if NOISE == "none":
            w = lerp_by_row(w0, w1, k, flags & 1)
        elif INTERPOLATED:
            v = lerp_by_row(w0, w1, k, flags & 1)
            w = tl.where((flags & 2) != 0, perturbed(v, scale, eps, FACTOR), v)
        else:
            w1 = tl.where((flags & 2) != 0, perturbed(w1, scale, eps, FACTOR), w1)
            w = lerp_by_row(w0, w1, k, flags & 1)
    elif NOISE == "none":
        w = lerp(w0, w1, k, BASE, MIXED)
    elif INTERPOLATED:
        w = perturbed(lerp(w0, w1, k, BASE, MIXED), scale, eps, FACTOR)
    else:
        w = lerp(w0, perturbed(w1, scale, eps, FACTOR), k, BASE, MIXED)
    w = narrowed(w, out.dtype.element_ty, INTERPRETED)
    if WHOLE:
        tl.store(out + offsets, w)
    else:
        tl.store(out + offsets, w, mask=offsets < size)


@triton.jit(do_not_specialize=["first_tile", "k", "scale", "threshold", "seed_low", "seed_high", "draw"])
def write(
    tiles, rows, own, first_tile, k, scale, threshold, seed_low, seed_high, draw,
    OUT: tl.constexpr, ZEROSHOT: tl.constexpr, FINETUNED: tl.constexpr, ALIGNED: tl.constexpr,
    PLACED: tl.constexpr,
    BASE: tl.constexpr, MIXED: tl.constexpr, NOISE: tl.constexpr, FACTOR: tl.constexpr,
    INTERPOLATED: tl.constexpr, FILL: tl.constexpr, BY_ROW: tl.constexpr,
    TILE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program writes one tile: TILE elements, or what is left, of one row.

    tiles: int32 [tiles], the row that each tile belongs to. rows: int64 [rows, 6], each row's addresses
    of out, zeroshot and finetuned, its size, first block and first tile; PLACED: [rows, 15], its place after
    them (start, four sizes, four strides). own: int32 [rows, 4], read if BY_ROW: each row's k, scale,
    threshold and flags (base 1, noise 2, mask 4). first_tile: the first program's tile. threshold, seed_low,
    seed_high, draw: 32-bit words, as int32.

    OUT, ZEROSHOT, FINETUNED: storage types. ALIGNED: every four elements can be accessed at once.
    BASE, MIXED (k is not 0), INTERPOLATED (on="interpolated"): the form of the formula. NOISE: "none", its
    kind, or "operand" (what is added is w0). FACTOR of the noise: "none", "abs" or "square". FILL: "none" (no
    mask), "zero" or "zeroshot".
    """
    tile = first_tile + tl.program_id(0)
    index = tl.load(tiles + tile)
    row = rows + index * (15 if PLACED else 6)
    out = tl.load(row).to(tl.pointer_type(OUT))
    zeroshot = tl.load(row + 1).to(tl.pointer_type(ZEROSHOT))
    finetuned = tl.load(row + 2).to(tl.pointer_type(FINETUNED))
    size = tl.load(row + 3)
    first_block = tl.load(row + 4)
    tile -= tl.load(row + 5)  # now of this row, and of 64 bits, as all that follows from it
    start = tile * TILE
    block = first_block if PLACED else first_block + tile * (TILE // 4)
    left = size - start
    if ALIGNED:
        # No more is promised than four elements, one block: then a thread has the same four of every
        # storage type, and nothing need be passed between threads.
        out = tl.multiple_of(out, OUT.primitive_bitwidth // 2)
        zeroshot = tl.multiple_of(zeroshot, ZEROSHOT.primitive_bitwidth // 2)
        finetuned = tl.multiple_of(finetuned, FINETUNED.primitive_bitwidth // 2)
    out += start
    zeroshot += start
    finetuned += start
    flags = 0
    if BY_ROW:
        k = tl.load(own + index * 4).to(tl.float32, bitcast=True)
        scale = tl.load(own + index * 4 + 1).to(tl.float32, bitcast=True)
        threshold = tl.load(own + index * 4 + 2)
        flags = tl.load(own + index * 4 + 3)
    threshold = threshold.to(tl.uint32, bitcast=True)
    key0 = seed_low.to(tl.uint32, bitcast=True)
    key1 = seed_high.to(tl.uint32, bitcast=True)
    draw = draw.to(tl.uint32, bitcast=True)
    if left >= TILE:  # without bounds, which would keep the accesses from being wide
        write_tile(
            out, zeroshot, finetuned, row + 6, start, left, block, k, scale, threshold, flags,
            key0, key1, draw,
            BASE, MIXED, NOISE, FACTOR, INTERPOLATED, FILL, BY_ROW, PLACED, TILE, True, INTERPRETED,
        )  # fmt: skip
    else:
        write_tile(
            out, zeroshot, finetuned, row + 6, start, left, block, k, scale, threshold, flags,
            key0, key1, draw,
            BASE, MIXED, NOISE, FACTOR, INTERPOLATED, FILL, BY_ROW, PLACED, TILE, False, INTERPRETED,
        )  # fmt: skip
