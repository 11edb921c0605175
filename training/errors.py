"""What ends the training of a policy."""


class TrainingError(ValueError):
    """The policy cannot be trained like this. The message says the way out."""
