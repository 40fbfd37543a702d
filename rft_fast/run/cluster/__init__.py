"""Workers on several GPUs or machines, by Ray. Each loads models and images once and measures pieces.

Results depend neither on which worker made them nor on the number of workers: noise is counter-based, and one
worker makes a measurement as a whole. Each measurement is sent back at once and is on disk before it counts.
When a worker dies, only the measurement in flight is lost, and another worker repeats it.

This package imports nothing: Ray is loaded only when it is used.
"""
