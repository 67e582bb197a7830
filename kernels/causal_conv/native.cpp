// Depthwise causal convolution and SiLU; the state is shifted in place. A task is one sequence and a strip of channels that
// covers whole cache lines.

const int64_t STRIP = 64;

// A strip of n channels from channel c for the tokens `begin` to `end`; `state` is the sequence's. WIDTH is W, or 0 for any.
template <int WIDTH, typename T, typename Y>
static void conv_strip(const Conv& p, int64_t c, int64_t n, int64_t begin, int64_t end, T* state, Y* y, int64_t ldy) {
    const int64_t W = WIDTH ? WIDTH : p.W, S = W - 1;
    float weight[16][STRIP], bias[STRIP] = {};
    const T* past[16];  // past[w]: the input w - S tokens ago
    for (int64_t w = 0; w < W; w++)
        for (int64_t i = 0; i < n; i++) weight[w][i] = widen(((const T*)p.weight)[(c + i) * W + w]);
    for (int64_t i = 0; p.bias && i < n; i++) bias[i] = widen(((const T*)p.bias)[c + i]);
    for (int64_t s = 0; s < S; s++) past[s] = state + s * p.C + c;
    for (int64_t t = begin; t < end; t++) {
        past[S] = (const T*)p.x + t * p.ldx + c;
        for (int64_t i = 0; i < n; i += LANES) {
            vf acc = load(bias + i);
            for (int64_t w = 0; w < W; w++) acc += load(weight[w] + i) * load_upto(past[w] + i, n - i);
            store_upto(y + (t - begin) * ldy + c + i, vsilu(acc), n - i);
        }
        for (int64_t s = 0; s < S; s++) past[s] = past[s + 1];
    }
    for (int64_t s = 0; s < S; s++) memmove(state + s * p.C + c, past[s], n * sizeof(T));  // from later in the state, or from x
}

template <typename T, typename Y>
static void conv_channels(const Conv& p, int64_t c, int64_t begin, int64_t end, T* state, Y* y, int64_t ldy) {
    const int64_t n = p.C - c < STRIP ? p.C - c : STRIP;
    p.W == 4 ? conv_strip<4>(p, c, n, begin, end, state, y, ldy) : conv_strip<0>(p, c, n, begin, end, state, y, ldy);
}

template <typename T> static void conv(const Conv& p, int threads) {
    const int64_t blocks = (p.C + STRIP - 1) / STRIP;
#pragma omp parallel for num_threads(threads) if ((p.starts ? p.starts[p.B] : p.B) * p.C > PARALLEL)
    for (int64_t task = 0; task < p.B * blocks; task++) {
        const int64_t b = task / blocks, c = task % blocks * STRIP;
        const int64_t begin = p.starts ? p.starts[b] : b, end = p.starts ? p.starts[b + 1] : b + 1;
        conv_channels(p, c, begin, end, (T*)p.state + p.slots[b] * p.ld_state, (T*)p.y + begin * p.ldy, p.ldy);
    }
}
