"""A configuration out of what weights tell, what a ``config.json`` says, what the caller gives, and what is assumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..nn.config import ViTConfig, is_positive_int
from .library import Converted, Library
from .positions import Reading, read_rows

FIELDS = tuple(field.name for field in dataclasses.fields(ViTConfig))


def described(library: Library, description: Mapping[str, Any], found: Converted) -> dict[str, Any]:
    """The fields that a folder's ``config.json`` tells; they agree with the weights."""
    if library.describe is None:
        raise ValueError(
            f"{library.name} writes no config.json, and one lies beside its weights: give the file of these"
        )
    said = library.describe(description, found)
    for field, value in said.items():
        if isinstance(value, list):  # JSON has no tuples; a patch of one side may be given as two
            equal = field == "patch_size" and len(value) == 2 and value[0] == value[1]
            said[field] = value[0] if equal else tuple(value)
    if "image_size" in said:
        sides = _sides(said["image_size"])
        if len(sides) != 2 or not all(map(is_positive_int, sides)):
            raise ValueError(
                f"config.json says image_size={said['image_size']!r}, which must be a positive int, or a list of two, "
                "height and width"
            )
    if differing := _disagreement(said, found.told):
        raise ValueError(
            f"config.json says {differing}={said[differing]!r}, and the weights have {found.told[differing]!r}"
        )
    return said


def configure(
    found: Converted, said: Mapping[str, Any], changes: Mapping[str, Any], grid: tuple[int, int] | None
) -> tuple[ViTConfig, dict[str, Any]]:
    """The configuration of the weights as they are, and those of its fields, and the grid, that were assumed.

    Args:
        found: the weights, and what they tell.
        said: what ``config.json`` tells.
        changes, grid: as ``load_vit`` takes them.
    """
    given = {field: value for field, value in changes.items() if field not in ("image_size", "num_registers")}
    if differing := _disagreement(given, found.told):
        raise ValueError(
            f"{differing}={given[differing]!r} disagrees with the weights, which have "
            f"{differing}={found.told[differing]!r}"
        )
    if differing := _disagreement(given, {field: said[field] for field in said.keys() - found.told.keys()}):
        raise ValueError(
            f"{differing}={given[differing]!r} disagrees with config.json, which says {said[differing]!r}: give the "
            "file of the weights alone to say otherwise"
        )
    fields = {**found.assumed, **found.fixed, **said, **found.told, **given}
    if "num_heads" not in fields:
        raise ValueError(f"the number of heads does not follow from dim={fields['dim']}: give num_heads")
    unsure = {field: fields[field] for field in FIELDS if field in found.assumed.keys() - said.keys() - given.keys()}
    patch_size = fields["patch_size"]
    if grid is not None and fields["position"] == "rope":
        raise ValueError(f"grid={grid!r} is of position rows, of which the weights, with rope, have none; leave it out")
    grid = _learnt_grid(grid, said.get("image_size"), patch_size)
    if fields["position"] == "rope":
        grid = grid or (14, 14)  # any will do
    else:
        image_grid = None
        if "image_size" in changes:
            image_grid = ViTConfig(image_size=changes["image_size"], patch_size=patch_size).grid
        reading = _read_rows(found, fields, grid, image_grid)
        if reading.assumed:
            unsure["grid"] = reading.grid
        grid, fields["position_rows"] = reading.grid, reading.position_rows
    height, width = (side * patch_size for side in grid)
    fields["image_size"] = height if height == width else (height, width)
    return ViTConfig(**fields), unsure


def _read_rows(
    found: Converted, fields: Mapping[str, Any], grid: tuple[int, int] | None, image_grid: tuple[int, int] | None
) -> Reading:
    """The position rows of the weights, with what the fields say of them."""
    if "pos_embed" not in found.weights:
        raise ValueError("the weights lack pos_embed")
    tokens, registers = fields["num_cls_tokens"], fields["num_registers"]
    prefixes = {"patches": 0, "cls": tokens, "prefix": tokens + registers}
    if (only := fields.get("position_rows")) is not None:
        ViTConfig(position_rows=only)  # which says what it may be
        prefixes = {only: prefixes[only]}
    rows = found.weights["pos_embed"].shape[1]
    return read_rows(rows, prefixes, grid=grid, image_grid=image_grid, square=found.square)


def _learnt_grid(
    given: tuple[int, int] | None, image_size: int | tuple[int, int] | None, patch_size: int
) -> tuple[int, int] | None:
    """The grid of the position rows as far as it is known: as given, or of the images that ``config.json`` names."""
    if given is not None and not (isinstance(given, tuple) and len(given) == 2 and all(map(is_positive_int, given))):
        raise ValueError(f"grid must be a tuple of two positive ints, rows and columns of patches, not {given!r}")
    if image_size is None:
        return given
    # Of an image that is no multiple of a patch, timm and transformers leave the rest out.
    height, width = _sides(image_size)
    said = (height // patch_size, width // patch_size)
    if given not in (None, said):
        raise ValueError(
            f"grid={given!r} disagrees with config.json, whose images of {height} x {width} have {said}: give the "
            "file of the weights alone to say otherwise"
        )
    return said


def _sides(image_size: Any) -> tuple:
    return image_size if isinstance(image_size, tuple) else (image_size, image_size)


def _disagreement(given: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """The first field that two have and of which they say different things."""

    def meant(field: str, value: Any) -> Any:
        if field == "layer_scale":  # the weights tell that there is one, not how it began
            return value is not None
        return 4 * found["dim"] if field == "hidden_dim" and value is None else value

    shared = [field for field in given if field in found]
    return next((field for field in shared if meant(field, given[field]) != meant(field, found[field])), None)
