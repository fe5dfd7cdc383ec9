"""One thread for torch: tiny tensors on a busy machine take several times as long with more."""

import torch

torch.set_num_threads(1)
collect_ignore = ["chaos"]  # a quarter of an hour; named on the command line it is collected
