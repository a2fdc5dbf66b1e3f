// A plan's steps, run over one batch in one parallel region. The C interface that the Python side loads.
//
// Linked to no OpenMP runtime: the symbols are those that torch has brought into the process, so that there is one
// pool of threads.
#include <omp.h>
#include <sched.h>

#include <atomic>

#include "attention.h"
#include "lora.h"
#include "sample.h"

namespace steelyard {

enum Kind : int32_t { EMBED, NORM, PRODUCT, LOW_RANK, GATE_ROWS, ROTATE, ATTEND_STEP, QUANTIZE, GATHER, ADD_NORM };
enum Place : int32_t { WIDE, RESIDUAL, GATED, LOGITS, NORMED, MIXED, DRAWN };

// One step. What the fields mean depends on the kind; see `kernels/steps.py`, which fills them in.
struct Step {
    int32_t kind;
    int32_t size[8];
    float value[2];
    void* pointer[8];
};

// What a plan works on, all allocated by the caller.
struct Buffers {
    float* residual;   // [T, width]
    float* wide;       // [T, widest product] outputs of products
    float* normed;     // [T, width]
    uint16_t* queries; // [T, H, padded] bfloat16
    float* mixed;      // [T, H * E, padded to 16]
    float* gated;      // [T, F]
    float* drawn;      // [N, width]
    float* logits;     // [N, V]
    int8_t* quantized; // [T + 16, widest input] int8 or bfloat16
    float* scales;     // [T, most groups of an input]
    int32_t* sums;     // the same
};

struct Batch {
    int32_t tokens, spans, draws, pad;
    const int32_t* token_ids;   // [T]
    const int32_t* positions;   // [T]
    const int32_t* slots;       // [T] block of each token
    const Span* span;           // [S]
    const int32_t* tables;      // block tables, one after the other
    const int32_t* draw_places; // [N]
    const int32_t* adapters;    // [T] each token's adapter, -1 for none; null if no token wears one
};

struct alignas(64) Counter {
    std::atomic<int> value{0};
};

// Some milliseconds: who yields while another has his chunk put aside loses his own core, too.
constexpr int PATIENCE = 200000;

INLINE void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

struct Scratch {
    std::vector<std::pair<int32_t, AttentionWork>> works;  // by window
    std::vector<float> partials;

    const AttentionWork& work(int32_t window) const {
        for (const auto& [own, found] : works)
            if (own == window) return found;
        __builtin_unreachable();
    }
};

template <class Row>
static void run_rows(int count, int me, int threads, Row&& row) {
    const int first = (int64_t)count * me / threads, last = (int64_t)count * (me + 1) / threads;
    for (int t = first; t < last; t++) row(t);
}

static float* place(const Buffers& b, int32_t name) {
    float* const places[] = {b.wide, b.residual, b.gated, b.logits, b.normed, b.mixed, b.drawn};
    return places[name];
}

static Heads heads_of(const Step& s) {
    return {s.size[0], s.size[1], s.size[2], s.size[3], s.size[4], s.size[6],
            (uint8_t*)s.pointer[0], (uint8_t*)s.pointer[1], (float*)s.pointer[6], (float*)s.pointer[7]};
}

// Into how many chunks a phase of a step is cut; 0: there is nothing to do.
static int chunks_of(const Step& s, int phase, const Batch& batch, const Scratch& scratch, int threads) {
    if (phase == 1) {
        if (s.kind != ATTEND_STEP) return 0;
        return std::min((int)scratch.work(s.size[4]).merges.size(), 2 * threads);
    }
    switch (s.kind) {
        case PRODUCT: return std::min((s.size[1] + PANEL - 1) / PANEL, 4 * threads);
        case ATTEND_STEP: return std::min((int)scratch.work(s.size[4]).pieces.size(), 4 * threads);
        case LOW_RANK:
        case GATE_ROWS: return batch.adapters ? std::min(batch.tokens, 4 * threads) : 0;
        case GATHER: return std::min(batch.draws, threads);
        case NORM: return std::min(s.size[2] ? batch.draws : batch.tokens, 2 * threads);
        default: return std::min(batch.tokens, 2 * threads);
    }
}

// Chunk `me` of `threads` of a phase of a step.
static void run_chunk(const Step& s, int phase, const Buffers& b, const Batch& batch, Scratch& scratch, Desk& desk, int me,
                      int threads) {
    const Quantized quantized{b.quantized, b.scales, b.sums};
    switch (s.kind) {
        case EMBED: {  // size: width, bits, group
            const Table table{(const uint8_t*)s.pointer[0], s.pointer[1], (const float*)s.pointer[2],
                              s.size[0], s.size[1], s.size[2]};
            run_rows(batch.tokens, me, threads, [&](int t) {
                embed_row(table, batch.token_ids[t], b.residual + (int64_t)t * s.size[0]);
            });
            break;
        }
        case NORM: {  // size: width, true width, 1 = of the rows that draw, group (0: to bfloat16)
            const float* x = place(b, s.size[2] ? DRAWN : RESIDUAL);
            run_rows(s.size[2] ? batch.draws : batch.tokens, me, threads, [&](int t) {
                float* out = b.normed + (int64_t)t * s.size[0];
                normalize_row(x + (int64_t)t * s.size[0], (const float*)s.pointer[0], s.size[0], s.size[1], s.value[0], out);
                quantize_row(out, s.size[0], s.size[3], quantized, t);
            });
            break;
        }
        case ADD_NORM:  // size: width
            run_rows(batch.tokens, me, threads, [&](int t) {
                float *x = b.wide + (int64_t)t * s.size[0], *y = b.residual + (int64_t)t * s.size[0];
                normalize_row(x, (const float*)s.pointer[0], s.size[0], s.size[0], s.value[0], x);
                for (int i = 0; i < s.size[0]; i += 16) store(y + i, add(load(y + i), load(x + i)));
            });
            break;
        case PRODUCT: {  // size: inputs, outputs, stride, epilogue, destination, 1 = of the rows that draw, bits, group
            Product p{(const uint8_t*)s.pointer[0], s.pointer[1], (const float*)s.pointer[2],
                      b.quantized, b.scales, b.sums, place(b, s.size[4]),
                      s.size[0], s.size[1], s.size[2], s.size[3], s.size[6], s.size[7]};
            if (is_gate(p.epilogue) && batch.adapters) {  // the gates wait for the adapters' share
                p.epilogue = STORE;
                p.y = b.wide;
                p.stride = p.outputs;
            }
            product(p, desk.tiles, s.size[5] ? batch.draws : batch.tokens, me, threads);
            break;
        }
        case LOW_RANK: {  // size: inputs, outputs, stride, source, destination, first column, 1 = in turns with another
            const LowRank* pairs = (const LowRank*)s.pointer[0];
            run_rows(batch.tokens, me, threads, [&](int t) {
                const int32_t adapter = batch.adapters[t];
                if (adapter < 0 || !pairs[adapter].rank) return;
                low_rank_row(pairs[adapter], place(b, s.size[3]) + (int64_t)t * s.size[0], s.size[0], s.size[1], s.size[6],
                             place(b, s.size[4]) + (int64_t)t * s.size[2] + s.size[5]);
            });
            break;
        }
        case GATE_ROWS:  // size: width, epilogue
            run_rows(batch.tokens, me, threads, [&](int t) {
                gate_row(b.wide + (int64_t)t * 2 * s.size[0], s.size[0], s.size[1], b.gated + (int64_t)t * s.size[0]);
            });
            break;
        case ROTATE: {  // size: heads, kv heads, E, padded, window, stride of a row, bytes of a cached number
            const Heads h = heads_of(s);
            const Rotary r{(const float*)s.pointer[2], (const float*)s.pointer[3], (const float*)s.pointer[4],
                           (const float*)s.pointer[5], s.value[0]};
            run_rows(batch.tokens, me, threads, [&](int t) {
                rotate_and_cache(b.wide + (int64_t)t * s.size[5], batch.positions[t], batch.slots[t], h, r,
                                 b.queries + (int64_t)t * h.heads * h.padded);
            });
            break;
        }
        case ATTEND_STEP: {
            const Heads h = heads_of(s);
            const AttentionWork& work = scratch.work(h.window);
            if (phase == 1) {
                const int share = h.heads / h.kv_heads;
                const int64_t between = (int64_t)share * (h.padded + 2);
                run_rows(work.merges.size(), me, threads, [&](int i) {
                    const Piece& piece = work.merges[i];
                    const int t = batch.span[piece.span].start + piece.query;
                    for (int r = 0; r < share; r++)
                        merge(scratch.partials.data() + piece.partial + (int64_t)r * (h.padded + 2),
                              piece.last - piece.first, between, h,
                              b.mixed + (int64_t)t * s.size[5] + (int64_t)(piece.head * share + r) * h.size);
                });
                break;
            }
            const int begin = work.share(me, threads), end = work.share(me + 1, threads);
            for (int i = begin; i < end; i++)
                attend_piece(work.pieces[i], i + 1 < end ? &work.pieces[i + 1] : nullptr, i == begin, batch.span, batch.tables,
                             h, desk, b.queries, scratch.partials.data(), b.mixed, s.size[5]);
            break;
        }
        case QUANTIZE: {  // size: width, source, group (0: to bfloat16)
            const float* x = place(b, s.size[1]);
            run_rows(batch.tokens, me, threads, [&](int t) {
                quantize_row(x + (int64_t)t * s.size[0], s.size[0], s.size[2], quantized, t);
            });
            break;
        }
        case GATHER:
            run_rows(batch.draws, me, threads, [&](int n) {
                std::memcpy(b.drawn + (int64_t)n * s.size[0], b.residual + (int64_t)batch.draw_places[n] * s.size[0],
                            s.size[0] * sizeof(float));
            });
            break;
        default: break;
    }
}

}  // namespace steelyard

using namespace steelyard;

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// Which of the forms this library is.
EXPORT const char* steelyard_isa() {
#if LANES_AMX
    return "amx";
#elif LANES_AVX512
    return "avx512";
#elif LANES_AVX2
    return "avx2";
#else
    return "portable";
#endif
}

// Which functions there are, with which arguments: one more at every change.
EXPORT int32_t steelyard_interface() { return 5; }

// Asks the system for what this form needs; 0: it cannot be had.
EXPORT int32_t steelyard_prepare() { return ask_for_tiles(); }

// w [N, K] int8, K a multiple of 4 -> packed [N / 32 rounded up][K / 4][32][4], w + 128. Missing rows are zeros.
EXPORT void steelyard_pack(const int8_t* w, int64_t outputs, int64_t inputs, uint8_t* packed) {
    const int64_t panels = (outputs + PANEL - 1) / PANEL, groups = inputs / 4;
#pragma omp parallel for
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t g = 0; g < groups; g++)
            for (int i = 0; i < PANEL; i++) {
                const int64_t n = panel * PANEL + i;
                for (int j = 0; j < 4; j++)
                    packed[((panel * groups + g) * PANEL + i) * 4 + j] = n < outputs ? (uint8_t)(w[n * inputs + 4 * g + j] + 128) : 128;
            }
}

// w [N, K] int8 in -8..7, K a multiple of 8 -> packed [N / 32 rounded up][K / 8][32][4], two of w + 8 a byte.
EXPORT void steelyard_pack_halves(const int8_t* w, int64_t outputs, int64_t inputs, uint8_t* packed) {
    const int64_t panels = (outputs + PANEL - 1) / PANEL, eights = inputs / 8;
#pragma omp parallel for
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t g = 0; g < eights; g++)
            for (int i = 0; i < PANEL; i++) {
                const int64_t n = panel * PANEL + i;
                for (int j = 0; j < 4; j++) {
                    const int8_t* at = w + n * inputs + 8 * g + j;
                    const int lower = n < outputs ? at[0] + 8 : 8, upper = n < outputs ? at[4] + 8 : 8;
                    packed[((panel * eights + g) * PANEL + i) * 4 + j] = (uint8_t)(lower | upper << 4);
                }
            }
}

// One token per row of logits [rows, vocabulary]; -1 for a row that is not finite.
EXPORT void steelyard_draw(const float* logits, int32_t rows, int32_t vocabulary, const Draw* draws, int32_t* tokens) {
#pragma omp parallel
    {
        std::vector<Candidate> candidates;
#pragma omp for schedule(dynamic)
        for (int32_t row = 0; row < rows; row++)
            tokens[row] = draw_row(logits + (int64_t)row * vocabulary, vocabulary, draws[row], candidates);
    }
}

EXPORT void steelyard_run(const Step* steps, int32_t count, const Buffers* buffers, const Batch* batch, double* seconds) {
    Scratch scratch;
    const int most = omp_get_max_threads();
    for (int i = 0; i < count; i++) {
        if (steps[i].kind != ATTEND_STEP) continue;
        const Heads h = heads_of(steps[i]);
        bool known = false;
        for (const auto& [window, work] : scratch.works) known = known || window == h.window;
        if (known) continue;
        scratch.works.emplace_back(h.window, plan_attention(batch->span, batch->spans, h, most));
        if ((int64_t)scratch.partials.size() < scratch.works.back().second.partials)
            scratch.partials.resize(scratch.works.back().second.partials);
    }
    // No barriers: a phase is done when its chunks are, whoever did them. Each thread begins with its own run of chunks,
    // then takes what is left of the others'. One that the system has put aside between two chunks holds nobody up.
    std::vector<Counter> taken(2 * (size_t)count * most), done(2 * (size_t)count);
#pragma omp parallel
    {
        const int me = omp_get_thread_num(), threads = omp_get_num_threads();
        Desk desk;
        for (int i = 0; i < 2 * count; i++) {
            const Step& step = steps[i / 2];
            const int chunks = chunks_of(step, i % 2, *batch, scratch, threads);
            if (!chunks) continue;
            const double begun = seconds && me == 0 ? omp_get_wtime() : 0.0;
            for (int turn = 0; turn < threads; turn++) {
                const int owner = (me + turn) % threads;
                const int first = chunks * owner / threads, last = chunks * (owner + 1) / threads;
                std::atomic<int>& next = taken[(size_t)i * most + owner].value;
                if (next.load(std::memory_order_relaxed) >= last - first) continue;
                for (int chunk; (chunk = first + next.fetch_add(1, std::memory_order_relaxed)) < last;) {
                    run_chunk(step, i % 2, *buffers, *batch, scratch, desk, chunk, chunks);
                    done[i].value.fetch_add(1, std::memory_order_release);
                }
            }
            for (int spins = 0; done[i].value.load(std::memory_order_acquire) < chunks; spins++)
                spins < PATIENCE ? relax() : (void)sched_yield();
            if (me == 0 && seconds) seconds[i / 2] += omp_get_wtime() - begun;
        }
    }
}

}  // extern "C"
