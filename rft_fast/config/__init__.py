"""What is requested: options of the command line, zoo files, and the request that they make."""
