"""What is done with the library from outside. Not here: anything that it or its benchmarks need to run."""
