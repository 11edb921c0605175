"""The error that ends an offline command. Records that were written before it are kept."""


class OfflineError(Exception):
    """The command cannot continue. The message, without a final period, tells the user why and what to do."""
