"""A run: what is to be measured, in what pieces, by whom, at what cost, and how far it is."""
