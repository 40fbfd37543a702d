"""What several packages need: text, numbers, files, processes, pickles, costs of a callable."""
