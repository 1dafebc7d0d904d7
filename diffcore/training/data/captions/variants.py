"""Variants of captions: templates, shuffled tags and dropped tags."""

from collections.abc import Iterator
from dataclasses import dataclass

from diffcore.core.random import Stream, derive_seed, permutation, uniform

__all__ = ["CaptionVariants"]

FIELD = "{caption}"
LARGEST = 1024
"""Largest number of versions of a caption: the embedding of each is cached."""


@dataclass(frozen=True)
class CaptionVariants:
    """The texts that an image is trained with, one of which is chosen at each visit by its key.

    Text embeddings are computed once and cached. An image therefore has a fixed number of texts,
    each of its captions in each template, and of each `orders` versions if tags are shuffled or
    dropped. All of them are encoded before the run. A new order of the tags at every visit would
    need the text encoder in the training loop, and is not available.

    Args:
        templates: texts around the caption, with {caption} in the place of it.
        separator: text between two tags.
        shuffle: whether the tags are shuffled.
        keep: number of first tags that stay in their places, and are not dropped.
        tag_dropout: probability that a tag is dropped, in [0, 1). The dropout of the whole caption
            is `process.dropout`.
        orders: number of versions of each caption with shuffled or dropped tags, at least 2 with
            either.
        seed: key of the versions, which do not depend on the seed of the run.

    Raises:
        ValueError: A number is out of range, a template lacks {caption}, or there are versions
            without shuffling or dropout.

    Example:
        >>> CaptionVariants(("a photo of {caption}", "{caption}")).texts(("a cat",), 0)
        ('a photo of a cat', 'a cat')
    """

    templates: tuple[str, ...] = (FIELD,)
    separator: str = ","
    shuffle: bool = False
    keep: int = 0
    tag_dropout: float = 0.0
    orders: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "templates", tuple(self.templates))
        for template in self.templates or ("",):
            if FIELD not in template:
                raise ValueError(f"templates contains {template!r}, expected a text with {FIELD}")
        if self.orders > LARGEST:
            raise ValueError(f"orders is {self.orders}, expected at most {LARGEST}")
        if not 0 <= self.tag_dropout < 1 or self.keep < 0 or not self.separator:
            raise ValueError(
                f"tag_dropout, keep and separator are {self.tag_dropout}, {self.keep} and "
                f"{self.separator!r}, expected a probability in [0, 1), at least 0, and a text"
            )
        if self.orders < 1 + self.has_tags or (self.orders > 1 and not self.has_tags):
            raise ValueError(
                f"orders is {self.orders}, expected at least 2 with shuffle or tag_dropout, and 1 "
                "without: text embeddings are cached, so that a fixed number of versions of each "
                "caption is encoded"
            )

    @property
    def has_tags(self) -> bool:
        """Whether tags are shuffled or dropped."""
        return self.shuffle or self.tag_dropout > 0

    def texts(self, captions: tuple[str, ...], index: int) -> tuple[str, ...]:
        """The texts of an image.

        Args:
            captions: captions of the image.
            index: index of the image in the data set, a part of the key.

        Returns:
            The distinct texts, in order.
        """
        versions = (
            version
            for number, caption in enumerate(captions)
            for version in self._versions(caption, index * len(captions) + number)
        )
        texts = [
            template.replace(FIELD, version) for version in versions for template in self.templates
        ]
        return tuple(dict.fromkeys(texts))

    def _versions(self, caption: str, number: int) -> Iterator[str]:
        if not self.has_tags:
            yield caption
            return
        tags = [tag.strip() for tag in caption.split(self.separator)]
        fixed, free = tags[: self.keep], tags[self.keep :]
        seed = derive_seed(self.seed, Stream.CAPTION, number)
        for order in range(self.orders):
            kept = uniform(seed, Stream.CAPTION, order, len(free))[0] >= self.tag_dropout
            rows = (
                permutation(seed, order, len(free)).tolist() if self.shuffle else range(len(free))
            )
            chosen = [free[row] for row in rows if kept[row]]
            yield f"{self.separator} ".join(fixed + chosen)
