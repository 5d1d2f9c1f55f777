"""The four ops by name: their backends, and what their calls may ask of a backend. What tells of all ops reads this."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Literal, NamedTuple

from ..dispatch import Backend, find
from ..errors import UnsupportedError
from ._shared import observers
from .assemble import backends as assemble_backends
from .assemble import features as assemble_features
from .attention import backends as attention_backends
from .attention import features as attention_features
from .residual_norm import backends as residual_norm_backends
from .residual_norm import features as residual_norm_features
from .token_norms import backends as token_norms_backends
from .token_norms import features as token_norms_features


class Op(NamedTuple):
    """One op.

    Attributes:
        name: that of its folder.
        registry: the module that holds its ``BACKENDS``.
        own_features: what a call of it can ask of a backend beyond the plain one.
        size: the field of ``Requirements`` that tells its backends apart; ``None`` if they serve any size.
    """

    name: str
    registry: ModuleType
    own_features: tuple[str, ...]
    size: Literal["head_dims", "channels"] | None

    @property
    def backends(self) -> tuple[Backend, ...]:
        """In the order of preference."""
        return self.registry.BACKENDS

    @property
    def features(self) -> tuple[str, ...]:
        """What a call can ask of a backend beyond the plain one, those that all ops share at the end."""
        return (*self.own_features, *observers.ALL)


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op("attention", attention_backends, attention_features.ALL, "head_dims"),
        Op("residual_norm", residual_norm_backends, residual_norm_features.ALL, "channels"),
        Op("token_norms", token_norms_backends, token_norms_features.ALL, "channels"),
        Op("assemble", assemble_backends, assemble_features.ALL, None),
    )
}


def backend_by_op(backend: str | Mapping[str, str | None] | None, ops: tuple[str, ...]) -> dict[str, str | None]:
    """What each op of a module is to be computed by, so that a misspelt name fails when the module is made.

    Args:
        backend: a name, which goes to every one of the ops that has a backend of it and leaves the others their
            default; or names by op, of which those left out take their default.
        ops: those that the module calls.

    Returns:
        A name, or ``None`` for the default, for each of ``ops``.

    Raises:
        TypeError: if it is neither a name nor a mapping.
        ValueError: if no op has the backend that is named, or the module calls no op of a name.
    """
    if backend is None:
        return dict.fromkeys(ops)
    if isinstance(backend, str):
        having = [op for op in ops if any(b.name == backend for b in OPS[op].backends)]
        if not having:
            names = dict.fromkeys(b.name for op in ops for b in OPS[op].backends)
            raise ValueError(f"unknown backend {backend!r}: expected None or one of {', '.join(map(repr, names))}")
        return {op: backend if op in having else None for op in ops}
    if not isinstance(backend, Mapping):
        raise TypeError(f"backend must be a name or a mapping by op, got a {type(backend).__name__}")
    for op, name in backend.items():
        if op not in ops:
            raise ValueError(f"no op {op!r} is called here: expected any of {', '.join(map(repr, ops))}")
        if name is not None:
            find(OPS[op].backends, name)
    return {op: backend.get(op) for op in ops}


def check_serves(op: str, backend: str | None, feature: str, setting: str) -> None:
    """Refuse a setting of a module that the backend named for one of its ops cannot serve, when the module is made.

    Args:
        op: the op.
        backend: a name that it has a backend of, or ``None`` for the default, which is one that can.
        feature: what the setting asks of the backend.
        setting: the setting in words, ``"attn_drop=0.1"``.

    Raises:
        UnsupportedError: if the backend does not declare the feature.
    """
    if backend is None or feature in find(OPS[op].backends, backend).requirements.features:
        return
    able = [b.name for b in OPS[op].backends if feature in b.requirements.features]
    raise UnsupportedError(
        f"backend {backend!r} does not support {feature}, which {setting} asks for; leave backend=None or name one of "
        f"{', '.join(able)}"
    )
