// The CPU attention core by itself, for the sanitizers: every tensor in a heap block of just its size, against the
// formula in double. How exact results must be is the accuracy rule's matter, in the Python suite; the tolerances here
// only tell right from wrong. Built once for each instruction set, with its flags:
//
//   g++ -std=c++17 -O1 -g -fsanitize=address,undefined -mavx2 -mfma -mf16c -DVITREG_ISA=avx2 -Icsrc/cpu
//       tests/native/attention.cpp csrc/cpu/scratch.cpp
//
// Not for amx: nothing here asks the system for tiles, and no sanitizer sees what they load and store.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "attention_kernels.h"

using namespace vitreg;
namespace isa = vitreg::VITREG_ISA;

namespace {

int failures = 0;
std::mt19937 engine(0);

void expect(bool right, const std::string& what) {
    if (right) return;
    std::printf("FAILED %s\n", what.c_str());
    ++failures;
}

template <class T>
double number(T x) {
    if constexpr (sizeof(T) == 4) {
        return x;
    } else {
        const T lanes[isa::kLanes] = {x};
        float out[isa::kLanes];
        isa::store(out, isa::load(lanes));
        return out[0];
    }
}

template <class T>
T narrowed(float x) {
    float lanes[isa::kLanes] = {x};
    T out[isa::kLanes];
    isa::store(out, isa::load(lanes));
    return out[0];
}

// [B, H, N, D] in one block without a spare element, tokens before heads, channels `step` apart.
template <class T>
struct Block {
    int64_t heads, tokens, head_dim, step;
    std::vector<T> data;

    Block(int64_t batch, int64_t heads, int64_t tokens, int64_t head_dim, int64_t step, bool random)
        : heads(heads), tokens(tokens), head_dim(head_dim), step(step),
          data(batch * heads * tokens * head_dim * step - (step - 1)) {
        std::normal_distribution<float> normal;
        for (T& x : data) x = narrowed<T>(random ? normal(engine) : NAN);
        data.shrink_to_fit();
    }
    int64_t at(int64_t b, int64_t h, int64_t n, int64_t d) const {
        return (((b * tokens + n) * heads + h) * head_dim + d) * step;
    }
    Heads view() {
        return {data.data(), tokens * heads * head_dim * step, head_dim * step, heads * head_dim * step, step};
    }
};

struct Case {
    int64_t batch, heads, tokens, head_dim, step;
    bool masked, rotated, interleaved, packed;
    float scale;
};

// What the op computes for one head of one image, and its gradients, in double.
struct Exact {
    int64_t n, d;
    std::vector<double> q, k, v, g, out, dq, dk, dv, lse, received;

    Exact(int64_t n, int64_t d)
        : n(n), d(d), q(n * d), k(n * d), v(n * d), g(n * d), out(n * d), dq(n * d), dk(n * d), dv(n * d), lse(n),
          received(n) {}

    void run(const std::vector<char>& takes_part, double scale) {
        std::vector<double> p(n), dp(n);
        for (int64_t i = 0; i < n; ++i) {
            double top = -INFINITY, total = 0, delta = 0;
            for (int64_t j = 0; j < n; ++j) {
                p[j] = dp[j] = 0;
                for (int64_t c = 0; c < d; ++c) {
                    p[j] += scale * q[i * d + c] * k[j * d + c];
                    dp[j] += g[i * d + c] * v[j * d + c];
                }
                if (takes_part[j]) top = std::fmax(top, p[j]);
            }
            for (int64_t j = 0; j < n; ++j) total += p[j] = takes_part[j] ? std::exp(p[j] - top) : 0;
            lse[i] = top + std::log(total);
            for (int64_t j = 0; j < n; ++j) {
                p[j] = total > 0 ? p[j] / total : 0;
                received[j] += p[j] / n;
                delta += p[j] * dp[j];
            }
            for (int64_t j = 0; j < n; ++j)
                for (int64_t c = 0; c < d; ++c) {
                    const double ds = scale * p[j] * (dp[j] - delta);
                    out[i * d + c] += p[j] * v[j * d + c];
                    dv[j * d + c] += p[j] * g[i * d + c];
                    dq[i * d + c] += ds * k[j * d + c];
                    dk[j * d + c] += ds * q[i * d + c];
                }
        }
    }
};

template <class T>
void check(const Case& c, Dtype dtype, double tolerance) {
    const std::string name = "dtype " + std::to_string(int(dtype)) + " B " + std::to_string(c.batch) + " N " +
                             std::to_string(c.tokens) + " D " + std::to_string(c.head_dim) + " step " +
                             std::to_string(c.step) + (c.masked ? " masked" : "") + (c.rotated ? " rotated" : "") +
                             (c.packed ? " packed" : "");
    const int64_t prefix = c.tokens > 12 ? 3 : 1;
    const auto block = [&](bool random) { return Block<T>(c.batch, c.heads, c.tokens, c.head_dim, c.step, random); };
    Block<T> q = block(true), k = block(true), v = block(true), g = block(true);
    Block<T> out = block(false), dq = block(false), dk = block(false), dv = block(false);
    const int64_t rows = c.batch * c.heads * c.tokens;
    std::vector<int32_t> bounds = {0, int32_t(c.tokens)};
    if (c.packed) bounds = {0, int32_t(c.tokens / 3), int32_t(c.tokens / 3 + c.tokens / 2), int32_t(c.tokens)};
    const int64_t images = c.packed ? 3 : c.batch, patches = c.tokens - prefix * (c.packed ? 3 : 1);
    std::vector<char> mask(c.batch * c.tokens, 1);
    // The last image has no key at all.
    for (int64_t i = 0; c.masked && i < c.batch * c.tokens; ++i)
        mask[i] = i < (c.batch - 1) * c.tokens && engine() % 3 > 0;
    std::vector<float> cosines(patches * c.head_dim), sines(patches * c.head_dim);
    for (size_t i = 0; i < cosines.size(); ++i) {
        const float angle = float(engine() % 1000) * 0.006f;
        cosines[i] = std::cos(angle);
        sines[i] = std::sin(angle);
    }

    Attention call;
    call.batch = c.batch;
    call.heads = c.heads;
    call.tokens = c.tokens;
    call.head_dim = c.head_dim;
    call.num_prefix_tokens = prefix;
    call.scale = c.scale;
    call.query = q.view();
    call.key = k.view();
    call.value = v.view();
    if (c.masked) {
        call.key_mask = reinterpret_cast<const bool*>(mask.data());
        call.key_mask_batch = c.tokens;
        call.key_mask_token = 1;
    }
    if (c.rotated) {
        call.cos = cosines.data();
        call.sin = sines.data();
        call.rope_token = c.head_dim;
        call.rope_interleaved = c.interleaved;
    }
    if (c.packed) {
        call.cu_seqlens = bounds.data();
        call.images = images;
    }
    std::vector<float> lse(rows, NAN), received(rows, NAN), attention(c.batch * c.heads * prefix * c.tokens, NAN);
    std::vector<float> largest(images * c.heads, NAN);
    AttentionForward forward;
    static_cast<Attention&>(forward) = call;
    forward.output = out.view();
    forward.lse = lse.data();

    const AttentionKernels kernels = isa::attention_kernels(dtype);
    // What an earlier call left in the working memory must not show.
    Block<T> nan = block(false);
    AttentionForward poison = forward;
    poison.query = poison.key = poison.value = nan.view();
    kernels.forward(poison, 0, kernels.forward_items(poison));
    kernels.forward(forward, 0, kernels.forward_items(forward));
    // Item by item, from the last to the first: not a bit may change.
    const std::vector<T> at_once = out.data;
    for (int64_t item = kernels.forward_items(forward); item-- > 0;) kernels.forward(forward, item, item + 1);
    expect(std::memcmp(at_once.data(), out.data.data(), at_once.size() * sizeof(T)) == 0, name + ": item by item");
    forward.prefix_attention = attention.data();
    forward.received_attention = received.data();
    forward.max_logit = largest.data();
    kernels.forward(forward, 0, kernels.forward_items(forward));

    AttentionBackward backward;
    static_cast<Attention&>(backward) = call;
    backward.output = out.view();
    backward.grad_output = g.view();
    backward.lse = lse.data();
    backward.grad_query = dq.view();
    backward.grad_key = dk.view();
    backward.grad_value = dv.view();
    AttentionBackward poisoned = backward;
    poisoned.query = poisoned.key = poisoned.value = poisoned.grad_output = nan.view();
    kernels.backward(poisoned, 0, kernels.backward_items(poisoned));
    kernels.backward(backward, 0, kernels.backward_items(backward));

    // Cut finely, as for many threads, and from the last item to the first: not a bit may change.
    const std::vector<T> whole[3] = {dq.data, dk.data, dv.data};
    backward.threads = 64;
    for (int64_t item = kernels.backward_items(backward); item-- > 0;) kernels.backward(backward, item, item + 1);
    for (int i = 0; i < 3; ++i) {
        const std::vector<T>& parts = (i == 0 ? dq : i == 1 ? dk : dv).data;
        expect(std::memcmp(whole[i].data(), parts.data(), parts.size() * sizeof(T)) == 0, name + ": gradient by parts");
    }

    double worst = 0;
    const auto hold = [&](double exact, double got) {
        const double error = exact == got ? 0 : std::fabs(exact - got);
        if (worst == worst && !(error <= worst)) worst = error;  // NaN is the worst, and stays
    };
    for (int64_t image = 0; image < images; ++image) {
        const int64_t b = c.packed ? 0 : image, first = c.packed ? bounds[image] : 0;
        const int64_t n = c.packed ? bounds[image + 1] - first : c.tokens, d = c.head_dim;
        const int64_t first_patch = c.packed ? first - image * prefix : 0;
        const std::vector<char> part(mask.begin() + b * c.tokens + first, mask.begin() + b * c.tokens + first + n);
        for (int64_t h = 0; h < c.heads; ++h) {
            Exact exact(n, d);
            const auto turn = [&](std::vector<double>& x, bool back) {
                for (int64_t i = prefix; c.rotated && i < n; ++i)
                    for (int64_t j = 0; j < d / 2; ++j) {
                        const int64_t one = c.interleaved ? 2 * j : j, two = c.interleaved ? 2 * j + 1 : j + d / 2;
                        const int64_t row = (first_patch + i - prefix) * d;
                        double &x1 = x[i * d + one], &x2 = x[i * d + two];
                        const double s1 = sines[row + (back ? two : one)], s2 = sines[row + (back ? one : two)];
                        const double y1 = x1 * cosines[row + one] - (back ? -1 : 1) * x2 * s1;
                        const double y2 = x2 * cosines[row + two] + (back ? -1 : 1) * x1 * s2;
                        x1 = y1;
                        x2 = y2;
                    }
            };
            for (int64_t i = 0; i < n; ++i)
                for (int64_t j = 0; j < d; ++j) {
                    const int64_t at = q.at(b, h, first + i, j);
                    exact.q[i * d + j] = number(q.data[at]);
                    exact.k[i * d + j] = number(k.data[at]);
                    exact.v[i * d + j] = number(v.data[at]);
                    exact.g[i * d + j] = number(g.data[at]);
                }
            turn(exact.q, false);
            turn(exact.k, false);
            exact.run(part, c.scale);
            turn(exact.dq, true);
            turn(exact.dk, true);
            for (int64_t i = 0; i < n; ++i) {
                const int64_t row = (b * c.heads + h) * c.tokens + first + i;
                hold(exact.lse[i], lse[row]);
                hold(exact.received[i], received[row]);
                for (int64_t j = 0; j < d; ++j) {
                    const int64_t at = q.at(b, h, first + i, j);
                    hold(exact.out[i * d + j], number(out.data[at]));
                    hold(exact.out[i * d + j], number(at_once[at]));
                    hold(exact.dq[i * d + j], number(dq.data[at]));
                    hold(exact.dk[i * d + j], number(dk.data[at]));
                    hold(exact.dv[i * d + j], number(dv.data[at]));
                }
            }
            for (int64_t i = 0; i < prefix; ++i) {
                double total = 0;
                for (int64_t j = 0; j < n; ++j)
                    total += attention[((b * c.heads + h) * prefix + i) * c.tokens + first + j];
                hold(exact.lse[i] == -INFINITY ? 0 : 1, total);
            }
        }
    }
    expect(worst <= tolerance, name + ": error " + std::to_string(worst));
}

// The bound that exp2.h states, over one float in seven of its range, and what lies outside.
void check_exp2() {
    const float ends[2] = {-0x1p-40f, -100.0f};
    uint32_t begin, end;
    std::memcpy(&begin, &ends[0], 4);
    std::memcpy(&end, &ends[1], 4);
    double worst = 0;
    for (uint32_t bits = begin; bits + 7 * isa::kLanes <= end; bits += 7 * isa::kLanes) {
        float x[isa::kLanes], y[isa::kLanes];
        for (uint32_t i = 0; i < isa::kLanes; ++i) {
            const uint32_t here = bits + 7 * i;
            std::memcpy(x + i, &here, 4);
        }
        isa::store(y, isa::exp2_of_nonpositive(isa::load(x)));
        for (uint32_t i = 0; i < isa::kLanes; ++i)
            worst = std::fmax(worst, std::fabs(y[i] / std::exp2(double(x[i])) - 1));
    }
    expect(worst <= 0x1p-22, "exp2: relative error " + std::to_string(worst * 0x1p22) + " times 2^-22");
    for (const float x : {-100.5f, -1e4f, -3e38f, -INFINITY}) {
        float y[isa::kLanes];
        isa::store(y, isa::exp2_of_nonpositive(isa::broadcast(x)));
        expect(y[0] >= 0 && y[0] <= 0x1p-100f, "exp2 of " + std::to_string(x));
    }
    float y[isa::kLanes];
    isa::store(y, isa::exp2_of_nonpositive(isa::broadcast(NAN)));
    expect(y[0] != y[0], "exp2 of NaN");
}

}  // namespace

int main() {
    check_exp2();
    int cases = 0;
    const auto all = [&](const Case& c) {
        check<float>(c, Dtype::f32, 1e-4);
        check<bf16>(c, Dtype::bf16, 0.1);
        check<fp16>(c, Dtype::f16, 0.02);
        cases += 3;
    };
    for (const int64_t n : {1, 2, 15, 16, 17, 33, 97, 261, 400})
        all({n < 100 ? 2 : 1, 2, n, 64, 1, false, false, false, false, 0.125f});
    for (const int64_t d : {1, 2, 3, 8, 18, 48, 80, 96, 128}) all({1, 2, 37, d, 1, false, false, false, false, 0.2f});
    for (const int64_t step : {1, 2})
        for (const bool masked : {false, true})
            for (const bool rotated : {false, true})
                for (const bool packed : {false, true})
                    if (!(masked && packed))
                        all({packed ? 1 : 2, 2, 49, 24, step, masked, rotated, step == 2, packed,
                             packed ? -0.2f : 0.2f});
    std::printf("%d cases, %d failures\n", cases, failures);
    return failures != 0;
}
