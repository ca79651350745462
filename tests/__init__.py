"""The tests; a package, so that a spawned process finds a function of a test module by its name."""
