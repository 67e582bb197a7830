// Depthwise causal convolution and SiLU, the state shifted in place. A task is a sequence and a block of channels.

// LANES channels from channel c for the tokens `begin` to `end`; `state` is the sequence's.
template <typename T, typename Y>
static void conv_channels(const Conv& p, int64_t c, int64_t begin, int64_t end, T* state, Y* y, int64_t ldy) {
    const int64_t S = p.W - 1, n = p.C - c < LANES ? p.C - c : LANES;
    vf weight[16], past[16];  // past[s]: the input s - S tokens ago
    for (int64_t w = 0; w < p.W; w++) {
        float part[LANES] = {};
        for (int64_t i = 0; i < n; i++) part[i] = widen(((const T*)p.weight)[(c + i) * p.W + w]);
        weight[w] = load(part);
    }
    const vf bias = p.bias ? load_upto((const T*)p.bias + c, n) : vf{};
    for (int64_t s = 0; s < S; s++) past[s] = load_upto(state + s * p.C + c, n);
    for (int64_t t = begin; t < end; t++) {
        const vf x = load_upto((const T*)p.x + t * p.ldx + c, n);
        vf acc = bias;
        for (int64_t s = 0; s < S; s++) acc += weight[s] * past[s];
        for (int64_t s = 0; s + 1 < S; s++) past[s] = past[s + 1];
        acc += weight[S] * x;
        if (S) past[S - 1] = x;
        store_upto(y + (t - begin) * ldy + c, vsilu(acc), n);
    }
    for (int64_t s = 0; s < S; s++) store_upto(state + s * p.C + c, past[s], n);
}

template <typename T> static void conv(const Conv& p, int threads) {
    const int64_t blocks = (p.C + LANES - 1) / LANES;
#pragma omp parallel for num_threads(threads) if ((p.starts ? p.starts[p.B] : p.B) * p.C > PARALLEL)
    for (int64_t task = 0; task < p.B * blocks; task++) {
        const int64_t b = task / blocks, c = task % blocks * LANES;
        const int64_t begin = p.starts ? p.starts[b] : b, end = p.starts ? p.starts[b + 1] : b + 1;
        conv_channels(p, c, begin, end, (T*)p.state + p.slots[b] * p.ld_state, (T*)p.y + begin * p.ldy, p.ldy);
    }
}
