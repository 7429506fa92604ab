"""Pure functions of tensors and numbers: how many weights, which ones, when."""
