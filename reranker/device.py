"""Where models run."""

from typing import Literal

Device = Literal["auto", "cpu", "cuda"]


def pick_device(device: Device) -> Literal["cpu", "cuda"]:
    """The device itself; for auto, CUDA where torch sees a device and the CPU elsewhere."""
    import torch  # here, so that naming a device takes no second to import

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device
