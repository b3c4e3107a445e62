"""Choosing and preparing the device and the threads a run computes with."""

import os

import torch


def prepare(device: str, threads: int, deterministic: bool) -> torch.device:
    """Set up the process and return the device.

    `device` is "auto", "cpu" or "cuda"; `threads` 0 leaves PyTorch's choice. Raises ValueError where "cuda" is asked
    for and there is none. Determinism is set both ways, so that one process can run one after the other.
    """
    if device == "cuda" and not torch.cuda.is_available():
        build = (
            "was built without CUDA"
            if torch.version.cuda is None
            else f"finds no usable GPU (CUDA {torch.version.cuda})"
        )
        raise ValueError(f'run.device is "cuda", but PyTorch {torch.__version__} {build}: use "auto" or "cpu"')
    if threads:
        torch.set_num_threads(threads)
    if deterministic:
        # cuBLAS reads this when its first handle is made; later it has no effect.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # fp32 means fp32: PyTorch lets cuDNN's convolutions round their inputs to TF32 unless told otherwise.
    allow_tf32(False)
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def allow_tf32(allowed: bool) -> None:
    """Whether fp32 products and convolutions on a GPU may round their operands to TF32."""
    # First the one flag that there once was: torch.export fails where it differs from the newer ones, which it resets.
    torch.backends.cudnn.allow_tf32 = allowed
    precision = "tf32" if allowed else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]
