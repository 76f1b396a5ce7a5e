"""Pretraining: text -> tokens -> samples -> batches -> steps -> a directory that loads; `run.pretrain` is all of it."""
