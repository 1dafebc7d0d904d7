"""The number of classes of each family's network, as far as its config determines it."""

from diffcore.integrations.diffusers.families.family import Config

__all__ = ["DIT_NULL_LABEL", "check_label_embedding", "dit_class_count"]

DIT_NULL_LABEL = 1000
"""The null label of DiTPipeline, which is a constant there."""


def dit_class_count(config: Config, given: Config) -> int:
    """Number of classes of a DiT; its embedding has one row more, for the null label.

    Args:
        config: the network's config.
        given: fields of the Process that the caller gives; not used.

    Returns:
        K, the number of classes.
    """
    count: int = config["num_embeds_ada_norm"]
    return count


def check_label_embedding(config: Config, given: Config) -> None:
    """Check that the caller gives the classes of a UNet2DModel, whose config has no null label.

    Args:
        config: the network's config.
        given: fields of the Process that the caller gives.

    Raises:
        ValueError: the network embeds labels, and `classes` or `dropout` is not given; or it is
            conditioned on something else than a label.
    """
    if (kind := config.get("class_embed_type")) is not None:
        raise ValueError(
            f"class_embed_type is {kind!r}, expected labels in a table (num_class_embeds)"
        )
    count = config.get("num_class_embeds")
    if count is not None and not {"classes", "dropout"} <= given.keys():
        raise ValueError(
            f"the network embeds {count} labels, and its config does not determine whether the "
            f"last is the null label. Pass classes={count - 1} and the dropout of its training; "
            f"or, if it has no null label, classes={count - 1} and dropout=0.0: label {count - 1} "
            f"is then a class too, and guidance without condition is refused"
        )
