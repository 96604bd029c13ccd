"""What all tests share."""

import torch

# Tiny models on a busy machine: two threads that wait for each other are slower than one.
torch.set_num_threads(1)
