"""The commands, one module each with a function `run(config)`, and the modules that they share."""
