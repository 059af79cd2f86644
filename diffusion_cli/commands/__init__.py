"""The subcommands: one module each, with a `run(config)` that is a list of nouns."""
