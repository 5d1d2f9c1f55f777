// The ops that Python calls: tensors made plain pointers, the work dealt out to torch's threads. The only file that knows
// torch, and of it only the stable ABI: one build serves every torch from 2.10 on.
//
// The Python backends check and allocate; what is checked here is what a kernel would crash on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "cpu/cpuid.h"
#include "cpu/huge_pages.h"
#include "cpu/kernels.h"
#include "cpu/last_level_cache.h"
#include "cpu/peak.h"

namespace {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

vitreg::Dtype dtype_of(torch::headeronly::ScalarType type) {
    switch (type) {
        case torch::headeronly::ScalarType::Float: return vitreg::Dtype::f32;
        case torch::headeronly::ScalarType::BFloat16: return vitreg::Dtype::bf16;
        case torch::headeronly::ScalarType::Half: return vitreg::Dtype::f16;
        default: STD_TORCH_CHECK(false, "native kernels take fp32, bf16 and fp16 only");
    }
}

vitreg::Dtype dtype_of(const Tensor& x) { return dtype_of(x.scalar_type()); }

int64_t bytes_of(vitreg::Dtype dtype) { return dtype == vitreg::Dtype::f32 ? 4 : 2; }

// Where a kernel is about to write a result, which may be large and lie in memory that nobody has touched yet.
void* result(const Tensor& x) {
    int64_t last = 0;
    for (int64_t i = 0; i < x.dim(); ++i) last += (x.size(i) - 1) * x.stride(i);
    if (x.numel() > 0) vitreg::prefer_huge_pages(x.data_ptr(), (last + 1) * bytes_of(dtype_of(x)));
    return x.data_ptr();
}

// A contiguous fp32 tensor's numbers; null for none.
float* floats(const MaybeTensor& x, int64_t numel) {
    if (!x) return nullptr;
    STD_TORCH_CHECK(x->scalar_type() == torch::headeronly::ScalarType::Float && x->is_contiguous() &&
                        x->numel() == numel,
                    "expected a contiguous fp32 tensor of ", numel, " numbers");
    return static_cast<float*>(x->data_ptr());
}

// How many pieces of work are worth a thread, if each goes over so many numbers.
int64_t grain(int64_t numbers) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, numbers)); }

// f(first, last) for ranges of the items, on torch's threads. What a thread throws is thrown again when all are done: of
// an exception that torch itself carries out of its loop, torch 2.10 leaves not a word.
template <class F>
void deal_out(int64_t items, int64_t grain, const F& f) {
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr thrown;
    torch::stable::parallel_for(0, items, grain, [&](int64_t first, int64_t last) {
        try {
            f(first, last);
        } catch (...) {
            if (!failed.test_and_set()) thrown = std::current_exception();
        }
    });
    if (thrown) std::rethrow_exception(thrown);
}

std::string cpu_isa() { return vitreg::name(vitreg::chosen()); }

// GFLOP/s of all threads at once.
double peak_gflops(torch::headeronly::ScalarType type, double seconds) {
    const vitreg::Dtype dtype = dtype_of(type);
    std::vector<double> speeds(torch::stable::get_num_threads());
    deal_out(speeds.size(), 1, [&](int64_t first, int64_t last) {
        for (int64_t thread = first; thread < last; ++thread) speeds[thread] = vitreg::peak_gflops(dtype, seconds);
    });
    return std::accumulate(speeds.begin(), speeds.end(), 0.0);
}

// ---- residual_layer_norm

struct Sizes {
    int64_t batch, tokens, channels;
    bool operator==(const Sizes& other) const {
        return batch == other.batch && tokens == other.tokens && channels == other.channels;
    }
};

Sizes sizes_of(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 3, "expected [batch, tokens, channels]");
    return {x.size(0), x.size(1), x.size(2)};
}

vitreg::NormRows rows(const MaybeTensor& x, const Sizes& sizes) {
    if (!x) return {};
    STD_TORCH_CHECK(sizes_of(*x) == sizes && (x->stride(2) == 1 || sizes.channels == 1 || x->numel() == 0),
                    "expected tokens of one shape, their channels side by side");
    return {x->data_ptr(), dtype_of(*x), x->stride(0), x->stride(1)};
}

vitreg::NormRowsOut rows_out(const MaybeTensor& x, const Sizes& sizes) {
    if (!x) return {};
    STD_TORCH_CHECK(sizes_of(*x) == sizes && x->is_contiguous(), "expected contiguous tokens of one shape");
    return {result(*x), dtype_of(*x)};
}

// Lets a call write past the caches what they have no room for: faster by up to a third, and slower by as much where a
// cache holds the results for the next op. The bound lies among cases measured with caches of 32 MiB and, of a CPU with
// many more cores, 480 MiB; near it neither is always the faster.
bool to_stream(std::initializer_list<vitreg::NormRows> read, std::initializer_list<vitreg::NormRowsOut> written,
               const Sizes& sizes) {
    constexpr int64_t kMostOfOneCall = 40 << 20;
    int64_t moved = 0;
    const auto add = [&](vitreg::Dtype dtype) { moved += sizes.batch * sizes.tokens * sizes.channels * bytes_of(dtype); };
    for (const vitreg::NormRows& rows : read)
        if (rows.data != nullptr) add(rows.dtype);
    for (const vitreg::NormRowsOut& rows : written) {
        if (rows.data == nullptr) continue;
        const bool aligned = reinterpret_cast<uintptr_t>(rows.data) % 64 == 0;
        if (!aligned || sizes.channels * bytes_of(rows.dtype) % 64 != 0) return false;
        add(rows.dtype);
    }
    return moved >= 3 * std::min<int64_t>(vitreg::last_level_cache(), kMostOfOneCall);
}

void residual_norm_forward(Tensor x, MaybeTensor branch, MaybeTensor layer_scale, MaybeTensor drop_path, Tensor weight,
                           MaybeTensor bias, double eps, MaybeTensor residual, Tensor normalized, Tensor token_norms,
                           MaybeTensor mean, Tensor rstd) {
    const Sizes sizes = sizes_of(x);
    const int64_t count = sizes.batch * sizes.tokens;
    STD_TORCH_CHECK(branch.has_value() == residual.has_value() && (!branch || dtype_of(*residual) == dtype_of(x)),
                    "expected a residual in x's dtype beside a branch");
    vitreg::NormForward call{};
    call.batch = sizes.batch;
    call.tokens = sizes.tokens;
    call.channels = sizes.channels;
    call.x = rows(x, sizes);
    call.branch = rows(branch, sizes);
    call.layer_scale = floats(layer_scale, sizes.channels);
    call.drop_path = floats(drop_path, sizes.batch);
    call.weight = floats(weight, sizes.channels);
    call.bias = floats(bias, sizes.channels);
    call.eps = static_cast<float>(eps);
    call.residual = rows_out(residual, sizes);
    call.normalized = rows_out(normalized, sizes);
    call.streamed = to_stream({call.x, call.branch}, {call.residual, call.normalized}, sizes);
    call.token_norms = floats(token_norms, count);
    call.mean = floats(mean, count);
    call.rstd = floats(rstd, count);

    const auto run = vitreg::kernels().residual_norm->forward;
    deal_out(count, grain(sizes.channels), [&](int64_t first, int64_t last) {
        std::vector<float> scratch(sizes.channels);
        run(call, first, last, scratch.data());
    });
}

void residual_norm_backward(MaybeTensor grad_residual, MaybeTensor grad_normalized, Tensor residual, MaybeTensor mean,
                            Tensor rstd, MaybeTensor branch, MaybeTensor layer_scale, MaybeTensor drop_path,
                            Tensor weight, MaybeTensor grad_x, MaybeTensor grad_branch, MaybeTensor grad_layer_scale,
                            MaybeTensor grad_weight, MaybeTensor grad_bias) {
    const Sizes sizes = sizes_of(residual);
    const int64_t count = sizes.batch * sizes.tokens;
    STD_TORCH_CHECK((!grad_residual || dtype_of(*grad_residual) == dtype_of(residual)) &&
                        (!grad_x || dtype_of(*grad_x) == dtype_of(residual)) &&
                        (!branch || !grad_branch || dtype_of(*branch) == dtype_of(*grad_branch)) &&
                        (!grad_layer_scale || branch),
                    "expected gradients in the dtypes of what they are gradients of");
    vitreg::NormBackward call{};
    call.batch = sizes.batch;
    call.tokens = sizes.tokens;
    call.channels = sizes.channels;
    call.grad_residual = rows(grad_residual, sizes);
    call.grad_normalized = rows(grad_normalized, sizes);
    call.residual = rows(residual, sizes);
    call.mean = floats(mean, count);
    call.rstd = floats(rstd, count);
    call.branch = rows(branch, sizes);
    call.layer_scale = floats(layer_scale, sizes.channels);
    call.drop_path = floats(drop_path, sizes.batch);
    call.weight = floats(weight, sizes.channels);
    call.grad_x = rows_out(grad_x, sizes);
    call.grad_branch = rows_out(grad_branch, sizes);
    call.streamed = to_stream({call.grad_residual, call.grad_normalized, call.residual, call.branch},
                              {call.grad_x, call.grad_branch}, sizes);

    const vitreg::NormKernels& run = *vitreg::kernels().residual_norm;
    const int64_t blocks = call.blocks();
    const MaybeTensor* parameters[] = {&grad_layer_scale, &grad_weight, &grad_bias};
    float** places[] = {&call.layer_scale_sums, &call.weight_sums, &call.bias_sums};
    std::unique_ptr<float[]> sums[3];
    for (int i = 0; i < 3; ++i) {
        if (!*parameters[i]) continue;
        sums[i].reset(new float[blocks * sizes.channels]);
        *places[i] = sums[i].get();
    }
    deal_out(blocks, 1, [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; ++block) run.backward(call, block);
    });
    for (int i = 0; i < 3; ++i) {
        if (!*parameters[i]) continue;
        const Tensor& gradient = **parameters[i];
        STD_TORCH_CHECK(gradient.numel() == sizes.channels && gradient.is_contiguous(), "expected one number a channel");
        const vitreg::NormSums sum{sums[i].get(), size_t(blocks), size_t(sizes.channels), gradient.data_ptr(),
                                   dtype_of(gradient)};
        deal_out(sizes.channels, grain(blocks), [&](int64_t first, int64_t last) { run.sum(sum, first, last); });
    }
}

// ---- token_norms

void token_norms(Tensor x, Tensor norms) {
    const Sizes sizes = sizes_of(x);
    const vitreg::NormRows tokens = rows(x, sizes);
    const int64_t count = sizes.batch * sizes.tokens;
    const vitreg::TokenNorms call{size_t(sizes.batch), size_t(sizes.tokens), size_t(sizes.channels), tokens.data,
                                  tokens.dtype, tokens.stride_b, tokens.stride_n, floats(norms, count)};
    const auto run = vitreg::kernels().token_norms->norms;
    deal_out(count, grain(sizes.channels), [&](int64_t first, int64_t last) { run(call, first, last); });
}

template <class T>
vitreg::OfGroups<T> of_groups(const Tensor& x, torch::headeronly::ScalarType type, int64_t count) {
    STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == 3 && x.size(1) == count && x.scalar_type() == type,
                    "expected the distributions of three groups");
    return {static_cast<T*>(x.data_ptr()), x.stride(0), x.stride(1)};
}

// By one thread: there is one number a token.
void accumulate_token_norms(Tensor norms, int64_t num_cls_tokens, int64_t num_registers, Tensor histogram, Tensor sums,
                            Tensor extremes, Tensor nonfinite) {
    using torch::headeronly::ScalarType;
    const int64_t prefix = num_cls_tokens + num_registers;
    STD_TORCH_CHECK(norms.dim() == 2 && norms.scalar_type() == ScalarType::Float && num_cls_tokens >= 0 &&
                        num_cls_tokens <= prefix && prefix <= norms.size(1),
                    "expected fp32 norms [batch, tokens] of at least the prefix");
    const size_t tokens = norms.size(1);
    vitreg::kernels().token_norms->count({size_t(norms.size(0)), tokens, static_cast<const float*>(norms.data_ptr()),
                                          norms.stride(0), norms.stride(1),
                                          {size_t(num_cls_tokens), size_t(prefix), tokens},
                                          of_groups<int64_t>(histogram, ScalarType::Long, 2048),
                                          of_groups<double>(sums, ScalarType::Double, 2),
                                          of_groups<float>(extremes, ScalarType::Float, 2),
                                          of_groups<int64_t>(nonfinite, ScalarType::Long, 2)});
}

// ---- assemble_tokens

// The tokens [1, n, C] of a parameter.
int64_t tokens_of(const MaybeTensor& x, int64_t channels) {
    if (!x) return 0;
    STD_TORCH_CHECK(x->dim() == 3 && x->size(0) == 1 && x->size(2) == channels && x->is_contiguous(),
                    "expected contiguous parameters [1, tokens, channels]");
    return x->size(1);
}

void assemble_forward(Tensor patches, MaybeTensor cls_token, MaybeTensor register_tokens, MaybeTensor pos_embed,
                      Tensor tokens) {
    const Sizes sizes = sizes_of(patches);
    const int64_t cls_tokens = tokens_of(cls_token, sizes.channels);
    const int64_t registers = tokens_of(register_tokens, sizes.channels);
    const int64_t prefix_rows = pos_embed ? tokens_of(pos_embed, sizes.channels) - sizes.tokens : 0;
    const Sizes of_result{sizes.batch, cls_tokens + registers + sizes.tokens, sizes.channels};
    const auto data = [&](const MaybeTensor& x) -> const void* {
        STD_TORCH_CHECK(!x || dtype_of(*x) == dtype_of(tokens), "expected parameters in the dtype of the tokens");
        return x ? x->data_ptr() : nullptr;
    };
    STD_TORCH_CHECK(prefix_rows >= 0 && prefix_rows <= cls_tokens + registers, "expected rows for the patches at least");
    STD_TORCH_CHECK(patches.stride(2) == 1 || sizes.channels == 1 || patches.stride(1) == 1 || sizes.tokens == 1,
                    "expected channels side by side, or patches");
    STD_TORCH_CHECK(dtype_of(tokens) == vitreg::Dtype::f32 || dtype_of(patches) == dtype_of(tokens),
                    "expected patches in the dtype of 16-bit tokens");
    vitreg::AssembleForward call{};
    call.sizes = {size_t(sizes.batch),  size_t(cls_tokens),     size_t(registers),
                  size_t(sizes.tokens), size_t(sizes.channels), size_t(prefix_rows)};
    call.patches = patches.data_ptr();
    call.patches_dtype = dtype_of(patches);
    call.stride_b = patches.stride(0);
    call.stride_m = patches.stride(1);
    call.stride_c = patches.stride(2);
    call.cls_token = data(cls_token);
    call.register_tokens = data(register_tokens);
    call.pos_embed = data(pos_embed);
    const vitreg::NormRowsOut out = rows_out(tokens, of_result);
    call.tokens = out.data;
    call.dtype = out.dtype;
    const auto run = vitreg::kernels().assemble->forward;
    deal_out(call.items(), grain(call.kPatches * sizes.channels),
             [&](int64_t first, int64_t last) { run(call, first, last); });
}

void assemble_backward(Tensor grad_tokens, int64_t num_cls_tokens, int64_t num_registers, int64_t prefix_rows,
                       MaybeTensor grad_cls_token, MaybeTensor grad_register_tokens, MaybeTensor grad_pos_embed) {
    const Sizes sizes = sizes_of(grad_tokens);
    const vitreg::NormRows arrived = rows(grad_tokens, sizes);
    const int64_t prefix = num_cls_tokens + num_registers, patches = sizes.tokens - prefix;
    STD_TORCH_CHECK(num_cls_tokens >= 0 && num_registers >= 0 && patches >= 0 && prefix_rows >= 0 &&
                        prefix_rows <= prefix,
                    "expected the sizes of the forward");
    const auto gradient = [&](const MaybeTensor& x, int64_t tokens) -> vitreg::ParameterGradient {
        if (!x) return {};
        STD_TORCH_CHECK(tokens_of(x, sizes.channels) == tokens, "expected gradients of the forward's parameters");
        return {x->data_ptr(), dtype_of(*x)};
    };
    vitreg::AssembleBackward call{};
    call.sizes = {size_t(sizes.batch), size_t(num_cls_tokens), size_t(num_registers),
                  size_t(patches),     size_t(sizes.channels), size_t(prefix_rows)};
    call.grad_tokens = arrived.data;
    call.dtype = arrived.dtype;
    call.stride_b = arrived.stride_b;
    call.stride_n = arrived.stride_n;
    call.cls_token = gradient(grad_cls_token, num_cls_tokens);
    call.register_tokens = gradient(grad_register_tokens, num_registers);
    call.pos_embed = gradient(grad_pos_embed, prefix_rows + patches);
    const auto run = vitreg::kernels().assemble->backward;
    deal_out(sizes.tokens, grain(sizes.batch * sizes.channels), [&](int64_t first, int64_t last) {
        std::vector<float> sums(sizes.channels);
        run(call, first, last, sums.data());
    });
}

// ---- attention

vitreg::Heads heads(const Tensor& x, const Tensor& query) {
    bool alike = x.dim() == 4 && x.scalar_type() == query.scalar_type();
    for (int i = 0; alike && i < 4; ++i) alike = x.size(i) == query.size(i);
    STD_TORCH_CHECK(alike, "expected [batch, heads, tokens, head dim] tensors of one shape and dtype");
    return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

vitreg::Heads heads_out(const Tensor& x, const Tensor& query) {
    const vitreg::Heads found = heads(x, query);
    result(x);
    return found;
}

void check_packing(const Tensor& cu_seqlens, int64_t tokens, int64_t prefix) {
    using torch::headeronly::ScalarType;
    const int64_t images = cu_seqlens.numel() - 1;
    bool right = cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.is_contiguous() && images > 0;
    const int32_t* at = right ? static_cast<const int32_t*>(cu_seqlens.data_ptr()) : nullptr;
    right = right && at[0] == 0 && at[images] == tokens;
    for (int64_t i = 0; right && i < images; ++i) right = int64_t{at[i + 1]} - at[i] >= std::max<int64_t>(1, prefix);
    STD_TORCH_CHECK(right, "cu_seqlens must be int32 and rise from 0 to the number of tokens, by the prefix or more");
}

void fill_call(vitreg::Attention& call, const Tensor& query, const Tensor& key, const Tensor& value,
               const MaybeTensor& key_mask, const MaybeTensor& cos, const MaybeTensor& sin, bool interleaved,
               const MaybeTensor& cu_seqlens, int64_t num_prefix_tokens, double scale) {
    STD_TORCH_CHECK(query.dim() == 4, "expected [batch, heads, tokens, head dim] tensors");
    STD_TORCH_CHECK(query.size(3) <= 128, "expected a head dim of at most 128");
    STD_TORCH_CHECK(0 <= num_prefix_tokens && num_prefix_tokens <= query.size(2),
                    "expected as many tokens as the prefix has, or more");
    call.batch = query.size(0);
    call.heads = query.size(1);
    call.tokens = query.size(2);
    call.head_dim = query.size(3);
    call.num_prefix_tokens = num_prefix_tokens;
    call.scale = static_cast<float>(scale);
    call.query = heads(query, query);
    call.key = heads(key, query);
    call.value = heads(value, query);
    if (key_mask) {
        STD_TORCH_CHECK(key_mask->dim() == 2 && key_mask->size(0) == call.batch && key_mask->size(1) == call.tokens &&
                            key_mask->scalar_type() == torch::headeronly::ScalarType::Bool,
                        "expected a bool mask [batch, tokens]");
        call.key_mask = static_cast<const bool*>(key_mask->data_ptr());
        call.key_mask_batch = key_mask->stride(0);
        call.key_mask_token = key_mask->stride(1);
    }
    if (cu_seqlens) {
        check_packing(*cu_seqlens, call.tokens, num_prefix_tokens);
        call.cu_seqlens = static_cast<const int32_t*>(cu_seqlens->data_ptr());
        call.images = cu_seqlens->numel() - 1;
        STD_TORCH_CHECK(call.batch == 1, "expected packed images in one batch row");
    }
    if (cos) {
        const int64_t patches = call.tokens - num_prefix_tokens * (cu_seqlens ? call.images : 1);
        for (const MaybeTensor* x : {&cos, &sin}) {
            STD_TORCH_CHECK(*x && (*x)->dim() == 3 && (*x)->size(0) == call.batch && (*x)->size(1) == patches &&
                                (*x)->size(2) == call.head_dim && (*x)->stride(2) == 1 &&
                                (*x)->stride(0) == cos->stride(0) && (*x)->stride(1) == cos->stride(1) &&
                                (*x)->scalar_type() == torch::headeronly::ScalarType::Float,
                            "expected fp32 cos and sin [batch, patches, head dim] with the same strides");
        }
        call.cos = static_cast<const float*>(cos->data_ptr());
        call.sin = static_cast<const float*>(sin->data_ptr());
        call.rope_batch = cos->stride(0);
        call.rope_token = cos->stride(1);
        call.rope_interleaved = interleaved;
    }
}

void attention_forward(Tensor query, Tensor key, Tensor value, MaybeTensor key_mask, MaybeTensor cos, MaybeTensor sin,
                       bool interleaved, MaybeTensor cu_seqlens, int64_t num_prefix_tokens, double scale, Tensor output,
                       MaybeTensor lse, MaybeTensor prefix_attention, MaybeTensor received_attention,
                       MaybeTensor max_logit) {
    vitreg::AttentionForward call;
    fill_call(call, query, key, value, key_mask, cos, sin, interleaved, cu_seqlens, num_prefix_tokens, scale);
    const int64_t rows = call.batch * call.heads * call.tokens;
    call.output = heads_out(output, query);
    call.lse = floats(lse, rows);
    call.prefix_attention = floats(prefix_attention, rows * num_prefix_tokens);
    call.received_attention = floats(received_attention, rows);
    call.max_logit = floats(max_logit, (cu_seqlens ? call.images : call.batch) * call.heads);
    const vitreg::AttentionKernels run = vitreg::kernels().attention(dtype_of(query));
    deal_out(run.forward_items(call), 1, [&](int64_t first, int64_t last) { run.forward(call, first, last); });
}

void attention_backward(Tensor query, Tensor key, Tensor value, MaybeTensor key_mask, MaybeTensor cos, MaybeTensor sin,
                        bool interleaved, MaybeTensor cu_seqlens, int64_t num_prefix_tokens, double scale,
                        Tensor output, Tensor lse, Tensor grad_output, Tensor grad_query, Tensor grad_key,
                        Tensor grad_value) {
    vitreg::AttentionBackward call;
    fill_call(call, query, key, value, key_mask, cos, sin, interleaved, cu_seqlens, num_prefix_tokens, scale);
    call.output = heads(output, query);
    call.lse = floats(lse, call.batch * call.heads * call.tokens);
    call.grad_output = heads(grad_output, query);
    call.grad_query = heads_out(grad_query, query);
    call.grad_key = heads_out(grad_key, query);
    call.grad_value = heads_out(grad_value, query);
    call.threads = torch::stable::get_num_threads();
    const vitreg::AttentionKernels run = vitreg::kernels().attention(dtype_of(query));
    deal_out(run.backward_items(call), 1, [&](int64_t first, int64_t last) { run.backward(call, first, last); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vitreg_cpu, library) {
    library.def("cpu_isa() -> str");
    library.def("peak_gflops(ScalarType dtype, float seconds) -> float");
    library.def(
        "residual_norm_forward(Tensor x, Tensor? branch, Tensor? layer_scale, Tensor? drop_path, Tensor weight, "
        "Tensor? bias, float eps, Tensor(a!)? residual, Tensor(b!) normalized, Tensor(c!) token_norms, "
        "Tensor(d!)? mean, Tensor(e!) rstd) -> ()");
    library.def(
        "residual_norm_backward(Tensor? grad_residual, Tensor? grad_normalized, Tensor residual, Tensor? mean, "
        "Tensor rstd, Tensor? branch, Tensor? layer_scale, Tensor? drop_path, Tensor weight, Tensor(a!)? grad_x, "
        "Tensor(b!)? grad_branch, Tensor(c!)? grad_layer_scale, Tensor(d!)? grad_weight, Tensor(e!)? grad_bias) -> ()");
    library.def("token_norms(Tensor x, Tensor(a!) norms) -> ()");
    library.def(
        "accumulate_token_norms(Tensor norms, int num_cls_tokens, int num_registers, Tensor(a!) histogram, "
        "Tensor(b!) sums, Tensor(c!) extremes, Tensor(d!) nonfinite) -> ()");
    library.def(
        "assemble_forward(Tensor patches, Tensor? cls_token, Tensor? register_tokens, Tensor? pos_embed, "
        "Tensor(a!) tokens) -> ()");
    library.def(
        "assemble_backward(Tensor grad_tokens, int num_cls_tokens, int num_registers, int prefix_rows, "
        "Tensor(a!)? grad_cls_token, Tensor(b!)? grad_register_tokens, Tensor(c!)? grad_pos_embed) -> ()");
    const std::string call =
        "(Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor? cos, Tensor? sin, bool interleaved, "
        "Tensor? cu_seqlens, int num_prefix_tokens, float scale, ";
    library.def(("attention_forward" + call +
                 "Tensor(a!) output, Tensor(b!)? lse, Tensor(c!)? prefix_attention, Tensor(d!)? received_attention, "
                 "Tensor(e!)? max_logit) -> ()")
                    .c_str());
    library.def(("attention_backward" + call +
                 "Tensor output, Tensor lse, Tensor grad_output, Tensor(a!) grad_query, Tensor(b!) grad_key, "
                 "Tensor(c!) grad_value) -> ()")
                    .c_str());
}

STABLE_TORCH_LIBRARY_IMPL(vitreg_cpu, CompositeExplicitAutograd, library) {
    library.impl("cpu_isa", TORCH_BOX(&cpu_isa));
    library.impl("peak_gflops", TORCH_BOX(&peak_gflops));
}

STABLE_TORCH_LIBRARY_IMPL(vitreg_cpu, CPU, library) {
    library.impl("residual_norm_forward", TORCH_BOX(&residual_norm_forward));
    library.impl("residual_norm_backward", TORCH_BOX(&residual_norm_backward));
    library.impl("token_norms", TORCH_BOX(&token_norms));
    library.impl("accumulate_token_norms", TORCH_BOX(&accumulate_token_norms));
    library.impl("assemble_forward", TORCH_BOX(&assemble_forward));
    library.impl("assemble_backward", TORCH_BOX(&assemble_backward));
    library.impl("attention_forward", TORCH_BOX(&attention_forward));
    library.impl("attention_backward", TORCH_BOX(&attention_backward));
}
