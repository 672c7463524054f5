"""The GPU itself: is there one, can it run our kernels, how much memory is free; each refusal in one sentence.

Functions take numba's ``cuda`` module as an argument, so that a test can stand in any machine for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

OLDEST = (7, 5)  # compute capability: Turing, the oldest that the CUDA 13 compiler knows
DRIVER = (13, 0)  # what the driver must support: the CUDA version of the toolkit that is pinned in the extra

NO_DRIVER = "cannot be found"  # in numba's words about a missing driver library


def require_gpu(cuda: Any) -> None:
    """Raise ``ValueError``, in one sentence, unless the first GPU can be used."""
    start, end = "backend is 'cuda', but ", "; choose 'numba' or 'numpy' to run on the processor."
    if not cuda.is_available():
        error = cuda.cuda_error()
        if error is None:
            raise ValueError(
                f"{start}no CUDA 13 toolkit was found; install it with pip install 'sewd-np[cuda]', "
                "or choose 'numba' or 'numpy' to run on the processor."
            )
        if NO_DRIVER in error:
            raise ValueError(f"{start}no NVIDIA driver was found on this machine{end}")
        if "NO_DEVICE" in error:
            raise ValueError(f"{start}the NVIDIA driver finds no GPU on this machine{end}")
        raise ValueError(f"{start}the NVIDIA driver does not start ({' '.join(error.split())}){end}")
    found = driver_version(cuda)
    if found < DRIVER:
        raise ValueError(
            f"{start}the NVIDIA driver supports CUDA {dotted(found)} and {dotted(DRIVER)} is needed; "
            "update the driver (580 or newer), or choose 'numba' or 'numpy' to run on the processor."
        )
    device = cuda.get_current_device()
    if tuple(device.compute_capability) < OLDEST:
        raise ValueError(
            f"{start}the GPU {device_name(device)} has compute capability {dotted(device.compute_capability)} "
            f"and {dotted(OLDEST)} or newer is needed{end}"
        )


def dotted(version: tuple[int, ...]) -> str:
    """(13, 0) as "13.0"."""
    return ".".join(map(str, version))


def driver_version(cuda: Any) -> tuple[int, int]:
    """The newest CUDA version that the driver supports, (major, minor)."""
    major, minor = cuda.cudadrv.driver.get_version()
    return major, minor


def device_name(device: Any) -> str:
    """The GPU's name; numba gives bytes in some versions."""
    name = device.name
    return name.decode() if isinstance(name, bytes) else str(name)


def free_bytes(cuda: Any) -> float:
    """Bytes of the GPU's memory that nobody holds; the simulator has infinitely many."""
    free: float = cuda.current_context().get_memory_info().free
    return free


def describe(cuda: Any, products: str) -> dict[str, str]:
    """What ``sewd-np info`` says about the GPU; ``products`` names who computes the matrix products."""
    device, memory = cuda.get_current_device(), cuda.current_context().get_memory_info()
    return {
        "GPU": f"{device_name(device)}, compute capability {dotted(device.compute_capability)}",
        "GPU memory": f"{memory.free / 1e9:.1f} GB free of {memory.total / 1e9:.1f} GB",
        "driver": f"supports CUDA {dotted(driver_version(cuda))}",
        "matrix products": products,
    }


def new_stream(cuda: Any) -> Any:
    """A stream that neither waits for CUDA's default stream nor makes it wait.

    numba's own streams do both, and the driver breaks off the recording of a graph on such a stream when any thread of
    the process, PyTorch's say, uses the default one. So cuda.core makes the stream and numba works on it.
    """
    cuda.current_context()  # numba's context, in which the stream is made
    from cuda.core import Device, StreamOptions

    device = Device(cuda.get_current_device().id)
    device.set_current()
    made = device.create_stream(options=StreamOptions(nonblocking=True))
    stream = cuda.external_stream(int(made.handle))
    stream.made = made  # who goes with it: numba does not own a stream that it is given
    return stream


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a driver error is the one for no memory left (CUDA_ERROR_OUT_OF_MEMORY, number 2)."""
    return getattr(error, "code", None) == 2


def allocate(cuda: Any, numbers: int) -> Any:
    """Device memory for ``numbers`` float32, one row.

    Raises ``MemoryError`` that says what was asked for, what is free and what to do.
    """
    try:
        return cuda.device_array(numbers, np.float32)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        memory = cuda.current_context().get_memory_info()
        raise MemoryError(
            f"the GPU has no room for another {4 * numbers / 1e9:.2f} GB: {memory.free / 1e9:.2f} of its "
            f"{memory.total / 1e9:.1f} GB are free; cut the recording into shorter pieces or run fewer at a time."
        ) from error
