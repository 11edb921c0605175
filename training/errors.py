"""The error that ends the training of a policy."""


class TrainingError(ValueError):
    """The policy cannot be trained with these settings or this data. The message names the cause and a remedy."""
