"""Pretraining: data and objectives (`data`), the loop (`pretrain`)."""
