// Attention, forward: blocks of query rows against all keys, a chunk of them at a time.
//
// A chunk's scores of a block stay in the cache: computed, turned into exponentials and multiplied with the values
// before the next. Where a head has one chunk, as at N = 201 and 261, this is the plain softmax; where it has more,
// sums are rescaled to the largest score so far (Milakov and Gimelshein, arXiv 1805.02867). The statistics look at
// whole rows of probabilities, hence one chunk whatever the length. Keys that are masked are not packed: to everything
// behind, they do not exist.
#pragma once

#include <math.h>

#include "attention_tokens.h"
#include "exp2.h"
#include "places.h"

namespace vitreg::VITREG_ISA {

// Scores of a block: s[row, key] = sum over d of q[row, d] k[key, d], and the largest of each row, lane by lane.
template <class Op>
inline void score(float* s, ptrdiff_t stride, F32* largest, const float* q, int rows, const float* keys, int words,
                  int vectors, int last_lanes) {
    for (int v = 0; v < vectors;) {
        const int width = panel_width(vectors - v);
        const bool partial = v + width == vectors && last_lanes < kLanes;
        with_width(width, [&](auto w) {
            constexpr int kWidth = decltype(w)::value, kRows = rows_of_tile(kWidth);
            for (int r = 0; r < rows; r += kRows) {
                Tile<Op, kRows, kWidth> tile;
                tile.clear();
                tile.add_product(q + r * words, words, 1, keys, words);
                if (partial)
#pragma GCC unroll 24
                    for (int i = 0; i < kRows; ++i)
                        tile.c[i][kWidth - 1] = first_of(tile.c[i][kWidth - 1], broadcast(-INFINITY), last_lanes);
#pragma GCC unroll 24
                for (int i = 0; i < kRows; ++i) {
                    F32 top = largest[r + i];
#pragma GCC unroll 4
                    for (int j = 0; j < kWidth; ++j) top = max(top, tile.c[i][j]);
                    largest[r + i] = top;
                }
                tile.write(s + r * stride + v * kLanes, stride);
            }
        });
        keys += width * kLanes * words;
        v += width;
    }
}

// The same where a product leaves its tiles in memory.
template <class Op>
inline void score_by_tiles(float* s, ptrdiff_t stride, F32* largest, const float* q, int rows, const float* keys,
                           int words, int vectors, int last_lanes) {
    multiply<Op>(s, stride, q, words, 1, rows, keys, vectors, words, 0, words, false);
    for (int r = 0; r < rows; ++r) {
        float* row = s + r * stride;
        const int last = vectors - 1;
        const F32 masked = first_of(load(row + last * kLanes), broadcast(-INFINITY), last_lanes);
        if (last_lanes < kLanes) store(row + last * kLanes, masked);
        F32 tops[4] = {largest[r], masked, masked, masked};
        int v = 0;
        for (; v + 4 <= last; v += 4)
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) tops[i] = max(tops[i], load(row + (v + i) * kLanes));
        for (; v < last; ++v) tops[0] = max(tops[0], load(row + v * kLanes));
        largest[r] = max(max(tops[0], tops[1]), max(tops[2], tops[3]));
    }
}

// exp2((s - top) * factor) of kCount vectors of a row: as words, in fp32 where that is given, and added to the totals.
// The difference first: of large s, a rounded top * factor would leave more than 0 of the largest.
template <class Op, int kCount>
[[gnu::always_inline]] inline void exponentials(float* to, float* in_fp32, const float* s, F32 factor, F32 top,
                                                F32* totals) {
    F32 x[kCount];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) x[i] = (load(s + i * kLanes) - top) * factor;
    exp2_of_nonpositive(x);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
        totals[i] = totals[i] + x[i];
        if (in_fp32) store(in_fp32 + i * kLanes, x[i]);
    }
    if constexpr (kCount == 1) Op::store_one(to, x[0]);
#pragma GCC unroll 2
    for (int i = 0; i + 1 < kCount; i += 2) Op::store_pair(to + words<Op>(i * kLanes), x[i], x[i + 1]);
}

// Of a whole row; words may take the places of the s. The sum is returned, lane by lane.
template <class Op>
inline F32 exponentials(float* to, float* in_fp32, const float* s, int vectors, float factor, float top) {
    constexpr int kMany = kAccumulators / 6;
    const F32 by = broadcast(factor), most = broadcast(top);
    F32 totals[kMany];
    for (F32& total : totals) total = zero();
    int v = 0;
    const auto next = [&](auto count) __attribute__((always_inline)) {
        constexpr int kCount = decltype(count)::value;
        float* const same = in_fp32 ? in_fp32 + v * kLanes : nullptr;
        exponentials<Op, kCount>(to + words<Op>(v * kLanes), same, s + v * kLanes, by, most, totals);
        v += kCount;
    };
    while (v + kMany <= vectors) next(Width<kMany>{});
    while (v + 2 <= vectors) next(Width<2>{});
    if (v < vectors) next(Width<1>{});
    F32 total = totals[0];
    for (int i = 1; i < kMany; ++i) total = total + totals[i];
    return total;
}

template <class Op, class T>
class Forward {
public:
    Forward(const AttentionForward& call, Scratch& scratch)
        : call_(call),
          head_dim_(static_cast<int>(call.head_dim)),
          words_(words<Op>(head_dim_)),
          vectors_(up_to(head_dim_, kLanes) / kLanes),
          longest_(up_to(static_cast<int>(longest_of(call)), kLanes)),
          whole_rows_(call.prefix_attention || call.received_attention),
          chunk_(whole_rows_ && longest_ > kChunk ? up_to(longest_, kChunk) : kChunk) {
        place(scratch);
    }

    // Takes its arrays of the scratch, again if that has served others: nothing is packed in them.
    void place(Scratch& scratch) {
        image_ = head_ = -1;
        const int longest = longest_, chunk = longest < longest_chunk(chunk_) ? longest : longest_chunk(chunk_);
        // A vector more than a chunk: rows must not lie a multiple of 4 KiB apart.
        stride_ = chunk + kLanes;
        p_stride_ = kInPlace ? stride_ : words<Op>(chunk) + kLanes;
        Places places(scratch);
        do {
            places.put(keys_, longest * words_);
            places.put(values_, words<Op>(longest) * vectors_ * kLanes);
            places.put(queries_, kItemRows * words_);
            places.put(scores_, kBlock * stride_);
            places.put(p_, kInPlace ? 0 : kBlock * p_stride_);
            places.put(in_fp32_, whole_rows_ && kInPlace && Op::kPerWord > 1 ? kBlock * stride_ : 0);
            places.put(outputs_, kItemRows * vectors_ * kLanes);
            places.put(largest_, kBlock * kLanes);
            places.put(totals_, kItemRows * kLanes);
            places.put(tops_, kItemRows);
            places.put(stage_, kLanes * words_);
            places.put(index_, longest);
            places.put(received_, longest);
            places.put(copy_, longest * head_dim_);
        } while (places.again());
        if (kInPlace) p_ = scores_;
        if (!kInPlace || Op::kPerWord == 1) in_fp32_ = scores_;
    }

    static int64_t parts(const AttentionForward& call, int64_t tokens) {
        // What is gathered over the queries of a head is gathered in one item.
        return call.received_attention || call.max_logit ? 1 : (tokens + kItemRows - 1) / kItemRows;
    }

    // False where a result is not finite and parts of numbers may be why, see attention_parts.h.
    bool item(const Span& span, int64_t part) {
        if (span.image != image_ || span.head != head_) pack(span);
        image_ = span.image;
        head_ = span.head;
        next_ = next_of(call_, span);
        max_logit_ = -INFINITY;
        finite_ = Finite();
        if (call_.received_attention) __builtin_memset(received_, 0, longest_ * sizeof(float));
        const bool whole = parts(call_, span.tokens) == 1;
        const int64_t begin = whole ? 0 : part * kItemRows, end = whole ? span.tokens : begin + kItemRows;
        for (int64_t row = begin; row < end && row < span.tokens; row += kItemRows)
            rows(span, row, static_cast<int>(span.tokens - row < kItemRows ? span.tokens - row : kItemRows));
        if (call_.max_logit) call_.max_logit[span.image * call_.heads + span.head] = max_logit_;
        if (call_.received_attention) {
            const float share = 1.0f / static_cast<float>(span.tokens);
            scatter(call_.received_attention + row_of(span), received_, share, span.tokens);
        }
        return bool(finite_);
    }

private:
    static constexpr int kBlock = Op::kBlock, kItemRows = Op::kItem;
    // Whether the words of exponentials fit where the scores were.
    static constexpr bool kInPlace = Op::kParts == 1;

    const AttentionForward& call_;
    const int head_dim_, words_, vectors_;
    const int longest_;
    const bool whole_rows_;
    const int chunk_;
    int stride_ = 0, p_stride_ = 0;
    float *keys_, *values_, *queries_, *scores_, *p_, *in_fp32_, *outputs_, *tops_, *stage_, *received_;
    F32 *largest_, *totals_;
    int32_t* index_;
    T* copy_;

    int64_t image_, head_;  // whose keys and values are packed
    Span next_;
    Kept kept_;
    float max_logit_ = 0;
    Finite finite_;

    int64_t row_of(const Span& span) const {
        return (span.batch * call_.heads + span.head) * call_.tokens + span.first;
    }

    void pack(const Span& span) {
        kept_ = kept_keys(call_, span, index_);
        const int n = kept_.count;
        const Rotation rotation(call_, span);
        pack_right_transposed<Op>(
            keys_, rows_of<T>(call_.key, span, kept_, 0, n, head_dim_, &rotation, copy_), head_dim_, stage_);
        pack_right<Op>(values_, rows_of<T>(call_.value, span, kept_, 0, n, head_dim_, nullptr, copy_), head_dim_);
    }

    // Rows [first, first + count) of the span, from query to output.
    void rows(const Span& span, int64_t first, int count) {
        const Rotation rotation(call_, span);
        pack_left<Op>(queries_,
                      rows_of<T>(call_.query, span, Kept{nullptr, 0}, static_cast<int>(first), count, head_dim_,
                                 &rotation, copy_),
                      head_dim_);
        const int padded = up_to(count, kBlock);
        __builtin_memset(queries_ + count * words_, 0, (padded - count) * words_ * sizeof(float));
        if (call_.scale < 0) negate<Op>(queries_, count * words_);
        for (int r = 0; r < padded; ++r) {
            tops_[r] = -INFINITY;
            totals_[r] = zero();
        }

        for_chunks(kept_.count, chunk_, [&](int begin, int keys) {
            for (int r = 0; r < count; r += kBlock)
                block(span, first, r, count - r < kBlock ? count - r : kBlock, begin, keys);
        });
        for (int r = 0; r < count; ++r) finish(span, first + r, r);
    }

    // One block of rows from the r-th against keys [begin, begin + keys).
    void block(const Span& span, int64_t first, int r, int rows, int begin, int keys) {
        const int vectors = up_to(keys, kLanes) / kLanes;
        // 0 would make NaN of the -inf of lanes without a key.
        const float factor = fmaxf(fabsf(call_.scale) * kLog2E, __FLT_MIN__);
        score_block(r, rows, begin, keys);
        // Apart from the exponentials, whose start would wait for each row's maximum.
        for (int i = 0; i < rows; ++i) {
            const float before = tops_[r + i], here = max_of(largest_[i]);
            if (here > before) {
                tops_[r + i] = here;
                if (begin > 0) rescale(r + i, (before - here) * factor);
            }
        }
        for (int i = 0; i < rows; ++i) {
            const float top = tops_[r + i] == -INFINITY ? 0.0f : tops_[r + i];
            float* in_fp32 = whole_rows_ && Op::kPerWord > 1 ? in_fp32_ + i * stride_ : nullptr;
            if (begin == 0) prefetch_next(first + r + i);
            totals_[r + i] = totals_[r + i] + exponentials<Op>(p_ + i * p_stride_, in_fp32, scores_ + i * stride_,
                                                               vectors, factor, top);
        }
        multiply<Op>(outputs_ + r * vectors_ * kLanes, vectors_ * kLanes, p_, p_stride_, 1, rows, values_, vectors_,
                     words<Op>(kept_.count), words<Op>(begin), words<Op>(keys), begin > 0);
        if (whole_rows_) look(span, first + r, r, rows);
    }

    [[gnu::always_inline]] void prefetch_next(int64_t token) const {
        prefetch<T>(call_.query, next_, token, head_dim_);
        prefetch<T>(call_.key, next_, token, head_dim_);
        prefetch<T>(call_.value, next_, token, head_dim_);
    }

    // Scores of a block's rows from the r-th, and the largest of each.
    void score_block(int r, int rows, int begin, int keys) {
        const int vectors = up_to(keys, kLanes) / kLanes;
        for (int i = 0; i < kBlock; ++i) largest_[i] = broadcast(-INFINITY);
        const float *q = queries_ + r * words_, *columns = keys_ + begin * words_;
        const int last_lanes = keys - (vectors - 1) * kLanes;
        if constexpr (Op::kTiles)
            score_by_tiles<Op>(scores_, stride_, largest_, q, rows, columns, words_, vectors, last_lanes);
        else
            score<Op>(scores_, stride_, largest_, q, rows, columns, words_, vectors, last_lanes);
    }

    void rescale(int r, float exponent) {
        const F32 factor = exp2_of_nonpositive(broadcast(exponent));
        totals_[r] = totals_[r] * factor;
        float* o = outputs_ + r * vectors_ * kLanes;
        for (int v = 0; v < vectors_; ++v) store(o + v * kLanes, load(o + v * kLanes) * factor);
    }

    // Statistics of whole rows of exponentials, in vectors. What the last of a row holds beyond the keys is 0 with AVX-512
    // and up to 2^-100 elsewhere (see exp2.h), and is added to numbers that nobody reads.
    void look(const Span& span, int64_t first, int r, int rows) {
        const float* p = in_fp32_;
        float shares[kBlock];
        for (int i = 0; i < rows; ++i) {
            const float total = sum(totals_[r + i]);
            shares[i] = nothing(tops_[r + i], total) ? 0.0f : 1.0f / total;
        }
        for (int n = 0; n < kept_.count && call_.received_attention; n += kLanes) {
            F32 total = load(received_ + n);
            for (int i = 0; i < rows; ++i) total = fma(load(p + i * stride_ + n), broadcast(shares[i]), total);
            store(received_ + n, total);
        }
        for (int i = 0; i < rows && call_.prefix_attention && first + i < call_.num_prefix_tokens; ++i)
            scatter(prefix_row(span, first + i), p + i * stride_, shares[i], span.tokens);
    }

    float* prefix_row(const Span& span, int64_t token) const {
        const int64_t row = (span.batch * call_.heads + span.head) * call_.num_prefix_tokens + token;
        return call_.prefix_attention + row * call_.tokens + span.first;
    }

    // Values of the keys that take part to the places of all; 0 for the others.
    void scatter(float* to, const float* from, float factor, int64_t tokens) const {
        if (!kept_.index) return write_token(to, 1, from, factor, static_cast<int>(tokens));
        __builtin_memset(to, 0, tokens * sizeof(float));
        for (int n = 0; n < kept_.count; ++n) to[kept_.index[n]] = from[n] * factor;
    }

    // Whether there is no key, or none with a logit above -inf: zeros, where a plain softmax says NaN. A NaN total is that
    // of a NaN row.
    static bool nothing(float top, float total) { return top == -INFINITY && total == total; }

    // Whether a row has a NaN logit. Its scores have given way to exponentials, and are computed again.
    bool holds_nan(int r) {
        const int first = r / kBlock * kBlock, row = r - first;
        bool found = false;
        for_chunks(kept_.count, chunk_, [&](int begin, int keys) {
            score_block(first, row + 1, begin, keys);
            const float* s = scores_ + row * stride_;
            for (int n = 0; n < keys; ++n) found = found || s[n] != s[n];
        });
        return found;
    }

    void finish(const Span& span, int64_t token, int r) {
        const float total = sum(totals_[r]), top = tops_[r];
        float* o = outputs_ + r * vectors_ * kLanes;
        const bool zeros = nothing(top, total);
        if (zeros) __builtin_memset(o, 0, vectors_ * kLanes * sizeof(float));
        for (int v = 0; v < vectors_ && Op::kParts > 1; ++v) finite_.see(load(o + v * kLanes));
        write_token(token_of<T>(call_.output, span, token), call_.output.channel, o, zeros ? 1.0f : 1.0f / total,
                    head_dim_);
        const float logit = top * fabsf(call_.scale);
        // An infinite logit makes NaN of its exponential as a NaN logit does, and of the output, but not of these two.
        const bool infinite = total != total && logit == INFINITY && !holds_nan(r);
        if (call_.lse) call_.lse[row_of(span) + token] = zeros ? -INFINITY : infinite ? logit : logit + logf(total);
        if (call_.max_logit) {
            if (total != total && !infinite)
                max_logit_ = NAN;
            else if (logit > max_logit_)
                max_logit_ = logit;
        }
        if (call_.prefix_attention && kept_.count == 0 && token < call_.num_prefix_tokens)
            scatter(prefix_row(span, token), nullptr, 0.0f, span.tokens);
    }
};

}  // namespace vitreg::VITREG_ISA
