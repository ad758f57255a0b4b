"""Training steps on CUDA tensors that do not exist: device mixes, memory, launches and stalls, anywhere."""
