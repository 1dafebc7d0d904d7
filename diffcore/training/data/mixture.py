"""Several data sets as one: with weights or repeats, and with weights of their losses."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from diffcore.training.data.adapters import as_data_source
from diffcore.training.data.buckets.groups import Groups
from diffcore.training.data.cache import hash_content
from diffcore.training.data.checks import split_item
from diffcore.training.data.source import WEIGHT, DataSource

__all__ = ["Mixture"]


class Mixture(DataSource):
    """Several data sets, which share every batch in given proportions.

    Prior preservation is a mixture of the images of a subject and images of its class, with the
    weight of the loss of the latter (Ruiz et al. 2023, 2208.12242):

        Mixture([subject, classes], shares=[1, 1], loss_weights=[1, 0.5])

        loss = (Σ_subject L_i + ½ Σ_classes L_i) / batch

    Args:
        data: data sets whose x_0 have the same channels; all with captions, or none. Labels of
            classes are those of the data sets; captions are joined.
        repeats: number of times that an item of each data set is read in an epoch, which may be a
            fraction; [] for once.
        shares: proportion of the samples of each data set, in place of repeats; [] for the
            proportions of items times repeats.
        loss_weights: factor of the loss of each data set, at least 0; [] for 1.

    Raises:
        ValueError: There are no data sets, a list has another length than `data`, a number is out
            of range, or data sets do not fit together.
    """

    labels: Tensor | None = None

    def __init__(
        self,
        data: list[Dataset],  # type: ignore[type-arg]  # jsonargparse reads the bare class
        repeats: Sequence[float] = (),
        shares: Sequence[float] = (),
        loss_weights: Sequence[float] = (),
    ) -> None:
        self.sources = sources = [as_data_source(each) for each in data]
        _check_lengths(len(sources), repeats=repeats, shares=shares, loss_weights=loss_weights)
        if any(not 0 < share < float("inf") for share in (*shares, *repeats)):
            raise ValueError(
                f"shares and repeats are {list(shares)} and {list(repeats)}, expected positive "
                "finite numbers"
            )
        if shares and repeats:
            raise ValueError("shares and repeats both set the proportions: give one of them")
        _check_fit(sources)
        self.weights = [float(weight) for weight in loss_weights]
        if any(not 0 <= weight < float("inf") for weight in self.weights):
            raise ValueError(
                f"loss_weights is {self.weights}, expected finite numbers of at least 0"
            )
        if self.weights and not any(self.weights):
            raise ValueError(
                f"loss_weights is {self.weights}, so that nothing is trained: expected a positive "
                "one"
            )
        sizes = [len(source) for source in sources]
        self.starts = [sum(sizes[:number]) for number in range(len(sizes))]
        self.part = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        self.texts = tuple(sorted({text for source in sources for text in source.texts}))
        self.class_names = sources[0].class_names
        self.is_latent = sources[0].is_latent
        self.inputs = dict(item for source in sources for item in source.inputs.items())
        self.has_masks = any(source.has_masks for source in sources)
        self.visits = _visits(sizes, repeats, shares)
        self.relabelled = self._relabelling()
        self.labels = self._labels()
        self.groups = self._groups()

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]
        part, row = self._locate(index)
        return self._with_weight(self.sources[part][row], index, part)

    def item(self, index: int, seed: int, position: int) -> Any:
        """The item at a position of the run, with the label and the weight of the mixture.

        Args:
            index: index of the item in the mixture.
            seed: seed of the run.
            position: number of samples of the run before this one.

        Returns:
            x_0, the label and the extras.
        """
        part, row = self._locate(index)
        return self._with_weight(self.sources[part].item(row, seed, position), index, part)

    def _locate(self, index: int) -> tuple[int, int]:
        part = int(self.part[index])
        return part, index - self.starts[part]

    def _with_weight(self, item: Any, index: int, part: int) -> tuple[Any, int, dict[str, Tensor]]:
        x0, label, extras = split_item(item, index)
        extras = dict(extras)
        if self.weights or self.has_masks:
            weight = extras.get(WEIGHT, torch.ones((1,) * x0.ndim))
            weight = weight * (self.weights[part] if self.weights else 1.0)
            extras[WEIGHT] = weight.expand(1, *x0.shape[1:]) if self.has_masks else weight
        return x0, int(self.relabelled[part][label]) if self.texts else label, extras

    def _relabelling(self) -> list[Tensor]:
        """Label of each text of each source in the joined texts."""
        indices = {text: index for index, text in enumerate(self.texts)}
        return [torch.tensor([indices[text] for text in source.texts]) for source in self.sources]

    def _labels(self) -> Tensor | None:
        known = [source.labels for source in self.sources]
        if any(labels is None for labels in known):
            return None
        labels = [torch.as_tensor(each) for each in known]
        if self.texts:
            labels = [table[own] for table, own in zip(self.relabelled, labels, strict=True)]
        return torch.cat(labels)

    def _groups(self) -> Groups:
        grouped = [source.groups for source in self.sources]
        if all(groups is None for groups in grouped):
            # The shape is not known without reading an item, and one bucket needs none.
            return Groups((), torch.zeros(len(self), dtype=torch.int64), self.part, self.visits)
        if any(groups is None for groups in grouped):
            raise ValueError(
                "some data sets of the mixture have buckets and others have none: give the same "
                "buckets to all of them"
            )
        shapes = tuple(
            dict.fromkeys(shape for groups in grouped if groups for shape in groups.shapes)
        )
        bucket = torch.cat(
            [
                torch.tensor([shapes.index(shape) for shape in groups.shapes])[groups.bucket]
                for groups in grouped
                if groups
            ]
        )
        return Groups(shapes, bucket, self.part, self.visits)

    @property
    def vae(self) -> Any:
        return self.sources[0].vae

    @property
    def content_hash(self) -> str:
        """Hash of the data sets, their order and their numbers; "" if one is unknown."""
        hashes = [source.content_hash for source in self.sources]
        return hash_content(*hashes, str((self.visits, self.weights))) if all(hashes) else ""

    @property
    def encoder_hash(self) -> str:
        return self.sources[0].encoder_hash

    @property
    def is_ready(self) -> bool:
        return all(source.is_ready for source in self.sources)

    def prepare(self, device: torch.device, is_main_process: bool) -> None:
        for source in self.sources:
            source.prepare(device, is_main_process)

    def label_wrapper(self, device: torch.device) -> Callable[[nn.Module], nn.Module]:
        bank = self.prompts()
        if bank is None and self.texts:
            return self.sources[0].prompt_wrapper(self.texts, "", device)
        if bank is None:
            return self.sources[0].label_wrapper(device)
        from diffcore.integrations.diffusers.loading.prompts import wrap_with

        return wrap_with(bank, device)

    def prompt_wrapper(
        self, prompts: Sequence[str], negative: str, device: torch.device
    ) -> Callable[[nn.Module], nn.Module]:
        return self.sources[0].prompt_wrapper(prompts, negative, device)

    def prompts(self) -> Any:
        """Join the banks of captions.

        Returns:
            The bank, with the null condition of the first data set; None without captions, or if
            the network encodes them.

        Raises:
            ValueError: the network encodes the captions of some data sets, and not of others.
        """
        banks = [source.prompts() for source in self.sources]
        if all(bank is None for bank in banks):
            return None
        if any(bank is None for bank in banks):
            raise ValueError(
                "some data sets of the mixture have the captions as text: tokens, and others as "
                "embeddings: give the same text to all of them"
            )
        first = banks[0]
        row_of = {text: (bank, row) for bank in banks for row, text in enumerate(bank.texts)}
        rows = [*(row_of[text] for text in self.texts), (first, len(first))]
        tensors = {
            name: torch.stack([bank.tensors[name][row] for bank, row in rows])
            for name in first.tensors
        }
        functions = (bank.size_arguments for bank in banks if bank.size_arguments)
        return type(first)(tensors, self.texts, next(functions, None))

    def decode(self, x: Tensor) -> Tensor:
        return self.sources[0].decode(x)


def _check_lengths(count: int, **lists: Sequence[float]) -> None:
    if not count:
        raise ValueError("data is empty, expected at least one data set")
    for name, values in lists.items():
        if len(values) not in (0, count):
            raise ValueError(
                f"{name} has {len(values)} numbers, expected one for each of {count} data sets"
            )


def _check_fit(sources: Sequence[DataSource]) -> None:
    """Raise ValueError if the data sets cannot be read in one order, or mean different things."""
    if any(isinstance(source, Mixture) for source in sources):
        raise ValueError(
            "a data set of the mixture is a mixture, whose shares and repeats have no meaning in "
            "another: list all data sets in one mixture"
        )
    if streams := [type(source).__name__ for source in sources if source.is_stream]:
        raise ValueError(
            f"{streams[0]} in a mixture is read only in its own order, which a mixture does not "
            "have: use a data set that is not a stream, such as TarShards or HuggingFaceData"
        )
    first = sources[0]
    for source in sources[1:]:
        if bool(source.texts) != bool(first.texts) or source.encoder_hash != first.encoder_hash:
            raise ValueError(
                "the data sets of a mixture must all have captions or all have none, and have the "
                "same encoders: give captions to all, or set captions: false, and one pipeline"
            )
        if not first.texts and source.class_names != first.class_names:
            raise ValueError(
                f"the data sets of the mixture have the classes {first.class_names} and "
                f"{source.class_names}: give all folders the same sub-folders"
            )


def _visits(
    sizes: Sequence[int], repeats: Sequence[float], shares: Sequence[float]
) -> tuple[float, ...]:
    """Number of times that an item of each data set is read in an epoch."""
    if not shares:
        return tuple(float(each) for each in repeats) or (1.0,) * len(sizes)
    total = sum(sizes)
    return tuple(
        share / sum(shares) * total / size for share, size in zip(shares, sizes, strict=True)
    )
