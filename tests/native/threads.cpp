// The ops dealt out to threads as torch would, for ThreadSanitizer, which knows std::thread but not torch's OpenMP:
//
//   g++ -std=c++17 -O1 -g -fsanitize=thread -mavx2 -mfma -mf16c -DVITREG_ISA=avx2 -Icsrc/cpu
//       tests/native/threads.cpp csrc/cpu/scratch.cpp -pthread
#include <cstdio>
#include <functional>
#include <thread>
#include <vector>

#include "assemble_kernels.h"
#include "attention_kernels.h"
#include "residual_norm_backward.h"
#include "residual_norm_forward.h"
#include "token_norms_kernels.h"

using namespace vitreg;
namespace isa = vitreg::VITREG_ISA;

namespace {

constexpr int kThreads = 3;

void in_parallel(int64_t items, const std::function<void(int64_t, int64_t)>& run) {
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; ++i) threads.emplace_back(run, items * i / kThreads, items * (i + 1) / kThreads);
    for (std::thread& thread : threads) thread.join();
}

std::vector<float> numbers(size_t count) {
    std::vector<float> out(count);
    for (size_t i = 0; i < count; ++i) out[i] = float(i * 7919 % 1013) / 1013 - 0.5f;
    return out;
}

void residual_norm() {
    const size_t batch = 2, tokens = 130, channels = 72, rows = batch * tokens, all = rows * channels;
    std::vector<float> x = numbers(all), branch = numbers(all), weight = numbers(channels), bias = numbers(channels);
    std::vector<float> residual(all), normalized(all), norms(rows), mean(rows), rstd(rows), grad_x(all), grad_branch(all);
    const auto in = [&](std::vector<float>& data) {
        return NormRows{data.data(), Dtype::f32, int64_t(tokens * channels), int64_t(channels)};
    };
    NormForward call{};
    call.batch = batch, call.tokens = tokens, call.channels = channels;
    call.x = in(x), call.branch = in(branch), call.weight = weight.data(), call.bias = bias.data(), call.eps = 1e-6f;
    call.residual.data = residual.data(), call.normalized.data = normalized.data();
    call.token_norms = norms.data(), call.mean = mean.data(), call.rstd = rstd.data();
    in_parallel(rows, [&](int64_t first, int64_t last) {
        std::vector<float> scratch(channels);
        isa::residual_norm::forward(call, first, last, scratch.data());
    });
    NormBackward back{};
    back.batch = batch, back.tokens = tokens, back.channels = channels;
    back.grad_residual = in(x), back.grad_normalized = in(branch), back.residual = in(residual), back.branch = in(branch);
    back.mean = mean.data(), back.rstd = rstd.data(), back.weight = weight.data(), back.layer_scale = bias.data();
    back.grad_x.data = grad_x.data(), back.grad_branch.data = grad_branch.data();
    std::vector<float> sums(3 * back.blocks() * channels), gradient(channels);
    back.layer_scale_sums = sums.data();
    back.weight_sums = back.layer_scale_sums + back.blocks() * channels;
    back.bias_sums = back.weight_sums + back.blocks() * channels;
    in_parallel(back.blocks(), [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; ++block) isa::residual_norm::backward(back, block);
    });
    const NormSums sum{back.weight_sums, back.blocks(), channels, gradient.data(), Dtype::f32};
    in_parallel(channels, [&](int64_t first, int64_t last) { isa::residual_norm::sum_blocks(sum, first, last); });
}

void token_norms() {
    const size_t batch = 2, tokens = 130, channels = 72;
    std::vector<float> x = numbers(batch * tokens * channels), norms(batch * tokens);
    const TokenNorms call{batch, tokens, channels, x.data(), Dtype::f32, int64_t(tokens * channels), int64_t(channels),
                          norms.data()};
    in_parallel(batch * tokens, [&](int64_t first, int64_t last) { isa::token_norms::norms(call, first, last); });
}

void assemble() {
    const size_t batch = 2, patches = 200, channels = 72, tokens = patches + 5;
    std::vector<float> x = numbers(batch * patches * channels), result(batch * tokens * channels);
    std::vector<float> cls = numbers(channels), registers = numbers(4 * channels);
    std::vector<float> rows = numbers((patches + 1) * channels);
    AssembleForward call{};
    call.sizes = {batch, 1, 4, patches, channels, 1};
    call.patches = x.data(), call.tokens = result.data();
    call.cls_token = cls.data(), call.register_tokens = registers.data(), call.pos_embed = rows.data();
    call.stride_b = patches * channels;
    for (const bool turned : {false, true}) {
        call.stride_m = turned ? 1 : channels, call.stride_c = turned ? patches : 1;
        in_parallel(call.items(), [&](int64_t first, int64_t last) { isa::assemble::forward(call, first, last); });
    }
    AssembleBackward back{};
    back.sizes = call.sizes;
    back.grad_tokens = result.data(), back.stride_b = tokens * channels, back.stride_n = channels;
    back.cls_token.data = cls.data(), back.register_tokens.data = registers.data(), back.pos_embed.data = rows.data();
    in_parallel(tokens, [&](int64_t first, int64_t last) {
        std::vector<float> sums(channels);
        isa::assemble::backward(back, first, last, sums.data());
    });
}

void attention() {
    const int64_t batch = 2, heads = 2, tokens = 300, head_dim = 24, all = batch * heads * tokens * head_dim;
    std::vector<float> query = numbers(all), key = numbers(all), value = numbers(all), output(all);
    std::vector<float> grad_query(all), grad_key(all), grad_value(all), lse(batch * heads * tokens);
    std::vector<float> received(batch * heads * tokens), largest(batch * heads), prefix(batch * heads * 5 * tokens);
    const auto of = [&](std::vector<float>& data) {
        return Heads{data.data(), heads * tokens * head_dim, tokens * head_dim, head_dim, 1};
    };
    AttentionForward call;
    call.batch = batch, call.heads = heads, call.tokens = tokens, call.head_dim = head_dim, call.num_prefix_tokens = 5;
    call.query = of(query), call.key = of(key), call.value = of(value), call.output = of(output);
    call.lse = lse.data(), call.received_attention = received.data(), call.max_logit = largest.data();
    call.prefix_attention = prefix.data();
    const AttentionKernels run = isa::attention_kernels(Dtype::f32);
    in_parallel(run.forward_items(call), [&](int64_t first, int64_t last) { run.forward(call, first, last); });
    AttentionBackward back;
    static_cast<Attention&>(back) = call;
    back.output = of(output), back.grad_output = of(value), back.lse = lse.data();
    back.grad_query = of(grad_query), back.grad_key = of(grad_key), back.grad_value = of(grad_value);
    in_parallel(run.backward_items(back), [&](int64_t first, int64_t last) { run.backward(back, first, last); });
}

}  // namespace

int main() {
    residual_norm();
    token_norms();
    assemble();
    attention();
    std::printf("%d threads, no race\n", kThreads);
}
