"""A pretrained language model, its training on real texts, and every rival on its checkpoints."""
