"""The arithmetic: kernels, their launchers, plain PyTorch oracles and the native extension's sources."""
