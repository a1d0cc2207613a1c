"""One module for each command, with `arguments(parser)` and `run(args, out)`."""
