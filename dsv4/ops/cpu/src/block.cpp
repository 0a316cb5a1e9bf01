// Whole blocks, one after the other, for a few tokens in one call: what the model's own block does op by op (model/block.py),
// with the same functions in the same order, so with the same bits, but without anything between them. It writes the memory,
// too.
//
// Layer is laid out as in block.py, which fills it; every field has eight bytes.
#include "calls.h"
#include "matmul.h"
#include "room.h"
#include "step.h"

namespace {

struct Table {  // a weight
    const void *data, *scales;
    long dtype, rows, columns;
};

struct Hyper {
    const float *fn, *base, *scale, *gain;
};

// Rows of a store: of `width` numbers in `row_bytes` bytes, as `kind` (a Dtype) says.
struct Store {
    uint8_t* data;
    long kind, width, block, tail, rotated, row_bytes, per_page;

    bool packed() const { return kind == FP8 || kind == FP4; }
};

struct Compressor {
    const float *wkv, *wgate, *ape, *gain;
    long channels, ratio, overlap, width;  // channels: of a token's row, 2 * width with overlap
    float* ring;                           // open rows [.., 2, channels]
    Store entries;
};

struct Indexer {
    Table wq_b, weights_proj;
    long heads, width, topk;
    double scale;  // of weights
    Compressor compressor;
};

struct Attention {
    Table wq_a, wq_b, wkv, wo_a, wo_b;
    const float *q_gain, *kv_gain, *sink;
    long heads, groups;
    double scale;
    Store window;
    Compressor compressor;  // without `wkv`: there is none
    Indexer indexer;        // without `heads`
};

struct Mlp {  // of all experts, one below the other (experts.cpp)
    const void *gate, *gate_scales, *up, *up_scales, *down, *down_scales;
    long dtype, inner, step, offset, down_step;
};

struct Experts {
    Table gate;
    const float* bias;
    const int64_t* table;  // [vocabulary, k] instead of a choice
    long k;
    double scale, limit;
    Mlp routed, shared;
};

struct Layer {
    long is_bf16, streams, width, iters, pairs;
    long kind;  // of the step's groups; -1: a layer with a window alone
    double hc_eps, eps;
    Hyper attn, ffn;
    Attention attention;
    Experts experts;
};

// Streams into one at the end.
struct Collapse {
    const float *fn, *base, *scale;
    double hc_eps, eps;
};

// Either counts the bytes of pieces of a room, or gives them.
struct Needed {
    long bytes = 0;
    template <class V> void operator()(V*&, long count) { bytes += count * sizeof(V) + 64; }
};
struct Taken {
    Room& room;
    template <class V> void operator()(V*& at, long count) { at = room.take<V>(count); }
};

template <class T> struct Block {
    const Layer& l;
    const Step& s;
    const float* turn;  // [tokens and groups that close, pairs]: the rotations of this kind of layer
    const int64_t* ids;
    const Groups* g = l.kind < 0 ? nullptr : &s.groups[l.kind];
    static constexpr int BF = std::is_same<T, bf16>::value;

    // What stands between.
    struct Between {
        T *h, *streams, *qr, *q, *kv, *row, *o, *low, *y, *index, *turned, *entries, *key_weights;
        float *post, *comb, *lse, *own, *joined, *weights, *routed, *shared;
        uint8_t *kept, *window, *packed;
        int64_t *chosen, *given;
    } b = {};

    // A token closes a group of a kind at most.
    template <class Take> void lay(Take&& take) {
        const Attention& a = l.attention;
        long n = s.n, N = l.streams, M = l.width, H = a.heads, D = a.wkv.rows, k = l.experts.k;
        long channels = std::max(a.compressor.channels, a.indexer.compressor.channels), key = a.indexer.compressor.entries.row_bytes;
        take(b.h, n * M), take(b.y, n * M), take(b.streams, n * N * M);
        take(b.qr, n * a.wq_a.rows), take(b.q, n * H * D), take(b.kv, n * D), take(b.row, n * D), take(b.o, n * H * D);
        take(b.low, n * a.wo_a.rows), take(b.post, n * N), take(b.comb, n * N * N), take(b.lse, n * H);
        take(b.kept, n * a.window.row_bytes), take(b.window, s.ring.joined * a.window.row_bytes);
        take(b.own, n * 2 * channels), take(b.joined, g ? g->rows.joined * 2 * channels : 0);
        take(b.entries, n * D), take(b.packed, n * (a.window.row_bytes + (a.indexer.heads + 1) * key));
        take(b.index, n * a.indexer.wq_b.rows), take(b.turned, n * a.indexer.wq_b.rows);
        take(b.key_weights, n * a.indexer.heads), take(b.weights, n * a.indexer.heads);
        take(b.chosen, n * a.indexer.topk), take(b.given, l.experts.table ? n * k : 0);
        take(b.routed, n * M), take(b.shared, n * M);
    }

    static void pack(const Store& store, const T* rows, long n, uint8_t* out) {
        if (store.packed())
            return CALL(pack_rows)(rows, BF, n, store.width, store.block, store.tail, store.row_bytes, store.kind == FP4, 0,
                                   int(store.rotated), out);
        for (long i = 0; i < n * store.width; i++)
            if (store.kind == F32) reinterpret_cast<float*>(out)[i] = widen(rows[i]);
            else reinterpret_cast<bf16*>(out)[i] = narrow(widen(rows[i]));
    }

    // A pool as pool.h takes it.
    struct Numbers {
        int64_t numbers[10];
        Numbers(const Store& store, const void* data, const int64_t* table, long rows)
            : numbers{int64_t(data), int64_t(table), rows, table ? store.per_page : 1, store.row_bytes, store.kind,
                      store.packed() ? store.width - store.tail : store.width, store.packed() ? store.tail : 0,
                      store.packed() ? store.block : store.width, 0} {}
    };
    Numbers pages(const Store& store) const { return {store, store.data, s.table, s.pages * store.per_page}; }

    // The rotations of the groups that close: after those of the tokens, by kind.
    const float* group_turn() const {
        long before = s.n;
        for (const Groups* other = s.groups; other < g; other++) before += other->closing;
        return turn + before * l.pairs * 2;
    }

    // A compressor remembers its tokens; the groups that close become entries.
    void compress(const Compressor& c) const {
        CALL(compressor_rows)(b.h, BF, s.n, l.width, c.wkv, c.wgate, c.channels, c.ape, c.ratio, s.positions, b.own);
        long bytes = 2 * c.channels * sizeof(float);
        const uint8_t* own = reinterpret_cast<const uint8_t*>(b.own);
        if (g->closing) g->rows.join(reinterpret_cast<uint8_t*>(c.ring), own, bytes, reinterpret_cast<uint8_t*>(b.joined));
        g->rows.store(reinterpret_cast<uint8_t*>(c.ring), own, bytes);
        if (!g->closing) return;
        CALL(compress)(b.joined, 2 * c.channels, b.joined + c.channels, 2 * c.channels, g->rows.joined, g->first_row,
                       g->has_previous, g->closing, c.ratio, int(c.overlap), c.width, c.gain, float(l.eps), group_turn(), l.pairs, 0,
                       BF, b.entries);
        pack(c.entries, b.entries, g->closing, b.packed);
        long row = c.entries.row_bytes;
        for (long i = 0; i < g->closing; i++) std::memcpy(c.entries.data + g->entry[i] * row, b.packed + i * row, row);
    }

    // The entries that each token reads; null where it reads all that it sees.
    const int64_t* choose() const {
        const Indexer& i = l.attention.indexer;
        if (!i.heads) return nullptr;
        compress(i.compressor);
        if (g->longest <= i.topk) return nullptr;
        const Store& keys = i.compressor.entries;
        long rows = s.n * i.heads;
        CALL(linear)(b.qr, BF, s.n, i.wq_b.columns, i.wq_b.data, i.wq_b.scales, int(i.wq_b.dtype), i.wq_b.columns, i.wq_b.rows,
                     b.index);
        CALL(rotate)(b.index, BF, rows, i.heads, i.width, turn, l.pairs, 0, b.turned);
        if (keys.rotated) {  // queries are rotated and rounded as keys are
            pack(keys, b.turned, rows, b.packed);
            CALL(unpack_rows)(b.packed, rows, i.width, keys.block, keys.tail, keys.row_bytes, keys.kind == FP4, 0, BF, b.turned);
        }
        const Table& w = i.weights_proj;
        CALL(linear)(b.h, BF, s.n, w.columns, w.data, w.scales, int(w.dtype), w.columns, w.rows, b.key_weights);
        for (long j = 0; j < rows; j++) b.weights[j] = widen(b.key_weights[j]) * float(i.scale);
        CALL(index_scores_topk)(b.turned, BF, s.n, i.heads, i.width, b.weights, pages(keys).numbers, g->start, g->stop, i.topk,
                                b.chosen);
        return b.chosen;
    }

    // The sublayer's input h -> its output y
    void attend() const {
        const Attention& a = l.attention;
        long n = s.n, D = a.wkv.rows;
        CALL(project_in)(b.h, BF, n, GIVE(a.wq_a), a.q_gain, GIVE(a.wq_b), GIVE(a.wkv), a.kv_gain, a.heads, float(l.eps), turn,
                         l.pairs, b.qr, b.q, b.kv, b.row);
        pack(a.window, b.row, n, b.kept);  // a query reads its own tokens as later ones will
        if (!s.ring.places) s.ring.join(a.window.data, b.kept, a.window.row_bytes, b.window);
        s.ring.store(a.window.data, b.kept, a.window.row_bytes);
        const void* rows = s.ring.places ? a.window.data : b.window;
        Numbers window(a.window, rows, s.ring.places, s.ring.joined), entries = window;
        const int64_t *chosen = nullptr, *start = nullptr, *stop = nullptr;
        if (g) {
            compress(a.compressor);
            chosen = choose();
            entries = pages(a.compressor.entries);
            if (!chosen) start = g->start, stop = g->stop;
        }
        CALL(sparse_attention)(b.q, BF, n, a.heads, D, window.numbers, entries.numbers, s.start, s.stop, start, stop, chosen,
                               chosen ? a.indexer.topk : 0, a.sink, float(a.scale), b.o, b.lse);
        CALL(project_out)(b.o, BF, n, a.heads, D, turn, l.pairs, GIVE(a.wo_a), a.groups, GIVE(a.wo_b), b.low, b.y);
    }

    void mlp(const Mlp& m, const int64_t* chosen, const float* weights, long k, long experts, float* out) const {
        CALL(experts)(b.h, BF, s.n, l.width, m.inner, chosen, weights, k, experts, m.gate, m.gate_scales, m.up, m.up_scales,
                      m.down, m.down_scales, int(m.dtype), m.step, m.offset, m.down_step, float(l.experts.limit), out);
    }

    // The same, by the experts
    void route(float* scores, int64_t* chosen, float* weights) const {
        const Experts& e = l.experts;
        long n = s.n;
        for (long i = 0; e.table && i < n * e.k; i++) b.given[i] = chosen[i] = e.table[ids[i / e.k] * e.k + i % e.k];
        CALL(gate)(b.h, BF, n, l.width, e.gate.data, e.gate.dtype == BF16, e.gate.columns, e.gate.rows, e.bias,
                   e.table ? b.given : nullptr, e.k, float(e.scale), scores, chosen, weights);
        mlp(e.routed, chosen, weights, e.k, e.gate.rows, b.routed);
        std::vector<int64_t> first(n);
        mlp(e.shared, first.data(), nullptr, 1, 1, b.shared);
        for (long i = 0; i < n * l.width; i++) {
            T shared;  // rounded, as an op of its own gives it
            store(&shared, b.shared[i]);
            store(b.y + i, b.routed[i] + widen(shared));
        }
    }

    void enter(const T* x, const Hyper& h) const {
        CALL(hyper_enter)(x, BF, s.n, int(l.streams), l.width, h.fn, h.base, h.scale, h.gain, int(l.iters), float(l.hc_eps),
                          float(l.eps), b.h, b.post, b.comb, nullptr);
    }

    void run(const T* x, T* out, float* scores, int64_t* chosen, float* weights) {
        static thread_local Room room;
        Needed needed;
        lay(needed);
        room.open(needed.bytes);
        lay(Taken{room});
        enter(x, l.attn);
        attend();
        CALL(hyper_write)(x, b.y, BF, s.n, int(l.streams), l.width, b.post, b.comb, b.streams);
        enter(b.streams, l.ffn);
        route(scores, chosen, weights);
        CALL(hyper_write)(b.streams, b.y, BF, s.n, int(l.streams), l.width, b.post, b.comb, out);
    }
};

}  // namespace

// Streams x [n, N, M] -> out, both FP32 or BF16, through `count` layers; or rows x [n, M] that are all streams of their token,
// where `rows`. ids [n]: of the tokens. What their gates decided: scores [count, n, X], chosen and weights [count, n, k]. With
// `end` the last streams are collapsed as well, into hidden [n, M].
EXPORT(blocks)
(const Layer* const* layers, long count, const Step* step, const int64_t* ids, const void* x, long rows, void* out, float* scores,
 int64_t* chosen, float* weights, const Collapse* end, void* hidden) {
    const Layer& first = *layers[0];
    long n = step->n, N = first.streams, row = first.width * (first.is_bf16 ? 2 : 4);
    static thread_local Room room;
    room.open(n * N * row + 64);
    char *spare = room.take<char>(n * N * row), *last = static_cast<char*>(out);
    const void* from = x;
    if (rows) {
        char* to = count % 2 ? spare : last;  // which the first layer does not write
        for (long i = 0; i < n * N; i++) std::memcpy(to + i * row, static_cast<const char*>(x) + i / N * row, row);
        from = to;
    }
    for (long i = 0; i < count; i++) {
        const Layer& l = *layers[i];
        const float* turned = l.kind < 0 ? step->window_turn : step->turn;
        void* to = (count - i) % 2 ? last : spare;  // the last one is `out`
        long at = i * n, X = l.experts.gate.rows, k = l.experts.k;
        if (l.is_bf16)
            Block<bf16>{l, *step, turned, ids}.run(static_cast<const bf16*>(from), static_cast<bf16*>(to), scores + at * X,
                                                   chosen + at * k, weights + at * k);
        else
            Block<float>{l, *step, turned, ids}.run(static_cast<const float*>(from), static_cast<float*>(to), scores + at * X,
                                                    chosen + at * k, weights + at * k);
        from = to;
    }
    if (end)
        CALL(head_collapse)(out, int(first.is_bf16), n, int(N), first.width, end->fn, end->base, end->scale, float(end->hc_eps),
                            float(end->eps), hidden, nullptr);
}

#if !defined(__AVX512F__)  // once: block.py compares
extern "C" __attribute__((visibility("default"))) long dsv4_sizes(int which) {
    const long sizes[] = {sizeof(Layer), sizeof(Step), sizeof(Collapse)};
    return sizes[which];
}
#endif
