// Attention, forward: blocks of query rows against all keys, a chunk of them at a time.
//
// A chunk's scores of a block stay in the cache: computed, turned into exponentials and multiplied with the values
// before the next. Where a head has one chunk, as at N = 201 and 261, this is the plain softmax; where it has more, sums
// are rescaled to the largest score so far (Milakov and Gimelshein, arXiv 1805.02867). The statistics look at whole rows
// of probabilities, hence one chunk whatever the length. Keys that are masked are not packed: to everything behind, they
// do not exist.
#pragma once

#include <cmath>

#include "attention_spans.h"
#include "exp2.h"
#include "scratch.h"
#include "tokens.h"

namespace vitreg::VITREG_ISA {

constexpr int kLane = static_cast<int>(kLanes);
constexpr int kItemRows = 4 * kBlock;
constexpr int kChunk = 256;  // keys, or half as many again where that saves a short last chunk

constexpr int up_to(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

// Scores of a block: s[row, key] = sum over d of q[row, d] k[key, d], and the largest of each row, lane by lane.
template <class Op>
inline void score(float* s, ptrdiff_t stride, F32* largest, const float* q, int rows, const float* keys, int words,
                  int vectors, int last_lanes) {
    for (int v = 0; v < vectors;) {
        const int width = panel_width(vectors - v);
        const bool partial = v + width == vectors && last_lanes < kLane;
        with_width(width, [&](auto w) {
            constexpr int kWidth = decltype(w)::value, kRows = rows_of_tile(kWidth);
            for (int r = 0; r < rows; r += kRows) {
                Tile<Op, kRows, kWidth> tile;
                tile.clear();
                tile.add_product(q + r * words, words, 1, keys, words);
                if (partial)
                    for (int i = 0; i < kRows; ++i)
                        tile.c[i][kWidth - 1] = first_of(tile.c[i][kWidth - 1], broadcast(-INFINITY), last_lanes);
#pragma GCC unroll 24
                for (int i = 0; i < kRows; ++i) {
                    F32 top = largest[r + i];
#pragma GCC unroll 4
                    for (int j = 0; j < kWidth; ++j) top = max(top, tile.c[i][j]);
                    largest[r + i] = top;
                }
                tile.write(s + r * stride + v * kLane, stride);
            }
        });
        keys += width * kLane * words;
        v += width;
    }
}

// exp2(s * factor - offset) of a row; their sum is returned, lane by lane. `kept`, where given, takes them in fp32.
template <class Op>
inline F32 exponentials(typename Op::Element* p, float* kept, const float* s, int vectors, float factor, float offset) {
    const F32 by = broadcast(factor), less = broadcast(-offset);
    F32 total = zero(), other = zero();
    int v = 0;
    for (; v + 2 <= vectors; v += 2) {
        const F32 a = exp2_of_nonpositive(fma(load(s + v * kLane), by, less));
        const F32 b = exp2_of_nonpositive(fma(load(s + v * kLane + kLane), by, less));
        total = total + a;
        other = other + b;
        if (kept) {
            store(kept + v * kLane, a);
            store(kept + v * kLane + kLane, b);
        }
        Op::store_pair(p + v * kLane, a, b);
    }
    if (v < vectors) {
        const F32 a = exp2_of_nonpositive(fma(load(s + v * kLane), by, less));
        total = total + a;
        if (kept) store(kept + v * kLane, a);
        Op::store_one(p + v * kLane, a);
    }
    return total + other;
}

template <class Op, class T>
class Forward {
public:
    Forward(const AttentionForward& call, Scratch& scratch)
        : call_(call),
          head_dim_(static_cast<int>(call.head_dim)),
          words_(words<Op>(head_dim_)),
          value_vectors_((head_dim_ + kLane - 1) / kLane),
          whole_rows_(call.prefix_attention || call.received_attention) {
        int64_t longest = call.tokens;
        if (call.cu_seqlens) {
            longest = 0;
            for (int64_t i = 0; i < call.images; ++i) {
                const int64_t tokens = call.cu_seqlens[i + 1] - call.cu_seqlens[i];
                longest = tokens > longest ? tokens : longest;
            }
        }
        const size_t padded = up_to(static_cast<int>(longest), kLane);
        // A chunk's scores, a line more, so that rows do not lie a multiple of 4 KiB apart.
        stride_ = static_cast<int>(whole_rows_ || padded < kChunk * 3 / 2 ? padded : kChunk * 3 / 2) + kLane;
        size_t count = 0;
        const auto place = [&](size_t floats) {
            const size_t at = count;
            count += (floats + 15) / 16 * 16;
            return at;
        };
        const size_t keys = place(padded * words_), values = place(padded * value_vectors_ * kLane);
        const size_t queries = place(kItemRows * words_), scores = place(static_cast<size_t>(kBlock) * stride_);
        const size_t kept = whole_rows_ ? place(static_cast<size_t>(kBlock) * stride_) : 0;
        const size_t outputs = place(static_cast<size_t>(kItemRows) * value_vectors_ * kLane);
        const size_t largest = place(kBlock * kLane), totals = place(kItemRows * kLane), tops = place(kItemRows);
        const size_t stage = place((kLane + 2) * (words_ + 2 * kLane)), index = place(padded), received = place(padded);
        float* memory = scratch.floats(count);
        keys_ = memory + keys;
        values_ = memory + values;
        queries_ = memory + queries;
        scores_ = memory + scores;
        kept_ = whole_rows_ ? memory + kept : nullptr;
        outputs_ = memory + outputs;
        largest_ = reinterpret_cast<F32*>(memory + largest);
        totals_ = reinterpret_cast<F32*>(memory + totals);
        tops_ = memory + tops;
        stage_ = memory + stage;
        index_ = reinterpret_cast<int32_t*>(memory + index);
        received_ = memory + received;
    }

    static int64_t parts(const AttentionForward& call, int64_t tokens) {
        // What is summed over the queries of a head is summed in one item.
        return call.received_attention || call.max_logit ? 1 : (tokens + kItemRows - 1) / kItemRows;
    }

    void item(const Span& span, int64_t part, bool fresh) {
        if (fresh) pack(span);
        const int64_t begin = part * kItemRows;
        const bool only = parts(call_, span.tokens) == 1;
        max_logit_ = -INFINITY;
        if (call_.received_attention)
            for (int n = 0; n < keys_taken_; ++n) received_[n] = 0.0f;
        for (int64_t row = begin; row < span.tokens && (only || row == begin); row += kItemRows) {
            const int64_t left = span.tokens - row;
            rows(span, row, static_cast<int>(left < kItemRows ? left : kItemRows));
        }
        if (call_.max_logit) call_.max_logit[span.image * call_.heads + span.head] = max_logit_;
        if (call_.received_attention) {
            float* to = call_.received_attention + (span.batch * call_.heads + span.head) * call_.tokens + span.first;
            scatter(to, received_, 1.0f / static_cast<float>(span.tokens), span.tokens);
        }
    }

private:
    const AttentionForward& call_;
    const int head_dim_, words_, value_vectors_;
    const bool whole_rows_;
    int stride_ = 0, keys_taken_ = 0;
    bool some_masked_ = false;
    float max_logit_ = 0;
    float *keys_, *values_, *queries_, *scores_, *kept_, *outputs_, *tops_, *stage_, *received_;
    F32 *largest_, *totals_;
    int32_t* index_;

    Rotation rotation(const Span& span, int64_t token) const {
        if (!call_.cos || token < call_.num_prefix_tokens) return {};
        const int64_t at = span.batch * call_.rope_batch +
                           (span.first_patch + token - call_.num_prefix_tokens) * call_.rope_token;
        return {call_.cos + at, call_.sin + at, call_.rope_interleaved};
    }

    void pack(const Span& span) {
        int n = static_cast<int>(span.tokens);
        some_masked_ = false;
        if (call_.key_mask) {
            n = 0;
            for (int64_t token = 0; token < span.tokens; ++token)
                if (call_.key_mask[span.batch * call_.key_mask_batch + (span.first + token) * call_.key_mask_token])
                    index_[n++] = static_cast<int32_t>(token);
            some_masked_ = n < span.tokens;
        }
        keys_taken_ = n;
        const auto token_at = [&](int i) -> int64_t { return some_masked_ ? index_[i] : i; };

        const int vectors = (n + kLane - 1) / kLane;
        float* panel = keys_;
        for (int v = 0; v < vectors;) {
            const int width = panel_width(vectors - v);
            for (int w = 0; w < width; ++w) {
                const int begin = (v + w) * kLane, end = begin + kLane < n ? begin + kLane : n;
                for (int i = begin; i < end; ++i) {
                    const int64_t token = token_at(i);
                    pack_token<Op>(stage_ + (i - begin) * words_, token_of<const T>(call_.key, span, token),
                                   call_.key.channel, head_dim_, rotation(span, token));
                }
                __builtin_memset(stage_ + (end - begin) * words_, 0, (begin + kLane - end) * words_ * sizeof(float));
                transpose_rows(panel + w * kLane, width * kLane, stage_, words_, words_);
            }
            panel += width * kLane * words_;
            v += width;
        }

        panel = values_;
        const int rows = words<Op>(n);
        for (int v = 0; v < value_vectors_;) {
            const int width = panel_width(value_vectors_ - v);
            const int first = v * kLane, channels = head_dim_ - first < width * kLane ? head_dim_ - first : width * kLane;
            for (int row = 0; row < rows; ++row, panel += width * kLane) {
                const T* tokens[2] = {};
                for (int i = 0; i < static_cast<int>(Op::kPerWord) && row * static_cast<int>(Op::kPerWord) + i < n; ++i)
                    tokens[i] = token_of<const T>(call_.value, span, token_at(row * Op::kPerWord + i)) +
                                first * call_.value.channel;
                pack_row<Op>(panel, tokens[0], tokens[1], call_.value.channel, channels, width);
            }
            v += width;
        }
    }

    // Rows [first, first + count) of the span, from query to output.
    void rows(const Span& span, int64_t first, int count) {
        const int padded = up_to(count, kBlock);
        for (int r = 0; r < count; ++r)
            pack_token<Op>(queries_ + r * words_, token_of<const T>(call_.query, span, first + r), call_.query.channel,
                           head_dim_, rotation(span, first + r));
        __builtin_memset(queries_ + count * words_, 0, (padded - count) * words_ * sizeof(float));
        if (call_.scale < 0) negate<Op>(queries_, count * words_);
        for (int r = 0; r < padded; ++r) {
            tops_[r] = -INFINITY;
            totals_[r] = zero();
        }

        const int vectors = (keys_taken_ + kLane - 1) / kLane;
        const int chunk = kChunk / kLane;
        int chunks = whole_rows_ ? 1 : (vectors + chunk / 2 - 1) / chunk;
        if (chunks < 1) chunks = 1;
        for (int i = 0; i < chunks && vectors > 0; ++i) {
            const int begin = i * chunk, end = i + 1 == chunks ? vectors : begin + chunk;
            for (int r = 0; r < count; r += kBlock) {
                const int some = count - r < kBlock ? count - r : kBlock;
                block(span, first, r, some, begin, end, vectors, i == 0);
            }
        }
        for (int r = 0; r < count; ++r) finish(span, first + r, r);
    }

    void block(const Span& span, int64_t first, int r, int rows, int begin, int end, int vectors, bool is_first) {
        const float factor = std::fabs(call_.scale) * 1.44269504f;
        const int last = end == vectors ? keys_taken_ - (vectors - 1) * kLane : kLane;
        for (int i = 0; i < kBlock; ++i) largest_[i] = broadcast(-INFINITY);
        score<Op>(scores_, stride_, largest_, queries_ + r * words_, rows, keys_ + begin * kLane * words_, words_,
                  end - begin, last);
        for (int i = 0; i < rows; ++i) {
            const float before = tops_[r + i], here = max_of(largest_[i]);
            if (here > before) {
                tops_[r + i] = here;
                if (!is_first) rescale(r + i, (before - here) * factor);
            }
            const float top = tops_[r + i] == -INFINITY ? 0.0f : tops_[r + i];
            float* s = scores_ + i * stride_;
            float* kept = kept_ ? kept_ + i * stride_ : nullptr;
            const F32 total = exponentials<Op>(reinterpret_cast<typename Op::Element*>(s), kept, s, end - begin, factor,
                                               top * factor);
            totals_[r + i] = totals_[r + i] + total;
        }
        const int words_here = words<Op>((end == vectors ? keys_taken_ : end * kLane) - begin * kLane);
        const int before = begin * kLane / static_cast<int>(Op::kPerWord);
        weigh_panels(r, rows, before, words_here, !is_first);
        if (kept_) look(span, first + r, r, rows);
    }

    void weigh_panels(int r, int rows, int before, int words_here, bool add) {
        const ptrdiff_t panel_words = words<Op>(keys_taken_);
        const float* values = values_;
        for (int v = 0; v < value_vectors_;) {
            const int width = panel_width(value_vectors_ - v);
            with_width(width, [&](auto w) {
                constexpr int kWidth = decltype(w)::value, kRows = rows_of_tile(kWidth);
                for (int i = 0; i < rows; i += kRows) {
                    float* to = outputs_ + (r + i) * value_vectors_ * kLane + v * kLane;
                    Tile<Op, kRows, kWidth> tile;
                    if (add)
                        tile.read(to, value_vectors_ * kLane);
                    else
                        tile.clear();
                    tile.add_product(scores_ + i * stride_, stride_, 1, values + before * width * kLane, words_here);
                    tile.write(to, value_vectors_ * kLane);
                }
            });
            values += width * kLane * panel_words;
            v += width;
        }
    }

    void rescale(int r, float exponent) {
        const F32 factor = exp2_of_nonpositive(broadcast(exponent));
        totals_[r] = totals_[r] * factor;
        float* o = outputs_ + r * value_vectors_ * kLane;
        for (int v = 0; v < value_vectors_; ++v) store(o + v * kLane, load(o + v * kLane) * factor);
    }

    // Statistics of whole rows of exponentials.
    void look(const Span& span, int64_t first, int r, int rows) {
        for (int i = 0; i < rows; ++i) {
            const float* p = kept_ + i * stride_;
            const float share = tops_[r + i] == -INFINITY ? 0.0f : 1.0f / sum(totals_[r + i]);
            if (call_.received_attention)
                for (int n = 0; n < keys_taken_; ++n) received_[n] += p[n] * share;
            if (call_.prefix_attention && first + i < call_.num_prefix_tokens) {
                float* to = call_.prefix_attention + span.first +
                            ((span.batch * call_.heads + span.head) * call_.num_prefix_tokens + first + i) * call_.tokens;
                scatter(to, p, share, span.tokens);
            }
        }
    }

    // Values of the keys that take part to the places of all; 0 for the others.
    void scatter(float* to, const float* from, float factor, int64_t tokens) const {
        if (!some_masked_) {
            for (int64_t n = 0; n < tokens; ++n) to[n] = from[n] * factor;
            return;
        }
        for (int64_t n = 0; n < tokens; ++n) to[n] = 0.0f;
        for (int n = 0; n < keys_taken_; ++n) to[index_[n]] = from[n] * factor;
    }

    void finish(const Span& span, int64_t token, int r) {
        const float total = sum(totals_[r]), top = tops_[r];
        float* o = outputs_ + r * value_vectors_ * kLane;
        const bool nothing = top == -INFINITY && total == total;  // a NaN total is a NaN row
        const F32 share = broadcast(1.0f / total);
        for (int v = 0; v < value_vectors_; ++v) store(o + v * kLane, nothing ? zero() : load(o + v * kLane) * share);
        write_token(token_of<T>(call_.output, span, token), o, call_.output.channel, head_dim_);
        const float logit = top * std::fabs(call_.scale);
        if (call_.lse)
            call_.lse[(span.batch * call_.heads + span.head) * call_.tokens + span.first + token] =
                nothing ? -INFINITY : logit + logf(total);
        if (call_.max_logit) {
            if (total != total && !(top == INFINITY))
                max_logit_ = NAN;
            else if (!nothing && !(logit <= max_logit_))
                max_logit_ = max_logit_ == max_logit_ ? logit : max_logit_;
        }
    }
};

}  // namespace vitreg::VITREG_ISA
