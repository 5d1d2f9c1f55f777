"""Code as users write it, with every public name; a type checker reads it, nobody runs it.

``assert_type`` says what a strict user should get without a cast. The test is ``tests/package/test_typing.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from vitreg_kernels import (
    AttentionOutputs,
    Calibration,
    Captured,
    Explanation,
    NormDistribution,
    NormReport,
    PatchReport,
    RegisterAttention,
    RegisterBlock,
    RegisterTokens,
    RegisterViT,
    Rope,
    TokenLayout,
    TokenNormMonitor,
    TokenNormStats,
    UnsupportedError,
    ViTConfig,
    __version__,
    calibrate,
    capture,
    explain,
    functional,
    integrations,
    load_vit,
    monitor,
    patch,
    patched,
    unpatch,
)
from vitreg_kernels.functional import (
    SAVE_LIST,
    assemble_tokens,
    register_attention,
    register_attention_qkv,
    residual_layer_norm,
    token_norm_stats,
    token_norms,
)
from vitreg_kernels.nn import PRESETS


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, names: Sequence[str]) -> Tensor:
    assert_type(register_attention(query, key, value), Tensor)
    assert_type(register_attention(query, key, value, num_prefix_tokens=5, attn_mask=mask, scale=0.125), Tensor)
    rope = Rope(torch.ones(196, 64), torch.zeros(196, 64), interleaved=True)
    output, statistics = register_attention(query, key, value, outputs=("lse", "prefix_attention"), rope=rope)
    assert_type(output, Tensor)
    assert_type(statistics, AttentionOutputs)
    assert_type(statistics.prefix_attention, Tensor | None)
    maybe = register_attention(query, key, value, outputs=names, backend="sdpa")
    assert_type(maybe, Tensor | tuple[Tensor, AttentionOutputs])
    return maybe if isinstance(maybe, Tensor) else maybe[0]


def packed(qkv: Tensor, bounds: Tensor) -> Tensor:
    output = register_attention_qkv(qkv, cu_seqlens=bounds, max_seqlen=261, dropout_p=0.1)
    assert_type(output, Tensor)
    _, statistics = functional.register_attention_qkv(qkv, outputs=("token_norms",))
    assert_type(statistics.token_norms, Tensor | None)
    return output


def other_ops(x: Tensor, branch: Tensor, weight: Tensor, cls_token: Tensor) -> Tensor:
    norm = residual_layer_norm(x, branch, layer_scale=weight, weight=weight, bias=None, rms=True)
    residual, normalized, norms = norm
    assert_type(norm.token_norms, Tensor)
    stats = token_norm_stats(x, TokenLayout(grid=(16, 16)))
    assert_type(stats, TokenNormStats)
    assert_type(stats.patches, NormDistribution)
    assert_type(stats.patches.percentile(99.0), Tensor)
    assert_type(stats.outliers(median=3.0).threshold, Tensor)
    tokens = assemble_tokens(x, cls_token, register_tokens=None, pos_embed=None)
    return residual + normalized + tokens + (norms - token_norms(x)).unsqueeze(-1)


def layout(x: Tensor) -> Tensor:
    tokens = TokenLayout(256, num_registers=4)
    cls, registers, patches = tokens.split(x)
    assert_type(tokens.num_tokens, int)
    assert_type(tokens.registers, slice)
    return torch.cat((cls, registers, patches, tokens.strip_registers(x)), dim=1)


class Model(nn.Module):
    """A module with each of ours in it."""

    def __init__(self) -> None:
        super().__init__()
        self.registers = RegisterTokens(384, 4)
        self.block = RegisterBlock(384, 6, layer_scale=None, drop_path=0.1, backend={"attention": "sdpa"})
        self.attention = RegisterAttention(384, 6, num_registers=4, qk_norm=True, dtype=torch.bfloat16, device="cuda")

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.registers(x))
        out: Tensor = self.attention(x)
        return self.registers.remove(out)


def whole_model(folder: Path, images: Tensor, weights: dict[str, Tensor]) -> RegisterViT:
    config = ViTConfig(image_size=(288, 512), patch_size=16, mlp="swiglu", layer_scale=None)
    assert_type(config.layout, TokenLayout)
    assert_type(PRESETS["vit_small_patch14"], ViTConfig)
    model = RegisterViT(config, device="meta")
    model = RegisterViT.preset("vit_base_patch14", num_registers=8)
    assert_type(model, RegisterViT)
    assert_type(load_vit(folder, num_registers=4), RegisterViT)
    assert_type(load_vit(str(folder), grid=(18, 32)), RegisterViT)
    model = load_vit(weights, device="cpu", dtype=torch.float32).eval()
    assert_type(model.forward_features(images), Tensor)
    features, statistics = model.forward_features(images, outputs=("token_norms",))
    assert_type(features, Tensor)
    assert_type(statistics, AttentionOutputs)
    assert_type(model.intermediate_layers(images, [2, 5], norm=True)[0].patches, Tensor)
    return model


def somebody_elses_model(model: nn.Module, images: Tensor) -> Tensor:
    report = patch(model, level="block", num_prefix_tokens=5, backend={"residual_norm": "composite"}, strict=True)
    assert_type(report, PatchReport)
    names = [module.name for module in report.left]
    with patched(model) as during, capture(model, "prefix_attention", layers=[-1, "blocks.0.attn"]) as maps:
        assert_type(during, PatchReport)
        assert_type(maps, Captured)
        model(images)
        last = maps[names[-1]]
    unpatch(model)
    integrations.register_transformers()
    stream = integrations.residual_stream(model)
    if stream is not None:
        assert_type(stream.layout, TokenLayout)
    assert_type(last, Tensor)
    return last


def while_training(model: nn.Module, images: Tensor, file: Path) -> NormReport:
    history = monitor.CsvWriter(file, median=3.0)
    with TokenNormMonitor(model, layout=TokenLayout(num_registers=4)) as norms:
        model(images)
        report = norms.compute(all_reduce=True)
        history.write(1, report)
        norms.reset()
        norms.load_state_dict(norms.state_dict())
    assert_type(report, NormReport)
    assert_type(report.rows(mad=5.0)[0].median, float | None)
    print(report.table())
    return report


def which_backend(query: Tensor, model: nn.Module, images: Tensor) -> str | None:
    found = calibrate([(8, 6, 261, 64)], dtype=torch.bfloat16, device="cuda", rope=True, dry_run=True)
    assert_type(found, Calibration)
    assert_type(calibrate(model, images).file, Path | None)
    try:
        explanation = explain(query, outputs=("lse",), backend="cpu")
    except UnsupportedError as error:
        raise SystemExit(f"vitreg_kernels {__version__}: {error}") from error
    assert_type(explanation, Explanation)
    assert_type(explanation.reasons, dict[str, list[str]])
    return explanation.backend


def kept_by_selective_checkpointing() -> list[object]:
    return [torch.ops.aten.mm.default, *SAVE_LIST]
