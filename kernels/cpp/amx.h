// Products of bfloat16 by AMX, sixteen rows of w and sixteen rows of x at a time. They are computed as out^T = w x^T: rows of w
// have in memory the order of the left tile, and only the fewer rows of x must be reordered. Included for instruction sets
// that have tiles; `tiles_allowed` says whether this processor and its operating system allow them.

const int64_t TILE = 16, TILE_K = 32;  // rows, and numbers of a row, that a tile holds
const int64_t TILES_FROM = 4;          // from this many rows x, tiles are faster
const int64_t TILES_ROWS = 128;        // rows x that are packed at once, for the second-level cache

struct TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
alignas(64) static const TileShapes tile_shapes;

// The compiler does not know that tiles are loaded from memory.
INLINE void before_tiles(const void* written) { __asm__ volatile("" ::"r"(written) : "memory"); }

// Transpose 16 x 16 in four passes; each interleaves rows i and i + 8 into rows 2i and 2i + 1.
INLINE void transpose(vu* rows) {
    for (int round = 0; round < 4; round++) {
        vu next[TILE];
        for (int i = 0; i < 8; i++) {
            next[2 * i] = __builtin_shufflevector(rows[i], rows[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            next[2 * i + 1] = __builtin_shufflevector(rows[i], rows[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        for (int i = 0; i < TILE; i++) rows[i] = next[i];
    }
}

// Pack up to sixteen rows x of K numbers as right tiles; K is a multiple of TILE_K here and below. Row r of a tile has the
// numbers 2r and 2r + 1 of each row x.
static void pack_tiles(const bf16* const* x, int64_t M, int64_t K, bf16* to) {
    for (int64_t k = 0; k < K; k += TILE_K, to += TILE * TILE_K) {
        vu rows[TILE] = {};
        for (int64_t m = 0; m < M; m++) __builtin_memcpy(&rows[m], x[m] + k, sizeof(vu));
        transpose(rows);
        __builtin_memcpy(to, rows, sizeof rows);
    }
}

INLINE void unpack_sums(const float* sums, int64_t M, float* out, int64_t ldo) {
    vu rows[TILE];
    __builtin_memcpy(rows, sums, sizeof rows);
    transpose(rows);
    for (int64_t m = 0; m < M; m++) __builtin_memcpy(out + m * ldo, &rows[m], sizeof(vu));
}

// WT tiles of rows w times XT tiles of packed rows, of which M are real. Sums are tiles 0 to 3.
template <int WT, int XT>
INLINE void multiply_tiles(const bf16* w, int64_t ldw, const bf16* packed, int64_t K, int64_t M, float* out, int64_t ldo) {
    const int64_t stride = ldw * sizeof(bf16), units = K / TILE_K;
    _tile_zero(0);
    if constexpr (XT == 2) _tile_zero(1);
    if constexpr (WT == 2) _tile_zero(2);
    if constexpr (WT == 2 && XT == 2) _tile_zero(3);
    for (int64_t unit = 0; unit < units; unit++) {
        const bf16 *left = w + unit * TILE_K, *right = packed + unit * TILE * TILE_K;
        _tile_loadd(4, left, stride);
        _tile_loadd(6, right, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (XT == 2) {
            _tile_loadd(7, right + units * TILE * TILE_K, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (WT == 2) {
            _tile_loadd(5, left + TILE * ldw, stride);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (XT == 2) _tile_dpbf16ps(3, 5, 7);
        }
    }
    alignas(64) float sums[4][TILE * TILE];
    const int64_t first = M < TILE ? M : TILE;
    _tile_stored(0, sums[0], 64);
    if constexpr (XT == 2) _tile_stored(1, sums[1], 64);
    if constexpr (WT == 2) _tile_stored(2, sums[2], 64);
    if constexpr (WT == 2 && XT == 2) _tile_stored(3, sums[3], 64);
    unpack_sums(sums[0], first, out, ldo);
    if constexpr (XT == 2) unpack_sums(sums[1], M - TILE, out + TILE * ldo, ldo);
    if constexpr (WT == 2) unpack_sums(sums[2], first, out + TILE, ldo);
    if constexpr (WT == 2 && XT == 2) unpack_sums(sums[3], M - TILE, out + TILE * ldo + TILE, ldo);
}

template <int WT> INLINE void multiply_rows(const bf16* w, int64_t ldw, const bf16* packed, int64_t K, int64_t M, float* out, int64_t ldo) {
    int64_t m = 0;
    for (; m + TILE < M; m += 2 * TILE) multiply_tiles<WT, 2>(w, ldw, packed + m * K, K, M - m < 2 * TILE ? M - m : 2 * TILE, out + m * ldo, ldo);
    if (m < M) multiply_tiles<WT, 1>(w, ldw, packed + m * K, K, M - m, out + m * ldo, ldo);
}

// As rows_times, for the whole TILE_Ks of the first rows w. Returns the number of these rows, a multiple of TILE; 0 if tiles
// would not be faster.
static int64_t tiles_times(const bf16* const* x, int64_t M, const bf16* w, int64_t ldw, int64_t O, int64_t K, float* out, int64_t ldo) {
    if (!tiles_allowed || M < TILES_FROM || O < TILE || K < TILE_K) return 0;
    const int64_t most = M < TILES_ROWS ? (M + TILE - 1) / TILE * TILE : TILES_ROWS, whole = O / TILE * TILE;
    K = K / TILE_K * TILE_K;
    bf16* packed = (bf16*)aligned_alloc(64, most * K * sizeof(bf16));
    _tile_loadconfig(&tile_shapes);
    for (int64_t first = 0; first < M; first += TILES_ROWS) {
        const int64_t count = M - first < TILES_ROWS ? M - first : TILES_ROWS;
        for (int64_t m = 0; m < count; m += TILE) pack_tiles(x + first + m, count - m < TILE ? count - m : TILE, K, packed + m * K);
        before_tiles(packed);
        int64_t o = 0;
        for (; o + 2 * TILE <= whole; o += 2 * TILE) multiply_rows<2>(w + o * ldw, ldw, packed, K, count, out + first * ldo + o, ldo);
        if (o < whole) multiply_rows<1>(w + o * ldw, ldw, packed, K, count, out + first * ldo + o, ldo);
    }
    _tile_release();
    free(packed);
    return whole;
}
