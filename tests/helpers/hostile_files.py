"""Folders that attack their reader: runs, checkpoints and pipelines with one hostile file each."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

HOSTILE = "hostile_module"
"""Module beside every hostile folder; importing it is an attack that succeeded."""
ELASTIC = {
    "class_path": "torch.distributed.launcher.api.elastic_launch",
    "init_args": {
        "config": {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 1},
        "entrypoint": "./attack.sh",
    },
}
CALLABLES = (
    "os.system",
    "builtins.eval",
    "builtins.exec",
    "subprocess.Popen",
    "pathlib.Path",
    "torch.load",
    "torch.hub.load",
    "torch.jit.load",
    "torch.package.PackageImporter",
    "torch.utils.cpp_extension.load_inline",
    "torch.distributed.launcher.api.elastic_launch",
    "torch.distributed.nn.api.remote_module.RemoteModule",
    "torch.utils.data.datapipes.iter.FileOpener",
    "transformers.pipeline",
    "transformers.AutoModel.from_pretrained",
    "diffusers.DiffusionPipeline.from_pretrained",
    "diffusers.AutoModel",
    "accelerate.Accelerator",
    "accelerate.commands.launch.launch_command",
    f"{HOSTILE}.Attack",
    "diffcore.io.files.os.system",
    "torch.nn.modules.module.warnings.warn",
)
TRAINED = ("data", "optimizer", "lr", "ema", "sampler", "grid", "guidance")
SAMPLED = ("sampler", "grid", "guidance")

Damage = Callable[[Path], object]


class Bomb:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch attacked",)


def spec(path: str) -> dict[str, Any]:
    return {"class_path": path, "init_args": {"command": "touch attacked"}}


def settings(**changes: Any) -> Damage:
    """Change settings of a run's config; a name may lead into tables ("objective.weight")."""

    def damage(folder: Path) -> None:
        path = folder / "config.yaml"
        content = yaml.safe_load(path.read_text())
        for name, value in changes.items():
            table = content
            *parents, last = name.split("__")
            for parent in parents:
                table = table[parent]
            table[last] = value
        path.write_text(yaml.safe_dump(content))

    return damage


def entries(file: str, **changes: Any) -> Damage:
    """Change entries of the object in a JSON file."""

    def damage(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def content(file: str, data: bytes | str) -> Damage:
    """Replace the content of a file."""

    def damage(folder: Path) -> None:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)

    return damage


def recoded(file: str) -> Damage:
    return lambda folder: (folder / file).write_bytes((folder / file).read_text().encode("utf-16"))


def linked(file: str, target: str = "../outside/secret") -> Damage:
    """Replace a file by a link that leads out of the folder."""

    def damage(folder: Path) -> None:
        path = folder / file
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to((folder / target).resolve())

    return damage


def header(file: str, length: int, size: int = 100) -> Damage:
    """A safetensors file that declares the length of its header, and is sparse on the disk."""

    def damage(folder: Path) -> None:
        with (folder / file).open("wb") as opened:
            opened.write(length.to_bytes(8, "little"))
            opened.truncate(size)

    return damage


def only_pickle(file: str) -> Damage:
    """Put a pickle in place of safetensors."""

    def damage(folder: Path) -> None:
        path = folder / file
        for weights in path.parent.glob("*.safetensors"):
            weights.unlink()
        path.write_bytes(pickle.dumps(Bomb()))

    return damage


def indexed(file: str, name: str) -> Damage:
    """An index of weights that names a file."""

    def damage(folder: Path) -> None:
        path = folder / file
        for weights in path.parent.glob("*.safetensors"):
            weights.unlink()
        (path.parent / "attack.bin").write_bytes(pickle.dumps(Bomb()))
        path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": {"a": name}}))

    return damage


def manifest(change: Callable[[dict[str, Any]], Any], checkpoint: str = "step-00000004") -> Damage:
    """Change a checkpoint's manifest, and write the hash that fits."""

    def damage(folder: Path) -> None:
        shutil.rmtree(folder / "checkpoints" / "step-00000002", ignore_errors=True)
        path = folder / "checkpoints" / checkpoint / "manifest.json"
        data = json.loads(path.read_text())
        del data["sha256"]
        change(data)
        digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps(data | {"sha256": digest}))

    return damage


def pickled_checkpoint(folder: Path) -> None:
    data = pickle.dumps(Bomb())
    path = folder / "checkpoints" / "step-00000004" / "model.safetensors"
    path.write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest(lambda found: found["files"].update({"model.safetensors": entry}))(folder)


def own_code(folder: Path) -> None:
    """Code beside the weights, named by the index."""
    (folder / f"{HOSTILE}.py").write_text("import os\nos.system('touch attacked')\n")
    entries("model_index.json", unet=[HOSTILE, "Attack"])(folder)


ALIASES = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)
)
HUGE = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 10**7, "out_features": 10**7}}
DEEP = {"class_path": "diffusers.UNet2DModel", "init_args": {"layers_per_block": 10**6}}
TABLE = {"class_path": "Discrete", "init_args": {"steps": 10**12}}
KNOTS = {"class_path": "Explicit", "init_args": {"logsnrs": [-2.0, -2.0, 3.0]}}

RUNS: dict[str, Damage] = {
    **{f"network is {path}": settings(network=spec(path)) for path in CALLABLES},
    **{f"network is the text {path}": settings(network=path) for path in CALLABLES[::4]},
    "a tag that calls": content(
        "config.yaml", "network: !!python/object/apply:os.system [touch attacked]"
    ),
    "a tag that imports": content("config.yaml", f"network: !!python/module:{HOSTILE}"),
    "a tag that names": content("config.yaml", "network: !!python/name:os.system"),
    "a tag that builds": content(
        "config.yaml", f"network: !!python/object/new:{HOSTILE}.Attack []"
    ),
    "aliases": content("config.yaml", ALIASES + "network: *a29\n"),
    "brackets": content("config.yaml", "network: " + "[" * 5_000),
    "a torn config": content("config.yaml", "network: {class_path: "),
    "a config in UTF-16": recoded("config.yaml"),
    "a config that is a list": content("config.yaml", "[1, 2]"),
    "a config that is empty": content("config.yaml", ""),
    "a huge network": settings(network=HUGE),
    "a million layers": settings(network=DEEP),
    "a process that calls": entries("process.json", schedule=spec("os.system")),
    "a process with a huge table": entries("process.json", schedule=TABLE),
    "a process of a huge shape": entries("process.json", shape=[10**6, 10**6, 10**6]),
    "a process in UTF-16": recoded("process.json"),
    "a process that is a list": content("process.json", "[]"),
    "a process that is null": content("process.json", "null"),
    "metrics that are a link": linked("metrics.jsonl"),
    "checkpoints that are a link": linked("checkpoints", "../outside"),
}
"""Name -> damage to a run that `train --resume`, `sample`, `info` and `export` read."""

TRAINING: dict[str, Damage] = {
    **{
        f"{name} is {path}": settings(**{name: spec(path)})
        for name, path in zip(TRAINED, CALLABLES, strict=False)
    },
    "a scale is a launcher": settings(
        guidance={"class_path": "CFG", "init_args": {"scale": ELASTIC}}
    ),
    "a weight is a launcher": settings(objective__weight=ELASTIC),
    "a schedule is os.system": settings(process__schedule=spec("os.system")),
    "a huge table": settings(process__schedule=TABLE),
    "metrics in UTF-16": recoded("metrics.jsonl"),
}
"""Name -> damage to a run that `train --resume` reads."""

SAMPLING: dict[str, Damage] = {
    **{
        f"{name} is {path}": settings(**{name: spec(path)})
        for name, path in zip(SAMPLED, CALLABLES[::-1], strict=False)
    },
    "a scale is a launcher": settings(
        guidance={"class_path": "CFG", "init_args": {"scale": ELASTIC}}
    ),
    "a scale is torch.load": settings(
        guidance={"class_path": "CFG", "init_args": {"scale": "torch.load"}}
    ),
    "a scale is a layer": settings(guidance={"class_path": "CFG", "init_args": {"scale": HUGE}}),
    "a classifier is torch.hub.load": settings(
        guidance={"class_path": "ClassifierGuidance", "init_args": {"classifier": "torch.hub.load"}}
    ),
    "a weaker network is built": settings(
        guidance={"class_path": "AutoGuidance", "init_args": {"scale": 2, "weaker": {
            "class_path": "WeakerNetwork", "init_args": {"network": {
                "class_path": "Denoiser", "init_args": {"network": HUGE}}}}}}
    ),
    "an unknown sampler": settings(sampler={"class_path": "DDIMM"}),
    "a sampler that is a number": settings(sampler=3),
    "knots that coincide": settings(grid=KNOTS),
    "a trillion steps": settings(sample_steps=10**12),
    "a config that is a link": linked("config.yaml"),
    "weights that are a pickle": content("ema.safetensors", pickle.dumps(Bomb())),
    "weights with a long header": header("ema.safetensors", 2**62),
    "weights with a header of 64 MB": header("ema.safetensors", 1 << 26, (1 << 26) + 8),
    "weights of 10 TB": header("ema.safetensors", 100, 10**13),
    "weights that are a link": linked("ema.safetensors"),
}  # fmt: skip
"""Name -> damage to a run that `sample` reads."""

SECRET = {"../../../outside/secret": {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}}
CHECKPOINTS: dict[str, Damage] = {
    "a manifest that leads out": manifest(lambda data: data["files"].update(SECRET)),
    "a manifest of a huge file": manifest(
        lambda data: data["files"]["model.safetensors"].update({"bytes": 10**15})
    ),
    "a manifest whose files are a list": manifest(lambda data: data.update({"files": ["a"]})),
    "a manifest without a state": manifest(lambda data: data.update({"state": {"step": 4}})),
    "a manifest whose step is a text": manifest(lambda data: data["state"].update({"step": "x"})),
    "a manifest without tensors": manifest(lambda data: data.update({"files": {}})),
    "a checkpoint that is a pickle": pickled_checkpoint,
}
"""Name -> damage to a checkpoint that `train --resume` reads."""

UNET = "unet/diffusion_pytorch_model"
PIPELINES: dict[str, Damage] = {
    **{
        f"a part is {library}.{name}": entries("model_index.json", unet=[library, name])
        for library, name in (
            ("os", "system"),
            ("builtins", "eval"),
            ("torch", "load"),
            ("transformers", "pipeline"),
            ("diffusers", "loaders"),
            ("diffusers", "DiffusionPipeline"),
            ("accelerate", "Accelerator"),
        )
    },
    "a part is code beside it": own_code,
    "a part is a text": entries("model_index.json", unet="diffusers"),
    "a part is an empty list": entries("model_index.json", unet=[]),
    "a scale is a launcher": entries(
        "model_index.json", guidance={"class_path": "CFG", "init_args": {"scale": ELASTIC}}
    ),
    "guidance is os.system": entries("model_index.json", guidance=spec("os.system")),
    "a sampler is os.system": entries("scheduler/scheduler_config.json", sampler=spec("os.system")),
    "a huge table": entries("scheduler/scheduler_config.json", schedule=TABLE),
    "an index in UTF-16": recoded("model_index.json"),
    "an index that is a list": content("model_index.json", "[]"),
    "an index that is null": content("model_index.json", "null"),
    "an index that lacks parts": content("model_index.json", '{"_class_name": "DiffcorePipeline"}'),
    "a huge network": entries("unet/config.json", block_out_channels=[64_000, 64_000]),
    "a million layers": entries("unet/config.json", layers_per_block=10**6),
    "a config in UTF-16": recoded("unet/config.json"),
    "a config that is a list": content("unet/config.json", "[]"),
    "a config that names code": entries("unet/config.json", auto_map={"AutoModel": "attack.Net"}),
    "weights that are a pickle": only_pickle(f"{UNET}.bin"),
    "an index of a pickle": indexed(f"{UNET}.safetensors.index.json", "attack.bin"),
    "an index that leads out": indexed(
        f"{UNET}.safetensors.index.json", "../../outside/secret.safetensors"
    ),
    "a long header": header(f"{UNET}.safetensors", 2**62),
    "weights of 10 TB": header(f"{UNET}.safetensors", 100, 10**13),
    "weights that are a link": linked(f"{UNET}.safetensors"),
    "a folder that is a link": linked("unet", "../outside"),
}  # fmt: skip
"""Name -> damage to a DiffcorePipeline, which `from_diffusers` and `sample` read too."""

ENCODER = "text_encoder/config.json"
TEXT_PIPELINES: dict[str, Damage] = {
    "a text encoder with a kernel of a hub": entries(ENCODER, _attn_implementation="owner/kernel"),
    "a text encoder with code": entries(ENCODER, auto_map={"AutoModel": "attack.Net"}),
    "a text encoder of an adapter": content(
        "text_encoder/adapter_config.json", '{"base_model_name_or_path": "owner/name"}'
    ),
    "an index of a pickle": indexed("text_encoder/model.safetensors.index.json", "attack.bin"),
    "an index that leads out": indexed(
        "text_encoder/model.safetensors.index.json", "../../outside/secret.safetensors"
    ),
    "a huge text encoder": entries(ENCODER, vocab_size=10**12),
    "a million layers": entries(ENCODER, num_hidden_layers=10**6),
    "weights that are a pickle": only_pickle("text_encoder/pytorch_model.bin"),
    "a tokenizer that leads out": lambda folder: entries(
        "tokenizer/tokenizer_config.json", vocab_file=str((folder / "../outside/secret").resolve())
    )(folder),
    "a tokenizer with code": entries(
        "tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": ["attack.T", None]}
    ),
}
"""Name -> damage to a pipeline of Stable Diffusion, whose text encoder is read."""
