"""Helpers that several packages share: text, numbers, files, processes, pickles, memory and FLOPs."""
