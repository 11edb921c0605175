"""What ends an offline run: said in one sentence that tells the way out. What is done stays done."""


class OfflineError(Exception):
    """The command cannot go on; the message is for the user."""
