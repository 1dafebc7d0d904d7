"""Settings of a training that a folder of images defines: sizes, classes, network, batch.

size        largest of 8, 16, 32, 64, 128, 256 that is at most the median shorter side
channels    L if all images are grey, else RGB
classes     number of sub-folders; 10 % of the labels are dropped if there are classes
sigma_data  standard deviation of 128 images, with two digits
schedule    cosine; above 64 pixels shifted by 2 ln(64/size) in λ (Hoogeboom et al. 2023)
network     UNet2DModel of diffusers, see `NETWORKS`; settings without a class replace its arguments
"""

import math
import os
import sys
from collections.abc import Mapping
from typing import Any

from diffcore.io.parser import ComponentParser

__all__ = ["are_incomplete", "complete_settings"]

NETWORKS: dict[int, tuple[tuple[int, ...], int]] = {
    8: ((64, 128), 128),
    16: ((64, 128, 128), 128),
    32: ((128, 256, 256, 256), 128),
    64: ((128, 256, 256, 512), 64),
    128: ((128, 128, 256, 256, 512), 32),
    256: ((128, 128, 256, 256, 512, 512), 16),
}
"""Smallest size in pixels -> channels of the levels of the network, and batch size.

Each level halves the resolution. The networks of 32 and 256 pixels have the channels of DDPM (Ho et
al. 2020, appendix B) for CIFAR-10 and for images of 256 pixels.
"""
ATTENTION = 16
"""Largest resolution in pixels of the levels with attention, as in DDPM."""
SAMPLE = 128
"""Number of images of which the standard deviation is measured."""
REFERENCE = 64
"""Size in pixels up to which the schedule is not shifted."""
GUIDANCE = 1.5
DROPOUT = 0.1


def are_incomplete(settings: Mapping[str, Any]) -> bool:
    """Whether settings train on a folder of images, and leave the network to it.

    Args:
        settings: content of a settings file.
    """
    data = settings.get("data")
    path = data.get("class_path") if isinstance(data, Mapping) else data
    names_network = "network" in settings and not _is_partial(settings["network"])
    return not names_network and str(path).rpartition(".")[2] == "ImageFolder"


def _is_partial(network: Any) -> bool:
    """Whether settings of a network are arguments alone, and leave its class to the folder."""
    return isinstance(network, Mapping) and "class_path" not in network


def complete_settings(settings: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in what settings leave to their folder of images, and report it on stderr.

    Args:
        settings: content of the settings file; it takes precedence over the folder.
        given: settings of all files and of the command line by dotted name.

    Returns:
        The completed settings.

    Raises:
        ValueError: The folder is not named or not of images, or no network is known for the size.
    """
    if str(given.get("data")).rpartition(".")[2] != "ImageFolder":
        return settings
    folder = given.get("data.folder")
    if not folder:
        raise ValueError("this training reads a folder of images: name it, --data.folder FOLDER")
    data = _read_folder(str(folder), given)
    images, scan = data.images, data.images.scan
    rows = scan.readable
    shorter = int(scan.width.minimum(scan.height)[rows].median())
    images.size = size = _number(given, "data.size") or _choose_size(shorter)
    is_grey = bool(scan.is_grey[rows].all())
    images.channels = str(given.get("data.channels") or ("L" if is_grey else "RGB"))
    classes = _number(given, "process.classes", len(data.class_names))
    channels = 1 if images.channels == "L" else 3
    dropout = given.get("process.dropout", DROPOUT if classes else 0.0)
    process = {
        "schedule": _schedule(size),
        "shape": [channels, size, size],
        "low": -1,
        "high": 1,
        "sigma_data": given.get("process.sigma_data") or _measure_deviation(images),
        "classes": classes,
        "dropout": dropout,
    }
    chosen: dict[str, Any] = {
        "batch_size": _batch_size(size),
        "guidance": {"class_path": "CFG", "init_args": {"scale": GUIDANCE if dropout else 1.0}},
    }
    if "network" not in given:
        own = (settings.get("network") or {}).get("init_args") or {}
        outputs = channels * (2 if _is_variance_learned(settings, given) else 1)
        chosen["network"] = _network(size, channels, classes, outputs, own)
    found = f"{len(data):,} images, median shorter side {shorter} pixels"
    _report(found, process, chosen | {"batch_size": _find_batch_size(settings, given, size)})
    return (
        chosen
        | {name: value for name, value in settings.items() if name != "network"}
        | {
            "process": process | dict(settings.get("process") or {}),
            "data": {
                "class_path": "ImageFolder",
                "init_args": dict(_arguments(settings))
                | {"size": size, "channels": images.channels, "folder": str(folder)},
            },
        }
    )


def _read_folder(folder: str, given: Mapping[str, Any]) -> Any:
    """The images of a folder, of which size and channels are not chosen yet."""
    from diffcore.training.data.image_folder import ImageFolder

    parser = ComponentParser(prog="diffcore train")
    parser.add_class_arguments(ImageFolder, "data", skip={"size", "channels", "fit", "flip"})
    options = {
        name: given[f"data.{name}"] for name in ("unreadable", "verify") if f"data.{name}" in given
    }
    settings = parser.parse_object({"data": {"folder": folder, **options}})
    return ImageFolder(**settings.data.as_dict(), size=1)


def _choose_size(shorter: int) -> int:
    """The largest size with a network of its own that is at most the shorter side in pixels."""
    return max((size for size in NETWORKS if size <= shorter), default=min(NETWORKS))


def _row(size: int) -> tuple[tuple[int, ...], int]:
    return NETWORKS[max((known for known in NETWORKS if known <= size), default=min(NETWORKS))]


def _batch_size(size: int) -> int:
    return _row(size)[1]


def _is_variance_learned(settings: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    own = (settings.get("process") or {}).get("variance")
    return bool(given.get("process.variance", own) == "learned")


def _find_batch_size(settings: Mapping[str, Any], given: Mapping[str, Any], size: int) -> int:
    """The batch size of the command line, of the settings, or of the size in pixels."""
    own = _number(settings, "batch_size", _batch_size(size))
    return _number(given, "batch_size", _number(given, "batch-size", own))


def _network(
    size: int, channels: int, classes: int, outputs: int, own: Mapping[str, Any]
) -> dict[str, Any]:
    """The spec of the network for a size in pixels; a learned variance doubles the outputs.

    `own` are arguments of the settings, which replace those chosen here.
    """
    widths = own.get("block_out_channels", _row(size)[0])
    factor = 2 ** (len(widths) - 1)
    if size % factor or size < min(NETWORKS):
        below = max(size // factor * factor, min(NETWORKS))
        raise ValueError(
            f"data.size is {size}, but the network of this size halves it {len(widths) - 1} times: "
            f"set data.size to a multiple of {factor}, such as {below}, or name a network of yours"
        )
    attends = [size >> level <= ATTENTION for level in range(len(widths))]
    return {
        "class_path": "diffusers.UNet2DModel",
        "init_args": {
            "sample_size": size,
            "in_channels": channels,
            "out_channels": outputs,
            "block_out_channels": list(widths),
            "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
            "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
            "layers_per_block": 2,
            "attention_head_dim": 64,
            "num_class_embeds": classes + 1 if classes else None,  # with the null label
            **own,
        },
    }


def _schedule(size: int) -> Any:
    if size <= REFERENCE:
        return "Cosine"
    shift = round(2 * math.log(REFERENCE / size), 4)
    return {"class_path": "Shifted", "init_args": {"inner": "Cosine", "shift": shift}}


def _measure_deviation(images: Any) -> float:
    """The standard deviation of the values of some images, with two digits.

    More digits would change with the version of the decoder, and a run could not be resumed.
    """
    from diffcore.core.random import permutation

    count, total, square = 0, 0.0, 0.0
    for index in permutation(0, 0, len(images))[:SAMPLE].tolist():
        x0 = images[index].double()
        count += x0.numel()
        total += float(x0.sum())
        square += float(x0.square().sum())
    variance = max(square / count - (total / count) ** 2, 0.0)
    return max(float(f"{math.sqrt(variance):.2g}"), 0.01)


def _number(given: Mapping[str, Any], name: str, default: int = 0) -> int:
    """A number among the settings; the parser of the command refuses what is none."""
    value = given.get(name, default)
    return value if isinstance(value, int) else default


def _arguments(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    data = settings["data"]
    return data.get("init_args") or {} if isinstance(data, Mapping) else {}


def _report(found: str, process: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    widths = chosen.get("network", {}).get("init_args", {}).get("block_out_channels")
    network = f", UNet2DModel of channels {widths}" if widths else ""
    print(
        f"diffcore: {found}: shape {process['shape']}, {process['classes']} classes, sigma_data "
        f"{process['sigma_data']}, batch size {chosen['batch_size']}{network}; options such as "
        "--data.size change it, --print_config prints all settings",
        file=sys.stderr,
    )
