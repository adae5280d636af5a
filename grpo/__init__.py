"""The training room: configuration, batches, objective, learner, the loop and the `keel` command."""
