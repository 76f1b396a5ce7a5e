"""Bytes -> named tensors (`readers`), other ecosystems' names -> Hugging Face names (`dialects`) -> ours (`keymap`)."""
