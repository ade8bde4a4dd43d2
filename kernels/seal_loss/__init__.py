"""The selective-alignment distillation loss (SeAl-KD, arXiv 2605.14252) and its ancestors."""
