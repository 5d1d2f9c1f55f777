// Attention, backward. With S = scale Q K^T, P = exp(S - lse) and dP = dO V^T: dS = P * (dP - delta),
// delta = rowsum(dO * O), dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO.
//
// For each chunk of keys, each group of query rows: P and dS of a group stay in the cache until dK and dV have taken
// them, so that the sums over queries are long. Every gradient is summed in one fixed order, however items are cut.
//
// Source: Dao, "FlashAttention-2" (arXiv 2307.08691), algorithm 2.
#pragma once

#include <math.h>

#include "attention_tokens.h"
#include "exp2.h"
#include "places.h"

namespace vitreg::VITREG_ISA {

template <class Op, class T>
class Backward {
public:
    Backward(const AttentionBackward& call, Scratch& scratch)
        : call_(call),
          head_dim_(static_cast<int>(call.head_dim)),
          words_(words<Op>(head_dim_)),
          vectors_(up_to(head_dim_, kLanes) / kLanes),
          row_(vectors_ * kLanes),
          factor_(fabsf(call.scale) * kLog2E),
          alike_(!kPairs && row_ == head_dim_ && panel_width(vectors_) == vectors_ && call.scale >= 0) {
        place(scratch);
    }

    // Takes its arrays of the scratch, again if that has served others: nothing is packed in them.
    void place(Scratch& scratch) {
        image_ = head_ = -1;
        const int longest = up_to(static_cast<int>(longest_of(call_)), Op::kBlock * kLanes);
        const int chunk = up_to(longest < longest_chunk(kChunk) ? longest : longest_chunk(kChunk), kBlock);
        stride_ = chunk + kLanes;
        ds_stride_ = words<Op>(chunk) + kLanes;
        Places places(scratch);
        do {
            places.put(keys_as_columns_, longest * words_);
            places.put(values_as_columns_, longest * words_);
            places.put(keys_, words<Op>(longest) * row_);
            places.put(queries_left_, longest * words_);
            places.put(queries_, alike_ ? 0 : words<Op>(longest) * row_);
            places.put(grads_left_, longest * words_);
            places.put(grads_, alike_ ? 0 : words<Op>(longest) * row_);
            places.put(grad_query_, longest * row_);
            places.put(grad_key_, stride_ * row_);
            places.put(grad_value_, stride_ * row_);
            places.put(scores_, kScoreRows * stride_);
            places.put(grad_p_, kScoreRows * stride_);
            // As far as a tile of keys may look beyond a row's end.
            places.put(p_pairs_, words<Op>(kGroup) * stride_ + kBlock);
            places.put(ds_pairs_, words<Op>(kGroup) * stride_ + kBlock);
            places.put(ds_rows_, kBlock * ds_stride_);
            places.put(lse_, longest);
            places.put(top_, longest);
            places.put(share_, longest);
            places.put(delta_, longest);
            places.put(stage_, kLanes * (words_ > row_ ? words_ : row_));
            places.put(index_, longest);
            places.put(copy_, longest * head_dim_);
        } while (places.again());
        if (alike_) queries_ = queries_left_, grads_ = grads_left_;
    }

    // A head is one item where there are enough of them for the threads. Where there are not, keys and queries are
    // dealt out apart: two of the five products are then computed for both, with the same result.
    static bool whole(const AttentionBackward& call) {
        const int64_t heads = images_of(call) * call.heads, rounds = (heads + call.threads - 1) / call.threads;
        return 8 * heads >= 5 * rounds * call.threads;
    }

    static int64_t parts(const AttentionBackward& call, int64_t tokens) {
        return whole(call) ? 1 : parts_of_keys(tokens) + (tokens + kQueriesOfItem - 1) / kQueriesOfItem;
    }

    // False where nothing was done, as a number of the head is not finite and would be cut into parts, see
    // attention_parts.h. All items of a head say the same, as into how many it is cut depends on the threads.
    bool item(const Span& span, int64_t part) {
        if ((span.image != image_ || span.head != head_) && !prepare(span)) return false;
        image_ = span.image;
        head_ = span.head;
        next_ = next_of(call_, span);
        const int queries = static_cast<int>(span.tokens), keys = kept_.count;
        const int64_t first_of_queries = parts_of_keys(span.tokens);
        if (whole(call_)) {
            clear_queries(queries);
            for_chunks(keys, kChunk, [&](int begin, int count) {
                fold(span, 0, queries, begin, count, true, true);
                write_keys(span, begin, count);
            });
            write_queries(span, 0, queries);
        } else if (part < first_of_queries) {
            int64_t chunk = 0;
            for_chunks(keys, kKeysOfItem, [&](int begin, int count) {
                if (chunk++ != part) return;
                fold(span, 0, queries, begin, count, false, true);
                write_keys(span, begin, count);
            });
        } else {
            const int first = static_cast<int>(part - first_of_queries) * kQueriesOfItem;
            const int count = queries - first < kQueriesOfItem ? queries - first : kQueriesOfItem;
            clear_queries(count);
            for_chunks(keys, kChunk, [&](int begin, int n) { fold(span, first, count, begin, n, true, false); });
            write_queries(span, first, count);
        }
        if (part == 0 && kept_.index) write_nothing(span);
        return true;
    }

private:
    static constexpr bool kPairs = Op::kPerWord > 1;
    // Single numbers take two blocks at a time: what is packed of the keys is read from the cache half as often.
    static constexpr int kBlock = kPairs ? Op::kBlock : 2 * Op::kBlock;
    static constexpr int kKeysOfItem = kChunk / 2, kQueriesOfItem = Op::kItem;
    // Query rows over which dK and dV are summed in registers. P and dS in parts take more of the cache.
    static constexpr int kGroup = (Op::kParts > 1 ? 2 : 4) * Op::kBlock;
    // Where words are single numbers, P and dS take the places of the scores and of dP.
    static constexpr int kScoreRows = kPairs ? kBlock : 0;
    // With so few keys the rounding of lse and of the output weighs more than another look at each row.
    static constexpr int kFewKeys = 64;
    // An lse beyond it has lost too much to rounding: the sums of the probabilities it gives are looked at first.
    static constexpr float kPreciseLse = sizeof(T) == 4 ? 32.0f : 1024.0f;
    // Beyond it rounding may be 1 and more, and the sums would overflow: the largest are looked at first of all.
    static constexpr float kCoarseLse = 16777216.0f;

    const AttentionBackward& call_;
    const int head_dim_, words_, vectors_, row_;
    const float factor_;
    const bool alike_;  // packed queries and dO, as left operands and as right ones: one panel of whole rows
    int stride_ = 0, ds_stride_ = 0;
    float *keys_as_columns_, *values_as_columns_, *keys_, *queries_left_, *queries_, *grads_left_, *grads_;
    float *grad_query_, *grad_key_, *grad_value_, *scores_, *grad_p_, *p_pairs_, *ds_pairs_, *ds_rows_;
    // Base 2; the largest exponent that it gives, where that is far from 0; by what the probabilities by both are
    // multiplied, to sum up to 1; rowsum(dO * O).
    float *lse_, *top_, *share_, *delta_;
    float* stage_;
    int32_t* index_;
    T* copy_;

    int64_t image_, head_;  // what is packed
    Span next_;
    int queries_count_ = 0;
    Kept kept_;
    Rotation rotation_;

    static int64_t parts_of_keys(int64_t tokens) { return count_chunks(static_cast<int>(tokens), kKeysOfItem); }

    bool prepare(const Span& span) {
        queries_count_ = static_cast<int>(span.tokens);
        kept_ = kept_keys(call_, span, index_);
        rotation_ = Rotation(call_, span);
        if (!pack(span, kept_, rotation_)) return false;
        const float largest = read_lse(span);
        if (largest > kCoarseLse) look_at_tops(queries_count_, kept_.count);
        if (largest > kPreciseLse && !few_keys()) look_at_sums(queries_count_, kept_.count);
        return true;
    }

    // Whether it can be multiplied so, once it is turned.
    bool pack(const Span& span, const Kept& kept, const Rotation& rotation) {
        bool fit = true;
        const auto look = [&](const Rows<T>& rows) { fit = fit && (Op::kParts == 1 || is_finite(rows, head_dim_)); };
        const int queries = static_cast<int>(span.tokens), padded = up_to(queries, kBlock);
        Rows<T> rows = rows_of<T>(call_.key, span, kept, 0, kept.count, head_dim_, &rotation, copy_);
        look(rows);
        pack_right_transposed<Op>(keys_as_columns_, rows, head_dim_, stage_);
        pack_right<Op>(keys_, rows, head_dim_);
        rows = rows_of<T>(call_.value, span, kept, 0, kept.count, head_dim_, nullptr, copy_);
        look(rows);
        pack_right_transposed<Op>(values_as_columns_, rows, head_dim_, stage_);
        rows = rows_of<T>(call_.query, span, Kept{}, 0, queries, head_dim_, &rotation, copy_);
        look(rows);
        pack_left<Op>(queries_left_, rows, head_dim_);
        if (!alike_) pack_sums(queries_, rows);
        if (call_.scale < 0) negate<Op>(queries_left_, queries * words_);
        rows = rows_of<T>(call_.grad_output, span, Kept{}, 0, queries, head_dim_, nullptr, copy_);
        look(rows);
        pack_left<Op>(grads_left_, rows, head_dim_);
        if (!alike_) pack_sums(grads_, rows);
        float* const lefts[] = {queries_left_, grads_left_};
        for (float* left : lefts)
            __builtin_memset(left + queries * words_, 0, (padded - queries) * words_ * sizeof(float));
        for (int i = 0; i < queries; ++i) {
            const T* output = token_of<const T>(call_.output, span, i);
            F32 total = zero();
            for (int d = 0; d < head_dim_; d += kLanes) {
                const int left = head_dim_ - d;
                total = fma(some_of(rows[i], d, left), some_of(output, call_.output.channel, d, left), total);
            }
            delta_[i] = sum(total);
        }
        for (int i = queries; i < padded; ++i) delta_[i] = 0.0f;
        return fit;
    }

    // And the largest of them. An infinite logit makes NaN of a row's probabilities, as of its output; where none is above
    // -inf they are 0.
    float read_lse(const Span& span) {
        const float* lse = call_.lse + (span.batch * call_.heads + span.head) * call_.tokens + span.first;
        const int queries = static_cast<int>(span.tokens), padded = up_to(queries, kBlock);
        float largest = 0.0f;
        for (int i = 0; i < queries; ++i) {
            lse_[i] = lse[i] == INFINITY ? NAN : lse[i] == -INFINITY ? INFINITY : lse[i] * kLog2E;
            largest = fmaxf(largest, fabsf(lse[i]));
        }
        for (int i = queries; i < padded; ++i) lse_[i] = 0.0f;
        for (int i = 0; i < padded; ++i) top_[i] = 0.0f, share_[i] = 1.0f;
        return largest;
    }

    void score(float* s, const float* left, const float* columns, int rows, int begin, int vectors) {
        multiply<Op>(s, stride_, left, words_, 1, rows, columns + begin * words_, vectors, words_, 0, words_, false);
    }

    [[gnu::always_inline]] static F32 probability(F32 s, F32 factor, F32 lse, F32 top) {
        return exp2_of_nonpositive(fma(s, factor, zero() - lse) - top);
    }

    // top = the largest exponent of each row, which the rounding of lse has taken far from 0.
    void look_at_tops(int queries, int all_keys) {
        float* s = kPairs ? scores_ : p_pairs_;
        const F32 factor = broadcast(factor_);
        for (int r = 0; r < queries; r += kBlock) {
            const int rows = queries - r < kBlock ? queries - r : kBlock;
            for (int i = 0; i < rows; ++i) top_[r + i] = -INFINITY;
            for_chunks(all_keys, kChunk, [&](int begin, int keys) {
                score(s, queries_left_ + r * words_, keys_as_columns_, rows, begin, up_to(keys, kLanes) / kLanes);
                for (int i = 0; i < rows; ++i) {
                    const F32 less = zero() - broadcast(lse_[r + i]);
                    for (int n = 0; n < keys; n += kLanes) {
                        const F32 x = fma(load(s + i * stride_ + n), factor, less);
                        const int left = keys - n;
                        const float top = max_of(left < kLanes ? first_of(x, broadcast(-INFINITY), left) : x);
                        if (top > top_[r + i]) top_[r + i] = top;
                    }
                }
            });
            for (int i = 0; i < rows; ++i)
                if (!(fabsf(top_[r + i]) < INFINITY)) top_[r + i] = 0.0f;
        }
    }

    // share = 1 / the sum of each row's probabilities.
    void look_at_sums(int queries, int all_keys) {
        float* s = kPairs ? scores_ : p_pairs_;
        const F32 factor = broadcast(factor_);
        for (int r = 0; r < queries; r += kBlock) {
            const int rows = queries - r < kBlock ? queries - r : kBlock;
            float totals[kBlock] = {};
            for_chunks(all_keys, kChunk, [&](int begin, int keys) {
                score(s, queries_left_ + r * words_, keys_as_columns_, rows, begin, up_to(keys, kLanes) / kLanes);
                for (int i = 0; i < rows; ++i) {
                    const F32 lse = broadcast(lse_[r + i]), top = broadcast(top_[r + i]);
                    F32 total = zero();
                    for (int n = 0; n < keys; n += kLanes) {
                        const F32 p = probability(load(s + i * stride_ + n), factor, lse, top);
                        total = total + (keys - n < kLanes ? first_of(p, zero(), keys - n) : p);
                    }
                    totals[i] += sum(total);
                }
            });
            for (int i = 0; i < rows; ++i) share_[r + i] = share_of(totals[i]);
        }
    }

    // Sums are near 1, but for NaN and where no key is left: there every probability is 0, or up to 2^-100 (see exp2.h).
    static float share_of(float total) { return total > 0x1p-60f && total < INFINITY ? 1.0f / total : 1.0f; }

    bool few_keys() const { return kept_.count <= kFewKeys; }

    // share, and delta as the sum of P dP over the keys instead of the sum of dO O over the channels, in which O is
    // rounded: of rows whose scores `s` and dP `g` are there for all keys.
    void look_at_rows(const float* s, const float* g, int row, int rows) {
        const F32 factor = broadcast(factor_);
        for (int i = 0; i < rows; ++i, s += stride_, g += stride_) {
            const F32 lse = broadcast(lse_[row + i]), top = broadcast(top_[row + i]);
            F32 totals = zero(), products = zero();
            for (int n = 0; n < kept_.count; n += kLanes) {
                const int left = kept_.count - n;
                const F32 p = probability(load(s + n), factor, lse, top), x = p * load(g + n);
                totals = totals + (left < kLanes ? first_of(p, zero(), left) : p);
                products = products + (left < kLanes ? first_of(x, zero(), left) : x);
            }
            share_[row + i] = share_of(sum(totals));
            // The probability of a single key does not change: its dS is 0 whatever the rounding.
            delta_[row + i] = kept_.count == 1 ? g[0] : share_[row + i] * sum(products);
        }
    }

    // P and dS of one row, over its scores and dP.
    void row_of_ds(float* s, float* g, int row, int keys) const {
        const F32 factor = broadcast(factor_), lse = broadcast(lse_[row]), top = broadcast(top_[row]);
        const F32 share = broadcast(share_[row]), delta = broadcast(delta_[row]);
        for (int n = 0; n < keys; n += kLanes) {
            const F32 p = probability(load(s + n), factor, lse, top) * share;
            store(s + n, p);
            store(g + n, p * (load(g + n) - delta));
        }
    }

    // P and dS of the block's rows i and i + kApart, whose block begins at the r-th of the group and the row-th of all: by
    // pairs of both, the `pair`-th, and dS also by rows.
    void rows_of_ds(int pair, int r, int row, int keys) const {
        const F32 factor = broadcast(factor_);
        const int i = Op::first_number(pair), apart = Op::kApart * stride_;
        const ptrdiff_t at_pair = (words<Op>(r) + pair) * stride_, part = Op::kStep * stride_;
        float *p_pairs = p_pairs_ + at_pair, *ds_pairs = ds_pairs_ + at_pair;
        float *ds_row = ds_rows_ + i * ds_stride_, *ds_partner = ds_row + Op::kApart * ds_stride_;
        const float *s = scores_ + i * stride_, *g = grad_p_ + i * stride_;
        for (int n = 0; n < keys; n += 2 * kLanes) {
            F32 p[2][2], ds[2][2];
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j) {
                const int of = row + i + j * Op::kApart;
                const F32 lse = broadcast(lse_[of]), top = broadcast(top_[of]);
                const F32 share = broadcast(share_[of]), delta = broadcast(delta_[of]);
#pragma GCC unroll 2
                for (int v = 0; v < 2; ++v) {
                    const int at = j * apart + n + v * kLanes, left = keys - n - v * kLanes;
                    p[j][v] = probability(load(s + at), factor, lse, top) * share;
                    ds[j][v] = p[j][v] * (load(g + at) - delta);
                    // What follows the last key must not be left to chance: its probability may be inf.
                    if (left < kLanes) {
                        p[j][v] = first_of(p[j][v], zero(), left > 0 ? left : 0);
                        ds[j][v] = first_of(ds[j][v], zero(), left > 0 ? left : 0);
                    }
                }
            }
            Op::store_rows(nullptr, nullptr, p_pairs + n, part, p[0], p[1]);
            Op::store_rows(ds_row + words<Op>(n), ds_partner + words<Op>(n), ds_pairs + n, part, ds[0], ds[1]);
        }
    }

    // P and dS of a block's rows, whose scores and dP are `s` and `g`, by pairs; zeros for pairs beyond the rows.
    void pairs_of_ds(const Span& span, float* s, float* g, int r, int row, int rows, int keys, bool prefetch) {
        const size_t bytes = up_to(keys, kLanes) * sizeof(float);
        for (int pair = 0; pair < words<Op>(rows) / Op::kParts; ++pair) {
            const int i = Op::first_number(pair), partner = i + Op::kApart;
            if (i >= rows) {
                for (int part = 0; part < Op::kParts; ++part) {
                    const ptrdiff_t at = (words<Op>(r) + pair + part * Op::kStep) * stride_;
                    __builtin_memset(p_pairs_ + at, 0, bytes);
                    __builtin_memset(ds_pairs_ + at, 0, bytes);
                }
                continue;
            }
            if (partner >= rows) {
                // It does not exist: here is what an earlier block left, or NaN that an infinite key made of zeros.
                __builtin_memset(s + partner * stride_, 0, bytes);
                __builtin_memset(g + partner * stride_, 0, bytes);
            }
            if (prefetch) prefetch_rows(span, row + i);
            if (prefetch) prefetch_rows(span, row + partner);
            rows_of_ds(pair, r, row, keys);
        }
    }

    void write(const Heads& to, const Span& span, int64_t token, float* from, float factor, const Rotation* rotation) {
        if (rotation && rotation->turns(token)) rotation->turn_back(from, token, head_dim_);
        write_token(token_of<T>(to, span, token), to.channel, from, factor, head_dim_);
    }

    // The gradients of masked keys and values.
    void write_nothing(const Span& span) {
        __builtin_memset(grad_key_, 0, row_ * sizeof(float));
        for (int64_t token = 0, i = 0; token < span.tokens; ++token) {
            if (i < kept_.count && kept_[static_cast<int>(i)] == token) {
                ++i;
                continue;
            }
            write(call_.grad_key, span, token, grad_key_, 1.0f, nullptr);
            write(call_.grad_value, span, token, grad_key_, 1.0f, nullptr);
        }
    }

    void clear_queries(int count) { __builtin_memset(grad_query_, 0, count * row_ * sizeof(float)); }

    void write_queries(const Span& span, int first, int count) {
        for (int i = 0; i < count; ++i)
            write(call_.grad_query, span, first + i, grad_query_ + i * row_, call_.scale, &rotation_);
    }

    void write_keys(const Span& span, int begin, int count) {
        for (int i = 0; i < count; i += kLanes) {
            const int some = count - i < kLanes ? count - i : kLanes;
            float* rows = rows_of_sums(grad_key_, i);
            for (int j = 0; j < some; ++j)
                write(call_.grad_key, span, kept_[begin + i + j], rows + j * row_, call_.scale, &rotation_);
            rows = rows_of_sums(grad_value_, i);
            for (int j = 0; j < some; ++j)
                write(call_.grad_value, span, kept_[begin + i + j], rows + j * row_, 1.0f, nullptr);
        }
    }

    // Sums over queries, sums[key, d] += pairs[query, key] x[query, d]: on vectors as a product whose left operand is the
    // transposed pairs. Tiles cannot be read so; there the pairs are the right operand, x is transposed when it is
    // packed, and so are the sums when they are done.
    void pack_sums(float* to, const Rows<T>& rows) {
        if constexpr (Op::kTiles)
            pack_left_transposed<Op>(to, rows, head_dim_, stage_);
        else
            pack_right<Op>(to, rows, head_dim_);
    }

    void add_sums(float* sums, const float* pairs, const float* x, int keys, int from, int length, bool add) {
        if constexpr (Op::kTiles) {
            multiply_tiles<Op>(sums, stride_, x + from * row_, kWordsOfStep<Op>, kWordsOfStep<Op> * row_, row_, pairs,
                               stride_, up_to(keys, kLanes) / kLanes, length, add);
        } else {
            multiply<Op>(sums, row_, pairs, 1, stride_, keys, x, vectors_, words<Op>(queries_count_), from, length, add);
        }
    }

    // Rows of the sums, kLanes of them from the i-th key's.
    float* rows_of_sums(float* sums, int i) {
        if constexpr (Op::kTiles) {
            for (int d = 0; d < row_; d += kLanes) transpose(stage_ + d, row_, sums + d * stride_ + i, stride_);
            return stage_;
        } else {
            return sums + i * row_;
        }
    }

    // What the next head reads of a token, and where this one's gradients will be written.
    [[gnu::always_inline]] void prefetch_rows(const Span& span, int64_t token) const {
        prefetch<T>(call_.query, next_, token, head_dim_);
        prefetch<T>(call_.key, next_, token, head_dim_);
        prefetch<T>(call_.value, next_, token, head_dim_);
        prefetch<T>(call_.output, next_, token, head_dim_);
        prefetch<T>(call_.grad_output, next_, token, head_dim_);
        prefetch<T, true>(call_.grad_query, span, token, head_dim_);
        prefetch<T, true>(call_.grad_key, span, token, head_dim_);
        prefetch<T, true>(call_.grad_value, span, token, head_dim_);
    }

    // What queries [first, first + count) and keys [begin, begin + keys) give to each other's gradients; those of the
    // keys begin anew.
    void fold(const Span& span, int first, int count, int begin, int keys, bool to_queries, bool to_keys) {
        const int vectors = up_to(keys, kLanes) / kLanes;
        for (int at = 0; at < count; at += kGroup) {
            const int group = count - at < kGroup ? count - at : kGroup;
            for (int r = 0; r < group; r += kBlock) {
                const int row = first + at + r, rows = group - r < kBlock ? group - r : kBlock;
                float* s = kPairs ? scores_ : p_pairs_ + r * stride_;
                float* g = kPairs ? grad_p_ : ds_pairs_ + r * stride_;
                score(s, queries_left_ + row * words_, keys_as_columns_, rows, begin, vectors);
                score(g, grads_left_ + row * words_, values_as_columns_, rows, begin, vectors);
                if (few_keys()) look_at_rows(s, g, row, rows);
                if constexpr (kPairs) {
                    pairs_of_ds(span, s, g, r, row, rows, keys, begin == 0);
                } else {
                    for (int i = 0; i < rows; ++i) {
                        if (begin == 0) prefetch_rows(span, row + i);
                        row_of_ds(s + i * stride_, g + i * stride_, row + i, keys);
                    }
                }
                if (to_queries)
                    multiply<Op>(grad_query_ + (at + r) * row_, row_, kPairs ? ds_rows_ : g,
                                 kPairs ? ds_stride_ : stride_, 1, rows, keys_, vectors_, words<Op>(kept_.count),
                                 words<Op>(begin), words<Op>(keys), true);
            }
            if (!to_keys) continue;
            const int from = words<Op>(first + at), length = words<Op>(group);
            add_sums(grad_value_, p_pairs_, grads_, keys, from, length, at > 0);
            add_sums(grad_key_, ds_pairs_, queries_, keys, from, length, at > 0);
        }
    }
};

}  // namespace vitreg::VITREG_ISA
