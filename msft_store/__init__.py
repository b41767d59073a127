"""A content-addressed delta store for model checkpoints."""
